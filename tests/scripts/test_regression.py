"""The check of the regression table can fail: a worse figure, a missing row, a changed float model."""

import json
from pathlib import Path

import pytest
import regression
import torch
from tiny_runs import write_runnable, write_text

from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import load_tokenizer
from quant.config import QuantConfig
from quant.evaluation.perplexity import EvalProtocol
from quant.evaluation.table import TableRequest

RUNS = (
    {"demo: fp16": 29.0, "demo: rtn": 36.0, "demo: fast": 33.0},
    {"demo: fp16": 29.0, "demo: rtn": 36.0, "demo: fast": 33.4},
    {"demo: fp16": 29.0, "demo: rtn": 36.0, "demo: fast": 32.9},
)


def test_tolerance_is_three_times_the_spread_and_never_nothing():
    rows = {row["row"]: row for row in regression.record_rows(RUNS)}
    assert rows["demo: fast"]["tolerance"] == pytest.approx(3 * (33.4 - 32.9))
    assert rows["demo: rtn"]["tolerance"] == pytest.approx(36.0 * regression.FLOOR)


def test_the_check_passes_what_is_on_record_and_fails_what_is_worse():
    rows = regression.record_rows(RUNS)
    assert regression.compare(RUNS[0], rows) == []
    better = RUNS[0] | {"demo: fast": 30.0}
    assert regression.compare(better, rows) == []
    worse = RUNS[0] | {"demo: fast": 33.0 + 3 * 0.5 + 0.01}
    assert regression.compare(worse, rows) == ["demo: fast: 34.51, on record 33, at most 34.5 allowed."]
    for name in ("demo: rtn", "demo: fp16"):
        assert len(regression.compare(RUNS[0] | {name: RUNS[0][name] * 1.01}, rows)) == 1
    for broken in (float("nan"), float("inf")):
        assert len(regression.compare(RUNS[0] | {"demo: fast": broken}, rows)) == 1


def test_missing_new_and_too_good_rows_are_faults():
    rows = regression.record_rows(RUNS)
    found = dict(RUNS[0])
    del found["demo: fast"]
    assert "was not computed" in regression.compare(found, rows)[0]
    assert "not on record" in regression.compare(RUNS[0] | {"demo: new": 1.0}, rows)[0]
    assert "has changed" in regression.compare(RUNS[0] | {"demo: fp16": 20.0}, rows)[0]


def test_a_method_that_is_broken_is_noticed(tmp_path, monkeypatch, one_thread):
    """The real computation, on a tiny model: with the search's result spoilt, the check fails."""
    ckpt = open_checkpoint(write_runnable(tmp_path / "model"))
    tokenizer = load_tokenizer(ckpt.tokenizer_dir)
    text = write_text(tmp_path / "text.txt")
    base = QuantConfig(group_size=32, samples=4, seqlen=32)
    request = TableRequest(base, ("fast",), (4,), (32,), protocol=EvalProtocol(128, 4, 4))
    monkeypatch.setattr(regression, "parts", lambda seed: (request,))
    monkeypatch.setattr(regression, "SMALL_BLOCKS", 2)
    rows = regression.record_rows([regression.compute(ckpt, tokenizer, text, 0, lambda line: None)])
    assert regression.compare(regression.compute(ckpt, tokenizer, text, 0, lambda line: None), rows) == []

    from kernels.int4 import Quantized

    real = Quantized.dequantize
    monkeypatch.setattr(Quantized, "dequantize", lambda self, dtype=torch.float32: real(self, dtype) * 1.3)
    faults = regression.compare(regression.compute(ckpt, tokenizer, text, 0, lambda line: None), rows)
    assert any("small: fast" in fault for fault in faults)


def test_the_committed_record_is_whole():
    path = Path(regression.__file__).resolve().parents[1] / "benchmarks" / "regression.json"
    if not path.is_file():
        pytest.skip("benchmarks/regression.json is not recorded yet")
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    wanted = {f"demo: {name}" for name in ("fp16", "rtn", "fast", "default", "workspace", "workspace kv8")}
    wanted |= {f"small: {method} int{bits} g64" for method in ("rtn", "fast", "default") for bits in (4, 3)}
    wanted |= {f"small: {method} int4 g64" for method in ("gptq", "gptq-r", "awq", "best")}
    wanted |= {
        f"small: {name} kv8 {mode}" for name, mode in (("fp16", "dynamic"), ("rtn int4 g64", "static"))
    }
    assert wanted <= set(rows)
    for row in rows.values():
        assert row["tolerance"] >= 3 * row["spread"] * 0.999 and row["tolerance"] > 0
    for prefix, suffix in (("demo: ", ""), ("small: ", " int4 g64"), ("small: ", " int3 g64")):
        values = [rows[f"{prefix}{method}{suffix}"]["value"] for method in ("default", "fast", "rtn")]
        assert values == sorted(values)


def test_the_demo_gives_its_rows_by_name():
    path = Path(regression.__file__).resolve().parents[1] / "benchmarks" / "demo.json"
    document = json.loads(path.read_text())
    figures = regression.demo_figures(document)
    names = ["fp16", "rtn", "fast", "default", "workspace", "workspace kv8"]
    assert list(figures) == [f"demo: {name}" for name in names]
    assert list(figures.values()) == [row["ppl"] for row in document["perplexity"]]
