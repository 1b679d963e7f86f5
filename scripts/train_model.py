"""Trains a small Llama-architecture model from text, for figures on a second model: every dimension is a multiple of 128.

usage: python scripts/train_model.py TOKENIZER_DIR OUT --text c4-sample.txt --text wiki.valid.raw [--teacher MODEL_DIR [--prune]]

The tokenizer is that of TOKENIZER_DIR, its files are copied. Of each text the last --hold share (of its lines) is not trained on and is
written to OUT/held/NAME: calibrate on that file, and judge on a text that was not given here. With --teacher the
targets are that model's predictions, which say more about each token than the token that follows, and its embedding is where ours starts.
With --prune ours starts as the teacher with `--layers` of its layers, evenly spaced, widened to multiples of 128: training heals it.
"""

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")


def split_text(text: str, hold: float) -> tuple[str, str]:
    """(what is trained on, what is held out): whole lines, the last ones held out, `hold` of the characters at least."""
    lines = text.splitlines(keepends=True)
    kept, size = 0, 0
    while kept < len(lines) and size + len(lines[kept]) <= (1 - hold) * len(text):
        size += len(lines[kept])
        kept += 1
    return "".join(lines[:kept]), "".join(lines[kept:])


def windows(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` windows at random starts: (count, length) int64."""
    starts = torch.randint(0, len(ids) - length, (count,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def rate(progress: float, warmup: float = 0.05) -> float:
    """Linear rise, then half a cosine down to a tenth."""
    if progress < warmup:
        return progress / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def pruned_shape(args: argparse.Namespace) -> None:
    """Sets the sizes of `args` to the teacher's, each rounded up to a multiple of 128 by whole groups of heads."""
    teacher = json.loads((args.teacher / "config.json").read_text())
    size, inner = int(teacher["hidden_size"]), int(teacher["intermediate_size"])
    heads, kv_heads = int(teacher["num_attention_heads"]), int(teacher["num_key_value_heads"])
    group, head_dim = heads // kv_heads, size // heads
    while kv_heads * group * head_dim % 128:
        kv_heads += 1
    args.heads, args.kv_heads, args.hidden = kv_heads * group, kv_heads, kv_heads * group * head_dim
    args.inner = -(-inner // 128) * 128
    args.rope_theta = float(teacher["rope_theta"])
    args.norm_eps = float(teacher["rms_norm_eps"]) * size / args.hidden  # the mean runs over more channels
    args.kept = [
        round(i * (teacher["num_hidden_layers"] - 1) / max(1, args.layers - 1)) for i in range(args.layers)
    ]
    if len(set(args.kept)) < args.layers:
        raise SystemExit(f"--layers {args.layers}: the teacher has {teacher['num_hidden_layers']} layers.")


def config_of(args: argparse.Namespace, vocab_size: int) -> dict[str, object]:
    """The config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.hidden // args.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


@torch.no_grad()
def init_embedding(embedding: Tensor, teacher: Tensor) -> None:
    """Fill an embedding (V, H) with the teacher's (V, H'), turned to its principal axes; the widest H of them; columns beyond H' keep their values."""
    table = teacher.float()
    turn = torch.linalg.eigh(table.t() @ table)[1].flip(1)
    width = min(embedding.shape[1], table.shape[1])
    embedding[:, :width] = (table @ turn)[:, :width]


@torch.no_grad()
def init_pruned(student: torch.nn.Module, teacher: torch.nn.Module, kept: list[int]) -> None:
    """Write the teacher's tensors into the upper left of the student's, whose layer i is the teacher's `kept[i]`; the rest stays as it is.

    Norm weights are multiplied by sqrt(H / H'), because the student's mean square runs over H' >= H channels.
    """
    source = teacher.state_dict()
    shrink = math.sqrt(
        source["model.norm.weight"].numel() / student.state_dict()["model.norm.weight"].numel()
    )
    for name, target in student.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            value = source[f"model.layers.{kept[int(layer)]}.{rest}"]
        else:
            value = source[name]
        if value.ndim == 1:
            value = value * shrink
        target[tuple(slice(0, size) for size in value.shape)] = value.to(target.dtype)


def train(args: argparse.Namespace, ids: Tensor, vocab_size: int) -> torch.nn.Module:
    """Adam on random windows until the steps or the seconds are used up; weights in float32, products in bfloat16."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(args.device)
    model = LlamaForCausalLM(LlamaConfig(**config_of(args, vocab_size))).to(device).train()
    teacher = None
    if args.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).to(device).eval()
        if args.prune:
            init_pruned(model, teacher, args.kept)
        else:
            init_embedding(model.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(args.seed)
    started, said = time.time(), 0.0
    for step in range(args.steps):
        elapsed = time.time() - started
        progress = max(step / args.steps, elapsed / args.seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate(progress)
        batch = windows(ids, args.batch, args.length + 1, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(batch[:, :-1]).logits.flatten(0, 1).float()
        if teacher is None:
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        else:
            with torch.no_grad():
                wanted = teacher(batch[:, :-1]).logits.flatten(0, 1).float().log_softmax(-1)
            loss = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True) / len(logits)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.time() - said > 10:
            said = time.time()
            print(f"step {step}  loss {loss.item():.3f}  {said - started:.0f} s", flush=True)
    print(f"{step + 1} steps of {args.batch * args.length} tokens, {time.time() - started:.0f} s", flush=True)
    return model.eval()


def save(model: torch.nn.Module, config: dict[str, object], source: Path, out: Path) -> None:
    """An HF folder: float32 safetensors, config, tokenizer."""
    tensors = {
        name: value.detach().float().cpu().contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--hold", type=float, default=0.4)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument(
        "--prune", action="store_true", help="start from the layers of --teacher and take its sizes"
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.rope_theta, args.norm_eps = 10000.0, 1e-5
    if args.prune:
        if not args.teacher:
            parser.error("--prune takes layers of --teacher: name one.")
        pruned_shape(args)
    from convert.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    (args.out / "held").mkdir(parents=True, exist_ok=True)
    parts = []
    for path in args.text:
        trained, held = split_text(path.read_bytes().decode("utf-8"), args.hold)
        (args.out / "held" / path.name).write_bytes(held.encode("utf-8"))
        parts.append(torch.tensor(list(tokenizer.encode_plain(trained)), dtype=torch.int64))
        print(
            f"{path.name}: {len(parts[-1])} tokens to train on, {len(held)} characters held out", flush=True
        )
    vocab_size = json.loads((args.tokenizer / "config.json").read_text())["vocab_size"]
    model = train(args, torch.cat(parts), vocab_size)
    save(model, config_of(args, vocab_size), args.tokenizer, args.out)


if __name__ == "__main__":
    main()
