"""Decode steps as CUDA graphs, one for each size of batch in a short list; a batch runs in the next larger one.

B rows of a bucket, W blocks of a table. Every tensor a graph reads has a fixed address: the four fields of a step (row, position,
slot, prompt length), the block tables, and the sampler's last tokens, from which the graph takes its inputs, so that the token of
the step before never visits the host. Rows that pad a bucket have length 0 and slot -1: nothing is read or written for them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.cache import PagedAttend, PagedCache, StepBatch
from engine.model import Model
from engine.transfer import upload_into

WARM_UP_STEPS = 2  # eager runs before a capture: kernels are compiled and workspaces allocated by them


class DecodeGraphs:
    """Captured decode steps of one model; captures happen when a bucket is first used, or all at once in `warm_up`."""

    def __init__(
        self, model: Model, cache: PagedCache, last_tokens: Tensor, sizes: Sequence[int], width: int
    ) -> None:
        device = model.device
        self._model, self._cache, self._last_tokens = model, cache, last_tokens
        self._sizes = sorted({min(size, len(last_tokens) - 1) for size in sizes})
        self.largest = self._sizes[-1]
        # One buffer of each kind serves all buckets: its first B columns or rows.
        self._fields = torch.zeros(self.largest, 4, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(self.largest, dtype=torch.int32, device=device)
        self._tables = torch.zeros(self.largest, width, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, fields: npt.NDArray[np.int64], tables: npt.NDArray[np.int32]) -> tuple[Tensor, Tensor]:
        """Logits (B, V) float32 of one decode step and the rows (B,) int64 on the device; both valid until the next run.

        fields (4, B): row, position, slot and prompt length of each sequence; tables (B, W).
        """
        count = fields.shape[1]
        size = next(size for size in self._sizes if size >= count)
        padded = np.zeros((size, 4), dtype=np.int64)
        padded[:count] = fields.T
        padded[count:] = (len(self._last_tokens) - 1, -1, -1, 0)  # position -1: length 0
        upload_into(self._fields[:size], padded)
        upload_into(self._tables[:count], tables)
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count], self._fields[:count, 0]

    def warm_up(self) -> None:
        """Capture every bucket now, the largest first, so that the smaller ones fit into its memory."""
        for size in reversed(self._sizes):
            if size not in self._graphs:
                self._fields[:size] = torch.tensor(
                    [len(self._last_tokens) - 1, -1, -1, 0], device=self._fields.device
                )
                self._graphs[size] = self._capture(size)

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._step(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(size)
        return graph, logits

    def _step(self, size: int) -> Tensor:
        rows, positions, slots, prompt_lengths = self._fields[:size].unbind(1)
        self._lengths[:size] = positions + 1
        batch = StepBatch(slots.contiguous(), self._tables[:size], self._lengths[:size], size)
        hidden = self._model.hidden(
            self._last_tokens[rows],
            positions.clamp(min=0),
            PagedAttend(self._cache, batch),
            prompt_lengths,
        )
        return self._model.head(hidden)
