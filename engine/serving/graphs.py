"""Decode steps as CUDA graphs, one for each size of batch in a short list; a batch runs in the next larger one.

B rows of a bucket, W blocks of a table. Every tensor that a graph reads or writes and that was made outside it lives as long as
the graph: the four fields of a step (row, position, slot, prompt length), lengths, block tables, and the sampler's last tokens, from
which the graph takes its inputs, so that the token of the step before never visits the host. A graph ends with the likeliest token
of each row, already written to the last tokens: a batch that draws otherwise writes its own over them. Rows that pad a bucket have
position and slot -1, so they are sequences of length 0: nothing is written for them,
their attention is zero, and their logits go nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.model.forward import Model
from engine.serving.cache import PagedAttend, PagedCache, StepBatch
from engine.serving.sampled import Greedy, likeliest
from engine.serving.transfer import upload_into

WARM_UP_STEPS = 2  # eager runs before a capture: kernels are compiled and workspaces allocated by them


@dataclass(frozen=True)
class _Captured:
    """One bucket: its graph, the fields (4, B) int64 that it reads, and what it writes: a copy of the tokens (B,) that it took as
    inputs, the logits (B, V) float32 and the likeliest tokens."""

    graph: torch.cuda.CUDAGraph
    fields: Tensor
    inputs: Tensor
    logits: Tensor
    greedy: Greedy


class DecodeGraphs:
    """Captured decode steps of one model; captures happen when a bucket is first used, or all at once in `warm_up`."""

    def __init__(
        self, model: Model, cache: PagedCache, last_tokens: Tensor, sizes: Sequence[int], width: int
    ) -> None:
        device = model.device
        self._model, self._cache, self._last_tokens = model, cache, last_tokens
        self._sizes = sorted({min(size, len(last_tokens) - 1) for size in sizes})
        self.largest = self._sizes[-1]
        self._tables = torch.zeros(self.largest, width, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(self.largest, dtype=torch.int32, device=device)
        self._padding = np.array([[len(last_tokens) - 1], [-1], [-1], [0]])
        self._uploaded = np.empty((0, width), dtype=np.int32)  # what the tables hold
        self._captured: dict[int, _Captured] = {}
        self._latest: tuple[_Captured, int]
        self._pool = torch.cuda.graph_pool_handle()
        # One for all buckets: cuBLAS keeps a workspace of up to 32 MiB for each stream that it was ever called in.
        self._stream = torch.cuda.Stream(device)

    def run(
        self, fields: npt.NDArray[np.int64], tables: npt.NDArray[np.int32]
    ) -> tuple[Tensor, Tensor, Greedy]:
        """Logits (B, V) float32 of one decode step, the rows (B,) int64 on the device, and the likeliest tokens, which are the
        rows' last tokens now. All are valid until the next run.

        fields (4, B): row, position, slot and prompt length of each sequence; tables (B, W).
        """
        count = fields.shape[1]
        size = next(size for size in self._sizes if size >= count)
        captured = self._captured.get(size) or self._capture(size)
        padding = np.repeat(self._padding, size - count, axis=1)
        upload_into(captured.fields, np.concatenate([fields, padding], axis=1))
        if not np.array_equal(tables, self._uploaded):
            upload_into(self._tables[:count], tables)
            self._uploaded = tables
        captured.graph.replay()
        self._latest = (captured, count)
        peak, tokens = captured.greedy
        return captured.logits[:count], captured.fields[0, :count], Greedy(peak[:count], tokens[:count])

    def take_back(self) -> None:
        """Give the rows of the last run the last tokens that they had before it, so that its step can be run again."""
        captured, count = self._latest
        self._last_tokens.index_copy_(0, captured.fields[0, :count], captured.inputs[:count])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture every bucket now, the largest first, so that the smaller ones fit into its memory."""
        for size in reversed(self._sizes):
            if size not in self._captured:
                self._capture(size)

    def _capture(self, size: int) -> _Captured:
        """Record one step on a batch of padding."""
        fields = torch.empty(4, size, dtype=torch.int64, device=self._model.device)
        upload_into(fields, np.repeat(self._padding, size, axis=1))
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_STEPS):
                self._step(fields)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            inputs, logits, greedy = self._step(fields)
        self._captured[size] = _Captured(graph, fields, inputs, logits, greedy)
        return self._captured[size]

    def _step(self, fields: Tensor) -> tuple[Tensor, Tensor, Greedy]:
        rows, positions, slots, prompt_lengths = fields
        size = len(rows)
        lengths = torch.add(positions, 1, out=self._lengths[:size])
        batch = StepBatch(slots, self._tables[:size], lengths, size)
        attend = PagedAttend(self._cache, batch)
        inputs = self._last_tokens[rows]
        hidden = self._model.hidden(inputs, positions, attend, prompt_lengths)
        logits = self._model.head(hidden)
        greedy = likeliest(logits)
        self._last_tokens[rows] = greedy.tokens
        return inputs, logits, greedy
