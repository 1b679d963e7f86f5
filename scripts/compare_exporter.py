"""Workspaces of ours against those that lmdeploy 0.6.5's own exporter writes from the same checkpoint, byte for byte, on a CPU.

    python scripts/compare_exporter.py UNPACKED_WHEEL [--out benchmarks]

UNPACKED_WHEEL is the folder with lmdeploy/ from the wheel of lmdeploy 0.6.5; its Python runs in this process, with small stand-ins
for what it imports and does not need here: a registry of classes, progress bars, the tokenizer's three numbers, and a device
(`Tensor.cuda` gives the tensor back). Nothing of it is imported elsewhere in this project. Differences that are expected, with their
reasons, stand in EXPECTED; all others fail.
"""

import argparse
import dataclasses
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import types
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from tiny_checkpoints import quantize_source, write_source  # noqa: E402
from turbomind_rows import merge_rows  # noqa: E402

from convert.readers import open_checkpoint  # noqa: E402
from convert.turbomind.writer import write_workspace  # noqa: E402
from kernels.int4 import Quantized  # noqa: E402

EXPECTED = {  # keys of config.yaml that may differ, and why
    "model_name": "theirs is what the caller says; ours is the family",
    "chat_template": "theirs is guessed from the folder's name, ours from the chat template",
    "start_id": "theirs come from the tokenizer, or are constants of the family; ours from config.json",
    "end_id": "as start_id",
}
FAMILIES = ("llama", "mistral", "internlm2", "qwen2", "internlm", "qwen", "mixtral")
LOST_BIAS = "their InternLM reader states no attention bias, so the biases of the checkpoint are dropped"
HALVED = (
    "Qwen-1 states gate and up together; they take it for the size of each, and fill up with zeros: the same function in twice "
    "the memory, and with tp 2 the second rank holds zeros alone"
)
THEIR_BUGS = {  # (family, part of the name of a file or key) -> reason
    ("internlm", "bias"): LOST_BIAS,
    ("qwen", "feed_forward"): HALVED,
    ("qwen", "inter_size"): HALVED,
    (
        "qwen",
        "attention_factor",
    ): "their Qwen-1 reader leaves it null; -1 says the same to the engine as a number",
}


class Registry(dict[str, Any]):
    """Name -> class: the part of mmengine's registry that the exporter uses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def register_module(self, name: str | list[str]) -> Any:
        def keep(cls: Any) -> Any:
            for one in [name] if isinstance(name, str) else name:
                self[one] = cls
            return cls

        return keep


class HfConfig:
    """config.json with attribute access, as the exporter asks for it."""

    def __init__(self, folder: str) -> None:
        self.raw = json.loads((Path(folder) / "config.json").read_text())
        self.torch_dtype = getattr(torch, self.raw.get("torch_dtype", "float16"))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.raw)


class TokenizerNumbers:
    """What `tokenizer_info` reads."""

    vocab_size, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, folder: str) -> None:
        pass


def load_exporter(wheel: Path) -> Any:
    """The module lmdeploy.turbomind.deploy.converter of the wheel, with stand-ins for its other imports."""

    def stand_in(name: str, **contents: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        sys.modules[name] = module

    def package(name: str, folder: Path) -> None:
        stand_in(name, __path__=[str(folder)])

    def arch(folder: str) -> tuple[str, HfConfig]:
        config = HfConfig(folder)
        return config.raw["architectures"][0], config

    def nested(config: dict[str, Any], key: str) -> Any:
        return config.get(key)

    engine_config = dataclasses.make_dataclass(
        "TurbomindEngineConfig",
        [("tp", int, 1), ("model_format", Any, None), ("dtype", str, "auto")],
    )
    home = wheel / "lmdeploy"
    package("lmdeploy", home)
    package("lmdeploy.turbomind", home / "turbomind")
    stand_in("lmdeploy.archs", get_model_arch=arch, search_nested_config=nested)
    stand_in("lmdeploy.messages", TurbomindEngineConfig=engine_config)
    stand_in("lmdeploy.model", MODELS=Registry(), best_match_model=lambda folder: "base")
    stand_in("lmdeploy.tokenizer", Tokenizer=TokenizerNumbers)
    stand_in(
        "lmdeploy.utils",
        get_logger=logging.getLogger,
        get_model=None,
        _get_and_verify_max_len=lambda config, length: longest(config),
        is_bf16_supported=lambda: True,
    )
    stand_in("mmengine", Registry=Registry)
    stand_in("fire", Fire=None)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    supported = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "InternLMForCausalLM": "llama"}
    supported |= {"InternLM2ForCausalLM": "internlm2", "Qwen2ForCausalLM": "qwen2", "QWenLMHeadModel": "qwen"}
    supported |= {"MixtralForCausalLM": "mixtral"}
    stand_in(
        "lmdeploy.turbomind.supported_models", SUPPORTED_ARCHS=supported, is_supported=lambda folder: True
    )
    package("lmdeploy.turbomind.deploy", home / "turbomind" / "deploy")
    for kind, names in (
        ("source_model", ("base", "llama", "internlm2", "qwen", "mixtral")),
        ("target_model", ("base", "fp")),
    ):
        package(f"lmdeploy.turbomind.deploy.{kind}", home / "turbomind" / "deploy" / kind)
        for name in names:
            import_module(f"lmdeploy.turbomind.deploy.{kind}.{name}")
    return import_module("lmdeploy.turbomind.deploy.converter")


def longest(config: HfConfig) -> int:
    """The context length, from the same keys in the same order as lmdeploy looks for them."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
    return min(int(config.raw[key]) for key in keys if key in config.raw)


def export(converter: Any, source: Path, workspace: Path, tp: int) -> None:
    """Their workspace for the checkpoint, as `lmdeploy convert` makes it."""
    out, tokenizer = (workspace / "triton_models" / name for name in ("weights", "tokenizer"))
    out.mkdir(parents=True)
    tokenizer.mkdir()
    shutil.copy(source / "config.json", tokenizer)
    method = "awq" if "quantization_config" in HfConfig(str(source)).raw else "hf"
    dtype = HfConfig(str(source)).raw["torch_dtype"] if method == "hf" else "auto"
    engine_config = sys.modules["lmdeploy.messages"].TurbomindEngineConfig(
        tp=tp, model_format=method, dtype=dtype
    )
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        model = converter.get_tm_model(str(source), source.name, "base", engine_config, 0, str(out))
        model.export()


def differences(ours: Path, theirs: Path) -> tuple[list[str], list[str]]:
    """(weight files that differ or are on one side only, keys of config.yaml that differ)."""
    names = {
        side: {path.name for path in side.iterdir() if path.suffix != ".yaml"} for side in (ours, theirs)
    }
    files = [f"{name}: only ours" for name in sorted(names[ours] - names[theirs])]
    files += [f"{name}: only theirs" for name in sorted(names[theirs] - names[ours])]
    for name in sorted(names[ours] & names[theirs]):
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            files.append(f"{name}: other bytes")
    mine, other = (yaml.safe_load((side / "config.yaml").read_text()) for side in (ours, theirs))
    keys = []
    for part in other:
        for key, value in other[part].items():
            if mine[part].get(key) != value:
                keys.append(f"{key}: ours {mine[part].get(key)!r}, theirs {value!r}")
    return files, keys


def read_back(ours: Path, theirs: Path, without_bias: bool) -> list[str]:
    """Roles of linears that our reader does not find equal in the two workspaces (theirs has no manifest)."""
    one, other = open_checkpoint(ours), open_checkpoint(theirs)
    wrong = []
    for index in range(one.config.num_layers):
        mine, found = one.block(index).linears, other.block(index).linears
        for role, linear in mine.items():
            pairs = [(linear.weight, found[role].weight)]
            pairs += [] if without_bias else [(linear.bias, found[role].bias)]
            wrong += [f"read back {index}.{role}" for mine_part, part in pairs if not same(mine_part, part)]
    return wrong


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Quantized):
        return all(
            torch.equal(getattr(one, part), getattr(other, part)) for part in ("codes", "scales", "zeros")
        )
    return (one is None and other is None) or torch.equal(one, other)


def compare(converter: Any, family: str, kind: str, tp: int, work: Path) -> dict[str, Any]:
    """One row; prints every difference with its reason."""
    dtype = "bfloat16" if kind == "bfloat16" else "float16"
    source = write_source(work / "source", family, dtype)
    if kind == "int4":
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            source = quantize_source(source, work / "awq")
    write_workspace(
        open_checkpoint(source), work / "ours", tp=tp, dtype="bfloat16" if dtype == "bfloat16" else None
    )
    try:
        export(converter, source, work / "theirs", tp)
    except Exception as error:
        print(f"{family} {kind} tp {tp}: their exporter stops with {type(error).__name__}: {error}")
        files, keys = ["their exporter stops"], []
    else:
        files, keys = differences(*(work / name / "triton_models/weights" for name in ("ours", "theirs")))
        files += read_back(work / "ours", work / "theirs", family == "internlm")
    unexplained = []
    for line in sorted({re.sub(r"layers\.\d+", "layers.*", line) for line in files}) + keys:
        key = line.split(":")[0]
        reason = EXPECTED.get(key) or next(
            (why for (of, part), why in THEIR_BUGS.items() if of == family and part in key), None
        )
        print(f"{family} {kind} tp {tp}: {line}" + (f" ({reason})" if reason else ""))
        unexplained += [] if reason else [line]
    print(f"{family} {kind} tp {tp}: {'same' if not unexplained else 'DIFFERENT'}", flush=True)
    row = {"name": family, "format": kind, "tp": tp, "check": "exporter", "passed": not unexplained}
    return {**row, "rel_error": None, "argmax": None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path, help="folder with lmdeploy/ of the unpacked wheel 0.6.5")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    converter = load_exporter(args.wheel)
    rows = []
    for family in args.families.split(","):
        for kind in ("float16", "bfloat16", "int4"):
            for tp in (1, 2):
                with tempfile.TemporaryDirectory() as work:
                    rows.append(compare(converter, family, kind, tp, Path(work)))
    merge_rows(
        args.out, rows, "cpu", "lmdeploy 0.6.5's exporter on the same checkpoint, weight files byte for byte"
    )
    failed = [row for row in rows if not row["passed"]]
    print(f"{len(rows)} workspaces, {len(failed)} with unexplained differences")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
