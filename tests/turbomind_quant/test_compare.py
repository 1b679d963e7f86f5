"""`compare`: the same figures as `perplexity`, the places by KL, and the texts that `LLM` writes."""

import json
from pathlib import Path

import pytest
from tiny_runs import run, write_runnable

import turbomind_quant as tmq


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_runnable(folder / "model")
    tmq.quantize(folder / "model", folder / "rtn", preset="rtn", bits=3, group_size=32, device="cpu")
    return folder


@pytest.fixture(scope="module")
def report(place: Path) -> tmq.CompareReport:
    return tmq.compare(
        place / "model",
        place / "rtn",
        seqlen=64,
        windows=3,
        places=2,
        prompt=["one", "two"],
        max_tokens=5,
        device="cpu",
    )


def test_the_figures_are_those_of_perplexity(place: Path, report: tmq.CompareReport) -> None:
    judged = tmq.perplexity(place / "model", place / "rtn", seqlen=64, windows=3, device="cpu")
    for ours, theirs in zip(report.rows, judged.rows, strict=True):
        assert ours.result.nll == theirs.result.nll and ours.result.kl == theirs.result.kl
        assert ours.against == theirs.against
    assert report.protocol == judged.protocol


def test_places_are_sorted_and_name_tokens_of_the_text(report: tmq.CompareReport) -> None:
    assert len(report.places) == 2 and report.places[0].kl >= report.places[1].kl > 0
    mean = report.rows[1].result.kl
    assert mean is not None and report.places[0].kl > mean
    assert all(place.before and len(place.token) == 1 for place in report.places)  # a byte tokenizer


def test_texts_are_those_of_the_engine(place: Path, report: tmq.CompareReport) -> None:
    with tmq.LLM(place / "rtn", device="cpu", instance_num=2) as llm:
        answers = llm.generate(["one", "two"], temperature=0.0, max_tokens=5)
    assert [text.texts[1] for text in report.texts] == [answer.text for answer in answers]
    assert all(0 <= text.shared_tokens <= 5 for text in report.texts)


def test_the_command_prints_the_same(place: Path) -> None:
    arguments = ("--seqlen", 64, "--windows", 2, "--places", 1, "--prompt", "one", "--max-tokens", 3, "--device", "cpu")  # fmt: skip
    done = run("evaluate", "compare", place / "model", place / "rtn", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["path"] for row in document["rows"]] == [str(place / "model"), str(place / "rtn")]
    assert len(document["places"]) == len(document["texts"]) == 1
    shown = run("evaluate", "compare", place / "model", place / "rtn", *arguments)
    assert "1. window" in shown.stdout and "same tokens" in shown.stdout


def test_models_of_other_tokens_are_refused_before_the_work(place: Path) -> None:
    write_runnable(place / "other")
    config = json.loads((place / "other" / "tokenizer.json").read_text())
    vocab = config["model"]["vocab"]
    a, b = list(vocab)[70:72]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (place / "other" / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(tmq.InputError, match="do not have the same tokens"):
        tmq.compare(place / "model", place / "other", seqlen=64, windows=1, device="cpu")
    with pytest.raises(tmq.UsageError, match="--kl-windows 0"):
        tmq.compare(place / "model", place / "rtn", kl_windows=0)
