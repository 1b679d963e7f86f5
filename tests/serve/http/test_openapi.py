"""schemathesis against our OpenAPI: no answer that the description does not name, no 5xx, bounded number of examples."""

from collections.abc import Iterator

import pytest
import schemathesis
from fake_engine import FakeEngine, FakeTokenizer
from hypothesis import HealthCheck, settings
from live_server import LiveServer, live_server
from schemathesis.specs.openapi.checks import positive_data_acceptance

from serve.config import ServeConfig
from serve.http.app import create_app

app = create_app(FakeEngine(), FakeTokenizer(), ServeConfig())
schema = schemathesis.openapi.from_dict(app.openapi())


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server
        server.wait_idle()


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_answers_are_as_described(server: LiveServer, case: schemathesis.Case) -> None:
    # A schema cannot say how long a context is, which tokens there are, or that a prompt comes out empty.
    case.call_and_validate(base_url=server.url, excluded_checks=[positive_data_acceptance])
