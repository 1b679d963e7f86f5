"""`quantize inspect`: family, tensors, bits and sizes of any checkpoint or workspace, also of ones that cannot be opened."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import linear_shapes, norm_shapes
from convert.folder.json_files import read_object, show
from convert.folder.state import refuse_statistics
from convert.gguf.parts import open_parts
from convert.gguf.reader import gguf_file_in
from convert.hf.tensor_folder import TensorFolder
from convert.readers import open_checkpoint
from convert.verdict.artefact import artefact_of
from convert.verdict.judge import Verdict, judge, parse_engine
from kernels.int4 import bits_per_weight


@dataclass(frozen=True)
class TensorLine:
    """One tensor, or one header-less file of a workspace (dtype "raw", no shape)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str


@dataclass(frozen=True)
class InspectReport:
    """What there is. `parameters` counts weights of the unpacked model; `problem` says why it cannot be opened, if so.

    `verdict`: whether the engine that was asked for loads it.
    """

    path: str
    kind: str
    family: str = "unknown"
    quantization: str = "none"
    bits_per_weight: float | None = None
    parameters: int | None = None
    size_bytes: int = 0
    config: dict[str, Any] | None = None
    tensors: tuple[TensorLine, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None
    verdict: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_path(
    path: Path, family: str | None = None, engine: str | None = None, tp: int = 1
) -> InspectReport:
    """List a checkpoint, and judge whether `engine` ("name" or "name:version") loads it on `tp` ranks.

    Raises InputError where there is nothing to list, or statistics of `quantize calibrate`.
    """
    named = None if engine is None else parse_engine(engine)
    report = _listed(path, family)
    if named is None or report.problem is not None:
        return report
    return replace(report, verdict=judge(artefact_of(path, family=family), *named, tp))


def _listed(path: Path, family: str | None) -> InspectReport:
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _inspect_gguf(path)
    if not path.is_dir():
        found = "is neither a model folder nor a .gguf file" if path.exists() else "does not exist"
        raise InputError(f"{show(str(path))} {found}: expected a checkpoint, a .gguf file or a workspace.")
    refuse_statistics(path)
    if (file := gguf_file_in(path)) is not None:
        return _inspect_gguf(file)
    is_workspace = (path / "triton_models").is_dir()
    report = _list_workspace(path) if is_workspace else _list_tensors(path)
    try:
        ckpt = open_checkpoint(path, family=family)
    except InputError as error:
        if not report.tensors:
            raise
        return replace(report, problem=str(error), quantization=_stated_method(path))
    report = replace(
        report,
        kind=ckpt.kind,
        family=ckpt.config.family,
        notes=tuple(ckpt.notes),
        config=asdict(ckpt.config),
        parameters=count_parameters(ckpt.config),
    )
    quant = ckpt.config.quantization
    if quant is None:
        return report
    nibbles = f"int{quant.bits} codes are stored in 4-bit nibbles: they save nothing over int4"
    return replace(
        report,
        quantization=f"int{quant.bits}, groups of {quant.group_size}",
        bits_per_weight=bits_per_weight(quant.bits, quant.group_size),
        notes=(*report.notes, nibbles) if quant.bits < 4 else report.notes,
    )


def count_parameters(config: ModelConfig) -> int:
    """Weights of linears, norms, embedding and head (once where tied); biases are left out."""
    layers = [config.of_layer(index) for index in range(config.num_layers)]
    linears = sum(rows * cols for layer in layers for rows, cols in linear_shapes(layer).values())
    norms = config.num_layers * sum(extent for (extent,) in norm_shapes(config).values())
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) + config.hidden_size
    return linears + norms + outer


def _list_tensors(path: Path) -> InspectReport:
    report = InspectReport(str(path), "hf")
    try:
        folder = TensorFolder(path)
    except InputError as error:
        return replace(report, problem=str(error))
    lines = [
        TensorLine(
            name, str(info.dtype).removeprefix("torch."), info.shape, info.end - info.start, info.path.name
        )
        for name, info in folder.tensors.items()
    ]
    return replace(report, tensors=tuple(lines), size_bytes=sum(file.stat().st_size for file in folder.paths))


def _list_workspace(path: Path) -> InspectReport:
    weights = path / "triton_models" / "weights"
    files = sorted(p for p in weights.iterdir() if p.is_file()) if weights.is_dir() else []
    sizes = {file: file.stat().st_size for file in files}
    lines = [
        TensorLine(file.stem, "raw", (), size, file.name)
        for file, size in sizes.items()
        if not file.name.startswith("config.")
    ]
    return InspectReport(str(path), "workspace", size_bytes=sum(sizes.values()), tensors=tuple(lines))


def _inspect_gguf(path: Path) -> InspectReport:
    model = open_parts(path)
    architecture = model.fields.get("general.architecture")
    lines = [
        TensorLine(
            tensor.name,
            tensor.tensor_type.name,
            tuple(int(extent) for extent in reversed(tensor.shape)),
            int(tensor.n_bytes),
            path.name,
        )
        for tensor in model.tensors.values()
    ]
    return InspectReport(
        str(path),
        "gguf",
        family=show(str(architecture)) if architecture is not None else "unknown",
        parameters=sum(int(tensor.n_elements) for tensor in model.tensors.values()),
        size_bytes=sum(part.stat().st_size for part in model.paths),
        tensors=tuple(lines),
        notes=("quantized GGUF weights are dequantized on opening and count as a float source",),
    )


def _stated_method(path: Path) -> str:
    try:
        quant = read_object(path / "config.json").get("quantization_config")
    except InputError:
        return "unknown"
    return show(str(quant.get("quant_method"))) if isinstance(quant, dict) else "none"
