"""`pack_checkpoint`: one call for every format that a quantized checkpoint can be packed into."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.formats import PackFormat, PackOptions, check_options
from convert.gguf.codes import GgufCodes
from convert.gguf.reader import gguf_file_in
from convert.gguf.writer import write_gguf
from convert.hf.writer import required_bytes
from convert.pack.folder import left_out, pack_folder
from convert.pack.plan import check_source, is_symmetric_model, target_format
from convert.readers import open_checkpoint
from convert.turbomind.packing import GROUP_SIZE
from convert.turbomind.writer import PackResult, estimate_bytes, plan_packing, write_workspace


def open_source(
    path: str | PathLike[str],
    target: PackFormat,
    *,
    family: str | None = None,
    cache_dir: Path | None = None,
) -> Checkpoint:
    """`open_checkpoint`, but a GGUF file whose codes can be moved is opened as codes, not as dequantized floats.

    For a workspace its codes count only in groups of 128, the ones that TurboMind knows; of others the floats are packed.
    """
    ckpt = open_checkpoint(path, family=family, cache_dir=cache_dir)
    place = Path(path)
    file = place if place.suffix.lower() == ".gguf" else gguf_file_in(place) if place.is_dir() else None
    if file is None:
        return ckpt
    codes = GgufCodes(file, ckpt)
    groups = codes.config.quantization.group_size if codes.config.quantization else None
    return ckpt if target == "turbomind" and groups != GROUP_SIZE else codes


def pack_checkpoint(
    source: Checkpoint,
    out: Path,
    target: PackFormat,
    options: PackOptions | None = None,
    *,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Write `source` in another format: its codes, scales and zero points are moved, never chosen again.

    Raises InputError where the format cannot hold the model, ResourceError on a full disk.
    """
    options = options or PackOptions()
    check_options(target, options)
    if target == "turbomind":
        return write_workspace(
            source,
            out,
            tp=options.tp,
            dialect=options.dialect,
            dtype=options.dtype,
            chat_template=options.chat_template,
            restart=restart,
            progress=progress,
        )
    if target == "gguf":
        check_source(source, target)
        symmetric = is_symmetric_model(source)
        made = write_gguf(source, out, symmetric, rest=options.rest, restart=restart, progress=progress)
        notes = (*source.notes, *left_out(source, target), *_window_note(source))
        return PackResult(out, 1, made.size_bytes, made.elapsed_s, notes)
    return pack_folder(source, out, target, restart=restart, progress=progress)


def _window_note(source: Checkpoint) -> list[str]:
    if source.config.sliding_window is None:
        return []
    return ["the sliding window has no place in GGUF of this architecture: llama.cpp attends to everything"]


def describe_packing(source: Checkpoint, target: PackFormat, options: PackOptions) -> tuple[str, int]:
    """Type of the weights and bytes of the files that packing would write. Raises InputError where it cannot."""
    if target == "turbomind":
        packing = plan_packing(source, options.tp, options.dialect, options.dtype)
        return packing.weight_type, estimate_bytes(packing)
    fmt = check_source(source, target) if target == "gguf" else target_format(source, target)
    return "float16" if fmt is None else "int4", required_bytes(source.config, source.tokenizer_dir, fmt)
