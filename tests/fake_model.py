"""A model of thirty lines with a real paged memory: what it answers depends on every token that its blocks hold."""

from engine.serving.sampled import Sampled

VOCAB = 97


def next_token(tokens):
    """The fake model: a hash of the whole history."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return state % VOCAB


class Ready:
    def __init__(self, sampled):
        self._sampled = sampled

    def wait(self):
        return self._sampled


class FakeRunner:
    """Greedy `next_token` over the tokens found in the sequence's blocks. `faults(plan)` may raise in its place."""

    vocab_size = VOCAB

    def __init__(self, num_blocks=64, block_size=4, context_length=128, lookahead=0, faults=None):
        self.num_blocks, self.block_size, self.context_length = num_blocks, block_size, context_length
        self.lookahead, self.faults = lookahead, faults
        self.memory = [None] * (num_blocks * block_size)
        self.last, self.steps, self.largest = {}, 0, 0

    def run(self, plan):
        self.steps += 1
        self.largest = max(self.largest, plan.tokens)
        if self.faults is not None:
            self.faults(plan)
        taken = [block for segment in plan.segments for block in segment.blocks]
        assert len(taken) == len(set(taken)), "two sequences share a block"
        drawn = []
        for segment in plan.segments:
            tokens = segment.token_ids or (self.last[segment.row],)
            for position, token in enumerate(tokens, segment.start):
                block = segment.blocks[position // self.block_size]
                self.memory[block * self.block_size + position % self.block_size] = token
            if segment.samples:
                size = self.block_size
                spans = (self.memory[block * size : (block + 1) * size] for block in segment.blocks)
                history = [token for span in spans for token in span][: segment.start + segment.length]
                self.last[segment.row] = next_token(history)
                drawn.append(self.last[segment.row])
        return Ready(Sampled(drawn, [True] * len(drawn))) if drawn else None

    def close(self):
        self.memory.clear()


class Letters:
    """A tokenizer whose token n is the n-th character from "!" on; token 0 ends a text."""

    def __init__(self, eos_token_ids=(0,)):
        self.eos_token_ids = eos_token_ids

    def decoder(self):
        return self

    def push(self, token_id):
        return chr(33 + token_id)

    def flush(self):
        return ""

    def token_bytes(self, token_id):
        return self.push(token_id).encode()


def alone(request, eos=(0,)):
    """What the fake model generates for a request, computed without an engine: (tokens, finish_reason)."""
    history, out, sampling = list(request.prompt_ids), [], request.sampling
    ends = {*(() if sampling.ignore_eos else eos), *sampling.stop_token_ids}
    while len(out) < sampling.max_tokens:
        out.append(next_token(history + out))
        if out[-1] in ends:
            return tuple(out), "stop"
        text = "".join(chr(33 + token) for token in out)
        if any(stop in text for stop in sampling.stop):
            return tuple(out), "stop"
    return tuple(out), "length"
