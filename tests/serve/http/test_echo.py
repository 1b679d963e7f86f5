"""Prompts that are echoed and judged: as lm-evaluation-harness asks for it, whole and streamed, on a fake engine and on a real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fake_engine import FakeEngine
from live_server import LiveServer, live_server
from starlette.testclient import TestClient
from tiny_models import random_tensors, tokenizer_document, write_model

from convert.readers import open_checkpoint
from engine.config import EngineConfig
from engine.model.attention import causal_attend
from engine.model.forward import Model
from serve.http.generation.scores import Echo
from serve.local import open_model

TEXT = "/v1/completions"


def ask(api: TestClient, **body: Any) -> dict[str, Any]:
    reply = api.post(TEXT, json=body)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def streamed(api: TestClient, **body: Any) -> list[dict[str, Any]]:
    lines = api.post(TEXT, json={**body, "stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_echo_puts_the_prompt_before_the_answer(api: TestClient) -> None:
    plain = ask(api, prompt="once é", max_tokens=3)["choices"][0]["text"]
    choice = ask(api, prompt="once é", max_tokens=3, echo=True)["choices"][0]
    assert choice["text"] == "once é" + plain and choice["logprobs"] is None
    several = ask(api, prompt=["a", "bc"], max_tokens=2, echo=True, n=2)["choices"]
    assert [c["text"][: 1 + c["index"] // 2] for c in several] == ["a", "a", "bc", "bc"]
    chunks = streamed(api, prompt="once é", max_tokens=3, echo=True)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert chunks[0]["choices"][0]["text"].startswith("once é")


def test_echo_of_token_ids_is_their_text(api: TestClient) -> None:
    ids = [10 + byte for byte in "héé".encode()]
    choice = ask(api, prompt=ids, max_tokens=1, echo=True, logprobs=0)["choices"][0]
    assert choice["text"].startswith("héé")
    assert choice["logprobs"]["text_offset"][:6] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("max_tokens", [0, 2])
@pytest.mark.parametrize("prompt", ["hello", [[20, 21, 22], [30, 31, 32]]], ids=["text", "ids"])
def test_log_probabilities_of_the_prompt(
    api: TestClient, engine: FakeEngine, prompt: Any, max_tokens: int
) -> None:
    answer = ask(api, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    assert answer["usage"]["completion_tokens"] == max_tokens * len(answer["choices"])
    for choice, request in zip(answer["choices"], engine.requests[-len(answer["choices"]) :], strict=True):
        count = len(request.prompt_ids)
        logprobs = choice["logprobs"]
        assert request.sampling.prompt_logprobs == 2 and choice["finish_reason"] == "length"
        assert {len(column) for column in logprobs.values()} == {count + max_tokens}
        assert logprobs["token_logprobs"][:count] == [None, *(-i / 8 for i in range(1, count))]
        assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][1]) == 2
        tail = choice["text"][logprobs["text_offset"][count] :] if max_tokens else ""
        assert tail == "".join(logprobs["tokens"][count:])
    chunks = streamed(api, prompt=prompt, max_tokens=max_tokens, echo=True, logprobs=2)
    for index, choice in enumerate(answer["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, column in choice["logprobs"].items():
            assert [v for part in parts if part["logprobs"] for v in part["logprobs"][name]] == column


def test_text_of_a_prompt_with_bos(api: TestClient) -> None:
    """The fake tokenizer puts token 1 before a text: it is a token of the echo, and no part of its text."""
    logprobs = ask(api, prompt="ab", max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<1>", "a", "b"] and logprobs["text_offset"] == [0, 0, 1]


def test_echo_offsets_stay_within_the_text() -> None:
    echo = Echo.of("é!", [b" ", b"\xc3", b"\xa9", b"!"])  # a tokenizer that adds a space
    assert echo.text == "é!" and echo.lengths == (0, 0, 1, 1)


def test_prompt_logprobs_as_vllm_gives_them(api: TestClient) -> None:
    choice = ask(api, prompt=[20, 21, 22], max_tokens=1, prompt_logprobs=1)["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    assert (
        second["21"] == {"logprob": -1 / 8, "rank": 1, "decoded_token": "bytes:\\x0b"}
        or second["21"]["rank"] == 1
    )
    assert third["22"]["logprob"] == -2 / 8 and third["22"]["rank"] == 2
    assert third["65"] == {"logprob": -1.0, "rank": 1, "decoded_token": "7"}
    chunks = streamed(api, prompt=[20, 21, 22], max_tokens=2, prompt_logprobs=1)
    assert chunks[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert "prompt_logprobs" not in chunks[1]["choices"][0]
    assert "prompt_logprobs" not in ask(api, prompt="x", max_tokens=1)["choices"][0]


def test_too_many_log_probabilities_are_refused_with_numbers(api: TestClient) -> None:
    body = {"prompt": [[20] * 400] * 16, "max_tokens": 0, "prompt_logprobs": 20}
    assert api.post(TEXT, json=body).status_code == 200
    big = FakeEngine(context_length=100_000)
    with live_server(big) as server:
        reply = httpx.post(server.url + TEXT, json={**body, "prompt": [20] * 50_000}, timeout=60)
        assert reply.status_code == 400 and "50000" in reply.text and not big.requests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tensors = random_tensors("llama")
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (torch.randn(264, 64, generator=generator) * 0.5).half()
    write_model(folder, tensors=tensors, vocab_size=264, eos_token_id=258, bos_token_id=256)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[LiveServer]:
    config = EngineConfig(device="cpu", block_size=16, context_length=256, max_step_tokens=128)
    with (
        open_model(str(folder), config) as model,
        live_server(model.engine, tokenizer=model.worker_pool()) as server,
    ):  # type: ignore[arg-type]
        yield server


@pytest.mark.parametrize("length", [1, 2, 100, 255])
def test_a_prompt_is_judged_as_the_model_judges_it(real: LiveServer, folder: Path, length: int) -> None:
    """lm-evaluation-harness sends this: the sum over a continuation equals that of a forward pass without cache or server."""
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choice = httpx.post(real.url + TEXT, json=body, timeout=120).json()["choices"][0]
    model = Model.from_checkpoint(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        attend = causal_attend(1, length, model.config)
        logprobs = torch.log_softmax(model(torch.tensor(ids), torch.arange(length), attend).double(), dim=-1)
    expected = [logprobs[i, ids[i + 1]].item() for i in range(length - 1)]
    got = choice["logprobs"]["token_logprobs"]
    assert len(got) == length + 1 and got[0] is None
    assert got[1:length] == pytest.approx(expected, abs=1e-4)
    assert got[length] == pytest.approx(logprobs[-1].max().item(), abs=1e-4)
    for place in range(1, length):
        (best,) = choice["logprobs"]["top_logprobs"][place].values()
        assert best == pytest.approx(logprobs[place - 1].max().item(), abs=1e-4)


def test_a_prompt_that_fills_the_context_is_judged(real: LiveServer) -> None:
    body = {"prompt": [65] * 256, "max_tokens": 0, "logprobs": 0, "echo": True}
    reply = httpx.post(real.url + TEXT, json=body, timeout=120)
    assert reply.status_code == 200 and len(reply.json()["choices"][0]["logprobs"]["tokens"]) == 256
    assert httpx.post(real.url + TEXT, json={**body, "max_tokens": 1}, timeout=120).status_code == 400
