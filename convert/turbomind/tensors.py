"""A checkpoint as the weight files of a TurboMind workspace: names and tensors, nothing written. Back: `workspace_blocks`.

Reads and yields linear by linear, so that a caller who lets go of each file holds no more than one of them.
K in features, N out features, R rank of tp. Layout rules: `convert.turbomind.layout`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from convert.checkpoint import Checkpoint, Stored
from convert.errors import InputError
from convert.formats import Dialect
from convert.turbomind import layout as layout
from convert.turbomind.packing import Packing
from convert.turbomind.shapes import padded_vocabulary

Files = Iterator[tuple[str, Tensor]]  # (file name, contiguous tensor)


def outer_files(source: Checkpoint, packing: Packing) -> Files:
    """Embedding, output matrix and final norm."""
    yield from _matrix_files("tok_embeddings", source.embedding(), 1, packing)
    yield from _matrix_files("output", source.lm_head(), 0, packing)
    yield "norm.weight", as_float(source.final_norm(), packing.dtype, "norm.weight")


def _matrix_files(module: str, matrix: Tensor, axis: int, packing: Packing) -> Files:
    """A (V, H) matrix padded to V', cut among the ranks along `axis` in dialect 0.6.5."""
    matrix = as_float(matrix, packing.dtype, module)
    missing = padded_vocabulary(packing) - matrix.shape[0]
    if missing:
        matrix = torch.cat([matrix, matrix.new_zeros(missing, matrix.shape[1])])
    if packing.dialect == "0.1":
        yield f"{module}.weight", matrix
        return
    for rank, part in enumerate(matrix.chunk(packing.tp, dim=axis)):
        yield f"{module}.{rank}.weight", part.contiguous()


def block_files(source: Checkpoint, index: int, packing: Packing) -> Files:
    """Every file of block `index`. Raises InputError for a linear in the wrong format."""
    config = packing.config
    prefix = f"layers.{index}."
    norms = source.norms(index)
    for role, name in (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm")):
        yield f"{prefix}{name}.weight", as_float(norms[role], packing.dtype, f"{prefix}{name}")
    yield from _rank_files(prefix + "attention.w_qkv", _fused_qkv(source, index, packing), packing)
    yield from _rank_files(prefix + "attention.wo", _output(source, index, packing), packing)
    if not config.num_experts:
        yield from _mlp_files(source, index, "", prefix + "feed_forward.", packing)
        return
    router = _read(source, index, ["router"], packing)["router"]
    yield f"{prefix}moe_ffn.gate.weight", router["weight"]
    for expert in range(config.num_experts):
        mlp = f"{prefix}moe_ffn.experts.{expert}."
        yield from _mlp_files(source, index, f"experts.{expert}.", mlp, packing)


def _fused_qkv(source: Checkpoint, index: int, packing: Packing) -> list[Stored]:
    parts = _read(source, index, ["q", "k", "v"], packing)
    heads = packing.config.head_dim
    q, k = (layout.interleave_rope(parts.pop(role), heads) for role in ("q", "k"))
    k, v = (layout.replicate_heads(part, heads, packing.replication) for part in (k, parts.pop("v")))
    return layout.fuse_qkv(q, k, v, packing.tp)


def _output(source: Checkpoint, index: int, packing: Packing) -> list[Stored]:
    return layout.split_inputs(_read(source, index, ["o"], packing)["o"], packing.tp)


def _mlp_files(source: Checkpoint, index: int, roles: str, prefix: str, packing: Packing) -> Files:
    inner, tp = packing.intermediate_size, packing.tp

    def outputs(role: str) -> list[Stored]:
        linear = _read(source, index, [roles + role], packing)[roles + role]
        return layout.split_outputs(layout.pad_outputs(linear, inner), tp)

    if packing.fuses_gate_up:
        pairs = zip(outputs("gate"), outputs("up"), strict=True)
        yield from _rank_files(prefix + "w13", [layout.interleave_gate_up(*pair) for pair in pairs], packing)
    else:
        yield from _rank_files(prefix + "w1", outputs("gate"), packing)
        yield from _rank_files(prefix + "w3", outputs("up"), packing)
    down = _read(source, index, [roles + "down"], packing)[roles + "down"]
    padded = layout.pad_inputs(down, inner, packing.group_size or 1)
    yield from _rank_files(prefix + "w2", layout.split_inputs(padded, tp), packing)


def _rank_files(name: str, ranks: list[Stored], packing: Packing) -> Files:
    for rank, linear in enumerate(ranks):
        for part, tensor in encode(linear, packing.dialect).items():
            yield f"{name}.{rank}.{part}", tensor


def _read(source: Checkpoint, index: int, roles: list[str], packing: Packing) -> dict[str, Stored]:
    linears = source.stored_linears(index, roles)
    return {role: _fitting(role, linears.pop(role), index, packing) for role in roles}


def _fitting(role: str, linear: Stored, index: int, packing: Packing) -> Stored:
    """The linear in the type and with the bias that the packing asks for."""
    where = f"block {index}, {role}"
    fitting = dict(linear)
    bias = fitting.pop("bias", None)
    if "words" in linear:
        if packing.weight_type != "int4":
            raise InputError(
                f"{where} is int4 in a model packed as {packing.weight_type}: pack the float checkpoint."
            )
        features = linear["scales"].shape[-1]
    elif packing.weight_type == "int4" and role != "router":
        raise InputError(
            f"{where} is float in an int4 model (modules_to_not_convert): TurboMind wants every linear quantized. "
            "Quantize again with --pad instead of --keep-ragged."
        )
    else:
        fitting["weight"] = as_float(linear["weight"], packing.dtype, where)
        features = linear["weight"].shape[-1]
    if role in ("q", "k", "v", "o") and packing.attn_bias:
        fitting["bias"] = as_float(
            torch.zeros(features) if bias is None else bias, packing.dtype, f"{where} bias"
        )
    elif bias is not None:
        raise InputError(
            f"{where} has a bias, which TurboMind does not know there: this model cannot be packed."
        )
    return fitting


def as_float(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Cast, contiguous. Raises InputError naming the tensor where a value does not fit the dtype."""
    cast = tensor.to(dtype, memory_format=torch.contiguous_format).contiguous()
    if cast.numel():
        low, high = torch.aminmax(cast)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise InputError(
                f"{where}: {int((~torch.isfinite(cast)).sum())} values are beyond the range of "
                f"{str(dtype).removeprefix('torch.')} (largest {float(tensor.abs().max()):.4g}). Pack bfloat16 sources with "
                "--dtype bfloat16."
            )
    return cast


def encode(linear: Stored, dialect: Dialect) -> Stored:
    """A linear of one rank -> tensors as they lie on disk."""
    tensors: Stored = {}
    if "weight" in linear:
        tensors["weight"] = linear["weight"].contiguous()
    elif dialect == "0.1":
        tensors["qweight"] = layout.pack_tiles(linear["words"].contiguous())
        tensors["scales_zeros"] = layout.scales_zeros(linear["scales"], linear["zeros"]).contiguous()
    else:
        tensors["qweight"] = linear["words"].contiguous()
        tensors["scales"] = linear["scales"].contiguous()
        tensors["zeros"] = linear["zeros"].half().contiguous()
    if "bias" in linear:
        tensors["bias"] = linear["bias"].contiguous()
    return tensors
