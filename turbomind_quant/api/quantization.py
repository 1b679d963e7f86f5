"""`quantize` and `calibrate`, and `estimate`, which says what either would take."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from convert.config import ModelConfig
from convert.errors import InputError, UsageError
from convert.families.table import linear_shapes, stays_float
from convert.folder.files import check_output_place
from convert.folder.output import FolderState, OutputFolder, folder_state, read_manifest
from convert.formats import CHECKPOINT_FORMATS, CheckpointFormat
from convert.gguf.metadata import architecture_of
from convert.gguf.tokenizer_fields import tokenizer_fields
from convert.pack.run import pack_checkpoint
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import check_tokenizer
from convert.verdict.artefact import Artefact
from convert.verdict.judge import judge, parse_engine
from engine.config import Dtype
from quant.config import QuantConfig
from quant.preflight import announce, notes_of
from quant.progress import Listener, Progress
from quant.recipes import Recipe
from quant.run import quantize_model
from quant.selection import is_quantized
from quant.state.fingerprint import run_fingerprint
from quant.statistics.calibrate import calibrate as write_statistics
from quant.statistics.calibrate import open_statistics
from quant.text.sources import CalibrationSource, NoText, StatisticsSource, check_statistics_use, source_of
from turbomind_quant.api.choices import StrPath, check_one
from turbomind_quant.api.preparation import (
    ModelChoice,
    Prepared,
    TextChoice,
    idle_text_options,
    output_with_text,
    prepare_calibration,
    prepare_quantization,
    reads_text,
)
from turbomind_quant.api.results import CalibrateResult, EstimateResult, QuantizeResult


def calibrate(
    model: StrPath,
    out: StrPath,
    *,
    calib_data: StrPath | None = None,
    text_column: str = "text",
    samples: int = QuantConfig.samples,
    seqlen: int | None = None,
    seed: int = QuantConfig.seed,
    allow_fewer: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    restart: bool = False,
    progress: Listener | None = None,
) -> CalibrateResult:
    """Run text through the float `model` and keep statistics of every linear's input in the folder `out`.

    Writes Gram matrices, mean and maximum magnitudes and the ranges of K and V, one file a decoder block. `quantize` calibrates by
    itself; this is for searching several times on one calibration: `quantize(model, other, preset="fast", stats=out)`.
    An unfinished `out` of the same choices is resumed.

    Args:
        model: as in `quantize`; so are the text (`calib_data` to `trust_remote_code`), `device`, `dtype`, `family` and `progress`.
        out: folder to write; absent, empty or unfinished.
        restart: discard an unfinished `out` first.

    Raises UsageError for choices that contradict each other, InputError for a model, a text or an output folder that cannot be used,
    ResourceError where memory or disk do not suffice.
    """
    text = TextChoice(calib_data, text_column, samples, seqlen, seed, allow_fewer, trust_remote_code)
    folder = Path(out)
    with Progress("calibrate", progress) as run:
        session = ModelChoice(model, device, dtype, family).open(run)
        prepared = prepare_calibration(session, text)
        announce(session, prepared.plan, folder)
        with output_with_text(prepared, text, "calibrate", folder, "root", restart) as (place, blocks):
            if blocks is not None:
                write_statistics(session, prepared.quant, blocks, place)
    facts = read_manifest(folder).data
    return CalibrateResult(folder, session.config.num_layers, facts["calibration"], tuple(facts["warnings"]))


def quantize(
    model: StrPath,
    out: StrPath,
    *,
    preset: StrPath | Recipe = QuantConfig.preset,
    bits: int = QuantConfig.bits,
    group_size: int = QuantConfig.group_size,
    stats: StrPath | None = None,
    pad: bool = False,
    keep_ragged: bool = QuantConfig.keep_ragged,
    symmetric: bool = QuantConfig.symmetric,
    engine: str | None = None,
    format: CheckpointFormat = "awq",
    kv_bits: int = QuantConfig.kv_bits,
    distill: bool = QuantConfig.distill,
    calib_data: StrPath | None = None,
    text_column: str = "text",
    samples: int = QuantConfig.samples,
    seqlen: int | None = None,
    seed: int = QuantConfig.seed,
    allow_fewer: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    restart: bool = False,
    progress: Listener | None = None,
) -> QuantizeResult:
    """Quantize the float `model` to an AWQ checkpoint in the folder `out`, which LMDeploy, vLLM and transformers load as it is.

    Works decoder block by decoder block, so that a model larger than memory goes through. Stopped anywhere, the same call goes on
    and ends in the same bytes.

    Args:
        model: folder of safetensors, .gguf file, or name on the hub ("owner/model", fetched only when named).
        out: folder to write; absent, empty or unfinished.
        preset: how hard to search, as `quantize awq --help` lists them; a YAML file or manifest with a recipe; or a `Recipe`.
        bits: of a code: 4 to serve, 3 and 2 to evaluate. group_size: weights along K that share a scale: 32, 64 or 128.
        stats: folder of `calibrate`, in place of text (preset "fast" alone).
        pad: zero-pad the model exactly, so that the group fits every linear. keep_ragged: leave those that it does not fit in float16.
        symmetric: every zero point is 8, for formats and engines that know no other (GPTQ in most, Q4_0); costs some quality.
        format: "awq", or another that `pack` writes: the AWQ checkpoint is then made in the folder OUT-awq beside, and packed into `out`.
        engine: one that must load the result ("vllm", "lmdeploy:0.7.3", ...; see `inspect`): checked before the work begins.
        kv_bits: 8 also writes parameters for an int8 KV cache. distill: an end-to-end pass at the end, for models that fit whole.
        calib_data: txt, jsonl or parquet file, folder, "wikitext2", "c4", "pileval" or a hub dataset; None: the model writes its own.
        text_column: of jsonl, parquet and hub datasets. allow_fewer: go on where the text holds fewer samples than asked for.
        samples, seqlen: samples of text and tokens of each; `seqlen` None: 2048, or the model's context where that is shorter.
        seed: same seed, same bytes. trust_remote_code: run a tokenizer that exists only as code in `model`.
        device: "auto", "cpu", "cuda" or "cuda:N". dtype: of the forward passes: "auto", "float16", "bfloat16" or "float32".
        family: read the model as this family, whatever its config.json says.
        restart: discard an unfinished `out` first. progress: called with every ProgressEvent; None: silent.

    Raises UsageError for choices that contradict each other, InputError for a model, a text or an output folder that cannot be used,
    ResourceError where memory or disk do not suffice.
    """
    text = TextChoice(calib_data, text_column, samples, seqlen, seed, allow_fewer, trust_remote_code)
    quant = text.config(preset, bits, group_size, kv_bits, distill, keep_ragged, symmetric)
    folder = Path(out)
    with Progress(f"awq {quant.recipe.name}", progress) as run:
        prepared = _checked(
            ModelChoice(model, device, dtype, family), quant, text, stats, pad, run, engine, format
        )
        announce(prepared.session, prepared.plan, folder)
        if format == "awq":
            return _quantized(prepared, folder, stats, restart)
        return _quantized_and_packed(prepared, folder, stats, restart, format, run)


def _quantized(
    prepared: Prepared, out: Path, stats: StrPath | None, restart: bool, accept_finished: bool = False
) -> QuantizeResult:
    """Do the work, or what an earlier run left of it."""
    session = prepared.session
    with _source(prepared, out, stats, restart, accept_finished) as (place, source):
        if place.finished:
            return quantize_result(out, 0.0, session.config.num_layers)
        done = quantize_model(prepared.session, prepared.quant, source, place)
    return quantize_result(out, done.seconds, done.first_layer)


def _quantized_and_packed(
    prepared: Prepared,
    out: Path,
    stats: StrPath | None,
    restart: bool,
    format: CheckpointFormat,
    run: Progress,
) -> QuantizeResult:
    """The AWQ checkpoint in the folder OUT-awq, made or as an equal run left it, then packed into `out`. Both resume."""
    if (state := folder_state(out)) in (FolderState.FINISHED, FolderState.FOREIGN):
        raise InputError(
            f"the output folder {out} is {state.value} already; nothing was touched. Choose another one."
        )
    first = out.with_name(f"{out.name}-awq")
    result = _quantized(prepared, first, stats, restart, accept_finished=True)
    run.say(f"{first}: the AWQ checkpoint; it is packed as {format} into {out}")
    packed = pack_checkpoint(open_checkpoint(first), out, format, restart=restart, progress=run.step)
    return replace(result, path=out, size_bytes=packed.weight_bytes)


def estimate(
    model: StrPath,
    out: StrPath | None = None,
    *,
    command: Literal["awq", "calibrate"] = "awq",
    preset: StrPath | Recipe = QuantConfig.preset,
    bits: int = QuantConfig.bits,
    group_size: int = QuantConfig.group_size,
    stats: StrPath | None = None,
    pad: bool = False,
    keep_ragged: bool = QuantConfig.keep_ragged,
    symmetric: bool = QuantConfig.symmetric,
    engine: str | None = None,
    format: CheckpointFormat = "awq",
    kv_bits: int = QuantConfig.kv_bits,
    distill: bool = QuantConfig.distill,
    calib_data: StrPath | None = None,
    text_column: str = "text",
    samples: int = QuantConfig.samples,
    seqlen: int | None = None,
    seed: int = QuantConfig.seed,
    allow_fewer: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> EstimateResult:
    """What `quantize` (or `calibrate`) with these arguments would take: memory, disk, sizes. Writes nothing.

    Args:
        out: the folder that would be written; its state is part of the answer.
        command: "awq" for `quantize`, "calibrate" for `calibrate`, which takes no settings of a search.
        The rest as in `quantize`.

    Raises what that call would raise before its work begins, but for a lack of memory or disk.
    """
    text = TextChoice(calib_data, text_column, samples, seqlen, seed, allow_fewer, trust_remote_code)
    check_one(command, "command", ("awq", "calibrate"))
    quant = text.config(preset, bits, group_size, kv_bits, distill, keep_ragged, symmetric)
    if command == "calibrate" and (stats is not None or pad or quant != text.config()):
        raise UsageError(
            "calibrate only reads text: leave out the settings of a search, or ask for command='awq'."
        )
    choice = ModelChoice(model, device, dtype, family)
    with Progress(command, progress) as run:
        if command == "calibrate":
            prepared = prepare_calibration(choice.open(run), text)
        else:
            prepared = _checked(choice, quant, text, stats, pad, run, engine, format)
        for note in notes_of(prepared.session):
            run.say(note)
    if out is None:
        return EstimateResult(prepared.plan)
    check_output_place(Path(out), prepared.session.checkpoint.path)
    return EstimateResult(prepared.plan, Path(out), folder_state(Path(out)).value)


def _checked(
    model: ModelChoice,
    quant: QuantConfig,
    text: TextChoice,
    stats: StrPath | None,
    pad: bool,
    run: Progress,
    engine: str | None,
    format: CheckpointFormat,
) -> Prepared:
    """The model opened, and every choice checked against it and against the others."""
    named = None if engine is None else parse_engine(engine)
    check_one(format, "--format", CHECKPOINT_FORMATS)
    if quant.bits < 4 and format not in ("awq", "float16"):
        raise UsageError(f"--bits {quant.bits} and --format {format}: it is written from 4-bit codes alone.")
    if stats is not None:
        _check_statistics(quant, text, pad)
    if pad and quant.keep_ragged:
        raise UsageError(
            "--pad makes the group fit every linear and --keep-ragged leaves in float16 those that it does not fit: give one of them."
        )
    has_text = reads_text(quant, stats is not None)
    idle = "" if has_text or stats is not None else idle_text_options(quant.recipe.name, text)
    session = model.open(run, pad_to=quant.group_size if pad else None)
    if named is not None:
        _check_engine(session.config, quant, *named, run, format)
    if format == "gguf":  # what llama.cpp has no form for shows before the work
        architecture_of(session.config)
        tokenizer_fields(
            session.checkpoint.tokenizer_dir, session.config.vocab_size, session.config.max_position
        )
    if not has_text:  # else it is loaded for the text
        check_tokenizer(session.checkpoint.tokenizer_dir)
    if idle:
        run.say(f"note: {idle}")
    return prepare_quantization(session, quant, text, stats is not None)


def _check_engine(
    config: ModelConfig,
    quant: QuantConfig,
    engine: str,
    version: str,
    run: Progress,
    format: CheckpointFormat,
) -> None:
    """Raises InputError where the engine would not load the result; says what stands against it otherwise."""
    floats = {
        f"{index}.{role}"
        for index in range(config.num_layers)
        for role in linear_shapes(config.of_layer(index))
        if not stays_float(role) and not is_quantized(config, quant, index, role)
    }
    planned = (
        Artefact(
            format,
            config,
            quant.group_size,
            quant.bits,
            quant.symmetric,
            frozenset(floats),
            quant.kv_bits == 8,
        )
        if format != "float16"
        else Artefact("float", config)
    )
    verdict = judge(planned, engine, version)
    failed = [finding for finding in verdict.findings if finding.outcome == "fails"]
    if failed:
        told = "; ".join(f"{finding.reason} ({finding.remedy})" for finding in failed)
        raise InputError(f"{engine} {version} would not load this {format} checkpoint: {told}.")
    for text in (*(f"{f.reason} ({f.remedy})" for f in verdict.findings), *verdict.notes):
        run.say(f"note: {engine} {version}: {text}")


def _check_statistics(quant: QuantConfig, text: TextChoice, pad: bool) -> None:
    """Raises UsageError where saved statistics do not go with the other choices."""
    check_statistics_use(quant)
    if text.calib_data is not None:
        raise UsageError("--stats and --calib-data name two calibrations: give one of them.")
    if pad:
        raise UsageError(
            "--stats are those of the unpadded model: leave --pad out, or let `quantize awq` calibrate."
        )


@contextmanager
def _source(
    prepared: Prepared, out: Path, stats: StrPath | None, restart: bool, accept_finished: bool
) -> Iterator[tuple[OutputFolder, CalibrationSource]]:
    """The output folder and what the search looks at: text, saved statistics, or nothing."""
    session = prepared.session
    if prepared.text is not None:
        with output_with_text(prepared, prepared.text, "awq", out, "tmq", restart, accept_finished) as found:
            yield found[0], source_of(found[1])
        return
    statistics = None if stats is None else open_statistics(Path(stats), session.checkpoint)
    identity = None if statistics is None else {"statistics": statistics.digest}
    fingerprint = run_fingerprint("awq", session, prepared.quant, identity)
    with OutputFolder.begin(out, fingerprint, restart=restart, accept_finished=accept_finished) as folder:
        yield folder, NoText() if statistics is None else StatisticsSource(statistics)


def quantize_result(folder: Path, seconds: float, first_layer: int) -> QuantizeResult:
    """What the manifest of a finished AWQ checkpoint says, and how long this process worked on it."""
    facts = read_manifest(folder).data
    factors = facts["key_factors"]
    return QuantizeResult(
        path=folder,
        preset=facts["config"]["preset"],
        bits=facts["bits"],
        group_size=facts["group_size"],
        bits_per_weight=facts["bits_per_weight"],
        size_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        seconds=seconds,
        first_layer=first_layer,
        layers=tuple(facts["layers"]),
        warnings=tuple(facts["warnings"]),
        standing_out=tuple(facts["standing_out"]),
        key_factors=None if factors is None else tuple((low, high) for low, high in factors),
    )
