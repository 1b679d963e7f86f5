"""What a run will take before it starts: memory, disk, sizes; and which linears the group size does not fit.

N out features, K in features. Pure arithmetic on a model's configuration.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import linear_shapes, norm_shapes
from kernels.int4 import bits_per_weight
from quant.config import QuantConfig
from quant.learn.distill import window_of
from quant.selection import is_quantized, ragged_roles
from quant.statistics.chunks import chunk_samples

GIB = 2**30
FP16_BYTES = 2
FLOAT_BYTES = 4
# On 8,192 tokens learned rounding made a block of the demo model worse on other text, on 16,384 better (benchmarks/NOTES.md).
LEARNABLE_TOKENS = 16384


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, as estimated from the shapes. `peak_bytes` is beside the Python process itself."""

    command: str
    device: str
    dtype: str
    preset: str | None
    bits: int | None
    group_size: int | None
    samples: int
    seqlen: int
    layers: int
    parameters: int
    bits_per_weight: float | None
    output_bytes: int
    work_bytes: int
    block_bytes: int
    stream_bytes: int
    gram_bytes: int
    batch_bytes: int
    generation_bytes: int
    ragged: tuple[str, ...] = ()
    pass_bytes: int = 0  # of the end-to-end pass, 0 where there is none
    pass_steps: int = 0
    learns_rounding: bool = False

    @property
    def peak_bytes(self) -> int:
        return max(
            self.block_bytes + self.stream_bytes + self.gram_bytes + self.batch_bytes,
            self.generation_bytes,
            self.pass_bytes,
        )

    @property
    def disk_bytes(self) -> int:
        return self.output_bytes + self.work_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "disk_bytes": self.disk_bytes}

    def lines(self) -> list[str]:
        """The plan in a few sentences."""
        memory = (
            f"{_gib(self.block_bytes)} one block, {_gib(self.stream_bytes)} hidden states, "
            f"{_gib(self.gram_bytes)} Gram matrices, {_gib(self.batch_bytes)} activations of a batch"
        )
        text = f"{self.samples} x {self.seqlen} tokens" if self.samples else "no calibration text"
        lines = [
            f"{self.command}: {self.parameters / 1e6:,.4g} M parameters in {self.layers} layers, {text}, on {self.device} in {self.dtype}",
            f"memory: about {_gib(self.peak_bytes)} at the peak beside the program itself ({memory})",
        ]
        if self.generation_bytes:
            lines.append(
                f"memory while the model writes its own text: {_gib(self.generation_bytes)} (the whole model)"
            )
        if self.pass_steps:
            patience = ": on a CPU hours for all but small models" if self.device.startswith("cpu") else ""
            lines.append(
                f"end-to-end pass: {self.pass_steps} steps over the whole model in float32, {_gib(self.pass_bytes)}{patience}"
            )
        size = "" if self.bits_per_weight is None else f", {self.bits_per_weight:.3f} bits a quantized weight"
        lines.append(
            f"disk: {_gib(self.output_bytes)} output{size}, up to {_gib(self.work_bytes)} of working state meanwhile"
        )
        if self.bits is not None and self.bits < 4:
            lines.append(
                f"int{self.bits} codes are held in 4-bit nibbles: for evaluation, they save nothing over int4"
            )
        if self.learns_rounding and self.samples * self.seqlen < LEARNABLE_TOKENS:
            lines.append(
                f"little text: from {self.samples * self.seqlen:,} tokens, {self.preset} may learn what fits them and not other text, and end "
                f"worse than without learned rounding; give it {LEARNABLE_TOKENS:,} tokens or more (--samples, --seqlen)"
            )
        return lines


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= 0.1 * GIB else f"{size_bytes / 2**20:.0f} MiB"


def refuse_ragged(config: ModelConfig, quant: QuantConfig) -> list[str]:
    """Roles left float under `keep_ragged`. Raises InputError naming the layers and the choices otherwise."""
    roles = ragged_roles(config, quant)
    if not roles or quant.keep_ragged:
        return roles
    shapes = linear_shapes(config)
    named = ", ".join(f"{role} (K = {shapes[role][1]})" for role in roles[:8]) + (
        ", ..." if len(roles) > 8 else ""
    )
    smaller = [
        g for g in (64, 32) if g < quant.group_size and not ragged_roles(config, replace(quant, group_size=g))
    ]
    choice = f"--group-size {smaller[0]} (fits every linear)" if smaller else "no smaller group fits either"
    raise InputError(
        f"K is no multiple of the group size {quant.group_size} in all {config.num_layers} layers: {named}. Choose --pad (exact "
        f"zero-padding: the same function, a little larger), --keep-ragged (these stay float16), or {choice}."
    )


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """(elements of all linears of a block, elements of everything outside the blocks)."""
    block = sum(rows * cols for rows, cols in linear_shapes(config).values())
    outside = (
        config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) + config.hidden_size
    )
    return block, outside


def gram_elements(config: ModelConfig) -> int:
    """Elements of the Gram matrices of one block's distinct linear inputs."""
    hidden, mixed, inner = config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
    if config.num_experts:
        return 2 * hidden**2 + mixed**2 + config.num_experts * (hidden**2 + inner**2)
    return 2 * hidden**2 + mixed**2 + inner**2


def statistics_bytes(config: ModelConfig) -> int:
    """Size of the statistics on disk: upper triangles in float32, vectors left out."""
    return config.num_layers * gram_elements(config) // 2 * FLOAT_BYTES


def plan_calibration(
    config: ModelConfig, quant: QuantConfig, device: torch.device, dtype: torch.dtype, is_generated: bool
) -> Plan:
    """The plan of `quantize calibrate`."""
    block, outside = count_weights(config)
    stream = quant.samples * quant.seqlen * config.hidden_size * dtype.itemsize
    return Plan(
        command="calibrate",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        preset=None,
        bits=None,
        group_size=None,
        samples=quant.samples,
        seqlen=quant.seqlen,
        layers=config.num_layers,
        parameters=block * config.num_layers + outside,
        bits_per_weight=None,
        output_bytes=statistics_bytes(config),
        work_bytes=2 * stream,
        block_bytes=2 * block * dtype.itemsize,
        stream_bytes=2 * stream,
        gram_bytes=gram_elements(config) * FLOAT_BYTES,
        batch_bytes=_batch_bytes(config, quant.seqlen, device, dtype),
        generation_bytes=(block * config.num_layers + outside) * dtype.itemsize if is_generated else 0,
    )


def plan_quantization(
    config: ModelConfig,
    quant: QuantConfig,
    device: torch.device,
    dtype: torch.dtype,
    is_generated: bool,
    has_text: bool,
) -> Plan:
    """The plan of `quantize awq`."""
    block, outside = count_weights(config)
    ragged = ragged_roles(config, quant)
    packed = sum(packed_block_bytes(config, quant, index) for index in range(config.num_layers))
    stream = quant.samples * quant.seqlen * config.hidden_size * dtype.itemsize if has_text else 0
    streams = 2 if quant.recipe.reads_float_stream else 1
    widest = max(config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    return Plan(
        command="awq",
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        preset=quant.recipe.name,
        bits=quant.bits,
        group_size=quant.group_size,
        samples=quant.samples if has_text else 0,
        seqlen=quant.seqlen if has_text else 0,
        layers=config.num_layers,
        parameters=block * config.num_layers + outside,
        bits_per_weight=bits_per_weight(quant.bits, quant.group_size),
        output_bytes=packed + outside * FP16_BYTES,
        work_bytes=2 * streams * stream,
        block_bytes=3 * block * FLOAT_BYTES,
        stream_bytes=(2 * streams + 2) * stream + (stream // config.hidden_size * widest),
        gram_bytes=4 * widest**2 * FLOAT_BYTES,
        batch_bytes=_batch_bytes(config, quant.seqlen, device, dtype),
        generation_bytes=(block * config.num_layers + outside) * dtype.itemsize
        if is_generated and has_text
        else 0,
        ragged=tuple(ragged),
        pass_bytes=pass_bytes(config, quant) if quant.distill else 0,
        pass_steps=quant.recipe.distillation.steps if quant.distill else 0,
        learns_rounding=quant.recipe.learning is not None,
    )


def pass_bytes(config: ModelConfig, quant: QuantConfig) -> int:
    """An end-to-end pass: both models, the gradient of the weights, a step's activations in every layer, its logits."""
    block, outside = count_weights(config)
    windows, window = window_of(config, quant.samples * quant.seqlen, quant.recipe.distillation)
    weights = block * config.num_layers
    width = (
        6 * config.hidden_size
        + 3 * config.intermediate_size * max(1, config.num_experts)
        + 3 * config.num_heads * config.head_dim
    )
    activations = windows * window * (width * config.num_layers + 5 * config.vocab_size)
    return FLOAT_BYTES * (5 * weights + outside + activations) + weights  # codes: a byte each


def packed_block_bytes(config: ModelConfig, quant: QuantConfig, index: int = 0) -> int:
    """Block `index` of an AWQ checkpoint: nibbles, packed zeros, fp16 scales; norms and float linears in fp16."""
    total = sum(shape[0] for shape in norm_shapes(config).values()) * FP16_BYTES
    for role, (rows, cols) in linear_shapes(config).items():
        if not is_quantized(config, quant, index, role):
            total += rows * cols * FP16_BYTES
        else:
            groups = cols // quant.group_size
            total += rows * cols // 2 + rows * groups // 2 + rows * groups * FP16_BYTES
    return total


def _batch_bytes(config: ModelConfig, seqlen: int, device: torch.device, dtype: torch.dtype) -> int:
    """Activations of one forward pass: what a block holds at its widest point."""
    tokens = chunk_samples(seqlen, device) * seqlen
    width = 4 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_heads * config.head_dim
    return tokens * width * dtype.itemsize
