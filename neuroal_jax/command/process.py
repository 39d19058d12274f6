"""The process of a program, from its first moment on: its streams, its signals, its exit code.

Quick to import: it comes before all that a program needs.
"""

import atexit
import io
import os
import signal
import sys
import threading
import warnings
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from neuroal_jax.errors import UserError
from neuroal_jax.machine.interrupts import INTERRUPTED, SIGNALS, interrupts


def as_process(module: str) -> NoReturn:
    """Imports a program's module, runs its `main` and ends the process with its exit code."""
    _mend_streams()
    atexit.register(_ignore_signals)  # first, so that it is last: Python then gives signals their defaults back
    threading.excepthook = _report_thread
    warnings.showwarning = _warn  # type: ignore[assignment]
    sys.unraisablehook = lambda lost: None  # what a destructor raises, when all that matters was said
    code = INTERRUPTED
    try:
        with interrupts() as state:
            code = _run(module)
            state.over = True
    except KeyboardInterrupt:  # in the moment before or after `run_program`
        print("interrupted", file=sys.stderr)
    _end(code)


def _run(module: str) -> int:
    import logging

    from neuroal_jax.command.program import run_program
    from neuroal_jax.machine.memory import refuse_small_address_space

    for library in ("absl", "asyncio"):  # they print what they raise too, with tracebacks
        logging.getLogger(library).setLevel(logging.CRITICAL)
    codes: list[int] = []

    def work() -> None:
        _check_directory()
        refuse_small_address_space()
        codes.append(import_module(module).main())

    try:
        return run_program(work) or codes[0]
    except SystemExit as end:  # of --help
        return run_program(lambda: None) if end.code in (None, 0) else 1


def _check_directory() -> None:
    """Raises UserError if the current directory, from which relative paths start, is not there any more."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f"the current directory cannot be used ({error.strerror}): change to another one") from error


def _end(code: int) -> NoReturn:
    """Ends the process; what it wrote is written, so that signals have nothing to stop any more."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    sys.stderr.flush()
    if code == INTERRUPTED:  # does not wait for the computation that goes on in other threads
        os._exit(code)
    sys.exit(code)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    print(f"a thread ended: {UserError(f'{failed.exc_type.__name__}: {failed.exc_value}')}", file=sys.stderr)


def _warn(message: Warning | str, *_: Any) -> None:
    print(f"warning: {UserError(str(message))}", file=sys.stderr)


def _mend_streams() -> None:
    """Makes stdin, stdout and stderr take what is written, whatever they are.

    One that is closed becomes /dev/null: the next file to be opened would take its number, and with it what libraries
    print. Characters that the terminal does not know are written as escapes.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
    if null > 2:
        os.close(null)
    else:  # one of the closed ones
        os.set_inheritable(null, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (stays open)
    sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.stdout, line_buffering=os.isatty(1))
    sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: object, line_buffering: bool) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", "utf-8")
    through = getattr(before, "write_through", False)
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding, "backslashreplace", None, line_buffering, write_through=through)


class _Stdout(io.FileIO):
    """Says once that it cannot be written; what is left in the buffers then goes nowhere."""

    def write(self, content: Any) -> int | None:  # type: ignore[override]
        """Writes bytes; raises BrokenPipeError where nobody reads any more, UserError for any other reason."""
        try:
            return super().write(content)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"stdout cannot be written ({error.strerror})") from error


class _Stderr(io.FileIO):
    """Drops what cannot be written: there is no other place to say so, and no reason to end a run."""

    def write(self, content: Any) -> int:
        """Writes bytes, or does not."""
        try:
            return super().write(content) or len(content)
        except OSError:
            return len(content)


# The programs of the installed package.
prune = partial(as_process, "neuroal_jax.prune")
convert = partial(as_process, "neuroal_jax.convert.hf_to_flax")
to_safetensors = partial(as_process, "neuroal_jax.convert.to_safetensors")
masks = partial(as_process, "neuroal_jax.convert.masks_to_torch")
perplexity = partial(as_process, "neuroal_jax.eval.perplexity")
zero_shot = partial(as_process, "neuroal_jax.eval.zero_shot")
generation = partial(as_process, "neuroal_jax.eval.generation")
sweep = partial(as_process, "neuroal_jax.eval.sweep")
