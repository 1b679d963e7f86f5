"""Log-probabilities in the shape of completions: of generated tokens, and of a prompt that is echoed or judged."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.api import TokenLogprob
from serve.http.generation.answers import MIN_LOGPROB, token_name


@dataclass(frozen=True)
class Echo:
    """A prompt as it is repeated: its text, the name of its first token, and how many of its characters each token stands for."""

    text: str = ""
    first: str = ""
    lengths: tuple[int, ...] = ()

    @staticmethod
    def of(prompt: str | list[int], pieces: Sequence[bytes]) -> "Echo":
        """Of a prompt and the bytes of its tokens. A BOS that stands before a text is no part of it, and a token inside a
        character belongs to where that ends."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        lengths = [len(utf8.decode(piece)) for piece in pieces]
        text = b"".join(pieces).decode("utf-8", "replace")
        if isinstance(prompt, str):
            if pieces and text != prompt and text[lengths[0] :] == prompt:
                lengths[0] = 0
            text = prompt
        return Echo(text, token_name(pieces[0]), tuple(lengths))


def _named(token: TokenLogprob, count: int | None) -> dict[str, float]:
    """The alternatives by name. Of tokens with one name, as "A" and the byte 0x41, all but the chosen or first one go by their id."""
    named: dict[str, float] = {}
    own = token_name(token.raw)
    for token_id, raw, logprob in token.top[:count]:
        name = token_name(raw)
        if token_id != token.token_id and (name == own or name in named):
            name = f"token_id:{token_id}"
        named[name] = max(logprob, MIN_LOGPROB)
    return named


def text_logprobs(
    tokens: Sequence[TokenLogprob],
    offset: int = 0,
    count: int | None = None,
    echo: Echo | None = None,
    prompt: Sequence[TokenLogprob] = (),
) -> dict[str, Any]:
    """The `logprobs` object of a completion choice, with at most `count` alternatives. `offset`: characters of the text before `tokens`.

    With an `echo`, it begins with the prompt's tokens: nothing predicts the first, whose log-probability is null. A token
    inside a character has the offset of that character.
    """
    names: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    if echo is not None:
        names, values, tops = [echo.first], [None], [None]
        for length in echo.lengths:
            offsets.append(min(offset, len(echo.text)))
            offset += length
        offset = len(echo.text)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        offsets.append(offset)
        offset += len(utf8.decode(token.raw))
    for token in (*(prompt if echo is not None else ()), *tokens):
        names.append(token_name(token.raw))
        values.append(max(token.logprob, MIN_LOGPROB))
        tops.append(_named(token, count))
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def prompt_scores(prompt: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of vLLM's API: for each token of the prompt but the first, token ids with log-probability and rank."""
    out: list[dict[str, Any] | None] = [None]
    for token in prompt:
        scores = {
            str(i): {"logprob": max(value, MIN_LOGPROB), "rank": rank, "decoded_token": token_name(raw)}
            for rank, (i, raw, value) in enumerate(token.top, 1)
        }
        own = {
            "logprob": max(token.logprob, MIN_LOGPROB),
            "rank": token.rank,
            "decoded_token": token_name(token.raw),
        }
        out.append({str(token.token_id): own, **scores})
    return out
