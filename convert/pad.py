"""Exact zero-padding of a checkpoint, so that every K is a multiple of the group size. The function computed stays the same.

H hidden size, I intermediate size, D head_dim. Added channels are zero throughout: zero rows and columns of the linears, zero
embedding columns, zero heads (their output meets zero columns of o). RMSNorm divides by the root of the mean over H' channels
instead of H, so its weight is multiplied by sqrt(H / H') and eps by H / H': w' x / sqrt(sum / H' + eps') = w x / sqrt(sum / H + eps).
Where q and k have norms of their own (Qwen3) the one eps of config.json must stay: there the residual stream is multiplied by
c = sqrt(H' / H) instead (embedding, o, down), so that its mean square, and with it every eps, keeps its value.
A norm of what a half of the block gives (Gemma, GLM-4) keeps its weight then, since what it reads and what it gives grow alike.
Where the embedding is multiplied by the root of the hidden size (Gemma), its rows make up for the other root.
Whole KV groups are added, each a KV head with its query heads, so that every query head keeps its KV head.
"""

import dataclasses
from collections.abc import Mapping
from math import sqrt
from typing import Any

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint, LinearWeights
from convert.checkpoint_view import CheckpointView
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import BY_NAME, linear_shapes
from kernels.int4 import Quantized


def padded_config(config: ModelConfig, multiple: int = 128) -> ModelConfig:
    """The config after padding; the same object where nothing needs it. Raises InputError for a quantized checkpoint.

    A model whose hidden size is heads x head_dim keeps that, because some loaders derive head_dim from it.
    """
    kv_heads = config.num_kv_heads
    while kv_heads * config.query_group * config.head_dim % multiple:
        kv_heads += 1
    heads = kv_heads * config.query_group
    hidden, inner, expert, shared = (
        _up(size, multiple)
        for size in (
            config.hidden_size,
            config.intermediate_size,
            config.expert_intermediate_size,
            config.shared_intermediate_size,
        )
    )
    if config.hidden_size == config.num_heads * config.head_dim:
        hidden = heads * config.head_dim
    mixture = BY_NAME[config.family].mixture
    if mixture is not None and mixture.shared_count is not None:  # it has the size of so many experts
        shared = expert * (config.shared_intermediate_size // config.expert_size)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "expert_intermediate_size": expert,
        "shared_intermediate_size": shared,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
    }
    if all(getattr(config, name) == size for name, size in sizes.items()):
        return config
    _refuse_unpaddable(config, heads)
    if config.quantization is not None:
        raise InputError("--pad works on float checkpoints: this one is quantized already. Pad its source.")
    by_width = BY_NAME[config.family].embedding_by_width
    return dataclasses.replace(
        config,
        **sizes,
        embedding_scale=sqrt(hidden) if by_width else config.embedding_scale,
        norm_eps=config.norm_eps if config.qk_norm else config.norm_eps * config.hidden_size / hidden,
        padded_from=(config.hidden_size, config.num_heads, config.num_kv_heads),
    )


def _refuse_unpaddable(config: ModelConfig, heads: int) -> None:
    """Raises InputError where zeros cannot be added without changing what the model computes."""
    if config.tree is not None:
        raise InputError(
            f"--pad: {config.tree.architecture} joins this language model to others of its hidden size, which are carried through "
            "as they are. Choose --keep-ragged or a smaller --group-size."
        )
    if config.qk_norm and config.qk_norm_width == "all" and heads != config.num_heads:
        raise InputError(
            f"--pad: a {config.family} model norms all heads of q and k together, so heads of zeros would change it. Choose "
            "--keep-ragged or a smaller --group-size."
        )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad_checkpoint(ckpt: Checkpoint, multiple: int = 128) -> Checkpoint:
    """`ckpt` padded so that hidden size, intermediate size and heads x head_dim are multiples of `multiple`, or itself."""
    config = padded_config(ckpt.config, multiple)
    return ckpt if config is ckpt.config else PaddedCheckpoint(ckpt, config)


class PaddedCheckpoint(CheckpointView):
    """A view of another checkpoint; every tensor is padded as it is read."""

    def __init__(self, inner: Checkpoint, config: ModelConfig) -> None:
        note = (
            f"padded with zeros: hidden {inner.config.hidden_size} -> {config.hidden_size}, heads {inner.config.num_heads}/"
            f"{inner.config.num_kv_heads} -> {config.num_heads}/{config.num_kv_heads}, intermediate "
            f"{inner.config.intermediate_size} -> {config.intermediate_size}; the same function"
        )
        super().__init__(inner, config=config, notes=[note])
        self._norm_scale = sqrt(inner.config.hidden_size / config.hidden_size)
        # multiplies all that is added to the residual stream; 1 where eps takes up the change instead
        self._stream_scale = 1.0 / self._norm_scale if config.qk_norm else 1.0
        self._embedding_scale = self._stream_scale * inner.config.embedding_scale / config.embedding_scale

    def embedding(self) -> Tensor:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return _zeros_behind(_times(self.inner.embedding(), self._embedding_scale), shape)

    def lm_head(self) -> Tensor:
        if self.config.tie_embeddings:
            return self.embedding()
        return _zeros_behind(self.inner.lm_head(), (self.config.vocab_size, self.config.hidden_size))

    def final_norm(self) -> Tensor:
        # a tied head carries the factor of the embedding, which is taken back here
        scale = 1.0 / self._embedding_scale if self.config.tie_embeddings else 1.0
        return _times(self._norm(self.inner.final_norm()), scale)

    def block(self, index: int) -> BlockWeights:
        block = self.inner.block(index)
        shapes = linear_shapes(self.config.of_layer(index))
        linears = {
            role: _linear(linear, shapes[role], self._stream_scale if role.endswith(("o", "down")) else 1.0)
            for role, linear in block.linears.items()
        }
        return dataclasses.replace(block, linears=linears, norms=self._norms(block.norms))

    def _norms(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {role: self._norm_of(role, norm) for role, norm in norms.items()}

    def _norm_of(self, role: str, norm: Tensor) -> Tensor:
        if role in ("q_norm", "k_norm"):  # over channels of heads, which stay
            return norm
        if role.endswith("out_norm") and self._stream_scale != 1.0:
            return _zeros_behind(norm, (self.config.hidden_size,))
        return self._norm(norm)

    def _norm(self, weight: Tensor) -> Tensor:
        # float32: the factor is no power of two, so a 16-bit product would lose what padding promises to keep
        return _zeros_behind(weight.float() * self._norm_scale, (self.config.hidden_size,))


def _linear(linear: LinearWeights, shape: tuple[int, int], scale: float) -> LinearWeights:
    if isinstance(linear.weight, Quantized):
        raise InputError("--pad works on float checkpoints: this one is quantized already. Pad its source.")
    bias = None if linear.bias is None else _zeros_behind(_times(linear.bias, scale), shape[:1])
    return LinearWeights(_zeros_behind(_times(linear.weight, scale), shape), bias)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """tensor * factor in float32, or the tensor itself where the factor is 1."""
    return tensor if factor == 1.0 else tensor.float() * factor


def _zeros_behind(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in the leading corner of a zero tensor of `shape`."""
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[tuple(slice(extent) for extent in tensor.shape)] = tensor
    return padded
