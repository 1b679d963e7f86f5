"""The terminal chat on a fake engine, for tests through a pty. Arguments: seconds a token takes, history file."""

import asyncio
import sys
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[level]) for level in (3, 2)
]  # packages, then test modules

from fake_engine import FakeEngine, FakeTokenizer  # noqa: E402

from serve.chat.backends import EngineBackend  # noqa: E402
from serve.chat.loop import chat  # noqa: E402
from serve.chat.settings import ChatSettings  # noqa: E402

backend = EngineBackend(FakeEngine(float(sys.argv[1])), FakeTokenizer(), "fake")
settings = ChatSettings(max_tokens=int(sys.argv[3]))
asyncio.run(chat(backend, settings, "", Path(sys.argv[2])))
