"""Where two models predict the same text most differently.

T predictions of a window, V vocabulary. Of each stretch of a window the largest disagreement counts, so that one passage is not listed
again and again.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

STRETCH = 64  # predictions of which the largest disagreement counts
CONTEXT = 48  # tokens that are shown before the predicted one


@dataclass(frozen=True)
class Disagreement:
    """One predicted token. `kl`: KL(first || second) of the predictions, in nats; pairs are of the first and the second model."""

    window: int
    position: int  # of the token in its window
    before: str  # the text before it
    token: str
    kl: float
    probability: tuple[float, float]  # of the token
    likeliest: tuple[str, str]  # what either model would have written

    def to_json(self) -> dict[str, Any]:
        """The place as plain JSON data."""
        return asdict(self)


@dataclass(frozen=True, order=True)
class _Found:
    """A place before its tokens are text. Ordered by `kl`."""

    kl: float
    window: int
    position: int
    likeliest: tuple[int, int]


class DisagreementSearch:
    """A `Watch` of `engine.measure.perplexity` that keeps the `count` largest disagreements."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._best: dict[tuple[int, int], tuple[_Found, Tensor, Tensor]] = {}

    def __call__(self, window: int, rows: slice, first: Tensor, second: Tensor) -> None:
        """first, second: log-probabilities (T, V) of the predictions `rows` of a window; prediction i is of token i + 1."""
        kl = (first.exp() * (first - second)).sum(-1)  # (T,)
        for start in range(0, len(kl), STRETCH):
            part = kl[start : start + STRETCH]
            row = start + int(part.argmax())
            position = rows.start + row + 1
            likeliest = (int(first[row].argmax()), int(second[row].argmax()))
            found = _Found(float(kl[row]), window, position, likeliest)
            key = (window, (rows.start + start) // STRETCH)
            if key not in self._best or self._best[key][0] < found:
                self._best[key] = (found, first[row].clone(), second[row].clone())
        kept = heapq.nlargest(self.count, self._best.items(), key=lambda item: item[1][0])
        self._best = dict(kept)

    def places(self, windows: Tensor, decode: Callable[[Sequence[int]], str]) -> list[Disagreement]:
        """The disagreements, the largest first. windows: (W, L) the token ids that were judged."""
        out = []
        for found, first, second in sorted(self._best.values(), key=lambda item: item[0], reverse=True):
            ids = windows[found.window].tolist()
            target = ids[found.position]
            out.append(
                Disagreement(
                    window=found.window,
                    position=found.position,
                    before=decode(ids[max(0, found.position - CONTEXT) : found.position]),
                    token=decode([target]),
                    kl=found.kl,
                    probability=(float(first[target].exp()), float(second[target].exp())),
                    likeliest=(decode([found.likeliest[0]]), decode([found.likeliest[1]])),
                )
            )
        return out
