"""Going on with an interrupted run: what its walks found so far, in a hidden directory beside the results.

`.OUT.resume/` holds `identity.json` (what the state belongs to) and safetensors files: the outputs of every finished
block, each written once, and the hidden states after the last one of them. Of hidden states only the latest are kept;
while they are replaced, both lie on disk. Its size is at most, with every name as in `run/plan.py`,

    2 * hidden states of the widest walk + scores + masks so far (+ with updated weights: those so far)

Every file appears whole or not at all, outputs before hidden states: a kill at any moment leaves the state of the last
block that was written. A block's state is written once 50 times as long has passed as the last writing took, and as
this one takes on a slow disk: the first blocks of a large model leave none.
"""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroal_jax.errors import OtherProcessFailed, UserError, shorten
from neuroal_jax.files.claims import beside, take
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text
from neuroal_jax.machine.memory import is_exhausted
from neuroal_jax.resume.measured import About, Measured
from neuroal_jax.resume.store import Item, Output, Store

log = logging.getLogger("neuroal_jax")

_SHARE = 50  # of the time since the last state was written, writing the next one may take this part
_BYTES_PER_SECOND = 500e6  # of writing and checking, before it was measured
_IDENTITY = "identity.json"
_IDENTITY_BYTES = 2**28  # more than the files of any model take
_FINAL = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass
class Steps:
    """One walk: what an earlier run did of it, and where to report what is done next.

    Attributes:
        first: The block to go on with; the number of blocks where all is done.
        outputs: What each block before `first` gave.
    """

    first: int = 0
    outputs: list[Output] = field(default_factory=list)
    _hidden: list[np.ndarray] | None = None
    _report: Callable[[int, list[Any], Output], None] = lambda block, hidden, output: None

    def hidden(
        self,
        start: Callable[[], list[Any]],
        put: Callable[[np.ndarray, int], Any] = lambda array, _: jnp.asarray(array),
    ) -> list[Any]:
        """The hidden states that block `first` takes; `start()` makes those of block 0, `put` moves a numbered one."""
        if self._hidden is None:
            return start()
        return [put(array, number) for number, array in enumerate(self._hidden)]

    def record(self, block: int, hidden: list[Any], output: Output | None = None) -> None:
        """Tells that a block is done: the hidden states that the next one takes, and what to keep of this one."""
        self._report(block, hidden, output or {})


class State:
    """What is kept of a run; without a directory nothing is.

    Attributes:
        candidate_batch: Candidates that run together: a run goes on with the number that it began with.
        measured: Whole walks that runs keep for each other; None: none are.
    """

    def __init__(
        self, directory: Path | None = None, candidate_batch: int = 0, measured: Measured | None = None
    ) -> None:
        self.candidate_batch = candidate_batch
        self.measured = measured
        self._store = None if directory is None else Store(directory)
        self._writes = directory is not None
        self._walks = 0
        self._pending: dict[int, tuple[str, dict[str, Output]]] = {}  # by walk: its label, outputs by block
        self._written, self._took = time.monotonic(), 0.0
        self._weights: Future[dict[str, str]] | None = None
        self._about: dict[str, Any] = {}
        items = self._store.items() if self._store else []
        self._latest = max((item for item in items if item.kind == "hidden"), default=None)

    def walk(self, label: str, num_blocks: int, about: About | None = None) -> Steps:
        """Begins the run's next walk.

        Args:
            label: Its name in messages and files, lower case and dashes.
            num_blocks: How many it walks through.
            about: What its outputs depend on beside the model, for runs to keep it for each other; None: they do not.
        """
        number = self._walks
        self._walks += 1
        if about is None or self.measured is None:
            return self._walk(number, label, num_blocks)
        found = self.measured.find(label, about, num_blocks)
        if found is not None:
            if self._latest is None or number >= self._latest.walk:  # whole without that directory, too
                self._pending[number] = (label, {str(block): output for block, output in enumerate(found)})
            return Steps(num_blocks, found, [])
        steps = self._walk(number, label, num_blocks)
        if steps.first:  # how long the part before took is not known
            return steps
        return _kept_at_the_end(steps, partial(self.measured.keep, label, about), num_blocks)

    def _walk(self, number: int, label: str, num_blocks: int) -> Steps:
        def report(block: int, hidden: list[Any], output: Output) -> None:
            if self._store is None or not self._writes:
                return
            self._pending.setdefault(number, (label, {}))[1][str(block)] = output
            hidden = hidden if block + 1 < num_blocks else []
            takes = max(self._took, sum(array.nbytes for array in hidden) / _BYTES_PER_SECOND)
            if time.monotonic() - self._written >= _SHARE * takes:
                self._write(self._store, Item(number, block, label, "hidden"), hidden)

        steps = Steps(_report=report)
        if self._store is None or self._latest is None or number > self._latest.walk:
            return steps
        try:
            outputs = _read_outputs(self._store, number)
            here = number == self._latest.walk
            steps.first = self._latest.block + 1 if here else num_blocks
            steps._hidden = list(self._store.read(self._latest)["hidden"].values()) if here else []
            if sorted(outputs) != list(range(steps.first)):
                raise ValueError(f"outputs of {len(outputs)} blocks, expected {steps.first}")
            steps.outputs = [outputs[block] for block in range(steps.first)]
            return steps
        except Exception as error:  # safetensors, zlib and json raise many kinds for damaged files
            log.info("the state of the %s is damaged (%s): it starts anew", label, " ".join(str(error).split())[:200])
            self._store.forget(lambda item: item.walk >= number)
            self._latest = None
            return Steps(_report=report)

    def check_weights(self, model: str) -> None:
        """Raises UserError if the interrupted run read other weights: `model` is their SHA-256 now."""
        found = self._about.get("weights")
        if found not in (None, model):
            raise UserError(
                _refusal("the weights' SHA-256", found, model, self._store.directory if self._store else None)
            )

    def remove(self) -> None:
        """Removes the state, at the end of a run."""
        if self._store is not None:
            with suppress(OSError):
                self._store.clear(_IDENTITY)
                self._store.directory.rmdir()
            self._writes = False

    def describe(self) -> str | None:
        """Up to where the state goes; None if there is nothing in it yet."""
        return None if self._latest is None else f"block {self._latest.block} of the {self._latest.label}"

    def _begin(self, store: Store, about: dict[str, Any], weights: "Future[dict[str, str]]") -> None:
        self._about, self._weights = about, weights
        last = self._latest or (-1, -1)
        store.forget(lambda item: item[:2] > last[:2] or (item.kind == "hidden" and item != self._latest))
        try:
            self._save_about(store)
        except OSError as error:
            log.info("no state is kept for --resume: %s cannot be written (%s)", store.directory, error.strerror)
            self._writes = False

    def _save_about(self, store: Store) -> None:
        replace_text(store.directory / _IDENTITY, json.dumps(self._about, indent=1))

    def _write(self, store: Store, item: Item, hidden: list[Any]) -> None:
        """Writes what is new since the last time; what cannot be written is given up, and said once."""
        jax.block_until_ready(hidden)
        start = time.monotonic()
        try:
            for walk, (label, outputs) in self._pending.items():
                store.save(Item(walk, max(map(int, outputs)), label, "outputs"), outputs)
            store.save(item, {"hidden": {str(number): np.asarray(array) for number, array in enumerate(hidden)}})
            store.forget(lambda other: other.kind == "hidden" and other != item)
            self._latest = item
            weights = self._weights
            if self._about.get("weights") is None and weights and weights.done() and not weights.exception():
                self._about["weights"] = weights.result()["model"]
                self._save_about(store)
        except Exception as error:
            log.info("the state cannot be written any more (%s): going on without", " ".join(str(error).split())[:200])
            self._writes = False
        self._pending.clear()
        self._written = time.monotonic()
        self._took = self._written - start


def _kept_at_the_end(steps: Steps, keep: Callable[[list[Output], float], None], num_blocks: int) -> Steps:
    """A walk from the beginning that tells `keep` all its outputs, and how many seconds they took."""
    began, report = time.monotonic(), steps._report
    outputs: list[Output] = []

    def report_and_keep(block: int, hidden: list[Any], output: Output) -> None:
        outputs.append(output)
        if block + 1 == num_blocks:
            keep(outputs, time.monotonic() - began)
        report(block, hidden, output)

    return replace(steps, _report=report_and_keep)


def _read_outputs(store: Store, walk: int) -> dict[int, Output]:
    items = [item for item in store.items() if item.walk == walk and item.kind == "outputs"]
    return {int(block): output for item in items for block, output in store.read(item).items()}


@contextmanager
def kept(
    target: Path,
    identity: Mapping[str, Any],
    candidate_batch: int,
    weights: "Future[dict[str, str]]",
    *,
    resume: bool,
    start_over: bool = True,
    measured: Measured | None = None,
) -> Iterator[State]:
    """The state of the run that writes to `target`, while it computes and publishes.

    What can be mended, so that the same command can go on, keeps it: an interrupt, a kill, an unexpected error, and a
    system that cannot write the results now, as when a disk is full. What the same command would meet again removes it:
    a UserError, exhausted memory, and a place for the results that is gone or taken. A caller whose run ends well
    removes it once the results are in place.

    Args:
        target: Directory of the results.
        identity: What the state belongs to, by names for people; see `identify`.
        candidate_batch: For a run that starts from the beginning.
        weights: The checkpoint's hashes, once they are known.
        resume: Whether to go on with the state of an interrupted run.
        start_over: Whether to remove one otherwise, or to refuse.
        measured: See `State`.

    Raises:
        UserError: If there is a state, and it belongs to another run.
        KeyboardInterrupt: With a message that says how to go on, where something was kept.
    """
    directory = beside(target, ".resume")
    lock = _lock(directory)
    if lock is None:
        yield State(None, candidate_batch, measured)
        return
    try:
        about = _found(directory, identity) if resume else None
        if about is None:
            if not resume and os.listdir(directory):
                if not start_over:
                    raise UserError(
                        f"an interrupted run to {target}, the default --out, can go on: add --resume to do that, "
                        "--overwrite to start over, or --out to write elsewhere"
                    )
                log.info("starting over: the state of an interrupted run is removed (--resume would go on with it)")
            about = {"identity": dict(identity), "candidate_batch": candidate_batch, "weights": None}
            Store(directory).clear(_IDENTITY)
        state = State(directory, about["candidate_batch"], measured)
        state._begin(Store(directory), about, weights)
        if state.describe():
            log.info("--resume: going on after %s", state.describe())
        try:
            yield state
        except BaseException as error:
            ours = isinstance(error, UserError) and not isinstance(error, OtherProcessFailed)
            if ours or is_exhausted(error) or _is_final(error) or not state.describe():
                state.remove()
                raise
            how = f"the state after {state.describe()} is kept; the same command with --resume goes on from there"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt("; ".join(map(str, [*error.args, how]))) from None
            log.info("%s", how)
            raise
    finally:
        os.close(lock)


def _is_final(error: BaseException) -> bool:
    """Whether the system says that the place for the results is gone or taken."""
    return isinstance(error, OSError) and error.errno in _FINAL


def _found(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the state in a directory belongs to, checked; None if there is none to go on with."""
    if not os.listdir(directory):
        log.info("--resume: there is no interrupted run to go on with: starting from the beginning")
        return None
    try:
        about = read_json(directory / _IDENTITY, _IDENTITY_BYTES)
        before: dict[str, Any] = dict(about["identity"])
        batch = about["candidate_batch"]
        if type(batch) is not int or not 0 <= batch < 2**31:
            raise ValueError(f"candidate_batch is {batch!r}")
        about = {"identity": before, "candidate_batch": batch, "weights": about["weights"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("the state of the interrupted run is damaged (%s: %r): starting over", _IDENTITY, error)
        return None
    now = json.loads(json.dumps(dict(identity)))
    for name in [*now, *before]:
        if before.get(name) != now.get(name):
            raise UserError(_refusal(name, before.get(name), now.get(name), directory))
    return about


def _refusal(name: str, before: Any, now: Any, directory: Path | None) -> str:
    return (
        f"--resume: {name} is {now}, in the interrupted run it was {before}: "
        f"give what that run had, or run without --resume (or remove {directory}) to start over"
    )


def _lock(directory: Path) -> int | None:
    """Makes the directory and takes it for this process, until the descriptor is closed; None where that fails."""
    try:
        directory.mkdir(exist_ok=True)
        descriptor = take(directory)
    except OSError as error:
        log.info("no state is kept for --resume: %s cannot be written (%s)", directory, error.strerror)
        return None
    if descriptor is None:
        log.info("no state is kept for --resume: another run uses %s", directory)
    elif others := Store(directory).others(_IDENTITY):
        log.info("no state is kept for --resume: %s holds other files (%s)", directory, shorten(others))
        os.close(descriptor)
        return None
    return descriptor
