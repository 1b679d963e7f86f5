"""`QuantConfig`: everything a user chooses about a quantization run, checked once. Command-line defaults are read from here."""

from dataclasses import dataclass, fields
from typing import Any

from convert.errors import UsageError
from quant.recipes import Recipe, recipe_named

GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4)
KV_BITS = (16, 8)


@dataclass(frozen=True)
class QuantConfig:
    """What to do and with how much text: `samples` x `seqlen` tokens are read.

    Args:
        preset: the name of a registered recipe, or a `Recipe`.
        bits: of a code. group_size: weights along K that share a scale.
        seed: of the samples and of everything that is drawn.
        kv_bits: 16 leaves the KV cache in float; 8 also makes parameters for a static int8 cache.
        distill: a short end-to-end pass over group scales and norms, after the blocks.
        keep_ragged: linears whose K is no multiple of `group_size` stay float.
        symmetric: every zero point is the middle of the codes (8 at 4 bits), for formats and kernels that know no other.

    Raises UsageError for a value that is none of the choices.
    """

    preset: str | Recipe = "default"
    bits: int = 4
    group_size: int = 128
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    kv_bits: int = 16
    distill: bool = False
    keep_ragged: bool = False
    symmetric: bool = False

    def __post_init__(self) -> None:
        recipe = self.recipe
        if self.bits not in BITS:
            raise UsageError(f"bits is {self.bits}: expected 4 to serve, or 3 or 2 to evaluate.")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"group_size is {self.group_size}: expected 32, 64 or 128, the groups that every kernel reads."
            )
        for name in ("samples", "seqlen"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} is {value}: expected at least 1.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: expected an integer from 0 to 2^63 - 1.")
        if self.kv_bits not in KV_BITS:
            raise UsageError(f"kv_bits is {self.kv_bits}: expected 16 (float) or 8.")
        if self.distill and recipe.text == "none":
            raise UsageError(
                f"distill needs calibration text, which the preset {recipe.name} does not read: choose another preset."
            )

    @property
    def recipe(self) -> Recipe:
        """The row of `quant.recipes` that the preset names, or the recipe that was given. Raises UsageError for neither."""
        return self.preset if isinstance(self.preset, Recipe) else recipe_named(self.preset)

    @property
    def max_code(self) -> int:
        """Largest integer code: 15 at 4 bits."""
        return (1 << self.bits) - 1

    @property
    def needs_text(self) -> bool:
        """Whether hidden states of calibration text are needed at all."""
        return self.recipe.text != "none"

    def to_json(self) -> dict[str, Any]:
        """The choices as plain values; of the recipe its name (`Recipe.to_json` has the rest)."""
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"preset": self.recipe.name}
