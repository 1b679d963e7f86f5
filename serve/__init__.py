"""Terminal chat, OpenAI-compatible server, client, web page; the `tmq` command. Never touches tensors."""
