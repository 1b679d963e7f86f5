"""`pack`, `unpack`, `verify` and `inspect`: between formats, and what lies in them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from convert.errors import InputError
from convert.folder.files import check_output_place
from convert.folder.output import folder_state
from convert.inspect import InspectReport, inspect_path
from convert.readers import open_checkpoint
from convert.turbomind.packing import Dialect
from convert.turbomind.reader import WorkspaceCheckpoint
from convert.turbomind.unpack import UnpackResult, unpack_workspace
from convert.turbomind.writer import PackResult, estimate_bytes, plan_packing, write_workspace
from convert.verify import VerifyReport, verify_path
from quant.progress import Listener, Progress
from turbomind_quant.api.choices import StrPath, check_one, check_positive


@dataclass(frozen=True)
class PackEstimate:
    """What `pack` would write. `output` is the folder that would be written, and `output_state` what is there now."""

    tp: int
    dialect: str
    weight_type: str  # "int4", "float16" or "bfloat16"
    output_bytes: int
    output: Path
    output_state: str  # "absent", "finished", "unfinished" or "foreign"

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON data."""
        return {
            "tp": self.tp,
            "dialect": self.dialect,
            "weight_type": self.weight_type,
            "output_bytes": self.output_bytes,
            "output": str(self.output),
            "output_state": self.output_state,
        }


def pack(
    path: StrPath,
    out: StrPath,
    *,
    tp: int = 1,
    dialect: Dialect = "0.6.5",
    dtype: Literal["float16", "bfloat16"] | None = None,
    chat_template: str | None = None,
    family: str | None = None,
    restart: bool = False,
    progress: Listener | None = None,
) -> PackResult:
    """Pack an AWQ or float checkpoint into a TurboMind workspace in the folder `out`, which LMDeploy serves.

    An unfinished `out` of the same choices is resumed.

    Args:
        path: folder of safetensors (float or AWQ), .gguf file, or hub name.
        tp: GPUs that will share the model. dialect: TurboMind's format, "0.6.5" or "0.1".
        dtype: of a float model's weights, "float16" or "bfloat16"; None: that of the source. An int4 model is float16.
        chat_template: LMDeploy's name of the chat format; None finds it in the tokenizer's template.
        family, restart, progress: as in `quantize`.

    Raises InputError where the model cannot be packed so or `out` is occupied, ResourceError on a full disk.
    """
    _check_packing(tp, dialect, dtype)
    with Progress("pack", progress) as run:
        ckpt = open_checkpoint(path, family=family)
        for note in ckpt.notes:
            run.say(f"note: {note}")
        return write_workspace(
            ckpt,
            Path(out),
            tp=tp,
            dialect=dialect,
            dtype=dtype,
            chat_template=chat_template,
            restart=restart,
            progress=run.step,
        )


def estimate_pack(
    path: StrPath,
    out: StrPath,
    *,
    tp: int = 1,
    dialect: Dialect = "0.6.5",
    dtype: Literal["float16", "bfloat16"] | None = None,
    family: str | None = None,
) -> PackEstimate:
    """What `pack` with these arguments would write. Raises InputError where the model cannot be packed so."""
    _check_packing(tp, dialect, dtype)
    ckpt = open_checkpoint(path, family=family)
    check_output_place(Path(out), ckpt.path)
    packing = plan_packing(ckpt, tp, dialect, dtype)
    state = folder_state(Path(out)).value
    return PackEstimate(tp, dialect, packing.weight_type, estimate_bytes(packing), Path(out), state)


def _check_packing(tp: int, dialect: str, dtype: str | None) -> None:
    """Raises UsageError for a value that is none of the choices."""
    check_positive(tp, "--tp", 1)
    check_one(dialect, "--dialect", get_args(Dialect))
    if dtype is not None:
        check_one(dtype, "--dtype", ("float16", "bfloat16"))


def unpack(
    workspace: StrPath, out: StrPath, *, restart: bool = False, progress: Listener | None = None
) -> UnpackResult:
    """Turn a TurboMind workspace of either dialect, ours or LMDeploy's, back into a checkpoint in the folder `out`.

    An int4 workspace becomes an AWQ checkpoint, a float one a Hugging Face folder; no number changes.

    Raises InputError for a damaged workspace or an occupied folder, ResourceError on a full disk.
    """
    with Progress("unpack", progress) as run:
        ckpt = open_checkpoint(workspace)
        if not isinstance(ckpt, WorkspaceCheckpoint):
            raise InputError(
                f"{workspace} is no TurboMind workspace but {ckpt.kind}: there is nothing to unpack."
            )
        for note in ckpt.notes:
            run.say(f"note: {note}")
        return unpack_workspace(ckpt, Path(out), restart=restart, progress=run.step)


def verify(
    path: StrPath,
    *,
    source: StrPath | None = None,
    family: str | None = None,
    strict: bool = False,
    progress: Listener | None = None,
) -> VerifyReport:
    """Check every byte of a checkpoint, workspace or folder of statistics: sizes, digests, ranges, tokenizer, and against `source`.

    Args:
        source: what `path` was made from: sampled weights are compared with it.
        family: read `path` as this family, whatever its config.json says.
        strict: refuse every file that the manifest does not list, documents such as README.md too.

    Every fault is a failed check of the report. Raises InputError where `path` is no model at all or `source` cannot be opened.
    """
    with Progress("verify", progress) as run:
        origin = None if source is None else Path(source)
        return verify_path(Path(path), origin, family=family, strict=strict, progress=run.step)


def inspect(path: StrPath, *, family: str | None = None) -> InspectReport:
    """What `path` is: family, sizes, tensors, bits of any checkpoint, .gguf file or workspace.

    A model that is listed but cannot be used has a `problem`. Raises InputError where there is nothing to list.
    """
    return inspect_path(Path(path), family)
