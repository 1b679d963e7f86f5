"""How models write calls of tools, as far as we know: named by the text of their chat templates."""

HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3
LLAMA = "llama"  # {"name": ..., "parameters": {...}} as the whole answer: Llama 3.1 to 3.3
MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]: Mistral 7B v0.3, Nemo


def format_of(template: str) -> str | None:
    """The format that a chat template teaches its model; None for one that we do not read, such as Qwen3-Coder's XML."""
    if "<tool_call>" in template and "<function=" not in template and "<arg_key>" not in template:
        return HERMES
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template and "[CALL_ID]" not in template:
        return MISTRAL
    if ('"parameters"' in template and "<|eom_id|>" in template) or "ipython" in template:
        return LLAMA
    return None
