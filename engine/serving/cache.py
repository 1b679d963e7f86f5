"""The paged KV cache of a whole model, and attention over it as the closure that the forward pass calls.

T tokens of a step, B sequences, W blocks of a table, Hq and Hkv heads, D head size. Pages, rounding and kernels are those of
`kernels/kv/int8.py` and `kernels/attention/paged.py`. Which block belongs to whom is decided by the scheduler.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convert.config import ModelConfig
from convert.errors import ResourceError
from engine.config import GIB, EngineConfig
from engine.model.attention import HeadNorms, window_of
from engine.model.rope import Rotary
from kernels.attention.cpu import PagedDecode
from kernels.attention.paged import (
    allocate_workspace,
    decode_attention,
    prefill_attention,
    rope_decode_attention,
)
from kernels.block.fused import rope_store
from kernels.kv.int8 import store_kv
from kernels.kv.pages import StaticKV, allocate_cache, cache_block_bytes

DEPENDENT_ROWS = (
    32  # up to here decode attention starts while the product ahead drains; above that gains nothing
)
CPU_CACHE_BYTES = 1 * GIB  # on the CPU, where the rest of the memory is not the engine's alone


@dataclass(frozen=True)
class StepBatch:
    """Where the tokens of a step belong. Tokens lie flat: `decodes` single tokens, then chunks of prompts, then padding.

    slots (T,) int64, -1 for padding; tables (B, W) int32; lengths (B,) int32 tokens of each sequence with those of this step
    (0: a row that pads), the decoding sequences first; query_lens and context_lens are the chunks' numbers on the host.
    """

    slots: Tensor
    tables: Tensor
    lengths: Tensor
    decodes: int
    query_lens: Sequence[int] = ()
    context_lens: Sequence[int] = ()


class PagedCache:
    """Keys and values of `num_blocks` blocks for every layer; a rank of a tensor-parallel group holds its own heads."""

    def __init__(
        self,
        config: ModelConfig,
        engine: EngineConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        static: Sequence[StaticKV] | None = None,
    ) -> None:
        self.config, self.num_blocks, self.block_size = config, num_blocks, engine.block_size
        self.layers = [
            allocate_cache(
                num_blocks,
                config.num_kv_heads,
                config.head_dim,
                engine.kv_bits,
                dtype,
                device,
                block_size=engine.block_size,
                static=None if static is None else static[layer],
            )
            for layer in range(config.num_layers)
        ]
        self.scale, self.softcap = config.softmax_scale, config.attention_softcap
        self.windows = [window_of(config, layer) for layer in range(config.num_layers)]
        self.workspace = allocate_workspace(
            engine.max_batch, config.num_heads, config.num_kv_heads, config.head_dim, device
        )

    @property
    def size_bytes(self) -> int:
        parts = (part for layer in self.layers for part in (layer.k, layer.v, layer.params))
        return sum(part.nbytes for part in parts if part is not None)

    def fill_random(self, seed: int = 0) -> None:
        """Random bits that are valid keys and values, for measurements of decode at a length that nobody prefilled."""
        generator = torch.Generator(self.layers[0].k.device).manual_seed(seed)
        for layer in self.layers:
            for pages in (layer.k, layer.v):
                if layer.bits == 8:
                    pages.random_(-(2**15), 2**15, generator=generator)
                else:
                    pages.normal_(generator=generator)
            if layer.params is not None:
                layer.params[..., 0] = 1 / 64
                layer.params[..., 1] = 0


class PagedAttend:
    """`Attend` of one step: write the new keys and values, then read each sequence's pages."""

    def __init__(self, cache: PagedCache, batch: StepBatch) -> None:
        self._cache, self._batch = cache, batch
        self._decodes: dict[int | None, PagedDecode] = {}  # by window, on the CPU

    @cached_property
    def _chunk_slots(self) -> Tensor:
        """Slots of the chunks of prompts; a copy, because kernels are compiled anew for an address that is not aligned."""
        return self._batch.slots[self._batch.decodes :].clone()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store_kv(self._cache.layers[layer], k, v, self._batch.slots)
        return self.read(layer, q)

    def attend_qkv(self, layer: int, qkv: Tensor, angles: Rotary, norms: HeadNorms | None) -> Tensor:
        """As a call, with head norms, RoPE and the store in one kernel: qkv (T, (Hq + 2 Hkv) * D) -> (T, Hq * D).

        On a GPU the attention of the decoding sequences is in that kernel too: its variants are those of the captured steps.
        """
        cache, batch, count = self._cache, self._batch, self._batch.decodes
        pages, scale, window = cache.layers[layer], cache.scale, cache.windows[layer]
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else (norms.q, norms.k, norms.eps)
        if not (qkv.is_cuda and count) or cache.softcap is not None:
            q = rope_store(
                qkv, angles.cos, angles.sin, pages, batch.slots,
                q_norm=q_norm, k_norm=k_norm, eps=eps, q_scale=angles.q_scale,
            )  # fmt: skip
            return self.read(layer, q)
        first = angles.take(slice(count))
        out = qkv.new_empty(len(qkv), cache.config.num_heads, pages.head_dim)
        rope_decode_attention(
            qkv[:count], first.cos, first.sin, pages, batch.tables[:count], batch.lengths[:count], scale, window,
            q_norm=q_norm, k_norm=k_norm, eps=eps, q_scale=first.q_scale,
            workspace=cache.workspace, out=out[:count], pdl=count <= DEPENDENT_ROWS,
        )  # fmt: skip
        if count < len(qkv):
            rest = angles.take(slice(count, None))
            q = rope_store(
                qkv[count:], rest.cos, rest.sin, pages, self._chunk_slots,
                q_norm=q_norm, k_norm=k_norm, eps=eps, q_scale=rest.q_scale,
            )  # fmt: skip
            out[count:] = self._prefill(layer, q)
        return out.flatten(1)

    def read(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q (T, Hq, D) over the pages: (T, Hq * D), zeros for padding."""
        batch, count = self._batch, self._batch.decodes
        if count == len(q):
            return self._decode(layer, q, None).flatten(1)
        out = torch.zeros_like(q)
        if count:
            self._decode(layer, q[:count], out[:count])
        stop = count + sum(batch.query_lens)
        if stop > count:
            out[count:stop] = self._prefill(layer, q[count:stop])
        return out.flatten(1)

    def _prefill(self, layer: int, q: Tensor) -> Tensor:
        """Attention of the chunks of prompts, q (sum of query_lens, Hq, D)."""
        cache, batch = self._cache, self._batch
        return prefill_attention(
            q,
            cache.layers[layer],
            batch.tables[batch.decodes :],
            batch.query_lens,
            batch.context_lens,
            cache.scale,
            cache.windows[layer],
            softcap=cache.softcap,
        )

    def _decode(self, layer: int, q: Tensor, out: Tensor | None) -> Tensor:
        """Attention of the decoding sequences, q (B, Hq, D), written to `out` where given."""
        cache, batch, count = self._cache, self._batch, len(q)
        pages, window = cache.layers[layer], cache.windows[layer]
        tables, lengths = batch.tables[:count], batch.lengths[:count]
        if q.is_cuda and cache.softcap is None:
            return decode_attention(
                q, pages, tables, lengths, cache.scale, window, workspace=cache.workspace, out=out
            )
        if window not in self._decodes:
            self._decodes[window] = PagedDecode(tables, lengths, cache.block_size, window)
        result = self._decodes[window](q, pages, cache.scale, cache.softcap)
        return result if out is None else out.copy_(result)


def block_bytes(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers of this rank."""
    per_layer = cache_block_bytes(
        config.num_kv_heads,
        config.head_dim,
        engine.kv_bits,
        dtype,
        block_size=engine.block_size,
        is_static=engine.kv_mode == "static",
    )
    return per_layer * config.num_layers


def plan_blocks(
    config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, free_bytes: int, context_length: int
) -> int:
    """How many blocks the cache gets, at most what `max_batch` sequences of the full context can use.

    Raises ResourceError where not one block fits.
    """
    size_bytes = block_bytes(config, engine, dtype)
    budget_bytes = engine.cache_bytes
    if budget_bytes is None:
        budget_bytes = int(free_bytes * engine.cache_fraction)
    blocks = min(budget_bytes // size_bytes, engine.max_batch * -(-context_length // engine.block_size))
    if blocks < 1:
        raise ResourceError(
            f"The KV cache has {budget_bytes / GIB:.2f} GiB, but one block of {engine.block_size} tokens takes "
            f"{size_bytes / GIB:.3f} GiB: free memory on the device, raise the cache size, or use --kv-bits 8."
        )
    return blocks
