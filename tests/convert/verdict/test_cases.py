"""Engine, version, artefact, ranks -> verdict and why, each case taken from that engine's own code (the `source` of its rule).

The cases are written from the engines' files, not from our rules: what the code there asserts, raises or falls back to.
"""

from dataclasses import replace
from typing import Any

import pytest

from convert.config import ModelConfig
from convert.errors import UsageError
from convert.verdict.artefact import Artefact
from convert.verdict.judge import judge, parse_engine
from convert.verdict.rules import ENGINES, RULES

LLAMA = ModelConfig("llama", "LlamaForCausalLM", 4096, 11008, 2, 32, 8, 128, 32000, 1e-5, 10000.0, 4096)
DEMO = ModelConfig("llama", "LlamaForCausalLM", 576, 1536, 2, 9, 3, 64, 49152, 1e-5, 10000.0, 8192)
MISTRAL = replace(LLAMA, family="mistral", architecture="MistralForCausalLM", sliding_window=4096)
QWEN2 = replace(
    LLAMA, family="qwen2", architecture="Qwen2ForCausalLM", hidden_size=3584, num_heads=28, num_kv_heads=4
)
QWEN3 = replace(LLAMA, family="qwen3", architecture="Qwen3ForCausalLM", qk_norm=True)
QWEN1 = replace(LLAMA, family="qwen", architecture="QWenLMHeadModel", num_kv_heads=32)
INTERNLM = replace(LLAMA, family="internlm", architecture="InternLMForCausalLM", num_kv_heads=32)
INTERNLM2 = replace(LLAMA, family="internlm2", architecture="InternLM2ForCausalLM")
MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    architecture="MixtralForCausalLM",
    intermediate_size=14336,
    num_experts=8,
    experts_per_token=2,
)
HEAD_96 = replace(LLAMA, hidden_size=3072, num_heads=32, head_dim=96)


def made(config: ModelConfig, kind: Any, group: int = 128, **facts: Any) -> Artefact:
    return Artefact(kind, config, group, **({"bits": 4} | facts))


def floats(*roles: str) -> frozenset[str]:
    return frozenset(f"{i}.{role}" for i in range(2) for role in roles)


CT, WS = "compressed-tensors", "workspace-0.6.5"
OK, CAVEAT, FAILS = "loads", "caveat", "fails"
# engine, artefact, tp, outcome, a part of the reason ("" where it loads)
CASES: list[tuple[str, Artefact, int, str, str]] = [
    # LMDeploy: groups (converter.py: _SUPPORTED_GROUP_SIZES; 0.6.5: assert group_size == 128)
    ("lmdeploy:0.18.0", made(LLAMA, "awq"), 1, OK, ""),
    ("lmdeploy:0.18.0", made(LLAMA, "awq", 64), 1, FAILS, "groups of 64"),
    ("lmdeploy:0.18.0", made(LLAMA, "awq", 32), 1, FAILS, "groups of 32"),
    ("lmdeploy:0.6.5", made(LLAMA, "awq", 64), 1, FAILS, "groups of 64"),
    ("lmdeploy:0.6.5", made(LLAMA, "awq"), 1, OK, ""),
    ("lmdeploy:0.7.3", made(LLAMA, "gptq", 128, symmetric=True), 1, OK, ""),
    ("lmdeploy:0.7.3", made(LLAMA, "gptq"), 1, FAILS, "zero points other than 8"),
    ("lmdeploy:0.18.0", made(LLAMA, "gptq"), 1, FAILS, "zero points other than 8"),
    ("lmdeploy:0.18.0", made(LLAMA, "gptq", 128, symmetric=True), 1, OK, ""),
    ("lmdeploy:0.18.0", made(LLAMA, "gptq", 32, symmetric=True), 1, FAILS, "groups of 32"),
    # compressed-tensors: none before 0.12, 128 alone before 0.12.3, then 32 too, never 64
    ("lmdeploy:0.18.0", made(DEMO, CT, 32), 1, OK, ""),
    ("lmdeploy:0.18.0", made(DEMO, CT, 64), 1, FAILS, "groups of 64"),
    ("lmdeploy:0.18.0", made(LLAMA, CT), 1, OK, ""),
    ("lmdeploy:0.12.3", made(LLAMA, CT, 32), 1, OK, ""),
    ("lmdeploy:0.12.0", made(LLAMA, CT, 32), 1, FAILS, "128 alone"),
    ("lmdeploy:0.7.3", made(LLAMA, CT), 1, FAILS, "compressed-tensors is not read"),
    ("lmdeploy:0.6.5", made(LLAMA, CT), 1, FAILS, "compressed-tensors is not read"),
    # other formats
    ("lmdeploy:0.18.0", made(LLAMA, "gguf", 32), 1, FAILS, "gguf is not read"),
    ("lmdeploy:0.18.0", made(LLAMA, "mlx", 64), 1, FAILS, "mlx is not read"),
    ("lmdeploy:0.18.0", Artefact("float", LLAMA), 1, OK, ""),
    # workspaces: 0.6.4 to 0.7.3
    ("lmdeploy:0.6.5", made(LLAMA, WS), 1, OK, ""),
    ("lmdeploy:0.7.3", made(LLAMA, WS), 1, OK, ""),
    ("lmdeploy:0.8.0", made(LLAMA, WS), 1, FAILS, "memory that was never set"),
    ("lmdeploy:0.18.0", made(LLAMA, WS), 1, FAILS, "no reader"),
    ("lmdeploy:0.7.3", made(LLAMA, "workspace-0.1"), 1, FAILS, "dialect 0.1"),
    # architectures (supported_models.py)
    ("lmdeploy:0.6.5", made(QWEN3, "awq"), 1, FAILS, "Qwen3ForCausalLM is not served"),
    ("lmdeploy:0.7.3", made(QWEN3, "awq"), 1, OK, ""),
    ("lmdeploy:0.13.0", made(INTERNLM, "awq"), 1, OK, ""),
    ("lmdeploy:0.14.0", made(INTERNLM, "awq"), 1, CAVEAT, "PyTorch engine"),
    ("lmdeploy:0.18.0", made(QWEN1, "awq"), 1, CAVEAT, "PyTorch engine"),
    ("lmdeploy:0.18.0", made(MISTRAL, "awq"), 1, CAVEAT, "PyTorch engine"),
    ("lmdeploy:0.18.0", made(MISTRAL, "gptq", 128, symmetric=True), 1, FAILS, "reads no GPTQ"),
    ("lmdeploy:0.18.0", made(MISTRAL, CT), 1, FAILS, "symmetric groups of 32 alone"),
    ("lmdeploy:0.18.0", made(MISTRAL, CT, 32, symmetric=True), 1, CAVEAT, "PyTorch engine"),
    ("lmdeploy:0.18.0", made(MISTRAL, "awq", 64), 1, CAVEAT, "PyTorch engine"),
    ("lmdeploy:0.6.5", made(MISTRAL, "awq"), 1, CAVEAT, "sliding window"),
    ("lmdeploy:0.18.0", made(INTERNLM2, "awq"), 1, OK, ""),
    ("lmdeploy:0.18.0", made(MIXTRAL, "awq"), 1, OK, ""),
    # head_dim (_is_head_dim_supported, gone in 0.14)
    ("lmdeploy:0.6.5", made(HEAD_96, "awq"), 1, FAILS, "hidden size / heads = 96"),
    ("lmdeploy:0.13.0", made(HEAD_96, "awq"), 1, FAILS, "hidden size / heads = 96"),
    ("lmdeploy:0.14.0", made(HEAD_96, "awq"), 1, OK, ""),
    # ranks
    ("lmdeploy:0.18.0", made(LLAMA, "awq"), 4, OK, ""),
    ("lmdeploy:0.18.0", made(LLAMA, "awq"), 3, FAILS, "32 attention heads on 3 ranks"),
    ("lmdeploy:0.18.0", made(QWEN2, "awq"), 8, FAILS, "28 attention heads on 8 ranks"),
    ("lmdeploy:0.18.0", made(DEMO, CT, 32), 9, OK, ""),
    ("lmdeploy:0.6.5", made(QWEN2, "awq"), 7, FAILS, "4 KV heads on 7 ranks"),
    ("lmdeploy:0.18.0", made(LLAMA, "awq", float_linears=floats("down")), 1, OK, ""),
    ("lmdeploy:0.7.3", made(LLAMA, "awq", float_linears=floats("down")), 1, FAILS, "2 linears left float"),
    ("lmdeploy:0.18.0", made(LLAMA, "awq", float_linears=floats("q")), 1, CAVEAT, "partly int4"),
    # vLLM: auto_awq.py, auto_gptq.py, compressed_tensors, registry.py
    ("vllm", made(LLAMA, "awq"), 1, OK, ""),
    ("vllm", made(DEMO, "awq", 64), 1, OK, ""),
    ("vllm", made(DEMO, CT, 32), 1, OK, ""),
    ("vllm", made(LLAMA, "awq", 16), 1, FAILS, "groups of 16"),
    ("vllm", made(LLAMA, "gptq", 128, symmetric=True), 1, OK, ""),
    ("vllm", made(LLAMA, "gptq"), 1, FAILS, "zero points other than 8"),
    ("vllm", made(LLAMA, "gguf", 32), 1, FAILS, "gguf is not read"),
    ("vllm", made(LLAMA, WS), 1, FAILS, "workspace-0.6.5 is not read"),
    ("vllm", made(LLAMA, "mlx", 64), 1, FAILS, "mlx is not read"),
    ("vllm", made(QWEN1, "awq"), 1, FAILS, "0.23.0 was the last"),
    ("vllm:0.23.0", made(QWEN1, "awq"), 1, OK, ""),
    ("vllm", made(INTERNLM, "awq"), 1, FAILS, "0.23.0 was the last"),
    ("vllm", made(LLAMA, "awq"), 2, OK, ""),
    ("vllm", made(LLAMA, "awq"), 4, FAILS, "down has K = 11008, 2752"),
    ("vllm", made(LLAMA, "awq", 64), 4, OK, ""),
    ("vllm", made(DEMO, "awq", 64), 2, FAILS, "9 attention heads on 2 ranks"),
    ("vllm", made(LLAMA, "awq", float_linears=floats("q")), 1, FAILS, "partly int4"),
    ("vllm", made(LLAMA, "awq", float_linears=floats("q", "k", "v")), 1, OK, ""),
    ("vllm", made(MIXTRAL, "awq"), 1, OK, ""),
    (
        "vllm",
        made(replace(MIXTRAL, hidden_size=4160, num_heads=32, head_dim=130), "awq", 32),
        1,
        CAVEAT,
        "4160",
    ),
    # SGLang: awq/awq.py falls back, the others have Marlin alone
    ("sglang", made(LLAMA, "awq"), 1, OK, ""),
    ("sglang", made(LLAMA, "gguf", 32), 1, OK, ""),
    ("sglang", made(DEMO, "awq", 64), 1, CAVEAT, "slow AWQ kernel"),
    ("sglang", made(DEMO, CT, 32), 1, FAILS, "K = 576"),
    ("sglang", made(LLAMA, CT), 1, OK, ""),
    ("sglang", made(LLAMA, "gptq"), 1, FAILS, "zero points other than 8"),
    ("sglang", made(INTERNLM, "awq"), 1, FAILS, "InternLMForCausalLM is not served"),
    ("sglang", made(LLAMA, CT, 64), 4, FAILS, "11008, 2752"),
    # transformers: quantizers, integrations
    ("transformers", made(LLAMA, "awq"), 1, CAVEAT, "gptqmodel"),
    ("transformers", made(LLAMA, CT, 64), 1, CAVEAT, "package of that name"),
    ("transformers", made(LLAMA, "gptq"), 1, CAVEAT, "optimum"),
    ("transformers", Artefact("float", LLAMA), 1, OK, ""),
    ("transformers", made(MIXTRAL, "awq"), 1, FAILS, "8 experts"),
    ("transformers", made(MIXTRAL, CT), 1, FAILS, "8 experts"),
    ("transformers", made(MIXTRAL, CT, 128, symmetric=True), 1, CAVEAT, "package of that name"),
    ("transformers", made(LLAMA, "mlx", 64), 1, FAILS, "mlx is not read"),
    ("transformers", Artefact("float", QWEN1), 1, CAVEAT, "trust_remote_code"),
    ("transformers", made(LLAMA, "gguf", 32), 1, CAVEAT, "dequantized at load"),
    # llama.cpp
    ("llama.cpp", made(LLAMA, "gguf", 128), 1, OK, ""),
    ("llama.cpp", made(LLAMA, "awq"), 1, FAILS, "llama.cpp reads GGUF"),
    ("llama.cpp", made(MISTRAL, "gguf", 32), 1, CAVEAT, "sliding window of 4096"),
    ("llama.cpp", made(INTERNLM, "gguf", 32), 1, FAILS, "not written as GGUF"),
    ("llama.cpp", made(LLAMA, "gguf", 32), 2, CAVEAT, "splits a model"),
    # mlx-lm
    ("mlx", made(LLAMA, "mlx", 64), 1, OK, ""),
    ("mlx", made(LLAMA, "awq", 64), 1, OK, ""),
    ("mlx", made(MIXTRAL, "mlx", 64), 1, OK, ""),
    ("mlx", made(MIXTRAL, "awq", 64), 1, FAILS, "8 experts"),
    ("mlx", made(LLAMA, "gptq", 64), 1, FAILS, "gptq is not read"),
    ("mlx", made(LLAMA, CT, 64), 1, FAILS, "compressed-tensors is not read"),
    ("mlx", made(INTERNLM, "mlx", 64), 1, FAILS, "no model of mlx-lm"),
    # everywhere
    ("vllm", made(LLAMA, "awq", bits=3), 1, CAVEAT, "saves nothing"),
    ("lmdeploy", made(LLAMA, "awq", has_kv_parameters=True), 1, CAVEAT, "int8 KV cache"),
]


@pytest.mark.parametrize(("engine", "artefact", "tp", "outcome", "reason"), CASES)
def test_verdict(engine: str, artefact: Artefact, tp: int, outcome: str, reason: str) -> None:
    verdict = judge(artefact, *parse_engine(engine), tp)
    assert verdict.outcome == outcome, verdict.findings
    if reason:
        assert reason in " ".join(
            finding.reason for finding in verdict.findings if finding.outcome == outcome
        )
    for finding in verdict.findings:
        assert finding.remedy and finding.source and "{" not in finding.reason


def test_there_are_enough_cases_and_every_rule_has_one_that_meets_it() -> None:
    assert len(CASES) >= 60
    met = set()
    for engine, artefact, tp, *_ in CASES:
        name, version = parse_engine(engine)
        met |= {
            (name, finding.source, finding.remedy) for finding in judge(artefact, name, version, tp).findings
        }
    specific = [rule for rule in RULES if rule.check not in ("bits_below_four", "kv_parameters")]
    unmet = [(r.engine, r.check) for r in specific if (r.engine, r.source, r.remedy) not in met]
    assert len(unmet) <= 12, unmet


def test_versions_and_names() -> None:
    assert parse_engine("vllm") == ("vllm", ENGINES["vllm"].read[-1])
    assert parse_engine("lmdeploy:0.7.3") == ("lmdeploy", "0.7.3")
    for wrong in ("onnx", "vllm:latest", "lmdeploy:0.x"):
        with pytest.raises(UsageError, match="--for"):
            parse_engine(wrong)
    verdict = judge(made(LLAMA, "awq"), "lmdeploy", "0.15.0")
    assert "was not read" in verdict.notes[0]
    assert judge(made(LLAMA, "awq"), "lmdeploy", "0.14") == replace(
        judge(made(LLAMA, "awq"), "lmdeploy", "0.14.0"),
        version="0.14",
        notes=judge(made(LLAMA, "awq"), "lmdeploy", "0.14").notes,
    )
