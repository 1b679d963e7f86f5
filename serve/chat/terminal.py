"""What a streaming answer needs of a terminal: wrapping at words while they grow, silence on the keyboard, no control codes."""

import io
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.cells import cell_len


def printable(text: str) -> str:
    """`text` without control characters other than newline and tab, so that a model cannot steer the terminal."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def piped_text() -> str:
    """All of an input that is no terminal; bytes that are no text, as of a character cut in two, become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin.read()


class WordWrap:
    """Writes text that comes in pieces; a word that outgrows its line is taken back and moved to the next one.

    `begun` says whether any text has been written.
    """

    def __init__(self, file: IO[str], width: int | None) -> None:
        self._file, self._width = file, width  # None: no terminal, no wrapping
        self.begun = False
        self._column = 0  # cells used on this line
        self._word = ""  # the word that stands at the end of this line

    def write(self, text: str) -> None:
        out = [text] if self._width is None else [self._place(character, self._width) for character in text]
        self.begun = self.begun or bool(text)
        self._file.write("".join(out))
        self._file.flush()

    def _place(self, character: str, width: int) -> str:
        if character == "\n":
            self._column, self._word = 0, ""
            return character
        character = " " if character == "\t" else character
        cells = cell_len(character)
        word_cells = cell_len(self._word)
        fits = self._column + cells <= width
        if cells == 2 or character == " ":  # a line may end at a space and beside every wide character
            if not fits:
                self._column, self._word = (0, "") if character == " " else (cells, "")
                return "\n" if character == " " else f"\n{character}"
            self._column, self._word = self._column + cells, ""
            return character
        if fits or word_cells == self._column:  # there is room, or the word is as long as the line
            broken = "" if fits else "\n"
            self._column = self._column + cells if fits else cells
            self._word = self._word + character if fits else character
            return broken + character
        moved = self._word + character
        erased = "\b \b" * word_cells
        self._column, self._word = cell_len(moved), moved
        return f"{erased}\n{moved}"


@contextmanager
def deaf_keyboard() -> Iterator[None]:
    """While an answer comes, keys do not show and are forgotten; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcflush(descriptor, termios.TCIFLUSH)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
