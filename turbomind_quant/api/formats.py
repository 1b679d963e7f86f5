"""`pack`, `unpack`, `verify` and `inspect`: between formats, and what lies in them."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from convert.errors import InputError
from convert.folder.files import check_output_place
from convert.folder.output import folder_state
from convert.formats import Dialect, PackFormat, PackOptions, Rest, check_options
from convert.inspect import InspectReport, inspect_path
from convert.pack.run import describe_packing, open_source, pack_checkpoint
from convert.readers import open_checkpoint
from convert.turbomind.reader import WorkspaceCheckpoint
from convert.turbomind.unpack import UnpackResult, unpack_workspace
from convert.turbomind.writer import PackResult
from convert.verify import VerifyReport, verify_path
from quant.progress import Listener, Progress
from turbomind_quant.api.choices import StrPath, check_positive


@dataclass(frozen=True)
class PackEstimate:
    """What `pack` would write. `output` is the folder that would be written, and `output_state` what is there now."""

    format: PackFormat
    tp: int
    dialect: str
    weight_type: str  # "int4", "float16" or "bfloat16"
    output_bytes: int
    output: Path
    output_state: str  # "absent", "finished", "unfinished" or "foreign"

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON data."""
        return asdict(self) | {"output": str(self.output)}


def pack(
    path: StrPath,
    out: StrPath,
    *,
    format: PackFormat = "turbomind",
    tp: int = 1,
    dialect: Dialect = "0.6.5",
    dtype: Literal["float16", "bfloat16"] | None = None,
    chat_template: str | None = None,
    rest: Rest = "f16",
    family: str | None = None,
    restart: bool = False,
    progress: Listener | None = None,
) -> PackResult:
    """Write a quantized checkpoint in another format, in the folder `out`: its codes, scales and zero points are moved.

    An unfinished `out` of the same choices is resumed.

    Args:
        path: folder of a checkpoint that `quantize awq` or `pack` wrote, workspace, .gguf file, or hub name.
        format: "turbomind" (a workspace, of float models too), "awq", "compressed-tensors", "gptq", "gguf", "mlx" or "float16".
        family, restart, progress: as in `quantize`.
        tp: GPUs that will share a workspace. dialect: TurboMind's format, "0.6.5" or "0.1".
        dtype: of a float model's weights in a workspace, "float16" or "bfloat16"; None: that of the source.
        chat_template: LMDeploy's name of the chat format of a workspace; None finds it in the tokenizer's template.
        rest: type of embedding and head in a GGUF file, "f16" or "q8_0".

    Raises InputError where the model cannot be packed so or `out` is occupied, ResourceError on a full disk.
    """
    options = PackOptions(tp, dialect, dtype, chat_template, rest)
    check_options(format, options)
    with Progress("pack", progress) as run:
        ckpt = open_source(path, format, family=family)
        for note in ckpt.notes:
            run.say(f"note: {note}")
        result = pack_checkpoint(ckpt, Path(out), format, options, restart=restart, progress=run.step)
        for note in result.notes[len(ckpt.notes) :]:
            run.say(f"note: {note}")
        return result


def estimate_pack(
    path: StrPath,
    out: StrPath,
    *,
    format: PackFormat = "turbomind",
    tp: int = 1,
    dialect: Dialect = "0.6.5",
    dtype: Literal["float16", "bfloat16"] | None = None,
    chat_template: str | None = None,
    rest: Rest = "f16",
    family: str | None = None,
) -> PackEstimate:
    """What `pack` with these arguments would write. Raises InputError where the model cannot be packed so."""
    options = PackOptions(tp, dialect, dtype, chat_template, rest)
    check_options(format, options)
    ckpt = open_source(path, format, family=family)
    check_output_place(Path(out), ckpt.path)
    weight_type, size = describe_packing(ckpt, format, options)
    state = folder_state(Path(out)).value
    return PackEstimate(format, options.tp, options.dialect, weight_type, size, Path(out), state)


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


def inspect(
    path: StrPath, *, engine: str | None = None, tp: int = 1, family: str | None = None
) -> InspectReport:
    """What `path` is: family, sizes, tensors, bits of any checkpoint, .gguf file or workspace.

    Args:
        engine: "lmdeploy", "vllm", "sglang", "transformers", "llama.cpp" or "mlx", also with ":version": the report then holds a
            `verdict`, whether that engine loads it.
        tp: GPUs that share the model there.
        family: read the model as this family, whatever its config.json says.

    A model that is listed but cannot be used has a `problem`. Raises InputError where there is nothing to list.
    """
    check_positive(tp, "--tp", 1)
    return inspect_path(Path(path), family, engine, tp)
