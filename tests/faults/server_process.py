"""A server process around a fake engine, for tests of signals and exit codes. Arguments: port-file, drain seconds, delay of a token,
"block" for an event loop that stands still."""

import os
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[level]) for level in (2, 1)
]  # packages, then test modules

from fake_engine import FakeEngine, FakeTokenizer  # noqa: E402

import serve.http.watchdog  # noqa: E402
from serve.config import ServeConfig  # noqa: E402
from serve.http.server import bind, serve_forever, set_up_logging  # noqa: E402


class MortalEngine(FakeEngine):
    """Dies when a prompt of 13 tokens comes: "hello"."""

    def submit(self, request):  # type: ignore[no-untyped-def]
        if len(request.prompt_ids) == 13:
            self.dead = True
        return super().submit(request)


class BlockingEngine(FakeEngine):
    """Its figures are read on the event loop every quarter of a second, and soon never come."""

    def stats(self):  # type: ignore[no-untyped-def]
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > 4:
            block_the_loop()
        return super().stats()


def block_the_loop() -> None:
    time.sleep(1000)


def main() -> int:
    port_file, drain_s, delay_s = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    set_up_logging("info")
    config = ServeConfig(server_port=0, drain_s=drain_s)
    listener = bind(config)
    temp = port_file.with_suffix(".part")
    temp.write_text(str(listener.getsockname()[1]))
    os.replace(temp, port_file)
    if sys.argv[4:] == ["block"]:
        serve.http.watchdog.LIMIT_S = 1.0
        return serve_forever(BlockingEngine(), FakeTokenizer(), config, listener)
    return serve_forever(MortalEngine(delay_s), FakeTokenizer(), config, listener)


if __name__ == "__main__":
    sys.exit(main())
