"""The experts of a block as one layer on a GPU, where `kernels.moe` takes their format. Knows no router.

T tokens, k experts of a token, H hidden size, I intermediate size of an expert, E experts.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import LinearWeights
from convert.config import ModelConfig
from engine.model.layers import dense_weight, pack_int4, runs_packed
from kernels.int4 import Quantized

if TYPE_CHECKING:
    from kernels.moe.weights import ExpertWeights


class ExpertLayers:
    """Every token through its experts, without a wait for the device."""

    def __init__(self, gate_up: "ExpertWeights", down: "ExpertWeights") -> None:
        from kernels.moe.product import moe_mlp

        self._gate_up, self._down, self._product = gate_up, down, moe_mlp

    def __call__(self, h: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """h (T, H), chosen and weights (T, k) -> (T, H)."""
        return self._product(h, chosen, weights, self._gate_up, self._down)

    def of_expert(self, expert: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """silu(gate) * up of one expert, (T, H) -> (T, I), and its down product, (T, I) -> (T, H)."""
        return _one(self._gate_up, expert), _one(self._down, expert)

    @property
    def size_bytes(self) -> int:
        return self._gate_up.size_bytes + self._down.size_bytes


def _one(weights: "ExpertWeights", expert: int) -> Callable[[Tensor], Tensor]:
    one = weights.of_expert(expert)
    if not isinstance(one, Tensor):
        from kernels.w4a16.product import w4a16_linear

        return lambda x: w4a16_linear(x, one)
    if not weights.is_paired:
        return lambda x: F.linear(x, one)

    def gated(x: Tensor) -> Tensor:
        product = F.linear(x, one)
        return F.silu(product[..., 0::2]) * product[..., 1::2]

    return gated


def make_experts(
    linears: Mapping[str, LinearWeights], config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> ExpertLayers | None:
    """The linears "experts.{e}.gate|up|down" as one layer; None where the kernels do not take them: not on a GPU, another
    activation than SiLU, float32, biases, or formats that differ between experts."""
    if torch.device(device).type != "cuda" or config.activation != "silu":
        return None
    from kernels.moe.product import DTYPES
    from kernels.moe.weights import stack, stack_floats
    from kernels.w4a16.layout import pair

    gates, ups, downs = (
        [linears[f"experts.{expert}.{role}"] for expert in range(config.num_experts)]
        for role in ("gate", "up", "down")
    )
    parts = [*gates, *ups, *downs]
    if dtype not in DTYPES or any(part.bias is not None for part in parts):
        return None
    formats = {part.weight.group_size if isinstance(part.weight, Quantized) else 0 for part in parts}
    if len(formats) > 1:
        return None
    if formats == {0}:
        floats = [[dense_weight(p.weight, dtype, device) for p in group] for group in (gates, ups, downs)]
        return ExpertLayers(stack_floats(floats[0], floats[1]), stack_floats(floats[2]))
    if not all(runs_packed(part, dtype, device) for part in parts):
        return None
    paired = [
        pair(pack_int4(gate, device), pack_int4(up, device)) for gate, up in zip(gates, ups, strict=True)
    ]
    return ExpertLayers(stack(paired), stack([pack_int4(down, device) for down in downs]))
