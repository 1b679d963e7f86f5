"""Finds the tokenizer of a model folder and turns it into one tokenizer.json document, whatever file it came in.

tokenizer.json, else tokenizer.model (sentencepiece), else qwen.tiktoken. A tokenizer that exists only as code is refused,
naming the file that would run; with `trust_remote_code` transformers runs it, and only its tokenizer.json form is taken.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.boundary import reading
from convert.folder.json_files import INDEX_LIMIT, parse_object, read_bytes, read_object, show
from convert.tokenizer.added_tokens import complete_tokens, special_names
from convert.tokenizer.sentencepiece import parse_model, sentencepiece_document
from convert.tokenizer.tiktoken import tiktoken_document

TEMPLATE_LIMIT = 2**18  # bytes
NAMES = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")  # the first that is there counts


@dataclass(frozen=True)
class TokenizerFiles:
    """`document`: tokenizer.json. `config`: tokenizer_config.json. `add_bos`: what the config says, None: the document's rule."""

    document: dict[str, Any]
    config: dict[str, Any]
    add_bos: bool | None
    eos_ids: tuple[int, ...]  # from generation_config.json and config.json
    names: Mapping[
        str, Any
    ]  # the special tokens by name, as tokenizer_config.json or special_tokens_map.json states them
    chat_template: str | None


@reading("the tokenizer")
def read_tokenizer_files(folder: Path, trust_remote_code: bool = False) -> TokenizerFiles:
    """Raises InputError when there is no tokenizer, only code, or damaged files."""
    config = _optional(folder / "tokenizer_config.json")
    stated = config.get("add_bos_token")
    add_bos = stated if isinstance(stated, bool) else None
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        document = parse_object(read_bytes(path, INDEX_LIMIT), show(str(path)))
    elif (folder / "tokenizer.model").is_file():
        path = folder / "tokenizer.model"
        model = parse_model(read_bytes(path, INDEX_LIMIT), show(str(path)))
        document = sentencepiece_document(model, legacy=config.get("legacy", True) is not False)
        _add_tokens(document, config)
        add_bos = (
            add_bos is not False
        )  # sentencepiece models of our families begin with a BOS unless told otherwise
    elif (folder / "qwen.tiktoken").is_file():
        path = folder / "qwen.tiktoken"
        document = tiktoken_document(read_bytes(path, INDEX_LIMIT), show(str(path)))
        add_bos = False
    else:
        document = _from_code(folder, config, trust_remote_code)
    special = _optional(folder / "special_tokens_map.json")
    complete_tokens(document, config, _optional(folder / "added_tokens.json"), special)
    names = special_names(config, special)
    return TokenizerFiles(document, config, add_bos, _eos_ids(folder), names, _chat_template(folder, config))


def has_tokenizer_file(folder: Path) -> bool:
    """Whether there is a tokenizer that can be read without running code."""
    return any((folder / name).is_file() for name in NAMES)


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path, INDEX_LIMIT) if path.is_file() else {}


def _from_code(folder: Path, config: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    auto_map = config.get("auto_map")
    names = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
    code = next((n for n in (names if isinstance(names, list) else [names]) if isinstance(n, str)), None)
    scripts = sorted(path.name for path in folder.glob("tokenization*.py"))
    if code is None and not scripts:
        raise InputError(
            f"{show(str(folder))} has no tokenizer: expected tokenizer.json, tokenizer.model or qwen.tiktoken. Copy it from the "
            "model's source."
        )
    shown = show(code.split(".")[0] + ".py" if code else scripts[0])
    if not trusted:
        raise InputError(
            f"the tokenizer in {show(str(folder))} exists only as code: {shown} would run. Read that file; if you trust it, give "
            "--trust-remote-code, or bring a tokenizer.json."
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{shown} gives a tokenizer without a tokenizer.json form, which is not supported. Convert it first."
        )
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def _add_tokens(document: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Control tokens that tokenizer_config.json adds to a sentencepiece model (`added_tokens_decoder`)."""
    added = config.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return
    present = {entry["id"]: entry for entry in document["added_tokens"]}
    for key, entry in added.items():
        if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(
                f"tokenizer_config.json: added_tokens_decoder has the broken entry {show(key)!r}."
            )
        flags = {
            flag: bool(entry.get(flag, False))
            for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        present[int(key)] = {"id": int(key), "content": entry["content"], **flags}
        _rename(document["model"], int(key), entry["content"])
    document["added_tokens"] = [present[index] for index in sorted(present)]


def _rename(model: dict[str, Any], index: int, content: str) -> None:
    """Give a reserved piece of the vocabulary ("[UNUSED_TOKEN_146]" of InternLM2) the text that the config gives its id."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        if index < len(vocab):
            vocab[index][0] = content
        return
    old = next((piece for piece, place in vocab.items() if place == index), None)
    if old is not None and old != content:
        del vocab[old]
        vocab[content] = index
        model["merges"] = [
            pair for pair in model["merges"] if old not in (pair[0], pair[1], pair[0] + pair[1])
        ]


def _eos_ids(folder: Path) -> tuple[int, ...]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _optional(folder / name).get("eos_token_id")
        items = value if isinstance(value, list) else [value]
        ids += [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
    return tuple(dict.fromkeys(ids))


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, None without one. Raises InputError where it is no text or no template."""
    return _chat_template(folder, _optional(folder / "tokenizer_config.json"))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return read_bytes(path, TEMPLATE_LIMIT).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{show(str(path))} is not UTF-8 text.") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if isinstance(template, str) and len(template.encode()) > TEMPLATE_LIMIT:
        raise InputError(
            f"the chat template in tokenizer_config.json is above {TEMPLATE_LIMIT:,} bytes: it is no template."
        )
    return template if isinstance(template, str) else None
