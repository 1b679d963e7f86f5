"""Experts as one layer against each of them run alone. The kernels' torch reference runs here; tests/gpu has the kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.expert_layers import ExpertLayers, make_experts
from engine.model.experts import weighted_sum
from kernels.int4 import Quantized, quantize
from kernels.moe.weights import stack, stack_floats
from kernels.w4a16.layout import pair, prepare

E, H, INNER, T, K = 5, 128, 64, 11, 2


def weights_of(role: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(role)
    shape = (H, INNER) if role == 2 else (INNER, H)
    return [torch.randn(shape, generator=generator) * 0.1 for _ in range(E)]


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    weights, chosen = torch.rand(T, E, generator=generator).topk(K, dim=1)
    return torch.randn(T, H, generator=generator), chosen, weights


def one_by_one(parts: list[list[Tensor]]) -> Tensor:
    x, chosen, weights = routed()

    def run(expert: int, inputs: Tensor) -> Tensor:
        gate, up, down = (part[expert] for part in parts)
        return (F.silu(inputs @ gate.t()) * (inputs @ up.t())) @ down.t()

    return weighted_sum(x, weights, chosen, E, run)


def each_alone(layers: ExpertLayers) -> Tensor:
    """Each expert taken out of the layer and run on its tokens."""
    x, chosen, weights = routed()

    def run(expert: int, inputs: Tensor) -> Tensor:
        gate_up, down = layers.of_expert(expert)
        return down(gate_up(inputs))

    return weighted_sum(x, weights, chosen, E, run)


def test_float_experts_as_one_layer() -> None:
    parts = [weights_of(role) for role in range(3)]
    layers = ExpertLayers(stack_floats(parts[0], parts[1]), stack_floats(parts[2]))
    torch.testing.assert_close(layers(*routed()), one_by_one(parts), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each_alone(layers), one_by_one(parts), rtol=1e-4, atol=1e-5)


def test_int4_experts_as_one_layer_and_each_alone() -> None:
    codes: list[list[Quantized]] = [[quantize(w, 4, 32) for w in weights_of(role)] for role in range(3)]
    gate_up = stack([pair(prepare(gate), prepare(up)) for gate, up in zip(codes[0], codes[1], strict=True)])
    layers = ExpertLayers(gate_up, stack([prepare(down) for down in codes[2]]))
    expected = one_by_one([[w.dequantize() for w in part] for part in codes])
    torch.testing.assert_close(layers(*routed()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each_alone(layers), expected, rtol=1e-4, atol=1e-5)


def test_no_layer_of_experts_without_a_gpu() -> None:
    assert make_experts({}, None, torch.float16, "cpu") is None  # type: ignore[arg-type]
