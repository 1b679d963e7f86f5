"""Settings of the steps that a recipe takes: the solver, its effort, learned rounding, distillation. Data alone, without torch.

A recipe (`quant.recipes`) holds one of each; the steps themselves lie in `quant.search` and `quant.learn`.
"""

from dataclasses import dataclass
from typing import Literal


def _check_share(name: str, value: float, *, below_one: bool = False) -> None:
    """Raises ValueError for a value that is no share: 0 to 1, or less than 1."""
    if below_one and not 0 <= value < 1:
        raise ValueError(f"{name} is {value}: expected 0 or more and less than 1.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: expected a share of the way, 0 to 1.")


def _check_at_least(least: int, **values: float) -> None:
    """Raises ValueError for a value below `least`."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} is {value}: expected at least {least}.")


@dataclass(frozen=True)
class KeySmoothing:
    """Factors that make the channels of K alike before it is quantized."""

    exponent: float = 0.75  # of a RoPE pair's size in its factor: 1 makes all pairs equal, 0 leaves them
    limit: float = 16.0  # factors stay within 1 / limit .. limit

    @property
    def rule(self) -> str:
        """The formula, for fingerprints."""
        return f"(largest of a RoPE pair) ** {self.exponent:g}, within 1/{self.limit:g} .. {self.limit:g}"


KEY_SMOOTHING = KeySmoothing()


@dataclass(frozen=True)
class SolverSteps:
    """The steps that turn one stack of linears into codes, in the order in which they are taken."""

    scale: bool = False  # channel scales and clip ranges, chosen together by the Gram form
    toward_float: float = 0.0  # most of the way to the weights that best meet the float stream's outputs
    ridges: tuple[float, ...] = (0.003, 0.03, 0.3, 3.0)  # tried on that way; shares of G's mean diagonal
    compensate: Literal["none", "published", "static"] = "none"
    rounds: int = 0  # of integer descent and scale refit
    refit: bool = False  # scale refit alone

    def __post_init__(self) -> None:
        _check_share("toward_float", self.toward_float)
        _check_at_least(0, rounds=self.rounds)
        if not self.ridges or min(self.ridges) <= 0:
            raise ValueError(f"ridges are {self.ridges}: expected one or more positive numbers.")


@dataclass(frozen=True)
class Effort:
    """Sizes of the searches on one kind of device."""

    alpha_steps: int
    score_rows: int  # rows of a stack on which candidates are judged
    score_steps: int  # shrink factors while candidates are judged
    clip_steps: int  # shrink factors of the ranges that are kept
    banded: bool  # both factors of a range at most one step apart
    rounds: int  # of descent and refit, at most
    sweeps: int  # of descent in a round

    def __post_init__(self) -> None:
        _check_at_least(
            1,
            alpha_steps=self.alpha_steps,
            score_rows=self.score_rows,
            score_steps=self.score_steps,
            clip_steps=self.clip_steps,
            sweeps=self.sweeps,
        )
        _check_at_least(0, rounds=self.rounds)


@dataclass(frozen=True)
class Efforts:
    """The effort on each kind of device. A CPU judges channel scales on fewer rows and ranges; the steps are the same."""

    cpu: Effort = Effort(10, score_rows=128, score_steps=3, clip_steps=6, banded=True, rounds=1, sweeps=1)
    gpu: Effort = Effort(20, score_rows=1024, score_steps=5, clip_steps=11, banded=False, rounds=4, sweeps=2)

    def on(self, device_type: str) -> Effort:
        """The effort on a device of this type ("cpu", "cuda")."""
        return self.cpu if device_type == "cpu" else self.gpu


@dataclass(frozen=True)
class LearnedRounding:
    """How a block's codes, scales and norms are trained. Rates are totals over all steps of a linear decay.

    The rate of codes is in steps of the grid; the others are relative to the value that moves.
    """

    steps: int = 400  # of a block
    code_rate: float = 1.0
    scale_rate: float = 0.05
    norm_rate: float = 0.05
    batch_tokens: int = 4096
    checks: int = 4  # measurements of the whole loss
    toward_float: float = 0.25  # the aim: 0 what the quantized stream predicts of the float one, 1 the latter
    average: float = 0.95  # weight of the past in a running mean, kept in place of what was trained; 0: none
    warmup: float = 0.15  # share of the steps in which the rates rise
    metric_identity: float = (
        0.3  # share of the identity in the metric of errors; the rest is the Fisher matrix
    )

    def __post_init__(self) -> None:
        _check_share("toward_float", self.toward_float)
        _check_share("average", self.average, below_one=True)
        _check_share("warmup", self.warmup, below_one=True)
        _check_share("metric_identity", self.metric_identity)
        _check_at_least(1, steps=self.steps, batch_tokens=self.batch_tokens)
        _check_at_least(
            0,
            checks=self.checks,
            code_rate=self.code_rate,
            scale_rate=self.scale_rate,
            norm_rate=self.norm_rate,
        )


@dataclass(frozen=True)
class Distillation:
    """How the end-to-end pass over scales and norms goes. Rates are relative to the value that moves."""

    steps: int = 600
    scale_rate: float = 1e-3
    norm_rate: float = 1e-3
    tokens: int = 4096  # of a step
    window: int = 2048  # pieces of the samples are joined up to this length, other pieces in every step
    swap: float = 0.2  # a window has up to this share of its tokens replaced by others of the same text
    warmup: float = 0.1  # share of the steps

    def __post_init__(self) -> None:
        _check_share("swap", self.swap)
        _check_share("warmup", self.warmup, below_one=True)
        _check_at_least(1, steps=self.steps, tokens=self.tokens, window=self.window)
        _check_at_least(0, scale_rate=self.scale_rate, norm_rate=self.norm_rate)
