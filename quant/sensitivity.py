"""What an error at the output of a block costs the model: gradients of its own predictions, taken on the float model once.

S samples, L tokens a sample, H hidden size. With labels drawn from the model itself, the mean of g g^T over gradients g of the
negative log-likelihood is the Fisher matrix, and a small error d costs about d^T F d / 2 in KL divergence (Martens, 2014).
Here tokens and channels are taken apart, as in K-FAC: a matrix over channels for each block, a weight for each token.
For models that fit on the device whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights, LinearWeights
from convert.config import ModelConfig
from engine.attention import causal_attend
from engine.block import block_forward
from engine.ops import rms_norm
from engine.rope import rotary
from kernels.int4 import Quantized
from quant.gram import fast_products
from quant.training import repeatable, training_attend

_STEP_TOKENS = 4096
_CLIP = 20.0  # a token counts at most this many times the median
_FLOOR = 0.05  # and at least this share of the mean


@dataclass(frozen=True)
class Sensitivity:
    """Of one block. metric: (H, H) float32, errors (.., H) @ metric squared and summed cost what the model pays for them.

    before, after: (S, L) float32 with mean 1, the weight of each token's error in front of and behind the block.
    """

    metric: Tensor
    before: Tensor
    after: Tensor


def measure_sensitivity(
    blocks: Sequence[BlockWeights],
    config: ModelConfig,
    embedding: Tensor,
    final_norm: Tensor,
    head: Tensor,
    tokens: Tensor,
    device: torch.device | str,
    seed: int,
    plain: float = 0.1,
) -> list[Sensitivity]:
    """One backward pass over the text, a few samples at a time.

    Args:
        embedding, head: (V, H). final_norm: (H,). tokens: (S, L) int64.
        plain: share of the identity in each metric; the rest is the Fisher matrix over channels, mean diagonal 1.
    """
    device = torch.device(device)
    hidden, length = config.hidden_size, tokens.shape[1]
    fisher = [torch.zeros(hidden, hidden, device=device) for _ in blocks]
    power = torch.zeros(len(blocks) + 1, *tokens.shape, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    dense = [_float_block(block, device) for block in blocks]
    table, out_table, norm = (t.to(device).float() for t in (embedding, head, final_norm))
    step = max(1, _STEP_TOKENS // length)
    with fast_products(), repeatable(), torch.enable_grad():
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step].to(device)
            positions = torch.arange(length, device=device).repeat(len(part))
            attend = training_attend(causal_attend(len(part), length, config), device)
            angles = rotary(config, positions)
            x = F.embedding(part.flatten(), table).requires_grad_(True)
            states = [x]
            for block in dense:
                x = block_forward(x, positions, block, config, attend, angles=angles)
                states.append(x)
            logits = F.linear(rms_norm(x, norm, config.norm_eps), out_table)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            grads = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), states)
            for k, grad in enumerate(grads):
                if k:
                    fisher[k - 1] += grad.t() @ grad
                power[k, start : start + len(part)] = grad.pow(2).mean(-1).view(len(part), length)
    weights = [_token_weights(p) for p in power]
    return [
        Sensitivity(_metric(matrix, plain), weights[k], weights[k + 1]) for k, matrix in enumerate(fisher)
    ]


def _metric(fisher: Tensor, plain: float) -> Tensor:
    """The symmetric square root of (1 - plain) F + plain I, with F scaled to a mean diagonal of 1."""
    eye = torch.eye(len(fisher), device=fisher.device)
    mean = fisher.diagonal().mean()
    if not bool(mean > 0) or not bool(fisher.isfinite().all()):
        return eye
    values, vectors = torch.linalg.eigh(((1 - plain) * fisher / mean + plain * eye).double())
    root: Tensor = (vectors * values.clamp(min=1e-6).sqrt()) @ vectors.t()
    return root.float()


def _token_weights(power: Tensor) -> Tensor:
    mean = power.mean()
    if not bool(mean > 0) or not bool(power.isfinite().all()):
        return torch.ones_like(power)
    weights = power.clamp(max=_CLIP * power.median()) + _FLOOR * mean
    return weights / weights.mean()


def _float_block(block: BlockWeights, device: torch.device) -> BlockWeights:
    linears = {}
    for role, part in block.linears.items():
        assert not isinstance(part.weight, Quantized)
        bias = None if part.bias is None else part.bias.to(device).float()
        linears[role] = LinearWeights(part.weight.to(device).float(), bias)
    return BlockWeights(
        block.index, linears, {role: norm.to(device).float() for role, norm in block.norms.items()}
    )
