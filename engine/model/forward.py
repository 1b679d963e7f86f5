"""The one forward pass: embedding, blocks, final norm, head. Calibration taps it, perplexity runs it, serving batches it.

T tokens, H hidden size, V vocabulary. Tokens lie flat, (T,) ids with (T,) positions; `attend` knows the sequences.
The model knows no cache, no batch and no text.
"""

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import UsageError
from engine.model.attention import Attend, causal_attend
from engine.model.block import Block, Tap, attention_forward, block_forward, mlp_forward
from engine.model.ends import embed, finish_logits
from engine.model.layers import dense_product, why_unpacked
from engine.model.ops import TORCH_OPS, Ops, ops_for
from engine.model.parallel import TensorParallel, gather_logits, shard_block, shard_config, shard_head
from engine.model.rope import Rotary, depends_on_length, rotary
from kernels.products import prepacked

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
    """`--dtype` as a torch dtype: float32 on the CPU; on a GPU, auto is the checkpoint's 16-bit dtype (float16 for int4).

    Raises UsageError for another name.
    """
    if asked != "auto" and asked not in DTYPES:
        raise UsageError(f"--dtype {asked!r}: expected one of auto, {', '.join(DTYPES)}.")
    if torch.device(device).type == "cpu":
        return torch.float32
    if asked != "auto":
        return DTYPES[asked]
    if config.quantization is None and config.dtype == "bfloat16":
        return torch.bfloat16
    return torch.float16


def load_block(
    ckpt: Checkpoint,
    index: int,
    device: torch.device | str,
    dtype: torch.dtype,
    ops: Ops = TORCH_OPS,
    parallel: TensorParallel | None = None,
) -> Block:
    """One block, or this rank's part of it, read now; for passes that hold one block at a time."""
    weights, config = ckpt.block(index), ckpt.config
    if parallel is None:
        return Block(config, weights, dtype, device, ops)
    weights = shard_block(weights, config, parallel.rank, parallel.size)
    return Block(_rank_config(config, parallel), weights, dtype, device, ops, parallel.all_reduce)


def _rank_config(config: ModelConfig, parallel: TensorParallel) -> ModelConfig:
    group_size = None if config.quantization is None else config.quantization.group_size
    return shard_config(config, parallel.rank, parallel.size, group_size)


class StreamedBlocks(Sequence[Block]):
    """The blocks of a checkpoint, each read when it is asked for and held by nobody else."""

    def __init__(
        self,
        ckpt: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        ops: Ops,
        parallel: TensorParallel | None = None,
    ) -> None:
        self._arguments = (device, dtype, ops, parallel)
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
        parallel: TensorParallel | None = None,
    ) -> None:
        """embedding and lm_head (V, H), final_norm (H,): in the compute dtype, on the device; the same tensor if tied.

        With `parallel`, blocks and config are this rank's, and lm_head may be its rows of the head.
        """
        self.config, self.blocks, self.ops, self.parallel = config, blocks, ops, parallel
        self.embedding, self.final_norm, self.lm_head = embedding, final_norm, lm_head
        self.notes = list(notes)
        self._angles: Rotary | None = None
        self._packed_head: Tensor | None = None

    @staticmethod
    def from_checkpoint(
        ckpt: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        streamed: bool = False,
        ops: Ops | None = None,
        parallel: TensorParallel | None = None,
    ) -> "Model":
        """Load it whole, or, `streamed`, hold one block at a time and read each again for every pass.

        `parallel` loads this rank's part. `ops` None: the fused kernels on a GPU, torch elsewhere.
        """
        ops = ops or ops_for(device)
        config, notes = ckpt.config, list(ckpt.notes)
        fmt = config.quantization
        if fmt is not None and (why := why_unpacked(fmt.group_size, dtype, device)):
            when = "each time a block is read" if streamed else "once, at load"
            notes.append(f"int4 weights become {str(dtype).removeprefix('torch.')} {when} ({why}).")
        embedding = ckpt.embedding().to(device=device, dtype=dtype)
        lm_head = embedding if config.tie_embeddings else ckpt.lm_head().to(device=device, dtype=dtype)
        wide = torch.float32 if config.norm_offset else dtype
        final_norm = ckpt.final_norm().to(device=device, dtype=wide)
        blocks: Sequence[Block] = StreamedBlocks(ckpt, device, dtype, ops, parallel)
        if parallel is not None:
            config = _rank_config(config, parallel)
            lm_head = shard_head(lm_head, parallel.rank, parallel.size)
        return Model(
            config, embedding, blocks if streamed else list(blocks), final_norm, lm_head, ops, notes, parallel
        )

    @property
    def vocab_size(self) -> int:
        """V: width of the logits, on every rank."""
        return self.embedding.shape[0]

    @property
    def can_capture(self) -> bool:
        """True where a step may be captured in a CUDA graph: blocks at hand that never wait for the host, and no capped scores."""
        if self.config.attention_softcap is not None or not isinstance(self.blocks, list):
            return False
        return not any(block.waits_for_host for block in self.blocks)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> (T, H)."""
        return embed(ids, self.embedding, self.config)

    def rotary(self, positions: Tensor, prompt_lengths: Tensor | None = None) -> Rotary:
        """Angles of these positions (T,), the same for every block; see `engine.model.rope.rotary`."""
        if self._angles is not None:
            return self._angles.take(positions)
        return rotary(self.config, positions, prompt_lengths)

    def tabulate_angles(self, length: int) -> None:
        """Compute the angles of positions below `length` now, so that a step looks them up; no position may be higher then.

        The same bits on a GPU, in fewer kernels. Scalings that depend on a sequence's length are computed as before.
        """
        if not depends_on_length(self.config):
            self._angles = rotary(self.config, torch.arange(length, device=self.device))

    def pack(self) -> bool:
        """Lay all weights out for steps of few tokens on the CPU; False where this machine's torch cannot.

        A tied head is held a second time: the embedding is read by rows.
        """
        if self._packed_head is not None:
            return True
        head = prepacked(self.lm_head)
        if head is self.lm_head:
            return False
        self._packed_head = head
        for block in self.blocks:
            block.pack()
        return True

    def norm(self, x: Tensor) -> Tensor:
        """The final norm: (T, H) -> (T, H)."""
        return self.ops.rms_norm(x, self.final_norm, self.config.norm_eps)

    def head(self, x: Tensor) -> Tensor:
        """Normed hidden states (T, H) -> logits (T, V) float32."""
        weight = self.lm_head if self._packed_head is None else self._packed_head
        logits = dense_product(x, weight, out_dtype=torch.float32)
        if self.parallel is not None and self.lm_head.shape[0] != self.vocab_size:
            logits = gather_logits(self.parallel.all_gather(logits))
        return finish_logits(logits, self.config)

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
