"""Writes an AWQ "gemm" checkpoint: one shard for each decoder block, one for the rest, and what other loaders need beside.

N out features, K in features, g group_size. A packed linear: qweight int32 (K, N / 8), qzeros int32 (K / g, N / 8), scales
float16 (K / g, N); nibble order of `kernels.packing.AWQ_ORDER`, zeros without offset. Everything else is float16. int3 and
int2 codes lie in the same nibbles; their true bits stand in the manifest. Chooses no number: it stores what it is given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, Stored
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families.fused_qkv import join_stored
from convert.families.table import BY_NAME, Family, linear_modules
from convert.folder.json_files import read_failure, read_object, show
from convert.folder.output import OutputFolder
from convert.hf.config import updated_config
from convert.hf.tensor_folder import INDEX_NAME
from kernels.int4 import Quantized
from kernels.packing import AWQ_ORDER, pack_columns, sequential_to_awq_

COPIED = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
NOT_COPIED = {
    "config.json",
    INDEX_NAME,
    "quantize_config.json",
    "quant_config.json",
    "run.json",
    "manifest.json",
    "report.json",
}


class AwqWriter:
    """Writes the checkpoint into `out`, whose lock and journal it uses. `fmt.modules_to_not_convert` may hold roles."""

    def __init__(self, out: OutputFolder, source: Checkpoint, fmt: QuantFormat) -> None:
        self.out, self.source, self.fmt = out, source, fmt
        self.config: ModelConfig = source.config
        self.family: Family = BY_NAME[self.config.family]

    def shard_name(self, index: int) -> str:
        """Block `index` -> its file; `num_layers` -> the file of embedding, final norm and head."""
        return f"model-{index + 1:05d}-of-{self.config.num_layers + 1:05d}.safetensors"

    def has_block(self, index: int) -> bool:
        """Whether the shard of the block is there, whole, as an earlier start of this run wrote it."""
        return self.out.has(self.shard_name(index))

    def finished_blocks(self) -> int:
        """Blocks 0 .. n - 1 are there; n."""
        count = 0
        while count < self.config.num_layers and self.has_block(count):
            count += 1
        return count

    def write_block(self, index: int, block: BlockWeights) -> None:
        """Store one block. Raises InputError for values beyond float16, ResourceError on a full disk."""
        self.out.save_tensors(self.shard_name(index), self.block_tensors(index, block))

    def block_tensors(self, index: int, block: BlockWeights) -> dict[str, Tensor]:
        """The tensors of a block under the names of the family, fused ones joined again."""
        linears = {}
        for role, linear in block.linears.items():
            if isinstance(linear.weight, Quantized) and linear.weight.shape[0] % 8:
                raise InputError(
                    f"block {index}, {role} has {linear.weight.shape[0]} out features: eight codes share a word in the AWQ format, "
                    "so a multiple of 8 is needed. Use --pad."
                )
            linears[role] = linear.stored()
        return self.named_tensors(index, linears, block.norms)

    def named_tensors(
        self, index: int, linears: Mapping[str, Stored], norms: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """`block_tensors` of linears in stored form."""
        prefix, modules = self.family.block.format(i=index), linear_modules(self.family, self.config)
        tensors: dict[str, Tensor] = {}
        if self.family.fused is not None:
            fused = join_stored(linears, self.family.fused_layout, self.config)
            tensors |= _awq_tensors(prefix + self.family.fused, fused)
        for role, module in modules.items():
            tensors |= _awq_tensors(prefix + module, linears[role])
        for role, norm in norms.items():
            tensors[f"{prefix}{self.family.norms[role]}.weight"] = norm
        return self.store_floats(tensors)

    def store_floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floats as they are stored: float16."""
        return _half(tensors)

    def rest(self) -> dict[str, Tensor]:
        """What lies outside the blocks, as it is stored. Raises InputError for values that are not finite in float16."""
        rest = {
            self.family.embedding + ".weight": self.source.embedding(),
            self.family.final_norm + ".weight": self.source.final_norm(),
        }
        if not self.config.tie_embeddings:
            rest[self.family.lm_head + ".weight"] = self.source.lm_head()
        return self.store_floats(rest)

    def finish_files(self) -> None:
        """Write the last shard, index, config.json, and copy tokenizer, template, generation config and code (never run)."""
        self.out.save_tensors(self.shard_name(self.config.num_layers), self.rest())
        self._write_index()
        self.out.write_json("config.json", self.config_document())
        self._copy_others()

    def config_document(self) -> dict[str, Any]:
        """config.json of the source with our sizes, `dtype` float16 and `quantization_config`."""
        document = updated_config(read_object(self.source.tokenizer_dir / "config.json"), self.config)
        document.pop("torch_dtype", None)
        document["dtype"] = "float16"
        document["quantization_config"] = self.quantization_document()
        return document

    def quantization_document(self) -> dict[str, Any]:
        """`quantization_config`, by which other loaders know the format."""
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": self.fmt.group_size,
            "zero_point": True,
            "modules_to_not_convert": self._skipped_modules(),
        }

    def _skipped_modules(self) -> list[str]:
        """Names by which loaders recognise the linears that stay float: the ends of their full names."""
        modules = linear_modules(self.family, self.config)
        names = [self.family.lm_head]
        if "router" in modules:
            names.append(modules["router"])
        for entry in self.fmt.modules_to_not_convert:
            if entry in ("q", "k", "v") and self.family.fused is not None:
                names.append(self.family.fused)
            else:
                names.append(modules.get(entry, entry))
        return list(dict.fromkeys(names))

    def _write_index(self) -> None:
        """Raises RuntimeError where a block was never written: a folder that lacks one must not look finished."""
        written = self.out.written()
        if absent := [i for i in range(self.config.num_layers) if self.shard_name(i) not in written]:
            raise RuntimeError(
                f"{len(absent)} of {self.config.num_layers} blocks were never written: {absent[:4]}"
            )
        tables = {
            name: entry["tensors"]
            for name, entry in written.items()
            if name.endswith(".safetensors") and "/" not in name
        }
        weight_map = {tensor: name for name, table in tables.items() for tensor in table}
        size = sum(_tensor_bytes(*tensor) for table in tables.values() for tensor in table.values())
        self.out.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _copy_others(self) -> None:
        folder = self.source.tokenizer_dir
        try:
            found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
        except OSError as error:
            raise read_failure(folder, error) from error
        for path in sorted(found):
            if path.name not in NOT_COPIED and not self.out.has(path.name):
                self.out.copy(path, path.name)


def _tensor_bytes(dtype: str, shape: list[int]) -> int:
    size = getattr(torch, dtype).itemsize
    for extent in shape:
        size *= extent
    return int(size)


def _awq_tensors(module: str, linear: Stored) -> dict[str, Tensor]:
    """The tensors that hold one linear: packed in AWQ's order, or as it is, (N, K)."""
    tensors = {module + ".bias": linear["bias"]} if "bias" in linear else {}
    if "weight" in linear:
        return tensors | {module + ".weight": linear["weight"].t()}
    return tensors | {
        module + ".qweight": sequential_to_awq_(linear["words"].clone(memory_format=torch.contiguous_format)),
        module + ".qzeros": pack_columns(linear["zeros"], AWQ_ORDER),
        module + ".scales": linear["scales"].contiguous(),
    }


def _half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floats to float16. Raises InputError naming every tensor with values that float16 cannot hold, and how many."""
    halved: dict[str, Tensor] = {}
    beyond: list[str] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            halved[name] = tensor
            continue
        half = tensor.half()
        bounds = torch.stack(torch.aminmax(half)) if half.numel() else half
        if not bool(torch.isfinite(bounds).all()):
            count = int((~torch.isfinite(half)).sum())
            beyond.append(f"{show(name)} ({count:,} of {tensor.numel():,})")
        halved[name] = half
    if beyond:
        raise InputError(
            f"values beyond the range of float16 (65504) in {len(beyond)} tensors: {', '.join(beyond[:8])}. The AWQ format is "
            "float16 throughout, so this model cannot be stored in it."
        )
    return halved


def required_bytes(config: ModelConfig, source_dir: Path) -> int:
    """Bytes that an AWQ checkpoint of this model takes at most: packed linears at 5 bits a weight, the rest at 16."""
    from convert.families.table import linear_shapes

    linears = sum(rows * cols for rows, cols in linear_shapes(config).values()) * config.num_layers
    rest = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    others = sum(p.stat().st_size for pattern in COPIED for p in source_dir.glob(pattern) if p.is_file())
    return linears * 5 // 8 + rest * 2 + others + 2**20
