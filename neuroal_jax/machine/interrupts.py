"""Ending early: a signal that ends a program lets what is half-written go away first. Quick to import."""

import math
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

USER_ERROR, INTERRUPTED = 2, 130  # exit codes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONE_REQUEST = 2.0  # seconds: Ctrl-C reaches a group of processes, and a parent then terminates its children too
_AGAIN = 0.01  # seconds until an interrupt is repeated that could not be raised where it came
_IMPORT = "<frozen importlib._bootstrap>"


class Interrupts:
    """What the signals did so far.

    Attributes:
        requested: Whether one came.
        over: Whether the program is at its end anyway: signals are ignored then.
        note: What the interrupt says.
        failed: Whether it is an error of another process, not somebody's wish.
        signals: Those that are turned into it.
    """

    def __init__(self, base: types.FrameType | None = None) -> None:
        self.requested = self.over = self.failed = False
        self.note = ""
        self.signals: list[signal.Signals] = []
        self._base = base
        self._last = -math.inf

    def handle(self, number: int, frame: types.FrameType | None) -> None:
        """Raises KeyboardInterrupt, once for all signals that come together: cleaning up is not interrupted by them.

        Not inside of an import: what extension modules make of an exception there goes from tracebacks to crashes.
        """
        now = time.monotonic()
        if self.over or now - self._last < _ONE_REQUEST:
            return
        self._last, self.requested = now, True
        if self._imports(frame):
            self.repeat(number)
        else:
            raise KeyboardInterrupt(*filter(None, [self.note]))

    def repeat(self, number: int) -> None:
        """Sends a signal to the main thread again, in a moment."""

        def send() -> None:
            self._last = -math.inf
            signal.pthread_kill(threading.main_thread().ident or 0, number)

        timer = threading.Timer(_AGAIN, send)
        timer.daemon = True
        timer.start()

    def _imports(self, frame: types.FrameType | None) -> bool:
        """Whether a module is being imported, by what this program runs."""
        while frame is not None and frame is not self._base:
            if frame.f_code.co_filename == _IMPORT:
                return True
            frame = frame.f_back
        return False


_current: Interrupts | None = None


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """Turns Ctrl-C, SIGTERM and SIGHUP into KeyboardInterrupt while it lasts.

    Signals that the caller ignores (`nohup`) or handles stay as they are, and so do all but in the main thread. An
    interrupt is raised again that comes where Python can only report it, in a callback or a destructor, and where it
    would do harm, in an import.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Interrupts()
        return
    if _current is not None:
        yield _current
        return
    state = _current = Interrupts(sys._getframe(2))  # whoever enters this context
    ours = [n for n in SIGNALS if signal.getsignal(n) in (signal.SIG_DFL, signal.default_int_handler)]
    state.signals = ours
    before = {number: signal.signal(number, state.handle) for number in ours}
    report = sys.unraisablehook

    def unraisable(lost: "sys.UnraisableHookArgs") -> None:
        if state.requested and lost.exc_type is KeyboardInterrupt:
            state.repeat(ours[0])
        else:
            report(lost)

    sys.unraisablehook = unraisable
    try:
        yield state
    finally:
        _current = None
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(note: str, *, failed: bool = False, at_last: float | None = None) -> None:
    """Interrupts the program from another thread, as Ctrl-C would, unless it is being interrupted.

    Only where signals are turned into interrupts: whoever else runs this package is not disturbed.

    Args:
        note: What the interrupt says.
        failed: Whether the program ends as after a user error.
        at_last: Seconds after which the process ends where it stands, as the main thread may be in a long computation;
            None: for a program that has something to clean up.
    """
    state = _current
    if state is None or not state.signals or state.requested or state.over:
        return
    state.note, state.failed = note, failed
    if at_last is not None:

        def end() -> None:
            if state is _current and not state.over:  # whoever ran the program may go on
                print(f"{'error' if failed else 'interrupted'}: {note}", file=sys.stderr, flush=True)
                os._exit(USER_ERROR if failed else INTERRUPTED)

        timer = threading.Timer(at_last, end)
        timer.daemon = True
        timer.start()
    signal.pthread_kill(threading.main_thread().ident or 0, state.signals[0])


@contextmanager
def held(note: str) -> Iterator[None]:
    """Holds signals back until what must not be left half-done is done; then they count, and the interrupt says `note`.

    If that fails, its error says enough.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    ours = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        if _current is not None:
            _current.note = note
        signal.raise_signal(came[0])


@contextmanager
def background() -> Iterator["ThreadPoolExecutor"]:
    """A thread for work on the side; an error does not begin what waits there, an interrupt waits for nothing."""
    from concurrent.futures import ThreadPoolExecutor

    executor = ThreadPoolExecutor(max_workers=1)
    try:
        yield executor
    except BaseException as error:
        executor.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
        raise
    executor.shutdown()
