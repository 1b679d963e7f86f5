"""Checkpoints seen through something: padded, cut short, with another norm. Everything a view does not define is the inner one's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, Kind
from convert.config import ModelConfig


class CheckpointView(Checkpoint):
    """Hands on what `inner` reads. A subclass changes some of it; `stored_linears` and `norms` follow its `block`."""

    def __init__(
        self,
        inner: Checkpoint,
        *,
        kind: Kind | None = None,
        config: ModelConfig | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """`kind` and `config` are those of `inner` where they are left out; `notes` come after its own."""
        super().__init__(
            inner.path,
            inner.kind if kind is None else kind,
            inner.config if config is None else config,
            inner.tokenizer_dir,
            [*inner.notes, *notes],
            inner.beside,
        )
        self.inner = inner

    def block(self, index: int) -> BlockWeights:
        return self.inner.block(index)

    def embedding(self) -> Tensor:
        return self.inner.embedding()

    def final_norm(self) -> Tensor:
        return self.inner.final_norm()

    def lm_head(self) -> Tensor:
        return self.inner.lm_head()

    def weight_files(self) -> list[Path]:
        return self.inner.weight_files()

    def check_unchanged(self) -> None:
        self.inner.check_unchanged()

    def carried(self) -> list[str]:
        return self.inner.carried()

    def read_carried(self, name: str) -> Tensor:
        return self.inner.read_carried(name)

    def dropped(self) -> dict[str, str]:
        return self.inner.dropped()

    def split(self) -> dict[str, int]:
        return self.inner.split()

    def digest(self) -> str:
        return self.inner.digest()


class WithFinalNorm(CheckpointView):
    """A checkpoint with another final norm (H,), for what is written after an end-to-end pass."""

    def __init__(self, inner: Checkpoint, norm: Tensor) -> None:
        super().__init__(inner)
        self._norm = norm

    def final_norm(self) -> Tensor:
        return self._norm


class FirstBlocks(CheckpointView):
    """A checkpoint cut after its first `count` blocks."""

    def __init__(self, inner: Checkpoint, count: int) -> None:
        super().__init__(inner, config=replace(inner.config, num_layers=count))
