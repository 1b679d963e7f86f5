"""The web page: one prompt, one or more models side by side, streaming, stop, parameters. Gradio, and nothing from elsewhere.

No file components, no sharing, no analytics; a content policy keeps the browser from any other host. Knows backends only.
"""

import asyncio
import html
import os
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from convert.errors import TmqError
from serve.chat.backends import Backend
from serve.chat.conversation import Conversation
from serve.chat.settings import ChatSettings
from serve.config import ServeConfig
from serve.http.middleware import Gate

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by gradio while it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr

_MAX_PROMPT_CHARS = 200_000
_SESSION_S = 3600
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'"
)
_CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: auto; }
.speed { min-height: 1.6em; opacity: .75; font-size: .9em; padding: 0 .4em; }
footer { display: none !important; }
"""
_WORDS = {
    "en": {
        "prompt": "Message", "hint": "Write a message. Enter sends, Shift-Enter starts a new line.",
        "send": "Send", "stop": "Stop", "undo": "Undo", "clear": "Clear", "parameters": "Parameters",
        "system": "System text", "temperature": "Temperature", "top_p": "Top p", "top_k": "Top k (0: off)",
        "repetition": "Repetition penalty", "max_tokens": "Tokens at most", "seed": "Seed (-1: none)",
    },
    "zh": {
        "prompt": "消息", "hint": "输入消息。回车发送，Shift+回车换行。",
        "send": "发送", "stop": "停止", "undo": "撤销", "clear": "清空", "parameters": "参数",
        "system": "系统提示", "temperature": "温度", "top_p": "Top p", "top_k": "Top k（0 为关闭）",
        "repetition": "重复惩罚", "max_tokens": "最多词元数", "seed": "随机种子（-1 为不固定）",
    },
}  # fmt: skip
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)


def shown(text: str) -> str:
    """`text` for a Markdown view: outside of code, markup of HTML is shown and not obeyed."""
    parts = _CODE.split(text)
    return "".join(part if i % 2 else html.escape(part, quote=False) for i, part in enumerate(parts))


@dataclass
class _Pane:
    """One model's answer while it comes."""

    text: str = ""
    status: str = ""
    failed: bool = False


@dataclass
class _Round:
    """One prompt on its way through all models: a task for each, and a signal whenever something is new."""

    panes: list[_Pane]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    outcome: list[Any] | None = (
        None  # what the page shows at its end in place of the answer: it was taken back
    )

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()


async def _fill(
    pane: _Pane, backend: Backend, talk: Conversation, settings: ChatSettings, news: asyncio.Event
) -> None:
    start, first, tokens = time.monotonic(), 0.0, 0
    ending = ""
    try:
        async with aclosing(backend.answer(talk.prompt(), settings)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                first = first or time.monotonic()
                pane.text += piece.text
                tokens = max(tokens, piece.completion_tokens)
                rate = tokens / max(time.monotonic() - first, 1e-9)
                if tokens > 1:
                    pane.status = f"{tokens} tokens · {rate:.1f} tokens/s · first after {first - start:.2f} s"
                ending = {"length": " · cut at the limit of tokens"}.get(piece.finish_reason or "", "")
                news.set()
    except asyncio.CancelledError:
        ending = " · stopped"
    except TmqError as error:
        pane.failed = not pane.text
        ending = f" · {error}"
    finally:
        pane.status = html.escape((pane.status + ending).removeprefix(" · "))
        news.set()


class Page:
    """The page and its running rounds, one for each browser tab at most."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends
        self._rounds: dict[str, _Round] = {}

    async def _send(
        self, text: str | None, talks: list[Conversation], system: str | None, temperature: float, top_p: float, top_k: float,
        repetition: float, max_tokens: float, seed: float, request: gr.Request,
    ) -> AsyncIterator[list[Any]]:  # fmt: skip
        text = (text or "").strip()[:_MAX_PROMPT_CHARS]
        if not text:
            yield ["", talks, *self._views(talks), *[""] * len(talks)]
            return
        settings = ChatSettings(
            temperature, top_p, int(top_k), repetition, int(max_tokens), None if seed < 0 else int(seed)
        )
        for talk in talks:
            talk.system = (system or "").strip()  # an untouched field is None
            talk.ask(text)
        tab = str(request.session_hash)
        self._stop(tab)
        current = self._rounds[tab] = _Round([_Pane() for _ in talks])
        current.tasks = [
            asyncio.create_task(_fill(pane, backend, talk, settings, current.news))
            for pane, backend, talk in zip(current.panes, self._backends, talks, strict=True)
        ]
        try:
            while not all(task.done() for task in current.tasks):
                yield ["", talks, *self._views(talks, current.panes), *[p.status for p in current.panes]]
                await current.news.wait()
                current.news.clear()
                await asyncio.sleep(0.05)  # at most 20 updates a second
        finally:
            current.stop()
            if self._rounds.get(tab) is current:
                del self._rounds[tab]
        if current.outcome is not None:
            yield current.outcome
            return
        for talk, pane in zip(talks, current.panes, strict=True):
            if pane.text:
                talk.answered(pane.text)
            else:
                talk.undo()
        failed = all(pane.failed for pane in current.panes)
        yield [text if failed else "", talks, *self._views(talks), *[p.status for p in current.panes]]

    def _views(self, talks: list[Conversation], panes: Sequence[_Pane] = ()) -> list[list[dict[str, str]]]:
        views = [[{**m, "content": shown(m["content"])} for m in talk.messages] for talk in talks]
        for view, pane in zip(views, panes, strict=False):
            view.append({"role": "assistant", "content": shown(pane.text) or "…"})
        return views

    def _stop(self, tab: str, outcome: list[Any] | None = None) -> None:
        """End the tab's round; with `outcome`, that is what the page shows then, and the answer is forgotten."""
        running = self._rounds.get(tab)
        if running:
            running.outcome = outcome
            running.stop()

    def build(self) -> tuple[gr.Blocks, gr.I18n]:
        """The page and its words in the languages it knows."""
        words = gr.I18n(**_WORDS)
        names = [backend.name for backend in self._backends]
        with gr.Blocks(title=" · ".join(names), analytics_enabled=False, fill_width=False) as page:
            talks = gr.State([Conversation() for _ in names], time_to_live=_SESSION_S)
            with gr.Row():
                views, speeds = [], []
                for name in names:
                    with gr.Column():
                        views.append(
                            gr.Chatbot(
                                label=name,
                                height="55vh",
                                buttons=["copy"],
                                allow_tags=False,
                                allow_file_downloads=False,
                                feedback_options=None,
                                latex_delimiters=[],
                            )
                        )
                        speeds.append(gr.HTML("", elem_classes="speed"))
            prompt = gr.Textbox(
                label=words("prompt"), placeholder=words("hint"), lines=1, max_lines=8,  # with more lines Enter does not send
                max_length=_MAX_PROMPT_CHARS, autofocus=True, elem_id="prompt",
            )  # fmt: skip
            with gr.Row():
                send = gr.Button(words("send"), variant="primary", elem_id="send")
                stop = gr.Button(words("stop"), variant="stop", elem_id="stop")
                undo = gr.Button(words("undo"), elem_id="undo")
                clear = gr.Button(words("clear"), elem_id="clear")
            with gr.Accordion(words("parameters"), open=False):
                system = gr.Textbox(label=words("system"), lines=2, max_length=_MAX_PROMPT_CHARS)
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0.7, step=0.05, label=words("temperature"))
                    top_p = gr.Slider(0.05, 1, 1, step=0.05, label=words("top_p"))
                    top_k = gr.Slider(0, 200, 0, step=1, label=words("top_k"))
                with gr.Row():
                    repetition = gr.Slider(0.8, 2, 1, step=0.05, label=words("repetition"))
                    max_tokens = gr.Slider(1, 4096, 512, step=1, label=words("max_tokens"))
                    seed = gr.Number(-1, precision=0, label=words("seed"))

            def stop_tab(request: gr.Request) -> None:
                self._stop(str(request.session_hash))

            def undo_turn(talks: list[Conversation], request: gr.Request) -> list[Any]:
                texts = [talk.undo() for talk in talks]
                outcome = [texts[0] or "", talks, *self._views(talks), *[""] * len(names)]
                self._stop(str(request.session_hash), outcome)
                return outcome

            def clear_all(request: gr.Request) -> list[Any]:
                fresh = [Conversation() for _ in names]
                outcome = ["", fresh, *self._views(fresh), *[""] * len(names)]
                self._stop(str(request.session_hash), outcome)
                return outcome

            inputs = [prompt, talks, system, temperature, top_p, top_k, repetition, max_tokens, seed]
            outputs = [prompt, talks, *views, *speeds]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            for trigger in (send.click, prompt.submit):
                trigger(self._send, inputs, outputs, concurrency_limit=16, **quiet)
            stop.click(stop_tab, None, None, queue=False, **quiet)
            undo.click(undo_turn, [talks], outputs, queue=False, **quiet)
            for cleared in (clear.click, *[view.clear for view in views]):
                cleared(clear_all, None, outputs, queue=False, **quiet)
            page.unload(stop_tab)
        return page, words


class _Policy:
    """Adds the content policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, send_with_policy)


def create_page(backends: Sequence[Backend], config: ServeConfig) -> FastAPI:
    """An app with the page at /. Behind the same gate as the API: loopback Host and Origin, small JSON bodies."""
    page, words = Page(backends).build()
    page.queue(api_open=False, max_size=64)
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app: FastAPI = gr.mount_gradio_app(
        outer, page, path="/", footer_links=[], allowed_paths=[], show_error=False, max_file_size=0, ssr_mode=False,
        enable_monitoring=False, pwa=False, i18n=words, mcp_server=False, theme=theme, css=_CSS,
    )  # fmt: skip
    app.add_middleware(_Policy)

    def gate(inner: ASGIApp) -> Gate:
        return Gate(inner, config, lambda route, status, seconds: None)

    app.add_middleware(gate)  # type: ignore[arg-type]
    return app
