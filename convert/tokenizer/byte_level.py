"""Byte-level BPE (GPT-2): its table of characters, its part of tokenizer.json, and merges recovered from an ordered vocabulary."""

from collections.abc import Mapping
from typing import Any

from convert.errors import InputError


def _characters() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + place) for place, byte in enumerate(others)}


CHARACTER_OF_BYTE = _characters()
BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}


LONGEST = 1024  # characters of a token that others join to; published ones have 16 to 128


def merges_of(rank: Mapping[str, int]) -> list[list[str]]:
    """Merges of a BPE vocabulary that states only a rank for each token: lower rank first.

    Such a BPE joins the neighbouring pair whose concatenation has the lowest rank, so every split of a token into two
    tokens is a merge with that token's rank.
    """
    found: list[tuple[int, int, int, list[str]]] = []
    for token, place in rank.items():
        if len(token) > LONGEST:
            raise InputError(
                f"the tokenizer has a token of {len(token):,} characters; at most {LONGEST:,} can be joined from others. Copy it again."
            )
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                found.append((place, rank[left], rank[right], [left, right]))
    found.sort(key=lambda entry: entry[:3])
    return [pair for *_, pair in found]


def bpe_document(vocab: Mapping[str, int], merges: list[Any], ignore_merges: bool = False) -> dict[str, Any]:
    """The entries of tokenizer.json that turn characters of bytes into tokens and back; nothing is put in front or behind.

    Args:
        ignore_merges: a piece that is a token as a whole stays one, whatever the merges say.
    """
    return {
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": merges,
        },
    }
