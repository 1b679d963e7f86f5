"""`qwen.tiktoken` as a tokenizer.json document, without the code that usually reads it.

A line holds the base64 of a token's bytes and its rank. Qwen-1 adds its control tokens behind the last rank: end of text, start
and end of a chat turn, and 205 reserved ones.
"""

import base64
import binascii
from typing import Any

from convert.errors import InputError
from convert.tokenizer.byte_level import CHARACTER_OF_BYTE, bpe_document, merges_of

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tiktoken_document(raw: bytes, name: str) -> dict[str, Any]:
    """Bytes of a qwen.tiktoken -> tokenizer.json document. Raises InputError naming a broken line."""
    ranks: dict[str, int] = {}
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            ranks["".join(CHARACTER_OF_BYTE[byte] for byte in token)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(
                f"{name}, line {number}: expected base64 and a rank ({error}). Copy it again."
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{name}: its ranks are not 0, 1, 2, ... without a gap. Copy it again.")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(ranks) + place,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for place, token in enumerate(CONTROL)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        **bpe_document(ranks, merges_of(ranks)),
    }
