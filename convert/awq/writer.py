"""Writes an AWQ "gemm" checkpoint, the form in which `quantize awq` stores its result (`convert.linear_layouts.awq`).

int3 and int2 codes lie in the same nibbles; their true bits stand in the manifest.
"""

from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig, QuantFormat
from convert.folder.output import OutputFolder
from convert.hf import writer


class AwqWriter(writer.CheckpointWriter):
    """A `CheckpointWriter` that always has a format, and that format AWQ's."""

    fmt: QuantFormat

    def __init__(self, out: OutputFolder, source: Checkpoint, fmt: QuantFormat) -> None:
        if fmt.method != "awq":
            raise ValueError(f"an AWQ checkpoint was asked for in the format {fmt.method!r}")
        super().__init__(out, source, fmt)


def required_bytes(config: ModelConfig, source_dir: Path) -> int:
    """Bytes that an AWQ checkpoint of this model takes at most."""
    return writer.required_bytes(config, source_dir, QuantFormat(4, 128))
