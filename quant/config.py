"""`QuantConfig`: everything a user chooses about a quantization run, checked once. Command-line defaults are read from here."""

from dataclasses import dataclass
from typing import Literal, get_args

from convert.errors import UsageError

Preset = Literal["rtn", "gptq", "gptq-r", "awq", "fast", "default", "best"]
KvMode = Literal["dynamic", "static"]

PRESETS: tuple[str, ...] = get_args(Preset)
GROUP_SIZES = (32, 64, 128)
BITS = (2, 3, 4)


@dataclass(frozen=True)
class QuantConfig:
    """What to do and with how much text. `samples` x `seqlen` tokens are read; `kv_bits` 16 leaves the KV cache in float."""

    preset: Preset = "default"
    bits: int = 4
    group_size: int = 128
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    kv_bits: int = 16
    kv_mode: KvMode = "dynamic"
    distill: bool = False  # a short end-to-end pass over group scales and norms, after the blocks
    keep_ragged: bool = False  # linears whose K is no multiple of group_size stay float
    rounding_steps: int = 400  # learned rounding, per block (`best`)
    distill_steps: int = 600

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"The preset is {self.preset!r}: expected one of {', '.join(PRESETS)}.")
        if self.bits not in BITS:
            raise UsageError(f"bits is {self.bits}: expected 4 to serve, or 3 or 2 to evaluate.")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(
                f"group_size is {self.group_size}: expected 32, 64 or 128, the groups that every kernel reads."
            )
        for name in ("samples", "seqlen", "rounding_steps", "distill_steps"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} is {value}: expected at least 1.")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: expected an integer from 0 to 2^63 - 1.")
        if self.kv_bits not in (4, 8, 16):
            raise UsageError(f"kv_bits is {self.kv_bits}: expected 16 (float), 8 or 4.")
        if self.kv_mode not in get_args(KvMode):
            raise UsageError(f"kv_mode is {self.kv_mode!r}: expected dynamic or static.")
        if self.distill and self.preset == "rtn":
            raise UsageError(
                "distill needs calibration text, which the preset rtn does not read: choose another preset."
            )

    @property
    def max_code(self) -> int:
        """Largest integer code: 15 at 4 bits."""
        return (1 << self.bits) - 1

    @property
    def needs_text(self) -> bool:
        """Whether hidden states of calibration text are needed at all."""
        return self.preset != "rtn"
