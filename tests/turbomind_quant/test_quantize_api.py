"""The library on a tiny model: the same bytes and results as the commands, progress to a callback, errors of ours."""

import json
from pathlib import Path

import pytest
from tiny_runs import FAST, LAYERS, files_of, run, write_runnable, write_text

import turbomind_quant as tmq

SMALL = {"group_size": 32, "samples": 4, "seqlen": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    write_runnable(folder / "model")
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def events() -> list[tmq.ProgressEvent]:
    return []


@pytest.fixture(scope="module")
def made(place: Path, events: list[tmq.ProgressEvent], one_thread: None) -> tmq.QuantizeResult:
    return tmq.quantize(
        place / "model",
        place / "made",
        calib_data=place / "text.txt",
        kv_bits=8,
        progress=events.append,
        **SMALL,
    )


def test_the_command_writes_the_same_bytes(place: Path, made: tmq.QuantizeResult) -> None:
    done = run("quantize", "awq", place / "model", "-o", place / "command", "--calib-data", place / "text.txt", *FAST, "--kv-bits", 8, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of(place / "command") == files_of(place / "made")
    told, ours = json.loads(done.stdout), json.loads(json.dumps(made.to_json()))
    differing = {name for name in told if told[name] != ours[name]}
    assert differing <= {"path", "seconds"} and set(told) == set(ours)


def test_the_result_is_what_the_manifest_says(made: tmq.QuantizeResult) -> None:
    manifest = json.loads((made.path / "tmq" / "manifest.json").read_text())
    assert list(made.layers) == manifest["layers"] and list(made.warnings) == manifest["warnings"]
    assert (made.preset, made.bits, made.group_size, made.first_layer) == ("default", 4, 32, 0)
    assert made.size_bytes == sum(path.stat().st_size for path in made.path.glob("*.safetensors"))
    assert made.key_factors is not None and len(made.key_factors) == LAYERS


def test_progress_counts_every_layer(made: tmq.QuantizeResult, events: list[tmq.ProgressEvent]) -> None:
    layers = [event for event in events if event.kind == "layer"]
    assert [(event.done, event.total) for event in layers] == [(i + 1, LAYERS) for i in range(LAYERS)]
    assert {event.stage for event in layers} == {"awq default"}
    assert any(event.kind == "note" and event.text.startswith("memory: about") for event in events)


def test_silent_without_a_listener(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tmq.quantize(place / "model", place / "rtn", preset="rtn", group_size=32, device="cpu")
    tmq.perplexity(place / "model", place / "rtn", seqlen=64, windows=2, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_an_estimate_writes_nothing_and_is_the_plan_of_the_run(
    place: Path, made: tmq.QuantizeResult, events: list[tmq.ProgressEvent]
) -> None:
    found = tmq.estimate(place / "model", place / "later", calib_data=place / "text.txt", kv_bits=8, **SMALL)
    assert found.output_state == "absent" and not (place / "later").exists()
    said = [event.text for event in events if event.kind == "note"]
    assert all(line in said for line in found.plan.lines())
    assert tmq.estimate(place / "model", made.path, **SMALL).output_state == "finished"
    statistics = tmq.estimate(place / "model", command="calibrate", samples=4, seqlen=32, device="cpu")
    assert statistics.plan.command == "calibrate" and statistics.output is None


def test_statistics_serve_a_search(place: Path) -> None:
    text = {"calib_data": place / "text.txt", "samples": 4, "seqlen": 32}
    kept = tmq.calibrate(place / "model", place / "stats", device="cpu", **text)
    assert kept.num_layers == LAYERS and kept.calibration["samples"] == 4
    assert tmq.verify(kept.path).kind == "statistics"
    searched = tmq.quantize(
        place / "model", place / "fast", preset="fast", stats=kept.path, group_size=32, device="cpu"
    )
    assert searched.preset == "fast"
    with pytest.raises(tmq.UsageError, match="--stats goes with --preset fast"):
        tmq.quantize(place / "model", place / "x", stats=kept.path, device="cpu")


def test_formats(place: Path, made: tmq.QuantizeResult) -> None:
    wide = tmq.quantize(place / "model", place / "wide", preset="rtn", pad=True, group_size=128, device="cpu")
    plan = tmq.estimate_pack(wide.path, place / "ws")
    assert plan.output_state == "absent" and plan.weight_type == "int4"
    packed = tmq.pack(wide.path, place / "ws")
    assert packed.weight_bytes == pytest.approx(plan.output_bytes, rel=0.1)
    assert tmq.verify(place / "ws", source=wide.path).passed
    back = tmq.unpack(place / "ws", place / "back")
    assert (
        back.kind == "awq" and tmq.inspect(back.out).bits_per_weight == tmq.inspect(wide.path).bits_per_weight
    )
    with pytest.raises(tmq.InputError, match="nothing to unpack"):
        tmq.unpack(made.path, place / "never")


def test_a_changed_byte_is_a_failed_check(place: Path) -> None:
    made = tmq.quantize(place / "model", place / "torn", preset="rtn", group_size=32, device="cpu")
    shard = sorted(made.path.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    report = tmq.verify(made.path)
    assert not report.passed and isinstance(report.checks, tuple)


def test_perplexity_and_page(place: Path, made: tmq.QuantizeResult) -> None:
    report = tmq.perplexity(place / "model", made.path, seqlen=64, windows=3, kl_windows=2, device="cpu")
    first, second = report.rows
    assert first.against is None and second.against is not None and len(second.result.kl_windows) == 2
    assert second.against.difference == pytest.approx(second.result.ppl - first.result.ppl, rel=1e-6)
    (place / "ppl.json").write_text(json.dumps(report.to_json()))
    pytest.importorskip("jinja2")
    page = tmq.report(place / "ppl.json", made.path, output=place / "report.html")
    assert f"{second.result.ppl:.3f}" in page.read_text()


def test_a_table(place: Path) -> None:
    found = tmq.table(
        place / "model",
        methods=["fp16", "rtn"],
        bits=[4],
        group_size=[32],
        kv_bits=["16", "8"],
        seqlen=32,
        eval_seqlen=64,
        windows=2,
        device="cpu",
        output=place / "table.json",
    )
    assert [(row.method, row.kv_bits) for row in found.rows] == [("fp16", 16), ("fp16", 8), ("rtn", 16), ("rtn", 8)]  # fmt: skip
    assert json.loads((place / "table.json").read_text())["rows"] == json.loads(
        json.dumps(found.to_json()["rows"])
    )


def test_throughput(made: tmq.QuantizeResult) -> None:
    found = tmq.throughput(made.path, batch=[2], input_len=8, output_len=4, kv_bits=[16, 8], device="cpu")
    assert [(row.batch, row.kv) for row in found.rows] == [(2, "fp32"), (2, "int8")]


WRONG = {
    "no model": (lambda p: tmq.quantize(p / "none", p / "x"), tmq.InputError, "does not exist"),
    "quantized": (lambda p: tmq.quantize(p / "made", p / "x"), tmq.InputError, "is quantized already"),
    "finished": (
        lambda p: tmq.quantize(p / "model", p / "made", preset="rtn", group_size=32, device="cpu"),
        tmq.InputError,
        "is finished already",
    ),
    "preset": (lambda p: tmq.quantize(p / "model", p / "x", preset="nice"), tmq.UsageError, "nice"),
    "seqlen": (
        lambda p: tmq.quantize(p / "model", p / "x", seqlen=100_000, group_size=32, device="cpu"),
        tmq.UsageError,
        "model's context",
    ),
    "dtype": (
        lambda p: tmq.quantize(p / "model", p / "x", dtype="half", device="cpu"),  # type: ignore[arg-type]
        tmq.UsageError,
        "expected one of auto",
    ),
    "idle text": (
        lambda p: tmq.quantize(p / "model", p / "x", preset="rtn", calib_data="t.txt"),
        tmq.UsageError,
        "--calib-data would do nothing",
    ),
    "estimate": (
        lambda p: tmq.estimate(p / "model", command="calibrate", bits=3, device="cpu"),
        tmq.UsageError,
        "calibrate only reads text",
    ),
    "tp": (lambda p: tmq.pack(p / "made", p / "x", tp=0), tmq.UsageError, "--tp 0: expected at least 1"),
    "dialect": (
        lambda p: tmq.pack(p / "made", p / "x", dialect="0.7"),  # type: ignore[arg-type]
        tmq.UsageError,
        "--dialect '0.7'",
    ),
    "no path": (lambda p: tmq.perplexity(), tmq.UsageError, "give the path of a model"),
    "kv mode": (
        lambda p: tmq.perplexity(p / "model", kv_bits=8, kv_mode="fixed"),  # type: ignore[arg-type]
        tmq.UsageError,
        "--kv-mode 'fixed'",
    ),
    "kv bits": (lambda p: tmq.perplexity(p / "model", kv_bits=5), tmq.UsageError, "--kv-bits 5"),
    "windows": (lambda p: tmq.perplexity(p / "model", windows=0), tmq.UsageError, "--windows 0"),
    "methods": (lambda p: tmq.table(p / "model", methods=["magic"]), tmq.UsageError, "--methods 'magic'"),
    "batch": (lambda p: tmq.throughput(p / "made", batch=[0]), tmq.UsageError, "--batch '0'"),
    "rate": (lambda p: tmq.throughput(p / "made", rate=0.0), tmq.UsageError, "--rate 0.0"),
    "second path": (
        lambda p: tmq.perplexity(p / "model", p / "nothere", seqlen=64),
        tmq.InputError,
        "nothere does not exist",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_errors_of_ours(case: str, place: Path, made: tmq.QuantizeResult) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call(place)
    assert not (place / "x").exists()
