"""Tiny random checkpoints of every family that TurboMind reads, in its sizes: head_dim 128, K and N multiples of 128.

GQA where the family has it, random biases, norms away from 1; int4 ones are made by `quantize awq --preset rtn`, whose zero points
are asymmetric because the weights have an offset. `write_source` writes one folder; the benchmarks and the exporter comparison use it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 512, 640, 2, 4, 2, 128, 512

PLAIN: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "internlm": {
        "architectures": ["InternLMForCausalLM"],
        "model_type": "internlm",
        "bias": True,
        "num_key_value_heads": HEADS,
    },
    "internlm2": {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False},
    "qwen": {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "intermediate_size": 2 * INNER,
        "num_key_value_heads": HEADS,
        "kv_channels": HEAD_DIM,
        "layer_norm_epsilon": 1e-5,
        "rotary_emb_base": 10000,
        "seq_length": 2048,
        "no_bias": True,
        "use_dynamic_ntk": False,
        "use_logn_attn": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
}


def document(family: str, dtype: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the family's tiny model."""
    raw = PLAIN | FAMILIES[family] | {"torch_dtype": dtype} | changes
    if family == "qwen":
        raw = {key: value for key, value in raw.items() if key not in ("num_key_value_heads", "rope_theta")}
    return raw


def shapes(family: str, raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, spelled out from the published models."""
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    dim = raw.get("head_dim", hidden // heads)
    queries, keys = heads * dim, raw.get("num_key_value_heads", heads) * dim
    inner, vocab = raw["intermediate_size"], raw["vocab_size"]
    table: dict[str, tuple[int, ...]] = {}
    for i in range(raw["num_hidden_layers"]):
        if family == "qwen":
            p = f"transformer.h.{i}."
            table |= {p + "attn.c_attn.weight": (3 * hidden, hidden), p + "attn.c_attn.bias": (3 * hidden,)}
            table |= {
                p + "attn.c_proj.weight": (hidden, hidden),
                p + "mlp.c_proj.weight": (hidden, inner // 2),
            }
            table |= {p + f"mlp.w{n}.weight": (inner // 2, hidden) for n in (1, 2)}
            table |= {p + f"ln_{n}.weight": (hidden,) for n in (1, 2)}
            continue
        p = f"model.layers.{i}."
        if family == "internlm2":
            table |= {p + "attention.wqkv.weight": (queries + 2 * keys, hidden)}
            table |= {
                p + "attention.wo.weight": (hidden, queries),
                p + "feed_forward.w2.weight": (hidden, inner),
            }
            table |= {p + f"feed_forward.w{n}.weight": (inner, hidden) for n in (1, 3)}
            table |= {p + name: (hidden,) for name in ("attention_norm.weight", "ffn_norm.weight")}
            continue
        rows = {"q": queries, "k": keys, "v": keys, "o": hidden}
        for part, count in rows.items():
            table[f"{p}self_attn.{part}_proj.weight"] = (count, queries if part == "o" else hidden)
            if family == "internlm" or (family == "qwen2" and part != "o"):
                table[f"{p}self_attn.{part}_proj.bias"] = (count,)
        if family == "mixtral":
            table[p + "block_sparse_moe.gate.weight"] = (raw["num_local_experts"], hidden)
            for expert in range(raw["num_local_experts"]):
                e = f"{p}block_sparse_moe.experts.{expert}."
                table |= {
                    e + f"w{n}.weight": (hidden, inner) if n == 2 else (inner, hidden) for n in (1, 2, 3)
                }
        else:
            table |= {p + f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
            table[p + "mlp.down_proj.weight"] = (hidden, inner)
        table |= {p + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    embedding, norm, head = {
        "qwen": ("transformer.wte", "transformer.ln_f", "lm_head"),
        "internlm2": ("model.tok_embeddings", "model.norm", "output"),
    }.get(family, ("model.embed_tokens", "model.norm", "lm_head"))
    table |= {embedding + ".weight": (vocab, hidden), norm + ".weight": (hidden,)}
    return table if raw["tie_word_embeddings"] else table | {head + ".weight": (vocab, hidden)}


def random_weights(
    table: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 11, offset: float = 0.5
) -> dict[str, Tensor]:
    """Linears of a size that keeps activations near 1, with an offset for each row so that int4 zero points differ.

    offset: its size in standard deviations of the weights. At 0.5 zero points lie in 0 .. 15, at 0.25 in 3 .. 12.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in table.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            value = value * 0.5
        elif len(shape) == 1:
            value = 1 + 0.2 * value
        else:
            value = (value + offset * torch.randn(shape[0], 1, generator=generator)) * shape[1] ** -0.5
        tensors[name] = value.to(dtype)
    return tensors


def write_source(
    folder: Path, family: str, dtype: str = "float16", *, offset: float = 0.5, **changes: Any
) -> Path:
    """Write a float checkpoint; `changes` go into config.json. Returns the folder."""
    folder.mkdir(parents=True)
    raw = document(family, dtype, changes)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    weights = random_weights(shapes(family, raw), getattr(torch, dtype), offset=offset)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize_source(source: Path, out: Path) -> Path:
    """`quantize awq --preset rtn --group-size 128`, as a user runs it, in this process."""
    from turbomind_quant.cli.quantize import quantize

    arguments = [
        "awq",
        str(source),
        "-o",
        str(out),
        "--preset",
        "rtn",
        "--group-size",
        "128",
        "--device",
        "cpu",
    ]
    status = quantize.main(arguments, standalone_mode=False)
    if status:
        raise SystemExit(f"quantize {' '.join(arguments)} ended with {status}")
    return out
