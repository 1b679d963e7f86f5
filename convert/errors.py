"""Error types of the whole program, one per exit code. A message says what was found, where, what was expected, what to do."""


class TmqError(Exception):
    """Base of all errors that a user can cause or cure. `exit_code` is what the command line returns."""

    exit_code = 70


class UsageError(TmqError):
    """Flags that contradict each other or do not apply."""

    exit_code = 2


class InputError(TmqError):
    """Bad input: a damaged, unsupported or contradictory file, text or folder."""

    exit_code = 3


class ResourceError(TmqError):
    """Not enough memory, disk or device, or a server that cannot answer."""

    exit_code = 4


class InterruptedRunError(TmqError):
    """Stopped before the end; the same command resumes."""

    exit_code = 5


UNVERIFIED = (
    6  # exit code of `quantize verify` where every check passes, but nothing says what the bytes should be
)
