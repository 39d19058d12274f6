"""How far a run is, and how long its phases took."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from tqdm import tqdm

from neuroal_jax.walk.blocks import Advance

log = logging.getLogger("neuroal_jax")


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Advance]:
    """A bar on stderr, unless messages are switched off."""
    quiet = not log.isEnabledFor(logging.INFO)
    large = total >= 10_000  # 1.3M instead of 1300000
    lock = Lock()  # devices report from threads of their own
    with tqdm(total=total, desc=title, unit=unit, unit_scale=large, disable=quiet, leave=False) as bar:

        def advance(units: int) -> None:
            with lock:
                bar.update(units)

        yield advance


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
