"""Runs a step plan on a model: flat tokens, tables and slots go to the device, logits to the sampler. Knows no requests.

T tokens of a step, B segments, W blocks of a table. On the CPU a step is padded to a few rows, because a product takes another path
for one row (oneDNN) or for one to three a thread (MKL, without packed weights): with the padding, and attention done for each
sequence alone, a row of a linear has the same bits whoever shares its batch.
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.model.forward import Model
from engine.serving.cache import PagedAttend, PagedCache, StepBatch
from engine.serving.graphs import DecodeGraphs
from engine.serving.sampled import PendingSample
from engine.serving.sampling import Sampler
from engine.serving.scheduler import Segment, StepPlan
from engine.serving.scores import score
from engine.serving.transfer import upload
from engine.serving.warm_up import warm_up_plans
from kernels.products import at_most_threads, threads_worth

Ints = npt.NDArray[np.int64]


class Runner(Protocol):
    """What the engine core needs of a model: its limits, and steps that run. `lookahead` steps may be in flight."""

    num_blocks: int
    block_size: int
    context_length: int
    vocab_size: int
    lookahead: int

    def run(self, plan: StepPlan) -> PendingSample | None:
        """Start a step; the tokens of the segments with `samples`, in order, or None where none draws."""
        ...

    def close(self) -> None:
        """Give back memory and processes; nothing runs afterwards."""
        ...


class ModelRunner:
    """A model with its cache and sampler on one device."""

    def __init__(self, model: Model, cache: PagedCache, config: EngineConfig, context_length: int) -> None:
        self.model, self.cache, self.config = model, cache, config
        self.num_blocks, self.block_size = cache.num_blocks, cache.block_size
        self.context_length, self.vocab_size = context_length, model.vocab_size
        self.device = model.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self.sampler = Sampler(config.max_batch, self.vocab_size, self.device)
        width = -(-context_length // cache.block_size)
        self._tables = np.zeros((config.max_batch, width), dtype=np.int32)
        self._filled = np.zeros(config.max_batch, dtype=np.int64)  # blocks in each row of the tables
        self._prompt_lengths = np.zeros(config.max_batch, dtype=np.int64)
        self._graphs: DecodeGraphs | None = None
        self._is_packed = self.device.type == "cpu" and model.pack()
        model.tabulate_angles(context_length)
        if self.device.type == "cuda" and config.cuda_graphs and model.can_capture:
            self._graphs = DecodeGraphs(model, cache, self.sampler.last_tokens, config.graph_batches, width)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> PendingSample | None:
        for join in plan.joins:
            self.sampler.join(join.row, join.sampling, join.seed, join.prompt_ids, join.output_ids)
            self._filled[join.row] = 0
            self._prompt_lengths[join.row] = len(join.prompt_ids)
        rows = np.array([segment.row for segment in plan.segments])
        for segment in plan.segments:
            self._keep_table(segment)
        if self._graphs is not None and plan.is_decode and len(rows) <= self._graphs.largest:
            starts = np.array([segment.start for segment in plan.segments])
            fields = np.stack([rows, starts, self._slots(rows, starts), self._prompt_lengths[rows]])
            logits, index, greedy = self._graphs.run(fields, self._tables[rows])
            allowed = self._allowed([segment.allowed for segment in plan.segments])
            try:
                return self.sampler.sample(logits, tuple(rows.tolist()), index, greedy, allowed)
            except Exception:
                self._graphs.take_back()
                raise
        return self._run_eagerly(plan, rows)

    def warm_up(self) -> None:
        """On a GPU: capture all CUDA graphs, and run steps of every kind that a graph does not hold."""
        if self._graphs is not None:
            self._graphs.warm_up()
        if self.device.type == "cuda":
            self.take_steps(warm_up_plans(self.config, self.num_blocks, self.context_length))

    def take_steps(self, plans: Iterable[StepPlan]) -> None:
        """Run steps whose tokens nobody wants."""
        for plan in plans:
            pending = self.run(plan)
            assert pending is not None
            pending.wait()

    def close(self) -> None:
        """Let go of model, cache and graphs: whoever still holds the runner, or a core around it, holds no device memory."""
        self._graphs = None
        for name in ("model", "cache", "sampler"):
            vars(self).pop(name, None)

    def _run_eagerly(self, plan: StepPlan, rows: Ints) -> PendingSample | None:
        lengths = np.array([segment.length for segment in plan.segments])
        starts = np.array([segment.start for segment in plan.segments])
        ends = np.cumsum(lengths)
        tokens = int(ends[-1])
        positions = np.arange(tokens) - np.repeat(ends - lengths, lengths) + np.repeat(starts, lengths)
        owners = np.repeat(rows, lengths)
        decodes = sum(not segment.token_ids for segment in plan.segments)
        given = [token for segment in plan.segments for token in segment.token_ids]
        pad = self._padding(tokens)
        fields = np.zeros((4, tokens + pad), dtype=np.int64)
        fields[0, decodes:tokens] = given
        fields[1, :tokens] = positions
        fields[2] = -1
        fields[2, :tokens] = self._slots(owners, positions)
        fields[3, :tokens] = self._prompt_lengths[owners]
        ids, places, slots, prompt_lengths = upload(self.device, fields)
        index = upload(self.device, rows)
        if decodes:
            ids[:decodes] = self.sampler.last_tokens[index[:decodes]]
        width = int(self._filled[rows].max())
        batch = StepBatch(
            slots,
            upload(self.device, self._tables[rows, :width]),
            upload(self.device, (starts + lengths).astype(np.int32)),
            decodes,
            lengths[decodes:].tolist(),
            (starts + lengths)[decodes:].tolist(),
        )
        with at_most_threads(self._threads(tokens)):
            hidden = self.model.hidden(ids, places, PagedAttend(self.cache, batch), prompt_lengths)
        scores = self._scores(plan, hidden, ends - lengths)
        drawing = np.array([i for i, segment in enumerate(plan.segments) if segment.samples], dtype=np.int64)
        if not len(drawing):
            return self._scores_alone(scores)
        last = ends[drawing] - 1
        spare = self._padding(len(last))
        chosen = upload(self.device, np.concatenate([last, np.zeros(spare, dtype=np.int64)]))
        logits = self.model.head(hidden[chosen])[: len(last)]
        picked = rows[drawing]
        allowed = self._allowed([plan.segments[place].allowed for place in drawing])
        pending = self.sampler.sample(
            logits, tuple(picked.tolist()), upload(self.device, picked), allowed=allowed
        )
        if scores:
            pending.add_scores(scores)
        return pending

    def _allowed(self, masks: Sequence[str | None]) -> Tensor | None:
        """Which tokens each row may draw, (B, V) bool, from bits in base64; None where every row may draw all."""
        if not any(masks):
            return None
        allowed = np.ones((len(masks), self.vocab_size), dtype=np.bool_)
        for row, mask in enumerate(masks):
            if mask is not None:
                bits = np.unpackbits(np.frombuffer(base64.b64decode(mask), np.uint8), bitorder="little")
                allowed[row] = bits[: self.vocab_size]
        return upload(self.device, allowed)

    def _scores(self, plan: StepPlan, hidden: Tensor, begins: Ints) -> dict[int, Sequence[Tensor]]:
        """Log-probabilities of prompt tokens, of the segments that want them; `begins`: rows of `hidden` where segments begin."""
        scores: dict[int, Sequence[Tensor]] = {}
        for place, (segment, begin) in enumerate(zip(plan.segments, begins.tolist(), strict=True)):
            if segment.targets:
                rows = hidden[begin : begin + len(segment.targets)]
                count = self.sampler.prompt_logprobs(segment.row)
                scores[place] = score(rows, segment.targets, count, self.model.head)
        return scores

    def _scores_alone(self, scores: dict[int, Sequence[Tensor]]) -> PendingSample | None:
        """What a step that draws nothing has to say: its scores, if any."""
        if not scores:
            return None
        nothing = torch.empty(0, device=self.device)
        pending = PendingSample((nothing.long(), nothing))
        pending.add_scores(scores)
        return pending

    def _threads(self, rows: int) -> int:
        """Threads for the blocks of a step on the CPU: packed products have the same bits on any number of them."""
        model = self.model.config
        if not self._is_packed:
            return torch.get_num_threads()
        heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
        block = model.hidden_size * (heads + 3 * model.intermediate_size)
        return threads_worth(rows, block // 4)  # a block has four products

    def _keep_table(self, segment: Segment) -> None:
        if self._filled[segment.row] != len(segment.blocks):
            self._tables[segment.row, : len(segment.blocks)] = segment.blocks
            self._filled[segment.row] = len(segment.blocks)

    def _slots(self, rows: Ints, positions: Ints) -> Ints:
        blocks = self._tables[rows, positions // self.block_size].astype(np.int64)
        return blocks * self.block_size + positions % self.block_size

    def _padding(self, rows: int) -> int:
        """Rows to add on the CPU so that bits do not depend on their number, and so that few numbers occur.

        oneDNN compiles each product anew for each number of rows, 1 ms and 0.5 MiB each: four sizes an octave are used.
        """
        if self.device.type != "cpu" or (self.config.max_batch == 1 and (rows == 1 or not self._is_packed)):
            return 0
        if self._is_packed:
            unit = max(2, 1 << max(0, (rows - 1).bit_length() - 3))
            return -(-rows // unit) * unit - rows
        return max(-(-rows // 4) * 4, 4 * torch.get_num_threads()) - rows
