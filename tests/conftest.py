"""Fixtures that more than one folder of tests uses."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel module is imported: set before any test module is
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread while the tests of a module run, so that it adds in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with WikiText-2 and a C4 sample beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "wiki.test.raw").is_file():
        pytest.skip("evaluation text (wiki.test.raw) is not beside the checkout")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model, a folder or a .gguf file, named by TMQ_DEMO_MODEL; tests that need it skip where it is absent."""
    name = os.environ.get("TMQ_DEMO_MODEL")
    if name is None or not Path(name).exists():
        pytest.skip("the demo model is not here: set TMQ_DEMO_MODEL to its folder or .gguf file")
    return Path(name)


@pytest.fixture(scope="session")
def demo_out() -> Path:
    """The output folder of a finished demo, named by TMQ_DEMO_OUT; tests that look at it skip where it is absent."""
    name = os.environ.get("TMQ_DEMO_OUT")
    if name is None or not (Path(name) / "demo.json").is_file():
        pytest.skip("no finished demo is here: run scripts/demo.sh and set TMQ_DEMO_OUT to its folder")
    return Path(name)
