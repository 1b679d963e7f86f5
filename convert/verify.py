"""`quantize verify`: is what lies on disk whole, in range, and made from the source it claims?

Reads one block at a time. What is wrong with the source is said of the source: the other checks are of the path alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from convert.checkpoint import BlockWeights, Checkpoint
from convert.errors import InputError
from convert.folder.contents import check_report, unlisted_files
from convert.folder.json_files import show
from convert.folder.output import FolderState, Manifest, folder_state, read_manifest
from convert.hf.safetensors_files import check_finite, read_header, read_tensor
from convert.likeness import compare_block, distance
from convert.pad import pad_checkpoint
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import check_tokenizer
from kernels.int4 import Quantized

RANGES = (".min", ".max", ".channel_min", ".channel_max")  # of K and V, in statistics
EXACT_LIMIT = 1e-3  # for tensors that are only converted to float16


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one path. `rests`: relative rest of each compared linear, "block.role" -> number.

    `verified`: the path says what its bytes should be, so passing means that they are. Without a manifest of ours nothing says it.
    """

    path: str
    kind: str
    verified: bool = False
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()
    rests: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


@dataclass
class _Findings:
    """What was found so far."""

    path: str
    kind: str = "unknown"
    verified: bool = False
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rests: dict[str, float] = field(default_factory=dict)


def verify_path(
    path: Path,
    source: Path | None = None,
    *,
    family: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a checkpoint, workspace or folder of statistics: manifest, digests, shapes, ranges, finiteness; with `source`, the weights too.

    Args:
        family: decides how `path` is read, in place of its config.json.
        strict: files that the manifest does not list are refused even where they are mere documents (README.md, pictures).

    Every fault becomes a failed check. Raises InputError only where `path` is no model at all, or `source` cannot be opened.
    """
    found = _Findings(str(path))
    manifest = _check_manifest(path, found, strict) if path.is_dir() else None
    _verify(path, source, manifest, found, family, progress)
    return VerifyReport(
        found.path, found.kind, found.verified, tuple(found.checks), tuple(found.notes), found.rests
    )


def _verify(
    path: Path,
    source: Path | None,
    manifest: Manifest | None,
    report: _Findings,
    family: str | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    if manifest is not None and manifest.kind == "statistics":
        report.kind = "statistics"
        _check_statistics(path, manifest, report, progress)
        if source is not None:
            _check_made_from(manifest, open_checkpoint(source), report)
        return
    try:
        ckpt = open_checkpoint(path, family=family)
    except InputError as error:
        if not path.exists():
            raise
        report.checks.append(Check("open", False, str(error)))
        return
    report.kind = ckpt.kind
    report.notes += [note for note in ckpt.notes if note not in report.notes]
    report.checks.append(
        Check("open", True, f"{ckpt.config.family}, {ckpt.config.num_layers} blocks; every tensor is there")
    )
    _check_tokenizer(ckpt.tokenizer_dir, report)
    origin = None if source is None else _like(open_checkpoint(source), ckpt)
    _check_blocks(ckpt, origin, report, progress)


def _check_manifest(folder: Path, report: _Findings, strict: bool) -> Manifest | None:
    """The manifest, where there is one that can be read."""
    manifest = None
    try:
        state = folder_state(folder)
        if state is FolderState.FINISHED:
            report.verified = True
            manifest = read_manifest(folder)
            manifest.check_digests(folder)
            check_report(folder, manifest)
            report.checks.append(
                Check("digests", True, f"{len(manifest.files)} files are as the manifest lists them")
            )
            _check_unlisted(folder, manifest, report, strict)
        elif state is FolderState.UNFINISHED:
            report.checks.append(Check("digests", False, "the folder has no manifest: it is unfinished"))
        else:
            report.notes.append("no manifest: written by another program, so digests could not be checked")
    except InputError as error:
        report.checks.append(Check("digests", False, str(error)))
    return manifest


def _check_unlisted(folder: Path, manifest: Manifest, report: _Findings, strict: bool) -> None:
    used, documents = unlisted_files(folder, manifest)
    if strict:
        used, documents = sorted(used + documents), []
    if documents:
        report.notes.append(f"not in the manifest: {', '.join(show(name) for name in documents[:8])}")
    if used:
        names = ", ".join(show(name) for name in used[:5])
        report.checks.append(
            Check(
                "files",
                False,
                f"{len(used)} files are not in the manifest: {names}. Loaders could read them; remove what does not belong here.",
            )
        )


def _check_statistics(
    folder: Path, manifest: Manifest, report: _Findings, progress: Callable[[int, int], None] | None
) -> None:
    """What `quantize calibrate` wrote: every file opens, and its sums and maxima are finite."""
    names = sorted(name for name in manifest.files if name.endswith(".safetensors"))
    try:
        for done, name in enumerate(names, 1):
            for info in read_header(folder / name).values():
                # channels that no finite value reached keep an empty range, from +inf to -inf
                if not info.name.endswith(RANGES):
                    check_finite(f"{name}: {info.name}", read_tensor(info))
            if progress is not None:
                progress(done, len(names))
    except InputError as error:
        report.checks.append(Check("statistics", False, str(error)))
        return
    report.checks.append(
        Check("statistics", True, f"calibration statistics of {len(names)} blocks; all sums are finite")
    )


def _check_made_from(manifest: Manifest, source: Checkpoint, report: _Findings) -> None:
    facts = manifest.data.get("source")
    is_same = isinstance(facts, dict) and facts.get("digest") == source.digest()
    told = "are" if is_same else "are not"
    report.checks.append(
        Check("source", is_same, f"the weights of {show(str(source.path))} {told} those that were calibrated")
    )


def _check_tokenizer(folder: Path, report: _Findings) -> None:
    try:
        count = check_tokenizer(folder)
    except InputError as error:
        report.checks.append(Check("tokenizer", False, str(error)))
        return
    if count is None:
        report.notes.append("no tokenizer file beside the weights: there is none to check")
    else:
        report.checks.append(Check("tokenizer", True, f"it loads, with {count:,} ids"))


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
    report: _Findings,
    progress: Callable[[int, int], None] | None,
) -> None:
    unlike: list[str] = []
    fault = ""  # of the source: from there on nothing is compared any more
    try:
        for index in range(ckpt.config.num_layers):
            block = ckpt.block(index)
            _check_ranges(block)
            if origin is not None and not fault:
                try:
                    source = origin.block(index)
                except InputError as error:
                    fault = str(error)
                else:
                    report.rests |= compare_block(block, source, ckpt, origin, unlike)
            if progress is not None:
                progress(index + 1, ckpt.config.num_layers)
        outer = {"embedding": ckpt.embedding(), "final_norm": ckpt.final_norm(), "lm_head": ckpt.lm_head()}
    except InputError as error:
        report.checks.append(Check("ranges", False, str(error)))
        return
    report.checks.append(Check("ranges", True, "all values are finite; codes, zeros and scales are in range"))
    if origin is None:
        return
    if not fault:
        _report_weights(report, unlike)
        try:
            _check_outer(outer, origin, ckpt.config.tie_embeddings, report)
        except InputError as error:
            fault = str(error)
    if fault:
        report.checks.append(
            Check(
                "source",
                False,
                f"not {show(report.path)} but its source {show(str(origin.path))} is damaged, so they could not be compared: {fault}",
            )
        )


def _report_weights(report: _Findings, unlike: list[str]) -> None:
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


def _check_outer(outer: dict[str, Tensor], origin: Checkpoint, is_tied: bool, report: _Findings) -> None:
    distances = {"embedding": distance(outer["embedding"], origin.embedding())}
    if not is_tied:
        distances["lm_head"] = distance(outer["lm_head"], origin.lm_head())
    other = [name for name, far in distances.items() if far > EXACT_LIMIT]
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
