"""The one walk over the blocks: read a block, compute on it, move on. Only one block's weights are on the device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from neuroal_jax import block_ops
from neuroal_jax.allocation.neuroal.row_step import Differences
from neuroal_jax.block_ops import BlockSpec, DeviceCounts, Weights
from neuroal_jax.budget import Counts, RowCounts
from neuroal_jax.checkpoint import Checkpoint
from neuroal_jax.errors import UserError
from neuroal_jax.pruners import PRUNERS

Done = Callable[[int], object]  # told how many units of work are done

# Tokens in one compiled call. Fixed, so that results do not depend on how much memory a machine has.
_BATCH_TOKENS = 16384


def batch_size(seqlen: int, sequences: int) -> int:
    """How many of `sequences` sequences of `seqlen` tokens go in one compiled call."""
    return max(1, min(_BATCH_TOKENS // seqlen, sequences))


@dataclass(frozen=True)
class BlockMasks:
    """Masks of one block: uint8 `[out, ceil(in / 8)]` of each linear (1 = kept), and its number of kept zeros."""

    packed: dict[str, np.ndarray]
    kept_zeros: dict[str, int]


class Walk:
    """A checkpoint prepared for walking.

    Args:
        checkpoint: The opened model.
        pruner: Name of the pruner.
        dtype: Compute dtype of weights and hidden states.
        batch: Sequences per compiled call, outside of the search; see `batch_size`.
    """

    def __init__(self, checkpoint: Checkpoint, pruner: str, dtype: str, batch: int) -> None:
        family, config = checkpoint.family, checkpoint.config
        self.checkpoint = checkpoint
        self.dtype = jnp.dtype(dtype)
        self.batch = batch
        self._stem, self._head = (_graph(build, config) for build in (family.stem, family.head))
        self.spec = BlockSpec(_graph(family.block, config), family.linears, pruner)

    def perplexity(
        self, windows: np.ndarray, masks: list[BlockMasks] | None = None, done: Done = lambda n: None
    ) -> float:
        """Token perplexity: `exp(mean over windows of mean next-token loss)`, each window on its own.

        Args:
            windows: Token ids `[n, tokens]`.
            masks: Packed masks to prune with on the fly; None for the dense model.
            done: Told 1 after every block.
        """
        batches = self._batches(windows)
        hidden = self._embed(batches)
        for block, weights in self._blocks():
            if masks is not None:
                weights = block_ops.apply_masks(tuple(weights.linears), weights, masks[block].packed)
            hidden = [block_ops.run(self.spec, weights, h) for h in hidden]
            jax.block_until_ready(hidden)
            done(1)
        head = self._put(self.checkpoint.read_part("head"))
        losses = [
            np.asarray(block_ops.window_losses(self._head, head, h, b)) for h, b in zip(hidden, batches, strict=True)
        ]
        loss = float(np.concatenate(losses)[: len(windows)].mean(dtype=np.float64))
        if not np.isfinite(loss):
            state = "dense" if masks is None else "pruned"
            raise UserError(f"the {state} model's loss is {loss} in {self.dtype}: try --dtype float32")
        return float(np.exp(loss))

    def search(
        self, windows: np.ndarray, candidates: list[Counts], batch: int, done: Done = lambda n: None
    ) -> list[float]:
        """The alignment score of each candidate: its sum over all linears of all blocks (float64 of fp32 terms).

        Args:
            windows: Token ids `[n, tokens]`: the search set.
            candidates: Row counts of each candidate.
            batch: How many candidates run together; the last batch is filled up with copies.
            done: Told the number of candidates in a batch, after every batch of every block.
        """
        groups = [candidates[start : start + batch] for start in range(0, len(candidates), batch)]
        first = self._embed([windows])[0]
        hidden = [jnp.broadcast_to(first, (batch, *first.shape)) for _ in groups]
        scores = np.zeros((len(groups), batch))
        for block, weights in self._blocks():
            for index, group in enumerate(groups):
                padded = group + [group[-1]] * (batch - len(group))
                counts = _stacked([candidate[block] for candidate in padded])
                hidden[index], per_linear = block_ops.search(self.spec, weights, hidden[index], counts)
                per_linear = np.asarray(per_linear, dtype=np.float64)
                self._check_finite(block, per_linear.sum(axis=0))
                scores[index] += per_linear.sum(axis=1)
                done(len(group))
        return scores.reshape(-1)[: len(candidates)].tolist()

    def align(self, windows: np.ndarray, counts: Counts, done: Done = lambda n: None) -> tuple[float, Differences]:
        """One candidate's score and, per block, the `D - S` of every input (fp32)."""
        hidden = self._embed([windows])[0]
        score, differences = 0.0, []
        for block, weights in self._blocks():
            aligned = block_ops.align(self.spec, weights, hidden, _on_device(counts[block]))
            hidden = aligned.hidden
            per_linear = np.asarray(aligned.scores, dtype=np.float64)
            self._check_finite(block, per_linear)
            score += float(per_linear.sum())
            differences.append({name: np.asarray(value) for name, value in aligned.differences.items()})
            done(1)
        return score, differences

    def prune(self, windows: np.ndarray, counts: Counts, done: Done = lambda n: None) -> list[BlockMasks]:
        """Prunes block by block, each on statistics of the pruned blocks before it.

        Args:
            windows: Token ids `[n, tokens]`: the calibration set.
            counts: How many weights go in every row.
            done: Told 1 after every block.
        """
        needs_statistics = PRUNERS[self.spec.pruner].needs_statistics
        hidden = self._embed(self._batches(windows)) if needs_statistics else []
        masks: list[BlockMasks] = []
        for block, weights in self._blocks():
            sums = [block_ops.input_sums(self.spec, weights, h) for h in hidden]
            totals = (
                {name: jnp.concatenate([s[name] for s in sums])[: len(windows)] for name in sums[0]} if sums else {}
            )
            self._check_sums(block, totals)
            pruned, packed, zeros = block_ops.prune(self.spec, weights, totals, _on_device(counts[block]))
            kept_zeros = {name: int(n) for name, n in zeros.items()}
            masks.append(BlockMasks({name: np.asarray(bits) for name, bits in packed.items()}, kept_zeros))
            if block + 1 < self.checkpoint.num_blocks:  # no one reads the last block's output
                hidden = [block_ops.run(self.spec, pruned, h) for h in hidden]
            done(1)
        return masks

    def _blocks(self) -> Iterator[tuple[int, Weights]]:
        """All blocks in order, on the device; the next one is read while the caller works on this one."""

        def read(block: int) -> Weights:
            weights = self.checkpoint.read_block(block)
            return Weights(self._put(weights.linears), self._put(weights.rest))

        with ThreadPoolExecutor(max_workers=1) as reader:
            ahead = reader.submit(read, 0)
            for block in range(self.checkpoint.num_blocks):
                weights = ahead.result()
                if block + 1 < self.checkpoint.num_blocks:
                    ahead = reader.submit(read, block + 1)
                yield block, weights

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
        return [block_ops.embed(self._stem, stem, batch) for batch in batches]

    def _check_finite(self, block: int, per_linear: np.ndarray) -> None:
        bad = [
            linear.name for linear, value in zip(self.spec.linears, per_linear, strict=True) if not np.isfinite(value)
        ]
        if bad:
            raise UserError(
                f"block {block}: the activations of {bad[0]} are not finite in {self.dtype}: try --dtype float32"
            )

    def _check_sums(self, block: int, sums: dict[str, Array]) -> None:
        if sums:
            self._check_finite(block, np.array([np.asarray(sums[linear.reads]).sum() for linear in self.spec.linears]))


def _graph(build: Callable[[Any, nnx.Rngs], nnx.Module], config: Any) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: build(config, nnx.Rngs(0))))


def _on_device(counts: dict[str, RowCounts]) -> dict[str, DeviceCounts]:
    return {name: DeviceCounts(jnp.asarray(rows.pruned), jnp.asarray(rows.ties_high)) for name, rows in counts.items()}


def _stacked(candidates: list[dict[str, RowCounts]]) -> dict[str, DeviceCounts]:
    """Counts of several candidates with a leading candidate axis."""
    return {
        name: DeviceCounts(
            jnp.asarray(np.stack([candidate[name].pruned for candidate in candidates])),
            jnp.asarray(np.array([candidate[name].ties_high for candidate in candidates])),
        )
        for name in candidates[0]
    }


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
