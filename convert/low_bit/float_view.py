"""An int4 checkpoint seen as the float model that its codes stand for, so that it can be quantized anew."""

import dataclasses

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.checkpoint_view import CheckpointView
from kernels.int4 import Quantized

NAMES = {"gptq": "GPTQ", "compressed-tensors": "compressed-tensors int4", "mlx": "MLX int4"}


class FloatView(CheckpointView):
    """Linears become (code - zero point) * scale in float32, exactly; what they lost when they were made stays lost."""

    def __init__(self, inner: Checkpoint) -> None:
        fmt = inner.config.quantization
        assert fmt is not None
        note = lossy_note(f"{NAMES.get(fmt.method, fmt.method)} in groups of {fmt.group_size}")
        super().__init__(
            inner, kind="hf", config=dataclasses.replace(inner.config, quantization=None), notes=[note]
        )

    def block(self, index: int) -> BlockWeights:
        block = self.inner.block(index)
        linears = {
            role: LinearWeights(_float(part.weight), part.bias) for role, part in block.linears.items()
        }
        return dataclasses.replace(block, linears=linears)


def _float(weight: Tensor | Quantized) -> Tensor:
    return weight.dequantize() if isinstance(weight, Quantized) else weight


def lossy_note(label: str) -> str:
    """What a user is told about a source that is quantized already."""
    return (
        f"the source is quantized already ({label}): it is read as the floats that it stands for, and what it lost then is not "
        "counted in any figure of this run."
    )
