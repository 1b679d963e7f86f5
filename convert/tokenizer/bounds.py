"""What a tokenizer.json may ask of its library: rules that make a text grow without end are refused before it is built."""

from collections.abc import Iterator, Mapping
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show

GROWTH_LIMIT = 256  # times that the rules of the normalizer may lengthen a text; published ones replace one character by one


def refuse_growth(document: Mapping[str, Any], name: str) -> None:
    """Raises InputError where the replacements of the document, one after the other, could blow a text up."""
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for rule in _rules(document.get(part)):
            for key in ("content", "prepend", "replacement"):
                text = rule.get(key)
                growth = min(growth * max(1, len(text) if isinstance(text, str) else 1), 2.0 * GROWTH_LIMIT)
    if growth > GROWTH_LIMIT:
        raise InputError(
            f"the tokenizer of {show(name)} replaces characters by ever longer texts (together more than {GROWTH_LIMIT} times as long): "
            "it would fill the memory. Use the model's own tokenizer."
        )


def _rules(part: Any) -> Iterator[Mapping[str, Any]]:
    """Every rule of a normalizer, pre-tokenizer or decoder, those in sequences too."""
    waiting = [part]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += [item for item in value.values() if isinstance(item, dict | list)]
        elif isinstance(value, list):
            waiting += value
