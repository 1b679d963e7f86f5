"""A tokenizer as GGUF metadata: the inverse of `convert.gguf.tokenizer`, and proved by it before a file is written.

llama.cpp knows pre-tokenizers by name; the name is found by comparing with the table that the reader uses. The metadata is
then read back, and both tokenizers must split the same texts into the same ids.
"""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show, show_value
from convert.gguf.tokenizer import NORMALIZERS, PRE_TOKENIZERS, WHOLE_TOKENS_FIRST, write_tokenizer
from convert.tokenizer.files import TokenizerFiles, read_tokenizer_files
from convert.tokenizer.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer

PROBES = (
    "Hello, world! It's a test: don't panic.",
    " leading and trailing  spaces   \n\n\tTabs\r\nand lines \n",
    "Numbers 1 12 123 1234 12345 3.14159 2024-01-31",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "Ünïcödé naïve café — “quotes” … 中文字符 日本語 한국어 🙂🎉 e\u0301",
    "MixedCASE snake_case camelCase www.example.org/path?query=1&x=%20",
    "'ll 've 'RE I'm we'd 'S",
    "a",
    "",
)
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


def tokenizer_fields(folder: Path, vocab_size: int, context: int) -> dict[str, Any]:
    """The keys `tokenizer.*` for the tokenizer of a model folder.

    Raises InputError where llama.cpp has no form for it, or the metadata would give other tokens.
    """
    files = read_tokenizer_files(folder)
    tokenizer = Tokenizer(files, str(folder))
    model = files.document["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(
            f"{show(str(folder))}: a tokenizer of the kind {show(str(model.get('type')))} has no form in GGUF here; known: BPE."
        )
    tokens, kinds = _tokens(files, vocab_size)
    is_sentencepiece = bool(model.get("byte_fallback"))
    fields: dict[str, Any] = {"tokenizer.ggml.model": "llama" if is_sentencepiece else "gpt2"}
    if is_sentencepiece:
        fields["tokenizer.ggml.pre"] = "default"
        fields["tokenizer.ggml.scores"] = _scores(model, tokens)
        fields["tokenizer.ggml.add_space_prefix"] = _adds_prefix(files.document)
    else:
        fields["tokenizer.ggml.pre"] = _pre_name(files.document, folder)
    fields["tokenizer.ggml.tokens"] = tokens
    fields["tokenizer.ggml.token_type"] = kinds
    if not is_sentencepiece:
        fields["tokenizer.ggml.merges"] = [_merge(pair) for pair in model["merges"]]
    ids = {text: index for index, text in enumerate(tokens)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        text = tokenizer.token_names.get(name)
        if text is not None and text in ids:
            fields[f"tokenizer.ggml.{key}_token_id"] = ids[text]
    fields["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None
    if files.chat_template is not None:
        fields["tokenizer.chat_template"] = files.chat_template
    _prove(fields, tokenizer, vocab_size, context, folder)
    return fields


def _tokens(files: TokenizerFiles, vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts and GGUF types by id; ids without a token become [PADi], unused."""
    document = files.document
    unknown = document["model"].get("unk_token")
    by_id: dict[int, tuple[str, int]] = {}
    for text, index in document["model"]["vocab"].items():
        kind = NORMAL
        if document["model"].get("byte_fallback") and _BYTE_PIECE.fullmatch(text):
            kind = BYTE
        elif text == unknown:
            kind = UNKNOWN
        by_id[index] = (text, kind)
    for entry in document.get("added_tokens") or []:
        kind = UNKNOWN if entry["content"] == unknown else CONTROL if entry["special"] else USER_DEFINED
        by_id[entry["id"]] = (entry["content"], kind)
    if max(by_id) >= vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {max(by_id)}, but the model has {vocab_size} embeddings: they belong to different models."
        )
    rows = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocab_size)]
    return [text for text, _ in rows], [kind for _, kind in rows]


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else f"{pair[0]} {pair[1]}"


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """A score for each token, by which llama.cpp chooses the next merge: the earlier a merge, the higher."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(model["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        rank.setdefault(left + right, place)
    last = len(model["merges"])
    return [-float(rank.get(token, last)) for token in tokens]


def _adds_prefix(document: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front, by a normalizer (Prepend) or a pre-tokenizer (Metaspace)."""
    text = str(document.get("normalizer")) + str(document.get("pre_tokenizer"))
    return "'Prepend'" in text or ("'Metaspace'" in text and "'never'" not in text)


def _steps(pre: Any) -> list[tuple[Any, ...]]:
    """A pre-tokenizer as a flat list of steps, reduced to what decides where it splits."""
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "ByteLevel":
        return [(kind, pre.get("add_prefix_space", True), pre.get("use_regex", True))]
    if kind == "Digits":
        return [(kind, pre.get("individual_digits", False))]
    if kind == "Split":
        return [(kind, str(pre["pattern"]), pre["behavior"], pre.get("invert", False))]
    return [(kind, str(pre))]


def _pre_name(document: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises InputError where the table has none."""
    wanted = _steps(document.get("pre_tokenizer"))
    normalizer = document.get("normalizer")
    whole = bool(document["model"].get("ignore_merges"))
    for name, steps in PRE_TOKENIZERS.items():
        if name == "default" or _steps({"type": "Sequence", "pretokenizers": steps}) != wanted:
            continue
        if NORMALIZERS.get(name) == normalizer and (name in WHOLE_TOKENS_FIRST) == whole:
            return name
    raise InputError(
        f"{show(str(folder))}: llama.cpp's name for this pre-tokenizer is not known here; known: {', '.join(PRE_TOKENIZERS)}. "
        "A wrong name would split text in another way, so no file is written."
    )


def _prove(
    fields: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int, context: int, folder: Path
) -> None:
    """Raises InputError where the metadata, read back, gives other ids for a text."""
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place), "the GGUF metadata", fields, vocab_size, context)
        again = load_tokenizer(place)
    texts = list(PROBES)
    if tokenizer.has_chat_template:
        texts += ["".join(f" {text} x" for text in sorted(tokenizer.token_names.values()))]
    for text in texts:
        ours, theirs = tokenizer.encode(text), again.encode(text)
        if ours != theirs:
            raise InputError(
                f"{show(str(folder))}: as GGUF metadata the tokenizer would split {show_value(text)} into {theirs[:8]} instead of "
                f"{ours[:8]}: this kind of tokenizer has no exact form there, so no file is written."
            )
