"""`load_blocks`: any source of calibration text to token blocks with provenance. Never loads a model.

Sources: None or "generated" (the model writes it), a text file or folder, a preset of the hub (wikitext2, c4, pileval),
or owner/name[:split] of the hub.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from calib_data.blocks import CalibrationSet, check_vocabulary, coverage, sample_blocks, tokens_digest
from calib_data.generated import SOURCE, Generate, generate_blocks, generated_rule
from calib_data.hub import PRESETS, parse_name, read_dataset
from calib_data.readers import BAD_LINE_SHARE, SUFFIXES, Corpus, read_corpus, report_bad_records
from calib_data.records import Messages
from convert.errors import InputError

SEPARATOR = "\n\n"  # between documents; a single text file stays as it stands


class Tokenizes(Protocol):
    """What is asked of a tokenizer: plain text to ids without BOS, and a chat to ids by the model's own template."""

    def encode_plain(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]: ...

    def digest(self) -> str: ...


@dataclass(frozen=True)
class TextRequest:
    """Which text, and how much of it. `source` None means that the model writes it."""

    source: str | None
    samples: int
    seqlen: int
    seed: int
    column: str = "text"
    allow_fewer: bool = False

    @property
    def is_generated(self) -> bool:
        return self.source is None or self.source == SOURCE


@dataclass(frozen=True)
class Vocabulary:
    """What sampling must know of the model: its size, ids that are no ordinary text, and the BOS that its rule adds."""

    size: int
    special_ids: tuple[int, ...] = ()
    bos: int | None = None
    warnings: tuple[str, ...] = field(default=())


def load_blocks(
    request: TextRequest, tokenizer: Tokenizes, vocabulary: Vocabulary, generate: Generate | None = None
) -> CalibrationSet:
    """Token blocks of a source. Raises InputError saying what is wrong with it and what to give instead."""
    if request.is_generated:
        if generate is None:
            raise InputError(
                "no calibration text was given and nothing can write it: pass --calib-data FILE."
            )
        tokens = generate_blocks(
            generate,
            vocabulary.size,
            vocabulary.special_ids,
            vocabulary.bos,
            request.samples,
            request.seqlen,
            request.seed,
        )
        return finish_set(tokens, generated_rule(vocabulary.bos), request, tokenizer, vocabulary, [])
    corpus = find_corpus(request)
    ids = corpus_ids(corpus, tokenizer)
    if not ids.numel():
        raise InputError(f"{corpus.name} gives no tokens: give text with words in it.")
    check_vocabulary(ids, vocabulary.size, corpus.name)
    tokens, rule = sample_blocks(
        ids, request.samples, request.seqlen, request.seed, request.allow_fewer, corpus.name
    )
    origin = {
        "source": corpus.name,
        "sha256": corpus.sha256,
        "bytes": corpus.bytes_read,
        "bytes_unread": corpus.bytes_unread,
        "documents": len(corpus.documents),
        "records_skipped": corpus.skipped,
        "tokens_total": int(ids.numel()),
        "sampling": rule,
    }
    return finish_set(tokens, origin, request, tokenizer, vocabulary, corpus.notes)


def finish_set(
    tokens: Tensor,
    origin: dict[str, Any],
    request: TextRequest,
    tokenizer: Tokenizes,
    vocabulary: Vocabulary,
    notes: list[str],
) -> CalibrationSet:
    """Check the blocks and complete their provenance."""
    check_vocabulary(tokens, vocabulary.size, str(origin["source"]))
    record, warnings = coverage(tokens, vocabulary.size)
    provenance = {
        **origin,
        "samples": int(tokens.shape[0]),
        "seqlen": int(tokens.shape[1]),
        "seed": request.seed,
        "tokens_sha256": tokens_digest(tokens),
        "tokenizer_sha256": tokenizer.digest(),
        "coverage": record,
    }
    return CalibrationSet(tokens, provenance, [*notes, *warnings])


def find_corpus(request: TextRequest) -> Corpus:
    """Read the named source: an existing path first, then a preset or a hub name."""
    source = str(request.source)
    path = Path(source).expanduser()
    if path.exists():
        return read_corpus(path, request.column)
    dataset = parse_name(source)
    if dataset is not None:
        return read_dataset(dataset, request.column, request.samples * request.seqlen)
    raise InputError(
        f'the calibration text "{source}" is neither a file or folder here nor a known dataset. Choices: a text file '
        f"or a folder ({', '.join(SUFFIXES)}); {', '.join(PRESETS)}, or owner/name[:split] (fetched from the "
        f"Hugging Face hub); or leave --calib-data out, and the model writes its own text."
    )


def corpus_ids(corpus: Corpus, tokenizer: Tokenizes) -> Tensor:
    """Ids (T,) int64 of the whole corpus: text joined by blank lines without BOS, each chat rendered by the template.

    A chat that the template refuses is skipped, counted and named. Raises InputError where they are more than the share of
    records that may be unusable.
    """
    ids: list[int] = []
    plain: list[str] = []
    refused: list[str] = []
    for document, place in zip(corpus.documents, corpus.places, strict=True):
        if isinstance(document, str):
            plain.append(document)
            continue
        if plain:
            ids.extend(tokenizer.encode_plain(SEPARATOR.join(plain)))
            plain = []
        try:
            ids.extend(tokenizer.apply_chat_template(document, add_generation_prompt=False))
        except InputError as error:
            refused.append(f"{place}: {error}")
            if len(refused) > BAD_LINE_SHARE * len(corpus.documents):
                break  # what is left cannot change that
    report_bad_records(corpus.name, refused, len(corpus.documents), corpus)
    if plain:
        ids.extend(tokenizer.encode_plain(SEPARATOR.join(plain)))
    return torch.tensor(ids, dtype=torch.int64)
