"""Hidden states of the calibration text on their way through the model: embedding, and one block applied in batches.

S samples, L tokens a sample, H hidden size. A batch holds whole samples.
"""

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.config import ModelConfig
from engine.model.forward import Block, Tap, causal_attend
from engine.model.rope import rotary
from quant.statistics.chunks import chunks


def embed_tokens(ckpt: Checkpoint, tokens: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """tokens (S, L) int64 -> hidden states (S, L, H) before the first block."""
    used, places = tokens.flatten().unique(return_inverse=True)
    # the rows of the text alone go to the device, each once
    rows = ckpt.embedding()[used].to(device=device, dtype=dtype) * ckpt.config.embedding_scale
    return rows[places.to(device)].view(*tokens.shape, rows.shape[1])


def advance(
    stream: Tensor, weights: BlockWeights, config: ModelConfig, dtype: torch.dtype, tap: Tap | None = None
) -> Tensor:
    """The block with these weights on the hidden states (S, L, H), on their device; `tap` sees every batch."""
    device = stream.device
    block = Block(config, weights, dtype, device)
    out = torch.empty_like(stream)
    for rows in chunks(stream.shape[0], stream.shape[1], device):
        part = stream[rows]
        out[rows] = forward_batch(block, part, config, tap)
    return out


@torch.no_grad()
def forward_batch(block: Block, part: Tensor, config: ModelConfig, tap: Tap | None = None) -> Tensor:
    """Hidden states (B, L, H) of B samples -> the same after the block."""
    batch, length, width = part.shape
    positions = torch.arange(length, device=part.device).repeat(batch)
    attend = causal_attend(batch, length, config)
    flat = block(
        part.reshape(batch * length, width), positions, attend, tap, angles=rotary(config, positions)
    )
    return flat.view(batch, length, width)
