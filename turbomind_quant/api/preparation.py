"""What `quantize`, `calibrate` and `estimate` share: choices checked against the model, and the output folder with its text.

Nothing is written before all that can be refused has been refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import fspath
from pathlib import Path

from calib_data.blocks import CalibrationSet
from calib_data.sources import TextRequest
from convert.errors import UsageError
from convert.folder.output import Layout, OutputFolder
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer
from engine.config import Dtype
from quant.config import QuantConfig
from quant.estimate import Plan, plan_calibration, plan_quantization, refuse_ragged
from quant.progress import Progress
from quant.recipe_file import find_recipe
from quant.recipes import Recipe
from quant.session import Session, fit_seqlen, open_session
from quant.state.fingerprint import run_fingerprint
from quant.text.calibration import read_text, told, write_text
from turbomind_quant.api.choices import StrPath


@dataclass(frozen=True)
class ModelChoice:
    """Which float model a caller asks for, and how it is run."""

    model: StrPath
    device: str
    dtype: Dtype
    family: str | None

    def open(self, progress: Progress, pad_to: int | None = None) -> Session:
        """The model opened, zero-padded to a multiple of `pad_to` where given. Raises what `open_session` raises."""
        return open_session(
            self.model,
            device=self.device,
            dtype=self.dtype,
            family=self.family,
            pad_to=pad_to,
            progress=progress,
        )


@dataclass(frozen=True)
class TextChoice:
    """Which calibration text a caller asks for, and how. `seqlen` None: the default, at most the model's context."""

    calib_data: StrPath | None
    text_column: str
    samples: int
    seqlen: int | None
    seed: int
    allow_fewer: bool
    trust_remote_code: bool

    def config(
        self,
        preset: StrPath | Recipe = QuantConfig.preset,
        bits: int = QuantConfig.bits,
        group_size: int = QuantConfig.group_size,
        kv_bits: int = QuantConfig.kv_bits,
        distill: bool = QuantConfig.distill,
        keep_ragged: bool = QuantConfig.keep_ragged,
        symmetric: bool = QuantConfig.symmetric,
    ) -> QuantConfig:
        """These amounts of text with the other settings of a run. Raises UsageError for a value that is none of the choices."""
        return QuantConfig(
            preset=find_recipe(preset if isinstance(preset, Recipe) else fspath(preset)),
            bits=bits,
            group_size=group_size,
            samples=self.samples,
            seqlen=QuantConfig.seqlen if self.seqlen is None else self.seqlen,
            seed=self.seed,
            kv_bits=kv_bits,
            distill=distill,
            keep_ragged=keep_ragged,
            symmetric=symmetric,
        )

    def request(self, quant: QuantConfig) -> TextRequest:
        """The text to read, with the length that fits the model."""
        source = None if self.calib_data is None else fspath(self.calib_data)
        return TextRequest(
            source, quant.samples, quant.seqlen, quant.seed, self.text_column, self.allow_fewer
        )

    def tokenizer(self, session: Session) -> Tokenizer:
        """The model's own tokenizer; its remarks join those of the checkpoint."""
        notes = session.checkpoint.notes
        found = load_tokenizer(session.checkpoint.tokenizer_dir, trust_remote_code=self.trust_remote_code)
        notes += [note for note in found.notes if note not in notes]
        return found


@dataclass(frozen=True)
class Prepared:
    """A run that was checked and has not begun. `text` None: it reads no text."""

    session: Session
    quant: QuantConfig
    text: TextChoice | None
    plan: Plan


def prepare_calibration(session: Session, text: TextChoice) -> Prepared:
    """Check a calibration. Raises UsageError for an amount out of range, or a length beyond the model's context."""
    quant = fit_seqlen(text.config(), session.config, text.seqlen is not None)
    plan = plan_calibration(
        session.config, quant, session.device, session.dtype, text.request(quant).is_generated
    )
    return Prepared(session, quant, text, plan)


def prepare_quantization(
    session: Session, quant: QuantConfig, text: TextChoice, has_statistics: bool
) -> Prepared:
    """Check a quantization. `has_statistics`: saved statistics stand in for text.

    Raises UsageError for a length beyond the model's context, InputError for linears that the group size does not fit.
    """
    quant = fit_seqlen(quant, session.config, text.seqlen is not None)
    needs_text = reads_text(quant, has_statistics)
    refuse_ragged(session.config, quant)
    plan = plan_quantization(
        session.config,
        quant,
        session.device,
        session.dtype,
        text.request(quant).is_generated and needs_text,
        needs_text,
    )
    return Prepared(session, quant, text if needs_text else None, plan)


def reads_text(quant: QuantConfig, has_statistics: bool) -> bool:
    """Whether a quantization looks at calibration text: for its search, or for the ranges of K and V."""
    return not has_statistics and (quant.needs_text or quant.kv_bits == 8)


def idle_text_options(preset: str, text: TextChoice) -> str:
    """What to say of text options given to a run that reads no text. Raises UsageError for those that name or shape a text."""
    default = QuantConfig()
    named = {
        "--calib-data": text.calib_data is not None,
        "--text-column": text.text_column != TextRequest.column,
        "--allow-fewer": text.allow_fewer,
    }
    amounts = {
        "--samples": text.samples != default.samples,
        "--seqlen": text.seqlen is not None,
        "--seed": text.seed != default.seed,
    }
    refused = [name for name, is_given in named.items() if is_given]
    if refused:
        raise UsageError(
            f"{preset} reads no calibration text, so {' and '.join(refused)} would do nothing: leave out what names a text, choose "
            "another preset, or add --kv-bits 8, which reads one."
        )
    idle = [name for name, is_given in amounts.items() if is_given]
    return f"{preset} reads no calibration text: {', '.join(idle)} without effect" if idle else ""


@contextmanager
def output_with_text(
    prepared: Prepared,
    text: TextChoice,
    command: str,
    out: Path,
    layout: Layout,
    restart: bool,
    accept_finished: bool = False,
) -> Iterator[tuple[OutputFolder, CalibrationSet | None]]:
    """The output folder of a run and its calibration text: read before the folder is taken, or written by the model inside it.

    The text is None where the folder turns out to be finished: an earlier run had done all but its last rename.
    """
    session, quant = prepared.session, prepared.quant
    tokenizer = text.tokenizer(session)
    request = text.request(quant)
    blocks, identity = read_text(session, request, tokenizer)
    fingerprint = run_fingerprint(command, session, quant, identity)
    with OutputFolder.begin(
        out, fingerprint, restart=restart, layout=layout, accept_finished=accept_finished
    ) as folder:
        if folder.finished:
            yield folder, None
            return
        if blocks is None:
            blocks = write_text(session, request, tokenizer, folder.work)
        yield folder, told(session, blocks)
