"""Writes a copy of a Llama-style float checkpoint whose weights are rotated so that no output changes.

usage: python scripts/rotate_model.py MODEL_DIR OUT [--heads] [--residual] [--seed 0]

--heads: the channels of v in each KV head, and back in the columns of o (all query heads of that KV head read the same rotation).
--residual: the hidden state itself (Ashkboos et al., QuaRot, 2024): the norms' weights go into the linears that read them, the
embedding and what writes into the stream are rotated, what reads it is rotated back; the head is untied, because the final norm is
in it. Rotations are orthogonal matrices drawn at random; the products are made in float64, the weights written in float32.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from plant_outliers import READERS

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
)  # norms that multiply by their weight, an embedding that is not scaled
WRITE = ("self_attn.o_proj", "mlp.down_proj")


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (size, size), float64, uniform by the signs of R in the QR of a Gaussian."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotate_heads(tensors: dict[str, Tensor], layers: int, head_dim: int, generator: torch.Generator) -> None:
    """v (Hkv * D, H) and o (H, Hq * D) of every block, in place, float64."""
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn."
        v, o = tensors[prefix + "v_proj.weight"], tensors[prefix + "o_proj.weight"]
        kv_heads, heads = v.shape[0] // head_dim, o.shape[1] // head_dim
        turns = torch.stack([orthogonal(head_dim, generator) for _ in range(kv_heads)])
        for name in ("v_proj.weight", "v_proj.bias"):
            if prefix + name in tensors:
                part = tensors[prefix + name]
                grouped = part.view(kv_heads, head_dim, -1)
                tensors[prefix + name] = torch.matmul(turns, grouped).view(part.shape)
        of_queries = turns.repeat_interleave(heads // kv_heads, 0)
        columns = o.view(o.shape[0], heads, head_dim)
        tensors[prefix + "o_proj.weight"] = torch.einsum("nhd,hed->nhe", columns, of_queries).reshape(o.shape)


def rotate_residual(tensors: dict[str, Tensor], layers: int, generator: torch.Generator) -> None:
    """The hidden state of every block, in place, float64; the head is written beside the embedding."""
    embedding = tensors["model.embed_tokens.weight"]
    turn = orthogonal(embedding.shape[1], generator)
    head = tensors.get("lm_head.weight", embedding)
    tensors["lm_head.weight"] = head * tensors["model.norm.weight"] @ turn.t()
    tensors["model.embed_tokens.weight"] = embedding @ turn.t()
    tensors["model.norm.weight"] = torch.ones_like(tensors["model.norm.weight"])
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for norm, readers in READERS.items():
            weight = tensors[f"{prefix}{norm}.weight"]
            for reader in readers:
                name = f"{prefix}{reader}.weight"
                tensors[name] = tensors[name] * weight @ turn.t()
            tensors[f"{prefix}{norm}.weight"] = torch.ones_like(weight)
        for writer in WRITE:
            for name in (f"{prefix}{writer}.weight", f"{prefix}{writer}.bias"):
                if name in tensors:
                    tensors[name] = turn @ tensors[name]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", action="store_true", help="rotate v and o in each KV head")
    parser.add_argument("--residual", action="store_true", help="rotate the hidden state")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if not args.heads and not args.residual:
        parser.error("nothing to rotate: give --heads, --residual or both")
    if args.out.exists() and args.out.samefile(args.model):
        parser.error("OUT is the model itself: give another folder")
    config = json.loads((args.model / "config.json").read_text())
    if config.get("model_type") not in FAMILIES:
        parser.error(
            f"{args.model} is of type {config.get('model_type')}: expected one of {', '.join(FAMILIES)}"
        )
    tensors: dict[str, Tensor] = {}
    for path in sorted(args.model.glob("*.safetensors")):
        tensors |= load_file(path)
    tensors = {name: value.double() for name, value in tensors.items()}
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    generator = torch.Generator().manual_seed(args.seed)
    if args.heads:
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        rotate_heads(tensors, layers, head_dim, generator)
    if args.residual:
        rotate_residual(tensors, layers, generator)
        config["tie_word_embeddings"] = False
    args.out.mkdir(parents=True, exist_ok=True)
    written = {name: value.float().contiguous() for name, value in tensors.items()}
    save_file(written, args.out / "model.safetensors", metadata={"format": "pt"})
    for path in args.model.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json", ".tmq-tmp")):
            shutil.copyfile(path, args.out / path.name)
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")} | {
        "dtype": "float32"
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    what = " and ".join(name for name in ("heads", "residual") if getattr(args, name))
    print(f"{args.out}: {what} rotated in {layers} blocks")


if __name__ == "__main__":
    main()
