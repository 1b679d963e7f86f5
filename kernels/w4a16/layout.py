"""The order in which the W4A16 kernels read a 4-bit weight, and its inverse. Knows nothing of kernels, tiles or files.

N out features, K in features, KB = ceil(K / 128) blocks along K, P = 128 / group_size groups in a block.
words (KB, N, 32) int16: nibble j of word c of block b holds k = 128 b + 32 j + c. One row of a block is 64 contiguous
bytes; plane j (nibble j of all words) multiplies the contiguous slice x[128 b + 32 j : + 32], so that neither x nor the
weights are permuted in a kernel. The same bytes seen as int32 hold pairs (k, k + 1) in the halves of a word.
params (KB * P, N) int32: bits 0 .. 15 the scale (fp16), bits 16 .. 31 the zero point (integer 0 .. 15).
A K that is no multiple of 128 is filled up with code 0, scale 0, zero 0, which adds nothing to a product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.int4 import Quantized

BLOCK = 128  # k covered by one row of words
PLANES = 4  # nibbles of an int16 word
WIDTH = BLOCK // PLANES
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class W4Weight:
    """A 4-bit weight in kernel order. words (KB, N, 32) int16, params (KB * P, N) int32, bias (N,) float or None.

    `is_paired`: rows 2i and 2i + 1 are row i of gate and of up, and the product is silu(gate) * up with N / 2 features.
    """

    words: Tensor
    params: Tensor
    bias: Tensor | None
    in_features: int
    group_size: int
    is_paired: bool = False

    @property
    def rows(self) -> int:
        """N: rows of the weight, both rows of each pair counted."""
        return self.words.shape[1]

    @property
    def out_features(self) -> int:
        return self.rows // 2 if self.is_paired else self.rows

    @property
    def blocks(self) -> int:
        """KB: blocks of 128 along K."""
        return self.words.shape[0]

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def size_bytes(self) -> int:
        """Bytes read by one product: codes, scales and zeros."""
        return self.words.numel() * 2 + self.params.numel() * 4

    def to(self, device: torch.device | str) -> "W4Weight":
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, words=self.words.to(device), params=self.params.to(device), bias=bias)


def prepare(quantized: Quantized, bias: Tensor | None = None) -> W4Weight:
    """Re-order a quantized weight (N, K) for the kernels, on the device that it is on; done once at load.

    Raises ValueError for bits other than 4, a group size other than 32, 64 or 128, and a bias that is not (N,).
    """
    rows, cols = quantized.shape
    if quantized.bits != 4:
        raise ValueError(f"the weight has {quantized.bits} bits; W4A16 kernels read 4-bit codes only.")
    if quantized.group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {quantized.group_size}; W4A16 kernels take one of {GROUP_SIZES}.")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (N,) = ({rows},).")
    blocks = -(-cols // BLOCK)
    codes = quantized.codes.new_zeros(rows, blocks * BLOCK) if cols % BLOCK else quantized.codes
    if cols % BLOCK:
        codes[:, :cols] = quantized.codes
    planes = codes.view(rows, blocks, PLANES, WIDTH)  # (N, K) -> (N, KB, plane, word)
    words = planes[:, :, 0].to(torch.int16)
    for plane in range(1, PLANES):
        words |= planes[:, :, plane].to(torch.int16) << (4 * plane)  # plane 3 reaches the sign bit, as wanted
    groups = blocks * BLOCK // quantized.group_size
    pairs = torch.zeros(groups, rows, 2, dtype=torch.int16, device=codes.device)
    used = quantized.scales.shape[1]
    pairs[:used, :, 0] = quantized.scales.t().contiguous().view(torch.int16)
    pairs[:used, :, 1] = quantized.zeros.t().to(torch.int16)
    return W4Weight(
        words.permute(1, 0, 2).contiguous(),  # (N, KB, 32) -> (KB, N, 32)
        pairs.view(torch.int32).squeeze(-1),  # (groups, N, 2) int16 -> (groups, N) int32, little endian
        bias,
        cols,
        quantized.group_size,
    )


def restore(weight: W4Weight) -> Quantized:
    """Inverse of `prepare` (rows stay in kernel order where weights were joined): codes (N, K), scales, zeros (N, G)."""
    words = weight.words.permute(1, 0, 2)  # (KB, N, 32) -> (N, KB, 32)
    planes = torch.stack([(words >> (4 * plane)) & 15 for plane in range(PLANES)], dim=2)
    codes = planes.reshape(weight.rows, -1)[:, : weight.in_features].to(torch.uint8).contiguous()
    groups = weight.in_features // weight.group_size
    pairs = weight.params[:groups].contiguous().view(torch.int16).view(groups, weight.rows, 2)
    scales = pairs[:, :, 0].t().contiguous().view(torch.float16)
    zeros = pairs[:, :, 1].t().to(torch.uint8).contiguous()
    return Quantized(codes, scales, zeros, weight.group_size)


def concat(weights: Sequence[W4Weight]) -> W4Weight:
    """Join weights of the same K and group size along N (q, k and v; gate and up), so that one product serves all.

    A weight without a bias counts as zero bias where another has one. Raises ValueError when K or group size differ.
    """
    _check_alike(weights)
    bias = None
    if any(w.bias is not None for w in weights):
        dtype = next(w.bias.dtype for w in weights if w.bias is not None)
        parts = [
            torch.zeros(w.rows, dtype=dtype, device=w.device) if w.bias is None else w.bias for w in weights
        ]
        bias = torch.cat(parts)
    words = torch.cat([w.words for w in weights], dim=1)
    params = torch.cat([w.params for w in weights], dim=1)
    return W4Weight(words, params, bias, weights[0].in_features, weights[0].group_size)


def pair(gate: W4Weight, up: W4Weight) -> W4Weight:
    """Interleave the rows of gate and up (both (I, K)): the product of the result is silu(x gate^T) * (x up^T), (M, I)."""
    _check_alike((gate, up))
    if gate.rows != up.rows:
        raise ValueError(f"gate has {gate.rows} rows and up has {up.rows}; silu(gate) * up needs as many.")
    joined = concat((gate, up))
    order = torch.arange(2 * gate.rows, device=gate.device).view(2, -1).t().reshape(-1)  # 0, I, 1, I + 1, ...
    bias = None if joined.bias is None else joined.bias[order]
    return replace(
        joined, words=joined.words[:, order], params=joined.params[:, order], bias=bias, is_paired=True
    )


def _check_alike(weights: Sequence[W4Weight]) -> None:
    if not weights:
        raise ValueError("no weights were given to join; at least one is needed.")
    first = weights[0]
    for weight in weights:
        if weight.is_paired:
            raise ValueError("a weight with interleaved gate and up rows cannot be joined again.")
        if (weight.in_features, weight.group_size) != (first.in_features, first.group_size):
            raise ValueError(
                f"weights with K = {weight.in_features}, group_size {weight.group_size} and K = "
                f"{first.in_features}, group_size {first.group_size} cannot be joined along N."
            )
