"""Log-probabilities of tokens that are a part of a character: their bytes, their names, one entry each."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import live_server
from tiny_models import CONFIGS, random_tensors, tokenizer_document, write_model

from engine.api import TokenLogprob
from engine.config import EngineConfig
from serve.config import ServeConfig
from serve.http.app import create_app
from serve.http.generation.answers import chat_logprobs, token_name
from serve.http.generation.scores import text_logprobs
from serve.local import open_model

NI = "你".encode()  # e4 bd a0


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b" a\n", " a\n"),
        (NI, "你"),
        ("\ufffd".encode(), "\ufffd"),  # the character itself, not a part of one
        (NI[:2], r"bytes:\xe4\xbd"),
        (b" " + NI[:1], r"bytes:\x20\xe4"),
        (b"\xff", r"bytes:\xff"),
        (b"", ""),
    ],
)
def test_names_of_tokens(raw: bytes, name: str) -> None:
    assert token_name(raw) == name


def test_bytes_of_a_character_in_parts_can_be_joined() -> None:
    parts = [
        TokenLogprob(i, raw, -0.5, ((i, raw, -0.5), (9, b"\xff", -2.0)))
        for i, raw in enumerate([NI[:1], NI[1:2], NI[2:]])
    ]
    content = chat_logprobs(parts)["content"]
    assert bytes(byte for token in content for byte in token["bytes"]) == NI
    assert [token["token"] for token in content] == [r"bytes:\xe4", r"bytes:\xbd", r"bytes:\xa0"]
    assert content[0]["top_logprobs"][1] == {"token": r"bytes:\xff", "logprob": -2.0, "bytes": [255]}


def test_every_alternative_has_a_key_of_its_own() -> None:
    top = tuple((i, bytes([0x80 + i]), -float(i)) for i in range(5))
    found = text_logprobs([TokenLogprob(2, b"\x82", -2.0, top)])
    assert found["tokens"] == [r"bytes:\x82"]
    assert found["top_logprobs"] == [{rf"bytes:\x8{i}": -float(i) for i in range(5)}]


def test_tokens_of_one_text_are_told_apart() -> None:
    """A vocabulary with byte fallback has "A" twice, as a piece and as <0x41>; the chosen one keeps the text as its key."""
    top = ((7, b"A", -1.0), (68, b"A", -2.0), (90, b"b", -3.0), (91, b"b", -4.0))
    assert text_logprobs([TokenLogprob(68, b"A", -2.0, top)])["top_logprobs"] == [
        {"token_id:7": -1.0, "A": -2.0, "b": -3.0, "token_id:91": -4.0}
    ]
    beyond = text_logprobs([TokenLogprob(99, b"b", -9.0, top)])  # chosen, though not among the likeliest
    assert beyond["top_logprobs"] == [
        {"A": -1.0, "token_id:68": -2.0, "token_id:90": -3.0, "token_id:91": -4.0}
    ]


def test_offsets_count_characters_of_the_text() -> None:
    raws = [b"a", NI[:2], NI[2:], b"b"]
    tokens = [TokenLogprob(i, raw, -1.0) for i, raw in enumerate(raws)]
    assert text_logprobs(tokens, 3)["text_offset"] == [3, 4, 4, 5]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a random model whose tokens are single bytes, its engine in a process of its own."""
    folder = tmp_path_factory.mktemp("bytes")
    sizes = {"vocab_size": 259}
    write_model(folder, tensors=random_tensors("llama", **sizes), **sizes)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    config = EngineConfig(
        device="cpu", max_batch=1, context_length=CONFIGS["llama"]["max_position_embeddings"]
    )
    with open_model(str(folder), config) as model:
        app = create_app(model.engine, model.tokenizer, ServeConfig())  # type: ignore[arg-type]
        with live_server(app=app) as server:
            yield server.url


def ask(url: str, **body: Any) -> Any:
    common = {
        "max_tokens": 60,
        "temperature": 1,
        "seed": 5,
        "ignore_eos": True,
        "logit_bias": {str(i): -100 for i in (256, 257, 258)},
    }
    reply = httpx.post(url, json=common | body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


def test_the_bytes_of_an_answer_are_its_text(url: str) -> None:
    choice = ask(f"{url}/v1/chat/completions", messages="你好", logprobs=True, top_logprobs=4)
    content = choice["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in content)
    assert len(joined) == 60 and any(byte >= 0x80 for byte in joined)
    assert joined.decode("utf-8", "replace") == choice["message"]["content"]
    for token in content:
        assert token["token"] == token_name(bytes(token["bytes"]))
        assert len({tuple(other["bytes"]) for other in token["top_logprobs"]}) == 4


def test_completions_hold_every_alternative(url: str) -> None:
    found = ask(f"{url}/v1/completions", prompt="你好", logprobs=5)["logprobs"]
    assert any(name.startswith("bytes:") for name in found["tokens"])
    for name, own, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 5
        assert top.get(name, own) == own
