"""Ending early: a terminated program ends like an interrupted one, so that what is half-written goes away."""

import signal
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

INTERRUPTED = 130  # the exit code


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Turns SIGTERM into KeyboardInterrupt while it lasts (in the main thread; elsewhere it does nothing)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def background() -> Iterator[ThreadPoolExecutor]:
    """A thread for work on the side; an interrupt does not wait for it."""
    executor = ThreadPoolExecutor(max_workers=1)
    interrupted = False
    try:
        yield executor
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        executor.shutdown(wait=not interrupted, cancel_futures=interrupted)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt
