"""Drawing tokens from logits, for all sequences of a step at once. Knows no cache, no text and no schedule.

B rows of the step, V vocabulary. Order: bias, penalties, temperature, top-k, top-p, min-p, draw. Every operation is done for each
row alone, and the random number of a row is a hash of (its seed, how many tokens it has drawn), so that a request's tokens do not
depend on who shares its batch. Per-sequence state lies on the device in rows that the scheduler hands out.

Formulas: repetition penalty r (Keskar et al. 2019): logits of tokens seen in prompt or output are divided by r if positive, else
multiplied; presence and frequency penalties (OpenAI): logits -= presence * [count > 0] + frequency * count, counts over the output;
top-p (Holtzman et al. 2019): the smallest set of likeliest tokens whose mass reaches p; min-p: tokens with p >= min_p * p_max.
Tokens tied with the last one kept are kept. Log-probabilities are those of the model's own logits, before all of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.api import SamplingParams
from engine.serving.sampled import Greedy, PendingSample, likeliest
from engine.serving.transfer import upload

TOPK_LIMIT = 256  # up to here the k-th largest logit comes from a selection, above from a sort
MAX_LOGPROBS = 20

UInts = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class _Filter:
    """Rows (of those that draw) whose limit comes from a top-k selection or from a sort: their indices and parameters."""

    index: Tensor
    top_k: Tensor  # (B', 1) int64
    top_p: Tensor  # (B', 1) float64


@dataclass(frozen=True)
class _Batch:
    """The parameters of one set of rows as tensors; the same for every step until a sequence joins or leaves."""

    is_plain_greedy: bool
    logprobs: int  # the largest number of alternatives asked for; -1: none wants log-probabilities
    penalties: Tensor | None  # (3, B, 1) float32: repetition, presence, frequency
    bias: tuple[Tensor, Tensor, Tensor] | None  # row of the batch, token, value
    drawn: Tensor | None  # (B',) int64 rows that draw
    drawn_rows: UInts
    temperature: Tensor
    log_min_p: Tensor
    selecting: _Filter | None
    sorting: _Filter | None


class Sampler:
    """Sampling state of `rows` sequences on one device, one row more for the padding of CUDA graphs."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.device, self.vocab_size = device, vocab_size
        self.last_tokens = torch.zeros(rows + 1, dtype=torch.int64, device=device)
        self._params: list[SamplingParams] = [SamplingParams(temperature=0.0)] * rows
        self._seeds = np.zeros(rows, dtype=np.uint64)
        self._drawn = np.zeros(rows, dtype=np.uint64)
        self._counts: Tensor | None = (
            None  # (rows + 1, V) int32: tokens of the output; made when first needed
        )
        self._seen: Tensor | None = None  # (rows + 1, V) bool: tokens of prompt and output
        self._prepared: tuple[tuple[int, ...], _Batch] | None = None

    def join(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
    ) -> None:
        """A sequence takes this row; output_ids are those of an earlier stay."""
        self._params[row] = params
        self._seeds[row] = seed & 0xFFFFFFFFFFFFFFFF
        self._drawn[row] = len(output_ids)
        self._prepared = None
        if _is_penalised(params):
            counts, seen = self._history()
            output = torch.bincount(
                torch.tensor(list(output_ids), dtype=torch.int64), minlength=self.vocab_size
            )
            known = torch.zeros(self.vocab_size, dtype=torch.bool)
            known[torch.tensor([*prompt_ids, *output_ids], dtype=torch.int64)] = True
            counts[row] = output.to(self.device, torch.int32)
            seen[row] = known.to(self.device)

    def prompt_logprobs(self, row: int) -> int:
        """Alternatives that the sequence of this row wants for each token of its prompt."""
        return min(self._params[row].prompt_logprobs or 0, MAX_LOGPROBS, self.vocab_size)

    def sample(
        self,
        logits: Tensor,
        rows: tuple[int, ...],
        index: Tensor,
        greedy: Greedy | None = None,
        allowed: Tensor | None = None,
    ) -> PendingSample:
        """Draw one token a row from logits (B, V) float32, keep it as the row's last token, start its way to the host.

        rows and index (B,) int64 are the same numbers, on the host and on the device. `greedy`: the likeliest tokens, where
        they are known and are the rows' last tokens already; a batch that wants nothing else is then done. `allowed` (B, V) bool:
        the only tokens that may be drawn; log-probabilities are those of the model all the same.
        """
        if self._prepared is None or self._prepared[0] != rows:
            self._prepared = (rows, self._prepare(rows))
        batch = self._prepared[1]
        logprobs = top_ids = top_logprobs = None
        if batch.is_plain_greedy and greedy is not None and allowed is None:
            pending = PendingSample((greedy.tokens, greedy.peak))
            self._drawn[list(rows)] += np.uint64(1)
            return pending
        if batch.is_plain_greedy and allowed is None:
            peak, tokens = likeliest(logits)
        else:
            peak = logits.amax(-1)
            logits = torch.where(torch.isfinite(peak)[:, None], logits, 0.0)
            if batch.logprobs >= 0:
                logprobs = torch.log_softmax(logits, dim=-1)
            if logprobs is not None and batch.logprobs > 0:
                top_logprobs, top_ids = logprobs.topk(batch.logprobs, dim=-1)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            tokens = self._draw(self._shape(logits, batch, index), batch)
            if logprobs is not None:
                logprobs = logprobs.gather(1, tokens[:, None])[:, 0]
        pending = PendingSample((tokens, peak, logprobs, top_ids, top_logprobs))
        # Only now does the state change: a step that fails above can be taken again.
        if batch.penalties is not None and self._counts is not None and self._seen is not None:
            self._counts.index_put_(
                (index, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True
            )
            self._seen.index_put_((index, tokens), torch.ones_like(tokens, dtype=torch.bool))
        self.last_tokens[index] = tokens
        self._drawn[list(rows)] += np.uint64(1)
        return pending

    def _history(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._seen is None:
            shape = (len(self.last_tokens), self.vocab_size)
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        return self._counts, self._seen

    def _prepare(self, rows: tuple[int, ...]) -> _Batch:
        params = [self._params[row] for row in rows]
        penalties = bias = None
        if any(_is_penalised(p) for p in params):
            table = [[p.repetition_penalty, p.presence_penalty, p.frequency_penalty] for p in params]
            penalties = upload(self.device, np.array(table, dtype=np.float32).T[..., None])
        biases = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias]
        if biases:
            where, tokens, values = (np.array(part) for part in zip(*biases, strict=True))
            bias = (
                upload(self.device, where),
                upload(self.device, tokens),
                upload(self.device, values.astype(np.float32)),
            )
        drawn = [i for i, p in enumerate(params) if p.temperature > 0.0]
        chosen = [params[i] for i in drawn]
        with np.errstate(divide="ignore"):
            log_min_p = np.log(np.array([p.min_p for p in chosen], dtype=np.float32))
        temperature = np.array([max(p.temperature, 1e-6) for p in chosen], dtype=np.float32)
        sorting = [i for i, p in enumerate(chosen) if p.top_p < 1.0 or p.top_k > TOPK_LIMIT]
        selecting = [i for i, p in enumerate(chosen) if p.top_p == 1.0 and 0 < p.top_k <= TOPK_LIMIT]
        return _Batch(
            all(_is_plain_greedy(p) for p in params),
            min(max(-1 if p.logprobs is None else p.logprobs for p in params), MAX_LOGPROBS, self.vocab_size),
            penalties,
            bias,
            upload(self.device, np.array(drawn, dtype=np.int64)) if drawn else None,
            np.array([rows[i] for i in drawn], dtype=np.uint64),
            upload(self.device, temperature[:, None]),
            upload(self.device, log_min_p),
            self._filter(selecting, chosen),
            self._filter(sorting, chosen),
        )

    def _filter(self, which: list[int], params: list[SamplingParams]) -> _Filter | None:
        if not which:
            return None
        top_k = [min(params[i].top_k or self.vocab_size, self.vocab_size) for i in which]
        top_p = [params[i].top_p for i in which]
        return _Filter(
            upload(self.device, np.array(which, dtype=np.int64)),
            upload(self.device, np.array(top_k, dtype=np.int64)[:, None]),
            upload(self.device, np.array(top_p, dtype=np.float64)[:, None]),
        )

    def _shape(self, logits: Tensor, batch: _Batch, index: Tensor) -> Tensor:
        """Logits with bias and penalties applied. logits (B, V) may be changed in place."""
        if batch.bias is not None:
            where, tokens, values = batch.bias
            logits = logits.index_put((where, tokens), values, accumulate=True)
        if batch.penalties is None or self._counts is None or self._seen is None:
            return logits
        repetition, presence, frequency = batch.penalties
        counts, seen = self._counts[index], self._seen[index]  # (B, V)
        scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
        shaped: Tensor = torch.where(seen, scaled, logits) - presence * (counts > 0) - frequency * counts
        return shaped

    def _draw(self, logits: Tensor, batch: _Batch) -> Tensor:
        """Tokens (B,) int64: the largest logit where temperature is 0, else by inverting the cumulative distribution."""
        greedy = logits.argmax(dim=-1)
        if batch.drawn is None:
            return greedy
        scaled = logits[batch.drawn]
        # The maximum is subtracted first, so that a tiny temperature stays finite.
        scaled = (scaled - scaled.amax(-1, keepdim=True)) / batch.temperature
        scaled = scaled.masked_fill(scaled < self._limit(scaled, batch)[:, None], -torch.inf)
        total = torch.softmax(scaled, dim=-1, dtype=torch.float64).cumsum(dim=-1)
        rows = batch.drawn_rows
        uniform = upload(self.device, uniforms(self._seeds[rows], self._drawn[rows])[:, None])
        tokens = torch.searchsorted(total, uniform * total[:, -1:], right=True)
        last = torch.searchsorted(total, total[:, -1:].contiguous())  # where rounding would step past the end
        return greedy.index_copy(0, batch.drawn, torch.minimum(tokens, last)[:, 0])

    def _limit(self, scaled: Tensor, batch: _Batch) -> Tensor:
        """(B',) the smallest scaled logit that the filters of each row keep; rows of `scaled` have maximum 0."""
        limit = batch.log_min_p  # min-p 0: -inf, keeps all
        if batch.selecting is not None:
            index, top_k = batch.selecting.index, batch.selecting.top_k
            largest = scaled[index].topk(min(TOPK_LIMIT, self.vocab_size), dim=-1).values
            limit = limit.index_copy(
                0, index, torch.maximum(limit[index], largest.gather(1, top_k - 1)[:, 0])
            )
        if batch.sorting is not None:
            index, top_k, top_p = batch.sorting.index, batch.sorting.top_k, batch.sorting.top_p
            ordered = scaled[index].sort(dim=-1, descending=True).values  # (B'', V)
            cut = torch.arange(self.vocab_size, device=self.device) >= top_k
            ordered = ordered.masked_fill(cut, -torch.inf)
            mass = torch.softmax(ordered, dim=-1, dtype=torch.float64)
            dropped = cut | (mass.cumsum(-1) - mass >= top_p)  # the likelier tokens hold that mass already
            kept = ordered.masked_fill(dropped, torch.inf).amin(-1)
            limit = limit.index_copy(0, index, torch.maximum(limit[index], kept))
        return limit.clamp(max=0.0)


def uniforms(seeds: UInts, counters: UInts) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each pair of seed and counter: two rounds of splitmix64 (Steele et al. 2014), top 53 bits."""
    with np.errstate(over="ignore"):
        mixed = _splitmix(_splitmix(seeds) + counters)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: UInts) -> UInts:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def _is_plain_greedy(params: SamplingParams) -> bool:
    return (
        params.temperature == 0.0
        and params.logprobs is None
        and not params.logit_bias
        and not _is_penalised(params)
    )
