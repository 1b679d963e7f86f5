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
from quant.search.experts import SCALE_ROWS
from quant.selection import is_quantized, ragged_roles, skipped_modules
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
    skipped: tuple[str, ...] = ()  # modules that the recipe leaves in float16

    @property
    def peak_bytes(self) -> int:
        """Memory at the fullest moment: a block's search, the model that writes its text, or the end-to-end pass."""
        return max(
            self.block_bytes + self.stream_bytes + self.gram_bytes + self.batch_bytes,
            self.generation_bytes,
            self.pass_bytes,
        )

    @property
    def disk_bytes(self) -> int:
        """The output and the working state next to it."""
        return self.output_bytes + self.work_bytes

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
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
        if self.skipped:
            lines.append(f"{len(self.skipped)} modules stay float16, as the recipe asks")
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
    layers = _layers(config)
    shapes = {role: shape for layer in layers for role, shape in linear_shapes(layer).items()}
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


def _layers(config: ModelConfig) -> list[ModelConfig]:
    """What each layer computes."""
    return [config.of_layer(index) for index in range(config.num_layers)]


def _elements(layer: ModelConfig) -> int:
    """Elements of all linears of one layer."""
    return sum(rows * cols for rows, cols in linear_shapes(layer).values())


def count_weights(config: ModelConfig) -> tuple[int, int]:
    """(elements of the linears of all blocks, elements of everything outside the blocks)."""
    outside = (
        config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) + config.hidden_size
    )
    return sum(_elements(layer) for layer in _layers(config)), outside


def largest_block(config: ModelConfig) -> int:
    """Elements of the linears of the largest block."""
    return max(_elements(layer) for layer in _layers(config))


def searched_bytes(config: ModelConfig, quant: QuantConfig, device: torch.device) -> int:
    """What the search of one block holds of its weights: three float32 copies of what is on the device.

    Of a mixture that is all but the experts, one expert, and the rows on which the experts' common scale is chosen; the experts
    wait in the main memory in 16 bits, where their codes go too. Learned rounding and searches of whole blocks hold all of it.
    """
    block, recipe = largest_block(config), quant.recipe
    is_whole = recipe.learning is not None or (recipe.steps is None and recipe.text != "none")
    if not config.num_experts or is_whole:
        return 3 * block * FLOAT_BYTES
    experts = 3 * config.expert_size * config.hidden_size
    held = block - (config.num_experts - 1) * experts
    scale_rows = min(SCALE_ROWS, 2 * config.num_experts * config.expert_size) * config.hidden_size
    waiting = (FP16_BYTES + 1) * config.num_experts * experts if device.type == "cpu" else 0
    return 3 * (held + scale_rows) * FLOAT_BYTES + waiting


def gram_elements(config: ModelConfig) -> int:
    """Elements of the Gram matrices of one layer's distinct linear inputs, for that layer's configuration."""
    hidden, mixed = config.hidden_size, config.num_heads * config.head_dim
    if config.num_experts:
        each = config.num_experts * (hidden**2 + config.expert_size**2)
        return 2 * hidden**2 + mixed**2 + each + config.shared_intermediate_size**2
    return 2 * hidden**2 + mixed**2 + config.intermediate_size**2


def widest_mlp(config: ModelConfig) -> int:
    """The largest intermediate size: experts run one after the other."""
    dense = config.intermediate_size if not config.num_experts or config.dense_layers else 0
    return max(dense, config.expert_size if config.num_experts else 0, config.shared_intermediate_size)


def statistics_bytes(config: ModelConfig) -> int:
    """Size of the statistics on disk: upper triangles in float32, vectors left out."""
    return sum(gram_elements(layer) for layer in _layers(config)) // 2 * FLOAT_BYTES


def plan_calibration(
    config: ModelConfig, quant: QuantConfig, device: torch.device, dtype: torch.dtype, is_generated: bool
) -> Plan:
    """The plan of `quantize calibrate`."""
    blocks, outside = count_weights(config)
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
        parameters=blocks + outside,
        bits_per_weight=None,
        output_bytes=statistics_bytes(config),
        work_bytes=2 * stream,
        block_bytes=2 * largest_block(config) * dtype.itemsize,
        stream_bytes=2 * stream,
        gram_bytes=max(gram_elements(layer) for layer in _layers(config)) * FLOAT_BYTES,
        batch_bytes=_batch_bytes(config, quant.seqlen, device, dtype),
        generation_bytes=(blocks + outside) * dtype.itemsize if is_generated else 0,
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
    blocks, outside = count_weights(config)
    ragged = ragged_roles(config, quant)
    packed = sum(packed_block_bytes(config, quant, index) for index in range(config.num_layers))
    stream = quant.samples * quant.seqlen * config.hidden_size * dtype.itemsize if has_text else 0
    streams = 2 if quant.recipe.reads_float_stream else 1
    widest = max(config.hidden_size, config.num_heads * config.head_dim, widest_mlp(config))
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
        parameters=blocks + outside,
        bits_per_weight=bits_per_weight(quant.bits, quant.group_size),
        output_bytes=packed + outside * FP16_BYTES,
        work_bytes=2 * streams * stream,
        block_bytes=searched_bytes(config, quant, device),
        stream_bytes=(2 * streams + 2) * stream + (stream // config.hidden_size * widest),
        gram_bytes=4 * widest**2 * FLOAT_BYTES,
        batch_bytes=_batch_bytes(config, quant.seqlen, device, dtype),
        generation_bytes=(blocks + outside) * dtype.itemsize if is_generated and has_text else 0,
        ragged=tuple(ragged),
        pass_bytes=pass_bytes(config, quant) if quant.distill else 0,
        pass_steps=quant.recipe.distillation.steps if quant.distill else 0,
        learns_rounding=quant.recipe.learning is not None,
        skipped=tuple(skipped_modules(config, quant)),
    )


def pass_bytes(config: ModelConfig, quant: QuantConfig) -> int:
    """An end-to-end pass: both models, the gradient of the weights, a step's activations in every layer, its logits."""
    weights, outside = count_weights(config)
    windows, window = window_of(config, quant.samples * quant.seqlen, quant.recipe.distillation)
    inner = widest_mlp(config)
    if config.num_experts:  # a gradient needs what every expert of a token gave
        inner = max(inner, config.experts_per_token * config.expert_size + config.shared_intermediate_size)
    width = 6 * config.hidden_size + 3 * inner + 3 * config.num_heads * config.head_dim
    activations = windows * window * (width * config.num_layers + 5 * config.vocab_size)
    return FLOAT_BYTES * (5 * weights + outside + activations) + weights  # codes: a byte each


def packed_block_bytes(config: ModelConfig, quant: QuantConfig, index: int = 0) -> int:
    """Block `index` of an AWQ checkpoint: nibbles, packed zeros, fp16 scales; norms and float linears in fp16."""
    total = sum(shape[0] for shape in norm_shapes(config).values()) * FP16_BYTES
    for role, (rows, cols) in linear_shapes(config.of_layer(index)).items():
        if not is_quantized(config, quant, index, role):
            total += rows * cols * FP16_BYTES
        else:
            groups = cols // quant.group_size
            total += rows * cols // 2 + rows * groups // 2 + rows * groups * FP16_BYTES
    return total


def _batch_bytes(config: ModelConfig, seqlen: int, device: torch.device, dtype: torch.dtype) -> int:
    """Activations of one forward pass: what a block holds at its widest point."""
    tokens = chunk_samples(seqlen, device) * seqlen
    width = 4 * config.hidden_size + 3 * widest_mlp(config) + 3 * config.num_heads * config.head_dim
    return tokens * width * dtype.itemsize
