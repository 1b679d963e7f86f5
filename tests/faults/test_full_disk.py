"""Full disks and file-size limits in a run: one message, nothing that looks finished, the same command goes on afterwards."""

import errno
import os
import resource
import stat

import pytest
from tiny_runs import FAST, files_of, run, write_runnable, write_text


@pytest.fixture(scope="module")
def place(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("disk")
    write_runnable(folder / "model", layers=3)
    write_text(folder / "text.txt")
    return folder


def line(place, out):
    base = ["awq", place / "model", "-o", out, "--calib-data", place / "text.txt", *FAST]
    return [*base, "--preset", "fast", "--kv-bits", 8]


@pytest.fixture(scope="module")
def quiet(place):
    assert run("quantize", *line(place, place / "quiet")).returncode == 0
    return files_of(place / "quiet")


def limit_file_size(size_bytes):
    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))

    return prepare


@pytest.mark.parametrize("case", ["C32-rlimit-fsize"])
def test_a_file_size_limit_stops_the_run_resumably(case, place, quiet, tmp_path):
    largest = max(len(raw) for name, raw in quiet.items() if name.endswith(".safetensors"))
    for size in (largest // 3, largest - 1):
        done = run("quantize", *line(place, tmp_path / "out"), prepare=limit_file_size(size))
        assert done.returncode == 4, done.stderr
        assert "file-size limit" in done.stderr and "same command again" in done.stderr
        assert not (tmp_path / "out" / "tmq" / "manifest.json").exists()
        assert not [name for name in files_of(tmp_path / "out") if name.endswith(".tmq-tmp")]
    assert run("quantize", *line(place, tmp_path / "out")).returncode == 0
    assert files_of(tmp_path / "out") == quiet


def full_at_sync(number):
    """The disk is full at the `number`-th fsync: where a file system reports what it could not write."""

    def prepare():
        real, count = os.fsync, 0

        def fsync(handle):
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        os.fsync = fsync

    return prepare


@pytest.mark.parametrize("case", ["C31-enospc-at-every-write"])
def test_a_full_disk_at_any_write_is_resumable(case, place, quiet, tmp_path):
    number, stops = 1, 0
    while True:
        done = run("quantize", *line(place, tmp_path / "out"), prepare=full_at_sync(number))
        if done.returncode == 0 or "finished already" in done.stderr:  # the last is that of a whole result
            break
        assert done.returncode == 4 and "disk is full" in done.stderr, done.stderr
        stops += 1
        number += 3
        assert stops < 100
    assert stops >= 5
    assert files_of(tmp_path / "out") == quiet


@pytest.mark.parametrize("case", ["C31-full-at-the-start"])
def test_space_is_checked_before_the_start(case, place, tmp_path):
    def no_space():
        import shutil

        usage = shutil.disk_usage("/")
        shutil.disk_usage = lambda path: usage._replace(free=1000)

    done = run("quantize", *line(place, tmp_path / "out"), prepare=no_space)
    assert done.returncode == 4 and "1000 bytes free" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["C32-read-only-folder"])
def test_a_read_only_place(case, place, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    done = run("quantize", *line(place, locked / "out"))
    assert done.returncode == 4 and "permission is denied" in done.stderr


@pytest.mark.parametrize("case", ["C37-full-while-writing-the-report"])
def test_a_result_survives_a_report_that_cannot_be_written(case, place, quiet, tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    done = run(
        "evaluate",
        "report",
        place / "quiet",
        "-o",
        tmp_path / "report.html",
        prepare=lambda: limit_file_size(4096)(),
    )
    assert done.returncode == 4 and "report.html" in done.stderr
    assert not (tmp_path / "report.html").exists()
    assert files_of(place / "quiet") == quiet
