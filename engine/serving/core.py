"""EngineCore: requests in, events out, one step at a time. Synchronous and deterministic; knows no process, no HTTP, no kernel.

A step is four lines: schedule, run, wait for the oldest step in flight, collect its tokens. On a GPU one step is in flight while
the next is planned: tokens stay on the device, and a sequence that turns out to have ended has run one step for nothing.
"""

import base64
import gc
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch

from engine.api import EngineDied, Event, FinishReason, Request, Stats, TokenLogprob
from engine.config import EngineConfig
from engine.serving.detokenize import NoText, TextStream, TextTools
from engine.serving.runner import Runner
from engine.serving.sampled import PendingSample, Sampled
from engine.serving.scheduler import BlockManager, Scheduler, Sequence, StepPlan
from engine.serving.structure import Guide, StructureError, Structures

log = logging.getLogger(__name__)

RATE_WINDOW_S = 1.0
NOT_FINITE = "The model's logits are not finite for this request: its weights or activations overflow."
SURVIVABLE = (
    RuntimeError,
    ValueError,
    ArithmeticError,
    IndexError,
)  # of one batch; the device is still sound


@dataclass
class _Live:
    """What the core keeps of a request beside its sequence."""

    sequence: Sequence
    text: TextStream
    stop_ids: frozenset[int]
    deadline: float  # on the core's clock
    scores: list[TokenLogprob | None] = field(default_factory=list)  # of the prompt, from its second token on
    guide: Guide | None = None  # where the answer must follow a schema

    def take_scores(self) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of the prompt, once, when all are known."""
        known = tuple(s for s in self.scores if s is not None)
        if len(known) < len(self.scores):
            return ()
        self.scores = []
        return known


@dataclass
class _News:
    """Tokens and text of one request since its last event."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class EngineCore:
    """Continuous batching over one runner. Not thread-safe: one caller adds, aborts and steps."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        text: TextTools | None = None,
        *,
        name: str = "",
        eos_token_ids: tuple[int, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner, self.config, self.name = runner, config, name
        self.blocks = BlockManager(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_batch, config.max_step_tokens)
        self.context_length = min(runner.context_length, runner.num_blocks * runner.block_size)
        self._text: TextTools = text or NoText()
        self._eos = {*eos_token_ids, *self._text.eos_token_ids}
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self._in_flight: deque[list[tuple[StepPlan, PendingSample]]] = deque()
        self._events: list[Event] = []
        self._arrivals = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._structures: Structures | None = None  # made when the first request wants one

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._in_flight or self._events)

    def add(self, request: Request) -> None:
        """Queue a request; one that can never run is answered with an error event. ValueError where its id is in use."""
        if request.id in self._live:
            raise ValueError(
                f"request id {request.id!r} is in use: ids must be unique among running requests."
            )
        problem = self._problem(request)
        if problem is not None:
            self._events.append(
                Event(request.id, finish_reason="error", error=problem, prompt_tokens=len(request.prompt_ids))
            )
            return
        sampling = request.sampling
        seed = sampling.seed
        if seed is None:
            seed = (self.config.seed << 32) + self._arrivals
        sequence = Sequence(request, self._arrivals, seed)
        eos = () if sampling.ignore_eos else self._eos
        deadline = math.inf if request.deadline_s is None else self._clock() + request.deadline_s
        try:
            guide = None if sampling.json_schema is None else self._guide(sampling.json_schema)
        except StructureError as error:
            self._events.append(Event(request.id, finish_reason="error", error=str(error)))
            return
        self._live[request.id] = _Live(
            sequence,
            TextStream(self._text.decoder(), sampling.stop),
            frozenset((*eos, *sampling.stop_token_ids)),
            deadline,
            [] if sampling.prompt_logprobs is None else [None] * (len(request.prompt_ids) - 1),
            guide,
        )
        self._arrivals += 1
        self._prompt_tokens += len(request.prompt_ids)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; an unknown or ended id is ignored."""
        if request_id in self._live:
            self._finish(self._live[request_id], "abort")

    def step(self) -> list[Event]:
        """Advance every running request by up to one token; the events since the last step."""
        self._expire()
        plan = self.scheduler.schedule()
        if plan is not None:
            plan = self._with_masks(plan)
            self._in_flight.append(self._run(plan))
        for part, pending in self._next_ready(idle=plan is None):
            self._collect(part, pending.wait())
        return self._take_events()

    def _guide(self, schema: str) -> Guide:
        """A guide for a new sequence. Raises StructureError."""
        if self._structures is None:
            document = getattr(self._text, "document_json", None)
            if document is None:
                raise StructureError("Without a tokenizer no answer can follow a schema.")
            self._structures = Structures(document, self.runner.vocab_size, self._eos)
        return self._structures.guide(schema, [])

    def _with_masks(self, plan: StepPlan) -> StepPlan:
        """The plan with the tokens that guided sequences may draw. One whose schema asks too much ends with an error."""
        segments = list(plan.segments)
        for place, sequence in enumerate(plan.sequences):
            live = self._live.get(sequence.request.id)
            if live is None or live.guide is None or not segments[place].samples:
                continue
            try:
                mask = base64.b64encode(live.guide.mask()).decode()
            except StructureError as error:
                self._finish(live, "error", str(error))
                continue
            segments[place] = replace(segments[place], allowed=mask)
        return replace(plan, segments=tuple(segments))

    def close(self) -> None:
        """Give the runner's memory and processes back."""
        self._in_flight.clear()
        self.runner.close()

    def stats(self) -> Stats:
        self._forget_old_counts()
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            blocks_total=self.blocks.total,
            blocks_free=self.blocks.free,
            prompt_tokens_total=self._prompt_tokens,
            generated_tokens_total=self._generated_tokens,
            preemptions_total=self.scheduler.preemptions,
            tokens_per_s=sum(count for _, count in self._recent) / RATE_WINDOW_S,
            context_length=self.context_length,
            model=self.name,
        )

    def _problem(self, request: Request) -> str | None:
        """Why this request can never run, as a sentence for its user."""
        prompt, sampling = request.prompt_ids, request.sampling
        vocab = self.runner.vocab_size
        if not prompt:
            return "The prompt is empty: at least one token is needed."
        if not all(0 <= token < vocab for token in prompt):
            return f"The prompt holds a token id outside 0..{vocab - 1}: it belongs to another tokenizer."
        named = [*sampling.stop_token_ids, *(token for token, _ in sampling.logit_bias)]
        if not all(0 <= token < vocab for token in named):
            return f"stop_token_ids and logit_bias take ids of 0..{vocab - 1}: another id was given."
        total = len(prompt) + sampling.max_tokens
        if total > self.context_length:
            cache = self.blocks.total * self.blocks.block_size
            limit = "the KV cache" if cache == self.context_length else "the context"
            return (
                f"Prompt of {len(prompt)} tokens and max_tokens {sampling.max_tokens} make {total}, but {limit} holds "
                f"{self.context_length} tokens: shorten the prompt or ask for fewer tokens."
            )
        return None

    def _expire(self) -> None:
        now = self._clock()
        for live in [live for live in self._live.values() if live.deadline <= now]:
            self._finish(live, "timeout")

    def _run(self, plan: StepPlan) -> list[tuple[StepPlan, PendingSample]]:
        """Start a step. Where it fails it is tried in halves, so that in the end only the request at fault fails."""
        if all(sequence.finished for sequence in plan.sequences):
            return []
        try:
            pending = self.runner.run(plan)
        except SURVIVABLE as error:
            parts, is_memory = self._parts_of(plan, error), isinstance(error, torch.OutOfMemoryError)
        else:
            return [] if pending is None else [(plan, pending)]
        # Outside of `except`: the error's traceback held the activations of the step that failed.
        if is_memory:
            gc.collect()
            torch.cuda.empty_cache()
        return [started for part in parts for started in self._run(part)]

    def _parts_of(self, plan: StepPlan, error: Exception) -> tuple[StepPlan, ...]:
        """The halves of a step that failed; none where it cannot be divided, and its request has ended with an error."""
        if isinstance(error, torch.AcceleratorError):
            raise EngineDied("The device reported an error that it does not recover from.") from error
        is_memory = isinstance(error, torch.OutOfMemoryError)
        what = str(error)  # the record must not hold the error
        log.warning("a step of %d tokens in %d sequences failed: %s", plan.tokens, len(plan.sequences), what)
        parts = plan.halves() if is_memory or len(plan.sequences) > 1 else ()
        if not parts:
            log.error("a request failed", exc_info=error)
            reason = "The device is out of memory" if is_memory else f"It failed with {type(error).__name__}"
            message = f"The engine could not run this request. {reason}; the engine's log has the details."
            self._finish(self._live[plan.sequences[0].request.id], "error", message)
        return parts

    def _next_ready(self, idle: bool) -> list[tuple[StepPlan, PendingSample]]:
        """The oldest step in flight once `lookahead` younger ones are, or once there is nothing else to do."""
        if len(self._in_flight) > self.runner.lookahead or (idle and self._in_flight):
            return self._in_flight.popleft()
        return []

    def _keep_scores(self, plan: StepPlan, sampled: Sampled) -> None:
        """Take in log-probabilities of prompt tokens; a request whose are not finite ends with an error."""
        for place, scored in sampled.scores.items():
            sequence, start = plan.sequences[place], plan.segments[place].start
            live = self._live.get(sequence.request.id)
            if sequence.finished or live is None:
                continue
            if any(math.isnan(value) for value in scored.logprobs):
                self._finish(live, "error", NOT_FINITE)
                continue
            raw = self._text.token_bytes
            targets = plan.segments[place].targets
            rows = zip(targets, *scored, strict=True)
            for offset, (token, logprob, rank, ids, values) in enumerate(rows):
                top = tuple((i, raw(i), value) for i, value in zip(ids, values, strict=True))
                live.scores[start + offset] = TokenLogprob(token, raw(token), logprob, top, rank)

    def _collect(self, plan: StepPlan, sampled: Sampled) -> None:
        self._keep_scores(plan, sampled)
        drawing = (s for segment, s in zip(plan.segments, plan.sequences, strict=True) if segment.samples)
        count = 0
        for place, sequence in enumerate(drawing):
            if sequence.finished:
                continue
            live = self._live[sequence.request.id]
            count += sequence.request.sampling.max_tokens > 0
            if sampled.finite[place]:
                self._advance(live, sampled, place)
            else:
                self._finish(live, "error", NOT_FINITE)
        self._generated_tokens += count
        self._recent.append((self._clock(), count))
        self._forget_old_counts()

    def _advance(self, live: _Live, sampled: Sampled, place: int) -> None:
        """Take one token into a sequence: its text, its end if it is one, its event."""
        sequence, token = live.sequence, sampled.token_ids[place]
        sampling = sequence.request.sampling
        if sampling.max_tokens == 0:
            self._finish(live, "length")
            return
        sequence.output_ids.append(token)
        news = _News([token])
        if sampling.logprobs is not None:
            news.logprobs.append(self._logprob(sampled, place, sampling.logprobs))
        reason: FinishReason | None = None
        try:
            is_complete = live.guide is not None and live.guide.take(token)
        except StructureError as error:
            self._finish(live, "error", str(error))
            return
        if token in live.stop_ids:
            reason = "stop"
        else:
            news.text, stopped = live.text.push(token)
            if stopped or is_complete:
                reason = "stop"
            elif len(sequence.output_ids) == sampling.max_tokens:
                reason = "length"
        if reason is None:
            self._events.append(self._event(live, news))
        else:
            self._finish(live, reason, news=news)

    def _finish(
        self, live: _Live, reason: FinishReason, error: str | None = None, news: _News | None = None
    ) -> None:
        """End a request and free its blocks. Text held back is given out, unless it was cut off on purpose."""
        news = news or _News()
        if reason in ("stop", "length", "timeout"):
            text, stopped = live.text.flush()
            news.text += text
            reason = "stop" if stopped else reason
        self.scheduler.finish(live.sequence)
        del self._live[live.sequence.request.id]
        self._events.append(self._event(live, news, reason, error))

    def _event(
        self, live: _Live, news: _News, reason: FinishReason | None = None, error: str | None = None
    ) -> Event:
        request = live.sequence.request
        return Event(
            request.id,
            tuple(news.token_ids),
            news.text,
            tuple(news.logprobs),
            reason,
            error,
            len(request.prompt_ids),
            len(live.sequence.output_ids),
            live.take_scores(),
        )

    def _logprob(self, sampled: Sampled, place: int, count: int) -> TokenLogprob:
        assert sampled.logprobs is not None
        top: Iterable[tuple[int, float]] = ()
        if count and sampled.top_ids is not None and sampled.top_logprobs is not None:
            top = zip(sampled.top_ids[place][:count], sampled.top_logprobs[place][:count], strict=True)
        token, raw = sampled.token_ids[place], self._text.token_bytes
        return TokenLogprob(
            token, raw(token), sampled.logprobs[place], tuple((i, raw(i), value) for i, value in top)
        )

    def _forget_old_counts(self) -> None:
        oldest = self._clock() - RATE_WINDOW_S
        while self._recent and self._recent[0][0] < oldest:
            self._recent.popleft()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
