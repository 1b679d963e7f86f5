"""Hugging Face folders, float or AWQ "gemm", as a `Checkpoint`. Names come from the family's row; nothing is run.

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
from convert.folder.json_files import read_object, show
from convert.folder.state import FolderState, folder_state, read_manifest, refuse_statistics
from convert.hf.config import parse_config
from convert.hf.safetensors_files import TensorInfo
from convert.hf.tensor_folder import TensorFolder
from kernels.packing import AWQ_ORDER, SEQUENTIAL_ORDER, awq_to_sequential_, unpack_columns

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
    raw = read_object(folder / "config.json")
    config, family, remarks = parse_config(raw, family_name, true_bits)
    if state is FolderState.FOREIGN and config.quantization is not None:
        notes.append("no manifest: written by another program, so digests could not be checked")
    return HfCheckpoint(folder, config, family, raw, notes + remarks)


class HfCheckpoint(Checkpoint):
    """Reads tensor by tensor. `raw_config` is the parsed config.json, for writers that copy it."""

    def __init__(
        self, folder: Path, config: ModelConfig, family: Family, raw_config: dict[str, Any], notes: list[str]
    ) -> None:
        self.family, self.raw_config = family, raw_config
        self.files = TensorFolder(folder)
        embedding = self.files.tensors.get(family.embedding + ".weight")
        if embedding is not None and embedding.dtype in NAMES:
            config = dataclasses.replace(config, dtype=NAMES[embedding.dtype])
        super().__init__(
            folder, "awq" if config.quantization else "hf", config, folder, notes + self.files.notes
        )
        self._check_tensors()

    def weight_files(self) -> list[Path]:
        return list(self.files.paths)

    def check_unchanged(self) -> None:
        self.files.check_unchanged()

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
        if module + ".qweight" not in self.files.tensors:
            return {"weight": self._float(module + ".weight", shape).t()} | bias
        assert self.config.quantization is not None
        group, bits = self.config.quantization.group_size, self.config.quantization.bits
        for part, expected in _packed_shapes(shape, group).items():
            _check_shape(self.files.tensors[f"{module}.{part}"], expected)
        words = awq_to_sequential_(self.files.read(module + ".qweight"))
        if bits < 4:
            check_bits(module, words, bits)
        zeros = unpack_columns(self.files.read(module + ".qzeros"), AWQ_ORDER)
        return {"words": words, "scales": self.files.read(module + ".scales"), "zeros": zeros} | bias

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor the model needs; packed linears as they are packed."""
        config, family = self.config, self.family
        table: dict[str, tuple[int, ...]] = {
            family.embedding + ".weight": (config.vocab_size, config.hidden_size),
            family.final_norm + ".weight": (config.hidden_size,),
        }
        if not config.tie_embeddings:
            table[family.lm_head + ".weight"] = (config.vocab_size, config.hidden_size)
        shapes, biases = linear_shapes(config), bias_roles(config)
        modules: dict[str, tuple[tuple[int, int], bool]] = {
            m: (shapes[role], role in biases) for role, m in linear_modules(family, config).items()
        }
        if family.fused is not None:
            modules[family.fused] = ((fused_rows(config), config.hidden_size), "q" in biases)
        for index in range(config.num_layers):
            prefix = family.block.format(i=index)
            for role, extent in norm_shapes(config).items():
                table[f"{prefix}{family.norms[role]}.weight"] = extent
            for module, (shape, biased) in modules.items():
                name = prefix + module
                if biased:
                    table[name + ".bias"] = shape[:1]
                if config.quantization and name + ".qweight" in self.files.tensors:
                    packed = _packed_shapes(shape, config.quantization.group_size)
                    table |= {f"{name}.{part}": expected for part, expected in packed.items()}
                else:
                    table[name + ".weight"] = shape
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
        for name, shape in expected.items():
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
        """The first packed linear shows the true group size: rows of its words to rows of its scales."""
        name = next((n.removesuffix(".qweight") for n in self.files.tensors if n.endswith(".qweight")), None)
        if name is None or self.config.quantization is None or f"{name}.scales" not in self.files.tensors:
            return
        rows, groups = (self.files.tensors[f"{name}.{part}"].shape[:1] for part in ("qweight", "scales"))
        stated = self.config.quantization.group_size
        if rows and groups and groups[0] and rows[0] // groups[0] != stated:
            raise InputError(
                f"config.json states a group_size of {stated}, but the tensors of {show(name)!r} have groups of "
                f"{rows[0] // groups[0]}: correct quantization_config, or copy config.json and weights again."
            )

    def _check_dtypes(self, expected: dict[str, tuple[int, ...]]) -> None:
        kinds: Counter[torch.dtype] = Counter()
        for name in expected:
            dtype = self.files.tensors[name].dtype
            packed = name.endswith((".qweight", ".qzeros"))
            if packed != (dtype == torch.int32) or not (packed or dtype in FLOATS):
                wanted = "int32" if packed else "float16, bfloat16 or float32"
                raise InputError(
                    f"tensor {show(name)!r} is {str(dtype).removeprefix('torch.')}, expected {wanted}."
                )
            if name.endswith(".scales") and dtype != torch.float16:
                raise InputError(
                    f"tensor {show(name)!r} is {str(dtype).removeprefix('torch.')}, expected float16."
                )
            kinds[dtype] += not packed
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


def _packed_shapes(shape: tuple[int, int], group_size: int) -> dict[str, tuple[int, int]]:
    """(N, K) -> shapes of qweight, qzeros, scales. Raises InputError where N or K cannot be packed."""
    rows, cols = shape
    if rows % 8 or cols % group_size:
        raise InputError(
            f"a packed linear of shape {shape} needs N a multiple of 8 and K a multiple of group_size {group_size}: "
            "config.json does not belong to these weights."
        )
    groups = cols // group_size
    return {"qweight": (cols, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}


def _check_shape(info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != tuple(expected):
        raise InputError(
            f"tensor {show(info.name)!r} in {show(info.path.name)} has shape {list(info.shape)}, but config.json asks for "
            f"{list(expected)}. They belong to different models; copy both again."
        )
