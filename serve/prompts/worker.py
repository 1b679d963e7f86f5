"""A process that encodes prompts: one job a line from standard input, one answer a line on standard output. Imports no torch.

Run as `python -m serve.prompts.worker`; the first line says which tokenizer. It is made to be killed: it holds nothing, bounds its
own memory, and sets an alarm that ends it where a job takes too long and nobody is left to kill it.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.errors import TmqError
from convert.tokenizer.tokenizer import Tokenizer, load_tokenizer
from serve.prompts.encoder import TemplateTraits, check_schema

MEMORY_BYTES = 1 << 30  # beyond what the tokenizer takes


def main() -> int:
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal sends it to the whole group; the server drains first
    first = json.loads(sys.stdin.readline())
    tokenizer = load_tokenizer(Path(first["folder"]), first["trust_remote_code"])
    _bound_memory()
    ready = {"vocab_size": tokenizer.vocab_size, "traits": asdict(TemplateTraits.of(tokenizer))}
    _write(pipe, ready)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, first["timeout_s"])  # its default action ends the process
        answer = _answer(tokenizer, line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(pipe, answer)
    return 0


def _answer(tokenizer: Tokenizer, line: str) -> dict[str, Any]:
    job = json.loads(line)
    try:
        if "pieces" in job:
            return {"pieces": [tokenizer.token_bytes(i).decode("latin-1") for i in job["pieces"]]}
        if "schema" in job:
            check_schema(tokenizer, job["schema"])
            return {"schema": True}
        if "text" in job:
            return {"ids": tokenizer.encode_plain(job["text"], job["add_bos"])}
        ids = tokenizer.apply_chat_template(
            job["messages"], tools=job["tools"] or None, variables=job["variables"]
        )
        return {"ids": ids}
    except TmqError as error:
        return {"error": str(error)}
    except Exception as error:
        print(f"a prompt failed: {type(error).__name__}", file=sys.stderr)
        return {"error": None}


def _write(pipe: Any, answer: dict[str, Any]) -> None:
    pipe.write(json.dumps(answer, separators=(",", ":")) + "\n")
    pipe.flush()


def _bound_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # not Linux, or a limit above the system's own
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    sys.exit(main())
