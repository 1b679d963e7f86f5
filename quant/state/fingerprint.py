"""What makes two runs the same run: source, text, settings, versions, device kind. Flat, so that a difference has a name."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quant.config import QuantConfig
from quant.session import Session
from quant.settings import KEY_SMOOTHING
from quant.stage_clock import stage

LIBRARIES = ("turbomind-quant", "torch", "transformers", "safetensors")


def library_versions() -> dict[str, str]:
    """Versions of the tool and of what its bytes depend on."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_kind(device: torch.device | str) -> str:
    """ "cpu", or the name of the GPU."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run_fingerprint(
    command: str, session: Session, quant: QuantConfig, text: dict[str, Any] | None
) -> dict[str, Any]:
    """The fingerprint of a run; `text` identifies what it reads (None: no text)."""
    with stage("digest of the source"):
        source = session.checkpoint.digest()
    table: dict[str, Any] = {
        "command": command,
        "source": source,
        "model": str(session.config),
        "device": device_kind(session.device),
        "dtype": str(session.dtype).removeprefix("torch."),
    }
    table |= {f"version of {name}": number for name, number in library_versions().items()}
    table |= quant.to_json() | quant.recipe.fingerprint(with_distillation=quant.distill)
    if quant.kv_bits != 16:
        table["smoothing of K"] = KEY_SMOOTHING.rule
    table |= {f"text {name}": value for name, value in (text or {}).items()}
    return table
