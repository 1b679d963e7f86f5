"""Tensor parallelism: the parts sum to the whole, for float and int4 weights, in one process and over gloo."""

import socket
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families.table import bias_roles, linear_shapes, norm_shapes
from engine.model.forward import Block, Model, block_forward, causal_attend
from engine.model.parallel import distributed, inner_range, shard_block, shard_config
from engine.model.rope import rotary
from kernels.int4 import quantize

CONFIG = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    hidden_size=64,
    intermediate_size=160,  # five groups of 32: one rank gets three
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=90,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=128,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    dtype="float32",
)
MIXTRAL = replace(CONFIG, family="mixtral", num_experts=4, experts_per_token=2, mlp_bias=False)


class RandomCheckpoint(Checkpoint):
    """Seeded weights; int4 of group 32 where the config says so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Path("random"), "hf", config, Path("random"))

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5

    def block(self, index: int) -> BlockWeights:
        linears = {}
        for i, (role, shape) in enumerate(linear_shapes(self.config).items()):
            weight = self._normal(100 * index + i, shape)
            bias = self._normal(7 + i, shape[:1]) if role in bias_roles(self.config) else None
            packed = self.config.quantization is not None and role != "router"
            linears[role] = LinearWeights(quantize(weight, 4, 32) if packed else weight, bias)
        norms = {role: 1 + self._normal(9, shape) for role, shape in norm_shapes(self.config).items()}
        return BlockWeights(index, linears, norms)

    def embedding(self) -> Tensor:
        return 8 * self._normal(1, (self.config.vocab_size, self.config.hidden_size))

    def final_norm(self) -> Tensor:
        return torch.ones(self.config.hidden_size)

    def lm_head(self) -> Tensor:
        return self._normal(2, (self.config.vocab_size, self.config.hidden_size))

    def weight_files(self) -> list[Path]:
        return []


INT4 = replace(CONFIG, quantization=QuantFormat(4, 32))
CASES = {"float": (CONFIG, 2), "int4": (INT4, 2), "shared-kv": (CONFIG, 4), "mixtral": (MIXTRAL, 2)}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_parts_of_a_block_sum_to_the_whole(name: str) -> None:
    config, tp = CASES[name]
    weights = RandomCheckpoint(config).block(0)
    h = torch.randn(12, config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)
    whole = Block(config, weights, torch.float32, "cpu")
    angles = rotary(config, positions)
    attention, mlp = torch.zeros_like(h), torch.zeros_like(h)
    for rank in range(tp):
        part = shard_config(config, rank, tp, 32 if config.quantization else None)
        block = Block(part, shard_block(weights, config, rank, tp), torch.float32, "cpu")
        attention += block.attention(h, angles, causal_attend(1, 12, part))
        mlp += block.mlp(h)
    assert torch.allclose(attention, whole.attention(h, angles, causal_attend(1, 12, config)), atol=1e-5)
    assert torch.allclose(mlp, whole.mlp(h), atol=1e-5)


@torch.no_grad()
def test_inference_layers_equal_the_functional_block() -> None:
    """Joined int4 rows, joined biases: the same function as each linear alone."""
    for config in (CONFIG, INT4, MIXTRAL):
        weights = RandomCheckpoint(config).block(1)
        if config is CONFIG:  # a bias on some of the joined parts only
            weights.linears["k"] = replace(weights.linears["k"], bias=None)
            weights.linears["up"] = replace(weights.linears["up"], bias=None)
        if config is INT4:  # formats that cannot be joined
            dense = weights.linears["v"].weight.dequantize()  # type: ignore[union-attr]
            weights.linears["v"] = replace(weights.linears["v"], weight=dense)
        x = torch.randn(10, config.hidden_size, generator=torch.Generator().manual_seed(0))
        positions, attend = torch.arange(10), causal_attend(1, 10, config)
        got = Block(config, weights, torch.float32, "cpu")(x, positions, attend)
        assert torch.allclose(got, block_forward(x, positions, weights, config, attend), atol=1e-5)


def test_ranges_cover_the_intermediate_size_once() -> None:
    for size, unit, tp in ((160, 32, 2), (11008, 128, 8), (13824, 128, 8), (97, 1, 4), (100, 32, 4)):
        ranges = [inner_range(size, r, tp, unit) for r in range(tp)]
        assert ranges[0][0] == 0 and ranges[-1][1] == size
        assert all(a[1] == b[0] and a[1] % unit == 0 for a, b in pairwise(ranges))


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(InputError, match="8 query heads and 2 KV heads cannot be split over 3"):
        shard_config(CONFIG, 0, 3)
    with pytest.raises(InputError, match="too few for 8"):
        shard_config(CONFIG, 0, 8, 32)
    weights = RandomCheckpoint(INT4).block(0)
    with pytest.raises(InputError, match="o: rank 0 would hold columns 0 to 16"):
        shard_block(weights, INT4, 0, 8)


def run_rank(rank: int, port: int, config: ModelConfig, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = Model.from_checkpoint(RandomCheckpoint(config), "cpu", torch.float32, parallel=distributed())
    save_file({"logits": logits_of(model)}, out / f"{rank}.safetensors")
    dist.destroy_process_group()


@torch.no_grad()
def logits_of(model: Model) -> Tensor:
    ids = torch.randint(CONFIG.vocab_size, (24,), generator=torch.Generator().manual_seed(4))
    return model(ids, torch.arange(24), causal_attend(1, 24, model.config))


def test_tp_2_equals_tp_1_over_gloo(tmp_path: Path) -> None:
    expected = logits_of(Model.from_checkpoint(RandomCheckpoint(INT4), "cpu", torch.float32))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (port, INT4, tmp_path), nprocs=2)
    for rank in range(2):
        got = load_file(tmp_path / f"{rank}.safetensors")["logits"]
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-4
