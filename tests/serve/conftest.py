"""A client of the app without sockets, for tests of what routes answer."""

from collections.abc import Iterator

import pytest
from fake_engine import FakeEngine, FakeTokenizer
from starlette.testclient import TestClient

from serve.config import ServeConfig
from serve.http.app import create_app


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def api(engine: FakeEngine) -> Iterator[TestClient]:
    app = create_app(engine, FakeTokenizer(), ServeConfig())
    with TestClient(app, base_url="http://127.0.0.1:23333") as client:
        yield client
