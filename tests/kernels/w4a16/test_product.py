"""W4A16: layout against a hand-written block, kernels in the Triton interpreter against float32, dispatch and its checks.

M tokens, N rows, K in features. The interpreter multiplies in numpy, so what is tested is indexing, masks, nibble
arithmetic and the order of partial sums. It cuts float32 to bf16 by truncation where a GPU rounds to nearest, hence
the wider tolerance for bf16 here; tests/gpu holds the figures that count.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from kernels.int4 import Quantized, quantize
from kernels.w4a16 import product as w4a16
from kernels.w4a16.gemm import launch_gemm
from kernels.w4a16.gemv import GemvTile, launch_gemv
from kernels.w4a16.layout import W4Weight, concat, pair, prepare, restore
from kernels.w4a16.prefill import PrefillTile, launch_dequantize
from kernels.w4a16.schedule import GemmTile, Schedule, WgmmaTile, Workspace, schedule
from kernels.w4a16.split import SplitTile, launch_split, pieces

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 1.2e-2}  # bf16: up to 3 truncations of 2^-8 each
needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="kernels were imported for a GPU: tests/gpu runs them there"
)


def make(rows: int, cols: int, group_size: int, seed: int = 0) -> Quantized:
    """Random codes, scales and zeros, with the zero points 0 and 15 the smallest and a very large scale among them."""
    generator = torch.Generator().manual_seed(seed)
    groups = cols // group_size
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) * 0.004 + 0.001).half()
    zeros[0], zeros[1], codes[0, ::2], codes[1, ::2] = 0, 15, 15, 0
    scales[2], scales[3] = 2.0**-24, 20.0
    return Quantized(codes, scales, zeros, group_size)


def inputs(tokens: int, cols: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(out: Tensor, x: Tensor, weight: Tensor, expected: Tensor | None = None) -> None:
    """out (M, N) against x weight^T in float32, each row of the weight in units of its norm: scales differ widely here.

    With normal x an output is of the size of that norm. The tolerance holds for the root mean square, 4 times it for
    each output; 6e-8 is half a step of fp16 below 6e-5.
    """
    expected = x.float() @ weight.t() if expected is None else expected
    assert torch.isfinite(out.float()).all()
    unit = weight.norm(dim=1) + 6e-8 / TOLERANCE[out.dtype]
    error = (out.float() - expected) / unit
    assert error.square().mean().sqrt() < TOLERANCE[out.dtype]
    assert error.abs().max() < 4 * TOLERANCE[out.dtype]


def scratch() -> Workspace:
    return Workspace(torch.full((1 << 20,), float("nan")), torch.zeros(512, dtype=torch.int32))


def test_layout_of_a_hand_written_block() -> None:
    codes = torch.zeros(2, 128, dtype=torch.uint8)
    codes[1, 5], codes[1, 37], codes[1, 69], codes[1, 101] = 1, 2, 3, 15  # word 5, nibbles 0 .. 3
    scales = torch.tensor([[1.0], [2.0]]).half()
    zeros = torch.tensor([[0], [9]], dtype=torch.uint8)
    weight = prepare(Quantized(codes, scales, zeros, 128))
    assert weight.words.shape == (1, 2, 32)
    assert int(weight.words[0, 1, 5]) & 0xFFFF == 0xF321
    assert weight.words.count_nonzero() == 1
    assert weight.params.tolist() == [[0x3C00, 0x9_4000]]


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("cols", [128, 384, 448])
def test_restore_is_the_inverse(group_size: int, cols: int) -> None:
    cols = cols // group_size * group_size
    quantized = make(24, cols, group_size)
    back = restore(prepare(quantized))
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, name), getattr(quantized, name)), name


def test_joined_weights_are_the_products_side_by_side() -> None:
    x = inputs(5, 256, torch.float32)
    q, k = make(48, 256, 64, 1), make(16, 256, 64, 2)
    bias = torch.randn(16)
    joined = concat([prepare(q), prepare(k, bias)])
    expected = torch.cat([x @ q.dequantize().t(), x @ k.dequantize().t() + bias], dim=1)
    torch.testing.assert_close(w4a16.w4a16_linear(x, joined), expected, rtol=1e-5, atol=1e-5)
    both = pair(prepare(q), prepare(make(48, 256, 64, 3)))
    gated = F.silu(x @ q.dequantize().t()) * (x @ make(48, 256, 64, 3).dequantize().t())
    torch.testing.assert_close(w4a16.w4a16_linear(x, both), gated, rtol=1e-4, atol=1e-4)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "cols", "group_size"), [(32, 1024, 128), (40, 1152, 128), (24, 1088, 64), (33, 288, 32)]
)
def test_gemv(rows: int, cols: int, group_size: int, dtype: torch.dtype) -> None:
    quantized = make(rows, cols, group_size)
    x = inputs(1, cols, dtype)
    out = torch.full((1, rows), float("nan"), dtype=dtype)
    for scales_ahead, ahead in ((False, 0), (True, 0), (False, 8)):
        launch_gemv(x, prepare(quantized), GemvTile(16, 8, 4, scales_ahead, ahead=ahead), out)
        assert_close(out, x, quantized.dequantize())


@pytest.mark.parametrize("ahead", [4, 24])
def test_blocks_that_cannot_be_asked_for_ahead_are_refused(ahead: int) -> None:
    with pytest.raises(ValueError, match=f"ahead is {ahead}"):
        GemvTile(4, 8, 2, ahead=ahead)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("scale_first", [False, True])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "group_size"),
    [(2, 128, 512, 128), (19, 72, 640, 128), (5, 100, 448, 64), (16, 64, 160, 32)],
)
def test_gemm(
    tokens: int, rows: int, cols: int, group_size: int, swap: bool, scale_first: bool, dtype: torch.dtype
) -> None:
    quantized = make(rows, cols, group_size)
    x = inputs(tokens, cols, dtype)
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    tile = GemmTile(16, 64, 4, 3, swap, scale_first, 1)
    workspace = scratch()
    launch_gemm(x, prepare(quantized), tile, 3, workspace, out)
    assert_close(out, x, quantized.dequantize())
    assert not workspace.arrived.any()


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 3, 9])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "group_size"),
    [(2, 128, 512, 128), (19, 72, 640, 128), (9, 100, 448, 64), (16, 64, 160, 32)],
)
def test_split(tokens: int, rows: int, cols: int, group_size: int, split: int, dtype: torch.dtype) -> None:
    quantized = make(rows, cols, group_size)
    x = inputs(tokens, cols, dtype)
    workspace = scratch()
    for _ in range(2):  # twice: counters must be back at zero
        out = torch.full((tokens, rows), float("nan"), dtype=dtype)
        launch_split(x, prepare(quantized), SplitTile(64, split, 2, 3), workspace, out)
        assert_close(out, x, quantized.dequantize())
    assert not workspace.arrived.any()


@pytest.mark.parametrize("split", range(1, 20))
def test_no_piece_is_empty(split: int) -> None:
    for blocks in (1, 2, 8, 32, 43, 86):
        count, run = pieces(blocks, split)
        assert 1 <= count <= split and (count - 1) * run < blocks <= count * run


@needs_interpreter
@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8, 40])
def test_any_division_of_the_work_gives_the_product(programs: int) -> None:
    quantized = make(128, 1280, 128)
    x = inputs(20, 1280, torch.float16)
    weight, workspace = prepare(quantized), scratch()
    for _ in range(2):  # twice: counters must be back at zero
        out = torch.full((20, 128), float("nan"), dtype=torch.float16)
        launch_gemm(x, weight, GemmTile(16, 64, 4, 3, False, False, 1), programs, workspace, out)
        assert_close(out, x, quantized.dequantize())


@needs_interpreter
@pytest.mark.parametrize("kind", ["gemv", "split", "gemm", "swapped"])
@pytest.mark.parametrize("is_paired", [False, True])
def test_epilogue(kind: str, is_paired: bool) -> None:
    tokens = 1 if kind == "gemv" else 7
    first, second = make(40, 384, 128, 4), make(40, 384, 128, 5)
    for quantized in (first, second):
        quantized.scales.clamp_(2e-3, 1e-2)
    bias = torch.randn(40).half()
    weight = pair(prepare(first, bias), prepare(second)) if is_paired else prepare(first, bias)
    x, residual = inputs(tokens, 384, torch.float16), inputs(tokens, 40, torch.float16, 9)
    out = torch.full((tokens, 40), float("nan"), dtype=torch.float16)
    if kind == "gemv":
        launch_gemv(x, weight, GemvTile(16, 8, 4), out, residual)
    elif kind == "split":
        launch_split(x, weight, SplitTile(64, 2, 2, 3), scratch(), out, residual)
    else:
        tile = GemmTile(16, 64, 4, 3, kind == "swapped", True, 1)
        launch_gemm(x, weight, tile, 3, scratch(), out, residual)
    product = x.float() @ first.dequantize().t() + bias.float()
    if is_paired:
        product = F.silu(product) * (x.float() @ second.dequantize().t())
    assert_close(
        out, x, torch.ones(40, 1), product + residual.float()
    )  # outputs are of size 1 and rounded last


@needs_interpreter
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize(group_size: int) -> None:
    quantized = make(80, 192 if group_size < 128 else 256, group_size)
    weight = prepare(quantized)
    out = torch.full((70, quantized.shape[1]), float("nan"), dtype=torch.float16)
    launch_dequantize(weight, 10, out)
    assert torch.equal(out, quantized.dequantize(torch.float16)[10:])


def test_float_weights_survive_the_whole_path() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    quantized = quantize(weight, 4, 64)
    x = inputs(3, 256, torch.float16).view(3, 1, 256)
    out = w4a16.w4a16_linear(x, prepare(quantized))
    assert out.shape == (3, 1, 64) and out.dtype == torch.float16
    error = (out.float() - x.float() @ weight.t()).norm() / (x.float() @ weight.t()).norm()
    assert error < 0.12  # int4 itself: about 0.09 on normal weights


@pytest.mark.parametrize(
    ("tokens", "rows", "blocks"), [(1, 4096, 32), (16, 22016, 32), (100, 4096, 86), (128, 65, 3)]
)
@pytest.mark.parametrize("per_sm", [0, 0.5, 1, 3])
def test_schedule_covers_all_work(tokens: int, rows: int, blocks: int, per_sm: float) -> None:
    tile = GemmTile(32, 64, 4, 3, False, True, per_sm)
    plan = schedule(tokens, rows, blocks, tile, 132)
    tiles = -(-tokens // 32) * -(-rows // 64)
    assert plan.programs * plan.run >= tiles * blocks > (plan.programs - 1) * plan.run
    for t in range(tiles):
        sharing = (t * blocks + blocks - 1) // plan.run - t * blocks // plan.run + 1
        assert sharing <= plan.segments <= 16


def test_whole_tiles_where_partials_would_not_fit() -> None:
    assert schedule(4096, 8192, 64, GemmTile(128, 128, 8, 3, True, True, 8), 132) == Schedule(32 * 64, 64, 1)


def test_pick_takes_the_nearest_shape_and_enough_tokens() -> None:
    table = w4a16.parse_table(
        {
            "entries": [
                {"k": 4096, "n": 4096, "tokens": 1, "kernel": "gemv", "bn": 16, "blocks": 8, "warps": 4},
                {"k": 4096, "n": 4096, "tokens": 9, "kernel": "prefill", "rows": 1},
                {"k": 4096, "n": 16384, "tokens": 1, "kernel": "prefill", "rows": 2},
            ]
        }
    )
    small, large = prepare(make(256, 256, 128)), prepare(make(256, 256, 128))
    large = dataclasses.replace(
        large, words=torch.empty(32, 14336, 32, device="meta", dtype=torch.int16), in_features=4096
    )
    assert w4a16.pick(table, 1, small) == GemvTile(16, 8, 4)
    assert w4a16.pick(table, 2, small) == w4a16.pick(table, 4000, small) == PrefillTile(1)
    assert w4a16.pick(table, 1, large) == PrefillTile(2)


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "a card nobody has measured"])
def test_shipped_tables_are_complete(name: str) -> None:
    table = w4a16.table_for(name)
    weight = prepare(make(128, 512, 128))
    for tokens in (1, 2, 8, 16, 17, 64, 128, 500, 3000):
        tile = w4a16.pick(table, tokens, weight)
        assert not isinstance(tile, GemvTile) or tokens == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w4a16.w4a16_linear(torch.ones(1, 256, dtype=torch.float64), w), "float64"),
        (lambda w: w4a16.w4a16_linear(torch.ones(1, 128).half(), w), "K = 256"),
        (lambda w: w4a16.w4a16_linear(torch.ones(1, 256, device="meta").half(), w), "one device"),
        (lambda w: w4a16.w4a16_linear(torch.ones(1, 256).half(), w, torch.ones(1, 64)), "residual"),
        (lambda w: prepare(make(32, 256, 128), torch.ones(31)), "bias"),
        (lambda w: prepare(make(32, 256, 16)), "group_size is 16"),
        (lambda w: prepare(dataclasses.replace(make(32, 256, 64), bits=3)), "3 bits"),
        (lambda w: concat([w, prepare(make(32, 128, 128))]), "cannot be joined"),
        (lambda w: concat([]), "at least one"),
        (lambda w: pair(w, prepare(make(32, 256, 128))), "64 rows"),
        (lambda w: concat([pair(w, w), w]), "interleaved"),
        (lambda w: WgmmaTile(64, 128, 1, 3, 1, pending=3), "1 or 2"),
        (lambda w: GemvTile(16, 8, 4, dependent="soon"), "'soon'"),
        (lambda w: SplitTile(64, 2, 4, 3), "32 rows"),
        (lambda w: SplitTile(64, 2, 2, 3, ahead=3), "power of two"),
        (
            lambda w: launch_split(
                torch.ones(33, 256).half(), w, SplitTile(64, 2, 2, 3), scratch(), torch.ones(33, 64)
            ),
            "33 tokens",
        ),
        (lambda w: w4a16.parse_table({"entries": [{"kernel": "gemv", "bn": 16}]}), "tile table"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    weight: W4Weight = prepare(make(64, 256, 128))
    with pytest.raises(ValueError, match=message):
        call(weight)


def test_a_first_product_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cuda:7 is inside a graph capture"):
        w4a16._workspace(7)
