"""The one forward pass: embedding, blocks, final norm, head. Calibration taps it, perplexity runs it, serving batches it.

T tokens, H hidden size, V vocabulary. Tokens lie flat, (T,) ids with (T,) positions; `attend` knows the sequences.
The model knows no cache, no batch and no text.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from engine.attention import Attend, causal_attend
from engine.block import Block, Tap, attention_forward, block_forward, mlp_forward
from engine.ops import TORCH_OPS, Ops
from engine.rope import Rotary, rotary

__all__ = [
    "Attend",
    "Block",
    "Model",
    "Tap",
    "attention_forward",
    "block_forward",
    "causal_attend",
    "compute_dtype",
    "load_block",
    "mlp_forward",
]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def compute_dtype(config: ModelConfig, device: torch.device | str, asked: str = "auto") -> torch.dtype:
    """`--dtype` as a torch dtype: float32 on the CPU; on a GPU, auto is the checkpoint's 16-bit dtype (float16 for int4)."""
    if torch.device(device).type == "cpu":
        return torch.float32
    if asked != "auto":
        return DTYPES[asked]
    if config.quantization is None and config.dtype == "bfloat16":
        return torch.bfloat16
    return torch.float16


def load_block(
    ckpt: Checkpoint, index: int, device: torch.device | str, dtype: torch.dtype, ops: Ops = TORCH_OPS
) -> Block:
    """One block, read now; for passes that hold one block at a time."""
    return Block(ckpt.config, ckpt.block(index), dtype, device, ops)


class StreamedBlocks(Sequence[Block]):
    """The blocks of a checkpoint, each read when it is asked for and held by nobody else."""

    def __init__(self, ckpt: Checkpoint, device: torch.device | str, dtype: torch.dtype, ops: Ops) -> None:
        self._arguments = (device, dtype, ops)
        self._ckpt = ckpt

    def __len__(self) -> int:
        return self._ckpt.config.num_layers

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return load_block(self._ckpt, range(len(self))[index], *self._arguments)

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))


class Model:
    """A decoder-only model on one device. `notes` are sentences for the user about what loading did."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Tensor,
        blocks: Sequence[Block],
        final_norm: Tensor,
        lm_head: Tensor,
        ops: Ops = TORCH_OPS,
        notes: Sequence[str] = (),
    ) -> None:
        """embedding and lm_head (V, H), final_norm (H,): in the compute dtype, on the device; the same tensor if tied."""
        self.config, self.blocks, self.ops = config, blocks, ops
        self.embedding, self.final_norm, self.lm_head = embedding, final_norm, lm_head
        self.notes = list(notes)

    @staticmethod
    def from_checkpoint(
        ckpt: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        streamed: bool = False,
        ops: Ops = TORCH_OPS,
    ) -> "Model":
        """Load it whole, or, `streamed`, hold one block at a time and read each again for every pass."""
        config, notes = ckpt.config, list(ckpt.notes)
        if config.quantization is not None and torch.device(device).type == "cpu":
            when = "each time a block is read" if streamed else "once, at load"
            notes.append(f"int4 weights are dequantized to {str(dtype).removeprefix('torch.')} {when} (CPU).")
        embedding = ckpt.embedding().to(device=device, dtype=dtype)
        lm_head = embedding if config.tie_embeddings else ckpt.lm_head().to(device=device, dtype=dtype)
        final_norm = ckpt.final_norm().to(device=device, dtype=dtype)
        blocks: Sequence[Block] = StreamedBlocks(ckpt, device, dtype, ops)
        return Model(config, embedding, blocks if streamed else list(blocks), final_norm, lm_head, ops, notes)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> (T, H)."""
        return F.embedding(ids, self.embedding)

    def rotary(self, positions: Tensor, prompt_lengths: Tensor | None = None) -> Rotary:
        """Angles of these positions (T,), the same for every block; see `engine.rope.rotary`."""
        return rotary(self.config, positions, prompt_lengths)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm: (T, H) -> (T, H)."""
        return self.ops.rms_norm(x, self.final_norm, self.config.norm_eps)

    def head(self, x: Tensor) -> Tensor:
        """Normed hidden states (T, H) -> logits (T, V) float32."""
        return F.linear(x, self.lm_head).float()

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """ids (T,), positions (T,) -> normed hidden states (T, H). No host synchronisation, no shape that depends on data."""
        angles = self.rotary(positions, prompt_lengths)
        x, delta = self.embed(ids), None
        for block in self.blocks:
            x, delta = block.advance(x, delta, angles, attend)
        if delta is None:
            return self.norm(x)
        return self.ops.add_rms_norm(x, delta, self.final_norm, self.config.norm_eps)[1]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        prompt_lengths: Tensor | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits float32 (T, V), or (len(last), V) for the tokens with these indices alone."""
        x = self.hidden(ids, positions, attend, prompt_lengths)
        return self.head(x if last is None else x[last])

    __call__ = forward
