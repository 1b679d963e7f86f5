"""Our package `kernels` shares its import name with a package that transformers probes for: both must go on working."""

import importlib.metadata
import subprocess
import sys

import pytest

LOAD_TINY_MODEL = """
import kernels.int4
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=64
)
model = LlamaForCausalLM(config).eval()
assert model(torch.arange(8)[None]).logits.shape == (1, 8, 64)
"""


def test_kernels_package_stays_an_empty_namespace() -> None:
    import kernels

    public = [name for name in vars(kernels) if not name.startswith("__")]
    submodules = [name for name in public if f"kernels.{name}" in sys.modules]
    assert public == submodules, "kernels/__init__.py must define nothing"
    assert not hasattr(kernels, "__version__"), (
        "a version would make transformers take it for the other package"
    )


def test_transformers_loads_a_model_beside_our_kernels() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_TINY_MODEL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_distribution_named_kernels_is_installed() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")
