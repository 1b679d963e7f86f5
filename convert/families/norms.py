"""Norm weights between files and the engine: some families store them minus 1 (Gemma), all are stored in float16."""

from torch import Tensor


def norm_for_file(norm: Tensor, offset: float) -> Tensor:
    """What files hold for a norm that multiplies with `norm` (K,), before it is rounded to float16."""
    return norm.float() - offset if offset else norm


def storable_norm(norm: Tensor, offset: float) -> Tensor:
    """The weight next to `norm` (K,) that files can hold: float16, or float32 where they hold it minus an offset."""
    held = norm_for_file(norm, offset).half()
    return held.float() + offset if offset else held
