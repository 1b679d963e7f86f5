"""Servers whose model calls tools: a scripted engine with a real chat template, and helpers of the tests that talk to them."""

from dataclasses import replace
from typing import Any

from fake_engine import FakeEngine, FakeTokenizer
from live_server import LiveServer
from openai import OpenAI

from convert.tokenizer.chat_template import ChatTemplate

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["city", "days"], "additionalProperties": False}}}
    for name in ("weather", "train")
]  # fmt: skip
CALL = '{"name": "weather", "arguments": {"city": "Köln", "days": 2}}'
HERMES_TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t|tojson }}{% endfor %}</tools> Answer with <tool_call>.{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function|tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Template(FakeTokenizer):
    """A tokenizer with a real chat template."""

    has_chat_template = True

    def __init__(self, source: str) -> None:
        self.template = ChatTemplate(source, {}, {})

    def apply_chat_template(self, messages, add_generation_prompt=True, tools=None, variables=None):  # type: ignore[no-untyped-def]
        return self.encode_plain(
            self.template.render(messages, add_generation_prompt, tools, variables), False
        )


class Scripted(FakeEngine):
    """Says `script`, one character a token, and ends."""

    script = ""

    def word(self, request, index):  # type: ignore[no-untyped-def]
        return self.script[index]

    def submit(self, request):  # type: ignore[no-untyped-def]
        asked = min(request.sampling.max_tokens, max(1, len(self.script)))
        super().submit(replace(request, sampling=replace(request.sampling, max_tokens=asked)))
        return request.id

    async def events(self, request_id):  # type: ignore[no-untyped-def]
        async for event in super().events(request_id):
            yield replace(event, finish_reason="stop") if event.finish_reason == "length" else event


def client(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def prompt(server: LiveServer) -> str:
    return bytes(i - 10 for i in server.engine.requests[-1].prompt_ids).decode()
