"""The one walk over the blocks: read a block, compute on it, move on. Only one block's weights are on the device."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.checkpoint.safetensors import FLOAT_DTYPES, is_finite
from neuroal_jax.errors import UserError
from neuroal_jax.machine.memory import return_freed
from neuroal_jax.masks.budget import Counts
from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.pruners import sparsegpt
from neuroal_jax.resume.state import Output, State, Steps
from neuroal_jax.search.row_step import Differences
from neuroal_jax.walk import programs
from neuroal_jax.walk.programs import BlockSpec, Method, Weights

Done = Callable[[int], object]  # told how many units of work are done

# Tokens in one compiled call. Fixed, so that results do not depend on how much memory a machine has.
_BATCH_TOKENS = 16384
# At least so long between two returns of freed memory to the system, as to have its pages again takes some 0.05 s. With
# none at all the peak would grow: the next block's arrays, and what compiling leaves, come before it is used again.
_RETURN_SECONDS = 2


def batch_size(seqlen: int, sequences: int) -> int:
    """How many of `sequences` sequences of `seqlen` tokens go in one compiled call."""
    return max(1, min(_BATCH_TOKENS // seqlen, sequences))


@dataclass(frozen=True)
class BlockResult:
    """What pruning one block gives, by linear.

    Attributes:
        packed: Masks, uint8 `[out, ceil(in / 8)]`, 1 = kept.
        kept_zeros: Number of kept weights that are zero anyway.
        updated: The weights in the checkpoint's dtype, where the pruner changed kept ones too; else empty.
        damping: What the Hessian of each linear's input was damped with, where there is one.
    """

    packed: dict[str, np.ndarray]
    kept_zeros: dict[str, int]
    updated: dict[str, np.ndarray]
    damping: dict[str, float]


Keep = Callable[[int, dict[str, np.ndarray]], dict[str, np.ndarray]]  # may move a block's updated weights elsewhere


class Walk:
    """A checkpoint prepared for walking.

    Args:
        checkpoint: The opened model.
        method: How weights are chosen.
        dtype: Compute dtype of weights and hidden states.
        batch: Sequences per compiled call, outside of the search; see `batch_size`.
        state: What is kept of an interrupted run, and of this one; by default nothing.
    """

    def __init__(
        self, checkpoint: Checkpoint, method: Method, dtype: str, batch: int, state: State | None = None
    ) -> None:
        family, config = checkpoint.family, checkpoint.config
        self.checkpoint = checkpoint
        self.dtype = jnp.dtype(dtype)
        self.batch = batch
        self._state = state or State()
        self._stem, self._head = (_graph(build, config) for build in (family.stem, family.head))
        self.spec = BlockSpec(_graph(family.block, config), family.linears, method)

    def perplexity(
        self, windows: np.ndarray, results: list[BlockResult] | None = None, done: Done = lambda n: None
    ) -> float:
        """Token perplexity: `exp(mean over windows of mean next-token loss)`, each window on its own.

        Args:
            windows: Token ids `[n, tokens]`.
            results: What to prune with on the fly; None for the dense model.
            done: Told 1 after every block.
        """
        state = "dense" if results is None else "pruned"
        steps, last = self._steps(f"{state}-perplexity", done), self.checkpoint.num_blocks - 1
        if steps.first > last:
            return float(steps.outputs[last]["perplexity"])
        batches = self._batches(windows)
        hidden = steps.hidden(lambda: self._embed(batches))
        for block, weights in self._blocks(steps.first):
            weights = self._pruned(weights, results[block]) if results else weights
            hidden = [programs.run(self.spec, weights, h) for h in hidden]
            jax.block_until_ready(hidden)
            if block < last:
                steps.done(block, hidden)
            done(1)
        head = self._put(self.checkpoint.read_part("head"))
        losses = [
            np.asarray(programs.window_losses(self._head, head, h, b)) for h, b in zip(hidden, batches, strict=True)
        ]
        loss = float(np.concatenate(losses)[: len(windows)].mean(dtype=np.float64))
        if not np.isfinite(loss):
            self._find_overflow(batches, results)
            raise UserError(f"the {state} model's loss is {loss} in {self.dtype}: try --dtype float32")
        perplexity = float(np.exp(loss))
        steps.done(last, [], {"perplexity": np.float64(perplexity)})
        return perplexity

    def _pruned(self, weights: Weights, result: BlockResult) -> Weights:
        if result.updated:
            return Weights(self._put(result.updated), weights.rest)
        return programs.apply_masks(tuple(weights.linears), weights, result.packed)

    def _find_overflow(self, batches: list[np.ndarray], results: list[BlockResult] | None) -> None:
        """Walks again, to raise UserError for the first block and linear whose input is not finite."""
        hidden = self._embed(batches)
        for block, weights in self._blocks():
            weights = self._pruned(weights, results[block]) if results else weights
            for index, h in enumerate(hidden):
                hidden[index], squares = programs.observe(self.spec, weights, h)
                self._check_sums(block, squares)

    def search(
        self, windows: np.ndarray, candidates: list[Counts], batch: int, done: Done = lambda n: None
    ) -> np.ndarray:
        """The alignment of each candidate, `[candidate, block, linear]` (fp32 values as float64); its sum is the score.

        Args:
            windows: Token ids `[n, tokens]`: the search set.
            candidates: Row counts of each candidate.
            batch: How many candidates run together; the last batch is filled up with copies.
            done: Told the number of candidates in a batch, after every batch of every block.
        """
        groups = [candidates[start : start + batch] for start in range(0, len(candidates), batch)]
        steps = self._steps("search", lambda blocks: done(blocks * len(candidates)))
        hidden = steps.hidden(lambda: [_repeated(self._embed([windows])[0], batch) for _ in groups])
        last = self.checkpoint.num_blocks - 1
        scores = np.zeros((len(groups), batch, last + 1, len(self.spec.linears)))
        for block, output in enumerate(steps.outputs):
            scores[:, :, block] = output["scores"]
        for block, weights in self._blocks(steps.first):
            same = block == 0  # no candidate differs from the others yet
            shared = _repeated(programs.dense_run(self.spec, weights, hidden[0][0]), batch) if same else None
            for index, group in enumerate(groups):
                padded = group + [group[-1]] * (batch - len(group))
                counts = jax.tree.map(lambda *leaves: np.stack(leaves), *(candidate[block] for candidate in padded))
                statistics = shared or programs.dense_runs(self.spec, weights, hidden[index])
                run = programs.search_last if block == last else programs.search
                aligned = run(self.spec, weights, hidden[index], statistics, counts)
                hidden[index] = aligned.hidden
                self._check_damping(block, aligned.damping)
                scores[index, :, block] = aligned.scores
                self._check_finite(block, scores[index, :, block].sum(axis=0))
                done(len(group))
            steps.done(block, hidden, {"scores": scores[:, :, block]})
        return scores.reshape(-1, *scores.shape[2:])[: len(candidates)]

    def align(self, windows: np.ndarray, counts: Counts, done: Done = lambda n: None) -> tuple[np.ndarray, Differences]:
        """One candidate's alignment `[block, linear]` and, per block, the `D - S` of every input (fp32)."""
        steps = self._steps("alignment", done)
        hidden = steps.hidden(lambda: self._embed([windows]))
        scores = [output["scores"] for output in steps.outputs]
        differences = [output["differences"] for output in steps.outputs]
        for block, weights in self._blocks(steps.first):
            statistics = programs.dense_run(self.spec, weights, hidden[0])
            aligned = programs.align(self.spec, weights, hidden[0], statistics, counts[block])
            self._check_damping(block, aligned.damping)
            hidden = [aligned.hidden]
            scores.append(np.asarray(aligned.scores, dtype=np.float64))
            self._check_finite(block, scores[-1])
            differences.append({name: np.asarray(value) for name, value in aligned.differences.items()})
            steps.done(block, hidden, {"scores": scores[-1], "differences": differences[-1]})
            done(1)
        return np.stack(scores), differences

    def prune(
        self,
        windows: np.ndarray,
        counts: Counts,
        done: Done = lambda n: None,
        keep: Keep = lambda block, updated: updated,
    ) -> list[BlockResult]:
        """Prunes block by block, each on statistics of the pruned blocks before it.

        Args:
            windows: Token ids `[n, tokens]`: the calibration set.
            counts: How many weights go in every row or group.
            done: Told 1 after every block.
            keep: Given the updated weights of every block; what it returns stands in the result.
        """
        steps = self._steps("pruning", done)
        hidden = steps.hidden(lambda: self._embed(self._batches(windows)) if self.spec.method.needs else [])
        results = [_stored(output, block, keep) for block, output in enumerate(steps.outputs)]
        for block, weights in self._blocks(steps.first):
            statistics = self._statistics(block, weights, hidden, len(windows))
            pruned = programs.prune(self.spec, weights, statistics, counts[block])
            self._check_damping(block, pruned.damping)
            result = self._result(block, pruned)
            if self.spec.method.pruner.updates_weights:
                pruned = pruned._replace(weights=Weights(self._put(result.updated), weights.rest))
                result = replace(result, updated=keep(block, result.updated))
            results.append(result)
            if block + 1 < self.checkpoint.num_blocks:  # no one reads the last block's output
                hidden = [programs.run(self.spec, pruned.weights, h) for h in hidden]
            steps.done(block, hidden, vars(result))
            done(1)
        return results

    def outliers(self, windows: np.ndarray, multiple: float, done: Done = lambda n: None) -> list[float]:
        """OWL's outlier ratio of every block of the dense model, in percent.

        Args:
            windows: Token ids `[n, tokens]`: the calibration set.
            multiple: M: what exceeds M times the block's mean Wanda score is an outlier.
            done: Told 1 after every block.
        """
        steps = self._steps("outliers", done)
        hidden = steps.hidden(lambda: self._embed(self._batches(windows)))
        shares = [float(output["share"]) for output in steps.outputs]
        for block, weights in self._blocks(steps.first):
            parts = []
            for index, h in enumerate(hidden):
                hidden[index], squares = programs.observe(self.spec, weights, h)
                parts.append(squares)
            totals = {name: jnp.concatenate([part[name] for part in parts])[: len(windows)] for name in parts[0]}
            self._check_sums(block, totals)
            shares.append(100 * float(programs.outlier_share(self.spec, weights, totals, multiple)))
            steps.done(block, hidden, {"share": np.float64(shares[-1])})
            done(1)
        return shares

    def spectra(self) -> Iterator[dict[str, np.ndarray]]:
        """For every block, each linear's eigenvalues of `W^T W`, ascending (fp32)."""
        steps = self._steps("spectra")
        yield from steps.outputs
        for block, weights in self._blocks(steps.first):
            found = {name: np.asarray(programs.spectrum(weight)) for name, weight in weights.linears.items()}
            steps.done(block, [], found)
            yield found

    def _steps(self, label: str, done: Done = lambda n: None) -> Steps:
        """Begins a walk; tells `done` how many blocks an earlier run did of it."""
        steps = self._state.walk(label, self.checkpoint.num_blocks)
        done(steps.first)
        return steps

    def _statistics(self, block: int, weights: Weights, hidden: list[Array], sequences: int) -> dict[str, Statistics]:
        """What the method needs of every input, over the first `sequences` sequences of the batches `hidden`."""
        if not hidden:
            return {}
        inputs = {linear.reads: weights.linears[linear.name].shape[1] for linear in self.spec.linears}
        wants_hessian = "hessian" in self.spec.method.needs
        hessians = {name: jnp.zeros((width, width)) for name, width in inputs.items()} if wants_hessian else {}
        parts = []
        for number, h in enumerate(hidden):
            first = number * self.batch
            part, hessians = programs.input_statistics(self.spec, weights, h, hessians, first, sequences)
            parts.append(part)
        found = {
            name: jax.tree.map(lambda *of_batches: jnp.concatenate(of_batches)[:sequences], *(p[name] for p in parts))
            for name in inputs
        }
        found = {name: of_input._replace(hessian=hessians.get(name)) for name, of_input in found.items()}
        self._check_sums(block, {name: jax.tree.leaves(of_input)[0] for name, of_input in found.items()})
        return found

    def _result(self, block: int, pruned: programs.PrunedBlock) -> BlockResult:
        """Moves a pruned block to the host; updated weights in the dtype in which they will be stored."""
        packed = {name: np.asarray(bits) for name, bits in pruned.packed.items()}
        kept_zeros = {name: int(n) for name, n in pruned.kept_zeros.items()}
        damping = {
            linear.name: sparsegpt.DAMPING[int(pruned.damping[linear.reads])]
            for linear in self.spec.linears
            if linear.reads in pruned.damping
        }
        updated = {}
        if self.spec.method.pruner.updates_weights:
            infos = self.checkpoint.source.infos
            for name, weight in pruned.weights.linears.items():
                stored = FLOAT_DTYPES[infos[self.checkpoint.linear_name(block, name)].dtype]
                with np.errstate(over="ignore"):
                    updated[name] = np.asarray(weight).astype(stored)
                if not is_finite(updated[name]):
                    tensor = self.checkpoint.linear_name(block, name)
                    raise UserError(
                        f"tensor {tensor}: SparseGPT's updated weights are not finite in {stored.name}, the "
                        "checkpoint's dtype: convert the checkpoint to float32, or use --pruner wanda"
                    )
                lost = weight.size - int(np.bitwise_count(packed[name]).sum())
                kept_zeros[name] = int(np.count_nonzero(updated[name] == 0)) - lost
        return BlockResult(packed, kept_zeros, updated, damping)

    def _blocks(self, first: int = 0) -> Iterator[tuple[int, Weights]]:
        """The blocks from `first` on, on the device; the next one is read while the caller works on this one."""

        def read(block: int) -> Weights:
            weights = self.checkpoint.read_block(block)
            return Weights(self._put(weights.linears), self._put(weights.rest))

        with ThreadPoolExecutor(max_workers=1) as reader:
            blocks = range(first, self.checkpoint.num_blocks)
            ahead = [reader.submit(read, block) for block in blocks[:1]]
            returned = time.monotonic()
            for block in blocks:
                weights = ahead.pop().result()
                if block + 1 < self.checkpoint.num_blocks:
                    ahead.append(reader.submit(read, block + 1))
                yield block, weights
                if time.monotonic() - returned > _RETURN_SECONDS:
                    return_freed()
                    returned = time.monotonic()

    def _put(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        """Arrays on the device, floats in the compute dtype."""
        moved = {name: jnp.asarray(array) for name, array in arrays.items()}
        return {name: x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in moved.items()}

    def _batches(self, windows: np.ndarray) -> list[np.ndarray]:
        """Equal batches of windows, the last one filled up with copies of its last window."""
        fill = -len(windows) % self.batch
        padded = np.concatenate([windows, np.repeat(windows[-1:], fill, axis=0)])
        return list(padded.reshape(-1, self.batch, windows.shape[1]))

    def _embed(self, batches: list[np.ndarray]) -> list[Array]:
        stem = self._put(self.checkpoint.read_part("stem"))
        return [programs.embed(self._stem, stem, batch) for batch in batches]

    def _check_finite(self, block: int, per_linear: np.ndarray) -> None:
        bad = [
            linear.name for linear, value in zip(self.spec.linears, per_linear, strict=True) if not np.isfinite(value)
        ]
        if bad:
            raise UserError(
                f"block {block}: the activations of {bad[0]} are not finite in {self.dtype}: try --dtype float32"
            )

    def _check_damping(self, block: int, levels: dict[str, Array]) -> None:
        """Raises UserError where no damping made a Hessian's factor finite."""
        for name, level in levels.items():
            if np.any(np.asarray(level) >= len(sparsegpt.DAMPING)):
                raise UserError(
                    f"block {block}: the Hessian of {name} has no finite Cholesky factor, even with a damping of "
                    f"{sparsegpt.DAMPING[-1]} times its mean diagonal: use other calibration text, or --pruner wanda"
                )

    def _check_sums(self, block: int, sums: dict[str, Array]) -> None:
        if sums:
            self._check_finite(block, np.array([float(jnp.sum(sums[linear.reads])) for linear in self.spec.linears]))


def _stored(output: Output, block: int, keep: Keep) -> BlockResult:
    """A block's result that an interrupted run stored."""
    return BlockResult(
        packed=output["packed"],
        kept_zeros={name: int(n) for name, n in output["kept_zeros"].items()},
        updated=keep(block, output["updated"]),
        damping={name: float(value) for name, value in output["damping"].items()},
    )


def _graph(build: Callable[[Any, nnx.Rngs], nnx.Module], config: Any) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))


def _repeated(tree: Any, times: int) -> Any:
    """The same arrays for every candidate."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (times, *x.shape)), tree)


def candidates_together(sizes: list[int], limit: int) -> int:
    """How many candidates to run at once: the most, up to `limit`, that wastes at most a tenth on filling up batches.

    Args:
        sizes: Numbers of candidates of the steps to come.
        limit: The most that memory or the user allows.
    """

    def waste(batch: int) -> int:
        return sum(-size % batch for size in sizes)

    limit = min(limit, max(sizes))
    return next(batch for batch in range(limit, 0, -1) if 10 * waste(batch) <= sum(sizes))
