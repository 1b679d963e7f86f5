"""Tiny model folders of every family, written with the safetensors library and names spelled out by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H, INNER, LAYERS, HEADS, KV, DIM, VOCAB = 64, 96, 2, 4, 2, 16, 128

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_CONFIG,
    "mistral": LLAMA_CONFIG
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 32},
    "qwen2": LLAMA_CONFIG
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA_CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32},
    "internlm": LLAMA_CONFIG
    | {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "bias": True,
        "num_key_value_heads": HEADS,
    },
    "internlm2": LLAMA_CONFIG
    | {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False},
    "mixtral": LLAMA_CONFIG
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "qwen": {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "hidden_size": H,
        "intermediate_size": 2 * INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": DIM,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "seq_length": 256,
        "max_position_embeddings": 1024,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    },
}


def shapes(family: str, **sizes: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the tiny model; `sizes` are entries of config.json that differ from the table's."""
    config = CONFIGS[family] | sizes
    hidden, heads, vocab = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    inner = config["intermediate_size"] // (
        2 if family == "qwen" else 1
    )  # Qwen-1 counts gate and up together
    dim = config.get("head_dim", config.get("kv_channels", hidden // heads))
    queries, keys = heads * dim, config.get("num_key_value_heads", heads) * dim
    table: dict[str, tuple[int, ...]] = {}
    for i in range(config["num_hidden_layers"]):
        if family == "internlm2":
            p = f"model.layers.{i}."
            table |= {
                p + "attention.wqkv.weight": (queries + 2 * keys, hidden),
                p + "attention.wo.weight": (hidden, queries),
            }
            table |= {
                p + "feed_forward.w1.weight": (inner, hidden),
                p + "feed_forward.w3.weight": (inner, hidden),
            }
            table |= {p + "feed_forward.w2.weight": (hidden, inner)}
            table |= {p + "attention_norm.weight": (hidden,), p + "ffn_norm.weight": (hidden,)}
            continue
        if family == "qwen":
            p = f"transformer.h.{i}."
            table |= {
                p + "attn.c_attn.weight": (3 * hidden, hidden),
                p + "attn.c_attn.bias": (3 * hidden,),
                p + "attn.c_proj.weight": (hidden, hidden),
            }
            table |= {
                p + "mlp.w1.weight": (inner, hidden),
                p + "mlp.w2.weight": (inner, hidden),
                p + "mlp.c_proj.weight": (hidden, inner),
            }
            table |= {p + "ln_1.weight": (hidden,), p + "ln_2.weight": (hidden,)}
            continue
        p = f"model.layers.{i}."
        table |= {
            p + "self_attn.q_proj.weight": (queries, hidden),
            p + "self_attn.k_proj.weight": (keys, hidden),
        }
        table |= {
            p + "self_attn.v_proj.weight": (keys, hidden),
            p + "self_attn.o_proj.weight": (hidden, queries),
        }
        table |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        if family in ("qwen2", "internlm"):
            for part, rows in (("q", queries), ("k", keys), ("v", keys)):
                table[f"{p}self_attn.{part}_proj.bias"] = (rows,)
        if family == "internlm":
            table[p + "self_attn.o_proj.bias"] = (hidden,)
        if family == "qwen3":
            table |= {p + "self_attn.q_norm.weight": (dim,), p + "self_attn.k_norm.weight": (dim,)}
        if family == "mixtral":
            table[p + "block_sparse_moe.gate.weight"] = (3, hidden)
            for e in range(3):
                q = f"{p}block_sparse_moe.experts.{e}."
                table |= {
                    q + "w1.weight": (inner, hidden),
                    q + "w3.weight": (inner, hidden),
                    q + "w2.weight": (hidden, inner),
                }
        else:
            table |= {p + "mlp.gate_proj.weight": (inner, hidden), p + "mlp.up_proj.weight": (inner, hidden)}
            table[p + "mlp.down_proj.weight"] = (hidden, inner)
    outer = {
        "qwen": ("transformer.wte", "transformer.ln_f", "lm_head"),
        "internlm2": ("model.tok_embeddings", "model.norm", "output"),
    }.get(family, ("model.embed_tokens", "model.norm", "lm_head"))
    table |= {outer[0] + ".weight": (vocab, hidden), outer[1] + ".weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        table[outer[2] + ".weight"] = (vocab, hidden)
    return table


def random_tensors(family: str, dtype: torch.dtype = torch.float16, **sizes: int) -> dict[str, Tensor]:
    """Random weights of the tiny model; norms around 1."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, shape in shapes(family, **sizes).items():
        value = torch.randn(shape, generator=generator) * 0.1
        norm = len(shape) == 1 and not name.endswith("bias")
        tensors[name] = (value + 1.0 if norm else value).to(dtype)
    return tensors


def write_model(
    folder: Path,
    family: str = "llama",
    *,
    tensors: dict[str, Tensor] | None = None,
    shards: int = 1,
    **changes: Any,
) -> dict[str, Tensor]:
    """Write a model folder; `changes` go into config.json, None removes a key. Returns the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(family) if tensors is None else tensors
    config = {key: value for key, value in (CONFIGS[family] | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    names = sorted(tensors)
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return tensors


def tokenizer_document(
    special: tuple[str, ...] = ("<|bos|>", "<|im_start|>", "<|im_end|>"),
) -> dict[str, Any]:
    """A byte-level tokenizer of 256 bytes, no merges, and `special` behind them."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    added = [
        {
            "id": len(vocab) + place,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for place, token in enumerate(special)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
