"""Sizes by hand arithmetic, memory limits of containers, and what a run is refused for before it starts."""

from dataclasses import replace

import pytest
import torch

from convert.config import ModelConfig
from convert.errors import InputError, ResourceError
from convert.hf.config import parse_config
from quant import memory
from quant.config import QuantConfig
from quant.estimate import (
    packed_block_bytes,
    plan_quantization,
    refuse_ragged,
    statistics_bytes,
)
from quant.learn.distill import window_of
from quant.preflight import check_memory
from quant.progress import Progress
from quant.selection import ragged_roles
from quant.settings import Distillation

LLAMA_7B = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position=4096,
)


def test_statistics_of_a_7b_model_take_eleven_gigabytes():
    # upper triangles of three 4096 x 4096 and one 11008 x 11008 matrices, fp32, 32 layers
    assert statistics_bytes(LLAMA_7B) == 32 * (3 * 4096**2 + 11008**2) // 2 * 4
    assert 10.5e9 < statistics_bytes(LLAMA_7B) < 11.5e9


def test_a_packed_block_by_hand():
    weights = 4 * 4096 * 4096 + 3 * 4096 * 11008
    wanted = (
        weights / 2 + weights / 128 * 2.5 + 2 * 4096 * 2
    )  # nibbles; fp16 scale and nibble zero a group; norms
    assert packed_block_bytes(LLAMA_7B, QuantConfig()) == wanted


def test_the_plan_of_a_7b_run():
    plan = plan_quantization(LLAMA_7B, QuantConfig(), torch.device("cpu"), torch.float32, False, True)
    assert plan.bits_per_weight == 4.15625
    assert 3.8e9 < plan.output_bytes < 4.1e9
    assert plan.stream_bytes > 128 * 2048 * 4096 * 4
    assert any("memory: about" in line for line in plan.lines())


def test_what_does_not_fit_is_named_with_the_choices():
    config = ModelConfig(**{**vars(LLAMA_7B), "intermediate_size": 11040})
    assert ragged_roles(config, QuantConfig()) == ["down"]
    with pytest.raises(InputError, match=r"down \(K = 11040\).*--pad.*--keep-ragged.*--group-size 32"):
        refuse_ragged(config, QuantConfig())
    assert refuse_ragged(config, QuantConfig(keep_ragged=True)) == ["down"]


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A cgroup with 2 GiB, of which 1.5 are taken."""
    (tmp_path / "max").write_text(f"{2 * 2**30}\n")
    (tmp_path / "current").write_text(f"{3 * 2**29}\n")
    monkeypatch.setattr(memory, "CGROUP_FILES", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    return tmp_path


@pytest.mark.parametrize("case", ["E50-cgroup-limit"])
def test_the_limit_of_a_container_counts(case, container, capsys):
    assert memory.memory_limit_bytes() == 2 * 2**30 and memory.memory_available_bytes() == 2**29
    big = plan_quantization(LLAMA_7B, QuantConfig(), torch.device("cpu"), torch.float32, False, True)
    with pytest.raises(ResourceError, match=r"this machine or container has 2\.0 GiB in all"):
        check_memory(big, Progress("test"))
    some = plan_quantization(LLAMA_7B, QuantConfig("rtn"), torch.device("cpu"), torch.float32, False, False)
    assert 2**29 < some.peak_bytes < 2**31 or some.peak_bytes > 2**31
    (container / "max").write_text("max\n")
    limit = memory.memory_limit_bytes()
    assert limit is None or limit > 2**31


def test_best_says_where_the_text_is_too_little_to_learn_from() -> None:
    def lines(preset: str, samples: int) -> str:
        quant = QuantConfig(preset=preset, samples=samples, seqlen=512)  # type: ignore[arg-type]
        plan = plan_quantization(LLAMA_7B, quant, torch.device("cpu"), torch.float32, False, True)
        return "\n".join(plan.lines())

    assert "little text: from 8,192 tokens, best" in lines("best", 16)
    assert "little text" not in lines("best", 32) + lines("default", 16)


def test_an_end_to_end_pass_counts_both_models_and_the_logits() -> None:
    def plan(distill: bool):
        quant = QuantConfig(preset="best", samples=128, seqlen=512, distill=distill)
        return plan_quantization(LLAMA_7B, quant, torch.device("cpu"), torch.float32, False, True)

    alone, whole = plan(False), plan(True)
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    logits = 4096 * 32000 * 4
    assert alone.pass_bytes == 0 and whole.peak_bytes > 4 * 5 * weights + 3 * logits > alone.peak_bytes
    assert "end-to-end pass: 600 steps" in "\n".join(whole.lines()) and "hours" in "\n".join(whole.lines())
    assert "end-to-end" not in "\n".join(alone.lines())


def test_the_windows_of_a_pass_are_no_longer_than_the_text() -> None:
    assert window_of(LLAMA_7B, 65536, Distillation()) == (2, 2048)
    assert window_of(LLAMA_7B, 512, Distillation()) == (1, 512)
    assert window_of(replace(LLAMA_7B, max_position=1024), 3000, Distillation()) == (2, 1024)


QWEN3_235B = {  # the published config.json, without what is not read
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("preset", ["rtn", "fast", "default"])
def test_a_mixture_of_235_billion_weights_plans_within_24_gib(preset: str) -> None:
    config, _, _ = parse_config(QWEN3_235B)
    gpu = torch.device("cuda", 0)
    plan = plan_quantization(config, QuantConfig(preset=preset), gpu, torch.bfloat16, False, preset != "rtn")
    assert 230e9 < plan.parameters < 240e9
    assert plan.peak_bytes < 24 * 2**30
    # one block of its experts in float32 alone would take more than a third of that
    assert 128 * 3 * 1536 * 4096 * 4 > 8 * 2**30
