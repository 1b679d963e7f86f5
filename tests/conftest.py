"""Fixtures that more than one folder of tests uses."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel module is imported: set before any test module is
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with WikiText-2 and a C4 sample beside the checkout; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "wiki.test.raw").is_file():
        pytest.skip("evaluation text (wiki.test.raw) is not beside the checkout")
    return folder
