"""The int4 codes of a GGUF file as a `Checkpoint`, for packing it into another format.

Only for files whose minima are whole multiples of their scales, as `quantize pack --format gguf` writes them: those of other
programs are no codes with zero points, and count as float sources (`convert.gguf.reader`). Floats come from the unpacked file.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights, Stored
from convert.config import QuantFormat
from convert.errors import InputError
from convert.families.table import linear_shapes
from convert.folder.json_files import show
from convert.folder.unchanged import Unchanged
from convert.gguf.blocks import BLOCK, BYTES, unpack_blocks
from convert.gguf.file import open_gguf
from convert.gguf.names import EXPERTS, ROLES, block_name
from convert.gguf.reader import unpermute
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns


class GgufCodes(Checkpoint):
    """`inner` is the same file, dequantized; this view holds the codes of the linears that are Q4_0 or Q4_1."""

    def __init__(self, file: Path, inner: Checkpoint) -> None:
        reader = open_gguf(file)
        self.file, self.inner = file, inner
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._permuted = str(reader.fields["general.architecture"].contents()) == "llama"
        kinds = {t.tensor_type.name for name, t in self._tensors.items() if name.startswith("blk.")}
        if kinds.isdisjoint(BYTES):
            raise InputError(
                f"{show(str(file))} holds no int4 codes (its blocks are {', '.join(sorted(kinds))}): quantize it first."
            )
        stated = reader.fields.get("turbomind_quant.group_size")
        group = BLOCK if stated is None else int(stated.contents())
        if group not in (32, 64, 128):
            raise InputError(f"{show(str(file))} states groups of {group}, expected 32, 64 or 128.")
        fmt = QuantFormat(4, group, (), "awq", "Q4_1" not in kinds)
        config = dataclasses.replace(inner.config, quantization=fmt, dtype="float16")
        super().__init__(file, "gguf", config, inner.tokenizer_dir, list(inner.notes))
        self.watched = Unchanged([file])

    def weight_files(self) -> list[Path]:
        return [self.file]

    def embedding(self) -> Tensor:
        return self.inner.embedding()

    def final_norm(self) -> Tensor:
        return self.inner.final_norm()

    def lm_head(self) -> Tensor:
        return self.inner.lm_head()

    def norms(self, index: int) -> dict[str, Tensor]:
        return self.inner.norms(index)

    def block(self, index: int) -> BlockWeights:
        assert self.config.quantization is not None
        group = self.config.quantization.group_size
        stored = self.stored_linears(index, linear_shapes(self.config))
        linears = {role: LinearWeights.from_stored(parts, group) for role, parts in stored.items()}
        return BlockWeights(index, linears, self.norms(index))

    def stored_linears(self, index: int, roles: Iterable[str]) -> dict[str, Stored]:
        wanted = list(roles)
        floats = self.inner.stored_linears(index, [r for r in wanted if not self._is_packed(index, r)])
        return {role: floats[role] if role in floats else self._codes(index, role) for role in wanted}

    def packed_roles(self, index: int) -> set[str]:
        return {role for role in linear_shapes(self.config) if self._is_packed(index, role)}

    def _place(self, index: int, role: str) -> tuple[str, int | None]:
        if role in ROLES:
            return block_name(index, ROLES[role]), None
        _, expert, part = role.split(".")
        return block_name(index, EXPERTS[part]), int(expert)

    def _is_packed(self, index: int, role: str) -> bool:
        return self._tensors[self._place(index, role)[0]].tensor_type.name in BYTES

    def _codes(self, index: int, role: str) -> Stored:
        assert self.config.quantization is not None
        name, expert = self._place(index, role)
        tensor = self._tensors[name]
        rows = linear_shapes(self.config)[role][0]
        data = torch.from_numpy(np.array(tensor.data if expert is None else tensor.data[expert]))
        group = self.config.quantization.group_size
        try:
            linear = unpack_blocks(
                name, data.view(torch.uint8).reshape(rows, -1), tensor.tensor_type.name, group
            )
        except ValueError as error:
            raise InputError(
                f"{show(str(self.file))}: {error}, but the file states groups of {group}."
            ) from error
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads} if self._permuted else {}
        if role in heads:
            linear = _unpermuted(linear, heads[role])
        if role in ROLES and block_name(index, ROLES[role], "bias") in self._tensors:
            linear["bias"] = self.inner.stored_linears(index, [role])[role]["bias"]
        return linear


def _unpermuted(linear: Stored, heads: int) -> Stored:
    codes = unpack_columns(linear["words"], SEQUENTIAL_ORDER).t().contiguous()
    words = pack_columns(unpermute(codes, heads).t(), SEQUENTIAL_ORDER)
    others = {
        name: unpermute(linear[name].t().contiguous(), heads).t().contiguous() for name in ("scales", "zeros")
    }
    return {"words": words} | others
