"""What users bring that looks right and is not: keys that change the mathematics, heads that are not tied, folders that are no model."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import random_tensors, write_model
from tiny_runs import FAST, run, write_runnable

from convert.errors import InputError
from convert.folder.json_files import show_value
from convert.hf.config import parse_config, updated_config
from convert.readers import open_checkpoint

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
ODD_KEYS = {
    "nope": {"no_rope_layers": [1, 1, 0, 1]},
    "nope-interval": {"no_rope_layer_interval": 4},
    "embedding": {"embedding_multiplier": 12.0},
    "residual": {"residual_multiplier": 0.22},
    "logits": {"logits_scaling": 8.0},
    "softcap": {"final_logit_softcapping": 30.0},
    "query-scale": {"query_pre_attn_scalar": 256},
    "interleaved": {"rope_interleaved": True},
    "alibi": {"alibi": True},
    "clip": {"clip_qkv": 8.0},
    "minicpm": {"scale_emb": 12},
    "experts": {"num_local_experts": 8},
    "window": {"sliding_window": 64},
    "layers": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "norm": {"rms_norm_eps": None, "layer_norm_eps": 1e-5},
    "rope": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
}


@pytest.mark.parametrize("family", [None, "llama"], ids=["named-by-config", "family-flag"])
@pytest.mark.parametrize("case", ODD_KEYS, ids=lambda c: f"K127-{c}")
def test_keys_with_other_mathematics_are_refused_by_name(case: str, family: str | None) -> None:
    changes = ODD_KEYS[case]
    name = list(changes)[-1] if case != "rope" else "llama_4_scaling_beta"
    with pytest.raises(InputError, match=name):
        parse_config(LLAMA | changes, family)


NEUTRAL = [
    {
        "no_rope_layers": [1, 1, 1, 1],
        "no_rope_layer_interval": 0,
        "embedding_multiplier": 1.0,
        "clip_qkv": None,
    },
    {"final_logit_softcapping": None, "alibi": False, "pretraining_tp": 1, "attention_dropout": 0.0},
    {
        "sliding_window": 4096,
        "use_sliding_window": False,
        "num_local_experts": 1,
        "layer_types": ["full_attention"] * 4,
    },
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=lambda c: f"K127-neutral-{next(iter(c))}")
def test_the_same_keys_with_neutral_values_are_taken(changes: dict) -> None:
    assert parse_config(LLAMA | changes)[0].num_layers == 4


@pytest.mark.parametrize("name", ["SmolLM3ForCausalLM", "Ernie4_5ForCausalLM", "MiniCPMForCausalLM"])
def test_K127_lookalikes_are_refused_with_the_family_flag_too(name: str) -> None:
    for family in (None, "llama"):
        with pytest.raises(InputError, match=name) as caught:
            parse_config(LLAMA | {"architectures": [name], "model_type": "other"}, family)
        assert "(--family" not in str(caught.value)


def test_K127_the_hint_at_a_family_is_for_near_names_alone() -> None:
    for name, hint in (
        ("LlamaForCausalML", "--family llama"),
        ("Zyx9ForCausalLM", None),
        ("DbrxForCausalLM", None),
    ):
        with pytest.raises(InputError) as caught:
            parse_config(LLAMA | {"architectures": [name], "model_type": "other"})
        assert (hint or "Nothing known is near it") in str(caught.value)


def test_K125_a_head_of_its_own_is_used_and_stays_untied(tmp_path: Path) -> None:
    write_model(tmp_path / "m", tie_word_embeddings=True)
    ckpt = open_checkpoint(tmp_path / "m")
    expected = random_tensors("llama")["lm_head.weight"]
    assert torch.equal(ckpt.lm_head(), expected)
    document = updated_config(ckpt.raw_config, ckpt.config)
    assert document["tie_word_embeddings"] is False  # in what is written from it


@pytest.mark.parametrize(
    ("stated", "original", "factor", "context"),
    [(160, 128, 4.0, 512), (512, 128, 4.0, 512), (1024, 128, 4.0, 1024)],
)
def test_K126_yarn_has_the_stretched_context(stated: int, original: int, factor: float, context: int) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    config, _, _ = parse_config(LLAMA | {"max_position_embeddings": stated, "rope_scaling": rope})
    assert config.max_position == context


def test_K128_an_adapter_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="LoRA adapter, not a model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", ""], ids=lambda p: f"K128-{p or 'none'}"
)
def test_tensors_under_other_names_are_told(prefix: str, tmp_path: Path) -> None:
    tensors = random_tensors("llama")
    renamed = {(prefix + name if prefix else name.removeprefix("model.")): t for name, t in tensors.items()}
    write_model(tmp_path, tensors=renamed)
    with pytest.raises(InputError, match=r"torch\.compile|data-parallel|not merged|without its head"):
        open_checkpoint(tmp_path)


def test_J112_weights_beyond_the_format_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = write_runnable(tmp_path / "m")
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e30
    save_file(tensors, model / "model.safetensors")
    done = run("quantize", "awq", model, "-o", tmp_path / "o", "--preset", "rtn", *FAST)
    assert done.returncode == 3 and "Block 1, up: 1 weights lie beyond 982,560" in done.stderr
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 9e5  # 15 steps of a scale that float16 holds
    save_file(tensors, model / "model.safetensors")
    assert run("quantize", "awq", model, "-o", tmp_path / "o2", "--preset", "rtn", *FAST).returncode == 0


def test_J109_values_are_cut_before_they_are_written_out() -> None:
    bomb: list = ["x"] * 10
    for _ in range(12):
        bomb = [bomb] * 10
    assert len(show_value(bomb)) < 400
    assert len(show_value({"a": bomb, "b": math.inf})) < 400
    assert show_value(10**5000).startswith("a number of 16610 bits")
