"""The calibration text of a run: read before the output folder is touched, or written by the model inside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from calib_data.blocks import CalibrationSet
from calib_data.generated import SOURCE, generated_rule
from calib_data.sources import TextRequest, Tokenizes, Vocabulary, finish_set, load_blocks
from convert.checkpoint import Checkpoint
from convert.errors import ResourceError
from convert.folder.files import (
    json_bytes,
    make_folder,
    sha256_bytes,
)
from convert.pad import PaddedCheckpoint
from quant.state.fingerprint import device_kind, library_versions
from quant.state.saved_tensors import load_tensors, save_tensors
from quant.text.generate import SelfGenerator

TOKENS = "tokens.safetensors"


class ModelTokenizer(Tokenizes, Protocol):
    """What a run asks of the model's tokenizer."""

    vocab_size: int
    bos_id: int | None  # the BOS that the model's own rule puts before a text; None where it puts none

    @property
    def special_ids(self) -> frozenset[int]: ...


def vocabulary_of(ckpt: Checkpoint, tokenizer: ModelTokenizer) -> Vocabulary:
    """The model's side of sampling: ids that are no ordinary text are neither starts nor drawn."""
    barred = set(tokenizer.special_ids) | set(ckpt.config.eos_token_ids)
    barred |= set(
        range(tokenizer.vocab_size, ckpt.config.vocab_size)
    )  # rows of the embedding that no token has
    return Vocabulary(ckpt.config.vocab_size, tuple(sorted(barred)), tokenizer.bos_id)


def read_text(
    request: TextRequest, ckpt: Checkpoint, tokenizer: ModelTokenizer
) -> tuple[CalibrationSet | None, dict[str, Any]]:
    """The blocks (None where the model is yet to write them) and what identifies them in the fingerprint."""
    vocabulary = vocabulary_of(ckpt, tokenizer)
    if request.is_generated:
        rule = generated_rule(vocabulary.bos) | {"tokenizer": tokenizer.digest()}
        return None, rule
    text = load_blocks(request, tokenizer, vocabulary)
    names = ("source", "sha256", "sampling", "tokens_sha256", "tokenizer_sha256")
    return text, {name: text.provenance[name] for name in names}


def write_text(
    request: TextRequest,
    ckpt: Checkpoint,
    tokenizer: ModelTokenizer,
    device: torch.device,
    dtype: torch.dtype,
    work: Path | None,
    cache: Path,
    say: Callable[[str], None],
    on_step: Callable[[int, int], None],
) -> CalibrationSet:
    """Let the model write the blocks, once: they are kept in the work folder for a resumed run, and in the user's cache for the
    next run on the same model, machine and versions.
    """
    vocabulary = vocabulary_of(ckpt, tokenizer)
    rule = generated_rule(vocabulary.bos)
    if isinstance(ckpt, PaddedCheckpoint):
        ckpt = ckpt.inner  # the same function, in fewer operations
    kept = cache / "written" / f"{_cache_key(request, ckpt, tokenizer, device, dtype)}.safetensors"
    for path in (kept,) if work is None else (work / TOKENS, kept):
        tokens = _read_tokens(path)
        if tokens is not None:
            if path == kept:
                say("calibration text: the model wrote it in an earlier run")
                _keep_tokens(tokens, work)
            return finish_set(tokens, rule, request, tokenizer, vocabulary, [])
    say(f"the model writes its own calibration text: {request.samples} x {request.seqlen} tokens ...")
    text = load_blocks(request, tokenizer, vocabulary, SelfGenerator(ckpt, device, dtype, on_step))
    _keep_tokens(text.tokens, work)
    try:
        make_folder(kept.parent)
        save_tensors(kept, {"tokens": text.tokens}, source=SOURCE)
    except ResourceError as error:
        say(f"note: the text is not kept for later runs: {error}")
    return text


def _cache_key(
    request: TextRequest,
    ckpt: Checkpoint,
    tokenizer: ModelTokenizer,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Names a text by all that it follows from."""
    facts = {
        "model": ckpt.digest(),
        "tokenizer": tokenizer.digest(),
        "text": [request.samples, request.seqlen, request.seed],
        "machine": [device_kind(device), str(dtype), torch.get_num_threads()],
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
