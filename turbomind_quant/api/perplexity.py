"""`perplexity` and `compare`: models on disk, judged on the same text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import fspath
from typing import Any, get_args

from convert.errors import InputError, UsageError
from engine.config import Dtype, KvMode
from quant.evaluation.disagreement import Disagreement, DisagreementSearch
from quant.evaluation.judged_paths import OpenedModel, Reading, judge_models, open_model
from quant.evaluation.perplexity import EvalProtocol, Judged, load_eval_text, protocol_line
from quant.progress import Listener, Progress
from turbomind_quant.api.choices import StrPath, check_one, check_positive
from turbomind_quant.api.llm import LLM

# Beginnings that both models go on with in `compare`.
PROMPTS = (
    "The three largest rivers of the world are",
    "To bake bread at home you need",
    "Once upon a time, in a small house by the sea,",
)


@dataclass(frozen=True)
class PerplexityReport:
    """Models judged on the same text. `rows`: one a model, in the order given; `protocol`: one sentence on how they were measured."""

    rows: tuple[Judged, ...]
    protocol: str

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {"protocol": self.protocol, "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True)
class SideBySide:
    """How two models go on with the same beginning, greedily. `shared_tokens`: how many tokens they have in common at first."""

    prompt: str
    texts: tuple[str, str]
    shared_tokens: int


@dataclass(frozen=True)
class CompareReport:
    """Two models: `rows` as in PerplexityReport, `places` where they disagree most, the largest KL first, and `texts` of both."""

    rows: tuple[Judged, Judged]
    protocol: str
    places: tuple[Disagreement, ...]
    texts: tuple[SideBySide, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON data."""
        return {
            "protocol": self.protocol,
            "rows": [row.to_json() for row in self.rows],
            "places": [place.to_json() for place in self.places],
            "texts": [asdict(text) for text in self.texts],
        }


def perplexity(
    *paths: StrPath,
    dataset: str | None = None,
    text: StrPath | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    kl_windows: int = 32,
    kv_bits: int = 16,
    kv_mode: KvMode = "dynamic",
    streamed: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> PerplexityReport:
    """Perplexity of one or more models on the same text; lower is better. The first path is the reference of the others.

    Args:
        paths: checkpoints (float or AWQ), .gguf files, TurboMind workspaces. All are opened before the first is judged.
        dataset: "builtin" (a sample that ships with us, the default) or "wikitext2" (the published protocol).
        text: a text file as it stands; beside `dataset="wikitext2"`, the raw test split to take its rows from.
        windows: only the first so many; None: all. seqlen: tokens of a window; None: 2048, or the model's context.
        kl_windows: windows on which KL divergence and top-1 agreement with the first path are measured; 0: none.
        kv_bits: 16, 8 or 4: simulate a KV cache of this width, exactly.
        kv_mode: "dynamic": scales a token; "static": those that `quantize(kv_bits=8)` wrote.
        streamed: hold one decoder block at a time, for models larger than memory.
        trust_remote_code, device, dtype, family, progress: as in `quantize`.

    Raises UsageError for choices that contradict each other, InputError for a path or text that cannot be used.
    """
    if not paths:
        raise UsageError("nothing to measure: give the path of a model.")
    check_windows(windows, kl_windows)
    check_one(kv_bits, "--kv-bits", (16, 8, 4))
    check_one(kv_mode, "--kv-mode", get_args(KvMode))
    protocol = EvalProtocol(seqlen, windows, kl_windows if len(paths) > 1 else 0)
    reading = Reading(device, dtype, family, trust_remote_code, streamed, kv_bits, kv_mode)
    words = load_eval_text(dataset, None if text is None else fspath(text))
    with Progress("evaluate ppl", progress) as run:
        models = [open_model(fspath(path), words, reading) for path in paths]
        rows, _ = judge_models(models, protocol, reading, run)
    return PerplexityReport(tuple(rows), protocol_line([row.result for row in rows]))


def compare(
    a: StrPath,
    b: StrPath,
    *,
    dataset: str | None = None,
    text: StrPath | None = None,
    windows: int | None = None,
    seqlen: int | None = None,
    kl_windows: int = 32,
    places: int = 5,
    prompt: Sequence[str] = PROMPTS,
    max_tokens: int = 48,
    trust_remote_code: bool = False,
    device: str = "auto",
    dtype: Dtype = "auto",
    family: str | None = None,
    progress: Listener | None = None,
) -> CompareReport:
    """Two models on the same text: the difference in perplexity, where they disagree most, and what either writes.

    Args:
        a, b: as the paths of `perplexity`; `a` is the reference. Both must have the same vocabulary.
        dataset, text, windows, seqlen: as in `perplexity`.
        kl_windows: windows on which KL divergence and top-1 agreement are measured and disagreements are looked for; at least 1.
        places: disagreements that are shown. prompt: beginnings that both go on with; () for none.
        max_tokens: of such a text, at most.
        trust_remote_code, device, dtype, family, progress: as in `quantize`.

    Raises UsageError for choices that contradict each other, InputError for a path or text that cannot be used.
    """
    check_windows(windows, kl_windows)
    for value, flag in ((kl_windows, "--kl-windows"), (places, "--places"), (max_tokens, "--max-tokens")):
        check_positive(value, flag, 1)
    reading = Reading(device, dtype, family, trust_remote_code)
    words = load_eval_text(dataset, None if text is None else fspath(text))
    search = DisagreementSearch(places)
    with Progress("evaluate compare", progress) as run:
        models = [open_model(fspath(path), words, reading) for path in (a, b)]
        _check_comparable(*models)
        (first, second), reference = judge_models(
            models, EvalProtocol(seqlen, windows, kl_windows), reading, run, search
        )
        found = search.places(reference.ids, models[0].tokenizer.decode)
        texts = _texts_of_both((a, b), prompt, max_tokens, reading) if prompt else ()
    return CompareReport((first, second), protocol_line([first.result, second.result]), tuple(found), texts)


def _check_comparable(a: OpenedModel, b: OpenedModel) -> None:
    """Raises InputError where the predictions of the two cannot be compared token by token."""
    sizes = [model.checkpoint.config.vocab_size for model in (a, b)]
    if sizes[0] != sizes[1] or not a.tokens.ids.equal(b.tokens.ids):
        raise InputError(
            f"{a.path} and {b.path} do not have the same tokens (vocabularies of {sizes[0]:,} and {sizes[1]:,}): compare a model with "
            "what was made from it, or use `evaluate ppl` with --kl-windows 0."
        )


def _texts_of_both(
    paths: tuple[StrPath, StrPath], prompts: Sequence[str], max_tokens: int, reading: Reading
) -> tuple[SideBySide, ...]:
    """Greedy texts. The engine serves in 16 bits on a GPU, also where the perplexity was measured in float32."""
    written = []
    for path in paths:
        with LLM(
            path,
            device=reading.device,
            dtype="auto" if reading.dtype == "float32" else reading.dtype,
            family=reading.family,
            trust_remote_code=reading.trust_remote_code,
            instance_num=len(prompts),
        ) as llm:
            written.append(llm.generate(list(prompts), temperature=0.0, max_tokens=max_tokens))
    return tuple(
        SideBySide(prompt, (one.text, other.text), _shared(one.token_ids, other.token_ids))
        for prompt, one, other in zip(prompts, *written, strict=True)
    )


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (x, y) in pairs if x != y), min(len(one), len(other)))


def check_windows(windows: int | None, kl_windows: int) -> None:
    """Raises UsageError for counts of windows that measure nothing."""
    check_positive(windows, "--windows", 1)
    if kl_windows < 0:
        raise UsageError(f"--kl-windows {kl_windows}: expected 0 (none) or more.")
