"""Newer architectures from GGUF: files written with llama.cpp's own names give the logits of the transformers model they hold."""

import math
from pathlib import Path
from typing import Any

import family_models
import gguf
import numpy as np
import pytest
import torch
from family_models import TOLERANCE, logits_of
from safetensors.torch import load_file
from tiny_gguf import MERGES, TOKENS
from torch import Tensor

from convert.readers import open_checkpoint
from engine.model.forward import Model

VOCAB = len(TOKENS) + len(MERGES)
PLAIN: dict[str, Any] = {"attention_bias": False}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
# family -> (architecture in GGUF, options that such a file can state, metadata by our own hand)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": (
        "qwen3moe",
        PLAIN | {"use_sliding_window": False, "decoder_sparse_step": 1},
        {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 64},
    ),
    "gemma2": (
        "gemma2",
        PLAIN | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
        {"attention.sliding_window": 7, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3",
        PLAIN
        | {
            "query_pre_attn_scalar": 32,
            "final_logit_softcapping": None,
            "layer_types": None,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            },
        },
        {"attention.sliding_window": 7, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "phi3": (
        "phi3",
        {},
        {
            "attention.sliding_window": 30,
            "rope.scaling.original_context_length": 24,
            "rope.dimension_count": 12,
        },
    ),
    "glm4": ("glm4", {}, {"rope.dimension_count": 8}),
    "olmo2": ("olmo2", PLAIN, {}),
    "granite": (
        "granite",
        PLAIN | {"mlp_bias": False},
        {"attention.scale": 0.1, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 0.5},
    ),
}


def permuted(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp holds those of its architecture "llama": halves of a head become pairs."""
    rows = tensor.shape[0] // heads
    return torch.cat(
        [torch.stack([head[: rows // 2], head[rows // 2 :]], 1).flatten(0, 1) for head in tensor.split(rows)]
    )


def write_family(path: Path, folder: Path, model: Any, arch: str, metadata: dict[str, Any]) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(3e-5)
    writer.add_rope_freq_base(5000.0)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS + [text.replace(" ", "") for text in MERGES])
    writer.add_token_types([3, 3] + [1] * (VOCAB - 2))
    writer.add_token_merges(MERGES)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {name: t for part in folder.glob("*.safetensors") for name, t in load_file(part).items()}
    stacked: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=lambda name: [int(p) if p.isdigit() else p for p in name.split(".")]):
        tensor, parts = tensors[name], name.split(".")
        if "experts" in parts:
            parts.pop(parts.index("experts") + 1)
            stacked.setdefault(".".join(parts), []).append(tensor)
            continue
        if arch == "granite" and ("q_proj" in name or "k_proj" in name):
            tensor = permuted(tensor, 4 if "q_proj" in name else 2)
        if arch.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    for name, experts in stacked.items():
        writer.add_tensor(names.get_name(name, (".weight",)), torch.stack(experts).numpy())
    if arch == "phi3":
        for length in ("short", "long"):
            factors = config.rope_parameters[f"{length}_factor"]
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(factors, dtype=np.float32))
        factor = 512 / 24
        writer.add_float32("phi3.rope.scaling.attn_factor", math.sqrt(1 + math.log(factor) / math.log(24)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_model_that_the_file_holds(family: str, tmp_path: Path) -> None:
    arch, options, metadata = CASES[family]
    reference = family_models.save_model(family, tmp_path / "m", vocab_size=VOCAB, **options)
    write_family(tmp_path / "m.gguf", tmp_path / "m", reference, arch, metadata)
    ckpt = open_checkpoint(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert ckpt.config.family == family and not ckpt.carried()
    ours = Model.from_checkpoint(ckpt, "cpu", torch.float32)
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    assert expected.std() > 0.3
    assert (logits_of(ours, ids) - expected).abs().max() < TOLERANCE
    short = ids[:, :20]
    assert (logits_of(ours, short) - reference(short).logits).abs().max() < TOLERANCE
