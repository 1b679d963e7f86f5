"""Output folders: their states, resuming, fingerprints, the journal, the manifest, and a kill between any two steps."""

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.errors import InputError
from convert.folder.files import sha256_bytes, temp_path
from convert.folder.output import FolderState, OutputFolder, folder_state, read_manifest

FINGERPRINT = {"source": "abc", "group_size": 128, "seed": 0}


def write_all(out: Path, layout: str = "tmq", **options) -> None:
    """A run of three files."""
    with OutputFolder.begin(out, FINGERPRINT, layout=layout, **options) as folder:
        if folder.finished:
            return
        for i in range(2):
            name = f"part-{i}.safetensors"
            if not folder.has(name):
                folder.save_tensors(name, {"w": torch.full((3, 2), float(i))})
        folder.write_json("sub/facts.json", {"b": 1, "a": [2]})
        folder.finish({"kind": "test"}, report={"seconds": os.getpid()})


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: data for name, data in found.items() if not name.endswith("report.json")}


@pytest.mark.parametrize("layout", ["tmq", "root"])
def test_states_from_nothing_to_finished(layout: str, tmp_path) -> None:
    out = tmp_path / "out"
    assert folder_state(out) is FolderState.ABSENT
    with OutputFolder.begin(out, FINGERPRINT, layout=layout) as folder:
        assert folder_state(out) is FolderState.UNFINISHED and not folder.resumed
        first = [p.name for p in out.rglob("*.json")]
        assert first == ["run.json"]
        folder.write("a.bin", b"abc")
    assert folder_state(out) is FolderState.UNFINISHED
    write_all(out, layout)
    assert folder_state(out) is FolderState.FINISHED
    base = out / "tmq" if layout == "tmq" else out
    assert not (base / "work").exists()
    manifest = read_manifest(out)
    assert manifest.data["kind"] == "test" and "a.bin" in manifest.files
    entry = manifest.files["part-1.safetensors"]
    data = (out / "part-1.safetensors").read_bytes()
    assert entry["bytes"] == len(data) and entry["sha256"] == sha256_bytes(data)
    assert entry["tensors"] == {"w": ["float32", [3, 2]]}
    assert not {"run.json", "report.json", "manifest.json"} & {Path(name).name for name in manifest.files}
    text = (base / "manifest.json").read_text()
    assert str(tmp_path) not in text and os.uname().nodename not in text


def test_two_runs_give_the_same_bytes(tmp_path) -> None:
    write_all(tmp_path / "one")
    write_all(tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours catches it, and what it left on disk is all that is known."""


STEPS = ["replace", "fsync", "unlink", "rmtree", "open"]


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_is_resumed_to_the_same_bytes(step: str, tmp_path, monkeypatch) -> None:
    """The n-th call of a system function dies, for every n until a run gets through."""
    write_all(tmp_path / "whole")
    expected = files_of(tmp_path / "whole")
    owner, name = {
        "replace": (Path, "replace"),
        "fsync": (os, "fsync"),
        "unlink": (Path, "unlink"),
        "rmtree": (shutil, "rmtree"),
        "open": (os, "open"),
    }[step]
    real = getattr(owner, name)
    for limit in range(60):
        out = tmp_path / f"{step}-{limit}"
        calls = 0

        def counted(*args, limit=limit, **kwargs):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return real(*args, **kwargs)

        killed = False
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            try:
                write_all(out)
            except Killed:
                killed = True
        if folder_state(out) is not FolderState.FINISHED:
            write_all(out)
        assert files_of(out) == expected, limit
        read_manifest(out).check_digests(out)
        if not killed:
            return
    raise AssertionError("the run never got through")


def test_D40_a_file_that_lost_its_content_is_written_again(tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        folder.save_tensors("part-0.safetensors", {"w": torch.zeros(3, 2)})
        folder.save_tensors("part-1.safetensors", {"w": torch.ones(3, 2)})
    size = (out / "part-0.safetensors").stat().st_size
    (out / "part-0.safetensors").write_bytes(b"")  # renamed, but its data never reached the disk
    (out / "part-1.safetensors").write_bytes(b"\0" * size)
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        assert not folder.has("part-0.safetensors") and not folder.has("part-1.safetensors")
    write_all(out)
    write_all(tmp_path / "whole")
    assert files_of(out) == files_of(tmp_path / "whole")


def test_D41_other_settings_are_named_field_by_field(tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT):
        pass
    before = files_of(out)
    with pytest.raises(InputError) as caught:
        OutputFolder.begin(out, {"source": "abc", "group_size": 64, "dtype": "float16", "seed": 0})
    message = str(caught.value)
    assert "group_size was 128, is 64" in message and 'dtype was null, is "float16"' in message
    assert "seed" not in message and "source" not in message and "--restart" in message
    assert files_of(out) == before


def test_restart_discards_what_the_run_wrote_and_nothing_else(tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        folder.write("mine.bin", b"1")
        (folder.work / "stream").write_bytes(b"2")
    (out / "theirs.txt").write_text("kept")
    with OutputFolder.begin(out, {"seed": 1}, restart=True) as folder:
        assert not folder.resumed and not (folder.work / "stream").exists()
        assert sorted(p.name for p in out.iterdir()) == ["theirs.txt", "tmq"]
    assert json.loads((out / "tmq" / "run.json").read_text())["fingerprint"] == {"seed": 1}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("case", ["finished", "foreign", "file"], ids=lambda c: f"C35-{c}")
def test_occupied_output_is_refused_and_untouched(case: str, restart: bool, tmp_path) -> None:
    out = tmp_path / "out"
    if case == "finished":
        write_all(out)
    elif case == "foreign":
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    else:
        out.write_text("text")
    before = files_of(tmp_path)
    with pytest.raises(InputError) as caught:
        OutputFolder.begin(out, FINGERPRINT, restart=restart)
    assert caught.value.exit_code == 3
    assert files_of(tmp_path) == before


def test_C34_temporaries_of_a_crash_are_removed_only_if_ours(tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT):
        pass
    ours = temp_path(out / "part-0.safetensors")
    ours.write_bytes(b"half")
    (out / ".other.tmp").write_bytes(b"theirs")
    with OutputFolder.begin(out, FINGERPRINT):
        assert not ours.exists() and (out / ".other.tmp").exists()


MANIFEST_CHANGES = {
    "G67-missing": lambda raw: None,
    "G67-edited": lambda raw: raw["files"][0].update(bytes=1),
    "G67-version": lambda raw: raw.update(format=2),
    "G67-parent": lambda raw: raw["files"][0].update(path="../x"),
    "G67-absolute": lambda raw: raw["files"][0].update(path="/etc/passwd"),
}


@pytest.mark.parametrize("case", MANIFEST_CHANGES)
def test_damaged_manifest(case: str, tmp_path) -> None:
    from convert.folder.state import self_digest

    out = tmp_path / "out"
    write_all(out)
    path = out / "tmq" / "manifest.json"
    if case == "G67-missing":
        path.unlink()
        assert folder_state(out) is FolderState.UNFINISHED
        return
    raw = json.loads(path.read_text())
    MANIFEST_CHANGES[case](raw)
    if case != "G67-edited":
        raw["digest"] = self_digest(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError):
        read_manifest(out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), change=st.integers(1, 255))
def test_any_changed_byte_of_an_artefact_is_noticed(at: int, change: int, tmp_path) -> None:
    out = tmp_path / "out"
    if not out.exists():
        write_all(out)
    paths = [out / "tmq" / "manifest.json", out / "part-0.safetensors", out / "sub" / "facts.json"]
    whole = b"".join(path.read_bytes() for path in paths)
    at %= len(whole)
    for path in paths:
        data = bytearray(path.read_bytes())
        if at < len(data):
            break
        at -= len(data)
    saved = bytes(data)
    data[at] ^= change
    path.write_bytes(data)
    try:
        with pytest.raises(InputError):
            read_manifest(out).check_digests(out)
    finally:
        path.write_bytes(saved)


@pytest.mark.parametrize("case", ["absent", "longer"])
def test_sizes_are_checked_on_opening(case: str, tmp_path) -> None:
    out = tmp_path / "out"
    write_all(out)
    path = out / "part-1.safetensors"
    if case == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"part-1\.safetensors"):
        read_manifest(out).check_sizes(out)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"tool": "turbomind-quant"}'], ids=lambda d: f"D42-{d!r}"
)
def test_damaged_run_file(data: bytes, tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT):
        pass
    (out / "tmq" / "run.json").write_bytes(data)
    with pytest.raises(InputError):
        OutputFolder.begin(out, FINGERPRINT)
    assert (out / "tmq" / "run.json").read_bytes() == data


def test_D42_a_half_written_line_of_the_journal_counts_as_not_done(tmp_path) -> None:
    out = tmp_path / "out"
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        folder.write("a.bin", b"1")
        folder.write("b.bin", b"2")
    journal = out / "tmq" / "work" / "files.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        assert folder.has("a.bin") and not folder.has("b.bin")
        folder.write("b.bin", b"2")
    with OutputFolder.begin(out, FINGERPRINT) as folder:
        assert folder.has("b.bin")


class Memory(bytearray):
    """Bytes that a weak reference can follow."""


def test_raw_files_are_in_memory_one_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[Memory]] = []

    def files() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(4):
            assert not [memory for memory in made if memory() is not None]
            memory = Memory(b"\x01" * 64)
            made.append(weakref.ref(memory))
            tensor = torch.frombuffer(memory, dtype=torch.uint8)
            del memory
            yield f"sub/{number}", tensor
            del tensor

    with OutputFolder.begin(tmp_path / "out", {}, layout="root") as out:
        out.save_raw([f"sub/{number}" for number in range(4)], files())
        assert all(out.has(f"sub/{number}") for number in range(4))
        out.finish({})
    assert sorted(read_manifest(tmp_path / "out").files) == [f"sub/{number}" for number in range(4)]


def test_a_group_of_files_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    def files() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(3)
        raise InputError("the source is damaged.")

    with OutputFolder.begin(tmp_path / "out", {}, layout="root") as out:
        with pytest.raises(InputError, match="damaged"):
            out.save_raw(["a", "b"], files())
        assert not out.has("a") and not out.has("b")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["run.json", "work"]


def test_other_weights_are_no_other_settings(tmp_path) -> None:
    with OutputFolder.begin(tmp_path / "q", FINGERPRINT):
        pass
    with pytest.raises(InputError) as caught:
        OutputFolder.begin(tmp_path / "q", FINGERPRINT | {"source": "def"})
    message = str(caught.value)
    assert "the weights of the source have changed since the unfinished run in" in message
    assert "--restart" in message and "settings" not in message
    with pytest.raises(
        InputError, match=r"weights of the source have changed.*Other settings too: seed was 0, is 1"
    ):
        OutputFolder.begin(tmp_path / "q", FINGERPRINT | {"source": "def", "seed": 1})
    with OutputFolder.begin(tmp_path / "q", FINGERPRINT | {"source": "def"}, restart=True) as folder:
        assert not folder.resumed
