"""Group C of the fault table, disk, and the parts of group D that are about locks: full, read-only, limited, shared."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import write_model

from convert.awq.writer import AwqWriter
from convert.config import QuantFormat
from convert.errors import InputError, ResourceError
from convert.folder.disk_space import check_free_space, size_text
from convert.folder.files import FolderLock, atomic_write, safetensors_chunks, write_json
from convert.folder.output import FolderState, OutputFolder, folder_state
from convert.readers import open_checkpoint


@pytest.mark.parametrize("place", ["start", "middle", "fsync", "rename"], ids=lambda p: f"C31-{p}")
def test_full_disk_keeps_the_old_file_and_no_temporary(place: str, tmp_path, monkeypatch) -> None:
    path = tmp_path / "shard"
    atomic_write(path, b"old")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise full

    def chunks():
        if place == "start":
            raise full
        yield b"new"
        if place == "middle":
            raise full

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if place == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ResourceError, match=r"disk is full.*same command again") as caught:
        atomic_write(path, chunks())
    assert caught.value.exit_code == 4
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["shard"]


def test_C31_full_disk_at_the_manifest_leaves_a_run_that_resumes(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    real = os.fsync
    with OutputFolder.begin(out, {"a": 1}) as folder:
        folder.write("x.bin", b"1")

        def fail(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(ResourceError):
            folder.finish({})
        monkeypatch.setattr(os, "fsync", real)
    assert folder_state(out) is FolderState.UNFINISHED
    with OutputFolder.begin(out, {"a": 1}) as folder:
        if not folder.finished:
            assert folder.has("x.bin")
            folder.finish({})
    assert folder_state(out) is FolderState.FINISHED


@pytest.mark.parametrize(
    ("case", "code", "word"),
    [
        ("read-only", errno.EROFS, "read-only"),
        ("quota", errno.EDQUOT, "quota"),
        ("size-limit", errno.EFBIG, "ulimit"),
        ("inodes", errno.ENOSPC, "inodes"),
        ("denied", errno.EACCES, "permission"),
        ("odd", errno.ENXIO, "Check the disk"),
    ],
    ids=lambda v: f"C32-{v}" if isinstance(v, str) and v.islower() and " " not in v else "",
)
def test_refused_writes(case: str, code: int, word: str, tmp_path, monkeypatch) -> None:
    def fail(path, *args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ResourceError, match=word):
        atomic_write(tmp_path / "x", b"1")


def test_C32_a_real_file_size_limit(tmp_path) -> None:
    """RLIMIT_FSIZE in a process of its own: the write fails, nothing is left, the old file stays."""
    script = f"""
import resource
from pathlib import Path
from convert.errors import ResourceError
from convert.folder.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
path = Path({str(tmp_path)!r}) / "shard"
atomic_write(path, b"old")
try:
    atomic_write(path, (b"x" * 5_000 for _ in range(4)))
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "file-size limit" in done.stdout, done.stderr
    assert (tmp_path / "shard").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_C31_space_is_checked_before_the_start(tmp_path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1000, "the test")
    with pytest.raises(ResourceError, match="GiB free"):
        check_free_space(tmp_path, 2**60, "the test")


def test_C31_small_sizes_are_not_zero(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    with pytest.raises(
        ResourceError, match=r"the test needs 4\.20 MiB on the disk of .* which has 3\.00 MiB free"
    ):
        check_free_space(tmp_path, 2**22, "the test")
    assert [size_text(count) for count in (5, 1536, 2**31)] == ["5 bytes", "1.50 KiB", "2.00 GiB"]


def test_a_place_that_takes_no_files_is_named(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        ResourceError, match="/proc/x cannot be written: the file system of /proc keeps no files"
    ):
        check_free_space(Path("/proc/x"), 1000, "the test")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="permission is denied"):
        check_free_space(tmp_path / "out", 1000, "the test")


def test_C33_no_two_names_differ_in_case_alone(tmp_path) -> None:
    """A file system that folds case holds a whole checkpoint."""
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    with OutputFolder.begin(tmp_path / "q", {}) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(4, 32))
        for i in range(ckpt.config.num_layers):
            writer.write_block(i, ckpt.block(i))
        writer.finish_files()
        folder.finish({"kind": "awq", "bits": 4})
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert len({name.casefold() for name in names}) == len(names)


def test_a_checkpoint_that_lacks_a_block_is_never_finished(tmp_path) -> None:
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    with OutputFolder.begin(tmp_path / "out", {}) as folder:
        writer = AwqWriter(folder, ckpt, QuantFormat(4, 32))
        writer.write_block(0, ckpt.block(0))
        with pytest.raises(RuntimeError, match="blocks were never written"):
            writer.finish_files()
    assert folder_state(tmp_path / "out") is not FolderState.FINISHED


def test_safetensors_of_ours_are_read_by_the_library(tmp_path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "b": torch.randn(3, 5).half(),
        "a": torch.randn(7),
        "c": torch.randint(0, 9, (2, 2), dtype=torch.int32),
        "d": torch.randn(4, 3).t(),  # not contiguous
        "e": torch.randn(3).bfloat16(),
    }
    atomic_write(tmp_path / "x.safetensors", safetensors_chunks(tensors))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    again = b"".join(bytes(c) for c in safetensors_chunks(dict(reversed(tensors.items()))))
    assert again == (tmp_path / "x.safetensors").read_bytes()


# D43, D44: one process works in a folder

HOLDER = """
import sys, time
from pathlib import Path
from convert.folder.output import OutputFolder
folder = OutputFolder.begin(Path(sys.argv[1]), {"a": 1})
folder.write("x.bin", b"1")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_D43_second_process_is_refused_with_the_pid(holder, tmp_path) -> None:
    with pytest.raises(InputError, match=f"process {holder.pid} "):
        OutputFolder.begin(tmp_path / "out", {"a": 1})


def test_D44_lock_of_a_killed_process_is_taken_over(holder, tmp_path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "out/tmq/work/lock").read_text())["pid"] == holder.pid
    with OutputFolder.begin(tmp_path / "out", {"a": 1}) as folder:
        assert folder.resumed and folder.has("x.bin")


def test_D44_lock_of_another_host_is_explained(tmp_path) -> None:
    write_json(tmp_path / "lock", {"pid": 7, "host": "elsewhere"})
    with pytest.raises(InputError, match=r"process 7 on the host elsewhere.*delete this file"):
        FolderLock(tmp_path / "lock").acquire()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b'{"pid": "x", "host": 5}'], ids=["empty", "garbage", "types"]
)
def test_D42_damaged_lock_is_taken_over(content: bytes, tmp_path) -> None:
    (tmp_path / "lock").write_bytes(content)
    with FolderLock(tmp_path / "lock"):
        assert json.loads((tmp_path / "lock").read_text()) == {
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
    assert not (tmp_path / "lock").exists()


def test_D45_the_clock_decides_nothing(tmp_path) -> None:
    with OutputFolder.begin(tmp_path / "out", {"a": 1}) as folder:
        folder.write("x.bin", b"1")
    past = time.time() - 10**8
    for path in (tmp_path / "out").rglob("*"):
        os.utime(path, (past, past))
    with OutputFolder.begin(tmp_path / "out", {"a": 1}) as folder:
        assert folder.resumed and folder.has("x.bin")
