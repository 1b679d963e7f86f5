"""The bounded template language: what attacks of one operation do, and that ordinary templates render as transformers renders them."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from convert.errors import InputError
from convert.tokenizer import sandbox
from convert.tokenizer.chat_template import ChatTemplate

ROOT = Path(__file__).parents[3]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": "What's 1 + 1?\tSay <it> & \"quote\" é 你好"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "a1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None, True]}}}]},
    {"role": "tool", "name": "add", "tool_call_id": "a1", "content": "2"},
    {"role": "assistant", "content": "<think>hm</think>Two.", "reasoning_content": "hm"},
    {"role": "user", "content": "Thanks"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array"}}, "required": ["a"]}}}]  # fmt: skip

ATTACKS = {
    "power": "{% set x = 9 ** 9 %}{{ 9 ** x }}",
    "power-of-power": "{{ 2 ** 100000000000 }}",
    "product": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "repeat": "{{ 'a' * 2000000000 }}",
    "repeat-turned": "{{ 2000000000 * 'a' }}",
    "repeat-list": "{{ ([1] * 2000000000)|length }}",
    "percent": "{{ ('%2000000000d' % 1)|length }}",
    "percent-star": "{{ ('%*d' % (2000000000, 1))|length }}",
    "percent-precision": "{{ ('%.2000000000f' % 1.0)|length }}",
    "format-filter": "{{ ('%2000000000d'|format(1))|length }}",
    "format-method": "{{ ('{:2000000000d}'.format(1))|length }}",
    "format-nested": "{{ ('{:{}}'.format(1, 2000000000))|length }}",
    "format-many": "{{ ('{0}' * 1000000).format('a' * 1000000)|length }}",
    "format-map": "{{ '{a:2000000000}'.format_map({'a': 1}) }}",
    "center": "{{ 'a'.center(2000000000)|length }}",
    "center-filter": "{{ 'a'|center(2000000000)|length }}",
    "ljust": "{{ 'a'.ljust(2000000000)|length }}",
    "zfill": "{{ 'a'.zfill(2000000000)|length }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(2000000000)|length }}",
    "indent": "{{ ('a\n' * 100000)|indent(2000000000)|length }}",
    "indent-lines": "{{ ('a\n' * 1000000)|indent(9000)|length }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000)|length }}",
    "replace-filter": "{{ ('a' * 1000000)|replace('a', 'b' * 1000000)|length }}",
    "replace-nothing": "{{ ('a' * 1000000)|replace('', 'b' * 1000000)|length }}",
    "join": "{{ (['a' * 1000000] * 100000)|join|length }}",
    "join-method": "{{ ('b' * 1000000).join(['a'] * 100000)|length }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling-plus": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling-list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested-written": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested-string": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|string|length }}",
    "nested-json": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson|length }}",
    "nested-joined": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ (ns.x ~ '')|length }}",
    "nested-compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "nested-test": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x is eq ns.y }}",
    "json-indent": "{{ messages|tojson(indent=2000000000)|length }}",
    "round": "{{ 1.5|round(2000000000) }}",
    "round-up": "{{ 1.5|round(200000000, 'ceil') }}",
    "batch": "{{ [1]|batch(2000000000, 'x')|list|length }}",
    "slice": "{{ [1]|slice(2000000000)|list|length }}",
    "int-base": "{{ ('f' * 10000000)|int(0, 16) }}",
    "range": "{{ range(2000000000)|list|length }}",
    "sum-of-lists": "{{ ([[1] * 1000] * 100000)|sum(start=[])|length }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "generators": "{{ range(99999)|map('string')|map('upper')|map('length')|sum }}{% for i in range(99999) %}"
    "{{ range(99999)|map('string')|map('upper')|map('length')|sum }}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "block": "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}{% endset %}",
    "kept": "{% set ns = namespace(x=[]) %}{% for a in range(99999) %}{% set ns.x = ns.x + ['a' * 10000000] %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "sums": "{{ " + "1+" * 20000 + "1 }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 1000000})|length }}",
    "bytes": "{{ 1 .to_bytes(2000000000, 'big')|length }}",
    "date": "{{ strftime_now('%2000000000d') }}",
    "lipsum": "{{ lipsum(2000000000) }}",
    "urlize": "{{ ('http://' * 100000)|urlize|length }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_H81_one_operation_takes_neither_time_nor_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refused while the interpreter stays its own master: no operation is long, none takes a gigabyte."""
    monkeypatch.setattr("convert.tokenizer.chat_template.TIME_LIMIT_S", 1.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(ATTACKS[name], {}, {}).render(MESSAGES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KiB


def test_H81_no_operation_is_long() -> None:
    """Another thread of the process gets its turn all the time, which one long operation in C would take from it."""
    code = (
        "import sys, threading, time\n"
        "sys.path.insert(0, 'tests/convert/tokenizer')\n"
        "from test_sandbox import ATTACKS, MESSAGES\n"
        "from convert.errors import InputError\n"
        "import convert.tokenizer.chat_template as module\n"
        "module.TIME_LIMIT_S = 0.2\n"
        "cpu, turns, done = [], 0, False\n"
        "def watch():\n"
        "    last = time.process_time()\n"
        "    while not done:\n"
        "        time.sleep(0.001)\n"
        "        now = time.process_time(); cpu.append(now - last); last = now\n"
        "thread = threading.Thread(target=watch); thread.start()\n"
        "for source in ATTACKS.values():\n"
        "    try: module.ChatTemplate(source, {}, {}).render(MESSAGES)\n"
        "    except InputError: pass\n"
        "done = True; thread.join(); print(max(cpu))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert (
        float(done.stdout) < 2.0
    )  # seconds of the process between two turns, which a busy machine does not change


QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n<think>' + reasoning_content.strip('\\n') + '</think>' + content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""

ORDINARY = {
    "qwen": QWEN,
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "macro": "{% macro turn(m, mark='#') -%}\n{{ mark * 2 }} {{ m['role']|upper }}: {{ m['content']|trim }}\n{%- endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, mark='-') }}{% endfor %}{{ bos_token }}",
    "filters": "{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages|rejectattr('tool_calls', 'defined')|map(attribute='content')|join(', ') }}{{ (messages|first).role|title }}"
    "{{ (messages|last)['content']|capitalize|replace('T', 't')|indent(4, true) }}{{ [3, 1, 2]|sort|reverse|list }}{{ -3|abs }}"
    "{{ {'b': 1, 'a': [2]}|dictsort }}{{ {'b': 1}.items()|list }}{{ ['a', 'a']|unique|list }}{{ 3.7|round|int }}{{ '5'|int + 2 }}"
    "{{ none|default('d') }}{{ ''|default('e', true) }}{{ 'a b c'.split()|length }}{{ [[1, 2], [3]]|sum(start=[]) }}{{ 'x'|string }}",
    "json": "{{ tools|tojson }}{{ tools|tojson(indent=4) }}{{ messages[2].tool_calls[0].function|tojson(ensure_ascii=true) }}"
    "{{ messages[1].content|tojson }}{{ {'z': 1, 'a': 2}|tojson(sort_keys=true) }}",
    "loops": "{% for m in messages %}{% if loop.index is divisibleby 2 %}{% continue %}{% endif %}{% if loop.index > 5 %}{% break %}"
    "{% endif %}{{ loop.index0 }}/{{ loop.length }}{{ loop.previtem.role if loop.previtem is defined }}{% else %}none{% endfor %}"
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k ~ '=' ~ v }};{% endfor %}{% for i in range(3) %}{{ loop.cycle('x', 'y') }}{% endfor %}",
    "tests": "{{ messages is iterable }}{{ x is defined }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ 1 is number }}{{ none is none }}"
    "{{ 'user' in messages|map(attribute='role') }}{{ 1 == 1.0 }}{{ [1, 2] < [1, 3] }}{{ 3 > 2 > 1 }}{{ 'a' != 'b' and not false }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 1 / 4 }}{{ 10 - 3 * 2 }}{{ '%s-%05.1f' % ('a', 2.345) }}{{ '{:>6}|{a}'.format('x', a=1) }}"
    "{{ '%s' | format('y') }}{{ 'ab' * 3 }}{{ [0] * 3 }}{{ [1] + [2] }}{{ (1, 2) + (3,) }}{{ 5|float }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}{% endif %}{% endfor %}",
    "blocks":
    "{% set x %}in {{ messages[0].role }}{% endset %}{{ x|upper }}{% filter lower %}ABC{% endfilter %}{% raw %}{{ x }}{% endraw %}",
    "methods": "{{ messages[1].content.upper().lower().strip().replace('1', 'one').startswith('w') }}{{ 'a,b'.split(',')[1] }}"
    "{{ 'abc'[::-1] }}{{ 'x'.join(['1', '2']) }}{{ 'a'.ljust(3, '.') }}{{ {'a': 1}.get('b', 2) }}{{ 'é'.isalpha() }}{{ 'abc'.find('c') }}",
    "namespace": "{% set ns = namespace(found=false, text='') %}{% for m in messages %}{% if m.role == 'tool' %}{% set ns.found = true %}"
    "{% endif %}{% set ns.text = ns.text ~ m.role[0] %}{% endfor %}{{ ns.found }}{{ ns.text }}{{ dict(a=1, b=2)|tojson }}",
    "trim": "  {% if true %}  \n  a\n  {% endif %}  \n\n{#- note -#}\n b {%- if false %}c{% endif -%}  \n d",
    "reasoning": "{% for m in messages %}{% if m.thinking is defined %}{{ m.thinking }}{% endif %}{{ m.reasoning_content or '' }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_templates_render_as_transformers_renders_them(
    name: str, tools: list[dict[str, Any]] | None, generation: bool
) -> None:
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=ORDINARY[name], tools=tools, add_generation_prompt=generation,
        enable_thinking=False, **variables,
    )  # fmt: skip
    ours = ChatTemplate(ORDINARY[name], {}, variables).render(
        MESSAGES, generation, tools, {"enable_thinking": False}
    )
    assert ours == theirs[0]


def test_what_a_template_reads() -> None:
    template = ChatTemplate(QWEN, {}, {})
    assert template.reads("tools") and template.reads("enable_thinking")
    assert not template.reads("reasoning_effort") and not template.reads("message")


def test_a_long_conversation_is_looked_at_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand messages of a kilobyte, with tools. Looking into all of them at each operation would take minutes."""
    looked = 0

    def counted(value: Any) -> int:
        nonlocal looked
        looked += size(value)
        return size(value)

    size = sandbox.size
    monkeypatch.setattr(sandbox, "size", counted)
    monkeypatch.setattr("convert.tokenizer.chat_template.TIME_LIMIT_S", 500.0)
    turns = [{"role": ("user", "assistant")[i % 2], "content": "word " * 200} for i in range(1000)]
    text = ChatTemplate(QWEN, {}, {}).render(turns, True, TOOLS)
    assert text.count("<|im_end|>") == 1001 and looked < 20 * len(text)
