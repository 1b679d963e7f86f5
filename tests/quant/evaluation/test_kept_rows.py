"""A table that is interrupted keeps its finished rows; the same command goes on behind them and ends with the same table."""

import json
import os
import signal
from pathlib import Path

from tiny_runs import Forked, run, write_runnable, write_text

from quant.evaluation.table import Row, row_of


def test_K132_an_interrupted_table_goes_on_behind_its_rows(tmp_path: Path) -> None:
    model, words = write_runnable(tmp_path / "m"), write_text(tmp_path / "t.txt")
    options = ["--methods", "fp16,rtn,gptq", "--bits", "4", "--group-size", "32", "--device", "cpu", "--json"]
    options += [
        "--text",
        words,
        "--calib-data",
        words,
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--eval-seqlen",
        "32",
    ]
    options += ["--windows", "4", "--kl-windows", "2"]

    def use(cache: str) -> None:
        os.environ["TMQ_CACHE"] = str(tmp_path / cache)

    whole = run("evaluate", "table", model, *options, prepare=lambda: use("other"))
    assert whole.returncode == 0, whole.stderr
    begun = Forked("evaluate", "table", model, *options, prepare=lambda: use("cache"))
    begun.until("rtn int4 g32: ppl")
    os.kill(begun.pid, signal.SIGINT)
    begun.wait()
    if begun.returncode != 0:  # it may have been faster than the signal
        assert begun.returncode == 5 and "goes on behind the rows" in begun.stderr
        assert len(list((tmp_path / "cache" / "rows").iterdir())) >= 1
    again = run("evaluate", "table", model, *options, prepare=lambda: use("cache"))
    assert again.returncode == 0
    assert begun.returncode == 0 or (
        "rtn int4 g32: ppl" in again.stderr and "from an earlier start" in again.stderr
    )
    assert not list((tmp_path / "cache" / "rows").iterdir())

    def figures(text: str) -> list[dict]:
        rows = json.loads(text)["rows"]
        return [{k: v for k, v in row.items() if k not in ("seconds", "peak_gib")} for row in rows]

    assert figures(again.stdout) == figures(whole.stdout)


def test_K132_a_kept_row_of_another_shape_is_made_again() -> None:
    row = Row("m", "t", 1, "rtn", 4, 32, 16, None, False, 0, 2.0, (0.1, 0.2), None, None, 0, 1.0, 0.5)
    fields = json.loads(json.dumps(row.to_json()))
    assert row_of(fields) == row
    assert row_of(fields | {"more": 1}) is None
