"""The border of each format that strangers write: whatever its reader stumbles over becomes the named error of bad input.

Readers say what is wrong where they can. This stands around them for the rest: a shape of data that nobody thought of, or a panic
of a library in Rust, which is no `Exception`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from convert.errors import InputError, TmqError
from convert.folder.json_files import show


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around the reading of `what` (a file's name, for the message); also a decorator.

    Raises InputError for every failure of its content. Errors of ours, of the disk (OSError) and of memory pass as they are.
    """
    try:
        yield
    except (TmqError, OSError, MemoryError):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust: derived from BaseException
        if not isinstance(error, Exception) and not is_panic:
            raise
        raise InputError(
            f"{show(what)} is damaged: its content is not what such a file holds ({type(error).__name__}: {show(str(error), 160)}). "
            "Copy it again from the source."
        ) from error
