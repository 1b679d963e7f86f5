"""A TurboMind workspace back into a Hugging Face folder: AWQ where it is int4, float otherwise. Codes and scales stay as they are.

Also for workspaces that LMDeploy wrote: without a manifest, and without config.json, which is then made from the configuration of the
workspace. Padding and copied KV heads go where config.json tells the true sizes, and stay where it is absent.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert import kv_parameters
from convert.folder.disk_space import check_free_space
from convert.folder.files import check_output_place
from convert.folder.output import OutputFolder
from convert.hf.writer import CheckpointWriter
from convert.turbomind.reader import WorkspaceCheckpoint


@dataclass(frozen=True)
class UnpackResult:
    """What was written."""

    out: Path
    kind: str  # awq or hf
    elapsed_s: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "kind": self.kind,
            "elapsed_s": self.elapsed_s,
            "notes": list(self.notes),
        }


def unpack_workspace(
    source: WorkspaceCheckpoint,
    out: Path,
    *,
    restart: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> UnpackResult:
    """Write the checkpoint, one shard a block; resumes an unfinished one.

    Raises InputError for a damaged workspace or an occupied folder, ResourceError on a full disk.
    """
    start = time.perf_counter()
    check_output_place(out, source.path)
    check_free_space(out, sum(source.expected_files().values()), "unpacking")
    kind = "hf" if source.config.quantization is None else "awq"
    fingerprint = {"command": "unpack", "source": source.digest(), "torch": torch.__version__}
    with OutputFolder.begin(out, fingerprint, restart=restart) as folder:
        if not folder.finished:
            writer = UnpackWriter(folder, source)
            for index in range(source.config.num_layers):
                if not writer.has_block(index):
                    writer.write_stored(index)
                progress(index + 1, source.config.num_layers)
            writer.finish_files()
            if (parameters := source.path / kv_parameters.IN_WORKSPACE).is_file():
                folder.copy(parameters, kv_parameters.IN_CHECKPOINT)
            bits = 16 if source.config.quantization is None else source.config.quantization.bits
            folder.finish(
                {**fingerprint, "kind": kind, "bits": bits}, {"elapsed_s": time.perf_counter() - start}
            )
    return UnpackResult(out, kind, time.perf_counter() - start, tuple(source.notes))


class UnpackWriter(CheckpointWriter):
    """Writes the blocks of a workspace; floats keep the workspace's own type."""

    def __init__(self, out: OutputFolder, source: WorkspaceCheckpoint) -> None:
        super().__init__(out, source, source.config.quantization)
        self.float_dtype = source.config.dtype

    def store_floats(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)
