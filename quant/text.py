"""The calibration text of a run: read before the output folder is touched, or written by the model inside it."""

from pathlib import Path
from typing import Any, Protocol

import torch

from calib_data.blocks import CalibrationSet
from calib_data.generated import SOURCE, generated_rule
from calib_data.sources import TextRequest, Tokenizes, Vocabulary, finish_set, load_blocks
from convert.checkpoint import Checkpoint
from convert.files import atomic_write, safetensors_chunks, sha256_file, write_json
from convert.safetensors_files import read_header, read_tensor
from quant.frontier import read_record
from quant.generate import SelfGenerator

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
    work: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> CalibrationSet:
    """Let the model write the blocks, once a run: they are kept in its work folder and read from there on resume."""
    vocabulary = vocabulary_of(ckpt, tokenizer)
    path = work / TOKENS
    mark = read_record(path.with_suffix(".json"))
    if mark is not None and path.is_file() and mark.get("sha256") == sha256_file(path):
        tokens = read_tensor(read_header(path)["tokens"]).clone()
        return finish_set(tokens, generated_rule(vocabulary.bos), request, tokenizer, vocabulary, [])
    text = load_blocks(request, tokenizer, vocabulary, SelfGenerator(ckpt, device, dtype))
    _, digest = atomic_write(path, safetensors_chunks({"tokens": text.tokens}))
    write_json(path.with_suffix(".json"), {"source": SOURCE, "sha256": digest})
    return text
