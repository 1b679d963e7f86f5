"""Servers that several tests of the HTTP routes talk to."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from live_server import LiveServer, live_server
from tiny_models import random_tensors, tokenizer_document, write_model
from tool_server import HERMES_TEMPLATE, Scripted, Template

from engine.config import EngineConfig
from serve.local import open_model


@pytest.fixture(scope="module")
def hermes() -> Iterator[LiveServer]:
    with live_server(Scripted(context_length=8000), tokenizer=Template(HERMES_TEMPLATE)) as server:
        yield server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    pytest.importorskip("llguidance")
    folder: Path = tmp_path_factory.mktemp("models") / "tiny"
    tensors = random_tensors("llama")
    generator = torch.Generator().manual_seed(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = (torch.randn(264, 64, generator=generator) * 0.5).half()
    write_model(
        folder,
        tensors=tensors,
        vocab_size=264,
        eos_token_id=258,
        bos_token_id=256,
        max_position_embeddings=4096,
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    config = {"chat_template": HERMES_TEMPLATE, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = EngineConfig(device="cpu", block_size=16, context_length=4096)
    with (
        open_model(str(folder), engine) as model,
        live_server(model.engine, tokenizer=model.worker_pool()) as server,
    ):  # type: ignore[arg-type]
        yield server
