"""From what a user names to an engine core with its tokenizer: in this process, or as rank 0 of a tensor-parallel group."""

from pathlib import Path

from convert.tokenizer.tokenizer import load_tokenizer
from engine.config import EngineConfig
from engine.loading import make_core, open_source
from engine.process.ranks import start_group
from engine.serving.core import EngineCore
from engine.serving.detokenize import NumberText, TextTools
from engine.source import ModelSource


def load_source(source: ModelSource, config: EngineConfig) -> EngineCore:
    """An engine on what `source` names, with its tokenizer; with config.tp > 1 on a group of ranks. Raises `convert.errors`."""
    ckpt = open_source(source, config)
    text: TextTools
    if source.random_weights is not None:
        text = NumberText()
    else:
        tokenizer = load_tokenizer(ckpt.tokenizer_dir, source.trust_remote_code)
        tokenizer.check_fits(ckpt.config.vocab_size)
        text = tokenizer
    name = Path(source.path).name if source.random_weights is None else ckpt.path.name
    if config.tp == 1:
        return make_core(ckpt, config, text, name=name)
    return EngineCore(
        start_group(source, config), config, text, name=name, eos_token_ids=ckpt.config.eos_token_ids
    )
