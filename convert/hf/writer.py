"""Writes a Hugging Face folder: one shard for each decoder block, one for the rest, and what other loaders need beside.

Packed linears lie as one of `convert.linear_layouts` has them, float ones as (N, K); every float is float16. Chooses no
number: it stores what it is given. N out features, K in features.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, Stored
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families.family import Family
from convert.families.fused import from_rotary_pairs, join_stored, norms_from_rotary_pairs
from convert.families.norms import norm_for_file
from convert.families.table import BY_NAME, linear_modules, linear_shapes, names_of, stays_float
from convert.folder.json_files import show
from convert.folder.output import OutputFolder
from convert.folder.source_files import PATTERNS
from convert.hf.config import updated_config
from convert.hf.made_config import made_config
from convert.hf.spellings import both_spellings
from convert.hf.tensor_folder import INDEX_NAME
from convert.linear_layouts.base import LinearLayout
from convert.linear_layouts.table import LAYOUTS
from kernels.int4 import Quantized, dequantize
from kernels.packing import SEQUENTIAL_ORDER, unpack_columns

NOT_COPIED = {
    "config.json",
    INDEX_NAME,
    "quantize_config.json",
    "quant_config.json",
    "run.json",
    "manifest.json",
    "report.json",
}
JOINED_ELSEWHERE = {("q", "k", "v"): "qkv_proj", ("gate", "up"): "gate_up_proj"}  # by engines, as they load


CARRIED_BYTES = 4 * 2**30  # of a shard of tensors that are carried through


class CheckpointWriter:
    """Writes the checkpoint into `out`, whose lock and journal it uses.

    `fmt` None: all linears are float; packed ones are dequantized and rounded once, to float16.
    """

    def __init__(self, out: OutputFolder, source: Checkpoint, fmt: QuantFormat | None) -> None:
        self.out, self.source, self.fmt = out, source, fmt
        self.layout: LinearLayout | None = None if fmt is None else LAYOUTS[fmt.method]
        self.config: ModelConfig = source.config
        self.float_dtype = "float16"
        self.family: Family = names_of(self.config)
        self._has_rest = False

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
        self.prepare_block(index, block)()

    def prepare_block(self, index: int, block: BlockWeights) -> Callable[[], None]:
        """Pack one block now, into memory of the CPU. What comes back stores it as `write_block` does, in any thread."""
        tensors = {name: tensor.cpu() for name, tensor in self.block_tensors(index, block).items()}
        return lambda: self.out.save_tensors(self.shard_name(index), tensors)

    def write_stored(self, index: int) -> None:
        """Store one block of the source as it holds it: the codes of its linears are moved, never chosen again."""
        source = self.source
        linears = source.stored_linears(index, linear_shapes(self.config.of_layer(index)))
        linears["o"] = without_zero_bias(linears["o"], index, self.config)
        tensors = self.named_tensors(index, linears, source.norms(index), source.vectors(index))
        self.out.save_tensors(self.shard_name(index), tensors)

    def block_tensors(self, index: int, block: BlockWeights) -> dict[str, Tensor]:
        """The tensors of a block under the names of the family, fused ones joined again."""
        linears = {}
        for role, linear in block.linears.items():
            if isinstance(linear.weight, Quantized) and linear.weight.shape[0] % 8:
                raise InputError(
                    f"block {index}, {role} has {linear.weight.shape[0]} out features: eight codes share a word, so a multiple of 8 "
                    "is needed. Use --pad."
                )
            linears[role] = linear.stored()
        return self.named_tensors(index, linears, block.norms, block.vectors)

    def named_tensors(
        self,
        index: int,
        linears: Mapping[str, Stored],
        norms: Mapping[str, Tensor],
        vectors: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """`block_tensors` of linears in stored form."""
        config, family = self.config.of_layer(index), self.family
        linears = from_rotary_pairs(linears, config)
        tensors: dict[str, Tensor] = {}
        for fused in family.fused:
            joined = join_stored(linears, fused, config)
            tensors |= self._linear_tensors(self._full(index, fused.module), joined)
        for role, module in linear_modules(family, config).items():
            tensors |= self._linear_tensors(self._full(index, module), linears[role])
        for role, norm in norms_from_rotary_pairs(norms, config).items():
            name = self._full(index, family.norms[role]) + ".weight"
            tensors[name] = norm_for_file(norm, config.norm_offset)
        named = {self._full(index, family.vectors[role]): vector for role, vector in vectors.items()}
        return self.store_floats(tensors) | named

    def store_floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Floats as they are stored: float16."""
        return half_floats(tensors)

    def rest(self) -> dict[str, Tensor]:
        """What lies outside the blocks, as it is stored. Raises InputError for values that are not finite in float16."""
        rest = {
            self.family.embedding + ".weight": self.source.embedding(),
            self.family.final_norm + ".weight": norm_for_file(
                self.source.final_norm(), self.config.norm_offset
            ),
        }
        if not self.config.tie_embeddings:
            rest[self.family.lm_head + ".weight"] = self.source.lm_head()
        return self.store_floats(rest)

    def write_rest(self, tensors: Mapping[str, Tensor]) -> None:
        """Store what lies outside the blocks, as `rest` gives it: the last shard. `finish_files` then writes it no more."""
        self.out.save_tensors(self.shard_name(self.config.num_layers), tensors)
        self._has_rest = True

    def finish_files(self) -> None:
        """Write the last shard, index, config.json, and copy tokenizer, template, generation config and code (never run)."""
        if not self._has_rest:
            self.write_rest(self.rest())
        self._write_carried()
        self._write_index()
        self.out.write_json("config.json", self.config_document())
        self._copy_others()

    def config_document(self) -> dict[str, Any]:
        """config.json of the source, or one made from what it states, with our sizes, dtype and format."""
        beside = self.source.beside
        if "config.json" in beside.names:
            document = updated_config(beside.read_object("config.json"), self.config)
        else:
            document = made_config(self.config)
        for key in ("quantization_config", "quantization"):
            document.pop(key, None)
        return both_spellings(document, self.config, self.float_dtype) | self.quantization_document()

    def quantization_document(self) -> dict[str, Any]:
        """`quantization_config`, by which other loaders know the format; nothing where all is float."""
        if self.fmt is None or self.layout is None:
            return {}
        return self.layout.document(self.fmt, self._skipped_modules())

    def _write_carried(self) -> None:
        """The tensors that are not the language model's, bit for bit, in shards of at most CARRIED_BYTES."""
        pending: dict[str, Tensor] = {}
        size, count = 0, 0
        for name in self.source.carried():
            tensor = self.source.read_carried(name)
            if pending and size + tensor.nbytes > CARRIED_BYTES:
                self._save_carried(count, pending)
                pending, size, count = {}, 0, count + 1
            pending[name] = tensor
            size += tensor.nbytes
        if pending:
            self._save_carried(count, pending)

    def _save_carried(self, count: int, tensors: dict[str, Tensor]) -> None:
        name = f"carried-{count + 1:05d}.safetensors"
        if not self.out.has(name):
            self.out.save_tensors(name, tensors)

    def _skipped_modules(self) -> list[str]:
        """Names by which loaders recognise the linears that were written as float, and what engines join some of them into.

        The end of the name where a linear is float in every block. Else, and for routers, the full names: some loaders look
        for a name inside another, and "mlp.gate" lies in "mlp.gate_proj".
        """
        layers = self.config.num_layers
        floats = self._float_modules()
        modules: dict[str, str] = {}
        for index in range(layers):
            modules |= linear_modules(self.family, self.config.of_layer(index))
        places = {
            role: {i for i in range(layers) if self._full(i, module) in floats}
            for role, module in modules.items()
        }
        for fused in self.family.fused:
            name = fused.module
            modules = modules | {name: name}
            places[name] = {i for i in range(layers) if self._full(i, name) in floats}
        for parts, joined in JOINED_ELSEWHERE.items():
            if all(places.get(part) for part in parts):
                first = parts[0]
                modules = modules | {joined: modules[first].rpartition(".")[0] + "." + joined}
                places[joined] = set.intersection(*(places[part] for part in parts))
        names = [self.family.lm_head]
        for role, found in places.items():
            if len(found) == layers and not stays_float(role):
                names.append(modules[role])
            else:
                names += [self._full(i, modules[role]) for i in sorted(found)]
        return list(dict.fromkeys([*names, *carried_modules(self.source.carried(), self.family)]))

    def accounting(self) -> dict[str, Any]:
        """What became of every tensor of the source, once all is written: how many were quantized and how many are float; by name
        those that are carried through, those that were dropped with the reason, and 3-D tensors of experts with the number of
        linears that stand for each."""
        tables = [entry["tensors"] for name, entry in self.out.written().items() if name.startswith("model-")]
        names = [name for table in tables for name in table]
        marker = "" if self.layout is None else "." + self.layout.marker
        packed = {name.removesuffix(marker) for name in names if marker and name.endswith(marker)}
        floats = [
            name
            for name in names
            if name.removesuffix(".bias") == name and name.rpartition(".")[0] not in packed
        ]
        biases = [name for name in names if name.endswith(".bias")]
        return {
            "quantized": len(packed),
            "float": len(floats) + len(biases),
            "carried": self.source.carried(),
            "dropped": self.source.dropped(),
            "split": self.source.split(),
        }

    def _full(self, index: int, module: str) -> str:
        return self.family.block.format(i=index) + module

    def _float_modules(self) -> set[str]:
        """The modules of the blocks that were written with a float matrix."""
        tables = [entry["tensors"] for entry in self.out.written().values() if "tensors" in entry]
        return {
            name.removesuffix(".weight")
            for table in tables
            for name, (dtype, shape) in table.items()
            if name.endswith(".weight") and len(shape) == 2 and getattr(torch, dtype).is_floating_point
        }

    def _linear_tensors(self, module: str, linear: Stored) -> dict[str, Tensor]:
        """The tensors that hold one linear: packed, or as it is, (N, K)."""
        tensors = {module + ".bias": linear["bias"]} if "bias" in linear else {}
        if "weight" in linear:
            return tensors | {module + ".weight": linear["weight"].t()}
        if self.layout is None or self.fmt is None:
            return tensors | {module + ".weight": dequantized(linear)}
        parts = self.layout.write(linear, self.fmt)
        return tensors | {f"{module}.{part}": tensor for part, tensor in parts.items()}

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
        beside = self.source.beside
        for name in beside.names:
            if name not in NOT_COPIED and not self.out.has(name):
                self.out.write_chunks(name, beside.contents(name))


def carried_modules(names: list[str], family: Family) -> list[str]:
    """Modules that hold the carried tensors: full names, and their last parts, by which other trees' loaders know them.

    Tensors of blocks after the last one (for drafting) are named by their block.
    """
    found: list[str] = []
    stem = family.block.partition("{i}")[0]
    for name in names:
        parts = name.split(".")
        if name.startswith(stem) and (number := name[len(stem) :].split(".")[0]).isdigit():
            module = stem + number
        elif parts[0] in ("model", "language_model") and len(parts) > 2:
            found.append(parts[1])
            module = ".".join(parts[:2])
        else:
            module = parts[0]
        found.append(module)
    return list(dict.fromkeys(found))


def _tensor_bytes(dtype: str, shape: list[int]) -> int:
    size = getattr(torch, dtype).itemsize
    for extent in shape:
        size *= extent
    return int(size)


def dequantized(linear: Stored) -> Tensor:
    """The float weight (N, K) of a packed linear in stored form, float32."""
    codes = unpack_columns(linear["words"], SEQUENTIAL_ORDER).t().contiguous()
    scales, zeros = linear["scales"].t().contiguous(), linear["zeros"].t().contiguous()
    return dequantize(codes, scales, zeros, codes.shape[1] // scales.shape[1])


def half_floats(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
            f"values beyond the range of float16 (65504) in {len(beyond)} tensors: {', '.join(beyond[:8])}. The format is "
            "float16 throughout, so this model cannot be stored in it."
        )
    return halved


def required_bytes(config: ModelConfig, source_dir: Path, fmt: QuantFormat | None) -> int:
    """Bytes that the folder takes at most: packed linears at up to 5 bits a weight, the rest at 16."""
    layers = (config.of_layer(index) for index in range(config.num_layers))
    linears = sum(rows * cols for layer in layers for rows, cols in linear_shapes(layer).values())
    rest = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    others = sum(p.stat().st_size for pattern in PATTERNS for p in source_dir.glob(pattern) if p.is_file())
    return linears * (16 if fmt is None else 5) // 8 + rest * 2 + others + 2**20


def without_zero_bias(o: Stored, index: int, config: ModelConfig) -> Stored:
    """TurboMind stores a bias for o wherever q, k, v have one: zeros, which the family's own names have no place for."""
    if "bias" not in o or BY_NAME[config.family].o_bias is not False:
        return o
    if bool(o["bias"].any()):
        raise InputError(
            f"block {index}: o has a bias that is not zero, which a {show(config.family)} model has no name for."
        )
    return {name: part for name, part in o.items() if name != "bias"}
