"""Folders of the newer families that the commands take: weights with planted outliers, config, tokenizer."""

import json
from pathlib import Path
from typing import Any

import family_models
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert.readers import open_checkpoint
from engine.model.forward import Model, causal_attend

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


SHIFTS = [
    4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)
]  # of column j in a word: nibbles hold 0, 2, 4, 6, 1, 3, 5, 7


def nibbles(words: Tensor) -> Tensor:
    """(R, C // 8) int32 -> (R, C)."""
    return torch.stack([(words >> shift) & 15 for shift in SHIFTS], -1).flatten(1)


def dequantize(folder: Path, target: Path) -> None:
    """A float32 folder with the weights that an AWQ folder stands for."""
    target.mkdir()
    tensors, floats = tensors_of(folder), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            scales, zeros = tensors[module + ".scales"].float(), nibbles(tensors[module + ".qzeros"])
            repeats = len(tensor) // len(scales)
            codes = nibbles(tensor) - zeros.repeat_interleave(repeats, 0)
            floats[module + ".weight"] = (codes * scales.repeat_interleave(repeats, 0)).t().contiguous()
        elif part not in ("qzeros", "scales"):
            floats[name] = tensor.float()
    save_file(floats, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    model = Model.from_checkpoint(open_checkpoint(folder), "cpu", torch.float32)
    batch, length = ids.shape
    attend = causal_attend(batch, length, model.config)
    return model(ids.flatten(), torch.arange(length).repeat(batch), attend).view(batch, length, -1)


def their_logits(folder: Path, architecture: str, ids: Tensor) -> Tensor:
    kind = getattr(transformers, architecture)
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(input_ids=ids).logits
