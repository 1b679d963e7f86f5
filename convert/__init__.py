"""Formats: checkpoints and workspaces in and out, model families as data, atomic files, error types. Never runs a model."""
