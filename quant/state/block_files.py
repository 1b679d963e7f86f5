"""Quantized blocks in the work folder, where they wait until an end-to-end pass has changed their scales and norms for good."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import QuantFormat
from convert.errors import InputError
from kernels.int4 import Quantized
from quant.state.saved_tensors import load_tensors, save_tensors, whole_facts


class BlockFiles:
    """Writes and reads blocks as they are, one file each, with a digest beside it."""

    def __init__(self, folder: Path, fmt: QuantFormat) -> None:
        self.folder, self.fmt = folder, fmt

    def has_block(self, index: int) -> bool:
        """Whether the block is there, whole."""
        return whole_facts(self._path(index)) is not None

    def write_block(self, index: int, block: BlockWeights) -> None:
        """Save one block. Raises ResourceError on a full disk."""
        self.prepare_block(index, block)()

    def prepare_block(self, index: int, block: BlockWeights) -> Callable[[], None]:
        """Copy one block now, to memory of the CPU. What comes back saves it as `write_block` does, in any thread."""
        tensors: dict[str, Tensor] = {f"norm/{role}": norm for role, norm in block.norms.items()}
        tensors |= {f"vector/{role}": vector for role, vector in block.vectors.items()}
        for role, part in block.linears.items():
            if part.bias is not None:
                tensors[f"bias/{role}"] = part.bias
            if isinstance(part.weight, Quantized):
                tensors[f"codes/{role}"] = part.weight.codes
                tensors[f"scales/{role}"] = part.weight.scales
                tensors[f"zeros/{role}"] = part.weight.zeros
            else:
                tensors[f"weight/{role}"] = part.weight
        copied, path = {name: tensor.cpu() for name, tensor in tensors.items()}, self._path(index)
        roles, offset = list(block.linears), block.norm_offset
        return lambda: save_tensors(path, copied, roles=roles, norm_offset=offset)

    def read_block(self, index: int) -> BlockWeights:
        """The block as it was written. Raises InputError where it is absent or damaged."""
        if (saved := load_tensors(self._path(index))) is None:
            raise InputError(
                f"{self._path(index)} is damaged or gone: give the same command again, it makes the block anew."
            )
        tensors = saved.tensors
        linears: dict[str, LinearWeights] = {}
        for role in saved.facts["roles"]:
            weight: Tensor | Quantized
            if f"weight/{role}" in tensors:
                weight = tensors[f"weight/{role}"]
            else:
                codes, scales, zeros = (tensors[f"{kind}/{role}"] for kind in ("codes", "scales", "zeros"))
                weight = Quantized(codes, scales, zeros, self.fmt.group_size, self.fmt.bits)
            linears[role] = LinearWeights(weight, tensors.get(f"bias/{role}"))
        norms = {name.removeprefix("norm/"): t for name, t in tensors.items() if name.startswith("norm/")}
        vectors = {
            name.removeprefix("vector/"): t for name, t in tensors.items() if name.startswith("vector/")
        }
        return BlockWeights(index, linears, norms, vectors, saved.facts["norm_offset"])

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"
