"""Hugging Face folders, float or of a layout in `convert.linear_layouts`, as a `Checkpoint`. Names come from the family's row; nothing is run.

N out features, K in features, g group_size, D head_dim.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights, Stored
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.containers import container_of, find_tree
from convert.families.family import Family
from convert.families.fused import fused_rows, norms_to_rotary_pairs, split_stored, to_rotary_pairs
from convert.families.table import (
    bias_roles,
    linear_modules,
    linear_shapes,
    names_of,
    norm_shapes,
    vector_shapes,
)
from convert.folder.boundary import reading
from convert.folder.json_files import show
from convert.folder.source_files import SourceFiles
from convert.folder.state import (
    FolderState,
    folder_state,
    read_manifest,
    refuse_statistics,
    refuse_unfinished,
)
from convert.hf.config import parse_config
from convert.hf.config_reader import LARGEST
from convert.hf.expert_tensors import split_experts
from convert.hf.safetensors_files import TensorInfo, check_finite, read_tensor
from convert.hf.tensor_folder import TensorFolder
from convert.linear_layouts.base import GROUP_SIZES, Expected
from convert.linear_layouts.table import LAYOUTS
from convert.low_bit.float_view import lossy_note
from convert.low_bit.scaled import NOT_OF_WEIGHTS, SCALES, VALUES, scaled_format
from kernels.packing import SEQUENTIAL_ORDER, unpack_columns

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES: dict[torch.dtype, Literal["float16", "bfloat16", "float32"]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float32",
}
# Tensors that older checkpoints hold and that are computed, not learned.
PREFIXES = {  # before the names that a family has -> how they came there
    "_orig_mod.": "saved from a compiled model (torch.compile)",
    "module.": "saved from a data-parallel wrapper",
    "base_model.model.": "saved from a LoRA wrapper (peft) that was not merged",
    "model.": "saved from a wrapper around the model",
}
COMPUTED = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


@reading("the checkpoint")
def open_hf(folder: Path, family_name: str | None = None) -> "HfCheckpoint":
    """Open a folder with config.json and safetensors. Raises InputError when it is damaged, unfinished or unknown."""
    notes: list[str] = []
    true_bits: int | None = None
    state = folder_state(folder)
    refuse_unfinished(folder)
    refuse_statistics(folder)
    if not (folder / "config.json").is_file():
        try:
            empty = not any(folder.iterdir())
        except OSError as error:
            raise InputError(f"{show(str(folder))} cannot be listed: {error.strerror}.") from error
        if (folder / "adapter_config.json").is_file() or (folder / "adapter_model.safetensors").is_file():
            raise InputError(
                f"{show(str(folder))} holds a LoRA adapter, not a model: merge it into its base model first (peft: "
                "`merge_and_unload`, then `save_pretrained`), and give that folder."
            )
        what = "is empty" if empty else "holds no config.json"
        raise InputError(
            f"{show(str(folder))} {what}: expected a model folder with config.json and *.safetensors."
        )
    if state is FolderState.FINISHED:
        manifest = read_manifest(folder)
        manifest.check_sizes(folder)
        bits = manifest.data.get("bits")
        true_bits = bits if isinstance(bits, int) and not isinstance(bits, bool) else None
    beside = SourceFiles(folder)
    if beside.left_out:
        notes.append(f"subfolders that no output takes over: {', '.join(beside.left_out[:8])}")
    raw = beside.read_object("config.json")
    config, family, remarks = parse_config(raw, family_name, true_bits)
    if state is FolderState.FOREIGN and config.quantization is not None:
        notes.append("no manifest: written by another program, so digests could not be checked")
    return HfCheckpoint(folder, config, family, raw, notes + remarks, beside)


class HfCheckpoint(Checkpoint):
    """Reads tensor by tensor. `raw_config` is the parsed config.json, for writers that copy it."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        family: Family,
        raw_config: dict[str, Any],
        notes: list[str],
        beside: SourceFiles,
    ) -> None:
        self.raw_config = raw_config
        self.files = TensorFolder(folder)
        container = container_of(raw_config)
        if container is not None:
            tree = find_tree(container, raw_config, self.files.tensors)
            tied = config.tie_embeddings
            if not any(
                "tie_word_embeddings" in part for part in (raw_config, raw_config.get(container.key) or {})
            ):
                tied = (
                    tied if container.tied is not None else tree.lm_head + ".weight" not in self.files.tensors
                )
            config = dataclasses.replace(config, tree=tree, tie_embeddings=tied)
        self.family = family = names_of(config)
        self._scaled = scaled_format(raw_config)
        self.fused_sources = split_experts(self.files.tensors, family, config)
        self._carried: list[str] = []
        self._dropped: dict[str, str] = {}
        embedding = self.files.tensors.get(family.embedding + ".weight")
        if embedding is not None and embedding.dtype in NAMES:
            config = dataclasses.replace(config, dtype=NAMES[embedding.dtype])
        if config.tie_embeddings and self._has_another_head(config):
            config = dataclasses.replace(config, tie_embeddings=False)
            notes = [
                *notes,
                f"{family.lm_head}.weight is not the embedding, although config.json ties them: it is the head",
            ]
        fmt = config.quantization
        self._layout = None if fmt is None else LAYOUTS[fmt.method]
        super().__init__(
            folder,
            "hf" if fmt is None else fmt.method,
            config,
            folder,
            notes + self.files.notes,
            beside,
        )
        self.watched = self.files.watched
        if self._scaled is not None:
            self.notes.append(lossy_note(self._scaled.label))
        self._check_tensors()

    def _has_another_head(self, config: ModelConfig) -> bool:
        """Whether the files hold a head of the right shape with other values than the embedding: a head that was trained apart."""
        embedding, head = (
            self.files.tensors.get(f"{name}.weight") for name in (self.family.embedding, self.family.lm_head)
        )
        shape = (config.vocab_size, config.hidden_size)
        if embedding is None or head is None or embedding.shape != shape or head.shape != shape:
            return False
        if not (embedding.dtype in FLOATS and head.dtype in FLOATS):
            return False
        return not torch.equal(read_tensor(embedding).float(), read_tensor(head).float())

    def weight_files(self) -> list[Path]:
        return list(self.files.paths)

    def embedding(self) -> Tensor:
        return self._float(
            self.family.embedding + ".weight", (self.config.vocab_size, self.config.hidden_size)
        )

    def final_norm(self) -> Tensor:
        return self._norm(self.family.final_norm, (self.config.hidden_size,))

    def lm_head(self) -> Tensor:
        if self.config.tie_embeddings:
            return self.embedding()
        return self._float(self.family.lm_head + ".weight", (self.config.vocab_size, self.config.hidden_size))

    def block(self, index: int) -> BlockWeights:
        roles = linear_shapes(self.config.of_layer(index))
        quantization = self.config.quantization
        group, bits = (quantization.group_size, quantization.bits) if quantization else (0, 4)
        linears = {}
        for role, parts in self.stored_linears(index, roles).items():
            linears[role] = LinearWeights.from_stored(parts, group, bits)
            parts.clear()  # so that no more than one linear is held in both forms
        return BlockWeights(index, linears, self.norms(index), self.vectors(index), self.config.norm_offset)

    def packed_roles(self, index: int) -> set[str]:
        """From the names of the tensors; nothing is read."""
        prefix = self._prefix(index)
        modules = linear_modules(self.family, self.config.of_layer(index))
        for fused in self.family.fused:
            modules |= dict.fromkeys(fused.roles, fused.module)
        return {role for role, module in modules.items() if self._is_packed(prefix + module)}

    def norms(self, index: int) -> dict[str, Tensor]:
        prefix = self._prefix(index)
        norms = {
            role: self._norm(prefix + self.family.norms[role], shape)
            for role, shape in norm_shapes(self.config).items()
        }
        return norms_to_rotary_pairs(norms, self.config)

    def vectors(self, index: int) -> dict[str, Tensor]:
        prefix = self._prefix(index)
        return {
            role: self._float(prefix + self.family.vectors[role], shape)
            for role, shape in vector_shapes(self.config.of_layer(index)).items()
        }

    def stored_linears(self, index: int, roles: Iterable[str]) -> dict[str, Stored]:
        prefix, wanted, config = self._prefix(index), list(roles), self.config.of_layer(index)
        shapes, biases = linear_shapes(config), bias_roles(config)
        modules = linear_modules(self.family, config)
        found: dict[str, Stored] = {}
        for fused in self.family.fused:
            if not set(fused.roles).isdisjoint(wanted):
                shape = (fused_rows(fused, config), config.hidden_size)
                linear = self._linear(prefix + fused.module, shape, fused.roles[0] in biases)
                found |= split_stored(linear, fused, config)
        for role in wanted:
            if role not in found:
                found[role] = self._linear(prefix + modules[role], shapes[role], role in biases)
        return to_rotary_pairs({role: found[role] for role in wanted}, config)

    def carried(self) -> list[str]:
        return list(self._carried)

    def read_carried(self, name: str) -> Tensor:
        return self.files.read(name, finite=False)

    def dropped(self) -> dict[str, str]:
        return dict(self._dropped)

    def split(self) -> dict[str, int]:
        return {name: len(parts) for name, parts in self.fused_sources.items()}

    def _prefix(self, index: int) -> str:
        if not 0 <= index < self.config.num_layers:
            raise IndexError(f"block {index} of {self.config.num_layers}")
        return self.family.block.format(i=index)

    def _float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.files.read(name)
        _check_shape(self.files.tensors[name], shape)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def _norm(self, module: str, shape: tuple[int, ...]) -> Tensor:
        """The weight that a norm multiplies with; float32 where files hold it minus an offset."""
        weight = self._float(module + ".weight", shape)
        return weight if not self.config.norm_offset else weight.float() + self.config.norm_offset

    def _linear(self, module: str, shape: tuple[int, int], biased: bool) -> Stored:
        bias = {"bias": self._float(module + ".bias", shape[:1])} if biased else {}
        layout, fmt = self._layout, self.config.quantization
        if layout is None or fmt is None or not self._is_packed(module):
            return {"weight": self._float_weight(module, shape).t()} | bias
        expected = layout.expected(shape, fmt)
        for part, (_, extents) in expected.items():
            _check_shape(self.files.tensors[f"{module}.{part}"], extents)
        found = layout.read(module, {part: self.files.read(f"{module}.{part}") for part in expected}, fmt)
        if fmt.bits < 4:
            check_bits(module, found["words"], fmt.bits)
        return found | bias

    def _float_weight(self, module: str, shape: tuple[int, int]) -> Tensor:
        """The float weight (N, K), or what an 8-bit one with scales stands for."""
        scale = None if self._scaled is None else self._scaled.scale_of(module, self.files.tensors)
        if self._scaled is None or scale is None:
            return self._float(module + ".weight", shape)
        _check_shape(self.files.tensors[module + ".weight"], shape)
        values = self.files.read(module + ".weight", finite=False)
        name = module + ".weight_zero_point"
        zero = self.files.read(name) if name in self.files.tensors else None
        weight = self._scaled.dequantize(module, values, self.files.read(scale), zero)
        check_finite(module + ".weight", weight)
        return weight

    def _is_packed(self, module: str) -> bool:
        return self._layout is not None and f"{module}.{self._layout.marker}" in self.files.tensors

    def _expected(self) -> Expected:
        """Name -> (dtypes, shape) of every tensor the model needs; packed linears as they are packed."""
        config, family = self.config, self.family
        table: Expected = {
            family.embedding + ".weight": (FLOATS, (config.vocab_size, config.hidden_size)),
            family.final_norm + ".weight": (FLOATS, (config.hidden_size,)),
        }
        if not config.tie_embeddings:
            table[family.lm_head + ".weight"] = (FLOATS, (config.vocab_size, config.hidden_size))
        for index in range(config.num_layers):
            prefix, layer = family.block.format(i=index), config.of_layer(index)
            for role, extent in norm_shapes(layer).items():
                table[f"{prefix}{family.norms[role]}.weight"] = (FLOATS, extent)
            for role, extent in vector_shapes(layer).items():
                table[prefix + family.vectors[role]] = (FLOATS, extent)
            for module, (shape, biased) in self._modules(layer).items():
                name = prefix + module
                if biased:
                    table[name + ".bias"] = (FLOATS, shape[:1])
                if self._layout is not None and config.quantization is not None and self._is_packed(name):
                    packed = self._layout.expected(shape, config.quantization)
                    table |= {f"{name}.{part}": expected for part, expected in packed.items()}
                else:
                    scaled = (
                        self._scaled is not None
                        and self._scaled.scale_of(name, self.files.tensors) is not None
                    )
                    table[name + ".weight"] = (VALUES if scaled else FLOATS, shape)
        return table

    def _modules(self, config: ModelConfig) -> dict[str, tuple[tuple[int, int], bool]]:
        """Module as files hold it -> (N, K) and whether it has a bias, for one layer's configuration."""
        shapes, biases = linear_shapes(config), bias_roles(config)
        modules = {
            module: (shapes[role], role in biases)
            for role, module in linear_modules(self.family, config).items()
        }
        for fused in self.family.fused:
            modules[fused.module] = (
                (fused_rows(fused, config), config.hidden_size),
                fused.roles[0] in biases,
            )
        return modules

    def _refuse_more_than_there_is(self) -> None:
        """Raises InputError where config.json asks for more tensors than the files hold, before any of them is listed."""
        config, present = self.config, len(self.files.tensors)
        needed = config.num_layers + (config.num_layers - len(config.dense_layers)) * config.num_experts
        if needed > present or config.num_experts > LARGEST["num_experts"]:
            raise InputError(
                f"config.json: {config.num_layers:,} layers and {config.num_experts:,} experts need more than {needed:,} tensors, but the "
                f"files hold {present:,}. They belong to different models; copy both again."
            )

    def _check_tensors(self) -> None:
        self._refuse_more_than_there_is()
        present, expected = self.files.tensors, self._expected()
        missing = [name for name in expected if name not in present]
        if missing == [self.family.lm_head + ".weight"]:
            raise InputError(
                f"{missing[0]} is absent and config.json does not tie it to the embedding. Copy the missing shard, or set "
                "tie_word_embeddings to true where the model has one shared matrix."
            )
        if missing:
            self._refuse_other_prefix(missing)
            listed = ", ".join(show(name) for name in missing[:4])
            raise InputError(
                f"{show(str(self.path))} lacks {len(missing)} tensors of {len(expected)} that a {self.config.family} model "
                f"of this config.json needs: {listed}{', ...' if len(missing) > 4 else ''}. Copy the checkpoint again, or "
                "name the right --family."
            )
        self._check_group_size()
        for name, (_, shape) in expected.items():
            _check_shape(present[name], shape)
        self._check_dtypes(expected)
        self._sort_others([name for name in present if name not in expected])

    def _refuse_other_prefix(self, missing: list[str]) -> None:
        """Raises InputError where the tensors are there under other names: saved by a wrapper, or without the root of the names."""
        present, name = self.files.tensors, missing[0]
        for prefix, told in PREFIXES.items():
            if prefix + name in present:
                raise InputError(
                    f"{show(str(self.path))} names its tensors {show(prefix + name)!r} where {show(name)!r} is expected: it was {told}. "
                    "Save the plain model again (`save_pretrained`), or rename the tensors."
                )
        root = name.partition(".")[0] + "."
        if name.removeprefix(root) in present:
            raise InputError(
                f"{show(str(self.path))} names its tensors {show(name.removeprefix(root))!r} where {show(name)!r} is expected: it was saved "
                "without its head, as a base model. Save the whole model (`...ForCausalLM`), or rename the tensors and bring the head."
            )

    def _sort_others(self, extra: list[str]) -> None:
        """What the language model does not need: carried through, or dropped with the reason."""
        head = self.family.lm_head + ".weight"
        for name in extra:
            if name.endswith(COMPUTED):
                self._dropped[name] = "computed, not learned"
            elif self._scaled is not None and self._is_of_scales(name):
                self._dropped[name] = f"{self._scaled.label}: taken into the weight, or of activations"
            elif name == head and self.config.tie_embeddings:
                self._dropped[name] = "tied: the embedding is used"
                self.notes.append(f"{head} is present but tied: the embedding is used")
            else:
                self._carried.append(name)
        blocks = [self.family.block.format(i=i) for i in range(self.config.num_layers)]
        biases = [name for name in self._carried if name.endswith(".bias") and name.startswith(tuple(blocks))]
        if biases:
            raise InputError(
                f"{show(biases[0])} is present, but config.json says that this {self.config.family} model has no such bias "
                f"({len(biases)} in all). Leaving them out would change the model: correct config.json."
            )
        if self._carried:
            self.notes.append(
                f"{len(self._carried)} tensors are not the language model's and are carried through as they are, the first is "
                f"{show(self._carried[0])!r}"
            )

    def _is_of_scales(self, name: str) -> bool:
        """Whether a tensor belongs to the format of an 8-bit linear of the language model."""
        part, stem = name.rpartition(".")[2], self.family.block.partition("{i}")[0]
        number = name.removeprefix(stem).partition(".")[0]
        inside = name.startswith(stem) and number.isdigit() and int(number) < self.config.num_layers
        return inside and part in (*SCALES, "weight_zero_point", *NOT_OF_WEIGHTS)

    def _check_group_size(self) -> None:
        """The scales of the first packed linear show the true group size."""
        layout, fmt = self._layout, self.config.quantization
        if layout is None or fmt is None:
            return
        config = self.config.of_layer(0)
        tensors, shapes = self.files.tensors, linear_shapes(config)
        for role, module in linear_modules(self.family, config).items():
            name = self._prefix(0) + module
            if not self._is_packed(name):
                continue
            cols = shapes[role][1]
            for size in GROUP_SIZES:
                if cols % size or shapes[role][0] % 8 or size == fmt.group_size:
                    continue
                other = layout.expected(shapes[role], dataclasses.replace(fmt, group_size=size))
                if all(n in tensors and tensors[n].shape == s for n, s in _named(name, other)):
                    raise InputError(
                        f"config.json states a group_size of {fmt.group_size}, but the tensors of {show(name)!r} have groups of "
                        f"{size}: correct quantization_config, or copy config.json and weights again."
                    )
            return

    def _check_dtypes(self, expected: Expected) -> None:
        kinds: Counter[torch.dtype] = Counter()
        for name, (allowed, _) in expected.items():
            dtype = self.files.tensors[name].dtype
            if dtype not in allowed:
                wanted = " or ".join(
                    str(kind).removeprefix("torch.") for kind in allowed if kind != torch.float64
                )
                raise InputError(
                    f"tensor {show(name)!r} is {str(dtype).removeprefix('torch.')}, expected {wanted}."
                )
            kinds[dtype] += dtype in FLOATS
        if kinds[torch.float64]:
            self.notes.append(f"{kinds[torch.float64]} float64 tensors are read as float32")
        found = [str(d).removeprefix("torch.") for d, n in kinds.items() if n]
        if len(found) > 1:
            self.notes.append(f"mixed dtypes: {', '.join(sorted(found))}")


def check_bits(module: str, words: Tensor, bits: int) -> None:
    """Raises InputError where a code of the sequential words (K, N // 8) lies above the declared bits."""
    highest = int(unpack_columns(words, SEQUENTIAL_ORDER).max())
    if highest >= 2**bits:
        raise InputError(
            f"{show(module)}: the manifest declares {bits} bits, but a code is {highest}. The shard or the manifest was changed; "
            "quantize again."
        )


def _named(module: str, expected: Expected) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{module}.{part}", shape) for part, (_, shape) in expected.items()]


def _check_shape(info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != tuple(expected):
        raise InputError(
            f"tensor {show(info.name)!r} in {show(info.path.name)} has shape {list(info.shape)}, but config.json asks for "
            f"{list(expected)}. They belong to different models; copy both again."
        )
