"""Tokenizers of every family as one type, and chat templates."""
