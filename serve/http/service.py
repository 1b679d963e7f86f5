"""What the routes share: one engine, one tokenizer, and the parts that guard them."""

import importlib.metadata
import time

from engine.api import Engine
from serve.config import ServeConfig
from serve.http.errors import ApiError
from serve.http.generation.admission import Admission
from serve.http.generation.prompts import Prompts
from serve.http.generation.runs import Runs
from serve.http.generation.sessions import Sessions
from serve.http.health import Health
from serve.http.metrics import Metrics
from serve.http.protocol.messages import ResponseFormat
from serve.http.protocol.sampling import OpenAISampling
from serve.prompts.encoder import Encoder, ThreadEncoder, Tokenizer
from serve.prompts.pool import WorkerPool


def _version() -> str:
    """Of the installed package; "unknown" in a folder that is no installation."""
    try:
        return importlib.metadata.version("turbomind-quant")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class Service:
    """The server without HTTP. Built once per app, inside or outside an event loop."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | WorkerPool, config: ServeConfig) -> None:
        self.config = config
        stats = engine.stats()
        self.model_name = config.model_name or stats.model or "model"
        self.created = int(time.time())
        self.version = _version()
        self.metrics = Metrics()
        self.admission = Admission(config.limits.pending, config.pending_per_client)
        self.runs = Runs(engine, self.admission, self.metrics, config.limits)
        self.encoder: Encoder
        if isinstance(tokenizer, WorkerPool):
            self.encoder = tokenizer
        else:
            self.encoder = ThreadEncoder(tokenizer, config.limits.prompt_s)
        self.prompts = Prompts(self.encoder, stats.context_length, config.limits)
        self.sessions = Sessions(config.limits)
        self.health = Health(engine, self.runs, config.limits.health_s)
        self.metrics.watch(engine.stats, lambda: self.admission.pending, lambda: self.admission.refused_total)

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not the served one; null is the served one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"There is no model {name!r} here: this server has {self.model_name!r}.",
                param="model",
                code="model_not_found",
            )

    def check_tokens(self, body: OpenAISampling) -> None:
        """Refuse token ids of other fields than the prompt that the vocabulary lacks."""
        for field, ids in body.named_tokens:
            self.prompts.check_tokens(ids, field)

    async def schema(self, asked: ResponseFormat | None, client: str, param: str) -> str | None:
        """The JSON schema that an answer must follow, checked; None for plain text."""
        text = None if asked is None else asked.schema_text()
        if text is not None:
            await self.prompts.check_schema(text, client, param)
        return text

    @property
    def delivery_s(self) -> float:
        """Seconds an answer may take as a whole, slow reading included."""
        return self.config.limits.request_s + self.config.limits.delivery_s
