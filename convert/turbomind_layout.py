"""How TurboMind arranges a linear: RoPE order, fused qkv, ranks, padding. Pure functions, each with its inverse.

A linear is a `Linear`: parts by name, all with the output features N as their first axis: `weight` (N, K) float, or
`qweight` (N, K) codes uint8 with `scales` and `zeros` (N, G), and where there is one `bias` (N,). An operation on output
features acts on every part alike, so integer codes move unchanged. D head_dim, H and Hkv heads, tp ranks.
Format: LMDeploy 0.6.5, lmdeploy/turbomind/deploy (module.py, parameter.py, policy.py); 0.1.0 for the tiles.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from convert.errors import InputError

Linear = dict[str, Tensor]


def map_rows(linear: Linear, operation: Callable[[Tensor], Tensor]) -> Linear:
    """Apply an operation on output features to every part."""
    return {name: operation(part) for name, part in linear.items()}


def rope_order(heads: int, head_dim: int) -> Tensor:
    """Index (H * D,) with new row h*D + 2j + s = old row h*D + s*D/2 + j: halves become interleaved pairs."""
    within = torch.arange(head_dim).view(2, head_dim // 2).t().reshape(-1)
    return (torch.arange(heads)[:, None] * head_dim + within).reshape(-1)


def interleave_rope(linear: Linear, head_dim: int) -> Linear:
    """Rows of q or k from Hugging Face's order (halves) to TurboMind's (pairs)."""
    return map_rows(linear, lambda part: part[rope_order(len(part) // head_dim, head_dim)])


def separate_rope(linear: Linear, head_dim: int) -> Linear:
    """Inverse of `interleave_rope`."""
    return map_rows(linear, lambda part: part[torch.argsort(rope_order(len(part) // head_dim, head_dim))])


def kv_replication(num_kv_heads: int, tp: int) -> int:
    """How often each KV head is stored so that every rank has one. Raises InputError where tp does not fit."""
    if num_kv_heads % tp == 0:
        return 1
    if tp % num_kv_heads == 0:
        return tp // num_kv_heads
    raise InputError(
        f"{num_kv_heads} KV heads cannot be divided among {tp} ranks: one must be a multiple of the other."
    )


def replicate_heads(linear: Linear, head_dim: int, times: int) -> Linear:
    """Each head of D rows repeated `times` times, copies adjacent."""
    if times == 1:
        return linear
    return map_rows(
        linear,
        lambda part: part.unflatten(0, (-1, head_dim)).repeat_interleave(times, dim=0).flatten(0, 1),
    )


def unreplicate_heads(linear: Linear, head_dim: int, times: int) -> Linear:
    """Inverse of `replicate_heads`: the first copy of each head."""
    return map_rows(linear, lambda part: part.unflatten(0, (-1, head_dim))[::times].flatten(0, 1))


def fuse_qkv(q: Linear, k: Linear, v: Linear, tp: int) -> list[Linear]:
    """Per rank R the rows [q_R | k_R | v_R]; each of q, k, v is cut into tp equal parts."""
    pieces = [{name: part.chunk(tp) for name, part in linear.items()} for linear in (q, k, v)]
    return [{name: torch.cat([piece[name][rank] for piece in pieces]) for name in q} for rank in range(tp)]


def split_qkv(ranks: list[Linear], query_rows: int, kv_rows: int) -> tuple[Linear, Linear, Linear]:
    """Inverse of `fuse_qkv`; query_rows and kv_rows are those of one rank."""
    sizes = [query_rows, kv_rows, kv_rows]
    parts = [{name: part.split(sizes) for name, part in linear.items()} for linear in ranks]
    q, k, v = ({name: torch.cat([part[name][i] for part in parts]) for name in ranks[0]} for i in range(3))
    return q, k, v


def split_rows(linear: Linear, tp: int) -> list[Linear]:
    """Rank R gets the R-th of tp equal runs of output features (w1, w3)."""
    return [{name: part.chunk(tp)[rank] for name, part in linear.items()} for rank in range(tp)]


def join_rows(ranks: list[Linear]) -> Linear:
    """Inverse of `split_rows`."""
    return {name: torch.cat([linear[name] for linear in ranks]) for name in ranks[0]}


def split_columns(linear: Linear, tp: int) -> list[Linear]:
    """Rank R gets the R-th of tp equal runs of input features and of their groups (wo, w2); the bias goes to each whole."""
    return [
        {name: part if name == "bias" else part.chunk(tp, dim=1)[rank] for name, part in linear.items()}
        for rank in range(tp)
    ]


def join_columns(ranks: list[Linear]) -> Linear:
    """Inverse of `split_columns`."""
    return {
        name: part if name == "bias" else torch.cat([linear[name] for linear in ranks], dim=1)
        for name, part in ranks[0].items()
    }


def padded_intermediate(intermediate_size: int, group_size: int, tp: int) -> int:
    """I' = ceil(ceil(I / g) / tp) * g * tp, with g = 1 for float weights: whole groups for every rank."""
    group = max(1, group_size)
    groups = -(-intermediate_size // group)
    return -(-groups // tp) * group * tp


def pad_rows(linear: Linear, rows: int) -> Linear:
    """Zeros after the last output feature, up to `rows` of them (codes, scales and zeros too: their product is 0)."""
    return map_rows(linear, lambda part: _grow(part, 0, rows))


def pad_columns(linear: Linear, columns: int, group_size: int) -> Linear:
    """Zeros after the last input feature, up to `columns`; scales and zeros up to columns / group_size."""
    grown = {}
    for name, part in linear.items():
        if name == "bias":
            grown[name] = part
        else:
            grown[name] = _grow(part, 1, columns // group_size if name in ("scales", "zeros") else columns)
    return grown


def _grow(part: Tensor, axis: int, size: int) -> Tensor:
    missing = size - part.shape[axis]
    if missing == 0:
        return part
    shape = list(part.shape)
    shape[axis] = missing
    return torch.cat([part, part.new_zeros(shape)], dim=axis)


def tile_index(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where dialect 0.1 keeps q[k, n] of a (K, N) matrix: (word address, nibble), both int64 (K, N).

    32 x 32 tiles; word = (tile_k * N/32 + tile_n) * 128 + lane * 4 + w, lane = 4 * (n % 8) + (k % 8) / 2,
    w = 2 * (k % 32 / 16) + n % 32 / 16, nibble = 4 * (k % 2) + 2 * (k % 16 / 8) + n % 16 / 8 (integer divisions).
    """
    k, n = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    lane = 4 * (n % 8) + (k % 8) // 2
    word = 2 * ((k % 32) // 16) + (n % 32) // 16
    nibble = 4 * (k % 2) + 2 * ((k % 16) // 8) + (n % 16) // 8
    address = ((k // 32) * (columns // 32) + n // 32) * 128 + lane * 4 + word
    return address, nibble.expand(rows, columns)


def pack_tiles(codes: Tensor) -> Tensor:
    """Codes (K, N) uint8 -> words (K/32, N/32, 128) int32. K and N must be multiples of 32."""
    rows, columns = codes.shape
    if rows % 32 or columns % 32:
        raise InputError(
            f"A {rows} x {columns} matrix does not divide into the 32 x 32 tiles of dialect 0.1."
        )
    words = torch.zeros(rows * columns // 8, dtype=torch.int64)
    for start, block in _tile_rows(codes):
        address, nibble = tile_index(32, columns)
        flat = (block.long() << (4 * nibble)).flatten()
        words.index_add_(0, start + address.flatten(), flat)
    return words.to(torch.int32).view(rows // 32, columns // 32, 128)


def unpack_tiles(words: Tensor) -> Tensor:
    """Inverse of `pack_tiles`: words (K/32, N/32, 128) int32 -> codes (K, N) uint8."""
    rows, columns = words.shape[0] * 32, words.shape[1] * 32
    address, nibble = tile_index(32, columns)
    return torch.cat([((row.flatten()[address] >> (4 * nibble)) & 15).to(torch.uint8) for row in words]).view(
        rows, columns
    )


def _tile_rows(codes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each run of 32 rows with the address of its first word."""
    for tile, block in enumerate(codes.split(32)):
        yield tile * codes.shape[1] * 4, block


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


def interleave_gate_up(gate: Linear, up: Linear) -> Linear:
    """Dialect 0.1's w13: row 2j is gate row j, row 2j + 1 is up row j."""
    return {name: torch.stack([gate[name], up[name]], dim=1).flatten(0, 1) for name in gate}


def separate_gate_up(fused: Linear) -> tuple[Linear, Linear]:
    """Inverse of `interleave_gate_up`."""
    return map_rows(fused, lambda part: part[0::2]), map_rows(fused, lambda part: part[1::2])
