"""The tokenizer of a GGUF file, rebuilt from its metadata as tokenizer.json.

Two things are taken from the metadata and nowhere else: whether a BOS is put in front (`add_bos_token`), and how text is
split before the merges (`pre`), for instance into single digits. A splitter that is not in the table is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.files import atomic_write, write_json
from convert.folder.json_files import show, show_value
from convert.tokenizer.byte_level import bpe_document
from convert.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    sentencepiece_document,
)

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = {**_BYTES, "use_regex": True}  # use_regex is the splitter of GPT-2
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> list[dict[str, Any]]:
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _BYTES]


_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# `tokenizer.ggml.pre` -> pre-tokenizers in order, as in the tokenizer.json of the models that have that name
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "default": [_GPT2],
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "starcoder": [_DIGITS, _GPT2],
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
    # other names of these, as llama.cpp knows them
    "llama-v3": _split(_LLAMA3),
    "falcon3": _split(_LLAMA3),
    "smaug-bpe": _split(_LLAMA3),
    "deepseek-r1-qwen": _split(_QWEN2),
    "megrez": _split(_QWEN2),
    "phi-2": [_GPT2],
    "mellum": [_GPT2],
    "refact": [_DIGITS, _GPT2],
    "command-r": [_DIGITS, _GPT2],
    "codeshell": [_DIGITS, _GPT2],
}
# pre-tokenizers whose models begin with a BOS where the file does not say
ADD_BOS_DEFAULT = {"llama-bpe", "llama3", "llama-v3", "falcon3"}
# a piece that is a token as it stands is not built by merges
WHOLE_TOKENS_FIRST = {"llama-bpe", "llama3", "llama-v3", "falcon3"}
NORMALIZERS = {"qwen2": {"type": "NFC"}}


def write_tokenizer(
    folder: Path, file: str, fields: Mapping[str, Any], vocab_size: int, context: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template. Raises InputError on an unknown tokenizer."""
    model = fields.get("tokenizer.ggml.model")
    tokens = fields.get("tokenizer.ggml.tokens")
    if model not in ("gpt2", "llama"):
        raise InputError(
            f"{show(file)}: its tokenizer is of the kind {show_value(model)}; known: gpt2 (byte-level BPE) and llama "
            "(sentencepiece). Use the model's safetensors."
        )
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab_size:
        raise InputError(
            f"{show(file)}: its tokenizer has no token list, or more tokens than the {vocab_size} embeddings."
        )
    kinds = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise InputError(
            f"{show(file)}: {len(tokens)} tokens but {len(kinds)} token types. Download it again."
        )
    special = _special_tokens(file, fields, tokens)
    add_bos = _add_bos(fields)
    if model == "llama":
        document = _sentencepiece_document(file, fields, tokens, kinds)
    else:
        document = _bpe_document(file, fields, tokens, kinds)
    document["post_processor"] = _template(
        special, add_bos, bool(fields.get("tokenizer.ggml.add_eos_token", False))
    )
    write_json(folder / "tokenizer.json", document)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": add_bos,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            **{f"{name}_token": text for name, (_, text) in special.items()},
        },
    )
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        atomic_write(folder / "chat_template.jinja", template.encode())


def _add_bos(fields: Mapping[str, Any]) -> bool:
    stated = fields.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return (
        fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in ADD_BOS_DEFAULT
    )


def _sentencepiece_document(
    file: str, fields: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{show(file)}: its sentencepiece tokenizer has no scores. Download it again.")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    pieces = SentencePieceModel(tokens, scores, kinds, "bpe", BYTE in kinds, add_dummy_prefix=bool(prefix))
    return sentencepiece_document(pieces)


def _special_tokens(file: str, fields: Mapping[str, Any], tokens: list[str]) -> dict[str, tuple[int, str]]:
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        if not 0 <= index < len(tokens):
            raise InputError(f"{show(file)}: {key}_token_id {index} lies outside its {len(tokens)} tokens.")
        found[name] = (int(index), tokens[index])
    return found


def _bpe_document(
    file: str, fields: Mapping[str, Any], tokens: list[str], kinds: list[int]
) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise InputError(
            f"{show(file)}: its pre-tokenizer {show_value(pre)} is unknown; known: {', '.join(PRE_TOKENIZERS)}. Splitting text in "
            "another way would change the tokens. Use the model's safetensors."
        )
    merges = [merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges", [])]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise InputError(
            f"{show(file)}: its BPE tokenizer has no merges, or damaged ones. Download it again."
        )
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind in (CONTROL, UNKNOWN),
        }
        for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre]},
        **bpe_document(
            {token: index for index, token in enumerate(tokens)}, merges, pre in WHOLE_TOKENS_FIRST
        ),
    }


def _template(special: Mapping[str, tuple[int, str]], add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """The step that puts BOS in front and EOS behind, or None where the file asks for neither."""
    front = [special["bos"]] if add_bos and "bos" in special else []
    behind = [special["eos"]] if add_eos and "eos" in special else []
    if not front and not behind:
        return None

    def pieces(*sequences: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        for number, name in enumerate(sequences):
            listed += [{"SpecialToken": {"id": text, "type_id": number}} for _, text in front]
            listed.append({"Sequence": {"id": name, "type_id": number}})
            listed += [{"SpecialToken": {"id": text, "type_id": number}} for _, text in behind]
        return listed

    return {
        "type": "TemplateProcessing",
        "single": pieces("A"),
        "pair": pieces("A", "B"),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in front + behind},
    }
