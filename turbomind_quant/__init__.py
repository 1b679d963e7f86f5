"""The front door: a Python library, and in `cli` the commands that translate flags into calls of it."""
