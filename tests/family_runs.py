"""Folders of the newer families that the commands take: weights with planted outliers, config, tokenizer."""

import json
from pathlib import Path
from typing import Any

import family_models
import tiny_models
import torch
from safetensors.torch import load_file
from torch import Tensor

VOCAB = 264
TEXT = {"samples": 8, "seqlen": 48, "group_size": 32, "device": "cpu"}


def write_source(family: str, folder: Path, **changes: Any) -> Any:
    """The family's model with a tokenizer, channels of its norms and of its embedding planted 20 times the others."""
    model = family_models.make_model(family, vocab_size=VOCAB, **changes)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "embed_tokens" in name or "layernorm" in name:
                tensor[..., 5] *= 20
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tiny_models.tokenizer_document()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
