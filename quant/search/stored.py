"""A block as a quantized checkpoint stores it: which linears become integers, what is refused, what stays in float16."""

from dataclasses import replace

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from convert.errors import InputError
from kernels.int4 import Quantized
from quant.config import QuantConfig
from quant.selection import is_quantized, is_skipped


def check_block(weights: BlockWeights, config: ModelConfig, quant: QuantConfig) -> None:
    """Raises InputError for weights that are not finite or quantized already, and for K that is no multiple of the group."""
    for role, part in weights.linears.items():
        weight = part.weight
        if isinstance(weight, Quantized):
            raise InputError(
                f"Block {weights.index}, {role} is quantized already: start from the float checkpoint."
            )
        bad = int((~weight.isfinite()).sum())
        if bad:
            raise InputError(
                f"Block {weights.index}, {role}: {bad} weights are NaN or infinite. The checkpoint is damaged."
            )
        if quant.keep_ragged or role == "router" or is_quantized(config, quant, weights.index, role):
            continue
        if not is_skipped(config, quant, weights.index, role):
            raise InputError(
                f"Block {weights.index}, {role}: K = {weight.shape[1]} is no multiple of the group size {quant.group_size}. "
                "Choose a smaller --group-size, --pad for exact zero-padding, or --keep-ragged to leave it in float16."
            )


def to_float16(weights: BlockWeights) -> BlockWeights:
    """Norms, biases and what stays float, in fp16 as the packed checkpoint holds them."""
    linears = {
        role: LinearWeights(
            part.weight if isinstance(part.weight, Quantized) else part.weight.half(),
            None if part.bias is None else part.bias.half(),
        )
        for role, part in weights.linears.items()
    }
    return replace(
        weights, linears=linears, norms={role: norm.half() for role, norm in weights.norms.items()}
    )
