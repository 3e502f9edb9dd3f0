"""What training says to its user. Each message is one line, for printing without a traceback."""


class InputError(ValueError):
    """A setting, a path or a file that does not fit. The message names it and says what fits."""


class Diverged(RuntimeError):
    """A loss or a gradient is no longer finite. The message names the step and what is kept of the run."""


class Interrupted(Exception):
    """Ctrl-C, after the step was finished and saved. The message names the step and what is kept of the run."""
