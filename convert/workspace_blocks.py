"""The weight files of a TurboMind workspace as a decoder block: the inverse of `workspace_tensors`. Pure: no disk.

Padding, KV copies and the RoPE order are undone, so that a block is again what the checkpoint held, bit for bit.
K in features, N out features, R rank of tp.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from convert import turbomind_layout as layout
from convert.checkpoint import BlockWeights, LinearWeights
from convert.errors import InputError
from convert.families import bias_roles
from convert.turbomind_layout import Linear
from convert.workspace_tensors import GROUP_SIZE, Dialect, Packing
from kernels.int4 import Quantized
from kernels.packing import SEQUENTIAL_ORDER, unpack_columns

Read = Callable[[str], Tensor]  # file name -> tensor of the shape and dtype that `file_shapes` lists
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def file_shapes(packing: Packing, index: int) -> Shapes:
    """File name -> (shape, dtype) of every file of block `index`."""
    config = packing.config
    prefix = f"layers.{index}."
    hidden = config.hidden_size
    shapes: Shapes = {
        f"{prefix}{name}.weight": ((hidden,), packing.dtype) for name in ("attention_norm", "ffn_norm")
    }
    if config.num_experts:
        shapes[f"{prefix}moe_ffn.gate.weight"] = ((hidden, config.num_experts), packing.dtype)
    for module, (rows, cols), biased in _modules(packing, prefix):
        for rank in range(packing.tp):
            for part, kind in _part_shapes(packing, rows, cols, biased).items():
                shapes[f"{module}.{rank}.{part}"] = kind
    return shapes


def _modules(packing: Packing, prefix: str) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(module, (N, K) of one rank, whether it has a bias) of the linears of a block."""
    config = packing.config
    hidden, inner = config.hidden_size, packing.intermediate_size // packing.tp
    query_rows, kv_rows = packing.rank_rows
    yield prefix + "attention.w_qkv", (query_rows + 2 * kv_rows, hidden), packing.attn_bias
    yield prefix + "attention.wo", (hidden, query_rows), packing.attn_bias
    experts = range(config.num_experts)
    for mlp in [f"moe_ffn.experts.{e}." for e in experts] if experts else ["feed_forward."]:
        if packing.fuses_gate_up:
            yield prefix + mlp + "w13", (2 * inner, hidden), False
        else:
            yield prefix + mlp + "w1", (inner, hidden), False
            yield prefix + mlp + "w3", (inner, hidden), False
        yield prefix + mlp + "w2", (hidden, inner), False


def _part_shapes(packing: Packing, rows: int, cols: int, biased: bool) -> Shapes:
    groups = cols // GROUP_SIZE
    shapes: Shapes
    if packing.weight_type != "int4":
        shapes = {"weight": ((cols, rows), packing.dtype)}
    elif packing.dialect == "0.1":
        tiles = (cols // 32, rows // 32, 128)
        shapes = {"qweight": (tiles, torch.int32), "scales_zeros": ((groups, rows), torch.int32)}
    else:
        shapes = {"qweight": ((cols, rows // 8), torch.int32)}
        shapes |= {name: ((groups, rows), torch.float16) for name in ("scales", "zeros")}
    return shapes | ({"bias": ((rows,), packing.dtype)} if biased else {})


def read_block(index: int, read: Read, packing: Packing) -> BlockWeights:
    """The inverse of `block_files`: a block in the checkpoint's own order, padding and copies removed."""
    config, heads = packing.config, packing.config.head_dim
    prefix = f"layers.{index}."
    norms = {
        role: read(f"{prefix}{name}.weight")
        for role, name in (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm"))
    }
    ranks = {module: _read_ranks(read, module, packing) for module, _, _ in _modules(packing, prefix)}
    q, k, v = layout.split_qkv(ranks[prefix + "attention.w_qkv"], *packing.rank_rows)
    k, v = (layout.unreplicate_heads(part, heads, packing.replication) for part in (k, v))
    q, k = (layout.separate_rope(part, heads) for part in (q, k))
    linears = {"q": q, "k": k, "v": v, "o": layout.join_columns(ranks[prefix + "attention.wo"])}
    if config.num_experts:
        linears["router"] = {"weight": read(f"{prefix}moe_ffn.gate.weight").t().contiguous()}
        for expert in range(config.num_experts):
            mlp = _mlp(ranks, f"{prefix}moe_ffn.experts.{expert}.", packing)
            linears |= {f"experts.{expert}.{role}": linear for role, linear in mlp.items()}
    else:
        linears |= _mlp(ranks, prefix + "feed_forward.", packing)
    keep = bias_roles(config)
    return BlockWeights(index, {role: _weights(part, role in keep) for role, part in linears.items()}, norms)


def _read_ranks(read: Read, module: str, packing: Packing) -> list[Linear]:
    biased = packing.attn_bias and ".attention." in module
    parts = _part_shapes(packing, 32, GROUP_SIZE, biased)
    return [
        decode({part: read(f"{module}.{rank}.{part}") for part in parts}, packing.dialect)
        for rank in range(packing.tp)
    ]


def _mlp(ranks: dict[str, list[Linear]], prefix: str, packing: Packing) -> dict[str, Linear]:
    if packing.fuses_gate_up:
        pairs = [layout.separate_gate_up(linear) for linear in ranks[prefix + "w13"]]
        gate, up = (layout.join_rows([pair[i] for pair in pairs]) for i in range(2))
    else:
        gate, up = layout.join_rows(ranks[prefix + "w1"]), layout.join_rows(ranks[prefix + "w3"])
    size = packing.config.intermediate_size
    groups = -(-size // GROUP_SIZE)
    down = {
        name: part[:, : groups if name in ("scales", "zeros") else size].contiguous()
        for name, part in layout.join_columns(ranks[prefix + "w2"]).items()
    }
    gate, up = (layout.map_rows(linear, lambda part: part[:size]) for linear in (gate, up))
    return {"gate": gate, "up": up, "down": down}


def decode(tensors: Linear, dialect: Dialect) -> Linear:
    """Inverse of `encode`. Raises InputError for zero points that are no integers from 0 to 15."""
    linear: Linear = {}
    if "weight" in tensors:
        linear["weight"] = tensors["weight"].t().contiguous()
    elif dialect == "0.1":
        scales, zeros = layout.split_scales_zeros(tensors["scales_zeros"])
        linear = {"qweight": layout.unpack_tiles(tensors["qweight"]).t().contiguous()}
        linear |= {"scales": scales.t().contiguous(), "zeros": zeros.t().contiguous()}
    else:
        zeros = tensors["zeros"]
        if not bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 15)).all()):
            raise InputError(
                "zero points are not integers from 0 to 15: the file is damaged or of another dialect."
            )
        linear = {"qweight": unpack_columns(tensors["qweight"], SEQUENTIAL_ORDER).t().contiguous()}
        linear |= {
            "scales": tensors["scales"].t().contiguous(),
            "zeros": zeros.t().to(torch.uint8).contiguous(),
        }
    if "bias" in tensors:
        linear["bias"] = tensors["bias"]
    return linear


def _weights(linear: Linear, has_bias: bool) -> LinearWeights:
    bias = linear["bias"] if has_bias else None
    if "weight" in linear:
        return LinearWeights(linear["weight"], bias)
    return LinearWeights(Quantized(linear["qweight"], linear["scales"], linear["zeros"], GROUP_SIZE), bias)
