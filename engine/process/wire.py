"""How events cross the pipe: all events of a step in one line of JSON, each a list, since thousands pass in a second.

Bytes of tokens, which need be no text, cross as a string with one character a byte (Latin-1).
"""

import json
from collections.abc import Sequence
from typing import Any

from engine.api import Event, TokenLogprob


def encode_events(events: Sequence[Event]) -> str:
    """One line without its end: [[request id, token ids, text, logprobs, finish reason, error, prompt, completion, logprobs of the
    prompt], ...]."""
    rows = [
        [
            event.request_id,
            event.token_ids,
            event.text,
            [_packed(p) for p in event.logprobs],
            event.finish_reason,
            event.error,
            event.prompt_tokens,
            event.completion_tokens,
            [_packed(p) for p in event.prompt_logprobs],
        ]
        for event in events
    ]
    return json.dumps({"op": "events", "events": rows}, separators=(",", ":"))


def decode_events(rows: Sequence[Sequence[Any]], names: dict[str, str]) -> list[tuple[str, Event]]:
    """The inverse, from the parsed "events": (id on the pipe, event under its own id of `names`); unknown ids are left out."""
    out = []
    for row in rows:
        wire_id, token_ids, text, logprobs, reason, error, prompt, completion, scores = row
        name = names.get(str(wire_id))
        if name is not None:  # None: its reader left, the abort is on its way
            parsed, scored = (tuple(_logprob(*part) for part in parts) for parts in (logprobs, scores))
            event = Event(name, tuple(token_ids), text, parsed, reason, error, prompt, completion, scored)
            out.append((str(wire_id), event))
    return out


def _packed(p: TokenLogprob) -> list[Any]:
    top = [(i, raw.decode("latin-1"), value) for i, raw, value in p.top]
    return [p.token_id, p.raw.decode("latin-1"), p.logprob, top, p.rank]


def _logprob(
    token_id: int, raw: str, logprob: float, top: list[tuple[int, str, float]], rank: int | None
) -> TokenLogprob:
    alternatives = tuple((i, other.encode("latin-1"), value) for i, other, value in top)
    return TokenLogprob(token_id, raw.encode("latin-1"), logprob, alternatives, rank)
