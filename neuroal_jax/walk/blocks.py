"""A model's blocks, one at a time: read ahead, moved to the device, checked. Every walk takes them from here."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.errors import UserError
from neuroal_jax.machine.devices import Devices, one_device
from neuroal_jax.machine.memory import return_freed
from neuroal_jax.numerics.cholesky import DAMPING
from neuroal_jax.numerics.statistics import STATISTICS, Statistics
from neuroal_jax.resume.state import State, Steps
from neuroal_jax.walk import programs
from neuroal_jax.walk.programs import BlockSpec, Weights

Advance = Callable[[int], object]  # told how many more units of work are done
Batches = list[Float[Array, "_ t d"]]  # hidden states of batches of sequences; the last of them may be smaller

# Tokens in one compiled call. Fixed, so that results do not depend on how much memory a machine has.
_BATCH_TOKENS = 16384
_EVALUATION_TOKENS = 4096  # of texts, which come in all lengths
# Of the vocabulary in one compiled call, so that logits of a window stay small beside its activations. Fixed likewise.
_SLICE_TOKENS = 16384
# At least so long between two returns of freed memory to the system, as to have its pages again takes some 0.05 s. With
# none at all the peak would grow: the next block's arrays, and what compiling leaves, come before it is used again.
_RETURN_SECONDS = 2


def batch_size(seqlen: int, sequences: int) -> int:
    """How many of `sequences` sequences of `seqlen` tokens go in one compiled call."""
    return max(1, min(_BATCH_TOKENS // seqlen, sequences))


def vocabulary_slices(vocabulary: int) -> list[tuple[int, int]]:
    """First token and end of each slice of the vocabulary; only the logits of one exist at a time."""
    return [(first, min(first + _SLICE_TOKENS, vocabulary)) for first in range(0, vocabulary, _SLICE_TOKENS)]


def evaluation_batch_size(seqlen: int) -> int:
    """How many windows of `seqlen` tokens of a text go in one compiled call."""
    return max(1, _EVALUATION_TOKENS // seqlen)


def evaluation_batches(windows: np.ndarray) -> list[np.ndarray]:
    """Batches of windows `[n, tokens]`, of one size for all texts; the last one holds what is left over."""
    size = evaluation_batch_size(windows.shape[1])
    return [windows[first : first + size] for first in range(0, len(windows), size)]


def ignore(units: int) -> None:
    """An `Advance` that no one listens to."""


class Blocks:
    """A checkpoint prepared for walking. Only one block's weights are on the device, and the next one's.

    Attributes:
        checkpoint: The opened model.
        spec: A block's structure.
        head: The head's structure.
        dtype: Compute dtype of weights and hidden states.
        batch: Calibration sequences per compiled call, outside of searches; see `batch_size`.
        devices: What divided work is divided over: candidates, or batches of sequences.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        batch: int = 1,
        state: State | None = None,
        devices: Devices | None = None,
    ) -> None:
        """Takes an opened model; `state` is what is kept of an interrupted run, and of this one: by default nothing.

        By default there is one device.
        """
        family, config = checkpoint.family, checkpoint.config
        self.checkpoint = checkpoint
        self.dtype = jnp.dtype(dtype)
        self.batch = batch
        self.devices = devices or one_device()
        self.spec = BlockSpec(_graph(family.block, config), family.linears)
        self._state = state or State()
        self.head = _graph(family.head, config)
        self._stem = _graph(family.stem, config)

    def on(self, part: int) -> "Blocks":
        """The same for work that is not divided any further, on the device of a part."""
        found = copy(self)
        found.devices = Devices((self.devices.every[self.devices.turn(part)],))
        return found

    def unkept(self) -> "Blocks":
        """The same for walks of which nothing is kept."""
        found = copy(self)
        found._state = State()
        return found

    def here(self) -> AbstractContextManager[Any]:
        """Makes the first device the one on which arrays are made anew; programs run where their arguments are."""
        return jax.default_device(self.devices.every[0])

    @property
    def last(self) -> int:
        """Number of the last block."""
        return self.checkpoint.num_blocks - 1

    def begin(self, label: str, advance: Advance = ignore, about: Mapping[str, Any] | None = None) -> Steps:
        """Begins a walk; tells `advance` how many blocks an earlier run did of it.

        Args:
            label: Its name in messages and files, lower case and dashes.
            advance: Told the number of blocks.
            about: What its outputs depend on beside the model and what is here, by names for people and as JSON has it,
                for walks of which runs take all that another one found; None: each walks itself.
        """
        if about is not None:
            about = {**about, "dtype": self.dtype.name}
        steps = self._state.walk(label, self.checkpoint.num_blocks, about)
        advance(steps.first)
        return steps

    def begin_whole(self, label: str) -> Steps:
        """Begins a walk that is kept as a whole or not at all: one step, whose output stands for all blocks."""
        return self._state.walk(label, 1)

    def read(self, first: int = 0) -> Iterator[tuple[int, Weights]]:
        """The blocks from `first` on, on the device; the next one is read while the caller works on this one."""

        def read(block: int) -> Weights:
            weights = self.checkpoint.read_block(block)
            return Weights(self.put(weights.linears), self.put(weights.rest))

        with ThreadPoolExecutor(max_workers=1) as reader:
            blocks = range(first, self.checkpoint.num_blocks)
            ahead = [reader.submit(read, block) for block in blocks[:1]]
            returned = time.monotonic()
            for block in blocks:
                weights = ahead.pop().result()
                if block < self.last:
                    ahead.append(reader.submit(read, block + 1))
                yield block, weights
                if time.monotonic() - returned > _RETURN_SECONDS:
                    return_freed()
                    returned = time.monotonic()

    def put(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Arrays on the device, floats in the compute dtype."""
        moved = {name: jnp.asarray(array) for name, array in arrays.items()}
        return {name: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in moved.items()}

    def batches(self, windows: np.ndarray) -> list[np.ndarray]:
        """Equal batches of windows `[n, tokens]`, the last one filled up with copies of its last window."""
        fill = -len(windows) % self.batch
        padded = np.concatenate([windows, np.repeat(windows[-1:], fill, axis=0)])
        return list(padded.reshape(-1, self.batch, windows.shape[1]))

    def embed(self, batches: list[np.ndarray]) -> Batches:
        """The first block's input for batches of token ids.

        Of a large table only the rows of these tokens reach the device, as many as there are positions.
        """
        vocabulary, positions = self.checkpoint.vocabulary, sum(batch.size for batch in batches)
        tokens = np.arange(vocabulary)
        if positions < vocabulary:
            used = np.unique(np.concatenate([batch.ravel() for batch in batches]))
            tokens = np.pad(used, (0, positions - used.size), "edge")  # programs are compiled for a number of rows
            batches = [np.searchsorted(used, batch).astype(np.int32) for batch in batches]
        params = self.put(self.checkpoint.read_part("stem", tokens))
        return [programs.embed(self._stem, params, batch) for batch in batches]

    def head_slices(self) -> Iterator[tuple[int, dict[str, Array]]]:
        """The head's parameters for a slice of the vocabulary at a time, on the device, and the slice's first token.

        Whoever reads logits streams what it needs of them, see `numerics.softmax`; all batches go through one slice
        before the next one comes.
        """
        for first, end in vocabulary_slices(self.checkpoint.vocabulary):
            yield first, self.put(self.checkpoint.read_part("head", np.arange(first, end)))

    def run(self, weights: Sequence[Weights], hidden: Batches) -> Batches:
        """A block's output for batches of its input, each on its device; `weights`: the block's, see `copies`."""

        def of_batch(number: int) -> Array:
            output: Array = programs.run(self.spec, weights[self.devices.turn(number)], hidden[number])
            return output

        return self.devices.each(len(hidden), of_batch)

    def new_statistics(
        self, needs: tuple[str, ...], sequences: int, inputs: Collection[str] | None = None
    ) -> programs.State:
        """What statistics of inputs (None: of all) begin with, of sequences and what fills up their last batch."""
        padded = sequences + -sequences % self.batch
        with self.here():
            return {
                name: {kind: STATISTICS[kind].init(padded, width) for kind in needs}
                for name, width in self.checkpoint.input_widths().items()
                if inputs is None or name in inputs
            }

    def finished_statistics(self, block: int, state: programs.State, sequences: int) -> dict[str, Statistics]:
        """The statistics of every input over `sequences` sequences; raises UserError if a sum is not finite."""
        found: dict[str, Statistics] = {
            name: {kind: STATISTICS[kind].finish(value, sequences) for kind, value in of_input.items()}
            for name, of_input in state.items()
        }
        self._check_sums(block, found)
        return found

    def check_finite(self, block: int, per_linear: np.ndarray) -> None:
        """Raises UserError naming the first linear whose number is not finite."""
        for linear, value in zip(self.spec.linears, per_linear, strict=True):
            if not np.isfinite(value):
                raise UserError(
                    f"block {block}: the activations of {linear.name} are not finite in {self.dtype}: "
                    "try --dtype float32"
                )

    def check_damping(self, block: int, levels: Mapping[str, Array]) -> None:
        """Raises UserError where no damping made a Hessian's factor finite."""
        for name, level in levels.items():
            if np.any(np.asarray(level) >= len(DAMPING)):
                raise UserError(
                    f"block {block}: the Hessian of {name} has no finite Cholesky factor, even with a damping of "
                    f"{DAMPING[-1]} times its mean diagonal: use other calibration text, or another --pruner"
                )

    def _check_sums(self, block: int, found: Mapping[str, Statistics]) -> None:
        """As `check_finite`, of the first statistic of each linear's input."""
        firsts = {name: next(iter(of_input.values()), None) for name, of_input in found.items()}
        sums = {name: float(jnp.sum(array)) for name, array in firsts.items() if array is not None}
        if sums:
            self.check_finite(block, np.array([sums[linear.reads] for linear in self.spec.linears]))


def _graph(build: Callable[[Any, nnx.Rngs], nnx.Module], config: Any) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))


def repeated(tree: Any, times: int) -> Any:
    """The same arrays for every candidate."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)
