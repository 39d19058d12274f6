"""How every program ends: its exit code and, if something is wrong, one line on stderr. Imports no JAX."""

import logging
import sys
from collections.abc import Callable

from neuroal_jax.errors import UserError
from neuroal_jax.machine.interrupts import INTERRUPTED, USER_ERROR, Interrupts, interrupts
from neuroal_jax.machine.memory import exhaustion_explained

DONE = 0
CLOSED_PIPE = 141  # as of a process that SIGPIPE ended


def run_program(work: Callable[[], object], interrupted: str = "interrupted: nothing was written") -> int:
    """Runs a program's work.

    Args:
        work: What the program does; messages go to stdout.
        interrupted: What to say after an interrupt that does not say it itself.

    Returns:
        The exit code: 0 done, 2 user error, 130 interrupted, 141 nobody reads the output any more.
    """
    with interrupts() as signals:
        try:
            with exhaustion_explained("use a smaller model or text, or give it more memory"):
                work()
                if sys.stdout is not None:
                    sys.stdout.flush()
            return DONE
        except BaseException as error:
            signals.over = True
            return _ended(error, signals, interrupted)


def _ended(error: BaseException, signals: Interrupts, interrupted: str) -> int:
    """The exit code of what ended a program, after one line on stderr; raises what should not have happened."""
    if isinstance(error, KeyboardInterrupt) and signals.failed:
        error = UserError(str(error) or signals.note)
    elif isinstance(error, KeyboardInterrupt):
        print(f"interrupted: {error}" if str(error) else interrupted, file=sys.stderr)
        return INTERRUPTED
    elif signals.requested and not isinstance(error, SystemExit):  # what a library made of the interrupt
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, OSError):  # a full disk, a file that vanished
        file = "" if error.filename is None else f"{error.filename}: "
        error = UserError(f"{file}{error.strerror or error}")
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    raise error


class Messages(logging.StreamHandler):
    """Log messages on stdout, as plain lines; what goes wrong in writing them ends the program, logging would go on."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Lets the exception through; called while it is handled."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"stdout cannot be written ({error.strerror})") from error
        raise
