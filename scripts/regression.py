"""The regression table: figures on record, recomputed and compared, so that a method that gets worse is noticed.

Two parts. `demo`: the whole demo model as `scripts/demo.py` quantized and judged it, int4 and int8 KV, read from what it wrote.
`small`: a small model, the first blocks of the demo model with its head, judged by its KL divergence from itself in float: int3,
and the presets whose search needs many forward passes. KL moves by percents where a step is lost, and needs a few windows only.
Tolerances are three times the spread over seeds and thread counts, and at least FLOOR of the figure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calib_data.sources import TextRequest, load_blocks
from convert.checkpoint import Checkpoint
from convert.checkpoint_view import FirstBlocks
from convert.tokenizer.tokenizer import Tokenizer
from quant.config import QuantConfig
from quant.evaluation.perplexity import BUILTIN, EvalProtocol, load_eval_text, tokens_of
from quant.evaluation.table import TableRequest, evaluate_table
from quant.progress import Progress
from quant.recipes import FLOAT, with_settings
from quant.session import Session
from quant.text.calibration import vocabulary_of

SPREADS = 3.0
FLOOR = 5e-4  # relative: another CPU's products round differently even where seeds and threads change nothing
GROUP_SIZE = 64
SMALL_BLOCKS = 3
DEMO = "demo: "
SMALL = "small: "


def parts(seed: int) -> tuple[TableRequest, ...]:
    """The tables of the small model, with the calibration samples that this seed draws."""
    base = QuantConfig(group_size=GROUP_SIZE, samples=32, seqlen=256, seed=seed)
    protocol, groups = EvalProtocol(512, 4, 4), (GROUP_SIZE,)
    widths = TableRequest(base, ("rtn", "fast", "default"), group_sizes=groups, protocol=protocol)
    # their searches run the block again and again: less text
    short = replace(base, samples=8, seqlen=128)
    quick = with_settings("best", learning={"steps": 10})
    passes = TableRequest(
        short, ("gptq", "gptq-r", "awq", quick), bits=(4,), group_sizes=groups, protocol=protocol
    )
    every = ((16, "dynamic"), (8, "dynamic"), (8, "static"))
    caches = TableRequest(short, (FLOAT, "rtn"), bits=(4,), group_sizes=groups, kv=every, protocol=protocol)
    return widths, passes, caches


def compute(
    ckpt: Checkpoint, tokenizer: Tokenizer, calibration: Path, seed: int, say: Callable[[str], None]
) -> dict[str, float]:
    """Row name -> KL of the small model, on the CPU."""
    found: dict[str, float] = {}
    model = FirstBlocks(ckpt, SMALL_BLOCKS)
    tokens = tokens_of(load_eval_text(BUILTIN, None), tokenizer, model)
    listener = Progress("regression", lambda event: say(event.text) if event.kind == "note" else None)
    session = Session(model, torch.device("cpu"), torch.float32, listener)
    for request in parts(seed):
        base = request.base
        source = TextRequest(str(calibration), base.samples, base.seqlen, seed, allow_fewer=False)
        text = load_blocks(source, tokenizer, vocabulary_of(ckpt, tokenizer))
        rows = evaluate_table(session, "small", request, text, tokens)
        # the float model with a float cache is what the others are compared with
        judged = [row for row in rows if row.method != FLOAT or row.kv_bits != 16]
        found |= {SMALL + row.key: math.inf if row.kl is None else row.kl for row in judged}
    return found


def demo_figures(document: Mapping[str, Any]) -> dict[str, float]:
    """Row name -> perplexity, of what `scripts/demo.py` wrote."""
    found = {}
    for row in document["perplexity"]:
        name = Path(row["path"]).name
        kv = "" if row["kv_bits"] == 16 else f" kv{row['kv_bits']}"
        found[f"{DEMO}{FLOAT if name.startswith('source') else name}{kv}"] = float(row["ppl"])
    return found


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
    """What got worse than its tolerance, or is missing, one sentence each. The float model may not get better either."""
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
        elif name == DEMO + FLOAT and value < row["value"] - row["tolerance"]:
            faults.append(
                f"{name}: {value:.5g} is below {row['value']:.5g}: the text or the forward pass has changed."
            )
    return faults
