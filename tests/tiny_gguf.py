"""A tiny model as a .gguf file, written with llama.cpp's own package."""

from pathlib import Path

import gguf
import numpy as np
from tiny_models import DIM, HEADS, INNER, KV, LAYERS, H
from tokenizers.pre_tokenizers import ByteLevel

TOKENS = ["<|bos|>", "<|end|>", *sorted(ByteLevel.alphabet())]
MERGES = ["1 9", "a b", "Ġ a"]


def write_gguf(path: Path, architecture: str = "llama", **metadata: object) -> dict[str, np.ndarray]:
    """A tiny model. Returns its float32 weights under GGUF names; matrices of the blocks are then stored as Q4_1."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens = TOKENS + [text.replace(" ", "") for text in MERGES]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(metadata.get("pre", "smollm")))
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if "add_bos" in metadata:
        writer.add_add_bos_token(bool(metadata["add_bos"]))
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray] = {"token_embd.weight": rng.standard_normal((len(tokens), H))}
    weights["output_norm.weight"] = 1 + rng.standard_normal(H) * 0.1
    for i in range(LAYERS):
        shapes = {
            "attn_q": (HEADS * DIM, H),
            "attn_k": (KV * DIM, H),
            "attn_v": (KV * DIM, H),
            "attn_output": (H, HEADS * DIM),
            "ffn_gate": (INNER, H),
            "ffn_up": (INNER, H),
            "ffn_down": (H, INNER),
        }
        for name, shape in shapes.items():
            weights[f"blk.{i}.{name}.weight"] = rng.standard_normal(shape)
        for name in ("attn_norm", "ffn_norm"):
            weights[f"blk.{i}.{name}.weight"] = 1 + rng.standard_normal(H) * 0.1
        if architecture == "qwen2":
            for name, rows in (("attn_q", HEADS * DIM), ("attn_k", KV * DIM), ("attn_v", KV * DIM)):
                weights[f"blk.{i}.{name}.bias"] = rng.standard_normal(rows)
    if metadata.get("nan"):
        weights["output_norm.weight"][3] = np.nan
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    for name, value in weights.items():
        if name.startswith("blk.") and value.ndim == 2:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights
