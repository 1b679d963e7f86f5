"""What an error at the output of a block costs the model: gradients of its own predictions, taken on the float model once.

S samples, L tokens a sample, H hidden size. With labels drawn from the model itself, the mean of g g^T over gradients g of the
negative log-likelihood is the Fisher matrix F, and a small error d costs about d^T F d / 2 in KL divergence (Martens, 2014).
For models that fit on the device whole.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import BlockWeights
from convert.config import ModelConfig
from convert.families.table import linear_shapes
from quant.block_states import FloatBlock
from quant.learn.model_forward import ModelForward, OuterWeights
from quant.learn.training import repeatable
from quant.statistics.gram import fast_products

_STEP_TOKENS = 4096
_CPU_BYTES = 1 << 32
_GPU_SHARE = 0.5


def fits_whole(config: ModelConfig, device: torch.device) -> bool:
    """Whether the float32 weights leave room for gradients; by the size of the device alone, so that a run repeats."""
    layers = (config.of_layer(index) for index in range(config.num_layers))
    elements = sum(rows * cols for layer in layers for rows, cols in linear_shapes(layer).values())
    elements += 2 * config.vocab_size * config.hidden_size
    if device.type != "cuda":
        return 4 * elements < _CPU_BYTES
    return 4 * elements < _GPU_SHARE * torch.cuda.get_device_properties(device).total_memory


def measure_sensitivity(
    blocks: Sequence[BlockWeights],
    outer: OuterWeights,
    config: ModelConfig,
    tokens: Tensor,
    device: torch.device | str,
    seed: int,
    identity: float,
) -> list[Tensor]:
    """A metric (H, H) float32 for each block: errors d @ metric, squared and summed, cost what the model pays for them.

    One backward pass over the text, a few samples at a time.

    Args:
        blocks, outer: of the float model. tokens: (S, L) int64.
        identity: share of the identity in each metric; the rest is the Fisher matrix, scaled to a mean diagonal of 1.
    """
    device = torch.device(device)
    hidden, length = config.hidden_size, tokens.shape[1]
    fisher = [torch.zeros(hidden, hidden, device=device) for _ in blocks]
    generator = torch.Generator(device=device).manual_seed(seed)
    dense = [FloatBlock.of(block).to(device, torch.float32) for block in blocks]
    outer = outer.float_on(device)
    step = max(1, _STEP_TOKENS // length)
    with fast_products(), repeatable(), torch.enable_grad():
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step].to(device)
            forward = ModelForward(config, outer, len(part), length)
            states = list(forward.states(forward.embed(part.flatten()).requires_grad_(True), dense))
            logits = forward.logits(states[-1])
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            grads = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), states)
            for total, grad in zip(fisher, grads, strict=True):
                total += grad.t() @ grad
    return [_metric(matrix, identity) for matrix in fisher]


def _metric(fisher: Tensor, identity: float) -> Tensor:
    """The Cholesky factor M of (1 - identity) F + identity I, M M^T, with F scaled to a mean diagonal of 1; I where F is unusable."""
    eye = torch.eye(len(fisher), device=fisher.device)
    mean = fisher.diagonal().mean()
    if not bool(mean > 0) or not bool(fisher.isfinite().all()):
        return eye
    factor, info = torch.linalg.cholesky_ex((1 - identity) * fisher / mean + identity * eye)
    return eye if int(info) else factor
