"""The small files of a model folder beside its weights (configuration, tokenizer, templates), as they were when it was opened.

A run reads its source once: what is copied or read again later must have the digest that it had at first.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.files import sha256_bytes, sha256_file
from convert.folder.json_files import CONFIG_LIMIT, INDEX_LIMIT, parse_object, read_bytes, read_failure, show
from convert.folder.paths import refuse_leaving_links

PATTERNS = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates/*.jinja"  # named templates, as transformers saves them
WEIGHTS = "*.safetensors"
SKIPPED_FOLDERS = ("tmq", ".git", ".cache", "work", "triton_models")
LISTED = 10_000  # entries of subfolders that are counted


class SourceFiles:
    """Names are relative to the folder. `left_out`: subfolders with files that no output takes over, and how many."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = self._found()
        self._digests = {str(path.relative_to(folder)): sha256_file(path) for path in paths}
        self.left_out = self._others()

    @property
    def names(self) -> list[str]:
        """Every small file, in order."""
        return sorted(self._digests)

    def _found(self) -> list[Path]:
        try:
            if not self.folder.is_dir():
                return []
            matching = {path for pattern in (*PATTERNS, TEMPLATES) for path in self.folder.glob(pattern)}
            refuse_leaving_links(self.folder, [*matching, *self.folder.glob(WEIGHTS)])
            refuse_leaving_links(self.folder, {path.parent for path in matching} - {self.folder})
            return sorted(path for path in matching if path.is_file())
        except OSError as error:
            raise read_failure(self.folder, error) from error

    def _others(self) -> list[str]:
        counts: Counter[str] = Counter()
        for place in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if place.is_dir() and not place.is_symlink() and place.name not in SKIPPED_FOLDERS:
                for path, _ in zip(place.rglob("*"), range(LISTED), strict=False):
                    is_copied = str(path.relative_to(self.folder)) in self._digests
                    counts[place.name] += path.is_file() and not is_copied
        return [f"{show(name)}/ ({count} files)" for name, count in counts.items() if count]

    def read(self, name: str, limit: int = INDEX_LIMIT) -> bytes:
        """The bytes of a file. Raises InputError where they are not those that the folder was opened with."""
        raw = read_bytes(self.folder / name, limit)
        self._compare(name, sha256_bytes(raw))
        return raw

    def read_object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, as `read`."""
        return parse_object(self.read(name, CONFIG_LIMIT), show(str(self.folder / name)))

    def check(self, name: str | None = None) -> None:
        """Raises InputError where a file (None: one of them) was changed or removed since the folder was opened."""
        for each in self.names if name is None else [name]:
            self._compare(each, sha256_file(self.folder / each))

    def contents(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, in one piece, for a writer that asks for them only when it is there."""
        yield self.read(name)

    def _compare(self, name: str, digest: str) -> None:
        if self._digests.get(name) != digest:
            raise InputError(
                f"{show(str(self.folder / name))} was changed while it was in use. Wait until nothing writes to the source, then "
                "start again."
            )
