"""Output folders that are finished, unfinished (ours) or foreign, and never look like another of these.

The first file is run.json (the fingerprint), the last is manifest.json (every file with its digest). Both lie in the
subfolder tmq/ of an AWQ checkpoint and at the root of a workspace or of statistics; so does work/, which holds the lock and
the journal of what is written, and is removed before the manifest is written. No time, host or path stands in the manifest.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from convert.errors import InputError
from convert.folder.files import (
    FolderLock,
    atomic_write,
    atomic_write_all,
    json_bytes,
    make_folder,
    remove_temporaries,
    safetensors_chunks,
    sha256_file,
    sync_folder,
    temp_path,
    write_failure,
)
from convert.folder.journal import Journal
from convert.folder.json_files import INDEX_LIMIT, open_regular, read_bytes, read_failure, read_object, show
from convert.folder.paths import create_file, refuse_link, refuse_linked_parents
from convert.folder.same_run import refuse_other_run
from convert.folder.state import (
    FORMAT,
    TOOL,
    FolderState,
    Manifest,
    base_of,
    file_facts,
    folder_state,
    read_manifest,
    read_manifest_file,
    self_digest,
)

__all__ = ["FolderState", "Layout", "Manifest", "OutputFolder", "base_of", "folder_state", "read_manifest"]

Layout = Literal["tmq", "root"]


class OutputFolder:
    """An output folder while it is being written. Use as a context manager: it holds the folder's lock.

    `resumed`: an earlier, equal run had begun. `finished`: that run had only its manifest's name to change, which is done now.
    """

    def __init__(self, folder: Path, layout: Layout, lock: FolderLock) -> None:
        self.folder, self.layout = folder, layout
        self.base = folder / "tmq" if layout == "tmq" else folder
        self.work = self.base / "work"
        self.resumed = False
        self.finished = False
        self._lock = lock
        self._journal = Journal(self.work / "files.jsonl")

    @classmethod
    def begin(
        cls,
        folder: Path,
        fingerprint: Mapping[str, Any],
        *,
        restart: bool = False,
        layout: Layout = "tmq",
        accept_finished: bool = False,
    ) -> "OutputFolder":
        """Start or resume. The fingerprint is a flat JSON object; field names appear in messages.

        Args:
            accept_finished: a folder that an equal run has finished is given as it is, for a command that goes on from there.

        Raises InputError when the folder is finished, foreign, in use, or unfinished with another fingerprint.
        """
        base = folder / "tmq" if layout == "tmq" else folder
        if accept_finished and folder_state(folder) is FolderState.FINISHED:
            refuse_other_run(
                read_object(base / "run.json", INDEX_LIMIT).get("fingerprint"),
                json.loads(json_bytes(fingerprint)),
                folder,
            )
            out = cls(folder, layout, FolderLock(base / "work" / "lock"))
            out.finished = True
            return out
        _refuse_occupied(folder)
        for place in (folder / "tmq", base / "work"):
            refuse_link(place)
        make_folder(base)
        out = cls(folder, layout, FolderLock(base / "work" / "lock"))
        out._lock.acquire()
        try:
            out._start(json.loads(json_bytes(fingerprint)), restart)
        except BaseException:
            out.close()
            raise
        return out

    def _start(self, fingerprint: dict[str, Any], restart: bool) -> None:
        state = _refuse_occupied(self.folder)  # again, now that nobody else can change it
        if state is FolderState.UNFINISHED and restart:
            self._discard()
            state = FolderState.ABSENT
        if state is FolderState.UNFINISHED:
            run = read_object(self.base / "run.json", INDEX_LIMIT)
            refuse_other_run(run.get("fingerprint"), fingerprint, self.folder)
            self.resumed = True
            if self._complete_rename():
                return
            self._journal.read()
        self._clean()
        if not self.resumed:
            run = {"tool": TOOL, "format": FORMAT, "fingerprint": fingerprint}
            atomic_write(self.base / "run.json", json_bytes(run))

    def _clean(self) -> None:
        for place in {self.folder, self.base, self.work, *self._parents()}:
            remove_temporaries(place)

    def _parents(self) -> set[Path]:
        return {
            (self.folder / name).parent
            for name in self._journal.entries
            if (self.folder / name).parent.is_dir()
        }

    def write(self, name: str, data: bytes | list[bytes], tensors: Mapping[str, Any] | None = None) -> None:
        """Write a file of the output atomically and note it, with its digest, in the journal. `name` is relative, with /."""
        self._write(name, data if isinstance(data, bytes) else b"".join(data), tensors)

    def write_chunks(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """As `write`, of bytes that come in pieces; what goes wrong while they are made leaves no file."""
        self._write(name, chunks, None)

    def _write(self, name: str, data: Any, tensors: Mapping[str, Any] | None) -> None:
        self._write_all([name], [(name, data, tensors)])

    def _write_all(
        self, names: Collection[str], files: Iterable[tuple[str, Any, Mapping[str, Any] | None]]
    ) -> None:
        """Write the files `names`: one note before them all, and one with their digests when all are on disk."""
        refuse_linked_parents(self.folder, names)
        for parent in {(self.folder / name).parent for name in names}:
            make_folder(parent)
        self._journal.note([{"path": name, "state": "begun"} for name in names])
        entries: dict[str, dict[str, Any]] = {}

        def contents() -> Iterator[tuple[Path, Any]]:
            for name, data, tensors in files:
                entries[name] = {"path": name} | ({} if tensors is None else {"tensors": dict(tensors)})
                yield self.folder / name, data
                del data  # before the next file is made

        for path, (size, digest) in atomic_write_all(contents()).items():
            entries[str(path.relative_to(self.folder))] |= {"bytes": size, "sha256": digest, "state": "done"}
        self._journal.note(list(entries.values()))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json_bytes(value))

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file; the same tensors give the same bytes."""
        self._write(name, safetensors_chunks(tensors), {k: _described(t) for k, t in sorted(tensors.items())})

    def save_raw(self, names: Collection[str], files: Iterable[tuple[str, Tensor]]) -> None:
        """Write tensors as files of their bytes, little-endian and row-major, without a header; `names` are those that come."""

        def described() -> Iterator[tuple[str, Any, dict[str, Any]]]:
            for name, tensor in files:
                yield name, [_raw(tensor)], {"": _described(tensor)}
                del tensor  # before the next one is made

        self._write_all(names, described())

    def copy(self, source: Path, name: str) -> None:
        """Copy a file into the output, byte for byte."""

        def chunks() -> Iterator[bytes]:
            with open_regular(source) as file:
                while chunk := _read_chunk(file, source):
                    yield chunk

        self._write(name, chunks(), None)

    def has(self, name: str) -> bool:
        """Whether the file is done: written by this or an earlier run, with the size and digest of the journal."""
        entry = self._journal.entries.get(name)
        path = self.folder / name
        if entry is None or entry["state"] != "done" or not path.is_file():
            return False
        return bool(path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"])

    def written(self) -> dict[str, dict[str, Any]]:
        """Path -> journal entry of every file that is done, by path."""
        return {
            name: entry for name, entry in sorted(self._journal.entries.items()) if entry["state"] == "done"
        }

    def finish(self, facts: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> None:
        """Remove the working state and write the manifest: its `facts` plus the list of files. Ends with the lock released.

        `report` (seconds, memory: what differs between equal runs) goes to report.json, which the manifest does not list: that
        file has a digest of its own, and the digest of run.json, so that one of another run is noticed.
        """
        run = file_facts(read_bytes(self.base / "run.json", INDEX_LIMIT))
        if report is not None:
            signed = {**json.loads(json_bytes(report)), "run": run["sha256"]}
            atomic_write(self.base / "report.json", json_bytes(signed | {"digest": self_digest(signed)}))
        files = [
            {key: value for key, value in entry.items() if key != "state"}
            for entry in self.written().values()
        ]
        data = {**json.loads(json_bytes(facts)), "format": FORMAT, "tool": TOOL, "files": files, "run": run}
        data["has_report"] = report is not None
        data["digest"] = self_digest(data)
        # Under its temporary name the manifest is complete before the journal goes: a kill in between loses nothing.
        path = self.base / "manifest.json"
        try:
            with create_file(temp_path(path)) as file:
                file.write(json_bytes(data))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.base)
        except OSError as error:
            raise write_failure(path, error) from error
        self._complete_rename()

    def _complete_rename(self) -> bool:
        path = self.base / "manifest.json"
        temp = temp_path(path)
        if not temp.is_file():
            return False
        try:
            Manifest(read_manifest_file(temp)).check_sizes(self.folder)
        except InputError:  # it was being written when the run was killed: the journal is still whole
            temp.unlink()
            return False
        self._lock.release()
        try:
            shutil.rmtree(self.work, ignore_errors=False)
            temp.replace(path)
            sync_folder(self.base)
        except OSError as error:
            raise write_failure(path, error) from error
        self.finished = True
        return True

    def close(self) -> None:
        """Release the lock; what is done stays for the next run."""
        self._lock.release()

    def __enter__(self) -> "OutputFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _discard(self) -> None:
        """Remove what the unfinished run wrote, and nothing else."""
        self._journal.read()
        refuse_linked_parents(self.folder, self._journal.entries)
        self._clean()
        for name in self._journal.entries:
            if not (self.folder / name).is_dir():  # a folder of that name is none of ours
                (self.folder / name).unlink(missing_ok=True)
        self._journal.entries = {}
        for path in self.work.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.base / "run.json").unlink()
        sync_folder(self.base)


def _read_chunk(file: BinaryIO, source: Path) -> bytes:
    """The next piece of a file that is copied. A fault of the source is told of the source, not of the output."""
    try:
        return file.read(2**22)
    except OSError as error:
        raise read_failure(source, error) from error


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    data: memoryview = flat.numpy().data
    return data


def _described(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _refuse_occupied(folder: Path) -> FolderState:
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"the output {show(str(folder))} is a file: expected a folder that is absent, empty or unfinished."
        )
    state = folder_state(folder)
    if state is FolderState.FINISHED:
        raise InputError(
            f"the output folder {show(str(folder))} is finished already; nothing was touched. Choose another one, or remove it."
        )
    if state is FolderState.FOREIGN:
        raise InputError(
            f"the output folder {show(str(folder))} holds files that are not ours; nothing was touched. Choose an empty or new one."
        )
    return state
