"""GGUF files, read: weights, configuration and tokenizer."""
