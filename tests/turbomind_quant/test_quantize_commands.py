"""The command line as a newcomer meets it: help, exit codes, dry runs, JSON, statistics, the table and the page."""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest
from tiny_runs import FAST, files_of, run, write_runnable, write_text

from quant.config import QuantConfig
from turbomind_quant.cli.commands import Commands, describe
from turbomind_quant.cli.evaluate import evaluate
from turbomind_quant.cli.quantize import quantize

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("commands")
    write_runnable(folder / "model", layers=2)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def quantized(place):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        place / "fast",
        *text(place),
        "--preset",
        "fast",
        "--kv-bits",
        8,
    )
    assert done.returncode == 0, done.stderr
    assert "next: evaluate ppl" in done.stdout
    return place / "fast"


def text(place):
    return ["--calib-data", place / "text.txt", *FAST]


def commands():
    return [
        (group.name, name, command)
        for group in (quantize, evaluate)
        for name, command in group.commands.items()
    ]


@pytest.mark.parametrize(
    ("group", "name", "command"), commands(), ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_every_help_has_an_example_and_every_flag_a_help(group, name, command):
    page = command.get_help(click.Context(command, info_name=f"{group} {name}"))
    assert "Example:" in page and f"{group} {name}" in page
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name


def test_defaults_are_those_of_the_dataclass():
    defaults = {field.name: field.default for field in fields(QuantConfig)}
    for option in quantize.commands["awq"].params:
        if option.name in defaults:
            # a flag that is not given is False, whatever click keeps as its default
            default = False if option.is_flag else option.default
            assert str(default) == str(defaults[option.name])


@pytest.mark.parametrize("command", ("quantize", "evaluate", "awq", "table", "throughput"))
def test_help_imports_nothing_heavy(command):
    """So that it comes at once."""
    group = "evaluate" if command in ("evaluate", "table", "throughput") else "quantize"
    arguments = [] if command in ("quantize", "evaluate") else [command]
    code = f"""
import sys
from turbomind_quant.cli.evaluate import evaluate
from turbomind_quant.cli.quantize import quantize
try:
    {group}.main({[*arguments, "--help"]!r})
except SystemExit as leaving:
    assert not leaving.code
print("heavy:", *({{"torch", "transformers", "datasets", "triton", "numpy", "fastapi", "gradio"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "Usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout.splitlines()[-1]


def test_help_is_quick():
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from turbomind_quant.cli.quantize import quantize; quantize()", "--help"],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.3  # of the quietest run: other processes share this machine


WRONG = {
    "usage": (["awq"], 2, "Missing argument"),
    "preset": (["awq", "MODEL", "-o", "OUT", "--preset", "nice"], 2, "'nice' is not one of"),
    "distill": (
        ["awq", "MODEL", "-o", "OUT", "--distill", "--preset", "rtn"],
        2,
        "distill needs calibration text",
    ),
    "stats-with-default": (
        ["awq", "MODEL", "-o", "OUT", "--stats", "S"],
        2,
        "--stats goes with --preset fast",
    ),
    "stats-with-distill": (
        ["awq", "MODEL", "-o", "OUT", "--stats", "S", "--preset", "fast", "--distill"],
        2,
        "--distill needs the calibration text",
    ),
    "no-model": (["awq", "nowhere/at/all", "-o", "OUT"], 3, "nowhere/at/all"),
    "group": (["awq", "MODEL", "-o", "OUT", "--group-size", "64"], 3, "down (K = 96)"),
    "device": (["awq", "MODEL", "-o", "OUT", "--device", "tpu", "--group-size", "32"], 2, "--device tpu"),
    "no-such-gpu": (
        ["awq", "MODEL", "-o", "OUT", "--device", "cuda:9", "--group-size", "32"],
        2,
        "CUDA devices",
    ),
    "output-in-source": (
        ["awq", "MODEL", "-o", "MODEL/inside", "--group-size", "32"],
        3,
        "lie one inside the other",
    ),
    "B27-seqlen": (
        ["awq", "MODEL", "-o", "OUT", "--seqlen", "300", "--group-size", "32"],
        2,
        "context is 256",
    ),
    "quantized-already": (["awq", "FAST", "-o", "OUT", "--group-size", "32"], 3, "is quantized already"),
    "A05-calibrate": (["calibrate", "FAST", "-o", "OUT"], 3, "is quantized already"),
    "B23-short-text": (
        ["awq", "MODEL", "-o", "OUT", "--group-size", "32", "--calib-data", "TEXT"],
        3,
        "--allow-fewer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_message_and_its_code(case, place, quantized, tmp_path):
    arguments, code, message = WRONG[case]
    names = {"MODEL": place / "model", "FAST": quantized, "TEXT": place / "text.txt", "OUT": tmp_path / "out"}
    arguments = [
        names.get(part, str(place / part) if part.startswith("MODEL/") else part) for part in arguments
    ]
    arguments = [str(part).replace("MODEL/inside", "model/inside") for part in arguments]
    done = run("quantize", *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_our_own_faults_are_70_and_say_so():
    code, message = describe(KeyError("x"))
    assert code == 70 and "fault of the program" in message
    assert describe(MemoryError())[0] == 4


def test_debug_shows_the_traceback(place, tmp_path):
    arguments = ["awq", place / "model", "-o", tmp_path / "out", "--group-size", 64]
    assert "Traceback" in run("quantize", *arguments, "--debug").stderr


def test_the_group_choices_are_named(place, tmp_path):
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "out")
    assert all(choice in done.stderr for choice in ("--pad", "--keep-ragged", "--group-size 32"))


def test_a_dry_run_writes_nothing_and_says_sizes(place, tmp_path):
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "out", *FAST, "--dry-run")
    assert done.returncode == 0 and "memory: about" in done.stdout and "disk:" in done.stdout
    done = run("quantize", "awq", place / "model", "-o", tmp_path / "out", *FAST, "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["output_state"] == "absent" and plan["peak_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_the_plan_tells_the_size_of_what_is_written(place, quantized):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        place / "x",
        *text(place),
        "--preset",
        "fast",
        "--dry-run",
        "--json",
    )
    planned = json.loads(done.stdout)["output_bytes"]
    written = sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    assert written == pytest.approx(planned, rel=0.15)  # headers weigh something in a model this small


def test_results_are_on_stdout_and_progress_on_stderr(place, tmp_path):
    done = run(
        "quantize", "awq", place / "model", "-o", tmp_path / "out", *text(place), "--preset", "fast", "--json"
    )
    document = json.loads(done.stdout)
    assert len(document["layers"]) == 14 and "layer 2/2" in done.stderr


def test_fast_on_saved_statistics(place, tmp_path):
    base = ["--calib-data", place / "text.txt", "--samples", 4, "--seqlen", 32, "--device", "cpu"]
    assert run("quantize", "calibrate", place / "model", "-o", tmp_path / "stats", *base).returncode == 0
    arguments = [
        "awq",
        place / "model",
        "--preset",
        "fast",
        "--group-size",
        32,
        "--stats",
        tmp_path / "stats",
        "--kv-bits",
        8,
    ]
    assert run("quantize", *arguments, "-o", tmp_path / "one").returncode == 0
    assert run("quantize", *arguments, "-o", tmp_path / "two").returncode == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    manifest = json.loads((tmp_path / "one" / "tmq" / "manifest.json").read_text())
    assert manifest["calibration"]["statistics"] and manifest["calibration"]["source"] == "text.txt"
    assert (tmp_path / "one" / "tmq" / "kv_params.safetensors").is_file()


def test_ragged_linears_stay_float_where_asked(place, tmp_path):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        tmp_path / "out",
        *text(place)[2:],
        "--group-size",
        64,
        "--keep-ragged",
        "--preset",
        "rtn",
    )
    assert done.returncode == 0, done.stderr
    assert "down stays float16" in done.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert any("down_proj" in name for name in config["quantization_config"]["modules_to_not_convert"])
    assert run("evaluate", "ppl", tmp_path / "out", "--windows", 1).returncode == 0


def test_pad_makes_any_group_fit(place, tmp_path):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        tmp_path / "out",
        "--pad",
        "--preset",
        "rtn",
        "--device",
        "cpu",
    )
    assert done.returncode == 0, done.stderr
    assert run("quantize", "verify", tmp_path / "out", "--source", place / "model").returncode == 0


@pytest.mark.parametrize("bits", [3, 2])
def test_fewer_bits_say_that_they_save_nothing(bits, place, tmp_path):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        tmp_path / "out",
        "--preset",
        "rtn",
        "--bits",
        bits,
        "--group-size",
        32,
    )
    assert done.returncode == 0 and "save nothing over int4" in done.stdout
    assert f"int{bits}" in run("quantize", "inspect", tmp_path / "out").stdout


def test_perplexity_of_several_paths(place, quantized):
    done = run("evaluate", "ppl", place / "model", quantized, "--text", place / "text.txt", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["kind"] for row in rows] == ["hf", "awq"]
    assert rows[0]["kl"] is None and rows[1]["kl"] > 0 and 0 < rows[1]["top1"] <= 1
    low, high = rows[1]["difference"]["ci95"]
    assert low <= rows[1]["ppl"] - rows[0]["ppl"] <= high
    shown = run("evaluate", "ppl", place / "model", quantized, "--text", place / "text.txt").stdout
    assert f"{rows[1]['ppl']:.3f}" in shown and "windows of 256 tokens" in shown


@pytest.mark.parametrize("kv", [("8", "dynamic"), ("8", "static"), ("4", "dynamic")])
def test_perplexity_with_a_quantized_cache(kv, place, quantized):
    arguments = ["evaluate", "ppl", quantized, "--text", place / "text.txt", "--windows", 4, "--json"]
    plain = json.loads(run(*arguments).stdout)["rows"][0]
    row = json.loads(run(*arguments, "--kv-bits", kv[0], "--kv-mode", kv[1]).stdout)["rows"][0]
    assert row["kv_bits"] == int(kv[0]) and row["kv_mode"] == kv[1]
    assert row["ppl"] != plain["ppl"] and row["ppl"] == pytest.approx(plain["ppl"], rel=0.2)


def test_static_parameters_that_are_missing(place, tmp_path):
    done = run("evaluate", "ppl", place / "model", "--kv-bits", 8, "--kv-mode", "static")
    assert done.returncode == 3 and "--kv-mode dynamic" in done.stderr


def test_table_and_page(place, quantized, tmp_path):
    out = tmp_path / "table.json"
    arguments = [
        "table",
        place / "model",
        *text(place),
        "--methods",
        "fp16,rtn,fast",
        "--bits",
        "4",
        "--kv-bits",
        "16,8:static",
    ]
    done = run("evaluate", *arguments, "--windows", 4, "--eval-seqlen", 64, "-o", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["kv_bits"]) for row in rows] == [
        ("fp16", 16),
        ("rtn", 16),
        ("rtn", 8),
        ("fast", 16),
        ("fast", 8),
    ]
    assert all(row["kl"] is not None for row in rows[1:])
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    done = run("evaluate", "report", out, quantized, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page and "http" not in page
    assert f"{rows[1]['ppl']:.3f}" in page


def test_the_page_escapes_what_it_is_given(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    rows = [{"path": "<script>alert(1)</script>", "kind": "hf", "ppl": 5.0}]
    (tmp_path / "run.json").write_text(json.dumps({"rows": rows}))
    assert run("evaluate", "report", tmp_path / "run.json", "-o", tmp_path / "page.html").returncode == 0
    assert "<script" not in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [1]}', "[" * 100_000])
def test_a_run_that_is_no_result_is_refused(content, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "run.json").write_text(content)
    done = run("evaluate", "report", tmp_path / "run.json", "-o", tmp_path / "page.html")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "give what `evaluate ... --json`" in done.stderr
    missing = run("evaluate", "report", tmp_path / "none.json", "-o", tmp_path / "page.html")
    assert missing.returncode == 3 and "none.json does not exist: give what" in missing.stderr


@pytest.mark.parametrize("command", ["table MODEL", "throughput MODEL", "report MODEL"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path):
    for place, message in (("none/out.json", "does not exist"), ("", "is a folder")):
        done = run("evaluate", *command.split(), "-o", tmp_path / place)
        assert (
            done.returncode == 2 and message in done.stderr
        )  # MODEL is no model: that was not looked at yet


def test_throughput_of_a_tiny_model(place, quantized):
    done = run(
        "evaluate",
        "throughput",
        quantized,
        "--batch",
        "1",
        "--input-len",
        8,
        "--output-len",
        4,
        "--device",
        "cpu",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["tok_per_s"] > 0


def test_throughput_of_a_trace_with_both_caches(place, quantized, tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0.1, "prompt_tokens": 6, "output_tokens": 4}\n' * 3)
    shape = quantized / "config.json"
    done = run(
        *("evaluate", "throughput", quantized, "--batch", "2", "--input-len", 8, "--output-len", 4, "--kv-bits", "16,8"),
        *("--trace", tmp_path / "trace.jsonl", "--rate", 50, "--random-weights", shape, "--weights", "fp16"),
        *("--device", "cpu", "--context-len", 64, "-o", tmp_path / "speed.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["mode"], row["kv"]) for row in document["rows"]] == 2 * [
        ("static", "fp32"),
        ("dynamic", "fp32"),
        ("static", "int8"),
        ("dynamic", "int8"),
    ]
    assert sum("(random)" in row["shape"] for row in document["rows"]) == 4
    assert document["requests"] == 3 and document["copy_bandwidth_gb_per_s"] > 0
    assert "tok/s" in done.stdout and "random numbers" in done.stdout


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch", "x"],
        ["--batch", "none"],
        ["--kv-bits", "4"],
        ["--device", "cpu", "--memory-cap", "24"],
        [],
    ],
)
def test_throughput_with_wrong_flags_is_a_usage_error(flags):
    paths = ["/m"] if flags else []
    assert run("evaluate", "throughput", *paths, *flags).returncode == 2


@pytest.mark.parametrize(("input_len", "output_len"), [(800, 4), (250, 4), (8, 300)])
def test_throughput_beyond_the_context_is_a_usage_error(input_len, output_len, place):
    lengths = ("--input-len", input_len, "--output-len", output_len)
    done = run("evaluate", "throughput", place / "model", "--batch", 1, *lengths, "--device", "cpu")
    assert done.returncode == 2 and not done.stdout.strip(), done.stdout
    assert f"--input-len {input_len}" in done.stderr and "256 tokens" in done.stderr


def test_self_written_text_is_kept_for_the_next_run(place, tmp_path):
    cache = tmp_path / "cache"

    def shared_cache():
        os.environ["TMQ_CACHE"] = str(cache)

    arguments = ["awq", place / "model", *FAST, "--preset", "fast", "-o"]
    first = run("quantize", *arguments, tmp_path / "one", prepare=shared_cache)
    second = run("quantize", *arguments, tmp_path / "two", prepare=shared_cache)
    assert "writes its own calibration text" in first.stderr and "in an earlier run" in second.stderr
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    next(cache.rglob("*.safetensors")).write_bytes(b"torn")
    third = run("quantize", *arguments, tmp_path / "three", prepare=shared_cache)
    assert "writes its own calibration text" in third.stderr
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")


def test_a_group_of_commands_can_hang_below_another():
    umbrella = Commands("umbrella")
    umbrella.add_command(quantize)
    with pytest.raises(SystemExit) as left:
        umbrella.main(["quantize", "inspect", "/nowhere/at/all"])
    assert left.value.code == 3


def test_the_dead_channels_of_padding_are_no_news(place, tmp_path):
    done = run(
        "quantize",
        "awq",
        place / "model",
        "-o",
        tmp_path / "out",
        *text(place)[:2],
        *FAST[2:],
        "--pad",
        "--preset",
        "fast",
    )
    assert done.returncode == 0, done.stderr
    assert "zero in every token" not in done.stderr + done.stdout


def test_a_workspace_is_judged_with_its_own_static_cache(place, tmp_path):
    """Packed from a padded model with KV parameters: the workspace gives the numbers of the checkpoint it came from."""
    arguments = [
        "awq",
        place / "model",
        "--pad",
        "--preset",
        "rtn",
        "--kv-bits",
        8,
        *text(place)[:2],
        *FAST[2:],
    ]
    assert run("quantize", *arguments, "-o", tmp_path / "awq").returncode == 0
    done = run("quantize", "pack", tmp_path / "awq", "-o", tmp_path / "ws")
    assert done.returncode == 0, done.stderr
    judge = [
        "evaluate",
        "ppl",
        tmp_path / "awq",
        tmp_path / "ws",
        "--text",
        place / "text.txt",
        "--windows",
        2,
        "--json",
    ]
    rows = json.loads(run(*judge, "--kv-bits", 8, "--kv-mode", "static").stdout)["rows"]
    assert rows[1]["kind"] == "workspace-0.6.5" and rows[0]["nll"] == rows[1]["nll"]
