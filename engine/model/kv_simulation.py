"""What a quantized KV cache would return, computed on the spot: for perplexity without a cache. Also reads kv_params files.

T tokens, Hkv key/value heads, D head size. The rounding itself is defined in `kernels/kv/int8.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from convert.config import ModelConfig
from convert.errors import InputError
from convert.hf.safetensors_files import read_header, read_tensor
from convert.kv_parameters import IN_CHECKPOINT, find_kv_parameters
from engine.config import KvMode
from kernels.kv.int8 import dequantize_kv, kv_qparams, quantize_kv
from kernels.kv.pages import StaticKV


@dataclass(frozen=True)
class KVSimulation:
    """Keys and values go through `bits` bits and back. `params`, one a layer, only in static mode, ranges of 8 bits."""

    bits: Literal[4, 8]
    mode: KvMode = "dynamic"
    params: Sequence[StaticKV] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"kv_bits is {self.bits}: expected 8 or 4.")
        if (self.mode == "static") != (self.params is not None):
            raise ValueError("static KV parameters are needed in static mode, and only there.")

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k after RoPE and v, (T, Hkv, D): what the cache returns for them, in their dtype."""
        if self.params is None:
            return self._through(k), self._through(v)
        part = self.params[layer]
        return self._through(k, part.k_scale, part.k_zero), self._through(v, part.v_scale, part.v_zero)

    def _through(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        if scale is not None and zero is not None:
            scale, zero = scale.to(x.device), zero.to(x.device)
            if self.bits == 4:  # the same range in 16 steps
                scale, zero = kv_qparams(zero - 128 * scale, zero + 127 * scale, 4)
        codes, scale, zero = quantize_kv(x, self.bits, scale, zero)
        return dequantize_kv(codes, scale, zero, self.bits, x.dtype)


def read_kv_params(folder: Path, config: ModelConfig) -> list[StaticKV]:
    """Static parameters of every layer of a checkpoint or workspace, fp32 (Hkv,) each.

    Raises InputError where the file is missing, damaged, of another shape, or holds a value that is not finite.
    """
    path = find_kv_parameters(folder)
    if path is None:
        raise InputError(
            f"{folder} has no {IN_CHECKPOINT}: static KV parameters were not made for it. "
            "Use --kv-mode dynamic, which needs none, or quantize with --kv-bits 8."
        )
    tensors: Mapping[str, Tensor] = {name: read_tensor(info) for name, info in read_header(path).items()}
    return [
        StaticKV(*(_parameter(tensors, path, f"layers.{layer}.{part}", config) for part in PARTS))
        for layer in range(config.num_layers)
    ]


PARTS = ("k.scale", "k.zero", "v.scale", "v.zero")  # the order of StaticKV's fields


def _parameter(tensors: Mapping[str, Tensor], path: Path, name: str, config: ModelConfig) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(f"{path} lacks {name}: it belongs to another model or is cut short.")
    if tuple(tensor.shape) != (config.num_kv_heads,):
        raise InputError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, expected ({config.num_kv_heads},), one for each KV head."
        )
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all() or (name.endswith("scale") and not (tensor > 0).all()):
        raise InputError(
            f"{path}: {name} holds a value that is no usable parameter (NaN, infinite, or a scale of 0)."
        )
    return tensor
