"""Tokens that files beside the tokenizer add to it: `added_tokens_decoder`, `added_tokens.json`, `additional_special_tokens`, bos, eos.

They get the ids that transformers gives them: a token that the vocabulary has keeps its id, others follow the last one in the order of
the ids that are stated for them. Where that is another id than the one stated, the tokenizer is refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show, show_value

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
MARKS = ("bos_token", "eos_token")  # these and the additional ones are added where the vocabulary lacks them


def complete_tokens(
    document: dict[str, Any], config: Mapping[str, Any], added: Mapping[str, Any], special: Mapping[str, Any]
) -> None:
    """Add to `document` (tokenizer.json) what it lacks.

    Args:
        config: tokenizer_config.json. added: added_tokens.json. special: special_tokens_map.json; both count only where `config` has
            no `added_tokens_decoder`.
    """
    # sentencepiece tokenizers cut added tokens out before a text is normalized, so that a space put in front hides none
    splits_first = _has_normalizer(document)
    decoder = config.get("added_tokens_decoder")
    stated = {key: value for key, value in config.items() if value is not None}
    names = stated if decoder else {**special, **stated}
    wanted: list[tuple[int | None, dict[str, Any]]] = []
    marked = _marked(names)
    if decoder:
        wanted += [(index, _entry(entry, entry)) for index, entry in sorted(_numbered(decoder).items())]
    elif added:
        for content, index in sorted(_indices(added).items(), key=lambda item: item[1]):
            is_special = content in marked
            wanted.append(
                (
                    index,
                    _entry(
                        content, {"special": is_special, "normalized": not is_special and not splits_first}
                    ),
                )
            )
    wanted += [(None, _entry(content, {"special": True})) for content in marked]
    listed = document.get("added_tokens")
    listed = listed if isinstance(listed, list) else []
    present = {entry["content"]: entry for entry in listed}
    vocabulary = _vocabulary(document)
    following = max([len(vocabulary), *(entry["id"] + 1 for entry in listed)])
    for wanted_id, entry in wanted:
        content = entry["content"]
        if content in present:
            if marked.get(content) and not present[content].get("special"):
                present[content]["special"] = True
            continue
        index = vocabulary.get(content, following)
        if wanted_id is not None and wanted_id != index:
            raise InputError(
                f"the tokenizer's files give the token {show(content)!r} the id {wanted_id}, but behind its vocabulary it gets {index}: tokens "
                "are missing, or the files are of different models. Copy the tokenizer again."
            )
        present[content] = entry | {"id": index}
        listed.append(present[content])
        following = max(following, index + 1)
    document["added_tokens"] = sorted(listed, key=lambda entry: entry["id"])


def special_names(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """The named special tokens: those of tokenizer_config.json, else of special_tokens_map.json."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    stated = {name: config[name] if config.get(name) is not None else special.get(name) for name in names}
    return {name: value for name, value in stated.items() if value is not None}


def _marked(names: Mapping[str, Any]) -> dict[str, bool]:
    """Texts of the tokens that must be single ids, in order."""
    values = [names.get(mark) for mark in MARKS]
    more = names.get("additional_special_tokens")
    more = more if more is not None else names.get("extra_special_tokens")
    values += more if isinstance(more, list) else list(more.values()) if isinstance(more, dict) else []
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {text: True for text in texts if isinstance(text, str) and text}


def _numbered(decoder: Any) -> dict[int, dict[str, Any]]:
    found = {}
    for key, entry in decoder.items() if isinstance(decoder, dict) else ():
        if not key.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(
                f"tokenizer_config.json: added_tokens_decoder has the broken entry {show(key)!r}."
            )
        found[int(key)] = entry
    return found


def _indices(added: Mapping[str, Any]) -> dict[str, int]:
    for content, index in added.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise InputError(
                f"added_tokens.json gives {show(content)!r} the id {show_value(index)}, expected a whole number. Copy it again."
            )
    return dict(added)


def _has_normalizer(document: Mapping[str, Any]) -> bool:
    """Whether the normalizer of the document changes spaces."""
    return '"Replace"' in json.dumps(document.get("normalizer"))


def _entry(content: Any, flags: Mapping[str, Any]) -> dict[str, Any]:
    text = content["content"] if isinstance(content, dict) else content
    return {"id": 0, "content": text, **{flag: bool(flags.get(flag, False)) for flag in FLAGS}}


def _vocabulary(document: Mapping[str, Any]) -> Mapping[str, int]:
    vocab = document["model"].get("vocab") if isinstance(document.get("model"), dict) else None
    if isinstance(vocab, dict):
        return vocab
    return {entry[0]: index for index, entry in enumerate(vocab)} if isinstance(vocab, list) else {}
