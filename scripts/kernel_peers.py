# mypy: allow-any-expr, disable-error-code="no-any-return,import-not-found"
"""Published W4A16 products beside ours, each given the same codes, scales and zeros: cuBLAS fp16, tinygemm, humming, gemlite.

M tokens, N rows of the weight, K in features. A peer that cannot be imported is left out by name, never replaced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.int4 import Quantized
from kernels.w4a16.layout import W4Weight, prepare
from kernels.w4a16.product import w4a16_linear


class Peer:
    """One implementation for one weight: `parts` are the tensors it reads, copied to rotate past the L2 cache."""

    name = ""
    dtype = torch.float16

    def __init__(self, quantized: Quantized) -> None:
        self.parts = self.build(quantized)
        self.copies = [self.parts]

    def build(self, quantized: Quantized) -> list[Tensor]:
        raise TypeError(f"{type(self).__name__} does not say how it is built")

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how it multiplies")

    @property
    def size_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rotate(self, count: int) -> None:
        self.copies = [self.parts] + [[part.clone() for part in self.parts] for _ in range(count - 1)]

    def call(self, x: Tensor) -> Callable[[int], Tensor]:
        return lambda i: self.product(x, self.copies[i])


class Cublas(Peer):
    name = "cublas fp16"

    def build(self, quantized: Quantized) -> list[Tensor]:
        return [quantized.dequantize(torch.float16)]

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.nn.functional.linear(x, parts[0])


class Ours(Peer):
    """`w4a16_linear` behind any kernel."""

    name = "ours"
    is_dependent = False

    def build(self, quantized: Quantized) -> list[Tensor]:
        self.weight = prepare(quantized)
        return [self.weight.words, self.weight.params]

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        words, params = parts
        weight = W4Weight(words, params, None, self.weight.in_features, self.weight.group_size)
        return w4a16_linear(x, weight, is_dependent=self.is_dependent)


class OursDependent(Ours):
    """`w4a16_linear` as a dependent launch (its first loads overlap the end of the kernel before)."""

    name = "ours, dependent launch"
    is_dependent = True


class Tinygemm(Peer):
    name = "tinygemm"
    dtype = torch.bfloat16  # the only dtype it takes

    def build(self, quantized: Quantized) -> list[Tensor]:
        codes, scales = quantized.codes, quantized.scales.float()
        packed = torch.ops.aten._convert_weight_to_int4pack(
            (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8
        )
        offset = (8 - quantized.zeros.float()) * scales  # w = (q - 8) * s + offset
        self.group_size = quantized.group_size
        return [packed, torch.stack([scales, offset], -1).permute(1, 0, 2).contiguous().bfloat16()]

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, parts[0], self.group_size, parts[1])


class Humming(Peer):
    name = "humming"

    def build(self, quantized: Quantized) -> list[Tensor]:
        import humming.forward
        from humming import ops
        from humming.layer import HummingLayer

        rows, cols = quantized.shape
        config = {
            "dtype": "uint4",
            "group_size": quantized.group_size,
            "has_zero_point": True,
            "scale_dtype": "float16",
        }
        layer: Any = HummingLayer(
            shape_n=rows, shape_k=cols, torch_dtype=torch.float16, weight_config=config
        ).cuda()
        zeros = ops.pack_weight(quantized.zeros.t().contiguous().int(), 4).t().contiguous()
        weight = ops.pack_weight(quantized.codes.int().contiguous(), 4)
        layer.load_from_tensors({"weight": weight, "weight_scale": quantized.scales, "zero_point": zeros})
        layer.transform()
        self.config, self.locks, self.forward = (
            layer.humming_config,
            layer.locks,
            humming.forward.humming_forward,
        )
        return [layer.weight.data, layer.weight_scale.data, layer.zero_point.data]

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        weight, scale, zero = parts
        return self.forward(
            self.config, inputs=x, weight=weight, weight_scale=scale, zero_point=zero, locks=self.locks
        )


class Gemlite(Peer):
    name = "gemlite"

    def build(self, quantized: Quantized) -> list[Tensor]:
        import gemlite

        rows, cols = quantized.shape
        half = gemlite.DType.FP16
        layer = gemlite.GemLiteLinear(
            4,
            group_size=quantized.group_size,
            in_features=cols,
            out_features=rows,
            input_dtype=half,
            output_dtype=half,
        )
        layer.pack(quantized.codes, quantized.scales, quantized.zeros.half(), None)
        tensors = [getattr(part, "data", part) for part in layer.get_tensor_args()]
        self.meta, self.rest, self.forward = layer.get_meta_args(), tensors[3:], gemlite.forward_functional
        return tensors[:3]

    def product(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        return self.forward(x, None, parts + self.rest, self.meta)


PEERS: tuple[type[Peer], ...] = (Cublas, Ours, OursDependent, Tinygemm, Humming, Gemlite)
MODULES = {"humming": "humming", "gemlite": "gemlite"}
