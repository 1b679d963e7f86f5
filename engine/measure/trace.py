"""Traces of requests for dynamic measurements: when each arrives, how long its prompt is and how much it writes. No text.

A generated trace has the lengths of chat logs: log-normal, with a long tail, as published logs of conversations show
(medians of some 150 tokens a side). Arrivals are a Poisson process of one request a second; a measurement divides the times by its rate.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from convert.errors import InputError

PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_RANGE = 160, 1.1, (4, 2048)
OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_RANGE = 170, 0.9, (4, 1024)


@dataclass(frozen=True)
class TraceEntry:
    """One request. arrival_s at a rate of one request a second."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int


def generate_trace(count: int, seed: int = 0) -> list[TraceEntry]:
    """`count` requests; the same seed gives the same trace on every machine."""
    rng = random.Random(seed)
    entries, now = [], 0.0
    for _ in range(count):
        now += rng.expovariate(1.0)
        prompt = _length(rng, PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_RANGE)
        output = _length(rng, OUTPUT_MEDIAN, OUTPUT_SIGMA, OUTPUT_RANGE)
        entries.append(TraceEntry(round(now, 6), prompt, output))
    return entries


def _length(rng: random.Random, median: int, sigma: float, limits: tuple[int, int]) -> int:
    drawn = round(rng.lognormvariate(math.log(median), sigma))
    return max(limits[0], min(limits[1], drawn))


def trace_text(entries: Sequence[TraceEntry]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)


def read_trace(path: Path) -> list[TraceEntry]:
    """The trace in a file of JSON lines, by arrival. Raises InputError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a trace: {error}.") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
            entry = TraceEntry(float(raw["arrival_s"]), int(raw["prompt_tokens"]), int(raw["output_tokens"]))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}: expected an object with arrival_s, prompt_tokens and output_tokens."
            ) from error
        if entry.prompt_tokens < 1 or entry.output_tokens < 1 or not 0 <= entry.arrival_s < math.inf:
            raise InputError(f"{path}, line {number}: lengths must be at least 1 and arrival_s at least 0.")
        entries.append(entry)
    if not entries:
        raise InputError(f"{path} holds no requests: expected one JSON object a line.")
    return sorted(entries, key=lambda entry: entry.arrival_s)
