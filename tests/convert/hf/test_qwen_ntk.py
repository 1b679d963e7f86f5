"""Qwen-1's own RoPE switch: read from config.json, written to config.yaml, read back."""

from dataclasses import replace
from typing import Any

import pytest

from convert.config import RopeScaling
from convert.hf.config import parse_config
from convert.turbomind.config import attention_config

RAW: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "vocab_size": 100,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}


@pytest.mark.parametrize("switch", [True, False])
def test_use_dynamic_ntk(switch: bool) -> None:
    config, _, _ = parse_config(RAW | {"use_dynamic_ntk": switch})
    assert config.rope_scaling == (RopeScaling("qwen_ntk", 1.0, 2048) if switch else None)
    assert config.max_position == (8192 if switch else 2048) and config.logn_attention
    written = attention_config(config)
    assert written["use_dynamic_ntk"] == int(switch) and written["use_logn_attn"] == 1
    assert written["rope_scaling_type"] == "" and written["max_position_embeddings"] == 2048


def test_dynamic_scaling_keeps_its_name() -> None:
    config, _, _ = parse_config(RAW)
    dynamic = replace(config, rope_scaling=RopeScaling("dynamic", 2.0, 8192))
    assert attention_config(dynamic)["rope_scaling_type"] == "dynamic"
    assert attention_config(dynamic)["max_position_embeddings"] == 8192
