"""The OpenAI-compatible server: app, gate, limits, life of the process."""
