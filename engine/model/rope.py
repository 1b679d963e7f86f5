"""Rotary position embedding: frequencies of every scaling, angles of tokens, rotation of heads. Knows no weights.

T tokens, D head size. Frequencies and angles are float32. The formulas are those of transformers 5 (`default`, `linear`,
`dynamic`, `yarn` [Peng et al. 2023], `llama3`) and of Qwen-1's published code (`qwen_ntk`, log-n attention).
Two scalings depend on the length of the sequence, which a flat batch of tokens does not show: they take
`prompt_lengths`, and each token keeps the frequencies it got when it was first computed, whoever shares its batch.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from convert.config import ModelConfig, RopeScaling


class Rotary(NamedTuple):
    """Angles of T tokens: cos and sin (T, D / 2) float32, and what q is multiplied with, (T,) float32 (log-n attention)."""

    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None = None

    def take(self, where: Tensor | slice) -> "Rotary":
        """The angles at these places (T',); in a table of all positions, -1 (a row that is no token) takes the last entry."""
        q_scale = None if self.q_scale is None else self.q_scale[where]
        return Rotary(self.cos[where], self.sin[where], q_scale)


def depends_on_length(config: ModelConfig) -> bool:
    """True where the frequencies change with the length of the sequence, so that `rotary` needs `prompt_lengths`."""
    return config.rope_scaling is not None and config.rope_scaling.kind in ("dynamic", "qwen_ntk")


def rotary(config: ModelConfig, positions: Tensor, prompt_lengths: Tensor | None = None) -> Rotary:
    """Angles for positions (T,) int64.

    prompt_lengths (T,) int64: tokens in the prompt of the sequence that each token belongs to; only read where
    `depends_on_length`. Without it all tokens are taken as whole prompts as long as the longest, as a forward
    pass over complete texts does.
    """
    scaling = config.rope_scaling
    frequencies, attention_factor = _frequencies(config, positions.device)
    if scaling is not None and depends_on_length(config):
        if prompt_lengths is None:
            lengths = (positions.max() + 1).expand_as(positions)
        elif scaling.kind == "dynamic":
            lengths = torch.maximum(prompt_lengths, positions + 1)
        else:
            lengths = prompt_lengths
        base = _length_base(config, scaling, lengths)
        frequencies = 1.0 / base[:, None] ** _exponents(config, positions.device)  # (T, D / 2)
    angles = positions[:, None].float() * frequencies
    q_scale = _logn(config, positions) if config.logn_attention else None
    cos, sin = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    return Rotary(cos, sin, q_scale)


def apply_rope(x: Tensor, angles: Rotary) -> Tensor:
    """Rotate x (T, heads, D): pair j is (x[j], x[j + D / 2]). Computed in float32, returned in the dtype of x."""
    cos, sin = angles.cos[:, None], angles.sin[:, None]  # (T, 1, D / 2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def training_length(config: ModelConfig) -> int:
    """Tokens of context that the model was trained on; lengths beyond it are what the scalings stretch."""
    return config.rope_scaling.original_max_position if config.rope_scaling else config.max_position


def _exponents(config: ModelConfig, device: torch.device) -> Tensor:
    return (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    )  # (D / 2,)


@lru_cache(maxsize=16)
def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies (D / 2,) in radians a token, and the factor on cos and sin."""
    frequencies = 1.0 / config.rope_theta ** _exponents(config, device)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(config, scaling, device)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original / low, frequencies / scaling.factor, frequencies)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(between, smoothed, scaled)


def _yarn(config: ModelConfig, scaling: RopeScaling, device: torch.device) -> tuple[Tensor, float]:
    dim, theta = config.head_dim, config.rope_theta

    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns this often within the original context."""
        return (
            dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / width).clamp(0, 1)
    wave = theta ** _exponents(config, device)
    frequencies = (1.0 / (scaling.factor * wave)) * ramp + (1.0 / wave) * (1 - ramp)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, attention_factor


def _length_base(config: ModelConfig, scaling: RopeScaling, lengths: Tensor) -> Tensor:
    """RoPE base (T,) float32 of sequences with these lengths (T,)."""
    power = config.head_dim / (config.head_dim - 2)
    if scaling.kind == "dynamic":
        longest = config.max_position
        stretch = scaling.factor * lengths.clamp(min=longest) / longest - (scaling.factor - 1)
        return config.rope_theta * stretch.float() ** power
    ratio = lengths.double() / scaling.original_max_position
    alpha = (2.0 ** torch.ceil(torch.log2(ratio) + 1) - 1).clamp(min=1)
    return (config.rope_theta * alpha**power).float()


def _logn(config: ModelConfig, positions: Tensor) -> Tensor:
    """log of the token's number (from 1) to the base of the training length, at least 1: (T,) float32."""
    return (torch.log((positions + 1).double()) / math.log(training_length(config))).clamp(min=1).float()
