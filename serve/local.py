"""A model on this machine, ready to talk: its tokenizer here, its engine in a process of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.readers import open_checkpoint
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer
from engine.config import EngineConfig
from engine.process.parent import ProcessEngine
from engine.source import ModelSource
from serve.prompts.pool import WorkerPool


@dataclass(frozen=True)
class LocalModel:
    """An engine that is loaded, and the tokenizer of its checkpoint."""

    engine: ProcessEngine
    tokenizer: Tokenizer
    name: str
    tokenizer_dir: Path
    trust_remote_code: bool

    def worker_pool(self) -> WorkerPool:
        """The tokenizer in processes of its own, for a server."""
        return WorkerPool(self.tokenizer_dir, self.tokenizer.vocab_size, self.trust_remote_code)


@contextmanager
def open_model(source: ModelSource | str, config: EngineConfig) -> Iterator[LocalModel]:
    """Load the checkpoint of `source` (any format that open_checkpoint reads); the engine ends with the block.

    Must be called from the main thread, which the engine's process lives as long as.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    source = ModelSource(source) if isinstance(source, str) else source
    ckpt = open_checkpoint(source.path, family=source.family)
    tokenizer = load_tokenizer(ckpt.tokenizer_dir, source.trust_remote_code)
    ckpt.notes += [note for note in tokenizer.notes if note not in ckpt.notes]
    tokenizer.check_fits(ckpt.config.vocab_size)
    with ProcessEngine.start(source, config) as engine:
        name = engine.stats().model or Path(source.path).name
        yield LocalModel(engine, tokenizer, name, Path(ckpt.tokenizer_dir), source.trust_remote_code)
