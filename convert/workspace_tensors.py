"""One decoder block as the weight files of a TurboMind workspace. Pure: names and tensors, no disk. Back: `workspace_blocks`.

K in features, N out features, g group size, D head_dim, R rank of tp. Dialects: "0.6.5" (plain tensors, config.yaml) and
"0.1" (32 x 32 tiles, scales_zeros, w13, config.ini; LMDeploy 0.0.14 to 0.5.3). Layout rules: `convert.turbomind_layout`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from convert import turbomind_layout as layout
from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError
from convert.turbomind_layout import Linear
from kernels.int4 import Quantized
from kernels.packing import SEQUENTIAL_ORDER, pack_columns

Dialect = Literal["0.6.5", "0.1"]
WeightType = Literal["float16", "bfloat16", "int4"]
TP_VALUES = (1, 2, 4, 8)
GROUP_SIZE = 128  # the only one that TurboMind's int4 kernels are compiled for
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int4": torch.float16}


@dataclass(frozen=True)
class Packing:
    """How a model is packed. `config` is the source's: padded and replicated sizes are derived here."""

    config: ModelConfig
    tp: int
    weight_type: WeightType
    dialect: Dialect
    stated_intermediate: int = 0  # of a workspace that is read: as its configuration says, 0 derives it

    @property
    def group_size(self) -> int:
        return GROUP_SIZE if self.weight_type == "int4" else 0

    @property
    def dtype(self) -> torch.dtype:
        """Of every float tensor on disk."""
        return DTYPES[self.weight_type]

    @property
    def replication(self) -> int:
        return layout.kv_replication(self.config.num_kv_heads, self.tp)

    @property
    def intermediate_size(self) -> int:
        """Padded; dialect 0.1 has no padding."""
        if self.stated_intermediate:
            return self.stated_intermediate
        size = self.config.intermediate_size
        return size if self.dialect == "0.1" else layout.padded_intermediate(size, self.group_size, self.tp)

    @property
    def attn_bias(self) -> bool:
        return self.config.qkv_bias or self.config.o_bias

    @property
    def fuses_gate_up(self) -> bool:
        """Whether gate and up lie in one matrix w13."""
        return self.dialect == "0.1" and self.weight_type == "int4"

    @property
    def rank_rows(self) -> tuple[int, int]:
        """Query rows and KV rows of one rank's w_qkv."""
        kv_heads = self.config.num_kv_heads * self.replication
        return (
            self.config.num_heads * self.config.head_dim // self.tp,
            kv_heads * self.config.head_dim // self.tp,
        )


def misfits(packing: Packing) -> list[str]:
    """Sentences that say why the model cannot be packed this way; empty where it can."""
    config, tp, found = packing.config, packing.tp, []
    if config.num_heads % tp:
        found.append(f"{config.num_heads} attention heads are no multiple of tp {tp}")
    if config.num_kv_heads % tp and (packing.dialect == "0.1" or tp % config.num_kv_heads):
        found.append(f"{config.num_kv_heads} KV heads cannot be shared among tp {tp} ranks")
    if config.hidden_size % tp:
        found.append(f"hidden size {config.hidden_size} is no multiple of tp {tp}")
    if found:
        return found
    query_rows, kv_rows = packing.rank_rows
    if packing.weight_type == "int4":
        for name, size in (("hidden size", config.hidden_size), ("a rank's attention width", query_rows)):
            if size % GROUP_SIZE:
                found.append(f"{name} {size} is no multiple of the group size {GROUP_SIZE}")
        if (query_rows + 2 * kv_rows) % 8:
            found.append(f"a rank's qkv width {query_rows + 2 * kv_rows} is no multiple of 8")
    if packing.dialect == "0.1":
        if config.head_dim != 128:
            found.append(f"head_dim is {config.head_dim}, and dialect 0.1 knows only 128")
        if config.rope_scaling and config.rope_scaling.kind not in ("dynamic", "qwen_ntk"):
            found.append(f"dialect 0.1 has no {config.rope_scaling.kind} RoPE scaling")
        if config.hidden_size != config.num_heads * config.head_dim:
            found.append(
                f"hidden size {config.hidden_size} is not heads x head_dim, which dialect 0.1 takes for granted"
            )
        share = GROUP_SIZE if packing.weight_type == "int4" else 1
        if config.intermediate_size % (tp * share):
            found.append(f"intermediate size {config.intermediate_size} is no multiple of tp {tp} x {share}")
    return found


def legal_tp(config: ModelConfig, weight_type: WeightType, dialect: Dialect) -> list[int]:
    """The values of tp that this model can be packed with."""
    return [tp for tp in TP_VALUES if not misfits(Packing(config, tp, weight_type, dialect))]


def block_files(block: BlockWeights, packing: Packing) -> Iterator[tuple[str, Tensor]]:
    """(file name, contiguous tensor) of every file of a block. Raises InputError for a linear in the wrong format."""
    config, tp = packing.config, packing.tp
    prefix = f"layers.{block.index}."
    for role, name in (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm")):
        yield f"{prefix}{name}.weight", as_float(block.norms[role], packing.dtype, f"{prefix}{name}")
    parts = {role: _parts(role, linear, block.index, packing) for role, linear in block.linears.items()}
    heads = config.head_dim
    q, k = layout.interleave_rope(parts["q"], heads), layout.interleave_rope(parts["k"], heads)
    k = layout.replicate_heads(k, heads, packing.replication)
    v = layout.replicate_heads(parts["v"], heads, packing.replication)
    yield from _rank_files(prefix + "attention.w_qkv", layout.fuse_qkv(q, k, v, tp), packing)
    yield from _rank_files(prefix + "attention.wo", layout.split_columns(parts["o"], tp), packing)
    if not config.num_experts:
        yield from _mlp_files(prefix + "feed_forward.", parts["gate"], parts["up"], parts["down"], packing)
        return
    router = block.linears["router"].weight
    assert isinstance(router, Tensor)
    gate_name = f"{prefix}moe_ffn.gate.weight"
    yield gate_name, as_float(router, packing.dtype, gate_name).t().contiguous()
    for expert in range(config.num_experts):
        gate, up, down = (parts[f"experts.{expert}.{role}"] for role in ("gate", "up", "down"))
        yield from _mlp_files(f"{prefix}moe_ffn.experts.{expert}.", gate, up, down, packing)


def _mlp_files(
    prefix: str, gate: Linear, up: Linear, down: Linear, packing: Packing
) -> Iterator[tuple[str, Tensor]]:
    inner, tp = packing.intermediate_size, packing.tp
    gates, ups = (layout.split_rows(layout.pad_rows(linear, inner), tp) for linear in (gate, up))
    downs = layout.split_columns(layout.pad_columns(down, inner, packing.group_size or 1), tp)
    if packing.fuses_gate_up:
        fused = [layout.interleave_gate_up(one, other) for one, other in zip(gates, ups, strict=True)]
        yield from _rank_files(prefix + "w13", fused, packing)
    else:
        yield from _rank_files(prefix + "w1", gates, packing)
        yield from _rank_files(prefix + "w3", ups, packing)
    yield from _rank_files(prefix + "w2", downs, packing)


def _rank_files(name: str, ranks: list[Linear], packing: Packing) -> Iterator[tuple[str, Tensor]]:
    for rank, linear in enumerate(ranks):
        for part, tensor in encode(linear, packing.dialect).items():
            yield f"{name}.{rank}.{part}", tensor


def _parts(role: str, linear: LinearWeights, index: int, packing: Packing) -> Linear:
    where = f"block {index}, {role}"
    parts: Linear = {}
    if isinstance(linear.weight, Quantized):
        if packing.weight_type != "int4":
            raise InputError(
                f"{where} is int4 in a model packed as {packing.weight_type}: pack the float checkpoint."
            )
        parts = {"qweight": linear.weight.codes, "scales": linear.weight.scales, "zeros": linear.weight.zeros}
    elif packing.weight_type == "int4" and role != "router":
        raise InputError(
            f"{where} is float in an int4 model (modules_to_not_convert): TurboMind wants every linear quantized. "
            "Quantize again with --pad instead of --keep-ragged."
        )
    else:
        parts = {"weight": as_float(linear.weight, packing.dtype, where)}
    if role in ("q", "k", "v", "o") and packing.attn_bias:
        rows = linear.weight.shape[0]
        bias = torch.zeros(rows) if linear.bias is None else linear.bias
        parts["bias"] = as_float(bias, packing.dtype, f"{where} bias")
    elif linear.bias is not None:
        raise InputError(
            f"{where} has a bias, which TurboMind does not know there: this model cannot be packed."
        )
    return parts


def as_float(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """Cast, contiguous. Raises InputError naming the tensor where a value does not fit the dtype."""
    cast = tensor.to(dtype).contiguous()
    lost = int((~torch.isfinite(cast)).sum())
    if lost:
        raise InputError(
            f"{where}: {lost} values are beyond the range of {str(dtype).removeprefix('torch.')} "
            f"(largest {float(tensor.abs().max()):.4g}). Pack bfloat16 sources with --dtype bfloat16."
        )
    return cast


def encode(linear: Linear, dialect: Dialect) -> Linear:
    """Parts with output features first -> tensors as they lie on disk, (K, N) row-major."""
    tensors: Linear = {}
    if "weight" in linear:
        tensors["weight"] = linear["weight"].t().contiguous()
    else:
        codes = linear["qweight"].t()
        scales, zeros = linear["scales"].t().contiguous(), linear["zeros"].t().contiguous()
        if dialect == "0.1":
            tensors["qweight"] = layout.pack_tiles(codes)
            tensors["scales_zeros"] = layout.scales_zeros(scales, zeros)
        else:
            tensors["qweight"] = pack_columns(codes, SEQUENTIAL_ORDER)
            tensors["scales"], tensors["zeros"] = scales.half(), zeros.half()
    if "bias" in linear:
        tensors["bias"] = linear["bias"].contiguous()
    return tensors
