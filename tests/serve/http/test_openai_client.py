"""The official `openai` client against a real server, on every endpoint and in every mode."""

from collections.abc import Iterator

import openai
import pytest
from fake_engine import WORDS
from live_server import LiveServer, live_server
from openai import OpenAI

SAY = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server
        server.wait_idle()


@pytest.fixture
def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(prompt_tokens: int, count: int) -> str:
    return "".join(WORDS[(prompt_tokens + i) % len(WORDS)] for i in range(count))


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=SAY, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.choices[0].message.content == expected(answer.usage.prompt_tokens, 5)


def test_chat_stream_equals_whole(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="fake", messages=SAY, max_tokens=9)
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=SAY, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_chat_several_answers(client: OpenAI, server: LiveServer) -> None:
    before = len(server.engine.requests)
    answer = client.chat.completions.create(model="fake", messages=SAY, max_tokens=3, n=4, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 12
    seeds = [request.sampling.seed for request in server.engine.requests[before:]]
    assert seeds == [7, 8, 9, 10]  # different answers, the same in each repetition
    streamed = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model="fake", messages=SAY, max_tokens=3, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed[0] == streamed[1] == answer.choices[0].message.content


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=SAY, max_tokens=4, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    assert [len(token.top_logprobs) for token in content] == [3] * 4
    assert bytes(content[0].bytes).decode() == content[0].token
    chunks = client.chat.completions.create(
        model="fake", messages=SAY, max_tokens=4, logprobs=True, stream=True
    )
    streamed = [t for c in chunks for choice in c.choices if choice.logprobs for t in choice.logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in content]


def test_chat_parameters_reach_the_engine(client: OpenAI, server: LiveServer) -> None:
    client.chat.completions.create(
        model="fake",
        messages=[{"role": "developer", "content": "be brief"}, *SAY],
        max_completion_tokens=2,
        temperature=0,
        top_p=0.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"12": -100},
        stop=["END"],
        seed=3,
        user="ada",
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    sampling = server.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (2, 0.0, 0.5, 4)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
        1,
        -1,
        1.2,
    )
    assert sampling.logit_bias == ((12, -100.0),)
    assert (sampling.stop, sampling.seed, sampling.min_p, sampling.ignore_eos) == (("END",), 3, 0.1, True)


def test_stop(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=SAY, max_tokens=50, stop=["\n"])
    assert answer.choices[0].finish_reason == "stop"
    assert "\n" not in answer.choices[0].message.content


@pytest.mark.parametrize("prompt", ["once", [20, 21, 22], ["once", "twice"], [[20, 21], [22]]])
def test_completions(client: OpenAI, prompt: object) -> None:
    answer = client.completions.create(model="fake", prompt=prompt, max_tokens=4, logprobs=2)
    count = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert answer.usage.completion_tokens == 4 * count
    for choice in answer.choices:
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
        assert len(choice.logprobs.top_logprobs[0]) == 2
    streamed = [""] * count
    for chunk in client.completions.create(model="fake", prompt=prompt, max_tokens=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_completion_default_length_is_that_of_openai(client: OpenAI) -> None:
    assert client.completions.create(model="fake", prompt="once").usage.completion_tokens == 16


def test_errors_have_the_types_of_the_client(client: OpenAI, server: LiveServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="fake", messages=SAY, audio={"voice": "alloy"})
    assert caught.value.param == "audio"
    assert caught.value.code == "unsupported_field"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=SAY)
    assert missing.value.code == "model_not_found"
    server.engine.fails.add("10")  # "user\nhi" with its three control tokens
    try:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="fake", messages=SAY)
        with pytest.raises(openai.APIError, match="step of this request failed"):
            list(client.chat.completions.create(model="fake", messages=SAY, stream=True))
    finally:
        server.engine.fails.clear()


async def _ask_async(url: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="fake", messages=SAY, max_tokens=3, stream=True)
        return "".join([c.choices[0].delta.content or "" async for c in stream])


def test_async_client(server: LiveServer) -> None:
    import asyncio

    assert asyncio.run(_ask_async(server.url)) == expected(10, 3)
