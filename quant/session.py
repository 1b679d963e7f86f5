"""`Session`: what every stage of a run needs at once: the model, where and in which type it is computed, and who hears of it.

`open_session` makes one from what a user names: a path, a device, a dtype.
"""

from dataclasses import dataclass, field, replace
from os import PathLike

import torch

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError, UsageError
from convert.low_bit.float_view import FloatView
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from engine.loading import use_device
from engine.model.forward import compute_dtype
from quant.config import QuantConfig
from quant.progress import Progress


@dataclass(frozen=True)
class Session:
    """One model on one device. `dtype` is that of the forward passes (float32 on a CPU)."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    progress: Progress = field(default_factory=lambda: Progress("silent"))

    @property
    def config(self) -> ModelConfig:
        """The model's own configuration."""
        return self.checkpoint.config


def open_session(
    model: str | PathLike[str],
    *,
    device: str = "auto",
    dtype: str = "auto",
    family: str | None = None,
    pad_to: int | None = None,
    progress: Progress,
) -> Session:
    """Open the float model to work on.

    Args:
        model: folder of safetensors, .gguf file or hub name ("owner/model").
        device: "auto", "cpu", "cuda" or "cuda:N"; on a GPU it becomes this thread's CUDA device.
        dtype: "auto", "float16", "bfloat16" or "float32", of the forward passes.
        family: read the model as this family, whatever its config.json says.
        pad_to: zero-pad the model exactly, so that K of every linear is a multiple of this; None leaves it as it is.

    Raises InputError for a damaged, unknown or already quantized model, UsageError for a device that this machine does not have.
    """
    checkpoint = open_float_model(model, family=family, pad_to=pad_to)
    place = use_device(device)
    return Session(checkpoint, place, compute_dtype(checkpoint.config, place, dtype), progress)


def open_float_model(
    model: str | PathLike[str], *, family: str | None = None, pad_to: int | None = None
) -> Checkpoint:
    """The float checkpoint of a path or hub name, padded where asked. Raises InputError for one that is quantized already."""
    checkpoint = open_checkpoint(model, family=family)
    fmt = checkpoint.config.quantization
    if (
        fmt is not None
        and checkpoint.kind != "workspace-0.1"
        and fmt.method in ("gptq", "compressed-tensors")
    ):
        checkpoint = FloatView(checkpoint)
    elif fmt is not None:
        raise InputError(
            f"{model} is quantized already ({checkpoint.kind}): give the float model that it was made from. `quantize pack`, `evaluate` "
            f"and `tmq serve` take it as it is."
        )
    return checkpoint if pad_to is None else pad_checkpoint(checkpoint, pad_to)


def fit_seqlen(quant: QuantConfig, config: ModelConfig, is_given: bool) -> QuantConfig:
    """The default length of a sample lowered to the model's context. Raises UsageError for a given one that is longer."""
    if quant.seqlen <= config.max_position:
        return quant
    if is_given:
        raise UsageError(
            f"--seqlen is {quant.seqlen}, but the model's context is {config.max_position} tokens: ask for at most that."
        )
    return replace(quant, seqlen=config.max_position)
