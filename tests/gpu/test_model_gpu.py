"""The forward pass on the GPU against the CPU's in float32: fused kernels, packed int4, captured steps, the real int8 cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.config import ModelConfig, QuantFormat
from engine.config import EngineConfig
from engine.measure.perplexity import EvalTokens, perplexity
from engine.model.attention import causal_attend
from engine.model.forward import Model
from engine.model.kv_simulation import KVSimulation
from engine.model.random_weights import SHAPES, RandomCheckpoint
from engine.serving.cache import PagedAttend, PagedCache, StepBatch
from kernels.block.dense_gemv import dense_gemv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CONFIG = replace(
    SHAPES["7b"],
    hidden_size=512,
    intermediate_size=1024,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=1000,
)
CONFIGS = {
    "fp16": CONFIG,
    "int4": replace(CONFIG, quantization=QuantFormat(4, 128)),
    "int4-g64": replace(CONFIG, quantization=QuantFormat(4, 64)),
    "biases": replace(CONFIG, quantization=QuantFormat(4, 128), qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk-norm": replace(CONFIG, qk_norm=True, head_dim=128),
    "window": replace(CONFIG, sliding_window=20),
    "mixtral": replace(CONFIG, quantization=QuantFormat(4, 128), num_experts=4, experts_per_token=2),
    "mixtral-fp16": replace(CONFIG, num_experts=4, experts_per_token=2),
}
TOLERANCE = (
    1e-2  # relative, on logits after three blocks in fp16: 2^-11 a rounding, some dozens of them in a row
)


def models(config: ModelConfig) -> tuple[Model, Model]:
    """The same random weights in float32 on the CPU and in float16 on the GPU."""
    ckpt = RandomCheckpoint(Path("random"), "hf", config, Path("random"), device=torch.device("cpu"))
    return Model.from_checkpoint(ckpt, "cpu", torch.float32), Model.from_checkpoint(
        ckpt, "cuda", torch.float16
    )


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols"), [(4096, 4096), (22016, 4096), (4096, 11008), (1002, 520), (32000, 4096)]
)
def test_dense_gemv(rows: int, cols: int, gated: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn(rows, cols, device="cuda") / cols**0.5).to(dtype)
    x, bias = torch.randn(1, cols, device="cuda").to(dtype), torch.randn(rows, device="cuda").to(dtype)
    wide = x.double() @ weight.double().t() + bias.double()
    gate, up = wide.chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up if gated else wide
    out = dense_gemv(x, weight, bias, gated=gated)
    assert relative_error(out, expected.cpu()) < (1e-3 if dtype is torch.float16 else 6e-3)
    assert torch.equal(out, dense_gemv(x, weight, bias, gated=gated))
    wide_out = dense_gemv(x, weight, bias, gated=gated, out_dtype=torch.float32)
    assert torch.equal(wide_out.to(dtype), out)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_whole_text_and_token_by_token(name: str) -> None:
    """A text at once, and its tokens one after another through the paged cache (single-token kernels)."""
    config = CONFIGS[name]
    cpu, gpu = models(config)
    ids = random_ids(48)
    expected = cpu(ids, torch.arange(48), causal_attend(1, 48, config))
    ids, positions = ids.cuda(), torch.arange(48, device="cuda")
    assert relative_error(gpu(ids, positions, causal_attend(1, 48, config)), expected) < TOLERANCE

    cache = PagedCache(config, EngineConfig(device="cuda"), 2, torch.float16, torch.device("cuda"))
    table = torch.tensor([[1, 0]], dtype=torch.int32, device="cuda")
    rows = []
    for t in range(48):
        slot = positions[t : t + 1] + 64
        lengths = torch.tensor([t + 1], dtype=torch.int32, device="cuda")
        attend = PagedAttend(cache, StepBatch(slot, table, lengths, 1))
        rows.append(gpu(ids[t : t + 1], positions[t : t + 1], attend))
    assert relative_error(torch.cat(rows), expected) < TOLERANCE


@torch.inference_mode()
def test_int4_weights_are_floats_where_activations_are_float32() -> None:
    """No kernel takes float32: the weights are dequantized, and a note says so."""
    ckpt = RandomCheckpoint(Path("random"), "hf", CONFIGS["int4"], Path("random"), device=torch.device("cpu"))
    ids, positions = random_ids(20), torch.arange(20)
    outputs = []
    for device in ("cpu", "cuda"):
        model = Model.from_checkpoint(ckpt, device, torch.float32)
        outputs.append(model(ids.to(device), positions.to(device), causal_attend(1, 20, model.config)))
    assert relative_error(outputs[1], outputs[0]) < 1e-4
    assert any("no kernel takes float32" in note for note in model.notes)


@pytest.mark.parametrize("name", ["fp16", "int4", "qk-norm"])
@pytest.mark.parametrize("kv_bits", [8, 16])
@torch.inference_mode()
def test_a_captured_step_gives_the_same_bits(name: str, kv_bits: int) -> None:
    config = CONFIGS[name]
    gpu = models(config)[1]
    batch = 4
    cache = PagedCache(
        config, EngineConfig(device="cuda", kv_bits=kv_bits), 8, torch.float16, torch.device("cuda")
    )
    cache.fill_random()
    tables = torch.arange(8, dtype=torch.int32, device="cuda").view(batch, 2)
    ids, positions = random_ids(batch).cuda(), torch.tensor([3, 70, 100, 9], device="cuda")
    slots = tables[torch.arange(batch), positions // 64].long() * 64 + positions % 64
    lengths = (positions + 1).int()

    def step() -> Tensor:
        return gpu(ids, positions, PagedAttend(cache, StepBatch(slots, tables, lengths, batch)))

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_perplexity_through_the_cache_equals_the_slow_path(name: str) -> None:
    """Same dtype, int8 KV simulated by torch against pages written and read by the kernels: within 0.1 %."""
    gpu = models(CONFIGS[name])[1]
    tokens = EvalTokens(random_ids(4 * 256), False, "random", "t", "k")
    kv = KVSimulation(8)
    simulated = perplexity(
        gpu,
        tokens,
        256,
        kv=kv,
        make_attend=lambda batch, length, config: causal_attend(batch, length, config, kv),
    )
    cached = perplexity(gpu, tokens, 256, kv=kv)
    assert cached.kv_path == "cache"
    assert cached.ppl == pytest.approx(simulated.ppl, rel=1e-3)
