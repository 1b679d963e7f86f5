"""Several models on disk, judged one after the other on the same text: what `evaluate ppl` and `evaluate compare` share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import Checkpoint
from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer
from engine.config import Dtype, KvMode
from engine.loading import use_device
from engine.measure.perplexity import EvalTokens, Reference, Watch
from engine.model.forward import Model, compute_dtype
from engine.model.kv_simulation import KVSimulation
from quant.evaluation.perplexity import (
    EvalProtocol,
    EvalText,
    Judged,
    compared,
    judge,
    release,
    simulation,
    tokens_of,
)
from quant.progress import Progress


@dataclass(frozen=True)
class Reading:
    """How models are opened and run. `streamed`: one decoder block in memory at a time; `kv_bits` 16 simulates no KV cache."""

    device: str = "auto"
    dtype: Dtype = "auto"
    family: str | None = None
    trust_remote_code: bool = False
    streamed: bool = False
    kv_bits: int = 16
    kv_mode: KvMode = "dynamic"


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint with all that judging it needs; the weights are not in memory yet."""

    path: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    tokens: EvalTokens
    cache: KVSimulation | None


def open_model(path: str, text: EvalText, reading: Reading) -> OpenedModel:
    """Raises InputError for a path or tokenizer that cannot be used, or a static cache without parameters."""
    checkpoint = open_checkpoint(path, family=reading.family)
    tokenizer = load_tokenizer(checkpoint.tokenizer_dir, trust_remote_code=reading.trust_remote_code)
    cache = simulation(checkpoint, reading.kv_bits, reading.kv_mode)
    return OpenedModel(path, checkpoint, tokenizer, tokens_of(text, tokenizer, checkpoint), cache)


def judge_models(
    models: Sequence[OpenedModel],
    protocol: EvalProtocol,
    reading: Reading,
    progress: Progress,
    watch: Watch | None = None,
) -> tuple[list[Judged], Reference]:
    """Every model, the first as the reference of the others; and what is kept of that one."""
    device = use_device(reading.device)
    rows: list[Judged] = []
    reference: Reference | None = None
    for opened in models:
        config = opened.checkpoint.config
        dtype = compute_dtype(config, device, reading.dtype)
        model = Model.from_checkpoint(opened.checkpoint, device, dtype, streamed=reading.streamed)
        for note in model.notes:
            progress.say(f"note: {Path(opened.path).name}: {note}")
        result, kept = judge(model, opened.tokens, protocol, opened.cache, reference, watch=watch)
        reference = reference or kept
        first = rows[0].result if rows else None
        rows.append(compared(opened.path, opened.checkpoint.kind, result, first))
        progress.say(f"{opened.path}: perplexity {result.ppl:.3f} in {result.seconds:.0f} s")
        del model
        release(device)
    assert reference is not None  # there is at least one model
    return rows, reference
