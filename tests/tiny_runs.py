"""A tiny Llama with a byte tokenizer and a chat template, a text, and the commands run on them as a user runs them."""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import tiny_models
import torch

# What the commands import when they are called: here once, so that a forked command starts at once.
import turbomind_quant.api.evaluation
import turbomind_quant.api.formats
import turbomind_quant.api.quantization
import turbomind_quant.api.speed
import turbomind_quant.cli.evaluate
import turbomind_quant.cli.quantize

COMMANDS = {
    "quantize": turbomind_quant.cli.quantize.quantize,
    "evaluate": turbomind_quant.cli.evaluate.evaluate,
}
LAYERS = 4
VOCAB = 264
FAST = ("--group-size", "32", "--samples", "4", "--seqlen", "32", "--device", "cpu")


def write_runnable(folder: Path, layers: int = LAYERS, seed: int = 3, **changes: object) -> Path:
    """A model folder that `quantize` and `evaluate` take: weights, config, tokenizer, template."""
    generator = torch.Generator().manual_seed(seed)
    one = {name: shape for name, shape in tiny_models.shapes("llama").items() if ".layers.1." not in name}
    tensors = {}
    for name, shape in one.items():
        copies = [name.replace(".0.", f".{i}.") for i in range(layers)] if ".layers.0." in name else [name]
        rows = (VOCAB, *shape[1:]) if shape[0] == tiny_models.VOCAB else shape
        for copy in copies:
            value = torch.randn(rows, generator=generator) * 0.15
            tensors[copy] = (value + 1.0 if len(rows) == 1 else value).half()
    tiny_models.write_model(
        folder,
        tensors=tensors,
        vocab_size=VOCAB,
        num_hidden_layers=layers,
        bos_token_id=256,
        eos_token_id=258,
        **changes,
    )
    (folder / "tokenizer.json").write_text(json.dumps(tiny_models.tokenizer_document()))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder


def write_text(path: Path, length: int = 6000, seed: int = 5) -> Path:
    """Words of random letters: enough tokens for any test here."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(0, 30, (length,), generator=generator).tolist()
    path.write_text("".join("abcdefghijklmnopqrstuvwxyz. ,\n"[i] for i in letters))
    return path


class Forked:
    """A `quantize` or `evaluate` command in a forked process: as a user's, without importing torch again.

    `prepare` runs in the child first. Its output goes to files, whose text `stdout` and `stderr` hold after `wait`.
    """

    def __init__(self, name: str, *arguments: object, prepare: Callable[[], object] | None = None) -> None:
        self._place = Path(tempfile.mkdtemp())
        self.stdout = self.stderr = ""
        self.returncode: int | None = None  # minus the signal's number, where one ended it
        self.pid = os.fork()
        if self.pid == 0:
            self._child(name, [str(part) for part in arguments], prepare)

    def _child(self, name: str, arguments: list[str], prepare: Callable[[], object] | None) -> NoReturn:
        code = 1
        try:
            for number, place in ((1, "out"), (2, "err")):
                handle = os.open(self._place / place, os.O_WRONLY | os.O_CREAT)
                os.dup2(handle, number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
            for number in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM):
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            torch.set_num_threads(1)
            os.environ["TMQ_CACHE"] = str(self._place / "cache")
            if prepare is not None:
                prepare()
            COMMANDS[name].main(arguments)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(code)

    def until(self, text: str, timeout: float = 60) -> None:
        """Wait until stderr holds this text, or the process has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self._place / "err"
            if found.is_file() and text in found.read_text():
                return
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                return
            time.sleep(0.005)

    def wait(self) -> "Forked":
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.stdout, self.stderr = ((self._place / part).read_text() for part in ("out", "err"))
            shutil.rmtree(self._place)
        return self


def run(name: str, *arguments: object, prepare: Callable[[], object] | None = None) -> Forked:
    """Run a command to its end."""
    return Forked(name, *arguments, prepare=prepare).wait()


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file, but report.json (the only one that may differ between equal runs)."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }
