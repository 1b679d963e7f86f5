"""What the rules of engines look at: the facts of one quantized model, from a checkpoint or from what a run would write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convert.checkpoint import Checkpoint
from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import BY_NAME, linear_shapes, stays_float
from convert.gguf.codes import GgufCodes
from convert.gguf.reader import gguf_file_in
from convert.linear_layouts.base import is_symmetric
from convert.readers import open_checkpoint

Format = Literal[
    "float", "awq", "compressed-tensors", "gptq", "mlx", "gguf", "workspace-0.6.5", "workspace-0.1"
]
KV_PARAMETERS = ("tmq/kv_params.safetensors", "kv_params.safetensors")
COLUMN_PARALLEL = (
    "q",
    "k",
    "v",
    "gate",
    "up",
)  # an engine cuts their outputs among its ranks, the others' inputs


@dataclass(frozen=True)
class Artefact:
    """`float_linears`: "block.role" of linears that could be int4 and are float. `group_size` 0: a float model."""

    format: Format
    config: ModelConfig
    group_size: int = 0
    bits: int = 16
    symmetric: bool = False
    float_linears: frozenset[str] = frozenset()
    has_kv_parameters: bool = False

    @property
    def architecture(self) -> str:
        """The name by which engines look the model up."""
        return BY_NAME[self.config.family].architecture

    def packed_shapes(self) -> dict[str, tuple[int, int]]:
        """Role -> (N, K) of every kind of int4 linear, experts once for all."""
        if not self.group_size:
            return {}
        shapes: dict[str, tuple[int, int]] = {}
        for index in range(self.config.num_layers):
            for role, shape in linear_shapes(self.config.of_layer(index)).items():
                if not stays_float(role) and f"{index}.{role}" not in self.float_linears:
                    parts = role.split(".")
                    shapes.setdefault(parts[0] if len(parts) == 1 else f"{parts[0]}.{parts[-1]}", shape)
        return shapes


def artefact_of(path: str | Path, *, family: str | None = None, cache_dir: Path | None = None) -> Artefact:
    """The facts of a model on disk. Raises InputError where it cannot be opened."""
    ckpt = open_checkpoint(path, family=family, cache_dir=cache_dir)
    place = Path(path)
    file = place if place.suffix.lower() == ".gguf" else gguf_file_in(place) if place.is_dir() else None
    if file is not None:
        try:
            ckpt = GgufCodes(file, ckpt)
        except InputError:  # a GGUF file of other types: it is served as it is
            return Artefact("gguf", ckpt.config)
    return facts_of(ckpt)


def facts_of(ckpt: Checkpoint) -> Artefact:
    """The facts of an open checkpoint."""
    fmt = ckpt.config.quantization
    kind: Format = "float" if ckpt.kind == "hf" else ckpt.kind
    if fmt is None:
        return Artefact(kind, ckpt.config)
    packed = (
        {i: ckpt.packed_roles(i) for i in range(ckpt.config.num_layers)}
        if not ckpt.kind.startswith("workspace")  # there every linear is int4
        else {}
    )
    floats = {
        f"{index}.{role}"
        for index, roles in packed.items()
        for role in linear_shapes(ckpt.config.of_layer(index))
        if role not in roles and not stays_float(role)
    }
    return Artefact(
        kind,
        ckpt.config,
        fmt.group_size,
        fmt.bits,
        fmt.symmetric or _first_block_is_symmetric(ckpt, packed),
        frozenset(floats),
        any((ckpt.path / name).is_file() for name in KV_PARAMETERS),
    )


def _first_block_is_symmetric(ckpt: Checkpoint, packed: dict[int, set[str]]) -> bool:
    """A model is symmetric throughout or hardly anywhere: the first block tells."""
    roles = packed.get(0) or set(linear_shapes(ckpt.config.of_layer(0)))
    linears = ckpt.stored_linears(0, sorted(roles)).values()
    return all(is_symmetric(linear["zeros"]) for linear in linears if "zeros" in linear)
