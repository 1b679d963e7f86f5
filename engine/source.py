"""`ModelSource`: which model an engine is to load. Plain data, so that it can be sent to a child process; imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """What to load: the checkpoint at `path`, or random weights of a shape ("7b" or a config.json), "fp16" or "int4"."""

    path: str = ""
    random_weights: str | None = None
    weights: str = "fp16"
    group_size: int = 128
    family: str | None = None  # decides instead of config.json
    trust_remote_code: bool = False  # of a tokenizer that exists only as code
