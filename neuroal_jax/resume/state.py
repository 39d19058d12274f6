"""Going on with an interrupted run: what its walks found so far, in a hidden directory beside the results.

`.OUT.resume/` holds `identity.json` (what the state belongs to) and Orbax checkpoints: the outputs of every finished
block, each written once, and the hidden states after the last one of them. Of hidden states only the latest are kept;
while they are replaced, both lie on disk. Its size is at most, with every name as in `plan.py`,

    2 * hidden states of the widest walk + scores + masks so far (+ with SparseGPT the updated weights so far)

Every checkpoint appears whole or not at all, outputs before hidden states: a kill at any moment leaves the state of
the last block that was written. A block's state is written once 50 times as long has passed as the last writing took,
and as this one takes on a slow disk: the first blocks of a large model leave none.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from neuroal_jax import __version__
from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.command.config import PruneConfig, flag
from neuroal_jax.data.windows import Windows
from neuroal_jax.errors import UserError
from neuroal_jax.files.writing import replace_text, take
from neuroal_jax.machine.memory import is_exhausted

log = logging.getLogger("neuroal_jax")

_SHARE = 50  # of the time since the last state was written, writing the next one may take this part
_BYTES_PER_SECOND = 500e6  # of writing and checking, before it was measured
_IDENTITY = "identity.json"
_WITHOUT_EFFECT = {"out", "save_model", "overwrite", "resume", "dry_run", "compilation_cache", "candidate_batch"}

Output = dict[str, Any]  # of one block: nested dicts of arrays and numbers


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

    def hidden(self, start: Callable[[], list[Any]]) -> list[Any]:
        """The hidden states that block `first` takes; `start()` makes those of block 0."""
        return start() if self._hidden is None else [jnp.asarray(array) for array in self._hidden]

    def done(self, block: int, hidden: list[Any], output: Output | None = None) -> None:
        """Tells that a block is done: the hidden states that the next one takes, and what to keep of this one."""
        self._report(block, hidden, output or {})


class _Item(NamedTuple):
    """A checkpoint in the state's directory; the order of items is that of the run."""

    walk: int
    block: int
    label: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.walk:02d}-{self.label}-{self.block:05d}.{self.kind}"


class State:
    """What is kept of a run; without a directory nothing is.

    Attributes:
        candidate_batch: Candidates that run together: a run goes on with the number that it began with.
    """

    def __init__(self, directory: Path | None = None, candidate_batch: int = 0) -> None:
        self.candidate_batch = candidate_batch
        self._directory = directory
        self._writes = directory is not None
        self._walks = 0
        self._pending: dict[int, tuple[str, dict[str, Output]]] = {}  # by walk: its label, outputs by block
        self._written, self._took = time.monotonic(), 0.0
        self._weights: Future[dict[str, str]] | None = None
        self._about: dict[str, Any] = {}
        items = self._items()
        self._latest = max((item for item in items if item.kind == "hidden"), default=None)

    def walk(self, label: str, num_blocks: int) -> Steps:
        """Begins the run's next walk; `label` (lower case and dashes) is its name in messages and files."""
        number = self._walks
        self._walks += 1

        def report(block: int, hidden: list[Any], output: Output) -> None:
            if not self._writes:
                return
            self._pending.setdefault(number, (label, {}))[1][str(block)] = output
            hidden = hidden if block + 1 < num_blocks else []
            takes = max(self._took, sum(array.nbytes for array in hidden) / _BYTES_PER_SECOND)
            if time.monotonic() - self._written >= _SHARE * takes:
                self._write(_Item(number, block, label, "hidden"), hidden)

        steps = Steps(_report=report)
        if self._latest is None or number > self._latest.walk:
            return steps
        try:
            outputs = self._read_outputs(number)
            here = number == self._latest.walk
            steps.first = self._latest.block + 1 if here else num_blocks
            steps._hidden = self._read(self._latest)["hidden"] if here else []
            if sorted(outputs) != list(range(steps.first)):
                raise ValueError(f"outputs of {len(outputs)} blocks, expected {steps.first}")
            steps.outputs = [outputs[block] for block in range(steps.first)]
            return steps
        except Exception as error:  # Orbax raises many kinds, none of them documented.
            log.info("the state of the %s is damaged (%s): it starts anew", label, " ".join(str(error).split())[:200])
            self._forget(lambda item: item.walk >= number)
            self._latest = None
            return Steps(_report=report)

    def check_weights(self, model: str) -> None:
        """Raises UserError if the interrupted run read other weights: `model` is their SHA-256 now."""
        found = self._about.get("weights")
        if found not in (None, model):
            raise UserError(_refusal("the weights' SHA-256", found, model, self._directory))

    def remove(self) -> None:
        """Removes the state, at the end of a run."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._writes = False

    def describe(self) -> str | None:
        """Up to where the state goes; None if there is nothing in it yet."""
        return None if self._latest is None else f"block {self._latest.block} of the {self._latest.label}"

    def _begin(self, about: dict[str, Any], weights: "Future[dict[str, str]]") -> None:
        self._about, self._weights = about, weights
        last = self._latest or (-1, -1)
        self._forget(lambda item: item[:2] > last[:2] or (item.kind == "hidden" and item != self._latest))
        try:
            self._save_about()
        except OSError as error:
            log.info("no state is kept for --resume: %s cannot be written (%s)", self._directory, error.strerror)
            self._writes = False

    def _save_about(self) -> None:
        assert self._directory is not None
        replace_text(self._directory / _IDENTITY, json.dumps(self._about, indent=1))

    def _write(self, item: _Item, hidden: list[Any]) -> None:
        """Writes what is new since the last time; what cannot be written is given up, and said once."""
        assert self._directory is not None
        jax.block_until_ready(hidden)
        start = time.monotonic()
        try:
            for walk, (label, outputs) in self._pending.items():
                self._save(_Item(walk, max(map(int, outputs)), label, "outputs"), outputs)
            self._save(item, {"hidden": [np.asarray(array) for array in hidden]})
            self._forget(lambda other: other.kind == "hidden" and other != item)
            self._latest = item
            weights = self._weights
            if self._about.get("weights") is None and weights and weights.done() and not weights.exception():
                self._about["weights"] = weights.result()["model"]
                self._save_about()
        except Exception as error:
            log.info("the state cannot be written any more (%s): going on without", " ".join(str(error).split())[:200])
            self._writes = False
        self._pending.clear()
        self._written = time.monotonic()
        self._took = self._written - start

    def _save(self, item: _Item, content: Output) -> None:
        assert self._directory is not None
        numbered = _numbered(content)
        tree = {"content": numbered, "checksum": _checksum(numbered)}
        _checkpointer().save((self._directory / item.name).absolute(), tree)

    def _read(self, item: _Item) -> Output:
        assert self._directory is not None
        tree = _checkpointer().restore((self._directory / item.name).absolute())
        if int(tree["checksum"]) != _checksum(tree["content"]):
            raise ValueError(f"{item.name} is not what was written")
        return _unnumbered(tree["content"])

    def _read_outputs(self, walk: int) -> dict[int, Output]:
        items = [item for item in self._items() if item.walk == walk and item.kind == "outputs"]
        return {int(block): output for item in items for block, output in self._read(item).items()}

    def _items(self) -> list[_Item]:
        names = [] if self._directory is None else sorted(os.listdir(self._directory))
        found = (re.fullmatch(r"(\d+)-([a-z-]+)-(\d+)\.(hidden|outputs)", name) for name in names)
        return [_Item(int(match[1]), int(match[3]), match[2], match[4]) for match in found if match]

    def _forget(self, unwanted: Callable[[_Item], bool]) -> None:
        """Removes items, and what is none: a kill leaves half-written ones under other names."""
        assert self._directory is not None
        keep = {_IDENTITY} | {item.name for item in self._items() if not unwanted(item)}
        for name in set(os.listdir(self._directory)) - keep:
            path = self._directory / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def kept(
    target: Path, identity: Mapping[str, Any], candidate_batch: int, weights: "Future[dict[str, str]]", *, resume: bool
) -> Iterator[State]:
    """The state of the run that writes to `target`, while it computes.

    An interrupt, a kill and an unexpected error keep it; a UserError, a full disk and exhausted memory remove it; a
    caller whose run ends well removes it once the results are in place.

    Args:
        target: Directory of the results.
        identity: What the state belongs to, by names for people; see `identify`.
        candidate_batch: For a run that starts from the beginning.
        weights: The checkpoint's hashes, once they are known.
        resume: Whether to go on with the state of an interrupted run.

    Raises:
        UserError: If there is a state, and it belongs to another run.
        KeyboardInterrupt: With a message that says how to go on, where something was kept.
    """
    absolute = Path(os.path.abspath(target))
    directory = absolute.parent / f".{absolute.name[:99]}.resume"
    lock = _lock(directory)
    if lock is None:
        yield State(candidate_batch=candidate_batch)
        return
    try:
        about = _found(directory, identity) if resume else None
        if about is None:
            if not resume and os.listdir(directory):
                log.info("starting over: the state of an interrupted run is removed (--resume would go on with it)")
            about = {"identity": dict(identity), "candidate_batch": candidate_batch, "weights": None}
            for path in directory.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        state = State(directory, about["candidate_batch"])
        state._begin(about, weights)
        if state.describe():
            log.info("--resume: going on after %s", state.describe())
        try:
            yield state
        except BaseException as error:
            expected = isinstance(error, UserError | OSError | SafetensorError) or is_exhausted(error)
            if expected or not state.describe():
                state.remove()
                raise
            how = f"the state after {state.describe()} is kept; the same command with --resume goes on from there"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(how) from None
            log.info("%s", how)
            raise
    finally:
        os.close(lock)


def identify(
    config: PruneConfig,
    sparsity: float,
    checkpoint: Checkpoint,
    calibration: Windows,
    evaluations: Mapping[str, Windows],
) -> dict[str, Any]:
    """All that a run's result depends on, by names for people: options, model, token ids, software, device."""
    options = {flag(name): value for name, value in config.plain().items() if name not in _WITHOUT_EFFECT}
    files = (path for path in checkpoint.path.rglob("*") if path.suffix in (".safetensors", ".json"))
    if not list(checkpoint.path.glob("*.safetensors")):  # Orbax
        files = (path for path in (checkpoint.path / "params").rglob("*") if path.is_file())
    states = {str(path.relative_to(checkpoint.path)): path.stat() for path in files}
    given = {}
    if os.path.isfile(config.allocation):
        given["the SHA-256 of the file --allocation"] = hashlib.sha256(Path(config.allocation).read_bytes()).hexdigest()
    return {
        **options,
        "--sparsity": sparsity,
        **given,
        "the SHA-256 of the calibration tokens": calibration.sha256,
        **{f"the SHA-256 of the tokens of {name}": windows.sha256 for name, windows in evaluations.items()},
        "the SHA-256 of the model's config.json": hashlib.sha256(
            (checkpoint.path / "config.json").read_bytes()
        ).hexdigest(),
        **{
            f"bytes and time of the model's {name}": [state.st_size, state.st_mtime_ns]
            for name, state in sorted(states.items())
        },
        "the version of neuroal_jax": __version__,
        "the version of jax": jax.__version__,
        "the version of jaxlib": jax.lib.__version__,
        "the device": jax.local_devices()[0].device_kind,
    }


def _found(directory: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the state in a directory belongs to, checked; None if there is none to go on with."""
    if not os.listdir(directory):
        log.info("--resume: there is no interrupted run to go on with: starting from the beginning")
        return None
    try:
        about = json.loads((directory / _IDENTITY).read_text())
        before: dict[str, Any] = dict(about["identity"])
        about = {"identity": before, "candidate_batch": int(about["candidate_batch"]), "weights": about["weights"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
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
    return descriptor


def _numbered(tree: Any) -> Any:
    """Arrays for all leaves, and keys that keep their order when they are sorted, as Orbax and JAX do."""
    if isinstance(tree, dict):
        return {f"{number:06d}.{key}": _numbered(value) for number, (key, value) in enumerate(tree.items())}
    return [_numbered(value) for value in tree] if isinstance(tree, list) else np.asarray(tree)


def _unnumbered(tree: Any) -> Any:
    return {key.partition(".")[2]: _unnumbered(tree[key]) for key in sorted(tree)} if isinstance(tree, dict) else tree


def _checksum(content: Any) -> int:
    """CRC-32 of a tree: its structure and all bytes."""
    leaves, structure = jax.tree.flatten(content)
    value = zlib.crc32(str(structure).encode())
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        value = zlib.crc32(f"{array.dtype}{array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return value


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp  # not at the top: it is slow to import

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
