"""The regression table: figures on record, recomputed and compared, so that a method that gets worse is noticed.

Two parts. `demo`: perplexity of the demo model on the built-in sample. `head`: the demo model cut after its first blocks and
judged by its KL divergence from itself in float, for presets whose search needs many forward passes. Tolerances are three times
the spread over seeds and thread counts, and at least FLOOR of the figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calib_data.sources import TextRequest, load_blocks
from convert.checkpoint import BlockWeights, Checkpoint
from convert.tokenizer import Tokenizer
from quant.config import QuantConfig
from quant.evaluation import BUILTIN, Judgement, load_eval_text, tokens_of
from quant.table import FLOAT, Row, TableRequest, evaluate_table
from quant.text import vocabulary_of

SPREADS = 3.0
FLOOR = 5e-4  # relative: another CPU's products round differently even where seeds and threads change nothing
GROUP_SIZE = 64
HEAD_BLOCKS = 3


@dataclass(frozen=True)
class Part:
    """A table of the check: `figure` is what is compared, lower is better."""

    name: str
    figure: str
    request: TableRequest
    blocks: int | None = None  # only the first ones


def parts(seed: int) -> tuple[Part, ...]:
    """What is recomputed, with the calibration samples that this seed draws."""
    base = QuantConfig(group_size=GROUP_SIZE, samples=32, seqlen=256, seed=seed, rounding_steps=20)
    how = Judgement(1024, 3, 0)
    demo = TableRequest(base, ("fp16", "rtn", "fast", "default"), group_sizes=(GROUP_SIZE,), how=how)
    cache = TableRequest(base, ("fp16",), kv=((8, "dynamic"),), how=how)
    head = TableRequest(
        replace(base, samples=8),
        ("gptq", "gptq-r", "awq", "best"),
        bits=(4,),
        group_sizes=(GROUP_SIZE,),
        kv=((16, "dynamic"), (8, "static")),
        how=Judgement(512, 4, 4),
    )
    return Part("demo", "ppl", demo), Part("demo", "ppl", cache), Part("head", "kl", head, HEAD_BLOCKS)


class FirstBlocks(Checkpoint):
    """A checkpoint cut after its first blocks."""

    def __init__(self, source: Checkpoint, count: int) -> None:
        config = replace(source.config, num_layers=count)
        super().__init__(source.path, source.kind, config, source.tokenizer_dir)
        self.source = source

    def block(self, index: int) -> BlockWeights:
        return self.source.block(index)

    def embedding(self) -> Tensor:
        return self.source.embedding()

    def final_norm(self) -> Tensor:
        return self.source.final_norm()

    def lm_head(self) -> Tensor:
        return self.source.lm_head()

    def weight_files(self) -> list[Path]:
        return self.source.weight_files()


def compute(
    ckpt: Checkpoint, tokenizer: Tokenizer, calibration: Path, seed: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Row name -> figure, on the CPU."""
    found: dict[str, float] = {}
    for part in parts(seed):
        model = ckpt if part.blocks is None else FirstBlocks(ckpt, part.blocks)
        base = part.request.base
        request = TextRequest(str(calibration), base.samples, base.seqlen, seed, allow_fewer=False)
        text = load_blocks(request, tokenizer, vocabulary_of(ckpt, tokenizer))
        tokens = tokens_of(load_eval_text(BUILTIN, None), tokenizer, model)
        rows = evaluate_table(
            model, part.name, part.request, text, tokens, torch.device("cpu"), torch.float32, say
        )
        judged = [
            row for row in rows if part.figure == "ppl" or row.method != FLOAT
        ]  # float has no KL from itself
        found |= {f"{part.name}: {row.key}": figure_of(row, part.figure) for row in judged}
    return found


def figure_of(row: Row, figure: str) -> float:
    """The figure of a row; a missing one is infinitely bad."""
    value = getattr(row, figure)
    return math.inf if value is None else float(value)


def record_rows(runs: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Rows on record from several runs of `compute`: the first run's figure, the spread of all, and the tolerance."""
    rows = []
    for name, value in runs[0].items():
        values = [run[name] for run in runs]
        spread = max(values) - min(values)
        tolerance = max(SPREADS * spread, FLOOR * abs(value))
        rows.append({"row": name, "value": value, "spread": spread, "tolerance": tolerance})
    return rows


def compare(found: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What got worse than its tolerance, or is missing, one sentence each. The float rows may not get better either."""
    faults = [
        f"{name} is not on record: run the script with --record."
        for name in found
        if name not in {r["row"] for r in rows}
    ]
    for row in rows:
        name, limit = row["row"], row["value"] + row["tolerance"]
        value = found.get(name)
        if value is None:
            faults.append(f"{name} is on record, but was not computed.")
        elif not value <= limit:
            faults.append(f"{name}: {value:.5g}, on record {row['value']:.5g}, at most {limit:.5g} allowed.")
        elif "fp16" in name and value < row["value"] - row["tolerance"]:
            faults.append(
                f"{name}: {value:.5g} is below {row['value']:.5g}: the text or the forward pass has changed."
            )
    return faults
