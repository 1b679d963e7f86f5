"""Packs a checkpoint as a Hugging Face folder of another layout, or as plain float16: block by block, resumable, with manifest."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from convert import kv_parameters
from convert.checkpoint import Checkpoint
from convert.config import QuantFormat
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place
from convert.folder.output import OutputFolder
from convert.formats import FolderFormat
from convert.hf.writer import CheckpointWriter, required_bytes
from convert.pack.plan import target_format
from convert.tokenizer.tokenizer import check_tokenizer
from convert.turbomind.writer import PackResult
from kernels.int4 import bits_per_weight


def pack_folder(
    source: Checkpoint,
    out: Path,
    target: FolderFormat,
    *,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Write `source` as `target`, one shard a block; resumes an unfinished folder of the same source and format.

    Raises InputError where the format cannot hold it or the folder is occupied, ResourceError on a full disk.
    """
    start = time.perf_counter()
    check_output_place(out, source.path)
    fmt = target_format(source, target)
    check_tokenizer(source.tokenizer_dir)
    check_free_space(out, required_bytes(source.config, source.tokenizer_dir, fmt), "packing")
    fingerprint = {
        "command": "pack",
        "source": source.digest(),
        "format": target,
        "torch": torch.__version__,
    }
    with OutputFolder.begin(out, fingerprint, restart=restart) as folder:
        if not folder.finished:
            writer = CheckpointWriter(folder, source, fmt)
            for index in range(source.config.num_layers):
                if not writer.has_block(index):
                    writer.write_stored(index)
                progress(index + 1, source.config.num_layers)
            writer.finish_files()
            if target == "awq" and (source.path / kv_parameters.IN_CHECKPOINT).is_file():
                folder.copy(source.path / kv_parameters.IN_CHECKPOINT, kv_parameters.IN_CHECKPOINT)
            source.check_unchanged()
            folder.finish({**fingerprint, **_facts(fmt)}, {"elapsed_s": time.perf_counter() - start})
    notes = [*source.notes, *left_out(source, target)]
    shards = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in shards)
    return PackResult(out, len(shards), size, time.perf_counter() - start, tuple(notes))


def left_out(source: Checkpoint, target: str) -> list[str]:
    """What the source has and the format does not hold, as notes."""
    if target in ("awq", "turbomind") or not (source.path / kv_parameters.IN_CHECKPOINT).is_file():
        return []
    return [f"the parameters of the int8 KV cache are not part of {target}: engines choose their own"]


def _facts(fmt: QuantFormat | None) -> dict[str, Any]:
    if fmt is None:
        return {"kind": "hf", "bits": 16}
    return {
        "kind": fmt.method,
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "symmetric": fmt.symmetric,
        "bits_per_weight": round(bits_per_weight(fmt.bits, fmt.group_size), 6),
    }
