"""The ASGI app: routes, error answers and the outer gate, around one engine. Knows nothing of sockets and signals."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine.api import Engine, EngineDied
from serve.config import ServeConfig
from serve.http.disconnect import ClientGone
from serve.http.errors import ApiError, describe, unavailable
from serve.http.middleware import Gate
from serve.http.routes.chat import chat_routes
from serve.http.routes.completions import completion_routes
from serve.http.routes.interactive import interactive_routes
from serve.http.routes.responses import response_routes
from serve.http.routes.status import status_routes
from serve.http.service import Service
from serve.prompts.encoder import Tokenizer
from serve.prompts.pool import WorkerPool

log = logging.getLogger("tmq.serve")
_WATCH_S = 0.25
_TROUBLED = 8  # looks in a row at an engine that hangs, until the server ends


def _add_error_answers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return describe(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {404: "There is no such path.", 405: "This path does not take this method."}
        message = messages.get(error.status_code, "The request could not be answered.")
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)  # nobody receives it; the log shows why

    @app.exception_handler(asyncio.TimeoutError)
    async def late(request: Request, error: Exception) -> Response:
        return ApiError(504, "The answer was not finished in time.", code="timeout").response()

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        request_id = request.scope.get("state", {}).get("request_id", "")
        return ApiError(500, f"Internal error. The server's log has more: request {request_id}.").response()


async def _watch(service: Service, engine: Engine, on_death: Callable[[], None]) -> None:
    """Notice that the engine died or hangs even where nobody asks; then fail what is pending and tell `on_death`."""
    troubled = 0
    while True:
        try:
            engine.stats()
            trouble = engine.trouble()
        except EngineDied as error:
            problem = f"The engine has stopped: {error}"
            break
        # Seen several times in a row: after a pause of the whole machine the first look is at old signs of life.
        troubled = troubled + 1 if trouble else 0
        if trouble and troubled > _TROUBLED:
            problem = f"The engine hangs: {trouble}"
            break
        await asyncio.sleep(_WATCH_S)
    log.error("%s The server is ending.", problem.encode("unicode_escape").decode("ascii"))
    service.health.problem = problem
    service.runs.fail_all(unavailable("The engine has stopped. The server is ending."))
    on_death()


def create_app(
    engine: Engine,
    tokenizer: Tokenizer | WorkerPool,
    config: ServeConfig,
    on_death: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The server's app; `app.state.service` holds its parts. `on_death` is called once, where the engine dies."""
    service = Service(engine, tokenizer, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(_watch(service, engine, on_death))
        yield
        watch.cancel()
        await service.encoder.close()

    app = FastAPI(
        title="turbomind-quant",
        version="1",
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    for routes in (chat_routes, completion_routes, response_routes, interactive_routes, status_routes):
        app.include_router(routes(service))
    _add_error_answers(app)
    # Last added is outermost: the gate sees every request first, CORS adds its headers to what passes.
    if config.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )

    def gate(inner: ASGIApp) -> Gate:
        return Gate(inner, config, service.metrics.observe)

    app.add_middleware(gate)  # type: ignore[arg-type]
    return app
