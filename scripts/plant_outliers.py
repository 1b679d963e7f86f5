"""Writes a copy of a Llama-style float checkpoint with outlier channels that change no output.

usage: python scripts/plant_outliers.py MODEL_DIR OUT [--channels 8] [--factor 16] [--seed 0]

In every norm before q, k, v and before gate, up some channels of the weight are multiplied by --factor, a power of two, and the columns of the
linears that read them are divided by it. In float32 each product is the same number, bit for bit, so that the model computes what it
computed; but those channels now carry large activations and small weights, which plain rounding of groups wipes out.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def plant(tensors: dict[str, Tensor], channels: int, factor: float, seed: int) -> int:
    """Rescale in place, float32; returns how many norms were changed. Raises ValueError where a value would not survive."""
    if factor <= 0 or not math.log2(factor).is_integer():
        raise ValueError(f"factor is {factor}: expected a power of two, with which the rescaling is exact.")
    changed = 0
    for name in sorted(tensors):
        prefix, _, part = name.removesuffix(".weight").rpartition(".")
        if part not in READERS:
            continue
        generator = torch.Generator().manual_seed(seed + changed)
        chosen = torch.randperm(len(tensors[name]), generator=generator)[:channels]
        scale = torch.ones(len(tensors[name]))
        scale[chosen] = factor
        pieces = {name: scale, **{f"{prefix}.{reader}.weight": 1 / scale for reader in READERS[part]}}
        for other, by in pieces.items():
            if other not in tensors:
                raise ValueError(f"{other} is missing: expected a checkpoint with the tensor names of Llama.")
            before = tensors[other].float()
            tensors[other] = before * by
            if not torch.equal(tensors[other] / by, before):
                raise ValueError(
                    f"{other} has values too small or too large to be rescaled by {factor} exactly."
                )
        changed += 1
    return changed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=8, help="of each norm")
    parser.add_argument("--factor", type=float, default=16.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for path in sorted(args.model.glob("*.safetensors")):
        tensors |= load_file(path)
    changed = plant(tensors, args.channels, args.factor, args.seed)
    tensors = {name: value.float().contiguous() for name, value in tensors.items()}
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})
    for path in args.model.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".tmq-tmp")):
            shutil.copyfile(path, args.out / path.name)
    print(f"{args.out}: {args.channels} channels of {changed} norms times {args.factor:g}")


if __name__ == "__main__":
    main()
