"""What a decode step hands to attention beside queries and pages: scratch memory, and the new tokens yet to be rotated and stored."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of `decode_attention`, kept by the caller so that no step allocates or clears memory.

    partial (units, Hq, D) fp32, lse (units, Hq) fp32, arrivals (B * Hkv,) int32: zero before and after every call.
    """

    partial: Tensor
    lse: Tensor
    arrivals: Tensor


@dataclass(frozen=True)
class NewTokens:
    """What `launch_decode` rotates and stores first, where q is qkv: see `rope_decode_attention`."""

    cos: Tensor
    sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    q_scale: Tensor | None
