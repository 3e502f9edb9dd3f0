"""What training says to its user. Each message is one line, for printing without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals


class InputError(ValueError):
    """A setting, a path or a file that does not fit. The message names it and says what fits."""


class OutputError(RuntimeError):
    """A file of the run cannot be written: a full disk, say. The message names it and what is kept of the run."""


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite. The message names the step, the norms of the gradients and
    what is kept of the run."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the step was finished and saved. The message names the step and what is kept of the run."""

    def __init__(self, message: str, signal: Signals):
        super().__init__(message)
        self.signal = signal


def one_line(error: Exception) -> str:
    """What another library's `error` says, as a part of one of these messages."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Has an `OSError` raise `OutputError`, which names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror or error})") from error
