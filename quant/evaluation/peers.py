"""Other people's quantizers, where they are installed, on the same calibration blocks; what they leave is written as a float checkpoint,
so that the same engine judges it.

S samples, L tokens a sample. Names: llm-compressor-awq, llm-compressor-gptq, llm-compressor (AWQ, then GPTQ), auto-round (200 iterations).
"""

import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.errors import UsageError
from quant.config import QuantConfig

MODULES = {
    "llm-compressor-awq": "llmcompressor",
    "llm-compressor-gptq": "llmcompressor",
    "llm-compressor": "llmcompressor",
    "auto-round": "auto_round",
}
ITERATIONS = 200  # of AutoRound
COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
)


def check_peers(names: Sequence[str]) -> None:
    """Raises UsageError for a peer that is unknown or not installed."""
    for name in names:
        if name not in MODULES:
            raise UsageError(f"The peer {name!r} is not known: expected some of {', '.join(MODULES)}.")
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UsageError(
                f"The peer {name} needs the package {MODULES[name]}, which is not installed here."
            )


def quantize_with(
    name: str, source: Path, out: Path, tokens: Tensor, quant: QuantConfig, device: torch.device
) -> float:
    """Quantize the HF folder `source` and write the dequantized weights to `out`; returns the seconds of the search.

    Args:
        tokens: (S, L) int64. quant: bits and group size are read. The peers choose all else as they come; the head stays float.
    """
    check_peers([name])
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
    started = time.monotonic()
    with torch.enable_grad():
        if MODULES[name] == "llmcompressor":
            _llm_compressor(name, model, tokens, quant)
        else:
            model = _auto_round(model, AutoTokenizer.from_pretrained(source), tokens, quant)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - started
    save_file(dequantized(model), out / "model.safetensors", metadata={"format": "pt"})
    for file in COPIED:
        if (source / file).is_file():
            shutil.copyfile(source / file, out / file)
    return seconds


def _llm_compressor(name: str, model: Any, tokens: Tensor, quant: QuantConfig) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    weights = {
        "num_bits": quant.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": quant.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    recipe: list[Any] = [] if name == "llm-compressor-gptq" else [AWQModifier(duo_scaling="both")]
    last = QuantizationModifier if name == "llm-compressor-awq" else GPTQModifier
    recipe.append(last(config_groups=groups, ignore=["lm_head"]))
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )


def _auto_round(model: Any, tokenizer: Any, tokens: Tensor, quant: QuantConfig) -> Any:
    from auto_round import AutoRound

    search = AutoRound(
        model,
        tokenizer,
        bits=quant.bits,
        group_size=quant.group_size,
        sym=False,
        iters=ITERATIONS,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=[{"input_ids": sample[None]} for sample in tokens],
        batch_size=8,
        low_gpu_mem_usage=False,
    )
    done = search.quantize()
    return done[0] if isinstance(done, tuple) else done


@torch.no_grad()
def dequantized(model: Any) -> dict[str, Tensor]:
    """The weights that the model computes with, float32 on the CPU, by their names in an HF checkpoint."""
    names = {
        name
        for name, _ in model.named_parameters()
        if not name.endswith(("_scale", "_zero_point", "_g_idx", "_global_scale"))
    }
    tensors = {}
    for prefix, module in model.named_modules():
        for part, value in module.named_parameters(recurse=False):
            name = f"{prefix}.{part}" if prefix else part
            if name not in names or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue
            if part == "weight" and getattr(module, "quantization_scheme", None) is not None:
                from compressed_tensors.quantization.lifecycle.forward import forward_quantize

                value = forward_quantize(module, value, "weight", module.quantization_scheme.weights)
            tensors[name] = value.detach().float().cpu().contiguous()
    return tensors
