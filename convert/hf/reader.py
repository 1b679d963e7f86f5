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
from convert.families.fused_qkv import fused_rows, split_stored
from convert.families.table import Family, bias_roles, linear_modules, linear_shapes, norm_shapes
from convert.folder.json_files import show
from convert.folder.source_files import SourceFiles
from convert.folder.state import FolderState, folder_state, read_manifest, refuse_statistics
from convert.hf.config import parse_config
from convert.hf.safetensors_files import TensorInfo
from convert.hf.tensor_folder import TensorFolder
from convert.linear_layouts.base import GROUP_SIZES, Expected
from convert.linear_layouts.table import LAYOUTS
from kernels.packing import SEQUENTIAL_ORDER, unpack_columns

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES: dict[torch.dtype, Literal["float16", "bfloat16", "float32"]] = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float32",
}
# Tensors that older checkpoints hold and that are computed, not learned.
COMPUTED = (
    "rotary_emb.inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)


def open_hf(folder: Path, family_name: str | None = None) -> "HfCheckpoint":
    """Open a folder with config.json and safetensors. Raises InputError when it is damaged, unfinished or unknown."""
    notes: list[str] = []
    true_bits: int | None = None
    state = folder_state(folder)
    if state is FolderState.UNFINISHED:
        raise InputError(
            f"{show(str(folder))} is an unfinished output: its manifest is missing. Give the command that was writing it "
            "again and it will resume, or discard it with --restart."
        )
    refuse_statistics(folder)
    if not (folder / "config.json").is_file():
        try:
            empty = not any(folder.iterdir())
        except OSError as error:
            raise InputError(f"{show(str(folder))} cannot be listed: {error.strerror}.") from error
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
        self.family, self.raw_config = family, raw_config
        self.files = TensorFolder(folder)
        embedding = self.files.tensors.get(family.embedding + ".weight")
        if embedding is not None and embedding.dtype in NAMES:
            config = dataclasses.replace(config, dtype=NAMES[embedding.dtype])
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
        self._check_tensors()

    def weight_files(self) -> list[Path]:
        return list(self.files.paths)

    def embedding(self) -> Tensor:
        return self._float(
            self.family.embedding + ".weight", (self.config.vocab_size, self.config.hidden_size)
        )

    def final_norm(self) -> Tensor:
        return self._float(self.family.final_norm + ".weight", (self.config.hidden_size,))

    def lm_head(self) -> Tensor:
        if self.config.tie_embeddings:
            return self.embedding()
        return self._float(self.family.lm_head + ".weight", (self.config.vocab_size, self.config.hidden_size))

    def block(self, index: int) -> BlockWeights:
        roles = linear_shapes(self.config)
        quantization = self.config.quantization
        group, bits = (quantization.group_size, quantization.bits) if quantization else (0, 4)
        linears = {}
        for role, parts in self.stored_linears(index, roles).items():
            linears[role] = LinearWeights.from_stored(parts, group, bits)
            parts.clear()  # so that no more than one linear is held in both forms
        return BlockWeights(index, linears, self.norms(index))

    def norms(self, index: int) -> dict[str, Tensor]:
        prefix = self._prefix(index)
        return {
            role: self._float(f"{prefix}{self.family.norms[role]}.weight", shape)
            for role, shape in norm_shapes(self.config).items()
        }

    def stored_linears(self, index: int, roles: Iterable[str]) -> dict[str, Stored]:
        prefix, wanted = self._prefix(index), list(roles)
        shapes, biases = linear_shapes(self.config), bias_roles(self.config)
        modules = linear_modules(self.family, self.config)
        found: dict[str, Stored] = {}
        if self.family.fused is not None and not {"q", "k", "v"}.isdisjoint(wanted):
            shape = (fused_rows(self.config), self.config.hidden_size)
            fused = self._linear(prefix + self.family.fused, shape, "q" in biases)
            found |= split_stored(fused, self.family.fused_layout, self.config)
        for role in wanted:
            if role not in found:
                found[role] = self._linear(prefix + modules[role], shapes[role], role in biases)
        return {role: found[role] for role in wanted}

    def _prefix(self, index: int) -> str:
        if not 0 <= index < self.config.num_layers:
            raise IndexError(f"block {index} of {self.config.num_layers}")
        return self.family.block.format(i=index)

    def _float(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.files.read(name)
        _check_shape(self.files.tensors[name], shape)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def _linear(self, module: str, shape: tuple[int, int], biased: bool) -> Stored:
        bias = {"bias": self._float(module + ".bias", shape[:1])} if biased else {}
        layout, fmt = self._layout, self.config.quantization
        if layout is None or fmt is None or not self._is_packed(module):
            return {"weight": self._float(module + ".weight", shape).t()} | bias
        expected = layout.expected(shape, fmt)
        for part, (_, extents) in expected.items():
            _check_shape(self.files.tensors[f"{module}.{part}"], extents)
        found = layout.read(module, {part: self.files.read(f"{module}.{part}") for part in expected}, fmt)
        if fmt.bits < 4:
            check_bits(module, found["words"], fmt.bits)
        return found | bias

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
        shapes, biases = linear_shapes(config), bias_roles(config)
        modules: dict[str, tuple[tuple[int, int], bool]] = {
            m: (shapes[role], role in biases) for role, m in linear_modules(family, config).items()
        }
        if family.fused is not None:
            modules[family.fused] = ((fused_rows(config), config.hidden_size), "q" in biases)
        for index in range(config.num_layers):
            prefix = family.block.format(i=index)
            for role, extent in norm_shapes(config).items():
                table[f"{prefix}{family.norms[role]}.weight"] = (FLOATS, extent)
            for module, (shape, biased) in modules.items():
                name = prefix + module
                if biased:
                    table[name + ".bias"] = (FLOATS, shape[:1])
                if self._layout is not None and config.quantization is not None and self._is_packed(name):
                    packed = self._layout.expected(shape, config.quantization)
                    table |= {f"{name}.{part}": expected for part, expected in packed.items()}
                else:
                    table[name + ".weight"] = (FLOATS, shape)
        return table

    def _check_tensors(self) -> None:
        present, expected = self.files.tensors, self._expected()
        missing = [name for name in expected if name not in present]
        if missing == [self.family.lm_head + ".weight"]:
            raise InputError(
                f"{missing[0]} is absent and config.json does not tie it to the embedding. Copy the missing shard, or set "
                "tie_word_embeddings to true where the model has one shared matrix."
            )
        if missing:
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
        extra = [n for n in present if n not in expected and not n.endswith(COMPUTED)]
        if self.config.tie_embeddings and self.family.lm_head + ".weight" in extra:
            extra.remove(self.family.lm_head + ".weight")
            self.notes.append(f"{self.family.lm_head}.weight is present but tied: the embedding is used")
        biases = [name for name in extra if name.endswith(".bias")]
        if biases:
            raise InputError(
                f"{show(biases[0])} is present, but config.json says that this {self.config.family} model has no such bias "
                f"({len(biases)} in all). Leaving them out would change the model: correct config.json."
            )
        if extra:
            self.notes.append(f"{len(extra)} tensors are not used, the first is {show(extra[0])!r}")

    def _check_group_size(self) -> None:
        """The scales of the first packed linear show the true group size."""
        layout, fmt = self._layout, self.config.quantization
        if layout is None or fmt is None:
            return
        tensors, shapes = self.files.tensors, linear_shapes(self.config)
        for role, module in linear_modules(self.family, self.config).items():
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
