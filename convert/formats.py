"""The names of the formats that can be packed, and the settings of single ones. Imports nothing heavy: help is made from it."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from convert.errors import UsageError

FolderFormat = Literal["awq", "compressed-tensors", "gptq", "mlx", "float16"]
PackFormat = Literal["turbomind", "awq", "compressed-tensors", "gptq", "gguf", "mlx", "float16"]
PACK_FORMATS: tuple[PackFormat, ...] = get_args(PackFormat)
CheckpointFormat = Literal["awq", "compressed-tensors", "gptq", "gguf", "mlx", "float16"]  # of `quantize awq`
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)
Rest = Literal["f16", "q8_0"]
Dialect = Literal["0.6.5", "0.1"]


@dataclass(frozen=True)
class PackOptions:
    """Settings that single formats read. `tp`, `dialect`, `dtype`, `chat_template`: turbomind; `rest`: gguf."""

    tp: int = 1
    dialect: Dialect = "0.6.5"
    dtype: Literal["float16", "bfloat16"] | None = (
        None  # of a float model's weights; None: that of the source
    )
    chat_template: str | None = None  # LMDeploy's name of the chat format
    rest: Rest = "f16"  # type of embedding and head


READ_BY = {
    "tp": "turbomind",
    "dialect": "turbomind",
    "dtype": "turbomind",
    "chat_template": "turbomind",
    "rest": "gguf",
}


def check_options(target: str, options: PackOptions) -> None:
    """Raises UsageError for an unknown format or value, or a setting that the format does not read."""
    if target not in PACK_FORMATS:
        raise UsageError(f"--format {target!r}: expected one of {', '.join(PACK_FORMATS)}.")
    allowed = {"dialect": get_args(Dialect), "dtype": ("float16", "bfloat16", None), "rest": get_args(Rest)}
    for field in fields(options):
        value, flag = getattr(options, field.name), f"--{field.name.replace('_', '-')}"
        if value not in allowed.get(field.name, (value,)):
            known = ", ".join(str(item) for item in allowed[field.name] if item is not None)
            raise UsageError(f"{flag} {value!r}: expected one of {known}.")
        if value != field.default and READ_BY[field.name] != target:
            raise UsageError(
                f"{flag} belongs to --format {READ_BY[field.name]}; {target} has no use for it. Leave it out."
            )
    if isinstance(options.tp, bool) or not isinstance(options.tp, int) or options.tp < 1:
        raise UsageError(f"--tp {options.tp!r}: expected at least 1.")
