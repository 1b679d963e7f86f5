"""What an output folder is (finished, unfinished, foreign), and its manifest read and checked. Writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.files import file_digests, json_bytes, sha256_bytes, temp_path
from convert.folder.json_files import INDEX_LIMIT, parse_object, read_bytes, read_object, show, show_value
from convert.folder.paths import is_inner_name

FORMAT = 1
TOOL = "turbomind-quant"
OUR_FILES = ("run.json", "manifest.json", "report.json")


class FolderState(Enum):
    """What a folder is to us. ABSENT: it does not exist or holds nothing."""

    ABSENT = "absent"
    FINISHED = "finished"
    UNFINISHED = "unfinished"
    FOREIGN = "foreign"


def base_of(folder: Path) -> Path:
    """The folder of run.json and manifest.json: the root where they name us there, else tmq/ where it is there."""
    tmq = folder / "tmq"
    return tmq if tmq.is_dir() and not _names_us(folder) else folder


def folder_state(folder: Path) -> FolderState:
    """Finished, unfinished, foreign or absent; decided by run.json and manifest.json alone.

    Raises InputError for a folder that says it is ours but whose run.json is absent or damaged: it is never taken for foreign.
    """
    if not folder.exists():
        return FolderState.ABSENT
    base = base_of(folder)
    if _claims_to_be_ours(base):
        _check_run_file(base / "run.json")
        return FolderState.FINISHED if (base / "manifest.json").is_file() else FolderState.UNFINISHED
    # a start that was killed before its first file leaves nothing but the lock
    skeleton = {"tmq", "work", "lock", temp_path(Path("run.json")).name}
    if all(path.name in skeleton for path in folder.rglob("*")):
        return FolderState.ABSENT
    return FolderState.FOREIGN


def _claims_to_be_ours(base: Path) -> bool:
    """Whether anything here says that a run of ours made it: our files in tmq/, our name in a file at the root, or our journal."""
    if (base / "work" / "files.jsonl").is_file():
        return True
    if base.name == "tmq":
        return any((base / name).is_file() for name in OUR_FILES)
    return _names_us(base)


def _names_us(folder: Path) -> bool:
    """Whether a file that a run of ours leaves at the root has our name in it: a single damaged byte does not hide all of them."""
    paths = [folder / name for name in OUR_FILES if (folder / name).is_file()]
    return any(TOOL.encode() in read_bytes(path, INDEX_LIMIT) for path in paths)


def _check_run_file(run_file: Path) -> None:
    where, cure = (
        show(str(run_file)),
        "Copy the folder again, or remove it and give the command that made it again.",
    )
    if not run_file.is_file():
        raise InputError(
            f"{where} is absent, but other files of the folder say that a run of ours made it. {cure}"
        )
    try:
        raw = read_object(run_file)
    except InputError as error:
        raise InputError(
            f"{where} is damaged ({error}), so this folder can be neither read nor resumed. {cure}"
        ) from error
    if raw.get("tool") != TOOL:
        raise InputError(
            f"{where} names the tool {show_value(raw.get('tool'))}, expected {TOOL!r}: it was edited or damaged. {cure}"
        )


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and is intact. `data` is the whole document."""

    data: dict[str, Any]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Relative path -> {bytes, sha256, tensors}."""
        return {entry["path"]: entry for entry in self.data["files"]}

    @property
    def kind(self) -> str:
        """What the folder is: "awq", "hf", "workspace", "statistics"."""
        return str(self.data.get("kind"))

    def check_sizes(self, folder: Path) -> None:
        """Raises InputError naming every listed file that is absent or has another size."""
        wrong = []
        for name, entry in self.files.items():
            path = folder / name
            if not path.is_file():
                wrong.append(f"{show(name)} is absent")
            elif path.stat().st_size != entry["bytes"]:
                wrong.append(f"{show(name)} has {path.stat().st_size:,} bytes, expected {entry['bytes']:,}")
        if wrong:
            raise InputError(
                f"{show(str(folder))} does not match its manifest: {'; '.join(wrong[:5])}{'; ...' if len(wrong) > 5 else ''}. "
                "Copy it again, or give the command that made it again."
            )

    def check_digests(self, folder: Path) -> None:
        """Raises InputError naming every listed file whose content is not what was written."""
        self.check_sizes(folder)
        self.compare(folder, file_digests(folder / name for name in self.files))

    def compare(self, folder: Path, digests: Mapping[Path, str]) -> None:
        """Raises InputError naming every file whose sha256 is not the listed one; files that are not listed pass."""
        listed = {folder / name: entry["sha256"] for name, entry in self.files.items()}
        wrong = [path for path, digest in digests.items() if listed.get(path, digest) != digest]
        if wrong:
            names = ", ".join(show(str(path.relative_to(folder))) for path in wrong[:5])
            raise InputError(
                f"{show(str(folder))}: the content of {names} is not what the manifest lists (sha256). Copy it again, or give the "
                "command that made it again."
            )


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json of a finished folder, and that run.json is the one it was written with.

    Raises InputError when one of them is damaged or edited, or the manifest is newer than us.
    """
    base = base_of(folder)
    manifest = Manifest(read_manifest_file(base / "manifest.json"))
    run = manifest.data.get("run")
    if run is not None and run != file_facts(read_bytes(base / "run.json", INDEX_LIMIT)):
        raise InputError(
            f"{show(str(base / 'run.json'))} is not the file that the manifest was written with (sha256). Copy it again, or give "
            "the command that made it again."
        )
    return manifest


def refuse_unfinished(folder: Path) -> None:
    """Raises InputError where the folder is an output of ours that has no manifest yet."""
    if folder_state(folder) is FolderState.UNFINISHED:
        raise InputError(
            f"{show(str(folder))} is an unfinished output: its manifest is missing. Give the command that was writing it "
            "again and it will resume, or discard it with --restart."
        )


def refuse_statistics(folder: Path) -> None:
    """Raises InputError where the folder holds what `quantize calibrate` wrote, which is given as a model by mistake."""
    if folder_state(folder) is FolderState.FINISHED and read_manifest(folder).kind == "statistics":
        raise InputError(
            f"{show(str(folder))} holds the calibration statistics of a model, no model: they are for `quantize awq MODEL --preset "
            f"fast --stats {show(str(folder))}`."
        )


def read_manifest_file(path: Path) -> dict[str, Any]:
    """The manifest, whose every byte is as it was written. Raises InputError otherwise."""
    where = show(str(path))
    data = read_signed(path)
    if data.get("format") != FORMAT:
        raise InputError(
            f"{where} has format {show_value(data.get('format'))}, this version reads {FORMAT}. Use the version that wrote it."
        )
    files = data.get("files")
    if not isinstance(files, list):
        raise InputError(f"{where} lists no files. Copy it again.")
    names = set()
    for entry in files:
        name = entry.get("path") if isinstance(entry, dict) else None
        if not is_inner_name(name) or name in names:
            raise InputError(
                f"{where} lists {show_value(name)}: expected a path inside the folder, once. It was tampered with."
            )
        names.add(name)
        size, tensors = entry.get("bytes"), entry.get("tensors", {})
        if type(size) is not int or not isinstance(entry.get("sha256"), str) or not isinstance(tensors, dict):
            raise InputError(f"{where}: the entry of {show(str(name))} lacks bytes or sha256. Copy it again.")
    return data


@reading("a file of ours")
def read_signed(path: Path) -> dict[str, Any]:
    """A JSON object of ours with its own digest. Raises InputError where a byte is not as `json_bytes` wrote it."""
    where = show(str(path))
    raw = read_bytes(path, INDEX_LIMIT)
    data = parse_object(raw, where)
    try:
        is_whole = data.get("digest") == self_digest(data) and json_bytes(data) == raw
    except (ValueError, RecursionError):  # NaN or a lone surrogate, which no file of ours holds
        is_whole = False
    if not is_whole:
        raise InputError(
            f"{where} was edited or damaged: its own digest does not match. Copy it again from the source."
        )
    return data


def self_digest(data: Mapping[str, Any]) -> str:
    """sha256 of the document without its field `digest`."""
    return sha256_bytes(json_bytes({key: value for key, value in data.items() if key != "digest"}))


def file_facts(raw: bytes) -> dict[str, Any]:
    """What identifies a file: its bytes and sha256."""
    return {"bytes": len(raw), "sha256": sha256_bytes(raw)}
