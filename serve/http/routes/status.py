"""Everything that generates nothing: models, tokens, health, metrics and the page at /."""

import html
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from serve.http.generation.answers import Encoded, Health, ModelCard, ModelList, Tokens, Version
from serve.http.protocol.lmdeploy import EncodeRequest, TokenizeChat, TokenizeText
from serve.http.protocol.messages import plain_messages
from serve.http.routes.json_route import JsonRoute, errors
from serve.http.service import Service

_PAGE = Path(__file__).parent.parent / "index.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"


def status_routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)
    card: ModelCard = {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "turbomind-quant",
        "max_model_len": service.prompts.context_length,
    }
    page = _PAGE.read_text("utf-8").replace("{{model}}", html.escape(service.model_name))

    @router.get("/v1/models", responses=errors(), tags=["OpenAI"])
    async def models() -> ModelList:
        """The one model that is served."""
        return {"object": "list", "data": [card]}

    @router.get("/v1/models/{name:path}", responses=errors(404), tags=["OpenAI"])
    async def model(name: str) -> ModelCard:
        """The model of this name."""
        service.check_model(name)
        return card

    @router.post("/tokenize", responses=errors(400, 404, 429))
    async def tokenize(body: TokenizeText | TokenizeChat, request: Request) -> Tokens:
        """Token ids of a prompt, or of a conversation with the chat template around it."""
        service.check_model(body.model)
        client = request.state.client
        if isinstance(body, TokenizeChat):
            ids = await service.prompts.of_chat(plain_messages(body.messages), client)
        else:
            add_bos = False if body.add_special_tokens is False else None
            ids = await service.prompts.of_text(body.prompt, add_bos, client, counts_only=True)
        return {"tokens": ids, "count": len(ids), "max_model_len": service.prompts.context_length}

    @router.post("/v1/encode", responses=errors(400, 429), tags=["LMDeploy"])
    async def encode(body: EncodeRequest, request: Request) -> Encoded:
        """Token ids of a text, or of several."""
        texts = [body.input] if isinstance(body.input, str) else body.input
        add_bos = False if body.add_bos is False else None
        ids = [
            await service.prompts.of_text(text, add_bos, request.state.client, "input", counts_only=True)
            for text in texts
        ]
        lengths = [len(one) for one in ids]
        if isinstance(body.input, str):
            return {"input_ids": ids[0], "length": lengths[0]}
        return {"input_ids": ids, "length": lengths}

    @router.get("/version", responses=errors())
    async def version() -> Version:
        """The version of this program."""
        return {"version": service.version}

    @router.get("/health", responses=errors(503))
    async def health() -> Health:
        """200 once the engine has just generated a token; 503 where it does not."""
        stats = await service.health.check()
        return {
            "status": "ok",
            "model": service.model_name,
            "running": stats.running,
            "waiting": stats.waiting,
            "blocks_free": stats.blocks_free,
            "blocks_total": stats.blocks_total,
        }

    @router.get("/metrics", response_class=Response, responses=errors())
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index(request: Request) -> Response:
        base = html.escape(str(request.base_url).rstrip("/"))
        return HTMLResponse(page.replace("{{base}}", base), headers={"Content-Security-Policy": _POLICY})

    return router
