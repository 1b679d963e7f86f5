"""The calibration text of a run: read before the output folder is touched, or written by the model inside it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from calib_data.blocks import CalibrationSet
from calib_data.generated import SOURCE, generated_rule
from calib_data.sources import TextRequest, Tokenizes, Vocabulary, finish_set, load_blocks
from convert.checkpoint import Checkpoint
from convert.errors import ResourceError
from convert.folder.cache import cache_folder
from convert.folder.files import (
    json_bytes,
    make_folder,
    sha256_bytes,
)
from convert.pad import PaddedCheckpoint
from quant.session import Session
from quant.state.fingerprint import device_kind, library_versions
from quant.state.saved_tensors import load_tensors, save_tensors
from quant.text.generate import SelfGenerator

TOKENS = "tokens.safetensors"


class ModelTokenizer(Tokenizes, Protocol):
    """What a run asks of the model's tokenizer."""

    vocab_size: int
    bos_id: int | None  # the BOS that the model's own rule puts before a text; None where it puts none

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which are no ordinary text."""


def vocabulary_of(ckpt: Checkpoint, tokenizer: ModelTokenizer) -> Vocabulary:
    """The model's side of sampling: ids that are no ordinary text are neither starts nor drawn."""
    barred = set(tokenizer.special_ids) | set(ckpt.config.eos_token_ids)
    barred |= set(
        range(tokenizer.vocab_size, ckpt.config.vocab_size)
    )  # rows of the embedding that no token has
    return Vocabulary(ckpt.config.vocab_size, tuple(sorted(barred)), tokenizer.bos_id)


def read_text(
    session: Session, request: TextRequest, tokenizer: ModelTokenizer
) -> tuple[CalibrationSet | None, dict[str, Any]]:
    """The blocks (None where the model is yet to write them) and what identifies them in the fingerprint.

    Raises InputError for a text that cannot be read or is too short.
    """
    vocabulary = vocabulary_of(session.checkpoint, tokenizer)
    if request.is_generated:
        rule = generated_rule(vocabulary.bos) | {"tokenizer": tokenizer.digest()}
        return None, rule
    text = load_blocks(request, tokenizer, vocabulary)
    names = ("source", "sha256", "sampling", "tokens_sha256", "tokenizer_sha256")
    return text, {name: text.provenance[name] for name in names}


def calibration_text(session: Session, request: TextRequest, tokenizer: ModelTokenizer) -> CalibrationSet:
    """The blocks, read or written by the model; warnings about them are told."""
    text, _ = read_text(session, request, tokenizer)
    return told(session, write_text(session, request, tokenizer, None) if text is None else text)


def told(session: Session, text: CalibrationSet) -> CalibrationSet:
    """The same text, once its warnings are told."""
    for warning in text.warnings:
        session.progress.warn(warning)
    return text


def write_text(
    session: Session, request: TextRequest, tokenizer: ModelTokenizer, work: Path | None
) -> CalibrationSet:
    """Let the model write the blocks, once: they are kept in the work folder for a resumed run, and in the user's cache for the
    next run on the same model, machine and versions.
    """
    say = session.progress.say
    vocabulary = vocabulary_of(session.checkpoint, tokenizer)
    if isinstance(session.checkpoint, PaddedCheckpoint):
        session = replace(
            session, checkpoint=session.checkpoint.inner
        )  # the same function, in fewer operations
    kept = cache_folder() / "written" / f"{_cache_key(session, request, tokenizer)}.safetensors"
    for path in (kept,) if work is None else (work / TOKENS, kept):
        tokens = _read_tokens(path)
        if tokens is not None:
            if path == kept:
                say("calibration text: the model wrote it in an earlier run")
                _keep_tokens(tokens, work)
            return finish_set(tokens, generated_rule(vocabulary.bos), request, tokenizer, vocabulary, [])
    say(f"the model writes its own calibration text: {request.samples} x {request.seqlen} tokens ...")
    with session.progress.new_stage("writing text") as writing:
        writer = SelfGenerator(session.checkpoint, session.device, session.dtype, writing.step)
        text = load_blocks(request, tokenizer, vocabulary, writer)
    _keep_tokens(text.tokens, work)
    try:
        make_folder(kept.parent)
        save_tensors(kept, {"tokens": text.tokens}, source=SOURCE)
    except ResourceError as error:
        say(f"note: the text is not kept for later runs: {error}")
    return text


def _cache_key(session: Session, request: TextRequest, tokenizer: ModelTokenizer) -> str:
    """Names a text by all that it follows from."""
    facts = {
        "model": session.checkpoint.digest(),
        "tokenizer": tokenizer.digest(),
        "text": [request.samples, request.seqlen, request.seed],
        "machine": [device_kind(session.device), str(session.dtype), torch.get_num_threads()],
        "versions": library_versions(),
    }
    return sha256_bytes(json_bytes(facts))


def _keep_tokens(tokens: torch.Tensor, work: Path | None) -> None:
    if work is not None:
        save_tensors(work / TOKENS, {"tokens": tokens}, source=SOURCE)


def _read_tokens(path: Path) -> torch.Tensor | None:
    """Tokens that were kept whole, or None."""
    saved = load_tensors(path)
    return None if saved is None else saved.tensors["tokens"].clone()
