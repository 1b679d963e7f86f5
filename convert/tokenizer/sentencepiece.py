"""A sentencepiece model (`tokenizer.model`, or the same data in a GGUF file) as a tokenizer.json document.

Reads the few protobuf fields it needs itself: no generated code, nothing is executed. Field numbers are those of
sentencepiece_model.proto. Behaves as the models' published fast tokenizers: every stretch of text between control tokens gets
one space in front (`legacy`), or the first alone.
"""

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from convert.errors import InputError
from convert.tokenizer.byte_level import merges_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces in order of their ids. `kind`: how pieces are joined. `charsmap`: sentencepiece's own normalization rules."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    kind: Literal["bpe", "unigram"] = "bpe"
    byte_fallback: bool = True
    add_dummy_prefix: bool = True
    remove_extra_spaces: bool = False
    charsmap: bytes = b""


def parse_model(raw: bytes, name: str) -> SentencePieceModel:
    """Bytes of a tokenizer.model -> its contents. Raises InputError when they are none."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    kind, fallback, prefix, extra, charsmap = 1, 0, 1, 1, b""
    seen = set()
    try:
        for number, value in _fields(raw):
            seen.add(number)
            if number == 1:
                piece = dict(_fields(_bytes(value)))
                pieces.append(_bytes(piece[1]).decode())
                scores.append(float(struct.unpack("<f", _bytes(piece[2]))[0]) if 2 in piece else 0.0)
                types.append(_integer(piece.get(3, NORMAL)))
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
                kind, fallback = _integer(trainer.get(3, 1)), _integer(trainer.get(35, 0))
            elif number == 3:
                normalizer = dict(_fields(_bytes(value)))
                prefix, extra = _integer(normalizer.get(3, 1)), _integer(normalizer.get(4, 1))
                charsmap = _bytes(normalizer.get(2, b""))
        if not {2, 3} <= seen:  # they stand behind the pieces
            raise ValueError("its training and normalization settings are absent: it may be cut short")
    except (ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} is no sentencepiece model, or it is damaged ({error}). Copy it again."
        ) from error
    if not pieces or kind not in (1, 2):
        raise InputError(f"{name} is no sentencepiece model of the kinds BPE or unigram. Copy it again.")
    return SentencePieceModel(
        pieces,
        scores,
        types,
        "bpe" if kind == 2 else "unigram",
        bool(fallback),
        bool(prefix),
        bool(extra),
        charsmap,
    )


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message: varints as int, everything else as bytes. Raises ValueError on damage."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(raw, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(raw):
            raise ValueError("it is cut short")
        yield number, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            break
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
    raise ValueError("it is cut short")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text was expected")
    return value


def _integer(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number was expected")
    return value


def sentencepiece_document(model: SentencePieceModel, legacy: bool = True) -> dict[str, Any]:
    """The tokenizer.json document of the model, without a step that adds BOS."""
    added = [
        {
            "id": index,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    unknown = next((i for i, kind in enumerate(model.types) if kind == UNKNOWN), None)
    normalizers: list[dict[str, Any]] = []
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_extra_spaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "never" if not model.add_dummy_prefix else "always" if legacy else "first"
    pre: dict[str, Any] | None = None
    if scheme == "first":
        pre = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    else:
        if scheme == "always":
            normalizers.append({"type": "Prepend", "prepend": SPACE})
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": pre,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(model, unknown) if model.kind == "bpe" else _unigram(model, unknown),
    }


def _bpe(model: SentencePieceModel, unknown: int | None) -> dict[str, Any]:
    joinable = {
        piece: place
        for place, (_, piece) in enumerate(
            sorted(
                (-score, piece)
                for piece, score, kind in zip(model.pieces, model.scores, model.types, strict=True)
                if kind in (NORMAL, UNUSED, USER_DEFINED)
            )
        )
    }
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unknown is None else model.pieces[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: index for index, piece in enumerate(model.pieces)},
        "merges": merges_of(joinable),
    }


def _unigram(model: SentencePieceModel, unknown: int | None) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": [[piece, score] for piece, score in zip(model.pieces, model.scores, strict=True)],
        "byte_fallback": model.byte_fallback,
    }
