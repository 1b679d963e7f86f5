"""Bodies of answers from events, without a server."""

import json
import math

from engine.api import TokenLogprob
from serve.http.generation.answers import chat_logprobs
from serve.http.generation.scores import text_logprobs


def test_a_probability_of_zero_stays_json() -> None:
    """A token that the model rules out (a log-probability of minus infinity) must not become JavaScript's -Infinity."""
    token = TokenLogprob(1, "é".encode(), -math.inf, ((1, "é".encode(), -math.inf), (2, b"b", 0.0)))
    chat, text = chat_logprobs([token]), text_logprobs([token])
    json.dumps([chat, text], allow_nan=False)
    entry = chat["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == text["token_logprobs"][0] == -9999.0
    assert entry["bytes"] == list("é".encode()) and entry["top_logprobs"][1]["logprob"] == 0.0


def test_offsets_go_on_from_the_text_before() -> None:
    tokens = [TokenLogprob(i, text.encode(), -1.0, ()) for i, text in enumerate(["你", "好 ", "b"])]
    assert text_logprobs(tokens)["text_offset"] == [0, 1, 3]
    assert text_logprobs(tokens, 4)["text_offset"] == [4, 5, 7]
