"""The rules by which engines load a model, as data: each row with the file of the engine in which it was read, and since when.

`since` and `before` are versions of the engine that were read; a row holds from `since` up to, not with, `before`.
"""

from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["loads", "caveat", "fails"]


@dataclass(frozen=True)
class Rule:
    """`check` names a question of `convert.verdict.checks`; where it finds something, the row's outcome and words apply."""

    engine: str
    check: str
    source: str
    reason: str  # {found} stands for what was found
    remedy: str
    outcome: Outcome = "fails"
    values: Any = None
    formats: tuple[str, ...] = ()  # that the row is about; none: all
    since: str = ""
    before: str = ""


@dataclass(frozen=True)
class Engine:
    """`read`: versions of it whose code the rules come from, oldest first. `package`: what the user installs."""

    name: str
    package: str
    read: tuple[str, ...]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("lmdeploy", "lmdeploy", ("0.6.5", "0.7.3", "0.12.3", "0.13.0", "0.14.0", "0.16.0", "0.18.0")),
        Engine("vllm", "vllm", ("0.33.0",)),
        Engine("sglang", "sglang", ("0.5.23",)),
        Engine("transformers", "transformers", ("5.24.0",)),
        Engine("llama.cpp", "llama.cpp", ("11549",)),
        Engine("mlx", "mlx-lm", ("0.32.2",)),
    )
}

TO_AWQ = "quantize pack PATH -o OUT --format awq"
TO_CT = "quantize pack PATH -o OUT --format compressed-tensors"
PACKED = ("awq", "compressed-tensors", "gptq")

_TM_OLD = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "InternLMForCausalLM",
    "InternLM2ForCausalLM",
    "QWenLMHeadModel",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
)
_TM_QWEN3 = (*_TM_OLD, "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
_TM_NEW = (
    "LlamaForCausalLM",
    "InternLM2ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
)
_PYTORCH_ENGINE = (
    *_TM_QWEN3,
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
)
_TM_FILE = "lmdeploy/turbomind/supported_models.py"
_TM_CONVERTER = "lmdeploy/turbomind/converter.py (before 0.14: turbomind/deploy/converter.py)"

LMDEPLOY = (
    Rule(
        "lmdeploy",
        "any_model",
        "lmdeploy/turbomind/deploy (0.8.0 on: no reader of workspaces)",
        "workspaces are read by LMDeploy 0.6.4 to 0.7.3: 0.8.0 to 0.9.2 take one and answer from memory that was never set, later "
        "ones have no reader",
        f"give this version a checkpoint: {TO_AWQ}, or {TO_CT}",
        formats=("workspace-0.6.5",),
        since="0.8.0",
    ),
    Rule(
        "lmdeploy",
        "any_model",
        "lmdeploy/turbomind (0.0.14 to 0.3.0: config.ini)",
        "a workspace of dialect 0.1 is read by LMDeploy 0.0.14 to 0.3.0",
        f"quantize pack PATH -o OUT (dialect 0.6.5, for 0.6.4 to 0.7.3), or {TO_AWQ}",
        formats=("workspace-0.1",),
        since="0.6.5",
    ),
    Rule(
        "lmdeploy",
        "other_format",
        _TM_CONVERTER,
        "{found} is not read: this version knows awq and gptq",
        TO_AWQ,
        values=("awq", "gptq", "float", "workspace-0.6.5", "workspace-0.1"),
        before="0.12.0",
    ),
    Rule(
        "lmdeploy",
        "other_format",
        _TM_CONVERTER,
        "{found} is not read",
        f"{TO_AWQ} (groups of 128), or {TO_CT} (32 or 128)",
        values=(*PACKED, "float", "workspace-0.6.5", "workspace-0.1"),
        since="0.12.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture",
        _TM_FILE,
        "{found} is not served by TurboMind",
        "use LMDeploy 0.7.3 or later, where it is served, or vLLM",
        values=_TM_OLD,
        before="0.7.3",
    ),
    Rule(
        "lmdeploy",
        "other_architecture",
        _TM_FILE,
        "{found} is not served by TurboMind",
        "serve it with vLLM or SGLang",
        values=_TM_QWEN3,
        since="0.7.3",
        before="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture",
        f"{_TM_FILE}, pytorch/models/module_map.py",
        "{found} is served by neither engine of LMDeploy",
        "serve it with vLLM or SGLang",
        values=(*_TM_NEW, *_PYTORCH_ENGINE),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture",
        f"{_TM_FILE}, archs.py",
        "TurboMind does not serve {found}: LMDeploy falls back to its PyTorch engine, which is slower",
        "use LMDeploy 0.13.0 for TurboMind, or take it as it is",
        outcome="caveat",
        values=_TM_NEW,
        formats=("awq", "compressed-tensors", "float"),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture",
        "lmdeploy/pytorch/config.py",
        "TurboMind does not serve {found}, and the PyTorch engine reads no GPTQ",
        TO_AWQ,
        values=_TM_NEW,
        formats=("gptq",),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture_in_other_groups",
        "lmdeploy/pytorch/config.py",
        "{found}: the PyTorch engine reads compressed-tensors with symmetric groups of 32 alone",
        TO_AWQ,
        values=(_TM_NEW, 32),
        formats=("compressed-tensors",),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_architecture_with_experts",
        "lmdeploy/pytorch/nn/moe/__init__.py",
        "{found} is a mixture of experts, for which the PyTorch engine has no AWQ",
        "serve it with vLLM",
        values=_TM_NEW,
        formats=("awq",),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_group",
        _TM_CONVERTER,
        "TurboMind's AWQ and GPTQ have groups of 128 alone, found {found}",
        "quantize again with --group-size 128 (and --pad where the sizes need it); with groups of 32, "
        f"{TO_CT} for LMDeploy 0.12.3 and later",
        values=((128,), _TM_QWEN3),
        formats=("awq", "gptq"),
        before="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_group",
        _TM_CONVERTER,
        "TurboMind's AWQ and GPTQ have groups of 128 alone, found {found}",
        f"quantize again with --group-size 128 (and --pad where the sizes need it); with groups of 32, {TO_CT}",
        values=((128,), _TM_NEW),
        formats=("awq", "gptq"),
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "other_group",
        _TM_CONVERTER,
        "this version's compressed-tensors have groups of 128 alone, found {found}",
        "quantize again with --group-size 128 (and --pad), or use LMDeploy 0.12.3 or later with groups of 32",
        values=((128,), None),
        formats=("compressed-tensors",),
        since="0.12.0",
        before="0.12.3",
    ),
    Rule(
        "lmdeploy",
        "other_group",
        _TM_CONVERTER,
        "TurboMind's compressed-tensors have groups of 32 or 128, found {found}",
        "quantize again with --group-size 32, or 128 (and --pad where the sizes need it)",
        values=((32, 128), _TM_NEW),
        formats=("compressed-tensors",),
        since="0.12.3",
    ),
    Rule(
        "lmdeploy",
        "asymmetric",
        _TM_CONVERTER,
        "GPTQ is taken with sym true alone, found {found}",
        f"{TO_AWQ}, or quantize with --symmetric",
        formats=("gptq",),
    ),
    Rule(
        "lmdeploy",
        "head_dim",
        _TM_FILE,
        "{found}, and this version's attention has 64 and 128 alone",
        "use LMDeploy 0.14.0 or later",
        values=((64, 128), ("LlamaForCausalLM", "Qwen2ForCausalLM")),
        before="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "heads",
        "lmdeploy/turbomind/builders/attention.py",
        "{found} cannot be shared evenly",
        "choose a tp that divides the heads",
    ),
    Rule(
        "lmdeploy",
        "fewer_kv_heads",
        "lmdeploy/turbomind/deploy/parameter.py (0.6.5, 0.7.3)",
        "{found}: its own conversion of int4 weights stops there",
        "choose a tp of at most the KV heads, or pack a workspace here (quantize pack --tp)",
        formats=("awq", "gptq"),
        before="0.8.0",
    ),
    Rule(
        "lmdeploy",
        "inputs_per_rank",
        "lmdeploy/turbomind/builders/_base.py (the MLP is padded)",
        "{found}",
        "choose a smaller tp",
        values=(None, "attention"),
        formats=PACKED,
    ),
    Rule(
        "lmdeploy",
        "float_linears",
        "lmdeploy/turbomind/deploy/source_model (all linears of a quantized model are looked for packed)",
        "{found}, and this version wants all of them int4",
        "quantize again with --pad in place of --keep-ragged",
        formats=("awq", "gptq"),
        before="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "fused_of_two_kinds",
        "lmdeploy/turbomind/weight_format.py",
        "{found}: TurboMind dequantizes the int4 ones at load",
        "leave all of them float, or none",
        outcome="caveat",
        formats=PACKED,
        since="0.14.0",
    ),
    Rule(
        "lmdeploy",
        "sliding_window",
        "lmdeploy/turbomind (0.6.5)",
        "{found}: this version attends to everything",
        "keep prompts shorter than the window, or serve it with vLLM",
        outcome="caveat",
        before="0.14.0",
    ),
)

_VLLM = "vllm/model_executor/layers/quantization/"
VLLM = (
    Rule(
        "vllm",
        "other_format",
        _VLLM + "__init__.py",
        "{found} is not read",
        f"{TO_CT}, or {TO_AWQ}",
        values=(*PACKED, "float"),
    ),
    Rule(
        "vllm",
        "this_architecture",
        "vllm/model_executor/models/registry.py",
        "{found} is no longer served: 0.23.0 was the last",
        "use vllm 0.23.0 or earlier, or LMDeploy 0.7.3 to 0.13.0",
        values=("InternLMForCausalLM", "QWenLMHeadModel"),
        since="0.24.0",
    ),
    Rule(
        "vllm",
        "asymmetric",
        _VLLM + "auto_gptq.py (TYPE_MAP)",
        "GPTQ is taken with sym true alone, found {found}",
        f"{TO_CT}, or quantize with --symmetric",
        formats=("gptq",),
    ),
    Rule(
        "vllm",
        "other_group",
        _VLLM + "utils/marlin_utils.py",
        "the kernels have groups of 32, 64 and 128, found {found}",
        "quantize again with one of these as --group-size",
        values=((32, 64, 128), None),
        formats=PACKED,
    ),
    Rule(
        "vllm",
        "heads",
        "vllm/config/model.py (verify_with_parallel_config)",
        "{found} cannot be shared evenly",
        "choose a tp that divides the heads",
    ),
    Rule(
        "vllm",
        "inputs_per_rank",
        _VLLM + "utils/marlin_utils.py (a group may not straddle ranks)",
        "{found}",
        "choose a smaller tp, or a smaller --group-size",
        formats=PACKED,
    ),
    Rule(
        "vllm",
        "outputs_per_rank",
        _VLLM + "auto_awq.py (eight outputs share a word)",
        "{found}",
        f"choose a smaller tp, or {TO_CT}",
        values=8,
        formats=("awq",),
    ),
    Rule(
        "vllm",
        "fused_of_two_kinds",
        _VLLM + "utils/quant_utils.py (is_layer_skipped)",
        "{found}: vLLM joins them and refuses",
        "leave all of them float, or none",
        formats=PACKED,
    ),
    Rule(
        "vllm",
        "expert_hidden",
        _VLLM + "utils/marlin_utils.py (check_moe_marlin_supports_config)",
        "{found} is no multiple of 128: experts run on the slower moe_wna16 kernel",
        "take it as it is",
        outcome="caveat",
        values=128,
        formats=("awq", "gptq"),
    ),
)

_SGLANG = "sglang/srt/layers/quantization/"
SGLANG = (
    Rule(
        "sglang",
        "other_format",
        _SGLANG + "__init__.py",
        "{found} is not read",
        f"{TO_AWQ}, or {TO_CT}",
        values=(*PACKED, "float", "gguf"),
    ),
    Rule(
        "sglang",
        "this_architecture",
        "sglang/srt/models",
        "{found} is not served",
        "serve it with LMDeploy 0.7.3 to 0.13.0",
        values=("InternLMForCausalLM", "GlmForCausalLM"),
    ),
    Rule(
        "sglang",
        "asymmetric",
        _SGLANG + "gptq/gptq.py (Marlin alone, TYPE_MAP)",
        "GPTQ is taken with sym true alone, found {found}",
        f"{TO_AWQ}, or quantize with --symmetric",
        formats=("gptq",),
    ),
    Rule(
        "sglang",
        "other_group",
        _SGLANG + "marlin_utils.py",
        "the kernels have groups of 32, 64 and 128, found {found}",
        "quantize again with one of these as --group-size",
        values=((32, 64, 128), None),
        formats=PACKED,
    ),
    Rule(
        "sglang",
        "heads",
        "sglang/srt/models (QKVParallelLinear)",
        "{found} cannot be shared evenly",
        "choose a tp that divides the heads",
    ),
    Rule(
        "sglang",
        "inputs_per_rank",
        _SGLANG + "marlin_utils.py",
        "{found}",
        "choose a smaller tp, or a smaller --group-size",
        formats=PACKED,
    ),
    Rule(
        "sglang",
        "inputs_per_rank",
        _SGLANG + "awq/awq.py, marlin_utils.py",
        "{found}: that layer runs on the slow AWQ kernel",
        "take it as it is, or serve it with vLLM, which pads",
        outcome="caveat",
        values=128,
        formats=("awq",),
    ),
    Rule(
        "sglang",
        "joined_outputs_per_rank",
        _SGLANG + "awq/awq.py, marlin_utils.py",
        "{found}: that layer runs on the slow AWQ kernel",
        "take it as it is, or serve it with vLLM, which pads",
        outcome="caveat",
        values=64,
        formats=("awq",),
    ),
    Rule(
        "sglang",
        "inputs_per_rank",
        _SGLANG + "compressed_tensors/schemes/compressed_tensors_wNa16.py, gptq/gptq.py (Marlin, no padding)",
        "{found}",
        f"{TO_AWQ}, which has a slower kernel for it, or serve it with vLLM, which pads",
        values=128,
        formats=("compressed-tensors", "gptq"),
    ),
    Rule(
        "sglang",
        "joined_outputs_per_rank",
        _SGLANG + "compressed_tensors/schemes/compressed_tensors_wNa16.py, gptq/gptq.py (Marlin, no padding)",
        "{found}",
        f"{TO_AWQ}, which has a slower kernel for it, or serve it with vLLM, which pads",
        values=64,
        formats=("compressed-tensors", "gptq"),
    ),
    Rule(
        "sglang",
        "fused_of_two_kinds",
        _SGLANG + "utils.py (is_layer_skipped)",
        "{found}: SGLang joins them and refuses",
        "leave all of them float, or none",
        formats=PACKED,
    ),
)

_CUSTOM = ("InternLMForCausalLM", "InternLM2ForCausalLM", "QWenLMHeadModel")
TRANSFORMERS = (
    Rule(
        "transformers",
        "other_format",
        "transformers/quantizers/auto.py",
        "{found} is not read",
        f"{TO_CT}, or --format float16",
        values=(*PACKED, "float", "gguf"),
    ),
    Rule(
        "transformers",
        "this_architecture",
        "transformers/models",
        "{found} is no model of transformers: only code inside the checkpoint defines it (trust_remote_code)",
        "read that code before it runs, or serve the model with LMDeploy",
        outcome="caveat",
        values=_CUSTOM,
    ),
    Rule(
        "transformers",
        "any_model",
        "transformers/quantizers/quantizer_awq.py",
        "AWQ needs the package gptqmodel",
        f"pip install gptqmodel, or {TO_CT} with compressed-tensors installed",
        outcome="caveat",
        formats=("awq",),
    ),
    Rule(
        "transformers",
        "any_model",
        "transformers/quantizers/quantizer_gptq.py",
        "GPTQ needs the packages gptqmodel (1.4.3 or later) and optimum (1.24 or later)",
        f"pip install gptqmodel optimum, or {TO_CT}",
        outcome="caveat",
        formats=("gptq",),
    ),
    Rule(
        "transformers",
        "any_model",
        "transformers/quantizers/quantizer_compressed_tensors.py",
        "compressed-tensors needs the package of that name (0.15 or later)",
        "pip install compressed-tensors",
        outcome="caveat",
        formats=("compressed-tensors",),
    ),
    Rule(
        "transformers",
        "any_model",
        "transformers/modeling_gguf_pytorch_utils.py",
        "a GGUF file is dequantized at load (gguf_file=...)",
        TO_CT,
        outcome="caveat",
        formats=("gguf",),
    ),
    Rule(
        "transformers",
        "experts",
        "transformers/integrations/awq.py (nn.Linear alone is replaced, experts are one fused tensor)",
        "{found} are not loaded from AWQ or GPTQ",
        "quantize with --symmetric and pack as compressed-tensors, or serve it with vLLM",
        formats=("awq", "gptq"),
    ),
    Rule(
        "transformers",
        "asymmetric_experts",
        "transformers/integrations/compressed_tensors.py (no zero point is passed to fused experts)",
        "{found} with zero points other than 8 are not loaded",
        "quantize with --symmetric, or serve it with vLLM",
        formats=("compressed-tensors",),
    ),
)

LLAMA_CPP = (
    Rule(
        "llama.cpp",
        "other_format",
        "llama.cpp (src/llama-model-loader.cpp)",
        "{found} is not read: llama.cpp reads GGUF",
        "quantize pack PATH -o OUT --format gguf",
        values=("gguf",),
    ),
    Rule(
        "llama.cpp",
        "other_architecture",
        "gguf/constants.py (MODEL_ARCH) and our writer",
        "{found} is not written as GGUF here",
        "serve it with vLLM",
        values=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "MixtralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        ),
        formats=("gguf",),
    ),
    Rule(
        "llama.cpp",
        "sliding_window",
        "llama.cpp (src/models/llama.cpp)",
        "{found} has no place in the file: llama.cpp attends to everything",
        "keep prompts shorter than the window",
        outcome="caveat",
        formats=("gguf",),
    ),
    Rule(
        "llama.cpp",
        "ranks",
        "llama.cpp (--split-mode)",
        "{found}: llama.cpp splits a model by layers or rows itself, there are no sizes for each rank",
        "choose --split-mode and --tensor-split there",
        outcome="caveat",
        formats=("gguf",),
    ),
)

MLX = (
    Rule(
        "mlx",
        "other_format",
        "mlx_lm/utils.py",
        "{found} is not read",
        "quantize pack PATH -o OUT --format mlx",
        values=("mlx", "awq", "float"),
    ),
    Rule(
        "mlx",
        "this_architecture",
        "mlx_lm/models",
        "{found} is no model of mlx-lm",
        "quantize pack PATH -o OUT --format gguf where llama.cpp serves it, or serve it with LMDeploy",
        values=("InternLMForCausalLM",),
    ),
    Rule(
        "mlx",
        "experts",
        "mlx_lm/utils.py (experts are stacked before AWQ is unpacked)",
        "{found} are not loaded from AWQ",
        "quantize pack PATH -o OUT --format mlx (Mixtral)",
        formats=("awq",),
    ),
    Rule(
        "mlx",
        "this_architecture",
        "mlx_lm/models/qwen3_moe.py (only float experts are stacked)",
        "the loader of {found} stacks float experts alone",
        "quantize pack PATH -o OUT --format float16 and convert it with mlx_lm.convert",
        values=("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"),
        formats=("mlx",),
    ),
    Rule(
        "mlx",
        "other_group",
        "mlx/ops.cpp (affine)",
        "the kernels have groups of 32, 64 and 128, found {found}",
        "quantize again with one of these as --group-size",
        values=((32, 64, 128), None),
        formats=("mlx", "awq"),
    ),
)

EVERYWHERE = tuple(
    rule
    for name in ENGINES
    for rule in (
        Rule(
            name,
            "bits_below_four",
            "convert/linear_layouts",
            "{found}: it loads as int4 and saves nothing over it",
            "quantize with --bits 4 to serve",
            outcome="caveat",
        ),
        Rule(
            name,
            "kv_parameters",
            "docs/FORMATS.md",
            "{found} are read by our own engine alone: this one makes its own as tokens come",
            "nothing to do",
            outcome="caveat",
            formats=PACKED,
        ),
    )
)

RULES: tuple[Rule, ...] = (*LMDEPLOY, *VLLM, *SGLANG, *TRANSFORMERS, *LLAMA_CPP, *MLX, *EVERYWHERE)
