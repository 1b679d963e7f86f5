"""What `quantize calibrate` and `quantize awq` print."""

from rich.console import RenderableType

from quant.recipes import names_on_statistics
from turbomind_quant.api.results import CalibrateResult, EstimateResult, QuantizeResult
from turbomind_quant.cli.views.durations import duration
from turbomind_quant.cli.views.layers import role_table

SHOWN = 12  # warnings and notes that are printed; all stand in the manifest


def estimate_view(estimate: EstimateResult) -> list[RenderableType]:
    """The plan of a dry run, and the state of the folder that would be written."""
    state = f"output folder {estimate.output}: {estimate.output_state}"
    return ["\n".join([*estimate.plan.lines(), state])]


def calibrate_view(model: str, result: CalibrateResult) -> list[RenderableType]:
    """Where the statistics are, and what to do next."""
    return [
        f"statistics of {result.num_layers} layers in {result.path}",
        f"next: quantize awq {model} -o OUT --preset {names_on_statistics()[0]} --stats {result.path}",
    ]


def quantize_view(model: str, result: QuantizeResult) -> list[RenderableType]:
    """What was made, what stands out, the losses by role, and what to do next."""
    lines = [
        f"{result.path}: int{result.bits} groups of {result.group_size}, {result.bits_per_weight:.3f} bits a quantized weight, "
        f"{result.size_bytes / 2**20:,.0f} MiB, {duration(result.seconds)}"
    ]
    if result.key_factors is not None:
        largest = max(max(high, 1 / low) for low, high in result.key_factors)
        lines.append(
            f"parameters for an int8 KV cache; channels of K made alike (factors of up to {largest:.3g} moved into Q)"
        )
    if result.bits < 4:
        lines.append(
            f"int{result.bits} codes lie in 4-bit nibbles: for evaluation, they save nothing over int4"
        )
    remarks = [f"warning: {text}" for text in result.warnings] + [
        f"note: {text}" for text in result.standing_out
    ]
    lines += remarks[:SHOWN]
    if len(remarks) > SHOWN:
        lines.append(f"... and {len(remarks) - SHOWN} more in {result.path}/tmq/manifest.json")
    following = [f"next: evaluate ppl {model} {result.path}"]
    if result.bits == 4 and result.group_size == 128:
        following.append(f"      quantize pack {result.path} -o WORKSPACE")
    parts: list[RenderableType] = ["\n".join(lines)]
    if any(entry["steps"] for entry in result.layers):
        parts.append(role_table(result.layers))
    return [*parts, "\n".join(following)]
