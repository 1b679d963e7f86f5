"""config.json -> ModelConfig: defaults as transformers has them, both spellings of RoPE, windows, dtypes."""

import json

import family_models
import pytest
import transformers
from tiny_models import CONFIGS

from convert.config import QuantFormat, RopeScaling
from convert.errors import InputError
from convert.hf.config import parse_config, updated_config

LLAMA = CONFIGS["llama"]


def parsed(family: str = "llama", **changes):
    return parse_config(CONFIGS[family] | changes)[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_absent_keys_mean_what_transformers_takes_them_for(family: str) -> None:
    needed = (
        "architectures",
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    )
    raw = {key: CONFIGS[family][key] for key in needed} | {"hidden_size": 1024, "num_attention_heads": 32}
    ours = parse_config(raw)[0]
    theirs = transformers.AutoConfig.for_model(**raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 32)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.num_experts == getattr(theirs, "num_local_experts", 0)


NEEDED = {
    "hidden_size": 1024,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "vocab_size": 40000,
}


@pytest.mark.parametrize("family", family_models.MODELS)
def test_absent_keys_of_newer_families_too(family: str) -> None:
    architecture = family_models.MODELS[family][0]
    theirs = getattr(transformers, architecture).config_class(**NEEDED)
    ours = parse_config(NEEDED | {"architectures": [architecture]})[0]
    rope = theirs.rope_parameters
    rope = rope.get("full_attention", rope)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 32)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == rope["rope_theta"]
    share = rope.get("partial_rotary_factor", 1.0)
    assert (ours.rotary_dim or ours.head_dim) == int(ours.head_dim * share)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    ends = theirs.eos_token_id
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    assert list(ours.eos_token_ids) == [end for end in ends if end < NEEDED["vocab_size"]]
    kinds = getattr(theirs, "layer_types", None) or []
    sliding = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    assert (ours.window_layers or ()) == sliding
    if sliding:
        assert ours.sliding_window == theirs.sliding_window
    assert ours.attention_softcap == getattr(theirs, "attn_logit_softcapping", None)
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)
    scale = (
        getattr(theirs, "attention_multiplier", None)
        or getattr(theirs, "query_pre_attn_scalar", ours.head_dim) ** -0.5
    )
    assert ours.softmax_scale == pytest.approx(scale)
    if ours.num_experts:
        experts = getattr(theirs, "num_experts", None) or theirs.num_local_experts
        assert ours.num_experts == experts and ours.experts_per_token == theirs.num_experts_per_tok
        assert ours.expert_size == theirs.moe_intermediate_size
        assert ours.router.renormalize == theirs.norm_topk_prob
        shared = getattr(theirs, "shared_expert_intermediate_size", None)
        assert ours.shared_intermediate_size == (
            shared or getattr(theirs, "n_shared_experts", 0) * theirs.moe_intermediate_size
        )
        assert len(ours.dense_layers) == getattr(theirs, "first_k_dense_replace", 0)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("GptOssForCausalLM", "attention sinks.*MXFP4"),
        ("DeepseekV3ForCausalLM", "latent vectors"),
        ("Llama4ForConditionalGeneration", "layers without RoPE"),
    ],
)
def test_architectures_that_are_not_read_are_refused_with_the_reason(architecture: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"{architecture}' is not a known family: it has .*{reason}"):
        parsed(architectures=[architecture])


SCALINGS = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0, 256)),
    "dynamic": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, 256)),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16, "attention_factor": 1.5},
        RopeScaling("yarn", 4.0, 128, attention_factor=1.5, beta_fast=16.0),
    ),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("spelling", ["old", "older", "new"])
def test_rope(kind: str, spelling: str) -> None:
    given, expected = SCALINGS[kind]
    changes = {
        "old": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": kind, **given}},
        "older": {"rope_theta": 500000.0, "rope_scaling": {"type": kind, **given}},
        "new": {"rope_parameters": {"rope_type": kind, "rope_theta": 500000.0, **given}},
    }[spelling]
    config = parsed(**changes)
    assert config.rope_scaling == expected and config.rope_theta == 500000.0


def test_plain_rope_in_the_new_spelling() -> None:
    config = parsed(rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert config.rope_scaling is None and config.rope_theta == 1e6


def test_yarn_lengthens_the_context() -> None:
    """Qwen states the length before scaling: 256 x 4."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert parsed("qwen2", rope_scaling=scaling).max_position == 1024
    scaling["original_max_position_embeddings"] = 64
    assert parsed("qwen2", rope_scaling=scaling).max_position == 256  # stated after scaling


def test_mscale_of_yarn_as_transformers_computes_it() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    }
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.AutoConfig.for_model(**LLAMA | {"rope_theta": 1e4, "rope_scaling": scaling})
    factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[1]
    found = parsed(rope_scaling=scaling).rope_scaling
    assert found is not None and found.attention_factor == pytest.approx(factor, rel=1e-9)


def test_windows() -> None:
    assert parsed("mistral", sliding_window=None).sliding_window is None
    assert (parsed("mistral").sliding_window, parsed("mistral").window_layers) == (32, None)
    assert (
        parsed("qwen2", sliding_window=16).sliding_window is None
    )  # without use_sliding_window it does not apply
    config = parsed("qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1)
    assert (config.sliding_window, config.window_layers) == (16, (1,))
    types = ["sliding_attention", "full_attention"]
    config = parsed(
        "qwen2", sliding_window=16, use_sliding_window=True, max_window_layers=1, layer_types=types
    )
    assert config.window_layers == (0,)


def test_qwen1() -> None:
    config = parsed("qwen")
    assert config.intermediate_size == CONFIGS["qwen"]["intermediate_size"] // 2
    assert config.max_position == 1024 and config.rope_scaling == RopeScaling(
        "qwen_ntk", 1.0, 256
    )  # from seq_length on
    assert parsed("qwen", use_dynamic_ntk=False).max_position == 256  # without that rule it ends there
    assert config.qkv_bias and not config.o_bias and config.logn_attention


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype(key: str) -> None:
    raw = {k: v for k, v in LLAMA.items() if k != "torch_dtype"}
    assert parse_config(raw | {key: "bfloat16"})[0].dtype == "bfloat16"


def test_quantization() -> None:
    quant = {"quant_method": "awq", "version": "GEMM", "bits": 4, "group_size": 64, "zero_point": True}
    assert parsed(quantization_config=quant).quantization == QuantFormat(4, 64, ())
    quant["modules_to_not_convert"] = ["lm_head"]
    assert parse_config(LLAMA | {"quantization_config": quant}, true_bits=3)[0].quantization == QuantFormat(
        3, 64, ("lm_head",)
    )
    with pytest.raises(InputError, match="bits"):
        parse_config(LLAMA | {"quantization_config": quant}, true_bits=5)


@pytest.mark.parametrize("family", CONFIGS)
def test_updating_changes_nothing_where_nothing_changed(family: str) -> None:
    config = parsed(family)
    assert updated_config(CONFIGS[family], config) == CONFIGS[family]
    again = parse_config(json.loads(json.dumps(updated_config(CONFIGS[family], config))))[0]
    assert again == config
