"""Local text files to documents: txt, jsonl, json, parquet and folders of them. Knows nothing of tokens or models.

Reading stops at TEXT_LIMIT_BYTES, so a corpus of any size is read in bounded memory; the rest is counted as unread.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from calib_data.parquet import column_values
from calib_data.records import Document, Unusable, document_of
from convert.errors import InputError
from convert.folder.json_files import open_regular, read_failure, show
from convert.folder.paths import refuse_leaving_links

TEXT_LIMIT_BYTES = 64 * 2**20
BAD_LINE_SHARE = 0.05  # more unusable lines than this stop the run
TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw", ".utf8")
LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json", ".parquet")
NOTHING = object()  # in place of a record where a line is empty


@dataclass
class Corpus:
    """Documents of one source: plain text, or chats as lists of {"role", "content"}. `sha256` covers the bytes read.

    `places`: where each document stands, as messages name it ("line 31"); "" for a whole file.
    """

    name: str
    documents: list[Document] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    sha256: str = ""
    bytes_read: int = 0
    bytes_unread: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, document: Document, place: str = "") -> None:
        """Take in a document."""
        self.documents.append(document)
        self.places.append(place)


def read_corpus(path: Path, column: str = "text", limit: int = TEXT_LIMIT_BYTES) -> Corpus:
    """Documents of a file or of every text file under a folder, in sorted order. Raises InputError with what is wrong."""
    files = _text_files(path)
    corpus = Corpus(path.name or str(path))
    digest = hashlib.sha256()
    for file in files:
        size = _size_bytes(file)
        room = limit - corpus.bytes_read
        if room <= 0:
            corpus.bytes_unread += size
            continue
        _refuse_disguise(file)
        if file.suffix.lower() == ".parquet":
            used = _read_parquet(file, column, corpus, digest, room)
        elif file.suffix.lower() in (*LINE_SUFFIXES, ".json"):
            used = _read_lines(file, column, corpus, digest, room)
        else:
            used = _read_text(file, corpus, digest, room)
        corpus.bytes_read += used
        corpus.bytes_unread += max(0, size - used)
    if corpus.bytes_unread:
        corpus.notes.append(
            f"{corpus.name}: the first {corpus.bytes_read / 2**20:.0f} MiB are used, "
            f"{corpus.bytes_unread / 2**20:.0f} MiB are left unread."
        )
    if not any(_has_text(document) for document in corpus.documents):
        raise InputError(
            f"{path} holds no text: it is empty or white space only. Give a file with prose in it."
        )
    corpus.sha256 = digest.hexdigest()
    return corpus


def _has_text(document: Document) -> bool:
    return bool(document.strip()) if isinstance(document, str) else bool(document)


def _text_files(path: Path) -> list[Path]:
    if not path.is_dir():
        with open_regular(path):  # raises for what is absent, and for a device or a FIFO
            return [path]
    entries = [f for f in path.rglob("*") if f.is_symlink() or f.suffix.lower() in SUFFIXES]
    refuse_leaving_links(path, [f for f in entries if f.suffix.lower() in SUFFIXES or f.is_dir()])
    files = sorted(f for f in entries if f.is_file() and f.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"the folder {path} holds no text file ({', '.join(SUFFIXES)}).")
    return files


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file, buffered; a read that fails is told as bad input or a lost disk."""
    with open_regular(file) as raw:
        stream = BufferedReader(raw)  # type: ignore[type-var]
        try:
            yield stream  # type: ignore[misc]
        except OSError as error:
            raise read_failure(file, error) from error


def _refuse_disguise(file: Path) -> None:
    """Raises InputError for bytes that are no UTF-8 text whatever the name says."""
    with _opened(file) as stream:
        head = stream.read(4)
    if head[:2] == b"\x1f\x8b":
        raise InputError(f"{file} is a gzip file: unpack it first (gunzip), then give the text.")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{file} is UTF-16 (it starts with a byte order mark): save it as UTF-8.")
    if head == b"PAR1" and file.suffix.lower() != ".parquet":
        raise InputError(f"{file} is a parquet file: give it the suffix .parquet.")


def _decode(raw: bytes, file: Path, where: str, base: int = 0) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file} is not UTF-8: byte {base + error.start}{where} is 0x{raw[error.start]:02x}. Save it as UTF-8."
        ) from error


def _read_text(file: Path, corpus: Corpus, digest: Any, room: int) -> int:
    with _opened(file) as stream:
        raw = stream.read(room)
        cut = bool(stream.read(1))
    digest.update(raw)
    used = len(raw)
    if cut:  # do not end inside a character
        while raw and raw[-1] & 0xC0 == 0x80:
            raw = raw[:-1]
        raw = raw[:-1] if raw and raw[-1] >= 0xC0 else raw
    text = _decode(raw, file, "").removeprefix("\ufeff")
    lines = text.count("\n")
    if (
        lines and text.count("\r\n") == lines
    ):  # an editor or a checkout for Windows changed every line end of the same text
        text = text.replace("\r\n", "\n")
        corpus.notes.append(f"{file}: its {lines:,} line ends are CR LF; they are read as LF.")
    corpus.add(text)
    return used


def _read_lines(file: Path, column: str, corpus: Corpus, digest: Any, room: int) -> int:
    """JSON lines, or a .json file holding one list of records."""
    bad: list[str] = []
    seen = used = 0
    for where, record, size in _records(file, digest, room):
        used += size
        if record is NOTHING:
            continue
        seen += 1
        document = record if isinstance(record, Unusable) else document_of(record, column)
        if isinstance(document, Unusable):
            bad.append(f"{where}: {document.reason}")
        else:
            corpus.add(document, where)
    report_bad_records(str(file), bad, seen, corpus)
    return used


def report_bad_records(name: str, bad: list[str], seen: int, corpus: Corpus) -> None:
    """Note skipped records, or raise InputError where they are more than BAD_LINE_SHARE of `seen`."""
    if not bad:
        return
    shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if len(bad) > BAD_LINE_SHARE * seen:
        raise InputError(
            f"{name}: {len(bad)} of {seen} records are unusable ({shown}). Mend the file, or name the column that "
            f"holds the text with --text-column."
        )
    corpus.skipped += len(bad)
    corpus.notes.append(f"{name}: {len(bad)} of {seen} records skipped ({shown}).")


def _records(file: Path, digest: Any, room: int) -> Iterator[tuple[str, Any, int]]:
    """(place, record, Unusable or NOTHING, bytes used) of each record."""
    with _opened(file) as stream:
        if file.suffix.lower() == ".json":
            raw = stream.read(room + 1)
            if len(raw) > room:
                raise InputError(
                    f"{file} is over {room} bytes in one JSON document: save it as JSON lines (.jsonl)."
                )
            digest.update(raw)
            yield "", NOTHING, len(raw)
            try:
                document = json.loads(_decode(raw, file, ""))
            except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
                raise InputError(f"{file} is not JSON: {show(str(error))}.") from error
            for number, record in enumerate(document if isinstance(document, list) else [document]):
                yield f"record {number}", record, 0
            return
        used = 0
        for number, raw in enumerate(iter(lambda: stream.readline(room + 1), b""), start=1):
            used += len(raw)
            if used > room:
                break
            digest.update(raw)
            text = _decode(raw, file, f" (line {number})", used - len(raw)).removeprefix("\ufeff")
            if not text.strip():
                yield f"line {number}", NOTHING, len(raw)
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                record = Unusable("not JSON")
            yield f"line {number}", record, len(raw)


def _read_parquet(file: Path, column: str, corpus: Corpus, digest: Any, room: int) -> int:
    bad: list[str] = []
    seen = used = 0
    for name, value in column_values(file, (column, "messages", "conversations")):
        document = document_of({name: value}, column)
        raw = json.dumps(value, default=str).encode()
        digest.update(raw)
        used += len(raw)
        if isinstance(document, Unusable):
            bad.append(f"row {seen}: {document.reason}")
        else:
            corpus.add(document, f"row {seen}")
        seen += 1
        if used >= room:
            break
    report_bad_records(str(file), bad, seen, corpus)
    return used
