"""`quantize inspect`: family, tensors, bits and sizes of any checkpoint or workspace, also of ones that cannot be opened."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.config import ModelConfig
from convert.errors import InputError
from convert.families.table import linear_shapes, norm_shapes
from convert.folder.json_files import read_object, show
from convert.folder.state import refuse_statistics
from convert.gguf.file import open_gguf
from convert.hf.tensor_folder import TensorFolder
from convert.readers import open_checkpoint
from kernels.int4 import bits_per_weight


@dataclass(frozen=True)
class TensorLine:
    """One tensor, or one header-less file of a workspace (dtype "raw", no shape)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str


@dataclass
class InspectReport:
    """What there is. `parameters` counts weights of the unpacked model; `problem` says why it cannot be opened, if so."""

    path: str
    kind: str
    family: str = "unknown"
    quantization: str = "none"
    bits_per_weight: float | None = None
    parameters: int | None = None
    size_bytes: int = 0
    config: dict[str, Any] | None = None
    tensors: list[TensorLine] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_path(path: Path, family: str | None = None) -> InspectReport:
    """List a checkpoint. Raises InputError where there is nothing to list, or statistics of `quantize calibrate`."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _inspect_gguf(path)
    if not path.is_dir():
        found = "is neither a model folder nor a .gguf file" if path.exists() else "does not exist"
        raise InputError(f"{show(str(path))} {found}: expected a checkpoint, a .gguf file or a workspace.")
    refuse_statistics(path)
    workspace = (path / "triton_models").is_dir()
    report = InspectReport(str(path), "workspace" if workspace else "hf")
    if workspace:
        _list_workspace(path, report)
    else:
        _list_tensors(path, report)
    try:
        ckpt = open_checkpoint(path, family=family)
    except InputError as error:
        report.problem = str(error)
        if not report.tensors:
            raise
        report.quantization = _stated_method(path)
        return report
    report.kind, report.family, report.notes = ckpt.kind, ckpt.config.family, list(ckpt.notes)
    report.config, report.parameters = asdict(ckpt.config), count_parameters(ckpt.config)
    quant = ckpt.config.quantization
    if quant is not None:
        report.quantization = f"int{quant.bits}, groups of {quant.group_size}"
        report.bits_per_weight = bits_per_weight(quant.bits, quant.group_size)
        if quant.bits < 4:
            report.notes.append(
                f"int{quant.bits} codes are stored in 4-bit nibbles: they save nothing over int4"
            )
    return report


def count_parameters(config: ModelConfig) -> int:
    """Weights of linears, norms, embedding and head (once where tied); biases are left out."""
    block = sum(rows * cols for rows, cols in linear_shapes(config).values())
    block += sum(extent for (extent,) in norm_shapes(config).values())
    outer = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2) + config.hidden_size
    return config.num_layers * block + outer


def _list_tensors(path: Path, report: InspectReport) -> None:
    try:
        folder = TensorFolder(path)
    except InputError as error:
        report.problem = str(error)
        return
    for name, info in folder.tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        report.tensors.append(TensorLine(name, dtype, info.shape, info.end - info.start, info.path.name))
    report.size_bytes = sum(file.stat().st_size for file in folder.paths)


def _list_workspace(path: Path, report: InspectReport) -> None:
    weights = path / "triton_models" / "weights"
    for file in sorted(p for p in weights.iterdir() if p.is_file()) if weights.is_dir() else []:
        size = file.stat().st_size
        report.size_bytes += size
        if not file.name.startswith("config."):
            report.tensors.append(TensorLine(file.stem, "raw", (), size, file.name))


def _inspect_gguf(path: Path) -> InspectReport:
    reader = open_gguf(path)
    report = InspectReport(str(path), "gguf", size_bytes=path.stat().st_size)
    architecture = reader.fields.get("general.architecture")
    report.family = str(architecture.contents()) if architecture is not None else "unknown"
    for tensor in reader.tensors:
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        report.tensors.append(
            TensorLine(tensor.name, tensor.tensor_type.name, shape, int(tensor.n_bytes), path.name)
        )
    report.parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    report.notes.append("quantized GGUF weights are dequantized on opening and count as a float source")
    return report


def _stated_method(path: Path) -> str:
    try:
        quant = read_object(path / "config.json").get("quantization_config")
    except InputError:
        return "unknown"
    return show(str(quant.get("quant_method"))) if isinstance(quant, dict) else "none"
