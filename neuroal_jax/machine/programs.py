"""Compiled functions that know what they were traced for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import jax

R = TypeVar("R")


class Trace(NamedTuple):
    """One tracing of a program.

    Attributes:
        name: Of the program.
        compiled: The program, as `jax.jit` gives it.
        arguments: What it was traced for: static arguments as they are, for arrays their shapes and dtypes.
    """

    name: str
    compiled: Callable[..., Any]
    arguments: tuple[Any, ...]


# The list of whoever watches in this thread: two runs in one process do not see each other's.
_watched: ContextVar[list[Trace] | None] = ContextVar("watched", default=None)


@contextmanager
def watched_traces() -> Iterator[list[Trace]]:
    """A list that grows by every program that this thread traces meanwhile; what was traced before is not again."""
    traces: list[Trace] = []
    token = _watched.set(traces)
    try:
        yield traces
    finally:
        _watched.reset(token)


def program(static: int = 0, donate: str | None = None) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Jit of a function.

    Compiled once for what it is given: its static arguments and its arrays' shapes; so each takes no more than it uses.

    Args:
        static: How many of its arguments, from the first, are static.
        donate: The argument whose arrays the result may take over.
    """

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        name = function.__name__

        @wraps(function)
        def traced(*arguments: Any) -> R:
            traces = _watched.get()
            if traces is not None:
                shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments[static:])
                traces.append(Trace(name, compiled, (*arguments[:static], *shapes)))
            return function(*arguments)

        compiled = jax.jit(traced, static_argnums=tuple(range(static)), donate_argnames=donate)
        return compiled

    return decorate
