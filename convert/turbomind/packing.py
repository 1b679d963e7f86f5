"""How a model is packed into a TurboMind workspace: dialect, ranks, padded sizes, and what does not fit. No tensors, no disk.

Dialects: "0.6.5" (plain tensors, config.yaml) and "0.1" (32 x 32 tiles, scales_zeros, w13, config.ini; LMDeploy 0.0.14 to 0.5.3).
"""

from dataclasses import dataclass
from typing import Literal

import torch

from convert.config import ModelConfig
from convert.formats import Dialect
from convert.turbomind.layout import kv_replication, padded_intermediate

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
        return kv_replication(self.config.num_kv_heads, self.tp)

    @property
    def intermediate_size(self) -> int:
        """Padded; dialect 0.1 has no padding."""
        if self.stated_intermediate:
            return self.stated_intermediate
        size = self.config.intermediate_size
        return size if self.dialect == "0.1" else padded_intermediate(size, self.group_size, self.tp)

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
    query_rows, _ = packing.rank_rows
    if packing.weight_type == "int4":
        for name, size in (("hidden size", config.hidden_size), ("a rank's attention width", query_rows)):
            if size % GROUP_SIZE:
                found.append(f"{name} {size} is no multiple of the group size {GROUP_SIZE}")
        if config.head_dim % 16:
            found.append(
                f"head_dim {config.head_dim} is no multiple of 16, so halves of a head are no whole words"
            )
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
