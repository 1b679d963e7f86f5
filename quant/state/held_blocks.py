"""Quantized blocks held in the work folder until an end-to-end pass has changed their scales and norms for good."""

from pathlib import Path

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.folder.files import atomic_write, safetensors_chunks, sha256_file, write_json
from convert.hf.safetensors_files import read_header, read_tensor
from kernels.int4 import Quantized
from quant.state.frontier import read_record


class HeldBlocks:
    """Writes and reads blocks as they are, one file each, with a digest beside it."""

    def __init__(self, folder: Path, bits: int, group_size: int) -> None:
        self.folder, self.bits, self.group_size = folder, bits, group_size

    def has_block(self, index: int) -> bool:
        """Whether the block is there, whole."""
        path = self._path(index)
        mark = read_record(path.with_suffix(".json"))
        return mark is not None and path.is_file() and mark.get("sha256") == sha256_file(path)

    def write_block(self, index: int, block: BlockWeights) -> None:
        tensors: dict[str, Tensor] = {f"norm/{role}": norm for role, norm in block.norms.items()}
        for role, part in block.linears.items():
            if part.bias is not None:
                tensors[f"bias/{role}"] = part.bias
            if isinstance(part.weight, Quantized):
                tensors[f"codes/{role}"] = part.weight.codes
                tensors[f"scales/{role}"] = part.weight.scales
                tensors[f"zeros/{role}"] = part.weight.zeros
            else:
                tensors[f"weight/{role}"] = part.weight
        path = self._path(index)
        _, digest = atomic_write(path, safetensors_chunks(tensors))
        write_json(path.with_suffix(".json"), {"sha256": digest, "roles": list(block.linears)})

    def read_block(self, index: int) -> BlockWeights:
        path = self._path(index)
        tensors = {name: read_tensor(info) for name, info in read_header(path).items()}
        mark = read_record(path.with_suffix(".json")) or {}
        linears: dict[str, LinearWeights] = {}
        for role in mark.get("roles", []):
            weight: Tensor | Quantized
            if f"weight/{role}" in tensors:
                weight = tensors[f"weight/{role}"]
            else:
                codes, scales, zeros = (tensors[f"{kind}/{role}"] for kind in ("codes", "scales", "zeros"))
                weight = Quantized(codes, scales, zeros, self.group_size, self.bits)
            linears[role] = LinearWeights(weight, tensors.get(f"bias/{role}"))
        norms = {name.removeprefix("norm/"): t for name, t in tensors.items() if name.startswith("norm/")}
        return BlockWeights(index, linears, norms)

    def _path(self, index: int) -> Path:
        return self.folder / f"held-{index:05d}.safetensors"


class WithFinalNorm(Checkpoint):
    """A checkpoint with another final norm, for what is written after an end-to-end pass."""

    def __init__(self, source: Checkpoint, norm: Tensor) -> None:
        super().__init__(
            source.path, source.kind, source.config, source.tokenizer_dir, list(source.notes), source.beside
        )
        self.source, self.norm = source, norm

    def block(self, index: int) -> BlockWeights:
        return self.source.block(index)

    def embedding(self) -> Tensor:
        return self.source.embedding()

    def final_norm(self) -> Tensor:
        return self.norm

    def lm_head(self) -> Tensor:
        return self.source.lm_head()

    def weight_files(self) -> list[Path]:
        return self.source.weight_files()
