"""`LLM`: greedy answers against transformers on the same weights, conversations, streams, and how it ends."""

import asyncio
from pathlib import Path

import pytest
import torch
from tiny_runs import write_runnable

import turbomind_quant as tmq


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runnable(tmp_path_factory.mktemp("llm") / "model")


@pytest.fixture(scope="module")
def llm(model: Path):
    with tmq.LLM(model, device="cpu", instance_num=4) as loaded:
        yield loaded


def greedy_by_transformers(model: Path, prompt_ids: list[int], count: int) -> list[int]:
    """The likeliest next token, `count` times, each by a whole forward pass."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_greedy_answers_are_those_of_transformers(model: Path, llm: tmq.LLM) -> None:
    from convert.tokenizer.tokenizer import load_tokenizer

    prompts = ["hello there", "x", "one two three"]
    tokenizer = load_tokenizer(model)
    answers = llm.generate(prompts, temperature=0.0, max_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.encode_plain(prompt, add_bos=None)
        wanted = greedy_by_transformers(model, ids, 6)
        assert list(answer.token_ids) == wanted[: len(answer.token_ids)]
        assert len(answer.token_ids) == 6 or answer.finish_reason == "stop"
        assert answer.prompt_tokens == len(ids)


def test_a_string_is_one_message_and_the_same_as_its_conversation(llm: tmq.LLM) -> None:
    one = llm.chat("hello", temperature=0.0, max_tokens=8)
    assert one == llm.chat([{"role": "user", "content": "hello"}], temperature=0.0, max_tokens=8)
    assert one.to_json()["finish_reason"] == one.finish_reason == "length"
    assert "".join(llm.stream("hello", temperature=0.0, max_tokens=8)) == one.text


def test_the_seed_decides_what_is_drawn(llm: tmq.LLM) -> None:
    first, again, other = (llm.generate("a", seed=seed, max_tokens=16) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_text_ends_an_answer(llm: tmq.LLM) -> None:
    whole = llm.generate("hello there", temperature=0.0, max_tokens=12).text
    stop = whole[2:4]
    cut = llm.generate("hello there", temperature=0.0, max_tokens=12, stop=[stop])
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_a_stream_that_is_left_early_leaves_the_engine_free(llm: tmq.LLM) -> None:
    for _ in range(8):  # more than the sequences that run at once
        pieces = llm.stream("hello", temperature=1.0, max_tokens=200)
        next(pieces)
        pieces.close()
    assert llm.generate("a", max_tokens=1).finish_reason == "length"


def test_calls_work_inside_a_running_event_loop(llm: tmq.LLM) -> None:
    """As in a notebook."""

    async def cell() -> tmq.Answer:
        return llm.generate("a", max_tokens=1)

    assert asyncio.run(cell()).finish_reason == "length"


def test_what_does_not_fit_is_a_usage_error(llm: tmq.LLM) -> None:
    with pytest.raises(tmq.UsageError, match=r"context is 256 tokens: the prompt takes 13, 300 of answer"):
        llm.chat("hello", max_tokens=300)
    with pytest.raises(tmq.UsageError, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(tmq.UsageError, match="temperature is -1"):
        llm.chat("hello", temperature=-1)
    with pytest.raises(TypeError, match="temprature"):
        llm.chat("hello", temprature=0.5)  # type: ignore[call-arg]


def test_nothing_is_printed(tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not the engine's notes either, such as the one on int4 weights on a CPU."""
    made = tmq.quantize(model, tmp_path / "int4", preset="rtn", group_size=32, device="cpu")
    with tmq.LLM(made.path, device="cpu", instance_num=1) as llm:
        llm.chat("hello", max_tokens=1)
    assert capfd.readouterr() == ("", "")


def test_a_closed_one_says_so(model: Path) -> None:
    closed = tmq.LLM(model, device="cpu", instance_num=1, session_len=32)
    assert closed.context_length == 32
    closed.close()
    closed.close()
    with pytest.raises(tmq.ResourceError, match="is closed"):
        closed.chat("hello", max_tokens=1)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(tmq.InputError, match="does not exist"):
        tmq.LLM(tmp_path / "none")
    with pytest.raises(tmq.UsageError, match="--quant-policy 4"):
        tmq.LLM(tmp_path / "none", quant_policy=4)
