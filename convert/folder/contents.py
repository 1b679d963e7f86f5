"""What lies in a finished folder of ours beyond the manifest's list: run.json, report.json, and files that nobody listed."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from convert.errors import InputError
from convert.folder.json_files import show
from convert.folder.state import Manifest, base_of, read_signed

# Files that people and version control put beside a model and that no loader reads. Every other one is refused.
DOCUMENTS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf")
HOUSEKEEPING = (".gitattributes", ".gitignore", ".DS_Store")
HOUSEKEEPING_FOLDERS = (".git", ".cache")


def check_report(folder: Path, manifest: Manifest) -> None:
    """Raises InputError where report.json is damaged, of another run, or not there although the run wrote one."""
    has_report = manifest.data.get("has_report")
    if has_report is None:  # an earlier version, whose reports have no digest
        return
    path = base_of(folder) / "report.json"
    if path.is_file() != has_report:
        what = "is absent, but the run wrote one" if has_report else "is there, but the run wrote none"
        raise InputError(f"{show(str(path))} {what}. Copy the folder again.")
    if has_report and read_signed(path).get("run") != manifest.data["run"]["sha256"]:
        raise InputError(f"{show(str(path))} is the report of another run. Copy the folder again.")


def unlisted_files(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """(files that a loader could read, documents): relative names of what the manifest does not list."""
    base = base_of(folder).relative_to(folder)
    known = {PurePosixPath(name) for name in manifest.files}
    known |= {PurePosixPath(base / name) for name in ("run.json", "manifest.json", "report.json")}
    used: list[str] = []
    documents: list[str] = []
    for name in _names(folder):
        if PurePosixPath(name) in known:
            continue
        top, last = PurePosixPath(name).parts[0], PurePosixPath(name).name
        is_document = last in HOUSEKEEPING or last.lower().endswith(DOCUMENTS)
        (documents if is_document or top in HOUSEKEEPING_FOLDERS else used).append(name)
    return sorted(used), sorted(documents)


def _names(folder: Path) -> Iterator[str]:
    """Everything but plain folders, empty ones too: no link to a folder is followed, and each counts as an entry."""
    for place, folders, files in os.walk(folder):
        inner = Path(place).relative_to(folder)
        for name in files:
            yield str(inner / name)
        for name in folders:
            if (Path(place) / name).is_symlink() or not any((Path(place) / name).iterdir()):
                yield str(inner / name)
