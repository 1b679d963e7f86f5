"""What every reader gives: a `Checkpoint` that hands out one decoder block at a time. `open_checkpoint` finds the reader.

N out features, K in features, H hidden size, V vocabulary. Float weights keep their source dtype.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from convert.config import ModelConfig
from convert.errors import InputError
from convert.files import combined_digest
from convert.json_files import show
from kernels.int4 import Quantized

Kind = Literal["hf", "awq", "workspace-0.6.5", "workspace-0.1"]


@dataclass(frozen=True)
class LinearWeights:
    """y = x W^T + bias. weight (N, K): a float tensor, or Quantized; bias (N,) or None."""

    weight: Tensor | Quantized
    bias: Tensor | None = None


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block. Roles of linears and norms are those of `convert.families`."""

    index: int
    linears: dict[str, LinearWeights]
    norms: dict[str, Tensor]


@dataclass
class Checkpoint(ABC):
    """A model on disk. `notes` are remarks for the user; `tokenizer_dir` holds tokenizer files and config.json."""

    path: Path
    kind: Kind
    config: ModelConfig
    tokenizer_dir: Path
    notes: list[str] = field(default_factory=list)
    _digest: str | None = field(default=None, init=False, repr=False)

    @abstractmethod
    def block(self, index: int) -> BlockWeights:
        """Decoder block `index`, read now, shapes and finiteness checked. Raises InputError naming the tensor."""

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

    def check_unchanged(self) -> None:  # noqa: B027
        """Raises InputError naming a weight file that changed since the checkpoint was opened."""

    def digest(self) -> str:
        """sha256 over the names and sha256 of the weight files; computed once."""
        if self._digest is None:
            self._digest = combined_digest(self.weight_files())
        return self._digest


def open_checkpoint(
    path: str | Path, *, family: str | None = None, cache_dir: Path | None = None
) -> Checkpoint:
    """Open a model: HF or AWQ folder, .gguf file, TurboMind workspace of either dialect, or a hub name ("owner/model").

    Args:
        family: a family's name, which decides instead of config.json.
        cache_dir: where a .gguf is unpacked and a hub model is fetched to; None: the user's cache.

    Raises InputError when it is none of these or damaged.
    """
    place = Path(path)
    try:
        is_dir, is_file = place.is_dir(), place.is_file()
    except OSError as error:
        raise InputError(f"{show(str(path))} is no usable path: {error.strerror}.") from error
    except ValueError as error:  # a NUL inside
        raise InputError(f"{show(str(path))} is no usable path: {error}.") from error
    if is_file:
        if place.suffix.lower() != ".gguf":
            raise InputError(
                f"{show(str(place))} is a file: expected a folder with config.json and *.safetensors, or a .gguf file."
            )
        from convert.gguf import unpack_gguf

        place = unpack_gguf(place, cache_dir)
    elif not is_dir:
        from convert.hub import fetch_from_hub, is_hub_name

        if not is_hub_name(str(path)):
            raise InputError(
                f"{show(str(path))} does not exist: expected a model folder, a .gguf file or a hub name."
            )
        place = fetch_from_hub(str(path), cache_dir)
    elif (place / "triton_models").is_dir():
        from convert.workspace import open_workspace

        return open_workspace(place)
    from convert.hf import open_hf

    return open_hf(place, family)
