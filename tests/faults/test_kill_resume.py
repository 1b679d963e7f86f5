"""Group D of the fault table: kills, signals, damaged state, two processes. The final bytes are those of a quiet run."""

import json
import os
import signal
import socket
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import FAST, Forked, files_of, run, write_runnable, write_text

from convert.folder.files import sha256_file

CASES = {
    "awq-fast": ("awq", "--preset", "fast", *FAST, "--kv-bits", 8),
    "awq-two-streams": ("awq", "--preset", "awq", "--group-size", 32, "--samples", 2, "--seqlen", 16),
    "awq-rtn": ("awq", "--preset", "rtn", "--group-size", 32),
    "calibrate": ("calibrate", "--samples", 4, "--seqlen", 32),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("kill")
    write_runnable(folder / "model", layers=3)
    write_text(folder / "text.txt")
    return folder


def line(case, place, out):
    """The arguments of a case."""
    name, *flags = CASES[case]
    text = () if case == "awq-rtn" else ("--calib-data", place / "text.txt")
    return [name, place / "model", "-o", out, *text, "--device", "cpu", *flags]


def job(case, place, out):
    """Run a case to its end."""
    done = run("quantize", *line(case, place, out))
    assert done.returncode == 0, done.stderr
    return done


def kill_at_sync(number):
    """SIGKILL this process at its `number`-th fsync: every durable write of a run lies between two of them."""

    def prepare():
        real, count = os.fsync, 0

        def fsync(handle):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)

        os.fsync = fsync

    return prepare


@pytest.fixture(scope="module")
def quiet(place):
    """The bytes of each case when nothing disturbs it."""
    found = {}
    for case in CASES:
        job(case, place, place / f"quiet-{case}")
        found[case] = files_of(place / f"quiet-{case}")
    return found


@pytest.mark.parametrize("case", CASES)
def test_D38_sigkill_at_every_durable_write(case, place, quiet, tmp_path):
    """Killed again and again, each time some writes further on, until it comes to its end."""
    out, kills, number = tmp_path / "out", 0, 3
    while True:
        done = run("quantize", *line(case, place, out), prepare=kill_at_sync(number))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
        number += 2
        assert kills < 200
    assert kills >= 5
    assert files_of(out) == quiet[case]


def test_D38_sigkill_at_random_moments(place, quiet, tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = time.monotonic()
    job("awq-fast", place, tmp_path / "timed")
    whole = time.monotonic() - start
    out, kills = tmp_path / "out", 0
    for _ in range(15):
        delay = whole * (0.1 + 0.6 * float(torch.rand(1, generator=generator)))
        process = Forked("quantize", *line("awq-fast", place, out))
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        kills += process.wait().returncode == -signal.SIGKILL
        if (
            out / "tmq" / "manifest.json"
        ).is_file():  # finished, though perhaps killed before it could say so
            break
    else:
        job("awq-fast", place, out)
    assert kills > 0
    assert files_of(out) == quiet["awq-fast"]


def test_D38_self_written_text_survives_a_kill(place, tmp_path):
    """Without text the model writes its own, once: a kill afterwards does not change it."""
    arguments = ("awq", place / "model", *FAST, "--preset", "fast", "-o")
    assert run("quantize", *arguments, tmp_path / "quiet").returncode == 0
    process = Forked("quantize", *arguments, tmp_path / "out")
    process.until("layer 1/3")
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "tmq" / "work" / "tokens.safetensors").is_file()
    assert run("quantize", *arguments, tmp_path / "out").returncode == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "quiet")


def distilling(place):
    """The arguments of a run with an end-to-end pass; the output folder follows."""
    text = place / "text.txt"
    return ["awq", place / "model", "--calib-data", text, *FAST, "--preset", "fast", "--distill", "-o"]


def kill_in_the_pass(place, out):
    """Begin a run with an end-to-end pass, kill it behind its first saved steps; the path of the saved tensors."""
    process = Forked("quantize", *distilling(place), out)
    process.until("end-to-end pass over scales and norms: 1/600")
    state = out / "tmq" / "work" / "pass.safetensors"
    while not state.is_file():
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL
    # a kill between the two files leaves no mark, which is the other way to begin the pass anew
    mark = {"done": int(load_file(state)["counter"]), "sha256": sha256_file(state)}
    state.with_suffix(".json").write_text(json.dumps(mark))
    return state


def test_D38_an_end_to_end_pass_goes_on_where_it_was_killed(place, tmp_path):
    done = run("quantize", *distilling(place), tmp_path / "quiet")
    assert done.returncode == 0, done.stderr
    kill_in_the_pass(place, tmp_path / "out")
    again = run("quantize", *distilling(place), tmp_path / "out")
    assert again.returncode == 0, again.stderr
    assert "resuming at layer 3 of 3" in again.stderr
    assert "going on with the end-to-end pass after step" in again.stderr
    assert "layer 3/3" not in again.stderr and "600/600, KL" in again.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "quiet")


def test_a_damaged_state_of_the_end_to_end_pass_is_passed_over(place, tmp_path):
    state = kill_in_the_pass(place, tmp_path / "out")
    whole = state.read_bytes()
    state.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = run("quantize", *distilling(place), tmp_path / "out")
    assert again.returncode == 0 and "state of the end-to-end pass is damaged" in again.stderr


def test_two_runs_of_one_seed_are_byte_identical(place, quiet, tmp_path):
    for case in ("awq-fast", "awq-two-streams"):
        job(case, place, tmp_path / case)
        assert files_of(tmp_path / case) == quiet[case]


@pytest.mark.parametrize(
    ("case", "number"),
    [("D39-sigint", signal.SIGINT), ("D39-sigterm", signal.SIGTERM), ("D39-sighup", signal.SIGHUP)],
)
def test_a_signal_says_how_to_resume(case, number, place, quiet, tmp_path):
    process = Forked("quantize", *line("awq-fast", place, tmp_path / "out"))
    process.until("layer 1/3")
    os.kill(process.pid, number)
    process.wait()
    assert process.returncode == 5 and "the same command resumes" in process.stderr
    assert "Traceback" not in process.stderr
    job("awq-fast", place, tmp_path / "out")
    assert files_of(tmp_path / "out") == quiet["awq-fast"]


def test_D39_a_second_signal_ends_at_once(place, tmp_path):
    def slow_exit():
        import quant.state.frontier

        quant.state.frontier.Frontier.record = lambda *a: time.sleep(30)

    process = Forked("quantize", *line("awq-fast", place, tmp_path / "out"), prepare=slow_exit)
    process.until("warning")
    time.sleep(0.8)
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait().returncode == 5 and time.monotonic() - begin < 10


def test_D39_a_closed_pipe_on_stdout_is_no_fault(place):
    def close_reader():
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)

    done = run("quantize", "inspect", place / "model", prepare=close_reader)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "error" not in done.stderr


def interrupted(place, out, writes=16):
    """An unfinished folder of the case awq-fast."""
    done = run("quantize", *line("awq-fast", place, out), prepare=kill_at_sync(writes))
    assert done.returncode == -signal.SIGKILL
    return out


def state_files(out):
    return sorted(path for path in (out / "tmq" / "work").iterdir() if path.name != "lock")


DAMAGE = {
    "D40-zero-length-shard": lambda out: next(out.glob("model-*.safetensors")).write_bytes(b""),
    "D40-zero-length-state": lambda out: [p.write_bytes(b"") for p in state_files(out)],
    "D42-cut-state": lambda out: [p.write_bytes(p.read_bytes()[:-3]) for p in state_files(out)],
    "D42-state-gone": lambda out: [p.unlink() for p in state_files(out)],
    "D42-flipped-bit": lambda out: [
        p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:])
        for p in out.glob("model-*.safetensors")
    ],
    "D34-temporary-left": lambda out: (out / ".config.json.tmq-tmp").write_bytes(b"half"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_state_is_noticed_and_its_work_done_again(case, place, quiet, tmp_path):
    out = interrupted(place, tmp_path / "out", 40)
    DAMAGE[case](out)
    job("awq-fast", place, out)
    assert files_of(out) == quiet["awq-fast"]


def test_D42_a_state_of_the_future_is_refused_by_field(place, tmp_path):
    out = interrupted(place, tmp_path / "out")
    path = out / "tmq" / "run.json"
    document = json.loads(path.read_text())
    document["fingerprint"]["version of turbomind-quant"] = "99.0"
    path.write_text(json.dumps(document))
    done = run("quantize", *line("awq-fast", place, out))
    assert done.returncode == 3 and "version of turbomind-quant was" in done.stderr and "99.0" in done.stderr


CHANGES = {
    "B30-seed": (["--seed", "1"], None, "seed was 0, is 1"),
    "B30-content": ([], "other words here " * 400, "text sha256"),
    "B30-samples": (["--samples", "3"], None, "samples was 4, is 3"),
    "D41-bits": (["--bits", "3"], None, "bits was 4, is 3"),
    "D41-preset": (["--preset", "gptq"], None, "preset was"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_another_setting_on_resume_is_named(case, place, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes((place / "text.txt").read_bytes())
    out = interrupted(place, tmp_path / "out")
    before = files_of(out)
    flags, content, message = CHANGES[case]
    if content is not None:
        text.write_text(content)
    base = [
        "awq",
        place / "model",
        "-o",
        out,
        "--calib-data",
        text,
        *FAST,
        "--preset",
        "fast",
        "--kv-bits",
        8,
    ]
    done = run("quantize", *base, *flags)
    assert done.returncode == 3 and message in done.stderr and "--restart" in done.stderr
    after = files_of(out)
    after.pop("tmq/work/lock", None)
    before.pop("tmq/work/lock", None)
    assert after == before
    assert run("quantize", *base, *flags, "--restart").returncode == 0


def test_D43_a_second_process_is_refused_with_the_pid(place, tmp_path):
    from convert.folder.files import FolderLock

    with FolderLock(tmp_path / "out" / "tmq" / "work" / "lock"):
        done = run(
            "quantize", "awq", place / "model", "-o", tmp_path / "out", "--preset", "rtn", "--group-size", 32
        )
    assert done.returncode == 3 and f"in use by process {os.getpid()}" in done.stderr


def test_D44_the_lock_of_a_dead_process_is_no_obstacle(place, quiet, tmp_path):
    out = interrupted(place, tmp_path / "out")
    assert json.loads((out / "tmq" / "work" / "lock").read_text())["host"] == socket.gethostname()
    job("awq-fast", place, out)
    assert files_of(out) == quiet["awq-fast"]


def test_D44_the_lock_of_another_host_is_explained(place, tmp_path):
    out = interrupted(place, tmp_path / "out")
    (out / "tmq" / "work" / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    done = run("quantize", "awq", place / "model", "-o", out, "--preset", "rtn", "--group-size", 32)
    assert done.returncode == 3 and "elsewhere" in done.stderr and "delete this file" in done.stderr


def test_D45_no_decision_rests_on_times_of_files(place, quiet, tmp_path):
    out = interrupted(place, tmp_path / "out")
    for path in out.rglob("*"):
        os.utime(path, (0, 0))
    job("awq-fast", place, out)
    assert files_of(out) == quiet["awq-fast"]


def test_C35_finished_and_foreign_folders_are_left_alone(place, quiet, tmp_path):
    arguments = ["awq", place / "model", "--preset", "rtn", "--group-size", 32, "--device", "cpu", "-o"]
    finished = place / "quiet-awq-rtn"
    done = run("quantize", *arguments, finished)
    assert done.returncode == 3 and "finished already" in done.stderr
    assert files_of(finished) == quiet["awq-rtn"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    done = run("quantize", *arguments, tmp_path / "foreign", "--restart")
    assert done.returncode == 3 and "not ours" in done.stderr
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.txt"]
