"""GGUF files that hold something else than a model, told as what they are."""

from collections.abc import Mapping
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import show, show_value

KINDS = {
    "adapter": "a LoRA adapter, not a model: merge it into its base model first",
    "mmproj": "the image part of a model: give the file of its language model",
    "imatrix": "statistics of llama.cpp (an importance matrix), not a model",
}


def refuse_other_kinds(file: str, fields: Mapping[str, Any]) -> None:
    """Raises InputError where the file says that it is no model."""
    kind = fields.get("general.type", "model")
    if kind != "model":
        told = KINDS.get(kind) if isinstance(kind, str) else None
        raise InputError(f"{show(file)} is {told or f'of the kind {show_value(kind)}, not a model'}.")
