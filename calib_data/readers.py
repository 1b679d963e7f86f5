"""Local text files to documents: txt, jsonl, json, parquet and folders of them. Knows nothing of tokens or models.

Reading stops at TEXT_LIMIT_BYTES, so a corpus of any size is read in bounded memory; the rest is counted as unread.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.errors import InputError

TEXT_LIMIT_BYTES = 64 * 2**20
BAD_LINE_SHARE = 0.05  # more unusable lines than this stop the run
TEXT_SUFFIXES = (".txt", ".text", ".md", ".raw", ".utf8")
LINE_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".json", ".parquet")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # of the "conversations" form

Messages = list[dict[str, str]]
Document = str | Messages


@dataclass(frozen=True)
class Unusable:
    """A record without text, and why."""

    reason: str


@dataclass
class Corpus:
    """Documents of one source: plain text, or chats as lists of {"role", "content"}. `sha256` covers the bytes read."""

    name: str
    documents: list[Document] = field(default_factory=list)
    sha256: str = ""
    bytes_read: int = 0
    bytes_unread: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)


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
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES)
        if not files:
            raise InputError(f"the folder {path} holds no text file ({', '.join(SUFFIXES)}).")
        return files
    raise InputError(f"{path} does not exist: give a text file ({', '.join(SUFFIXES)}) or a folder of them.")


def _size_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error


def _refuse_disguise(file: Path) -> None:
    """Raises InputError for bytes that are no UTF-8 text whatever the name says."""
    try:
        with file.open("rb") as stream:
            head = stream.read(4)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
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
    with file.open("rb") as stream:
        raw = stream.read(room)
        cut = bool(stream.read(1))
    digest.update(raw)
    used = len(raw)
    if cut:  # do not end inside a character
        while raw and raw[-1] & 0xC0 == 0x80:
            raw = raw[:-1]
        raw = raw[:-1] if raw and raw[-1] >= 0xC0 else raw
    corpus.documents.append(_decode(raw, file, "").removeprefix("\ufeff"))
    return used


def _read_lines(file: Path, column: str, corpus: Corpus, digest: Any, room: int) -> int:
    """JSON lines, or a .json file holding one list of records."""
    bad: list[str] = []
    seen = used = 0
    for where, record in _records(file, digest, room):
        if isinstance(record, int):
            used = record
            continue
        seen += 1
        document = record if isinstance(record, Unusable) else document_of(record, column)
        if isinstance(document, Unusable):
            bad.append(f"{where}: {document.reason}")
        else:
            corpus.documents.append(document)
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


def _records(file: Path, digest: Any, room: int) -> Iterator[tuple[str, Any]]:
    """(place, record or Unusable) of each record; at the end ("", bytes used)."""
    with file.open("rb") as stream:
        if file.suffix.lower() == ".json":
            raw = stream.read(room + 1)
            if len(raw) > room:
                raise InputError(
                    f"{file} is over {room} bytes in one JSON document: save it as JSON lines (.jsonl)."
                )
            digest.update(raw)
            try:
                document = json.loads(_decode(raw, file, ""))
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{file} is not JSON: {error}.") from error
            for number, record in enumerate(document if isinstance(document, list) else [document]):
                yield f"record {number}", record
            yield "", len(raw)
            return
        used = 0
        for number, raw in enumerate(iter(lambda: stream.readline(room + 1), b""), start=1):
            if used + len(raw) > room:
                break
            used += len(raw)
            digest.update(raw)
            text = _decode(raw, file, f" (line {number})", used - len(raw)).removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                yield f"line {number}", json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                yield f"line {number}", Unusable("not JSON")
        yield "", used


def document_of(record: Any, column: str) -> Document | Unusable:
    """The text or the chat of one record: its `column`, else "messages" or "conversations"."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return Unusable(f"{type(record).__name__} instead of an object")
    if column in record:
        value = record[column]
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            return Unusable(
                f'"{column}" is {"null" if value is None else type(value).__name__} instead of text'
            )
        return _messages(value, column)
    for name in ("messages", "conversations"):
        if isinstance(record.get(name), list):
            return _messages(record[name], name)
    found = ", ".join(sorted(map(str, record))[:8]) or "none"
    return Unusable(f'no column "{column}" (found: {found})')


def _messages(turns: list[Any], name: str) -> Messages | Unusable:
    messages: Messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            return Unusable(f'"{name}" holds {type(turn).__name__} instead of messages')
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return Unusable(f'a message of "{name}" lacks role or content')
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages if messages else Unusable(f'"{name}" is empty')


def _read_parquet(file: Path, column: str, corpus: Corpus, digest: Any, room: int) -> int:
    import pyarrow
    from pyarrow import parquet

    bad: list[str] = []
    seen = used = 0
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        wanted = next((n for n in (column, "messages", "conversations") if n in names), None)
        if wanted is None:
            raise InputError(
                f'{file} has no column "{column}" (found: {", ".join(names[:12])}): name it with --text-column.'
            )
        for batch in table.iter_batches(batch_size=256, columns=[wanted]):
            for value in batch.column(0).to_pylist():
                if used >= room:
                    break
                document = document_of({wanted: value}, column)
                size = len(json.dumps(value).encode())
                digest.update(json.dumps(value).encode())
                used += size
                if isinstance(document, Unusable):
                    bad.append(f"row {seen}: {document.reason}")
                else:
                    corpus.documents.append(document)
                seen += 1
            if used >= room:
                break
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as parquet: {error}") from error
    report_bad_records(str(file), bad, seen, corpus)
    return used
