"""Continuous batching: which tokens of which sequences run in the next step. Owns blocks and rows; knows no model, no tensor.

A step holds one token of every sequence that decodes, then chunks of prompts up to `max_step_tokens`. Order is by arrival among
the sequences of one client: its head is never passed by, and where blocks run out the youngest sequence gives its blocks back and
is computed again later (preemption by recompute), so the oldest always advances and the wait of every request is bounded.

Between clients, the one with the fewest running sequences is served next, and blocks are taken from the one with the most. Where
all places or blocks are taken, a client with at least two fewer than another gets one of the other's. With one client, all of
this is the order of arrival.
"""

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from engine.api import Request, SamplingParams

# Under load newcomers are let in together, so that most steps are pure decode steps, which a CUDA graph runs at once, and prompts make
# steps long enough to keep the device busy while the host launches their kernels one by one: with n sequences running, at most
# every n / 8 steps and at least every 16. Below 16 sequences nobody waits for this.
ADMISSION_STEPS, ADMISSION_SHARE = 16, 8


class BlockManager:
    """The free list of KV cache blocks: `total` blocks of `block_size` tokens."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self._free), "the scheduler asked for more blocks than are free"
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken[::-1]

    def release(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))
        blocks.clear()


@dataclass(eq=False)
class Sequence:
    """A request on its way. `length` counts every token, also those sampled but not yet seen by the host."""

    request: Request
    arrival: int
    seed: int
    output_ids: list[int] = field(default_factory=list)  # tokens that the host has seen
    blocks: list[int] = field(default_factory=list)
    row: int = -1  # place in the device's per-sequence state; -1: not running
    computed: int = (
        0  # tokens whose keys and values are in the cache, or will be when the steps in flight end
    )
    sampled: int = 0  # output tokens drawn or in flight
    last_on_device: bool = False  # the newest token lies in the device's state, the host may not know it yet
    finished: bool = False

    @property
    def is_guided(self) -> bool:
        """Whether its text must follow a schema."""
        return self.request.sampling.json_schema is not None

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + self.sampled

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start..stop, all of which the host must have seen."""
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return list(prompt[start:stop])
        return [*prompt[start:], *self.output_ids[max(0, start - len(prompt)) : stop - len(prompt)]]


@dataclass(frozen=True)
class Segment:
    """One sequence's share of a step, in plain numbers, so that it can be sent to the ranks of a tensor-parallel group.

    `token_ids` is empty where the one token is the last one sampled, which the device keeps in `row`. `targets` are the tokens of
    the prompt that follow the first ones of this share, where their log-probabilities are wanted; else empty.
    """

    row: int
    start: int  # position of the first token
    length: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: bool  # a token is drawn after the last one
    targets: tuple[int, ...] = ()
    allowed: str | None = None  # bits of the tokens that may be drawn, in base64; None: all


@dataclass(frozen=True)
class Join:
    """A sequence that takes a row in this step: what the sampler must know of it from here on."""

    row: int
    sampling: SamplingParams
    seed: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]  # not empty after a preemption


@dataclass(frozen=True)
class StepPlan:
    """The work of one step. Decoding segments come first; `sequences` runs parallel to `segments`."""

    segments: tuple[Segment, ...]
    joins: tuple[Join, ...]
    sequences: tuple[Sequence, ...]

    @property
    def tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @property
    def is_decode(self) -> bool:
        """Every segment is one token that lies on the device: a CUDA graph can run it."""
        return all(not segment.token_ids for segment in self.segments)

    def halves(self) -> "tuple[StepPlan, ...]":
        """The same work in two steps, or () where it is one token of one sequence."""
        if len(self.segments) > 1:
            middle = len(self.segments) // 2
            return self._part(0, middle), self._part(middle, len(self.segments))
        segment = self.segments[0]
        if segment.length == 1:
            return ()
        middle = segment.length // 2
        first = replace(
            segment,
            length=middle,
            token_ids=segment.token_ids[:middle],
            samples=False,
            targets=segment.targets[:middle],
        )
        rest = replace(
            segment,
            start=segment.start + middle,
            length=segment.length - middle,
            token_ids=segment.token_ids[middle:],
            targets=segment.targets[middle:],
        )
        return StepPlan((first,), self.joins, self.sequences), StepPlan((rest,), (), self.sequences)

    def _part(self, begin: int, end: int) -> "StepPlan":
        rows = {segment.row for segment in self.segments[begin:end]}
        joins = tuple(join for join in self.joins if join.row in rows)
        return StepPlan(self.segments[begin:end], joins, self.sequences[begin:end])


class Scheduler:
    """Queue, running sequences, rows and blocks. Single-threaded; every change happens in these methods."""

    def __init__(self, blocks: BlockManager, max_batch: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self.preemptions = 0
        self._free_rows = list(range(max_batch - 1, -1, -1))
        self._steps_since_admission = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None where nothing can run (nothing waits either, or the step in flight must end first)."""
        work: list[tuple[Sequence, int]] = []
        self._plan_decodes(work)
        budget = self.max_step_tokens - len(work)
        budget = self._plan_chunks(work, budget)
        joins = self._admit(work, budget)
        if not work:
            return None
        return StepPlan(
            tuple(self._segment(sequence, count) for sequence, count in work),
            tuple(joins),
            tuple(sequence for sequence, _ in work),
        )

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands, and free what it holds."""
        if sequence.finished:
            return
        sequence.finished = True
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _plan_decodes(self, work: list[tuple[Sequence, int]]) -> None:
        for sequence in list(self.running):
            if sequence.row < 0 or not sequence.last_on_device or self._is_done(sequence):
                continue
            if sequence.is_guided and sequence.sampled > len(sequence.output_ids):
                continue  # its last token decides which may come next
            while sequence.row >= 0 and not self._grow(sequence, sequence.length):
                self._preempt(self._youngest_of_heaviest(), work)
            if sequence.row >= 0:
                work.append((sequence, 1))

    def _plan_chunks(self, work: list[tuple[Sequence, int]], budget: int) -> int:
        for sequence in self.running:
            if budget and not sequence.last_on_device:
                count = min(budget, sequence.length - sequence.computed)
                work.append((sequence, count))
                budget -= count
        return budget

    def _admit(self, work: list[tuple[Sequence, int]], budget: int) -> list[Join]:
        joined: list[tuple[Sequence, Join]] = []
        self._steps_since_admission += 1
        if self._steps_since_admission < min(ADMISSION_STEPS, len(self.running) // ADMISSION_SHARE):
            return []
        while budget and self.waiting:
            sequence = self._next()
            if sequence.length != len(sequence.request.prompt_ids) + len(sequence.output_ids):
                break  # preempted with a token in flight: its value arrives with the step that runs now
            if not self._free_rows and not self._make_room(sequence, work):
                break
            needed = self.blocks.blocks_for(sequence.length)
            # Each running sequence may need a block soon; without that margin the newcomer would be thrown out at once.
            margin = min(len(self.running), self.blocks.total // 16)
            if needed + margin > self.blocks.free:
                if self._make_room(sequence, work):
                    continue
                break
            self.waiting.remove(sequence)
            sequence.row = self._free_rows.pop()
            sequence.blocks = self.blocks.allocate(needed)
            self._insert(sequence)
            request = sequence.request
            output = tuple(sequence.output_ids)
            join = Join(sequence.row, request.sampling, sequence.seed, request.prompt_ids, output)
            joined.append((sequence, join))
            count = min(budget, sequence.length - sequence.computed)
            work.append((sequence, count))
            budget -= count
            self._steps_since_admission = 0
        # A newcomer of this step may have given its place to another one already.
        return [join for sequence, join in joined if sequence.row == join.row]

    def _next(self) -> Sequence:
        """The waiting sequence that is served next: of the client with the fewest running, the one that came first."""
        first = self.waiting[0]
        if all(s.request.client == first.request.client for s in self.waiting):
            return first
        running = Counter(s.request.client for s in self.running)
        return min(self.waiting, key=lambda s: (running[s.request.client], s.arrival))

    def _youngest_of_heaviest(self) -> Sequence:
        """Of the client with the most running sequences, the one that came last; among equal clients, the last of all."""
        running = Counter(s.request.client for s in self.running)
        return max(self.running, key=lambda s: (running[s.request.client], s.arrival))

    def _make_room(self, newcomer: Sequence, work: list[tuple[Sequence, int]]) -> bool:
        """Take the place of a sequence whose client has at least two more running than the newcomer's. False where none has."""
        if not self.running:
            return False
        running = Counter(s.request.client for s in self.running)
        victim = self._youngest_of_heaviest()
        if running[victim.request.client] < running[newcomer.request.client] + 2:
            return False
        self._preempt(victim, work)
        return True

    def _segment(self, sequence: Sequence, count: int) -> Segment:
        start = sequence.computed
        token_ids = () if sequence.last_on_device else tuple(sequence.tokens(start, start + count))
        sequence.computed += count
        samples = sequence.computed == sequence.length
        used = self.blocks.blocks_for(sequence.computed)
        targets: tuple[int, ...] = ()
        request = sequence.request
        if request.sampling.prompt_logprobs is not None and not sequence.output_ids:
            targets = request.prompt_ids[start + 1 : sequence.computed + 1]
        if samples:
            sequence.sampled += 1
            sequence.last_on_device = True
        return Segment(sequence.row, start, count, token_ids, tuple(sequence.blocks[:used]), samples, targets)

    def _is_done(self, sequence: Sequence) -> bool:
        """All tokens that may be drawn are drawn or in flight; only their values are missing."""
        return sequence.sampled >= sequence.request.sampling.max_tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for `tokens` tokens; False where none is free."""
        missing = self.blocks.blocks_for(tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        if missing > self.blocks.free:
            return False
        sequence.blocks.extend(self.blocks.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence, work: list[tuple[Sequence, int]]) -> None:
        work[:] = [item for item in work if item[0] is not sequence]
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.last_on_device = False
        self.preemptions += 1
        place = next((i for i, other in enumerate(self.waiting) if other.arrival > sequence.arrival), None)
        self.waiting.insert(len(self.waiting) if place is None else place, sequence)

    def _insert(self, sequence: Sequence) -> None:
        place = len(self.running)
        while place and self.running[place - 1].arrival > sequence.arrival:
            place -= 1
        self.running.insert(place, sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.row = -1
