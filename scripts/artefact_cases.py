"""The models and the commands of record_artefacts.py: each case is an output with the command that writes it.

Three families (Llama; Qwen2, which has biases and a tied head; Mixtral), each with every preset, 3 bits, an int8 KV cache, statistics
kept apart and an end-to-end pass; a Llama whose sizes the group does not fit; workspaces of both dialects for one and two GPUs. The other
families once each: quantized, packed and judged.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import write_source
from tiny_models import tokenizer_document

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 264, "head_dim": 64}
SIZES |= {"bos_token_id": 256, "eos_token_id": 258}
WIDE = {"head_dim": 128, "num_attention_heads": 2}  # the heads that dialect 0.1 wants
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> family, and what differs from SIZES
    "llama": ("llama", WIDE),
    "ragged": ("llama", {"intermediate_size": 480}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "mistral": ("mistral", {}),
    "internlm": ("internlm", {**WIDE, "num_key_value_heads": 2}),
    "internlm2": ("internlm2", WIDE),
    "qwen": ("qwen", {**WIDE, "intermediate_size": 1024}),  # which counts two matrices
}
FAMILIES = ("llama", "qwen2", "mixtral")
OTHERS = ("mistral", "internlm", "internlm2", "qwen")
PRESETS = ("rtn", "gptq", "gptq-r", "awq", "fast", "default", "best")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
CPU = "--device cpu"
AMOUNT = f"--samples 4 --seqlen 64 {CPU}"
TEXT = f"{AMOUNT} --calib-data text.txt"
JUDGED = f"--windows 2 --kl-windows 2 {CPU}"


def tiny_cases() -> Iterator[tuple[str, str]]:
    """Case, which is also the name of the output, and the command without its -o."""
    for model in FAMILIES:
        for preset in PRESETS:
            yield f"{model}-{preset}", f"quantize awq {model} --preset {preset} {text_of(preset)}"
        yield f"{model}-int3", f"quantize awq {model} --bits 3 {TEXT}"
        yield f"{model}-kv8", f"quantize awq {model} --kv-bits 8 {TEXT}"
        yield f"{model}-distill", f"quantize awq {model} --preset fast --distill {TEXT}"
        yield f"{model}-stats", f"quantize calibrate {model} {TEXT}"
        yield f"{model}-of-stats", f"quantize awq {model} --preset fast --stats {model}-stats {CPU}"
    for preset in PRESETS:
        if preset != "default":
            yield f"llama-{preset}-int3", f"quantize awq llama --preset {preset} --bits 3 {text_of(preset)}"
    yield "llama-group32", f"quantize awq llama --group-size 32 {TEXT}"
    yield "llama-rtn-kv8", f"quantize awq llama --preset rtn --kv-bits 8 {TEXT}"
    yield "llama-own-text", f"quantize awq llama {AMOUNT}"
    yield "llama-by-tmq", f"tmq quantize awq llama --preset rtn {CPU}"
    yield "ragged-pad", f"quantize awq ragged --pad {TEXT}"
    yield "ragged-keep", f"quantize awq ragged --keep-ragged {TEXT}"
    for model in OTHERS:
        yield f"{model}-default", f"quantize awq {model} {TEXT}"
        yield f"{model}-ppl", f"evaluate ppl {model} {model}-default --seqlen 128 {JUDGED}"
    for model in (*FAMILIES, "llama-kv8", "qwen2-kv8", "mixtral-kv8", "ragged-pad"):
        for dialect in ("0.6.5", "0.1") if model in ("llama", "llama-kv8") else ("0.6.5",):
            for tp in (1, 2):
                case = f"{model}-{dialect}-tp{tp}"
                yield case, f"quantize pack {model} --dialect {dialect} --tp {tp}"
                yield f"{case}-unpacked", f"quantize unpack {case}"
    for model in OTHERS:
        for dialect in ("0.6.5",) if model == "mistral" else ("0.6.5", "0.1"):
            case = f"{model}-{dialect}"
            yield case, f"quantize pack {model}-default --dialect {dialect}"
            yield f"{case}-unpacked", f"quantize unpack {case}"
    yield "llama-bfloat16", "quantize pack llama --dtype bfloat16"
    for model in FAMILIES:
        paths = [model, *(f"{model}-{preset}" for preset in PRESETS), f"{model}-kv8-0.6.5-tp1"]
        yield f"{model}-ppl", f"evaluate ppl {' '.join(paths)} --seqlen 128 {JUDGED}"
    yield "llama-ppl-kv8", f"evaluate ppl llama-kv8 --kv-bits 8 --kv-mode static --seqlen 128 {JUDGED}"
    yield "llama-table", f"evaluate table llama {TEXT} --eval-seqlen 128 {JUDGED}"


def demo_cases() -> Iterator[tuple[str, str]]:
    for preset in ("rtn", "fast", "default"):
        how = CPU if preset == "rtn" else AMOUNT
        yield f"demo-{preset}", f"quantize awq demo.gguf --preset {preset} --pad {how}"
    for case, source in (("demo-workspace", "demo-default"), ("demo-float", "demo.gguf")):
        yield case, f"quantize pack {source}"
        yield f"{case}-unpacked", f"quantize unpack {case}"
    paths = "demo.gguf demo-rtn demo-fast demo-default demo-workspace"
    yield "demo-ppl", f"evaluate ppl {paths} --seqlen 256 {JUDGED}"


def text_of(preset: str) -> str:
    return CPU if preset == "rtn" else TEXT


def write_inputs(work: Path) -> None:
    """The tiny models with a byte tokenizer, and words of random letters as text."""
    for name, (family, changes) in MODELS.items():
        folder = write_source(work / name, family, **(SIZES | changes))
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
        (folder / "tokenizer_config.json").write_text(json.dumps({**TOKENIZER, "chat_template": TEMPLATE}))
    letters = torch.randint(0, 30, (6000,), generator=torch.Generator().manual_seed(5)).tolist()
    (work / "text.txt").write_text("".join("abcdefghijklmnopqrstuvwxyz. ,\n"[i] for i in letters))
