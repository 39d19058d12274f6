"""How far a run is, and how long its phases took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock, get_ident
from types import TracebackType
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.walk.blocks import Advance


@dataclass(frozen=True)
class Progress:
    """How far one stage of a run is. A run goes through several, one after the other, each from 0 to `total`.

    Attributes:
        stage: `open model`, `read texts`, `dense perplexity`, `search: block step`, `search: row step`, `prune`,
            `pruned perplexity`, `write` and the like: which there are follows from the options.
        done: Units of work that are done, an interrupted run's that is resumed among them.
        total: Units of work in all.
        unit: What is counted: `block`, `candidate-block`, `weight` (that all tokens were multiplied by), or `step`.
        seconds: Wall seconds since the stage began.

    Example:
        >>> from neuroal_jax import Progress
        >>> now = Progress(stage="prune", done=3, total=32, unit="block", seconds=6.0)
        >>> f"{now.stage}: {now.done / now.total:.0%}, {now.seconds / now.done * (now.total - now.done):.0f} s to go"
        'prune: 9%, 58 s to go'
    """

    stage: str
    done: int
    total: int
    unit: str
    seconds: float


Listener = Callable[[Progress], object]

# Whoever is told how far the run of this context is: what computes has no need to know that anybody listens.
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """Tells a listener of every stage that begins in here."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def stage(title: str, total: int, unit: str) -> Iterator[Advance]:
    """A stage of the run, which is to be advanced by as many units as it has.

    Devices advance it from threads of their own. The listener hears of that once the thread that began the stage
    advances it too, be it by 0 units: what it does, and what it raises, is in one thread.
    """
    listener, began, here = _listener.get(), time.perf_counter(), get_ident()
    lock, done, heard = Lock(), 0, -1

    def advance(units: int) -> None:
        nonlocal done, heard
        with lock:
            done += units
        if listener is not None and get_ident() == here and heard < done:
            heard = done
            try:
                listener(Progress(title, heard, total, unit, time.perf_counter() - began))
            except (OSError, UserError, MemoryError) as error:  # by which the run would be told of a fault of its own
                raise RuntimeError(f"the progress callback failed: {type(error).__name__}: {error}") from error

    advance(0)
    yield advance


class Bars:
    """A listener that shows a bar on stderr, as long as a stage lasts. To be closed, as a context.

    Stages of one step have none: there is nothing to see of them, and errors of what is read are a line of their own.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __call__(self, now: Progress) -> None:
        """Moves the stage's bar, which goes away when it is full."""
        from tqdm import tqdm  # here alone: who calls a function has no bar

        if now.unit == "step":
            return
        if self._bar is None or self._stage != now.stage or now.done < self._bar.n:
            self.close()
            large = now.total >= 10_000  # 1.3M instead of 1300000
            self._stage = now.stage
            self._bar = tqdm(total=now.total, desc=now.stage, unit=now.unit, unit_scale=large, leave=False)
        self._bar.update(now.done - self._bar.n)
        if now.done >= now.total:
            self.close()

    def close(self) -> None:
        """Takes the bar away, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Clock:
    """Wall seconds per phase, in the order in which the phases first ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds what the block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.perf_counter() - start, 3)
