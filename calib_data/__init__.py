"""Text sources to token blocks, with seed and provenance. Never loads a model."""
