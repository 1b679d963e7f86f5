"""A TurboMind workspace as a `Checkpoint`: files checked against the configuration, then read back block by block.

Files have no header: sizes derived from the configuration, and digests where there is a manifest of ours, are the only
guard. Written by us or by LMDeploy itself, dialect 0.6.5 (config.yaml) or 0.1 (config.ini).
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights, Stored
from convert.config import ModelConfig, QuantFormat
from convert.errors import InputError
from convert.families.table import linear_shapes
from convert.folder.boundary import reading
from convert.folder.json_files import read_bytes, read_object, show
from convert.folder.output import FolderState, folder_state, read_manifest
from convert.folder.unchanged import Unchanged
from convert.formats import Dialect
from convert.hf.config import parse_config
from convert.hf.safetensors_files import TensorInfo, check_finite, read_tensor
from convert.turbomind.blocks import read_linears, read_norms
from convert.turbomind.config import Shape, parse_config_yaml
from convert.turbomind.ini import check_kv_values, parse_config_ini
from convert.turbomind.packing import GROUP_SIZE, Packing, misfits
from convert.turbomind.shapes import all_shapes, embedding_shapes, kv_shapes, output_shapes

CONFIG_BYTES = 2**17  # a list of sizes for each of the most layers there may be is a tenth of it


@reading("the workspace")
def open_workspace(folder: Path) -> "WorkspaceCheckpoint":
    """Open a workspace of either dialect. Raises InputError when it is unfinished, damaged or contradicts itself."""
    weights = folder / "triton_models" / "weights"
    notes: list[str] = []
    state = folder_state(folder)
    if state is FolderState.UNFINISHED:
        raise InputError(
            f"{show(str(folder))} is an unfinished workspace: its manifest is missing. Give the command that was writing "
            "it again and it will resume, or discard it with --restart."
        )
    if state is FolderState.FINISHED:
        read_manifest(folder).check_sizes(folder)
    else:
        notes.append("no manifest: written by another program, so digests could not be checked")
    if (weights / "config.yaml").is_file():
        dialect: Dialect = "0.6.5"
        path = weights / "config.yaml"
        config, shape = parse_config_yaml(_text(path), show(str(path)))
    elif (weights / "config.ini").is_file():
        dialect = "0.1"
        path = weights / "config.ini"
        config, shape = parse_config_ini(_text(path), show(str(path)))
    else:
        raise InputError(
            f"{show(str(weights))} holds neither config.yaml (0.6) nor config.ini (0.1): it is no TurboMind workspace."
        )
    tokenizer = folder / "triton_models" / "tokenizer"
    config = _with_source_facts(config, shape, tokenizer, str(path), notes)
    return WorkspaceCheckpoint(folder, config, shape, dialect, tokenizer, notes)


def _text(path: Path) -> str:
    try:
        return read_bytes(path, CONFIG_BYTES).decode("utf8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{show(str(path))} is not UTF-8 text (byte {error.start}): convert again."
        ) from error


def _with_source_facts(
    stated: ModelConfig, shape: Shape, tokenizer: Path, where: str, notes: list[str]
) -> ModelConfig:
    """The stated model, completed from the source's config.json where that lies beside the tokenizer and agrees."""
    quantization = QuantFormat(4, GROUP_SIZE) if shape.weight_type == "int4" else None
    file = tokenizer / "config.json"
    if not file.is_file():
        notes.append("no config.json beside the tokenizer: padding and copied KV heads, if any, are kept")
        return replace(stated, quantization=quantization)
    source, _, _ = parse_config(read_object(file))
    for name in ("hidden_size", "num_layers", "num_heads", "head_dim", "vocab_size"):
        if getattr(source, name) != getattr(stated, name):
            raise InputError(
                f"{show(where)} says {name} {getattr(stated, name)}, but {show(str(file))} says {getattr(source, name)}: "
                "the workspace mixes two models. Pack it again."
            )
    if not shape.attn_bias and (
        source.qkv_bias or source.o_bias
    ):  # LMDeploy 0.6.5 drops those of InternLM and Llama
        notes.append(
            "packed without the attention biases that its config.json states: they were lost in packing"
        )
        source = replace(source, qkv_bias=False, o_bias=False)
    elif shape.attn_bias and not (source.qkv_bias or source.o_bias):
        source = replace(source, qkv_bias=True, o_bias=True)
    return replace(source, dtype=stated.dtype, quantization=quantization)


class WorkspaceCheckpoint(Checkpoint):
    """`shape` is the packing as the configuration states it; `packing` derives the sizes of the files from it."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        shape: Shape,
        dialect: Dialect,
        tokenizer: Path,
        notes: list[str],
    ) -> None:
        kind = "workspace-0.1" if dialect == "0.1" else "workspace-0.6.5"
        super().__init__(folder, kind, config, tokenizer, notes)  # type: ignore[arg-type]
        self.weights = folder / "triton_models" / "weights"
        self.shape = shape
        derived = Packing(config, shape.tp, shape.weight_type, dialect)  # type: ignore[arg-type]
        self.packing = replace(derived, stated_intermediate=shape.intermediate_size)
        expected = (derived.intermediate_size, config.num_kv_heads * derived.replication)
        # LMDeploy pads Qwen-1 to twice its size: more than derived is zeros, less is another model
        if expected[0] > shape.intermediate_size or expected[1] != shape.num_kv_heads:
            raise InputError(
                f"{show(str(folder))}: the configuration states an intermediate size of {shape.intermediate_size} and "
                f"{shape.num_kv_heads} KV heads, where tp {shape.tp} of this model gives {expected[0]} and {expected[1]}. "
                "Pack the model again."
            )
        reasons = misfits(self.packing)
        if reasons:
            raise InputError(
                f"{show(str(folder))}: the configuration contradicts itself: {'; '.join(reasons)}."
            )
        self._refuse_more_than_there_is()
        self._shapes = all_shapes(self.packing, shape.kv_int8)
        self.check_files()
        self.watched = Unchanged(self.weight_files())
        for name in kv_shapes(self.packing) if shape.kv_int8 else ():
            check_kv_values(self._read(name), show(name))

    def _refuse_more_than_there_is(self) -> None:
        """Raises InputError where the configuration asks for more files than the folder holds, before any of them is listed."""
        config = self.config
        needed = config.num_layers * max(1, config.num_experts) * self.shape.tp
        present = sum(1 for _ in self.weights.iterdir())
        if needed > present:
            raise InputError(
                f"{show(str(self.path))}: {config.num_layers:,} layers, {config.num_experts:,} experts and tp {self.shape.tp:,} need "
                f"more than {needed:,} weight files, but {show(str(self.weights))} holds {present:,}. Pack the model again."
            )

    def weight_files(self) -> list[Path]:
        return sorted(path for path in self.weights.iterdir() if path.suffix not in (".yaml", ".ini"))

    def expected_files(self) -> dict[str, int]:
        """File name -> bytes, from the configuration alone."""
        return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in self._shapes.items()}

    def check_files(self) -> None:
        """Raises InputError naming every weight file that is absent or has another size than the configuration asks for."""
        wrong = []
        for name, size in self.expected_files().items():
            path = self.weights / name
            if not path.is_file():
                wrong.append(f"{show(name)} is absent")
            elif path.stat().st_size != size:
                wrong.append(f"{show(name)} has {path.stat().st_size:,} bytes, expected {size:,}")
        if wrong:
            raise InputError(
                f"{show(str(self.path))}: {len(wrong)} weight files do not fit the configuration: {'; '.join(wrong[:4])}"
                f"{'; ...' if len(wrong) > 4 else ''}. The engine would read them as garbage. Pack the model again."
            )

    def block(self, index: int) -> BlockWeights:
        linears = {}
        for role, parts in self.stored_linears(index, linear_shapes(self.config)).items():
            linears[role] = LinearWeights.from_stored(parts, GROUP_SIZE)
            parts.clear()  # so that no more than one linear is held in both forms
        return BlockWeights(index, linears, self.norms(index))

    def stored_linears(self, index: int, roles: Iterable[str]) -> dict[str, Stored]:
        return read_linears(index, roles, self._read, self.packing)

    def norms(self, index: int) -> dict[str, Tensor]:
        return read_norms(index, self._read)

    def embedding(self) -> Tensor:
        return self._joined(list(embedding_shapes(self.packing)), 1)[: self.config.vocab_size]

    def final_norm(self) -> Tensor:
        return self._read("norm.weight")

    def lm_head(self) -> Tensor:
        return self._joined(list(output_shapes(self.packing)), 0)[: self.config.vocab_size]

    def _joined(self, names: list[str], axis: int) -> Tensor:
        return self._read(names[0]) if len(names) == 1 else torch.cat([self._read(n) for n in names], axis)

    def _read(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        path, size = self.weights / name, math.prod(shape) * dtype.itemsize
        assert self.watched is not None
        self.watched.check([path])
        tensor = read_tensor(TensorInfo(name, path, dtype, shape, 0, size))
        check_finite(name, tensor)
        return tensor
