"""The throughput benchmark's parts that can run without a GPU, on a tiny model: rows written as they come, limits, ppl, the server."""

import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from scripts import bench_throughput
from scripts.bench_throughput import Report, run_parts, run_ppl, run_served, runs_of

CPU = torch.device("cpu")


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    return Report(1e10, tmp_path)


def kept(report):
    return json.loads((report.out / "throughput.json").read_text())["runs"][-1]


def test_a_run_is_appended_to_those_before(report):
    report.note("first")
    second = Report(1e10, report.out, earlier=runs_of(report.out))
    second.note("second")
    second.note("third")
    assert [run["notes"] for run in runs_of(report.out)] == [["first"], ["second", "third"]]
    page = (report.out / "throughput.md").read_text()
    assert page.index("* third") < page.index("* first")  # the latest run first
    text = (report.out / "throughput.md").read_text()
    assert text.index("first") < text.index("third") and text.count("copy bandwidth") == 2
    Report(1e10, report.out).note("alone")
    assert len(runs_of(report.out)) == 1


def test_what_was_found_is_on_disk_at_once_and_a_long_part_is_broken_off(report, monkeypatch):
    def slow(limit):
        report.judge("a bar", 2.0, 1.0)
        assert kept(report)["must_hold"][0]["holds"]
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pytest.fail("swallowed")

    def broken(limit):
        raise RuntimeError("no")

    monkeypatch.setitem(bench_throughput.LIMITS_S, "static", 0.2)
    monkeypatch.setattr(bench_throughput, "START", time.monotonic())
    before = signal.getsignal(signal.SIGALRM)
    assert run_parts(["static", "dynamic"], {"static": slow, "dynamic": broken}, report, 60.0) == 2
    assert signal.getsignal(signal.SIGALRM) is before
    document = kept(report)
    assert len(document["must_hold"]) == 1
    assert "broken off" in document["notes"][0] and "RuntimeError: no" in document["notes"][1]
    assert "a bar" in (report.out / "throughput.md").read_text()


def test_engine_and_plain_pass_agree_on_self_written_text(report):
    run_ppl(report, "tiny", CPU, texts=3, prompt=8, length=100)
    held = kept(report)["must_hold"]
    assert len(held) == 4 and all(h["holds"] for h in held), held
    assert all(h["value"] < 1e-4 for h in held), held  # float32 on both sides


def test_a_trace_through_the_server(report, monkeypatch):
    served = run_served.__globals__
    config = replace(served["DYNAMIC"], device="cpu", max_batch=8, context_length=3072, memory_cap_bytes=None)
    monkeypatch.setitem(served, "read_trace", lambda path: served_trace(served["TraceEntry"]))
    run_served(report, 12, "int4+KV8", config, "tiny")
    rows = kept(report)["rows"]
    assert len(rows) == 3 and all(row["req_per_s"] > 0 and row["ttft_ms_p99"] > 0 for row in rows)
    assert "HTTP" in rows[1]["note"] and kept(report)["must_hold"][0]["bar"] == 0.9


def served_trace(entry):
    return [entry(0.01 * i, 5 + i, 4 + i % 3) for i in range(12)]
