"""Checkpoints that hold a language model and more: vision-language models, by architecture. Names and keys; knows no files.

The language model is read as the family that its part of config.json names. All other tensors are carried through as they are.
"""

from collections.abc import Container as Names
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convert.config import Tree
from convert.errors import InputError

# Where the language model lies: before "embed_tokens", in the order in which they are looked for. The first is that of
# transformers from 4.52 on, the others are older.
ROOTS = ("model.language_model.", "language_model.model.", "model.")
HEADS = ("lm_head", "language_model.lm_head")


@dataclass(frozen=True)
class Container:
    """`texts`: model_type of the language model's part -> our family; the first is meant where the part names none."""

    architecture: str
    model_types: tuple[str, ...]
    texts: Mapping[str, str]
    key: str = "text_config"
    tied: bool | None = None  # where config.json does not say; None: by whether there is a head


CONTAINERS = (
    Container(
        "Qwen2VLForConditionalGeneration", ("qwen2_vl",), {"qwen2_vl_text": "qwen2", "qwen2_vl": "qwen2"}
    ),
    Container(
        "Qwen2_5_VLForConditionalGeneration",
        ("qwen2_5_vl",),
        {"qwen2_5_vl_text": "qwen2", "qwen2_5_vl": "qwen2"},
    ),
    Container("Qwen3VLForConditionalGeneration", ("qwen3_vl",), {"qwen3_vl_text": "qwen3"}),
    Container(
        "Gemma3ForConditionalGeneration",
        ("gemma3",),
        {"gemma3_text": "gemma3", "gemma3": "gemma3"},
        tied=True,
    ),
    Container("Mistral3ForConditionalGeneration", ("mistral3",), {"mistral": "mistral"}),
    Container(
        "LlavaForConditionalGeneration",
        ("llava",),
        {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"},
    ),
)


def container_of(raw: Mapping[str, Any]) -> Container | None:
    """The row of a parsed config.json, None for a plain language model."""
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for row in CONTAINERS:
        if row.architecture in names or (not names and raw.get("model_type") in row.model_types):
            return row
    return None


def language_part(raw: Mapping[str, Any], row: Container) -> tuple[Mapping[str, Any], str]:
    """config.json as a plain language model would have it, and its family. Raises InputError for one that no family computes."""
    nested = raw.get(row.key)
    inner = dict(nested) if isinstance(nested, dict) else {}
    kind = inner.get("model_type", raw.get("model_type") if not inner else next(iter(row.texts)))
    if not isinstance(kind, str) or kind not in row.texts:
        raise InputError(
            f"config.json: the language model of {row.architecture} is {str(kind)[:80]!r}; known there: "
            f"{', '.join(row.texts)}."
        )
    outside = (
        "quantization_config",
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    )
    shared = {key: raw[key] for key in outside if key in raw}
    own = (
        dict(raw)
        if not inner
        else shared | {k: v for k, v in inner.items() if k not in shared or v is not None}
    )
    if "tie_word_embeddings" in raw:
        own["tie_word_embeddings"] = raw["tie_word_embeddings"]
    elif "tie_word_embeddings" not in own and row.tied is not None:
        own["tie_word_embeddings"] = row.tied
    return own, row.texts[kind]


def find_tree(row: Container, raw: Mapping[str, Any], tensors: Names[str]) -> Tree:
    """Where these tensors hold the language model. Raises InputError where no known place has an embedding."""
    root = next((root for root in ROOTS if f"{root}embed_tokens.weight" in tensors), None)
    if root is None:
        raise InputError(
            f"The checkpoint lacks the embedding of a {row.architecture} model, looked for as "
            f"{', '.join(root + 'embed_tokens.weight' for root in ROOTS)}. Copy the missing shard."
        )
    head = next((head for head in HEADS if f"{head}.weight" in tensors), HEADS[0])
    key = row.key if isinstance(raw.get(row.key), dict) else None
    return Tree(row.architecture, root + "layers.{i}.", root + "embed_tokens", root + "norm", head, key)
