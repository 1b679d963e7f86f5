"""The terminal chat: input, streaming output, commands. Talks to a Backend; the same for an engine and for a server."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import HTML
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.markup import escape

from convert.errors import TmqError
from serve.chat.backends import Backend
from serve.chat.conversation import Conversation
from serve.chat.settings import ChatSettings
from serve.chat.terminal import WordWrap, deaf_keyboard, piped_text, printable

COMMANDS = {
    "/help": "this list",
    "/system [TEXT]": "show or set the system text",
    "/regen": "answer the last message again",
    "/undo": "take the last message and its answer back",
    "/clear": "start over, with the same system text",
    "/stats": "tokens and speed so far",
    "/save FILE": "write the conversation to FILE",
    "/load FILE": "go on with a conversation from FILE",
    "/exit": "leave (also Ctrl-D)",
}
KEYS = "Enter sends, Alt-Enter or Ctrl-J starts a new line, Ctrl-C stops an answer, Ctrl-D leaves"


@dataclass
class Tally:
    """What was generated so far. `decode_s` runs from the first token of each answer to its last."""

    answers: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0


class Chat:
    """One conversation in a terminal."""

    def __init__(self, backend: Backend, settings: ChatSettings, console: Console, system: str = "") -> None:
        self._backend, self._settings, self._console = backend, settings, console
        self.conversation = Conversation(system)
        self.tally = Tally()

    async def answer(self) -> str:
        """Stream the answer to the conversation, show its speed, and return its text. Ctrl-C keeps what has come."""
        start, first, last = time.monotonic(), 0.0, 0.0
        texts: list[str] = []
        tokens = prompt_tokens = 0
        reason: str | None = None
        wrap = WordWrap(self._console.file, self._console.width if self._console.is_terminal else None)
        try:
            with self._console.status("thinking", spinner_style="dim") as status:
                async with aclosing(
                    self._backend.answer(self.conversation.prompt(), self._settings)
                ) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        if piece.text:
                            if not first:
                                status.stop()
                                first = time.monotonic()
                            last = time.monotonic()
                            texts.append(piece.text)
                            wrap.write(printable(piece.text))
                        tokens = max(tokens, piece.completion_tokens)
                        prompt_tokens = max(prompt_tokens, piece.prompt_tokens)
                        reason = piece.finish_reason or reason
        except asyncio.CancelledError:
            reason = "stopped"
        self._tell(start, first, last, prompt_tokens, tokens, reason)
        return "".join(texts)

    def _tell(
        self, start: float, first: float, last: float, prompt_tokens: int, tokens: int, reason: str | None
    ) -> None:
        tally = self.tally
        tally.answers += 1
        tally.prompt_tokens += prompt_tokens
        tally.tokens += tokens
        speed = ""
        if first and tokens > 1:
            tally.decode_tokens += tokens - 1
            tally.decode_s += last - first
            speed = (
                f", {(tokens - 1) / max(last - first, 1e-9):.1f} tokens/s, first after {first - start:.2f} s"
            )
        ends = {"length": " · cut at the limit of tokens", "stopped": " · stopped"}
        self._console.print(f"\n[dim]{tokens} tokens{speed}{ends.get(reason or '', '')}[/dim]\n")

    async def once(self, text: str) -> None:
        """Answer one message, its text alone to the output: for input that is no terminal. Raises TmqError where it fails."""
        self.conversation.ask(text)
        wrap = WordWrap(self._console.file, None)
        try:
            async with aclosing(self._backend.answer(self.conversation.prompt(), self._settings)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    wrap.write(printable(piece.text))
        finally:
            if wrap.begun:
                self._console.out("")

    async def run(self, history: History) -> None:
        """Read, answer, repeat, until the user leaves."""
        self._welcome()
        prompt = _prompt_session(history)
        while True:
            try:
                text = (await prompt.prompt_async()).strip()
            except KeyboardInterrupt:
                continue
            except EOFError:
                return
            if not text:
                continue
            if text.startswith("/") and not text.startswith("//"):
                if not await self._command(*_split(text)):
                    return
            else:
                await self._turn(text.removeprefix("/") if text.startswith("//") else text)

    async def _turn(self, text: str) -> None:
        """One question and its answer; where it fails the question is taken back, and Up brings its text."""
        self.conversation.ask(text)
        task = asyncio.create_task(self.answer())
        try:
            with deaf_keyboard(), _interrupt_calls(task.cancel):
                answer = await task
        except TmqError as error:
            self.conversation.undo()
            self._complain(str(error))
            return
        except asyncio.CancelledError:  # before the answer had begun
            self.conversation.undo()
            return
        if answer:
            self.conversation.answered(answer)
        else:
            self.conversation.undo()

    async def _command(self, name: str, argument: str) -> bool:
        """Do one command; False means leave."""
        talk, console = self.conversation, self._console
        try:
            match name:
                case "/exit" | "/quit":
                    return False
                case "/help":
                    for usage, meaning in COMMANDS.items():
                        console.print(f"  [bold]{escape(usage):<16}[/bold] {meaning}", highlight=False)
                    console.print(f"[dim]{KEYS}[/dim]\n", highlight=False)
                case "/system":
                    if argument:
                        talk.system = argument
                    console.print(f"[dim]system:[/dim] {escape(printable(talk.system)) or '(none)'}\n")
                case "/regen" | "/undo":
                    text = talk.undo()
                    if text is None:
                        self._complain("There is no message yet.")
                    elif name == "/regen":
                        await self._turn(text)
                    else:
                        console.print(f"[dim]taken back:[/dim] {escape(printable(text))}\n")
                case "/clear":
                    talk.messages.clear()
                    console.print("[dim]A new conversation.[/dim]\n")
                case "/stats":
                    self._show_stats()
                case "/save":
                    path = _path(argument)
                    talk.save(path, self._backend.name)
                    console.print(f"[dim]saved to[/dim] {escape(str(path))}\n")
                case "/load":
                    self.conversation = Conversation.load(_path(argument))
                    self._replay()
                case _:
                    self._complain(
                        f"There is no command {name}; /help lists them. A message may begin with //."
                    )
        except TmqError as error:
            self._complain(str(error))
        return True

    def _welcome(self) -> None:
        context = f", context {self._backend.context_length} tokens" if self._backend.context_length else ""
        self._console.print(f"[bold]{escape(self._backend.name)}[/bold][dim]{context}[/dim]", highlight=False)
        self._console.print(f"[dim]{KEYS}. /help lists commands.[/dim]\n", highlight=False)

    def _replay(self) -> None:
        for message in self.conversation.messages:
            mark = "[bold cyan]>[/bold cyan] " if message["role"] == "user" else ""
            self._console.print(f"{mark}{escape(printable(message['content']))}\n", highlight=False)

    def _show_stats(self) -> None:
        tally = self.tally
        rows = {
            "model": printable(self._backend.name),
            "messages": len(self.conversation.messages),
            "answers": tally.answers,
            "prompt tokens": tally.prompt_tokens,
            "generated tokens": tally.tokens,
            "tokens per second": f"{tally.tokens_per_s:.1f}",
        }
        for label, value in rows.items():
            self._console.print(f"  [dim]{label:<18}[/dim] {escape(str(value))}", highlight=False)
        self._console.print()

    def _complain(self, message: str) -> None:
        self._console.print(f"[red]{escape(printable(message))}[/red]\n", highlight=False)


def _split(text: str) -> tuple[str, str]:
    name, _, argument = text.partition(" ")
    return name.strip(), argument.strip()


def _path(argument: str) -> Path:
    if not argument:
        raise TmqError("A file name is missing, as in /save talk.json.")
    return Path(argument).expanduser()


@contextmanager
def _interrupt_calls(function: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C calls `function` and nothing else."""
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, function)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)


def _prompt_session(history: History) -> PromptSession[str]:
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    names = [usage.split()[0] for usage in COMMANDS]
    session: PromptSession[str] = PromptSession(
        HTML("<b><ansicyan>&gt; </ansicyan></b>"),
        multiline=True,
        key_bindings=keys,
        history=history,
        prompt_continuation=lambda width, line, wrapped: "  ",
        completer=WordCompleter(names, sentence=True),
        complete_while_typing=Condition(lambda: session.default_buffer.text.startswith("/")),
    )
    return session


def open_history(path: Path) -> History:
    """Input history in a file that only the user reads; in memory where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


async def chat(backend: Backend, settings: ChatSettings, system: str, history_file: Path) -> None:
    """Talk in the terminal; where the input is no terminal, answer it as one message."""
    console = Console(highlight=False)
    talk = Chat(backend, settings, console, system)
    if sys.stdin.isatty():
        await talk.run(open_history(history_file))
    else:
        text = piped_text().strip()
        if text:
            await talk.once(text)
