"""An engine without a model, for tests of the server: it counts, echoes or misbehaves, and knows what it still holds."""

import asyncio
from collections.abc import AsyncIterator

from engine.api import EngineDied, Event, Request, Stats, TokenLogprob

WORDS = ["Hello", ",", " world", "!", " 你", "好", " 🙂", "\n"]


class FakeEngine:
    """Answers each request with the words of WORDS, one token each; token ids follow from the prompt's length."""

    def __init__(self, delay_s: float = 0.0, slots: int = 10_000, context_length: int = 512) -> None:
        self.delay_s, self.slots, self.context_length = delay_s, asyncio.Semaphore(slots), context_length
        self.live: dict[str, Request] = {}
        self.aborted: set[str] = set()
        self.requests: list[Request] = []
        self.dead = False
        self.hangs = False
        self.hang: str | None = None  # what `trouble` says
        self.fails: set[str] = set()  # prompts of this many tokens fail
        self.generated = 0

    def submit(self, request: Request) -> str:
        self._check()
        assert request.id not in self.live, "a request id was used twice"
        self.live[request.id] = request
        self.requests.append(request)
        return request.id

    def word(self, request: Request, index: int) -> str:
        return WORDS[(len(request.prompt_ids) + index) % len(WORDS)]

    async def events(self, request_id: str) -> AsyncIterator[Event]:
        request = self.live[request_id]
        total, sampling, done = request.sampling.max_tokens, request.sampling, 0
        sent = ""
        try:
            async with self.slots:
                while True:
                    await asyncio.sleep(self.delay_s)
                    while self.hangs and not self.dead and request_id not in self.aborted:
                        await asyncio.sleep(0.01)
                    self._check()
                    reason, text, error = None, "", None
                    if request_id in self.aborted:
                        reason = "abort"
                    elif str(len(request.prompt_ids)) in self.fails:
                        reason, error = "error", "The step of this request failed."
                    else:
                        if total:
                            text = self.word(request, done)
                            done, self.generated = done + 1, self.generated + 1
                        stops = [s for s in sampling.stop if s in sent + text]
                        reason = "stop" if stops else "length" if done == total else None
                        if stops:
                            text = (sent + text).split(stops[0])[0][len(sent) :]
                        sent += text
                    logprobs = ()
                    if text and sampling.logprobs is not None:
                        top = tuple(
                            (i, WORDS[i % len(WORDS)].encode(), -1.0 - i) for i in range(sampling.logprobs)
                        )
                        logprobs = (TokenLogprob(done, text.encode(), -0.5, top),)
                    yield Event(
                        request_id, (done,) if text else (), text, logprobs, reason, error,
                        len(request.prompt_ids), done, self.scores(request) if done <= 1 else (),
                    )  # fmt: skip
                    if reason:
                        return
        finally:
            self.live.pop(request_id, None)
            self.aborted.discard(request_id)

    def scores(self, request: Request) -> tuple[TokenLogprob, ...]:
        """Token i of a prompt has the log-probability -i / 8."""
        count = request.sampling.prompt_logprobs
        if count is None:
            return ()
        raw, ids = FakeTokenizer().token_bytes, request.prompt_ids
        top = tuple((i + 65, raw(i + 65), -1.0 - i) for i in range(count))
        return tuple(TokenLogprob(token, raw(token), -i / 8, top, i) for i, token in enumerate(ids) if i)

    def abort(self, request_id: str) -> None:
        if request_id in self.live:
            self.aborted.add(request_id)

    def stats(self) -> Stats:
        self._check()
        return Stats(
            running=len(self.live), blocks_total=100, blocks_free=100 - min(100, len(self.live)),
            generated_tokens_total=self.generated, context_length=self.context_length, model="fake",
        )  # fmt: skip

    def trouble(self, silence_s: float | None = None) -> str | None:
        return self.hang

    def _check(self) -> None:
        if self.dead:
            raise EngineDied("killed by a test")


class FakeTokenizer:
    """One token per UTF-8 byte (ids 10..265); control tokens are ids 0..9 and never come from text."""

    vocab_size = 300

    def encode_plain(self, text: str, add_bos: bool | None = None) -> list[int]:
        return ([] if add_bos is False else [1]) + [10 + byte for byte in text.encode()]

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id - 10]) if token_id >= 10 else b"<%d>" % token_id

    def apply_chat_template(self, messages, add_generation_prompt=True, tools=None, variables=None):  # type: ignore[no-untyped-def]
        ids = []
        for message in messages:
            ids += [2, *(10 + b for b in (message["role"] + "\n" + message["content"]).encode()), 3]
        return [*ids, 2]
