"""Rotary position embedding: frequencies of every scaling, angles of tokens, rotation of heads. Knows no weights.

T tokens, D head size. Frequencies and angles are float32. The formulas are those of transformers 5 (`default`, `linear`,
`dynamic`, `yarn` [Peng et al. 2023], `llama3`, `longrope`) and of Qwen-1's published code (`qwen_ntk`, log-n attention).
Three scalings depend on the length of the sequence, which a flat batch of tokens does not show: they take
`prompt_lengths`, and each token keeps the frequencies it got when it was first computed, whoever shares its batch.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convert.config import ModelConfig, RopeScaling


class Rotary(NamedTuple):
    """Angles of T tokens: cos and sin (T, D / 2) float32, and what q is multiplied with, (T,) float32 (log-n attention).

    `local`: those of the layers with a window, where they have a RoPE base of their own (Gemma 3).
    """

    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None = None
    local: "Rotary | None" = None

    def take(self, where: Tensor | slice) -> "Rotary":
        """The angles at these places (T',); in a table of all positions, -1 (a row that is no token) takes the last entry."""
        q_scale = None if self.q_scale is None else self.q_scale[where]
        local = None if self.local is None else self.local.take(where)
        return Rotary(self.cos[where], self.sin[where], q_scale, local)

    def of_layer(self, has_window: bool) -> "Rotary":
        """The angles of a layer with or without a window."""
        return self.local if has_window and self.local is not None else self


def depends_on_length(config: ModelConfig) -> bool:
    """True where the frequencies change with the length of the sequence, so that `rotary` needs `prompt_lengths`."""
    return config.rope_scaling is not None and config.rope_scaling.kind in (
        "dynamic",
        "longrope",
        "qwen_ntk",
    )


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
        elif scaling.kind == "qwen_ntk":
            lengths = prompt_lengths
        else:
            lengths = torch.maximum(prompt_lengths, positions + 1)
        frequencies = _length_frequencies(config, scaling, lengths)
    angles = positions[:, None].float() * frequencies
    q_scale = _logn(config, positions) if config.logn_attention else None
    cos, sin = angles.cos(), angles.sin()
    if attention_factor != 1.0:
        cos, sin = cos * attention_factor, sin * attention_factor
    local = None
    if config.local_rope_theta is not None:
        plain = replace(config, rope_theta=config.local_rope_theta, rope_scaling=None, local_rope_theta=None)
        local = rotary(plain, positions)
    return Rotary(_with_still(cos, 1.0, config), _with_still(sin, 0.0, config), q_scale, local)


def _with_still(values: Tensor, value: float, config: ModelConfig) -> Tensor:
    """cos or sin (T, R / 2) of the rotated pairs -> of all pairs (T, D / 2): those that are not rotated come last."""
    still = (config.head_dim - rotated_channels(config)) // 2
    return F.pad(values, (0, still), value=value) if still else values


def rotated_channels(config: ModelConfig) -> int:
    """R: channels of a head that are rotated; D but for models that leave some as they are."""
    return config.head_dim if config.rotary_dim is None else config.rotary_dim


def apply_rope(x: Tensor, angles: Rotary) -> Tensor:
    """Rotate x (T, heads, D): pair j is (x[j], x[j + D / 2]). Computed in float32, returned in the dtype of x."""
    cos, sin = angles.cos[:, None], angles.sin[:, None]  # (T, 1, D / 2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def training_length(config: ModelConfig) -> int:
    """Tokens of context that the model was trained on; lengths beyond it are what the scalings stretch."""
    return config.rope_scaling.original_max_position if config.rope_scaling else config.max_position


def _exponents(config: ModelConfig, device: torch.device) -> Tensor:
    size = rotated_channels(config)
    return torch.arange(0, size, 2, dtype=torch.float32, device=device) / size  # (R / 2,)


@lru_cache(maxsize=16)
def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies (R / 2,) in radians a token, and the factor on cos and sin."""
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
    return frequencies, scaling.attention_factor or 1.0  # those of the other kinds depend on the length


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
    dim, theta = rotated_channels(config), config.rope_theta

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


def _length_frequencies(config: ModelConfig, scaling: RopeScaling, lengths: Tensor) -> Tensor:
    """Frequencies (T, R / 2) of tokens in sequences with these lengths (T,)."""
    exponents = _exponents(config, lengths.device)
    if scaling.kind != "longrope":
        return 1.0 / _length_base(config, scaling, lengths)[:, None] ** exponents
    short, long = (
        _on_device(factors, lengths.device) for factors in (scaling.short_factors, scaling.long_factors)
    )
    factors = torch.where((lengths > scaling.original_max_position)[:, None], long, short)
    return 1.0 / (factors * config.rope_theta**exponents)


@lru_cache(maxsize=64)
def _on_device(factors: tuple[float, ...], device: torch.device) -> Tensor:
    """The factors as float32 on the device, copied there once: a CUDA graph cannot hold a copy from the host."""
    return torch.tensor(factors, dtype=torch.float32, device=device)


def _length_base(config: ModelConfig, scaling: RopeScaling, lengths: Tensor) -> Tensor:
    """RoPE base (T,) float32 of sequences with these lengths (T,)."""
    size = rotated_channels(config)
    power = size / (size - 2)
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
