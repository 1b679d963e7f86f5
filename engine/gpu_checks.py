"""What a CUDA device needs before our kernels run on it: a capability, Triton, and a folder for what Triton compiles."""

import importlib.util
import logging
import os
import tempfile
from pathlib import Path

import torch

from convert.errors import ResourceError

LEAST_CAPABILITY = (8, 0)  # bfloat16, asynchronous copies

log = logging.getLogger(__name__)


def check_gpu(device: torch.device) -> None:
    """Raises ResourceError, with what to do, where the kernels could not run on this device. Sees to their cache folder."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        least, found = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        raise ResourceError(
            f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {found}, and the GPU kernels need {least} "
            f"or above: use --device cpu, or another GPU."
        )
    if importlib.util.find_spec("triton") is None:
        raise ResourceError(
            f"{device} cannot be used: the package triton is not installed, and the GPU kernels are written in it. "
            f"Install it (`pip install triton`), or use --device cpu."
        )
    use_writable_cache()


def use_writable_cache() -> Path:
    """The folder in which Triton keeps compiled kernels; where it cannot be written, a new temporary one, with a warning."""
    asked = os.environ.get("TRITON_CACHE_DIR")
    folder = Path(asked) if asked else Path.home() / ".triton" / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="tmq-triton-"))
        os.environ["TRITON_CACHE_DIR"] = str(other)
        log.warning(
            "Compiled kernels cannot be kept in %s (%s): using %s, so they are compiled anew each time. "
            "Set TRITON_CACHE_DIR to a folder that can be written.",
            folder,
            error.strerror,
            other,
        )
        return other
