"""Perplexity, KL, top-1, simulated KV, intervals: each against the plain formula written out on whole logits."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import engine.measure.windows as windows_module
from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError, UsageError
from convert.families.table import linear_shapes, norm_shapes
from engine.measure.perplexity import (
    LOGITS_BYTES,
    EvalTokens,
    cut_windows,
    paired_difference,
    perplexity,
    perplexity_and_reference,
    student_t_975,
    tokenize,
)
from engine.model.attention import cached_attend, causal_attend
from engine.model.forward import Block, Model, StreamedBlocks
from engine.model.kv_simulation import KVSimulation, read_kv_params
from kernels.kv.pages import StaticKV

CONFIG = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    hidden_size=48,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=80,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_position=64,
    bos_token_id=1,
    dtype="float32",
)


def random_weights(seed: int = 0, noise: float = 0.0) -> tuple[Tensor, list[BlockWeights], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    disturb = torch.Generator().manual_seed(99)

    def normal(shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        return x + noise * torch.randn(shape, generator=disturb)

    blocks = [
        BlockWeights(
            index,
            {role: LinearWeights(normal(shape), None) for role, shape in linear_shapes(CONFIG).items()},
            {role: 1 + normal(shape) for role, shape in norm_shapes(CONFIG).items()},
        )
        for index in range(CONFIG.num_layers)
    ]
    return (
        3 * normal((CONFIG.vocab_size, CONFIG.hidden_size)),
        blocks,
        torch.ones(CONFIG.hidden_size),
        normal((80, 48)),
    )


def random_model(seed: int = 0, noise: float = 0.0) -> Model:
    embedding, blocks, norm, head = random_weights(seed, noise)
    return Model(CONFIG, embedding, [Block(CONFIG, b, torch.float32, "cpu") for b in blocks], norm, head)


class StreamedModel(Model):
    """The same model, its blocks made anew for every pass; counts how often each is made."""

    def __init__(self) -> None:
        embedding, blocks, norm, head = random_weights()
        self.made: list[int] = []

        class Blocks(StreamedBlocks):
            def __init__(self) -> None:
                pass

            def __len__(self) -> int:
                return len(blocks)

            def __getitem__(inner, index):  # type: ignore[no-untyped-def, override]
                self.made.append(index)
                return Block(CONFIG, blocks[index], torch.float32, "cpu")

        super().__init__(CONFIG, embedding, Blocks(), norm, head)


@pytest.fixture
def tokens() -> EvalTokens:
    ids = torch.randint(CONFIG.vocab_size, (5 * 32 + 7,), generator=torch.Generator().manual_seed(3))
    return EvalTokens(ids, False, "random tokens", "text", "tokenizer")


def whole_logits(model: Model, window: Tensor, kv: KVSimulation | None = None) -> Tensor:
    attend = causal_attend(1, len(window), CONFIG, kv)
    return model(window, torch.arange(len(window)), attend)


def test_equals_the_formula(tokens: EvalTokens) -> None:
    model = random_model()
    result = perplexity(model, tokens, 32)
    losses = [
        F.cross_entropy(whole_logits(model, w)[:-1].double(), w[1:]).item()
        for w in tokens.ids[:160].view(5, 32)
    ]
    assert result.windows == 5 and result.tokens == 167  # 7 tokens of tail are dropped
    assert result.nll == pytest.approx(losses, rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert result.dtype == "float32" and result.kv_bits == 16 and result.kl is None
    assert perplexity(model, tokens, 32, windows=2).nll == pytest.approx(losses[:2], rel=1e-6)


def test_chunks_and_batches_do_not_matter(tokens: EvalTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = perplexity(random_model(), tokens, 32)
    monkeypatch.setitem(LOGITS_BYTES, "cpu", 4 * CONFIG.vocab_size * 17)  # 17 rows of 31
    monkeypatch.setitem(windows_module.BATCH_TOKENS, "cpu", 64)  # 2 windows, last batch 1
    assert perplexity(random_model(), tokens, 32).nll == pytest.approx(expected.nll, rel=1e-6)


def test_streaming_reads_each_block_once(tokens: EvalTokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(windows_module.BATCH_TOKENS, "cpu", 64)
    model, ticks = StreamedModel(), []
    result = perplexity(model, tokens, 32, progress=lambda done, total: ticks.append((done, total)))
    assert model.made == [0, 1] and ticks == [(1, 2), (2, 2)]
    assert result.nll == perplexity(random_model(), tokens, 32).nll


def test_kl_and_top1(tokens: EvalTokens) -> None:
    model, other = random_model(), random_model(noise=0.03)
    _, reference = perplexity_and_reference(model, tokens, 32, keep=3)
    assert len(reference.hidden) == 3
    result = perplexity(other, tokens, 32, reference=reference)
    kl, top = [], []
    for window in tokens.ids[:96].view(3, 32):
        p, q = (whole_logits(m, window)[:-1].double().log_softmax(-1) for m in (model, other))
        kl.append((p.exp() * (p - q)).sum(-1).mean().item())
        top.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert result.kl_windows == pytest.approx(kl, rel=1e-4) and result.kl == pytest.approx(
        sum(kl) / 3, rel=1e-4
    )
    assert result.top1 == pytest.approx(sum(top) / 3) and 0.3 < sum(top) / 3 < 1
    same = perplexity(model, tokens, 32, reference=reference)
    assert same.kl == pytest.approx(0, abs=1e-6) and same.top1 == 1.0
    with pytest.raises(InputError, match="other windows"):
        perplexity(other, replace(tokens, ids=tokens.ids.flip(0)), 32, reference=reference)
    with pytest.raises(InputError, match="other windows"):
        perplexity(other, tokens, 32, reference=reference, windows=2)


def static_params(model: Model, tokens: EvalTokens) -> list[StaticKV]:
    """Ranges of each head over all windows, written out."""
    ranges: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def record(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for name, x in (("k", k), ("v", v)):
            ranges[layer, name] = (x.amin((0, 2)), x.amax((0, 2)))
        return k, v

    whole_logits(model, tokens.ids[:32], record)  # type: ignore[arg-type]
    params = []
    for layer in range(CONFIG.num_layers):
        values = []
        for name in "kv":
            low, high = ranges[layer, name]
            scale = (high - low) / 255
            values += [scale, low + 128 * scale]
        params.append(StaticKV(*values))
    return params


def test_dynamic_kv_rounds_each_token_and_head() -> None:
    k = torch.randn(6, 2, 12, generator=torch.Generator().manual_seed(0))
    got, _ = KVSimulation(8)(0, k, k)
    for t in range(6):
        for h in range(2):
            x = k[t, h]
            scale = ((x.max() - x.min()) / 255).half().float()
            zero = (x.min() + 128 * scale).half().float()
            code = ((x - zero) / scale).round().clamp(-128, 127)
            assert torch.equal(got[t, h], code * scale + zero)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_simulated_kv_costs_little_at_8_bits_and_more_at_4(tokens: EvalTokens, mode: str) -> None:
    model = random_model()
    params = static_params(model, tokens) if mode == "static" else None
    fp, reference = perplexity_and_reference(model, tokens, 32, keep=5)
    kl = []
    for bits in (8, 4):
        kv = KVSimulation(bits, mode, params)  # type: ignore[arg-type]
        result = perplexity(model, tokens, 32, kv=kv, reference=reference)
        assert (result.kv_bits, result.kv_mode, result.kv_path) == (bits, mode, "simulated")
        assert result.nll != fp.nll
        assert result.kl is not None
        kl.append(result.kl)
    assert 0 < kl[0] < 1e-3 < kl[1]


@pytest.mark.parametrize("mode", ["float", "dynamic", "static"])
def test_real_cache_pages_give_the_simulated_numbers(tokens: EvalTokens, mode: str) -> None:
    """What is stored in pages, packed and read back is what the simulation computes on the spot."""
    model = random_model()
    params = static_params(model, tokens) if mode == "static" else None
    kv = None if mode == "float" else KVSimulation(8, mode, params)  # type: ignore[arg-type]
    simulated = perplexity(model, tokens, 32, kv=kv)
    cached = perplexity(model, tokens, 32, make_attend=cached_attend(8 if kv else 16, params))
    assert cached.nll == pytest.approx(simulated.nll, rel=1e-5)


def test_static_range_survives_the_change_to_4_bits() -> None:
    """x = (u - 128) s + z spans [z - 128 s, z + 127 s]; its ends come back at 4 bits too."""
    one = torch.ones(1)
    params = [StaticKV(0.02 * one, 0.3 * one, 0.02 * one, 0.3 * one)]
    ends = torch.tensor([0.3 - 128 * 0.02, 0.3 + 127 * 0.02]).view(1, 1, 2)
    for bits in (8, 4):
        got, _ = KVSimulation(bits, "static", params)(0, ends, ends)  # type: ignore[arg-type]
        assert torch.allclose(got, ends, atol=1e-6)


def test_read_kv_params(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--kv-mode dynamic"):
        read_kv_params(tmp_path, CONFIG)
    tensors = {
        f"layers.{layer}.{part}": torch.full((2,), 0.5 + layer)
        for layer in range(2)
        for part in ("k.scale", "k.zero", "v.scale", "v.zero")
    }
    (tmp_path / "tmq").mkdir()
    save_file(tensors, tmp_path / "tmq/kv_params.safetensors")
    assert read_kv_params(tmp_path, CONFIG)[1].v_zero.tolist() == [1.5, 1.5]
    for name, value, message in (
        ("layers.0.k.scale", torch.zeros(2), "no usable parameter"),
        ("layers.1.v.zero", torch.tensor([0.0, math.nan]), "no usable parameter"),
        ("layers.0.k.zero", torch.zeros(3), "shape"),
    ):
        save_file(tensors | {name: value}, tmp_path / "tmq/kv_params.safetensors")
        with pytest.raises(InputError, match=message):
            read_kv_params(tmp_path, CONFIG)
    save_file({"layers.0.k.scale": torch.ones(2)}, tmp_path / "tmq/kv_params.safetensors")
    with pytest.raises(InputError, match=r"lacks layers.0.k.zero"):
        read_kv_params(tmp_path, CONFIG)
    (tmp_path / "tmq/kv_params.safetensors").write_bytes(b"\x10")
    with pytest.raises(InputError, match="too short for a safetensors header"):
        read_kv_params(tmp_path, CONFIG)


def test_paired_difference(tokens: EvalTokens) -> None:
    a, b = perplexity(random_model(), tokens, 32), perplexity(random_model(noise=0.02), tokens, 32)
    pair = paired_difference(a, b)
    assert pair.difference == pytest.approx(b.ppl - a.ppl, rel=1e-9)
    d = torch.tensor(b.nll, dtype=torch.float64) - torch.tensor(a.nll, dtype=torch.float64)
    half = 2.7764451 * d.std().item() / math.sqrt(5)  # t table, 4 degrees of freedom
    assert pair.low == pytest.approx(a.ppl * (math.exp(d.mean().item() - half) - 1), rel=1e-2)
    assert pair.high == pytest.approx(a.ppl * (math.exp(d.mean().item() + half) - 1), rel=1e-2)
    with pytest.raises(InputError, match="seqlen"):
        paired_difference(a, perplexity(random_model(), tokens, 16))
    with pytest.raises(InputError, match="2 windows"):
        paired_difference(*[perplexity(random_model(), tokens, 32, windows=1)] * 2)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (147, 1.9762)],
)
def test_student_t(degrees: int, quantile: float) -> None:
    """From a printed table."""
    assert student_t_975(degrees) == pytest.approx(quantile, abs=0.006)


def test_bad_input(tokens: EvalTokens) -> None:
    with pytest.raises(InputError, match="has 167 tokens, which is less than one window of 168"):
        cut_windows(tokens, 168, replace(CONFIG, max_position=512))
    for count in (0, 1):
        with pytest.raises(InputError, match="less than one window"):
            perplexity(random_model(), replace(tokens, ids=tokens.ids[:count]), 32)
    with pytest.raises(UsageError, match="context is 64"):
        perplexity(random_model(), tokens, 65)
    with pytest.raises(UsageError, match="at least 2"):
        perplexity(random_model(), tokens, 1)

    class WrongTokenizer:
        def encode(self, text: str) -> list[int]:
            return [1, len(text)]

        def digest(self) -> str:
            return "x"

    good = tokenize("four", "t", "d", WrongTokenizer(), CONFIG)
    assert good.bos and good.ids.tolist() == [1, 4]
    with pytest.raises(InputError, match="token 80, but the model's vocabulary has 80"):
        tokenize("a" * 80, "t", "d", WrongTokenizer(), CONFIG)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(tokens: EvalTokens, value: float) -> None:
    model = random_model()
    model.embedding[int(tokens.ids[40])] = value
    model.embedding[tokens.ids[:32]] = 1.0
    with pytest.raises(InputError, match="window 1 is nan"):
        perplexity(model, tokens, 32)
