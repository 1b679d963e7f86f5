"""A float checkpoint of a named shape with random weights, its tokenizer and a text, written quickly: for timing whole commands.

Weights are drawn on the GPU where there is one, one shard a block. The words of the text are the tokens of the tokenizer, drawn at
random. A few channels of each norm are large, as in trained models, so that the search of channel scales has something to find.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_checkpoints import document, shapes
from torch import Tensor

from engine.model.random_weights import SHAPES

LARGE_CHANNELS, LARGE = 8, 12.0  # of a norm, and how large


def write_random_source(folder: Path, shape: str, layers: int | None, dtype: str = "float16") -> Path:
    """Write the checkpoint with `layers` blocks (None: all) and return its folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    raw = sizes(shape, layers, dtype)
    table, count = shapes("llama", raw), raw["num_hidden_layers"]
    generator = torch.Generator(device).manual_seed(0)
    folder.mkdir(parents=True)
    for block in range(count + 1):
        inside = f".layers.{block}."
        names = [name for name in table if (inside in name if block < count else ".layers." not in name)]
        tensors = {name: _drawn(table[name], dtype, generator).cpu() for name in names}
        save_file(tensors, folder / f"model-{block + 1:05d}-of-{count + 1:05d}.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder, raw["vocab_size"])
    return folder


def sizes(shape: str, layers: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of the shape."""
    config = SHAPES[shape]
    changes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers or config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": 4096,
    }
    return document("llama", dtype, changes)


def _drawn(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    value = torch.empty(shape, dtype=getattr(torch, dtype), device=generator.device)
    if len(shape) == 2:
        return value.normal_(0.0, shape[1] ** -0.5, generator=generator)
    value.normal_(1.0, 0.2, generator=generator)
    value[torch.randint(0, shape[0], (LARGE_CHANNELS,), generator=generator, device=generator.device)] = LARGE
    return value


def write_tokenizer(folder: Path, words: int) -> None:
    """A tokenizer whose tokens are the words "w0", "w1", ..., parted by spaces."""
    model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(words)}, "unk_token": "w0"}
    parts: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": []}
    parts |= {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(parts | {"decoder": decoder, "model": model}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"})
    )


def write_random_text(path: Path, words: int, tokens: int) -> Path:
    """`tokens` words drawn at random from the tokenizer's."""
    ids = torch.randint(3, words, (tokens,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path
