"""The devices that a run computes on: divided work goes to each in turn, all other work to the first.

Each part of divided work runs the program that one device would run, in a thread of its device's own. XLA compiles a
program that is partitioned over devices otherwise than for one, even where nothing of it is divided: last bits move,
counts flip, another candidate wins. Parts that are dispatched give the same bits on any number of devices.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from neuroal_jax.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Devices:
    """Devices of this process; JAX's default one is the first.

    Attributes:
        every: In JAX's order.
    """

    every: tuple[jax.Device, ...]

    def __len__(self) -> int:
        return len(self.every)

    def turn(self, part: int) -> int:
        """Number of the device that a part of divided work goes to."""
        return part % len(self)

    def put(self, array: np.ndarray, part: int) -> jax.Array:
        """An array of the host's on the device of a part."""
        return jnp.asarray(array) if len(self) == 1 else jax.device_put(array, self.every[self.turn(part)])

    def place(self, tree: Any, part: int) -> Any:
        """Arrays on the device of a part; themselves where they are there already."""
        return tree if len(self) == 1 else jax.device_put(tree, self.every[self.turn(part)])

    def spread(self, parts: Sequence[T]) -> list[T]:
        """Each part's arrays on its device."""
        return [self.place(tree, part) for part, tree in enumerate(parts)]

    def gathered(self, parts: Sequence[T]) -> list[T]:
        """Each part's arrays on the first device."""
        return [self.place(tree, 0) for tree in parts]

    def copies(self, tree: T, parts: int) -> list[T]:
        """Arrays on every device that some of so many parts go to, to be taken by `turn`."""
        return [self.place(tree, number) for number in range(min(len(self), max(parts, 1)))]

    def each(self, parts: int, work: Callable[[int], T]) -> list[T]:
        """`work(part)` of all parts, in their order; those of different devices at the same time.

        An error of a part, or an interrupt, is raised once devices are done with what they have begun.
        """
        if len(self) == 1 or parts <= 1:
            return [work(part) for part in range(parts)]

        stopped = Event()

        def of_device(number: int) -> list[T]:
            try:
                return [work(part) for part in range(number, parts, len(self)) if not stopped.is_set()]
            except BaseException:
                stopped.set()
                raise

        numbers = range(min(len(self), parts))
        with ThreadPoolExecutor(max_workers=len(numbers)) as threads:
            try:  # each with a context of this thread, of whoever watches what is traced
                started = [threads.submit(copy_context().run, of_device, number) for number in numbers]
                found = [of_one.result() for of_one in started]
            except BaseException:
                stopped.set()
                raise
        return [found[self.turn(part)][part // len(self)] for part in range(parts)]


def one_device() -> Devices:
    """The one that JAX takes by default."""
    return Devices((jax.local_devices()[0],))


def devices(asked: int | None = None, local: int = 0, neighbours: int = 1) -> Devices:
    """The first `asked` devices of this process; None: all.

    Args:
        asked: How many.
        local: Which of the processes of its node this is.
        neighbours: How many these are. Virtual devices of a CPU, which each of them sees, they take in turn. (Of
            accelerators, JAX shows each its own: see `run.processes.group_of`.)

    Raises:
        UserError: If there are fewer.
    """
    found = jax.local_devices()
    if found[0].platform == "cpu" and len(found) >= neighbours > 1:
        found = found[local::neighbours]
    if asked is not None and asked > len(found):
        kinds = f"{len(found)} ({found[0].device_kind})"
        raise UserError(f"--devices {asked}: this process has {kinds}: ask for as many, or for all")
    return Devices(tuple(found[:asked]))
