"""What every reader gives: a `Checkpoint` that hands out one decoder block at a time. `convert.readers` finds the reader.

N out features, K in features, H hidden size, V vocabulary. Float weights keep their source dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from convert.config import ModelConfig
from convert.families.table import linear_shapes
from convert.folder.files import combined_digest, file_digests
from convert.folder.source_files import SourceFiles
from convert.folder.state import FolderState, folder_state, read_manifest
from convert.folder.unchanged import Unchanged
from convert.linear import Stored as Stored
from kernels.int4 import Quantized
from kernels.packing import SEQUENTIAL_ORDER, pack_columns, unpack_columns

Kind = Literal["hf", "awq", "compressed-tensors", "gptq", "mlx", "gguf", "workspace-0.6.5", "workspace-0.1"]


@dataclass(frozen=True)
class LinearWeights:
    """y = x W^T + bias. weight (N, K): a float tensor, or Quantized; bias (N,) or None."""

    weight: Tensor | Quantized
    bias: Tensor | None = None

    def stored(self) -> Stored:
        """The same linear with its output features last; a float weight is a view."""
        bias = {} if self.bias is None else {"bias": self.bias}
        weight = self.weight
        if not isinstance(weight, Quantized):
            return {"weight": weight.t()} | bias
        words = pack_columns(weight.codes.t(), SEQUENTIAL_ORDER)
        return {"words": words, "scales": weight.scales.t(), "zeros": weight.zeros.t()} | bias

    @staticmethod
    def from_stored(parts: Stored, group_size: int, bits: int = 4) -> "LinearWeights":
        """Inverse of `stored`."""
        if "weight" in parts:
            return LinearWeights(parts["weight"].t().contiguous(), parts.get("bias"))
        codes = unpack_columns(parts["words"], SEQUENTIAL_ORDER).t().contiguous()
        scales, zeros = parts["scales"].t().contiguous(), parts["zeros"].t().contiguous()
        return LinearWeights(Quantized(codes, scales, zeros, group_size, bits), parts.get("bias"))


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block. Roles are those of `convert.families.family`; norms are what the normed states are multiplied with."""

    index: int
    linears: Mapping[str, LinearWeights]
    norms: Mapping[str, Tensor]
    vectors: Mapping[str, Tensor] = field(default_factory=dict)  # what is neither, as the source holds it
    norm_offset: float = 0.0  # files hold norms less this


@dataclass
class Checkpoint(ABC):
    """A model on disk. `notes` are remarks for the user; `tokenizer_dir` holds tokenizer files and config.json.

    `beside`: those small files as they were on opening (None: looked at now). `watched`: the weight files, where they are followed.
    """

    path: Path
    kind: Kind
    config: ModelConfig
    tokenizer_dir: Path
    notes: list[str] = field(default_factory=list)
    beside: SourceFiles = None  # type: ignore[assignment]  # always set after __post_init__
    watched: Unchanged | None = field(default=None, init=False, repr=False)
    _digest: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.beside is None:
            self.beside = SourceFiles(self.tokenizer_dir)

    @abstractmethod
    def block(self, index: int) -> BlockWeights:
        """Decoder block `index`, read now, shapes and finiteness checked. Raises InputError naming the tensor."""

    def stored_linears(self, index: int, roles: Iterable[str]) -> dict[str, Stored]:
        """Linears of block `index` by role, as files hold them; the large readers read no others and leave codes packed."""
        linears = self.block(index).linears
        return {role: linears[role].stored() for role in roles}

    def packed_roles(self, index: int) -> set[str]:
        """Roles of the linears of block `index` that are held as int4 codes."""
        linears = self.stored_linears(index, linear_shapes(self.config.of_layer(index)))
        return {role for role, linear in linears.items() if "words" in linear}

    def norms(self, index: int) -> dict[str, Tensor]:
        """The norms of block `index` by role."""
        return dict(self.block(index).norms)

    def vectors(self, index: int) -> dict[str, Tensor]:
        """What block `index` holds beside linears and norms, by role."""
        return dict(self.block(index).vectors)

    def carried(self) -> list[str]:
        """Tensors that are not the language model's, by their names in the source; outputs hold them as they are."""
        return []

    def read_carried(self, name: str) -> Tensor:
        """One of `carried`, in the source's dtype."""
        raise KeyError(name)

    def dropped(self) -> dict[str, str]:
        """Tensors of the source that no output holds, each with the reason."""
        return {}

    def split(self) -> dict[str, int]:
        """Tensors of the source that hold all experts of a block, each with the number of linears in it."""
        return {}

    @abstractmethod
    def embedding(self) -> Tensor:
        """(V, H)."""

    @abstractmethod
    def final_norm(self) -> Tensor:
        """(H,)."""

    @abstractmethod
    def lm_head(self) -> Tensor:
        """(V, H); the embedding where the two are tied."""

    @abstractmethod
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in a fixed order."""

    def check_unchanged(self) -> None:
        """Raises InputError naming a weight file, configuration or tokenizer file that changed since the checkpoint was opened."""
        if self.watched is not None:
            self.watched.check()
        self.beside.check()

    def digest(self) -> str:
        """sha256 over the names and sha256 of the weight files; computed once.

        Raises InputError naming the files that are not as a manifest of ours lists them.
        """
        if self._digest is None:
            digests = file_digests(self.weight_files())
            if digests and folder_state(self.path) is FolderState.FINISHED:
                read_manifest(self.path).compare(self.path, digests)
            if self.watched is not None:
                self.watched.remember(digests)
            self._digest = combined_digest(digests)
        return self._digest
