"""Texts to judge models by, and perplexity of several checkpoints on one of them: what `evaluate ppl` and the table share.

W windows of L tokens.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calib_data.hub import open_dataset
from calib_data.readers import read_corpus
from convert.checkpoint import Checkpoint
from convert.errors import InputError, UsageError
from engine.measure.perplexity import (
    EvalTokens,
    PairedDifference,
    PerplexityResult,
    Reference,
    Tokenizer,
    Watch,
    paired_difference,
    perplexity_and_reference,
    tokenize,
)
from engine.model.forward import Model
from engine.model.kv_simulation import KVSimulation, read_kv_params

BUILTIN = "builtin"
DATASETS = (BUILTIN, "wikitext2")
TEXTS = Path(__file__).resolve().parents[2] / "calib_data" / "texts"
SEQLEN = 2048


@dataclass(frozen=True)
class EvalText:
    """A text to judge by: its name, its characters, sha256 of its UTF-8 bytes."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """sha256 of the UTF-8 bytes, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_eval_text(dataset: str | None, file: str | None) -> EvalText:
    """The text of `--text FILE` as it stands, or of `--dataset`; the built-in sample where neither is given.

    Both together: wikitext2, its rows rebuilt from the raw file (wiki.test.raw) instead of fetched.
    """
    if dataset == "wikitext2" and file is not None:
        corpus = read_corpus(Path(file))
        return EvalText("wikitext2", join_rows(str(corpus.documents[0])))
    if dataset is not None and file is not None:
        raise UsageError("--dataset and --text name two texts: give one of them.")
    if file is not None:
        path = Path(file)
        corpus = read_corpus(path)
        parts = [document for document in corpus.documents if isinstance(document, str)]
        if len(parts) < len(corpus.documents):
            raise InputError(f"{file} holds chats: perplexity is measured on plain text.")
        return EvalText(path.name, "\n\n".join(parts))
    if dataset in (None, BUILTIN):
        return EvalText(
            BUILTIN, "\n\n".join(path.read_text("utf-8").strip() for path in sorted(TEXTS.glob("*.txt")))
        )
    if dataset == "wikitext2":
        return EvalText("wikitext2", wikitext2_test())
    raise UsageError(f"--dataset is {dataset!r}: expected one of {', '.join(DATASETS)}.")


def wikitext2_test() -> str:
    """Rows of the raw test split joined with blank lines, the published protocol. Raises InputError without network."""
    try:
        rows = open_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return "\n\n".join(rows["text"])
    except (
        Exception
    ) as error:  # the hub client raises many unrelated types; each means that the text is not here
        first = str(error).strip().splitlines()[:1]
        raise InputError(
            f"wikitext2 could not be fetched ({type(error).__name__}: {first[0][:200] if first else ''}). Without a network give "
            f"the raw split (--dataset wikitext2 --text wiki.test.raw), or leave both out for the built-in sample."
        ) from error


def join_rows(raw: str) -> str:
    """Rows of a raw WikiText split as its dataset has them, joined with blank lines: a row ends with its line end, or is empty."""
    lines = raw.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


@dataclass(frozen=True)
class EvalProtocol:
    """How models are judged: windows of `seqlen` tokens (None: 2048, or the model's context), KL on the first `kl_windows`."""

    seqlen: int | None = None
    windows: int | None = None
    kl_windows: int = 0

    def length(self, max_position: int) -> int:
        """Tokens of a window for a model with this context."""
        return min(SEQLEN, max_position) if self.seqlen is None else self.seqlen


@dataclass(frozen=True)
class Judged:
    """One model's result and, where it is not the reference itself, its distance from the reference."""

    name: str
    kind: str
    result: PerplexityResult
    against: PairedDifference | None = None

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON data."""
        difference = None
        if self.against is not None:
            difference = {"ppl": self.against.difference, "ci95": [self.against.low, self.against.high]}
        return {"path": self.name, "kind": self.kind, **self.result.to_json(), "difference": difference}


def tokens_of(text: EvalText, tokenizer: Tokenizer, ckpt: Checkpoint) -> EvalTokens:
    """The text in the model's own tokens, with its own rule for a leading BOS."""
    return tokenize(text.text, text.name, text.digest, tokenizer, ckpt.config)


def simulation(ckpt: Checkpoint, kv_bits: int, kv_mode: str) -> KVSimulation | None:
    """What keys and values go through; None at 16 bits. Raises InputError where static parameters are missing."""
    if kv_bits == 16:
        return None
    if kv_mode == "static":
        return KVSimulation(8 if kv_bits == 8 else 4, "static", read_kv_params(ckpt.path, ckpt.config))
    return KVSimulation(8 if kv_bits == 8 else 4)


def judge(
    model: Model,
    tokens: EvalTokens,
    protocol: EvalProtocol,
    kv: KVSimulation | None,
    reference: Reference | None,
    progress: Callable[[int, int], None] | None = None,
    watch: Watch | None = None,
) -> tuple[PerplexityResult, Reference]:
    """One model; the first model judged gives the reference for the others. `watch` sees both models' predictions."""
    return perplexity_and_reference(
        model,
        tokens,
        protocol.length(model.config.max_position),
        keep=protocol.kl_windows if reference is None else 0,
        windows=protocol.windows,
        kv=kv,
        reference=reference if protocol.kl_windows else None,
        progress=progress,
        watch=watch,
    )


def compared(name: str, kind: str, result: PerplexityResult, first: PerplexityResult | None) -> Judged:
    """A result beside the first one; no interval where the windows differ or there is one window only."""
    if first is None or result.windows < 2:
        return Judged(name, kind, result)
    same = ("text_digest", "tokenizer_digest", "seqlen", "windows", "bos")
    if any(getattr(first, field) != getattr(result, field) for field in same):
        return Judged(name, kind, result)
    return Judged(name, kind, result, paired_difference(first, result))


def release(device: torch.device) -> None:
    """Give cached GPU memory back between two models."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def protocol_line(results: Sequence[PerplexityResult]) -> str:
    """One sentence on how the figures were made."""
    first = results[0]
    bos = "with a leading BOS" if first.bos else "no BOS"
    line = f"{first.windows} window{'s' if first.windows > 1 else ''} of {first.seqlen} tokens of {first.text} ({first.tokens} tokens, {bos}), logits in float32"
    if first.text == BUILTIN:
        line += (
            "; the built-in sample ranks models on the same run, its figures compare with no published ones"
        )
    return line
