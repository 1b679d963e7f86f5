"""Zero-padding changes shapes and not the function: transformers computes both models, float32."""

import pytest
import torch
import transformers
from tiny_models import random_tensors, write_model

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError
from convert.folder.json_files import read_object
from convert.hf.config import updated_config
from convert.pad import PaddedCheckpoint, pad_checkpoint, padded_config
from convert.readers import open_checkpoint

MULTIPLE = (
    40  # heads 4/2 of 16 -> 10/5, hidden 64 -> 160, inner 96 -> 120; Qwen3 (head_dim 32): hidden 64 -> 80
)


def logits(ckpt: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """Through transformers' own model, its weights filled from the checkpoint by name."""
    document = updated_config(read_object(ckpt.tokenizer_dir / "config.json"), ckpt.config)
    config = transformers.AutoConfig.for_model(**document)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    attention = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(ckpt.embedding())
        model.model.norm.weight.copy_(ckpt.final_norm())
        model.lm_head.weight.copy_(ckpt.lm_head())
        for i, layer in enumerate(model.model.layers):
            block = ckpt.block(i)
            for role, linear in block.linears.items():
                if role in attention:
                    module = getattr(layer.self_attn, attention[role])
                    module.weight.copy_(linear.weight)
                    if linear.bias is not None:
                        module.bias.copy_(linear.bias)
                elif role == "router":
                    layer.mlp.gate.weight.copy_(linear.weight)
                elif role.startswith("experts."):
                    _, expert, part = role.split(".")
                    inner = ckpt.config.intermediate_size
                    target = {
                        "gate": layer.mlp.experts.gate_up_proj[int(expert), :inner],
                        "up": layer.mlp.experts.gate_up_proj[int(expert), inner:],
                        "down": layer.mlp.experts.down_proj[int(expert)],
                    }[part]
                    target.copy_(linear.weight)
                else:
                    getattr(layer.mlp, f"{role}_proj").weight.copy_(linear.weight)
            layer.input_layernorm.weight.copy_(block.norms["attn_norm"])
            layer.post_attention_layernorm.weight.copy_(block.norms["mlp_norm"])
            for name in ("q_norm", "k_norm"):
                if name in block.norms:
                    getattr(layer.self_attn, name).weight.copy_(block.norms[name])
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3-tied", "mixtral"])
def test_padded_model_computes_the_same(family: str, tmp_path) -> None:
    family, _, tied = family.partition("-")
    tensors = random_tensors(family, torch.float32)
    if tied:
        del tensors["lm_head.weight"]
    # eps is large, so that a wrong one would show
    changes = {"rms_norm_eps": 1e-3} | ({"tie_word_embeddings": True} if tied else {})
    write_model(tmp_path / "m", family, tensors=tensors, **changes)
    plain = open_checkpoint(tmp_path / "m")
    padded = pad_checkpoint(plain, MULTIPLE)
    config = padded.config
    assert config.hidden_size % MULTIPLE == config.intermediate_size % MULTIPLE == 0
    assert (
        config.num_heads * config.head_dim % MULTIPLE == 0 and config.query_group == plain.config.query_group
    )
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    expected, found = logits(plain, ids), logits(padded, ids)
    # the same sums with zeros between, in another order: float32 rounding only
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_bias_into_the_stream_carries_its_factor(tmp_path) -> None:
    """Qwen3 with a bias of o (attention_bias): the residual stream is multiplied by c, and so is all that is added to it."""
    write_model(tmp_path / "m", "qwen3", tensors=random_tensors("qwen3", torch.float32))
    plain = open_checkpoint(tmp_path / "m")
    config = padded_config(plain.config, MULTIPLE)
    factor = (config.hidden_size / plain.config.hidden_size) ** 0.5
    bias = torch.arange(1.0, 65.0)
    for role, expected in (("o", factor), ("q", 1.0)):
        linear = plain.block(0).linears[role]
        rows = linear.weight.shape[0]
        given = bias.repeat(rows // 64 + 1)[:rows]
        block = BlockWeights(
            0, plain.block(0).linears | {role: LinearWeights(linear.weight, given)}, plain.block(0).norms
        )
        plain.block = lambda _, block=block: block  # type: ignore[method-assign, misc]
        found = PaddedCheckpoint(plain, config).block(0).linears[role].bias
        torch.testing.assert_close(found[:rows], given * expected)
        assert not found[rows:].any()


def test_demo_dims() -> None:
    """576 with heads 9/3 of 64 and inner 1536 -> 768 with 12/4: one whole KV group is added."""
    demo = ModelConfig("llama", "LlamaForCausalLM", 576, 1536, 30, 9, 3, 64, 49152, 1e-5, 1e5, 8192)
    config = padded_config(demo)
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.intermediate_size) == (
        768,
        12,
        4,
        1536,
    )
    assert config.padded_from == (576, 9, 3) and config.norm_eps == pytest.approx(1e-5 * 0.75, rel=1e-12)


def test_dims_that_fit_are_left_alone(tmp_path) -> None:
    write_model(tmp_path / "m")
    ckpt = open_checkpoint(tmp_path / "m")
    assert pad_checkpoint(ckpt, 32) is ckpt


def test_quantized_checkpoints_are_not_padded(tmp_path) -> None:
    write_model(
        tmp_path / "m",
        quantization_config={
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
        },
    )
    with pytest.raises(InputError, match="quantized already"):
        pad_checkpoint(open_checkpoint(tmp_path / "m"), 128)
