"""What an output folder is (finished, unfinished, foreign), and its manifest read and checked. Writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from convert.errors import InputError
from convert.folder.files import file_digests, json_bytes, sha256_bytes, temp_path
from convert.folder.json_files import INDEX_LIMIT, read_object, show

FORMAT = 1
TOOL = "turbomind-quant"


class FolderState(Enum):
    """What a folder is to us. ABSENT: it does not exist or holds nothing."""

    ABSENT = "absent"
    FINISHED = "finished"
    UNFINISHED = "unfinished"
    FOREIGN = "foreign"


def base_of(folder: Path) -> Path:
    """The folder of run.json and manifest.json: tmq/ where it is there, else the root."""
    tmq = folder / "tmq"
    return tmq if tmq.is_dir() else folder


def folder_state(folder: Path) -> FolderState:
    """Finished, unfinished, foreign or absent; decided by run.json and manifest.json alone."""
    if not folder.exists():
        return FolderState.ABSENT
    base = base_of(folder)
    if _is_ours(base / "run.json"):
        return FolderState.FINISHED if (base / "manifest.json").is_file() else FolderState.UNFINISHED
    # a start that was killed before its first file leaves nothing but the lock
    skeleton = {"tmq", "work", "lock", temp_path(Path("run.json")).name}
    if all(path.name in skeleton for path in folder.rglob("*")):
        return FolderState.ABSENT
    return FolderState.FOREIGN


def _is_ours(run_file: Path) -> bool:
    if not run_file.is_file():
        return False
    try:
        return bool(read_object(run_file).get("tool") == TOOL)
    except InputError as error:
        if run_file.parent.name == "tmq":
            raise InputError(
                f"{show(str(run_file))} is damaged ({error}), so this folder can be neither read nor resumed. Remove the folder "
                "and start again."
            ) from error
        return False


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
    """Read and check manifest.json of a finished folder. Raises InputError when it is damaged, edited or newer than us."""
    return Manifest(read_manifest_file(base_of(folder) / "manifest.json"))


def refuse_statistics(folder: Path) -> None:
    """Raises InputError where the folder holds what `quantize calibrate` wrote, which is given as a model by mistake."""
    if folder_state(folder) is FolderState.FINISHED and read_manifest(folder).kind == "statistics":
        raise InputError(
            f"{show(str(folder))} holds the calibration statistics of a model, no model: they are for `quantize awq MODEL --preset "
            f"fast --stats {show(str(folder))}`."
        )


def read_manifest_file(path: Path) -> dict[str, Any]:
    data = read_object(path, INDEX_LIMIT)
    where = show(str(path))
    if data.get("format") != FORMAT:
        raise InputError(
            f"{where} has format {show(repr(data.get('format')))}, this version reads {FORMAT}. Use the version that wrote it."
        )
    if data.get("digest") != self_digest(data):
        raise InputError(
            f"{where} was edited or damaged: its own digest does not match. Copy it again from the source."
        )
    files = data.get("files")
    if not isinstance(files, list):
        raise InputError(f"{where} lists no files. Copy it again.")
    for entry in files:
        name = entry.get("path") if isinstance(entry, dict) else None
        pure = PurePosixPath(name) if isinstance(name, str) else None
        if not pure or pure.is_absolute() or ".." in pure.parts or "\0" in str(name):
            raise InputError(
                f"{where} lists {show(repr(name))}: expected a path inside the folder. It was tampered with."
            )
        if type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise InputError(f"{where}: the entry of {show(str(name))} lacks bytes or sha256. Copy it again.")
    return data


def self_digest(data: Mapping[str, Any]) -> str:
    return sha256_bytes(json_bytes({key: value for key, value in data.items() if key != "digest"}))
