"""`quantize verify`: is what lies on disk whole, in range, and made from the source it claims?

N out features, K in features. Reads one block at a time. A quantized linear is compared with its source up to one factor for
each row and column, because AWQ moves factors between neighbouring operations: rounding leaves a small rest, codes in a wrong
order or of other weights leave nearly everything.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.errors import InputError
from convert.json_files import show
from convert.manifest import FolderState, folder_state, read_manifest
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from convert.safetensors_files import check_finite
from kernels.int4 import Quantized

SAMPLE_ROWS = 256  # of each linear that are compared with the source
REST_LIMIT = (
    0.8  # relative; int4 rounding leaves about 0.1, int2 about 0.5, another order of the same codes about 1
)
EXACT_LIMIT = 1e-3  # for tensors that are only converted to float16
SAME_LIMIT = 1e-2  # relative, for linears in the source's own form: codes are equal, floats at most rounded to bfloat16


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str


@dataclass
class VerifyReport:
    """All checks of one path. `rests`: relative rest of each compared linear, "block.role" -> number."""

    path: str
    kind: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rests: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_path(
    path: Path,
    source: Path | None = None,
    *,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a checkpoint or workspace: manifest, digests, shapes, ranges, finiteness; with `source`, the weights too.

    Every fault becomes a failed check. Raises InputError only where `path` is no model at all, or `source` cannot be opened.
    """
    report = VerifyReport(str(path), "unknown")
    if path.is_dir():
        _check_manifest(path, report)
    try:
        ckpt = open_checkpoint(path, cache_dir=cache_dir)
    except InputError as error:
        if not path.exists():
            raise
        report.checks.append(Check("open", False, str(error)))
        return report
    report.kind, report.notes = ckpt.kind, list(ckpt.notes)
    report.checks.append(
        Check("open", True, f"{ckpt.config.family}, {ckpt.config.num_layers} blocks; every tensor is there")
    )
    origin = None if source is None else _like(open_checkpoint(source, cache_dir=cache_dir), ckpt)
    _check_blocks(ckpt, origin, report, progress)
    return report


def _check_manifest(folder: Path, report: VerifyReport) -> None:
    try:
        state = folder_state(folder)
        if state is FolderState.FINISHED:
            manifest = read_manifest(folder)
            manifest.check_digests(folder)
            report.checks.append(
                Check("digests", True, f"{len(manifest.files)} files are as the manifest lists them")
            )
        elif state is FolderState.UNFINISHED:
            report.checks.append(Check("digests", False, "the folder has no manifest: it is unfinished"))
        else:
            report.notes.append("no manifest: written by another program, so digests could not be checked")
    except InputError as error:
        report.checks.append(Check("digests", False, str(error)))


def _like(source: Checkpoint, ckpt: Checkpoint) -> Checkpoint:
    """The source, padded where the checkpoint is. Raises InputError when they cannot belong together."""
    ours = ckpt.config
    if source.config.hidden_size != ours.hidden_size or source.config.num_heads != ours.num_heads:
        for multiple in (32, 64, 128, 256):
            padded = pad_checkpoint(source, multiple)
            if padded.config.hidden_size == ours.hidden_size and padded.config.num_heads == ours.num_heads:
                source = padded
                break
    theirs = source.config
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{show(str(source.path))} is not the source of {show(str(ckpt.path))}: {name} is {getattr(theirs, name)} there and "
                f"{getattr(ours, name)} here. Name the model that it was made from."
            )
    return source


def _check_blocks(
    ckpt: Checkpoint,
    origin: Checkpoint | None,
    report: VerifyReport,
    progress: Callable[[int, int], None] | None,
) -> None:
    unlike: list[str] = []
    try:
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            _check_ranges(block)
            if origin is not None:
                report.rests |= _compare_block(block, origin.block(index), ckpt, origin, unlike)
            if progress is not None:
                progress(index + 1, ckpt.config.num_layers)
        outer = {"embedding": ckpt.embedding(), "final_norm": ckpt.final_norm(), "lm_head": ckpt.lm_head()}
    except InputError as error:
        report.checks.append(Check("ranges", False, str(error)))
        return
    report.checks.append(Check("ranges", True, "all values are finite; codes, zeros and scales are in range"))
    if origin is None:
        return
    worst = max(report.rests, key=lambda name: report.rests[name])
    report.checks.append(
        Check(
            "weights",
            not unlike,
            f"{len(unlike)} weights are not the source's, the first is {unlike[0]}"
            if unlike
            else f"{len(report.rests)} linears agree with the source; the largest relative rest is {report.rests[worst]:.3f} ({worst})",
        )
    )
    distances = {"embedding": _distance(outer["embedding"], origin.embedding())}
    if not ckpt.config.tie_embeddings:
        distances["lm_head"] = _distance(outer["lm_head"], origin.lm_head())
    other = [name for name, distance in distances.items() if distance > EXACT_LIMIT]
    report.checks.append(
        Check(
            "embedding",
            not other,
            f"{', '.join(other)} differ from the source" if other else "embedding and head are the source's",
        )
    )


def _check_ranges(block: BlockWeights) -> None:
    for role, linear in block.linears.items():
        name = f"block {block.index}, {role}"
        weight = linear.weight
        if isinstance(weight, Quantized):
            top = 2**weight.bits - 1
            if int(weight.codes.max()) > top or int(weight.zeros.max()) > top:
                raise InputError(
                    f"{name}: codes or zeros lie above {top}, the largest of {weight.bits} bits."
                )
            check_finite(name + " scales", weight.scales)
            if float(weight.scales.min()) <= 0:
                raise InputError(f"{name}: {int((weight.scales <= 0).sum())} scales are not above 0.")
        else:
            check_finite(name, weight)


def _compare_block(
    block: BlockWeights, source: BlockWeights, ckpt: Checkpoint, origin: Checkpoint, unlike: list[str]
) -> dict[str, float]:
    """ "block.role" -> rest; names of weights that are not the source's are added to `unlike`.

    A workspace holds what its source held, moved about: where both are int4 or both are float, nothing is refitted, and
    norms and biases count too.
    """
    is_same_form = (ckpt.config.quantization is None) == (origin.config.quantization is None)
    is_moved = is_same_form and ckpt.kind.startswith("workspace")
    rests = {}
    for role, linear in block.linears.items():
        name = f"{block.index}.{role}"
        found, wanted = _sampled(linear.weight), _sampled(source.linears[role].weight)
        rests[name] = _plain_rest(found, wanted) if is_moved else relative_rest(found, wanted)
        if not rests[name] <= (SAME_LIMIT if is_moved else REST_LIMIT):
            unlike.append(name)
        bias = source.linears[role].bias
        if (
            is_moved
            and bias is not None
            and (linear.bias is None or _plain_rest(linear.bias, bias) > SAME_LIMIT)
        ):
            unlike.append(name + " bias")
    if is_moved:
        norms = [
            role for role, norm in block.norms.items() if _plain_rest(norm, source.norms[role]) > SAME_LIMIT
        ]
        unlike += [f"{block.index}.{role}" for role in norms]
    return rests


def _plain_rest(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-30))


def _sampled(weight: Tensor | Quantized) -> Tensor:
    """Evenly spaced rows, (at most SAMPLE_ROWS, K) float32."""
    rows = torch.linspace(0, weight.shape[0] - 1, min(SAMPLE_ROWS, weight.shape[0])).long()
    if isinstance(weight, Quantized):
        part = Quantized(
            weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.group_size, weight.bits
        )
        return part.dequantize()
    return weight[rows].float()


def relative_rest(found: Tensor, source: Tensor) -> float:
    """min over row factors r and column factors c of ||found - r source c|| / ||found||, by alternating least squares."""
    norm = found.norm()
    if float(norm) == 0.0:
        return 0.0 if float(source.norm()) == 0.0 else 1.0
    rows, cols = torch.ones(found.shape[0], 1), torch.ones(1, found.shape[1])
    for _ in range(4):
        base = source * rows
        cols = (found * base).sum(0, keepdim=True) / base.square().sum(0, keepdim=True).clamp(min=1e-30)
        base = source * cols
        rows = (found * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True).clamp(min=1e-30)
    return float((found - source * rows * cols).norm() / norm)


def _distance(found: Tensor, source: Tensor) -> float:
    """Largest difference relative to the largest source value, by slices of rows."""
    if found.shape != source.shape:
        return float("inf")
    peak = max(float(source.abs().max()), 1e-30)
    pairs = zip(found.split(4096), source.split(4096), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs) / peak
