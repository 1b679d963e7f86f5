"""What stands before the first block and after the last: embedding and logits with their factors and caps.

T tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.config import ModelConfig


def embed(ids: Tensor, table: Tensor, config: ModelConfig) -> Tensor:
    """ids (T,) int64 -> rows of the table (V, H), multiplied by the model's factor: (T, H)."""
    rows = F.embedding(ids, table)
    return rows if config.embedding_scale == 1.0 else rows * config.embedding_scale


def finish_logits(logits: Tensor, config: ModelConfig) -> Tensor:
    """Products with the head (T, V) -> logits: multiplied by the model's factor, then cap * tanh(logits / cap)."""
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    cap = config.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap
