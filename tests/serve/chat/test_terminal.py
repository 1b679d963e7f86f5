"""The terminal chat through a real pty: what a user types and sees."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from fake_engine import WORDS, FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from convert.errors import InputError, UsageError
from serve.chat.conversation import Conversation
from serve.chat.terminal import WordWrap, printable

ENTER, NEW_LINE, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"


class Terminal:
    """A program in a pty."""

    def __init__(self, folder: Path, delay_s: float = 0.001, max_tokens: int = 8) -> None:
        script = Path(__file__).with_name("chat_process.py")
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ |= {
                "PROMPT_TOOLKIT_NO_CPR": "1",
                "TERM": "xterm",
                "COLUMNS": "80",
                "LINES": "40",
                "LANG": "C.UTF-8",
            }
            os.execv(
                sys.executable,
                [sys.executable, str(script), str(delay_s), str(folder / "history"), str(max_tokens)],
            )
        self.seen = ""
        self.wait_for("/help lists commands")

    def read(self, timeout_s: float = 0.1) -> None:
        if select.select([self._fd], [], [], timeout_s)[0]:
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the other side is closed
                return
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", data.decode("utf-8", "replace"))

    def wait_for(self, text: str, count: int = 1, timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while self.seen.count(text) < count:
            assert time.monotonic() < end, f"{text!r} did not come; seen: {self.seen[-2000:]!r}"
            self.read()

    def wait_for_prompt(self, timeout_s: float = 30.0) -> None:
        """Until the input line is drawn; what is typed before it is not for it."""
        end = time.monotonic() + timeout_s
        while not self.seen.rstrip(" \r\n\b").endswith(">"):
            assert time.monotonic() < end, f"no prompt; seen: {self.seen[-500:]!r}"
            self.read()
        self.read(0.2)

    def type(self, text: str, wait_for: str = "", count: int = 1, early: bool = False) -> None:
        if not early:
            self.wait_for_prompt()
        self.seen = ""
        os.write(self._fd, text.encode())
        if wait_for:
            self.wait_for(wait_for, count)

    def end(self) -> int:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"the chat did not end; seen: {self.seen[-500:]!r}")


def answer_to(messages: list[dict[str, str]], count: int = 8) -> str:
    prompt = len(FakeTokenizer().apply_chat_template(messages))
    return "".join(WORDS[(prompt + i) % len(WORDS)] for i in range(count))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_conversation(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.type("hello" + ENTER, "8 tokens")
    first = answer_to([user("hello")])
    for part in first.split("\n"):
        assert part.strip() in terminal.seen
    assert "tokens/s" in terminal.seen and "cut at the limit" in terminal.seen
    terminal.type("one" + NEW_LINE + "two" + ENTER, "8 tokens")  # a message of two lines
    terminal.type(f"/save {tmp_path}/talk.json" + ENTER, "saved to")
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [m["content"] for m in saved["messages"]][::2] == ["hello", "one\ntwo"]
    assert saved["messages"][1]["content"] == first
    terminal.type("/undo" + ENTER, "taken back")
    terminal.type("/regen" + ENTER, "8 tokens")
    terminal.type("/system be kind" + ENTER, "system: be kind")
    terminal.type("/stats" + ENTER, "tokens per second")
    assert re.search(r"answers\s+3", terminal.seen) and re.search(r"messages\s+2", terminal.seen)
    terminal.type("/clear" + ENTER, "A new conversation")
    terminal.type(f"/load {tmp_path}/talk.json" + ENTER, "two")
    terminal.type("/load /nowhere/x.json" + ENTER, "cannot be read")
    terminal.type("/frobnicate" + ENTER, "There is no command /frobnicate")
    terminal.type("//literal" + ENTER, "8 tokens")
    terminal.type("/help" + ENTER, "Ctrl-D leaves")
    terminal.type("/exit" + ENTER)
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, delay_s=0.05, max_tokens=400)
    terminal.type("go" + ENTER, "world", 2)
    terminal.type("typed too early" + ENTER, early=True)
    terminal.type(CTRL_C, "stopped", early=True)
    assert "tokens/s" in terminal.seen
    terminal.type(CTRL_C)  # at the prompt it does nothing
    terminal.type(f"/save {tmp_path}/talk.json" + ENTER, "saved to")
    saved = json.loads((tmp_path / "talk.json").read_text("utf-8"))["messages"]
    assert saved[0] == user("go") and len(saved) == 2
    assert answer_to([user("go")], 400).startswith(saved[1]["content"])  # what had come is kept
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def test_history_survives(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    terminal.type("remember me" + ENTER, "8 tokens")
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert (tmp_path / "history").stat().st_mode & 0o077 == 0
    again = Terminal(tmp_path)
    again.type(UP, "remember me")
    again.type(ENTER, "8 tokens", early=True)
    again.type(CTRL_D)
    assert again.end() == 0


def test_a_pipe_gets_the_answer_alone(tmp_path: Path) -> None:
    script = Path(__file__).with_name("chat_process.py")
    command = [sys.executable, str(script), "0", str(tmp_path / "history"), "8"]
    done = subprocess.run(command, input="hi\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == answer_to([user("hi")]) + "\n"


@given(st.text(alphabet=st.sampled_from("ab 你\n🙂-"), max_size=120), st.integers(4, 20), st.data())
def test_wrapping_keeps_the_text_and_the_width(text: str, width: int, data: st.DataObject) -> None:
    file = StringIO()
    wrap = WordWrap(file, width)
    rest = text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        wrap.write(rest[:size])
        rest = rest[size:]
    screen = ""
    for character in file.getvalue().replace("\b \b", "\b"):
        screen = screen[:-1] if character == "\b" else screen + character
    assert all(cell_len(line) <= width for line in screen.split("\n"))
    assert screen.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_words_move_whole_to_the_next_line() -> None:
    file = StringIO()
    wrap = WordWrap(file, 12)
    for piece in ("the maj", "est", "ic lighthouse"):
        wrap.write(piece)
    screen = ""
    for character in file.getvalue().replace("\b \b", "\b"):
        screen = screen[:-1] if character == "\b" else screen + character
    assert screen.split("\n") == ["the majestic", "lighthouse"]


def test_models_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9b\x07\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\n\tc"


def test_conversation_files(tmp_path: Path) -> None:
    talk = Conversation("be kind", [user("hi"), {"role": "assistant", "content": "你好"}])
    talk.save(tmp_path / "t.json", "m")
    assert Conversation.load(tmp_path / "t.json") == talk
    talk.save(tmp_path / "t.json", "m")  # ours: may be written again
    (tmp_path / "other.txt").write_text("precious")
    with pytest.raises(UsageError, match="not a saved conversation"):
        talk.save(tmp_path / "other.txt", "m")
    assert (tmp_path / "other.txt").read_text() == "precious"
    for text in ("", "[]", '{"format": "tmq-chat-1", "system": ""}', "[" * 100_000,
                 '{"format": "tmq-chat-1", "system": "", "messages": [{"role": "tool", "content": ""}]}'):  # fmt: skip
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError):
            Conversation.load(tmp_path / "bad.json")
    assert talk.undo() == "hi" and talk.messages == [] and talk.undo() is None
