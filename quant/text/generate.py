"""Text that the model writes itself, for calibration: sampling at temperature 1 with a plain cache, one token a step.

B samples at a time, L tokens a sample, Hkv key heads, D head size, V vocabulary. The whole model is in memory meanwhile.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from engine.model.attention import window_of
from engine.model.forward import Model

CACHE_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}  # what the cache of the samples written at once may take


class GrowingCache:
    """Keys and values of B samples that grow by one token a step; its `attend` is that of `engine.model.attention`."""

    def __init__(
        self, config: ModelConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, length, config.head_dim)
        self.pages = torch.zeros(shape, device=device, dtype=dtype)
        self.config = config
        self.filled = 0  # tokens before this step

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, Hq, D), k and v (B, Hkv, D), one token of each sample -> (B, Hq * D)."""
        end = self.filled + 1
        self.pages[layer, 0, :, :, self.filled] = k
        self.pages[layer, 1, :, :, self.filled] = v
        window = window_of(self.config, layer)
        start = 0 if window is None else max(0, end - window)
        keys, values = self.pages[layer, :, :, :, start:end]  # (B, Hkv, t, D) each
        grouped = q.view(q.shape[0], keys.shape[1], -1, q.shape[2])  # (B, Hkv, Hq / Hkv, D)
        return F.scaled_dot_product_attention(grouped, keys, values).reshape(q.shape[0], -1)


class SelfGenerator:
    """`calib_data.generated.Generate` on a checkpoint. `on_step(done, total)` hears of every token of a batch."""

    def __init__(
        self,
        ckpt: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
        on_step: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.ckpt, self.device, self.dtype, self.on_step = ckpt, torch.device(device), dtype, on_step

    def __call__(self, prompts: Tensor, length: int, seed: int, barred: tuple[int, ...]) -> Tensor:
        model = Model.from_checkpoint(self.ckpt, self.device, self.dtype)
        model.pack()
        config = model.config
        one = config.num_layers * 2 * config.num_kv_heads * length * config.head_dim * self.dtype.itemsize
        batch = max(1, CACHE_BYTES.get(self.device.type, 2**30) // one)
        # One uniform number a token, drawn beforehand: a sample does not depend on which others share its batch.
        draws = torch.rand(prompts.shape[0], length, generator=torch.Generator().manual_seed(seed))
        starts = range(0, prompts.shape[0], batch)
        total = len(starts) * (length - 1)
        parts = []
        for start in starts:
            rows = slice(start, start + batch)
            on_step = partial(self._report, start // batch * (length - 1), total)
            parts.append(write_samples(model, prompts[rows], draws[rows], barred, on_step))
        return torch.cat(parts)

    def _report(self, before: int, total: int, done: int) -> None:
        self.on_step(before + done, total)


@torch.no_grad()
def write_samples(
    model: Model,
    prompts: Tensor,
    draws: Tensor,
    barred: tuple[int, ...],
    on_step: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Continue prompts (B, P) int64 to (B, L), L = draws.shape[1], by inverting the distribution at draws (B, L)."""
    batch, length = draws.shape
    tokens = torch.empty(batch, length, dtype=torch.int64)
    tokens[:, : prompts.shape[1]] = prompts
    bars = [i for i in barred if 0 <= i < model.config.vocab_size]
    cache = GrowingCache(model.config, batch, length, model.device, model.dtype)
    for at in range(length - 1):
        positions = torch.full((batch,), at, dtype=torch.int64, device=model.device)
        hidden = model.hidden(tokens[:, at].to(model.device), positions, cache.attend)
        cache.filled = at + 1
        on_step(at + 1)
        if at + 1 < prompts.shape[1]:
            continue
        logits = model.head(hidden)
        logits[:, bars] = -torch.inf
        tokens[:, at + 1] = sample_by(logits, draws[:, at + 1].to(model.device)).cpu()
    return tokens


def sample_by(logits: Tensor, draws: Tensor) -> Tensor:
    """The token (B,) at which the cumulated softmax of logits (B, V) passes the uniform draws (B,)."""
    cumulated = torch.softmax(logits, dim=-1).cumsum(-1, dtype=torch.float64)
    wanted = draws.double()[:, None] * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True).squeeze(1)
    return found.clamp(max=logits.shape[1] - 1)
