"""Datasets of the Hugging Face hub to documents, streamed through `datasets`. Only what is named is fetched; no scripts run."""

import hashlib
import json
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from calib_data.readers import SUFFIXES, TEXT_LIMIT_BYTES, Corpus, report_bad_records
from calib_data.records import Document, Unusable, document_of
from convert.errors import InputError

CHARACTERS_A_TOKEN = 8  # read about twice the text that the samples need


@dataclass(frozen=True)
class HubDataset:
    """What to ask the hub for. `files` names single files where the whole would be far too much."""

    name: str
    split: str
    subset: str | None = None
    files: str | None = None


PRESETS = {
    "wikitext2": HubDataset("Salesforce/wikitext", "train", subset="wikitext-2-raw-v1"),
    "c4": HubDataset("allenai/c4", "train", files="en/c4-train.00000-of-01024.json.gz"),
    "pileval": HubDataset("mit-han-lab/pile-val-backup", "validation"),
}
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w]+)?")


def parse_name(source: str) -> HubDataset | None:
    """A preset, or owner/name or owner/name:split; None for anything else."""
    if source in PRESETS:
        return PRESETS[source]
    if HUB_NAME.fullmatch(source):
        name, _, split = source.partition(":")
        return HubDataset(name, split or "train")
    return None


def read_dataset(dataset: HubDataset, column: str, tokens_wanted: int) -> Corpus:
    """Documents of the first rows, enough for `tokens_wanted`. Raises InputError without network or for a wrong name."""
    limit = min(TEXT_LIMIT_BYTES, max(2**20, tokens_wanted * CHARACTERS_A_TOKEN))
    corpus = Corpus(dataset.name)
    digest = hashlib.sha256()
    bad: list[str] = []
    seen = 0
    try:
        rows = open_dataset(
            dataset.name, dataset.subset, split=dataset.split, data_files=dataset.files, streaming=True
        )
        for row in rows:
            document = document_of(row, column)
            seen += 1
            if isinstance(document, Unusable):
                bad.append(f"row {seen - 1}: {document.reason}")
                if len(bad) > 100:
                    break
                continue
            corpus.bytes_read += _add(document, f"row {seen - 1}", corpus, digest)
            if corpus.bytes_read >= limit:
                break
    except InputError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises many unrelated types; each means that this name gave no text
        raise InputError(
            f"the dataset {dataset.name} (split {dataset.split}) could not be read: {_first_line(error)}\n"
            f"Without a network give local text instead: --calib-data FILE or FOLDER ({', '.join(SUFFIXES)}), or leave "
            f"--calib-data out: the model then writes its own calibration text. A dataset that needs a loading script "
            f"is not run: download it as parquet or jsonl and name that file."
        ) from error
    report_bad_records(dataset.name, bad, seen, corpus)
    if not corpus.documents:
        raise InputError(f"the dataset {dataset.name} (split {dataset.split}) holds no text.")
    corpus.sha256 = digest.hexdigest()
    return corpus


def open_dataset(name: str, subset: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`; where the hub's name does not resolve, at once and from the local cache alone, without retries."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    try:
        socket.getaddrinfo(host.hostname, host.port or 443)
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    verbosity = huggingface_hub.logging.get_verbosity()
    huggingface_hub.logging.set_verbosity_error()  # a failure is told once, by us
    try:
        return datasets.load_dataset(name, subset, **options)
    finally:
        huggingface_hub.logging.set_verbosity(verbosity)


def _add(document: Document, place: str, corpus: Corpus, digest: "hashlib._Hash") -> int:
    text = document if isinstance(document, str) else json.dumps(document, default=str)
    raw = text.encode("utf-8", "surrogatepass")
    digest.update(raw)
    corpus.add(document, place)
    return len(raw)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no further word'}"
