"""How TurboMind arranges a linear: RoPE order, fused qkv, ranks, padding. Pure functions, each with its inverse.

A linear is in stored form (`convert.checkpoint.Stored`): output features N last, as the files hold it, int4 codes eight to a word.
An operation on output features acts on every part alike, on whole words, so integer codes move unchanged.
K in features, G groups, D head_dim, H and Hkv heads, tp ranks.
Format: LMDeploy 0.6.5, lmdeploy/turbomind/deploy (module.py, parameter.py, policy.py); 0.1.0 for the tiles.
"""

import torch
from torch import Tensor

from convert.checkpoint import Stored
from convert.errors import InputError
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns, unzip_columns, zip_columns

GROUPED = ("scales", "zeros")  # parts whose rows are groups of input features


def _width(name: str, features: int) -> int:
    """Elements of the part `name` that `features` output features take."""
    return features // 8 if name == "words" else features


def interleave_rope(linear: Stored, head_dim: int) -> Stored:
    """Output features of q or k from Hugging Face's order to TurboMind's: new h*D + 2j + s = old h*D + s*D/2 + j."""
    turned = {}
    for name, part in linear.items():
        heads = part.unflatten(-1, (-1, 2, _width(name, head_dim // 2)))  # (..., heads, 2, D/2)
        if name == "words":
            turned[name] = zip_columns(*(half.contiguous() for half in heads.unbind(-2))).flatten(-2)
        else:
            turned[name] = heads.transpose(-1, -2).flatten(-3)
    return turned


def separate_rope(linear: Stored, head_dim: int) -> Stored:
    """Inverse of `interleave_rope`."""
    turned = {}
    for name, part in linear.items():
        heads = part.unflatten(-1, (-1, _width(name, head_dim)))  # (..., heads, D)
        if name == "words":
            turned[name] = torch.stack(unzip_columns(heads), dim=-2).flatten(-3)
        else:
            turned[name] = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-3)
    return turned


def kv_replication(num_kv_heads: int, tp: int) -> int:
    """How often each KV head is stored so that every rank has one. Raises InputError where tp does not fit."""
    if num_kv_heads % tp == 0:
        return 1
    if tp % num_kv_heads == 0:
        return tp // num_kv_heads
    raise InputError(
        f"{num_kv_heads} KV heads cannot be divided among {tp} ranks: one must be a multiple of the other."
    )


def replicate_heads(linear: Stored, head_dim: int, times: int) -> Stored:
    """Each head of D output features repeated `times` times, copies adjacent."""
    if times == 1:
        return linear
    return {
        name: part.unflatten(-1, (-1, _width(name, head_dim))).repeat_interleave(times, dim=-2).flatten(-2)
        for name, part in linear.items()
    }


def unreplicate_heads(linear: Stored, head_dim: int, times: int) -> Stored:
    """Inverse of `replicate_heads`: the first copy of each head."""
    if times == 1:
        return linear
    return {
        name: part.unflatten(-1, (-1, _width(name, head_dim)))[..., ::times, :].flatten(-2)
        for name, part in linear.items()
    }


def fuse_qkv(q: Stored, k: Stored, v: Stored, tp: int) -> list[Stored]:
    """Per rank R the output features [q_R | k_R | v_R]; each of q, k, v is cut into tp equal parts."""
    pieces = [{name: part.chunk(tp, dim=-1) for name, part in linear.items()} for linear in (q, k, v)]
    return [{name: torch.cat([piece[name][r] for piece in pieces], dim=-1) for name in q} for r in range(tp)]


def split_qkv(ranks: list[Stored], query_features: int, kv_features: int) -> tuple[Stored, Stored, Stored]:
    """Inverse of `fuse_qkv`; the numbers of features are those of one rank."""
    sizes = (query_features, kv_features, kv_features)
    parts = [
        {name: part.split([_width(name, size) for size in sizes], dim=-1) for name, part in linear.items()}
        for linear in ranks
    ]
    q, k, v = (
        {name: torch.cat([part[name][i] for part in parts], -1) for name in ranks[0]} for i in range(3)
    )
    return q, k, v


def split_outputs(linear: Stored, tp: int) -> list[Stored]:
    """Rank R gets the R-th of tp equal runs of output features (w1, w3)."""
    return [{name: part.chunk(tp, dim=-1)[rank] for name, part in linear.items()} for rank in range(tp)]


def join_outputs(ranks: list[Stored]) -> Stored:
    """Inverse of `split_outputs`."""
    return {name: torch.cat([linear[name] for linear in ranks], dim=-1) for name in ranks[0]}


def split_inputs(linear: Stored, tp: int) -> list[Stored]:
    """Rank R gets the R-th of tp equal runs of input features and of their groups (wo, w2); the bias goes to each whole."""
    return [
        {name: part if name == "bias" else part.chunk(tp)[rank] for name, part in linear.items()}
        for rank in range(tp)
    ]


def join_inputs(ranks: list[Stored]) -> Stored:
    """Inverse of `split_inputs`."""
    return {
        name: part if name == "bias" else torch.cat([linear[name] for linear in ranks])
        for name, part in ranks[0].items()
    }


def padded_intermediate(intermediate_size: int, group_size: int, tp: int) -> int:
    """I' = ceil(ceil(I / g) / tp) * g * tp, with g = 1 for float weights: whole groups for every rank."""
    group = max(1, group_size)
    groups = -(-intermediate_size // group)
    return -(-groups // tp) * group * tp


def pad_outputs(linear: Stored, features: int) -> Stored:
    """Zeros after the last output feature, up to `features` (codes, scales and zeros too: their product is 0)."""
    return {name: _grow(part, part.dim() - 1, _width(name, features)) for name, part in linear.items()}


def cut_outputs(linear: Stored, features: int) -> Stored:
    """Inverse of `pad_outputs`."""
    return {name: part[..., : _width(name, features)] for name, part in linear.items()}


def pad_inputs(linear: Stored, features: int, group_size: int) -> Stored:
    """Zeros after the last input feature, up to `features`; scales and zeros up to features / group_size."""
    rows = {name: features // group_size if name in GROUPED else features for name in linear}
    return {name: part if name == "bias" else _grow(part, 0, rows[name]) for name, part in linear.items()}


def cut_inputs(linear: Stored, features: int, group_size: int) -> Stored:
    """Inverse of `pad_inputs`."""
    rows = {name: -(-features // group_size) if name in GROUPED else features for name in linear}
    return {name: part if name == "bias" else part[: rows[name]] for name, part in linear.items()}


def _grow(part: Tensor, axis: int, size: int) -> Tensor:
    missing = size - part.shape[axis]
    if missing == 0:
        return part
    shape = list(part.shape)
    shape[axis] = missing
    return torch.cat([part, part.new_zeros(shape)], dim=axis)


def interleave_gate_up(gate: Stored, up: Stored) -> Stored:
    """Dialect 0.1's w13: output feature 2j is gate's j, 2j + 1 is up's j."""
    return {
        name: zip_columns(part, up[name])
        if name == "words"
        else torch.stack([part, up[name]], dim=-1).flatten(-2)
        for name, part in gate.items()
    }


def separate_gate_up(fused: Stored) -> tuple[Stored, Stored]:
    """Inverse of `interleave_gate_up`."""
    pairs = {
        name: unzip_columns(part) if name == "words" else (part[..., 0::2], part[..., 1::2])
        for name, part in fused.items()
    }
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


# Dialect 0.1 keeps q[k, n] of a (K, N) matrix in 32 x 32 tiles: word = (k / 32 * N / 32 + n / 32) * 128 + lane * 4 + w with
# lane = 4 * (n % 8) + (k % 8) / 2 and w = 2 * (k % 32 / 16) + n % 32 / 16, nibble = 4 * (k % 2) + 2 * (k % 16 / 8) + n % 16 / 8
# (integer divisions). So k and n are cut into digits, and the digits take these places:
TILE_DIGITS = (2, 2, 4, 2), (2, 2, 8)  # of k inside a tile (16s, 8s, 2s, 1s) and of n (16s, 8s, 1s)
TILE_PLACES = (0, 5, 8, 3, 1, 6, 4, 2, 7)  # k tile, n tile | n 1s, k 2s | k 16s, n 16s | k 1s, k 8s, n 8s


def pack_tiles(words: Tensor) -> Tensor:
    """Sequential words (K, N // 8) int32 -> tiles (K / 32, N / 32, 128) int32. K and N must be multiples of 32."""
    rows, columns = words.shape[0], words.shape[1] * 8
    if rows % 32 or columns % 32:
        raise InputError(
            f"A {rows} x {columns} matrix does not divide into the 32 x 32 tiles of dialect 0.1."
        )
    digits = unpack_columns(words, SEQUENTIAL_ORDER).view(-1, *TILE_DIGITS[0], columns // 32, *TILE_DIGITS[1])
    codes = digits.permute(TILE_PLACES).reshape(-1, 8)
    return pack_columns(codes, SEQUENTIAL_ORDER).view(rows // 32, columns // 32, 128)


def unpack_tiles(tiles: Tensor) -> Tensor:
    """Inverse of `pack_tiles`: tiles (K / 32, N / 32, 128) int32 -> sequential words (K, N // 8) int32."""
    rows, columns = tiles.shape[0] * 32, tiles.shape[1] * 32
    shape = (rows // 32, *TILE_DIGITS[0], columns // 32, *TILE_DIGITS[1])
    codes = unpack_columns(tiles.view(-1, 1), SEQUENTIAL_ORDER).view([shape[place] for place in TILE_PLACES])
    back = sorted(range(len(TILE_PLACES)), key=TILE_PLACES.__getitem__)
    return pack_columns(codes.permute(back).reshape(rows, columns), SEQUENTIAL_ORDER)


def scales_zeros(scales: Tensor, zeros: Tensor) -> Tensor:
    """Dialect 0.1: int32 with fp16(64 + zero) in the low and the fp16 scale in the high 16 bits; any shape."""
    low = (64 + zeros.float()).half().view(torch.int16).to(torch.int32) & 0xFFFF
    high = scales.half().view(torch.int16).to(torch.int32) & 0xFFFF
    return low | (high << 16)


def split_scales_zeros(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `scales_zeros`: (scales fp16, zeros uint8)."""
    low = (packed & 0xFFFF).to(torch.int16).view(torch.float16)
    high = ((packed >> 16) & 0xFFFF).to(torch.int16).view(torch.float16)
    return high, (low.float() - 64).to(torch.uint8)
