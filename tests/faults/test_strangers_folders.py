"""Output folders that strangers made or damaged: what claims to be ours is checked as ours, and no name in it leads out of it."""

import json
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
from tiny_models import write_model
from tiny_runs import FAST, run, write_runnable, write_text

from convert.errors import InputError
from convert.folder.files import FolderLock, atomic_write, temp_path
from convert.folder.journal import Journal
from convert.folder.json_files import read_bytes
from convert.folder.output import FolderState, OutputFolder, folder_state
from convert.folder.state import read_manifest
from convert.readers import open_checkpoint
from convert.verify import verify_path
from scripts.flip_bytes import files_of, is_noticed, unnoticed_changes, unnoticed_flips


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An AWQ checkpoint, a workspace and statistics of a tiny model whose sizes suit all three."""
    from scripts.flip_bytes import make_folders

    return make_folders(tmp_path_factory.mktemp("made"))


def copies(folders: list[Path], place: Path) -> list[Path]:
    return [Path(shutil.copytree(folder, place / folder.name)) for folder in folders]


def test_J101_a_sound_folder_passes_strictly(folders: list[Path]) -> None:
    for folder in folders:
        report = verify_path(folder, strict=True)
        assert report.passed and report.verified, report.checks


def test_J101_every_flipped_byte_is_noticed(folders: list[Path], tmp_path: Path) -> None:
    """The short form of scripts/flip_bytes.py."""
    assert unnoticed_flips(copies(folders, tmp_path), 240, random.Random(1)) == []


def test_J102_every_swap_addition_and_removal_is_noticed(folders: list[Path], tmp_path: Path) -> None:
    assert unnoticed_changes(copies(folders, tmp_path), 60, random.Random(2)) == []


@pytest.mark.parametrize("name", ["run.json", "manifest.json", "report.json"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["awq", "workspace", "statistics"])
def test_J101_no_byte_of_our_own_files_may_change(
    which: int, name: str, folders: list[Path], tmp_path: Path
) -> None:
    folder = copies(folders, tmp_path)[which]
    path = next(path for path in files_of(folder) if path.name == name and path.parent.name != "source")
    whole = path.read_bytes()
    dice = random.Random(3)
    for at in dice.sample(range(len(whole)), min(60, len(whole))):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ dice.randrange(1, 256)]) + whole[at + 1 :])
        assert is_noticed(folder), at
    path.write_bytes(whole.replace(b"\n ", b"\n\t", 1))  # the same JSON in other bytes
    assert is_noticed(folder)


def test_J101_a_folder_that_names_us_is_never_foreign(folders: list[Path], tmp_path: Path) -> None:
    for folder in copies(folders, tmp_path):
        run_file = next(path for path in files_of(folder) if path.name == "run.json")
        run_file.write_text(run_file.read_text().replace("turbomind-quant", "another-tool"))
        with pytest.raises(InputError, match=r"run\.json names the tool"):
            folder_state(folder)
        run_file.unlink()
        with pytest.raises(InputError, match=r"run\.json is absent"):
            folder_state(folder)


def test_J102_documents_are_noted_and_refused_when_strict(folders: list[Path], tmp_path: Path) -> None:
    folder = copies(folders, tmp_path)[0]
    (folder / "README.md").write_text("a model card")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("x")
    report = verify_path(folder)
    assert report.passed and any("README.md" in note for note in report.notes)
    assert not verify_path(folder, strict=True).passed
    assert run("quantize", "verify", folder).returncode == 0
    assert run("quantize", "verify", folder, "--strict").returncode == 3
    os.symlink("/", folder / "link")
    assert "link" in next(c.detail for c in verify_path(folder).checks if c.name == "files")


def test_J102_an_empty_folder_does_not_hide_the_manifest(folders: list[Path], tmp_path: Path) -> None:
    workspace = copies(folders, tmp_path)[1]
    (workspace / "tmq").mkdir()
    assert folder_state(workspace) is FolderState.FINISHED
    assert read_manifest(workspace).kind == "workspace"


def test_J103_what_is_foreign_is_unverified_with_a_code_of_its_own(tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    done = run("quantize", "verify", model, "--json")
    assert done.returncode == 6
    document = json.loads(done.stdout)
    assert document["passed"] and not document["verified"]
    (model / "manifest.json").write_text('{"name": "of a web page"}')  # another program's
    assert run("quantize", "verify", model).returncode == 6
    raw = bytearray((model / "model.safetensors").read_bytes())
    raw[-1] = raw[-3] = 0xFF  # NaN
    (model / "model.safetensors").write_bytes(raw)
    assert run("quantize", "verify", model).returncode == 3


# J104, J105: what an unfinished folder of a stranger may make us touch


def stranger(out: Path, *entries: dict) -> Path:
    """An unfinished output folder, as a workspace begins."""
    (out / "work").mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"tool": "turbomind-quant", "format": 1, "fingerprint": {}}))
    (out / "work" / "files.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return out


@pytest.mark.parametrize(
    "name", ["../near", "{absolute}", "a/../../near", "linked/inside", ".", "a\0b", "a\nb"]
)
def test_J104_restart_deletes_nothing_outside(name: str, tmp_path: Path) -> None:
    precious = [tmp_path / "near", tmp_path / "far" / "inside"]
    for path in precious:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    name = name.replace("{absolute}", str(precious[1]))
    out = stranger(tmp_path / "out", {"path": name, "state": "begun"})
    (out / "linked").symlink_to(tmp_path / "far")
    with pytest.raises(InputError, match="nothing"):
        OutputFolder.begin(out, {}, restart=True, layout="root")
    assert all(path.read_text() == "precious" for path in precious)


def test_J104_entries_of_another_shape_count_as_not_written(tmp_path: Path) -> None:
    whole = {"path": "a", "state": "done", "bytes": 1, "sha256": "x"}
    broken = [
        {"path": 3},
        {"path": ["a"]},
        {"path": "b"},
        {"path": "c", "state": 7},
        {"path": "d", "state": "done"},
        {"path": "e", "state": "done", "bytes": "1", "sha256": "x"},
        {"path": "f", "state": "done", "bytes": 1, "sha256": None},
        {"path": "g", "state": "done", "bytes": 1, "sha256": "x", "tensors": [1]},
    ]
    path = tmp_path / "files.jsonl"
    lines = [json.dumps(entry) for entry in [*broken, whole]]
    path.write_text("\n".join([*lines, "7", "[]", "null", "[" * 5000, "NaN"]) + "\n")
    journal = Journal(path)
    journal.read()
    assert journal.entries == {"a": whole}


@pytest.mark.parametrize("what", ["work", "tmq"])
def test_J105_a_linked_folder_of_the_output_is_refused(what: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / what).symlink_to(victim)
    with pytest.raises(InputError, match="symbolic link"):
        OutputFolder.begin(out, {}, restart=True, layout="root" if what == "work" else "tmq")
    assert [path.name for path in victim.iterdir()] == ["a"]


def test_J105_a_linked_folder_below_the_output_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    with OutputFolder.begin(tmp_path / "out", {}, layout="root") as out:
        (tmp_path / "out" / "sub").symlink_to(victim)
        with pytest.raises(InputError, match="symbolic link"):
            out.write("sub/deep/file", b"1")
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("kind", ["symbolic", "hard", "fifo"])
def test_J105_the_lock_empties_nothing(kind: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = tmp_path / "work" / "lock"
    lock.parent.mkdir()
    if kind == "symbolic":
        lock.symlink_to(victim)
    elif kind == "hard":
        os.link(victim, lock)
    else:
        os.mkfifo(lock)
    with pytest.raises(InputError, match="lock"):
        FolderLock(lock).acquire()
    assert victim.read_text() == "precious"


def test_J105_a_link_under_a_temporary_name_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    temp_path(tmp_path / "x").symlink_to(victim)
    atomic_write(tmp_path / "x", b"new")
    (tmp_path / "y").symlink_to(victim)
    atomic_write(tmp_path / "y", b"new")
    assert victim.read_text() == "precious"
    assert all((tmp_path / n).read_bytes() == b"new" and not (tmp_path / n).is_symlink() for n in "xy")


def test_J105_the_journal_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = stranger(tmp_path / "out")
    (out / "work" / "files.jsonl").unlink()
    (out / "work" / "files.jsonl").symlink_to(victim)
    with pytest.raises(InputError, match="symbolic link"):
        OutputFolder.begin(out, {}, layout="root")
    assert victim.read_text() == "precious"


# J107: nothing that has no end, or no other side, is ever waited for


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "notes.txt"])
def test_J107_no_special_file_of_a_source_is_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    (model / name).unlink(missing_ok=True)
    make_special(model / name, kind)
    with pytest.raises(InputError):
        read_bytes(model / name, 100)
    done = run("quantize", "awq", model, "-o", tmp_path / "o", "--preset", "rtn", *FAST)
    is_needed = name in ("model.safetensors", "config.json")  # rtn reads no text, so no tokenizer
    assert done.returncode == (3 if is_needed or kind == "device" else 0), done.stderr


def make_special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as place:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's name has room for 108 characters
            try:
                place.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


# J106: links of a source


@pytest.mark.parametrize("name", ["notes.txt", "extra.json", "model.safetensors", "tokenizer.json"])
def test_J106_links_that_leave_the_source_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = write_runnable(tmp_path / "m")
    secret = tmp_path / "secret"
    secret.write_bytes((model / name).read_bytes() if (model / name).is_file() else b"{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    for arguments in (
        ("awq", model, "-o", tmp_path / "o", "--preset", "rtn"),
        ("pack", model, "-o", tmp_path / "w"),
    ):
        done = run("quantize", *arguments)
        assert done.returncode == 3 and name in done.stderr and "symbolic link" in done.stderr
    assert not (tmp_path / "o").exists() and not (tmp_path / "w").exists()


def test_J106_links_inside_a_source_and_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(files_of(tmp_path / "m")):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(snapshot).config.num_layers == 2
    model = tmp_path / "m"
    (model / "model.safetensors").rename(model / "weights.bin2")
    (model / "model.safetensors").symlink_to("weights.bin2")
    assert open_checkpoint(model).block(0).index == 0


def test_J106_a_calibration_folder_gives_only_its_own_files(tmp_path: Path) -> None:
    from calib_data.readers import read_corpus

    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder / "a.txt")
    secret = tmp_path / "secret.txt"
    secret.write_text("private words")
    (folder / "b.txt").symlink_to(secret)
    with pytest.raises(InputError, match=r"b\.txt"):
        read_corpus(folder)
    (folder / "b.txt").unlink()
    os.mkfifo(folder / "c.txt")
    assert len(read_corpus(folder).documents) == 1
    with pytest.raises(InputError, match="FIFO"):
        read_corpus(folder / "c.txt")
    with pytest.raises(InputError, match="device"):
        read_corpus(Path("/dev/zero"))
