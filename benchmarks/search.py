"""A whole run on a Llama of a given shape with random weights: where the time goes, and how it grows.

python -m benchmarks.search [--preset tiny|88m|1b|7b|70b-block] [--pruner wanda|sparsegpt] [--allocation neuroal|shape]
    [--objective alignment|kl|loss] [--json] [--growth]
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import neuroal_jax
from eval.cost import peak
from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.checkpoint.opened import Checkpoint, open_checkpoint
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.machine.memory import freed_memory_kept, return_freed
from neuroal_jax.masks.budget import EXACT, Budget
from neuroal_jax.masks.patterns import make_pattern
from neuroal_jax.models import family_of
from neuroal_jax.models.causal_lm import abstract_params
from neuroal_jax.models.family import expand
from neuroal_jax.numerics import alignment
from neuroal_jax.numerics.statistics import measure as statistics_of
from neuroal_jax.run.plan import Workload, make_plan
from neuroal_jax.search import block_step
from neuroal_jax.search.objective import OBJECTIVES
from neuroal_jax.walk import head, programs
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from neuroal_jax.walk.programs import Weights
from neuroal_jax.walk.search import score


def shape(hidden: int, mlp: int, blocks: int, heads: int, kv_heads: int, vocab: int = 2048) -> dict[str, int]:
    """A Llama's sizes under their names in config.json."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
    }


_ROUNDS = 4  # of the measurement of growth

PRESETS = {
    "tiny": shape(256, 688, 4, 8, 8),
    "88m": shape(768, 2048, 12, 12, 12),
    "1b": shape(2048, 8192, 16, 32, 8),
    "7b": shape(4096, 11008, 32, 32, 32),
    "70b-block": shape(8192, 28672, 1, 64, 8),
}


def write_random_llama(directory: Path, sizes: dict[str, int], dtype: str) -> None:
    """A checkpoint of random weights, in one file per block."""
    config = {"model_type": "llama", "max_position_embeddings": 2048, **sizes}
    (directory / "config.json").write_text(json.dumps(config))
    family = family_of(config)
    parsed = family.parse_config(config)
    shapes, rng = abstract_params(family, parsed), np.random.default_rng(0)
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    files: dict[str, dict[str, np.ndarray]] = {}
    for name, (rule, block) in expand(family.rules(parsed), parsed.num_hidden_layers).items():
        size = shapes[rule.flax].shape[::-1] if rule.transpose else shapes[rule.flax].shape
        values = rng.standard_normal(size, dtype=np.float32)
        values = 1 + 0.1 * values if len(size) == 1 else 0.02 * values
        file = f"model-block{block:03d}.safetensors" if "{block}" in rule.hf else "model-rest.safetensors"
        files.setdefault(file, {})[name] = values.astype(stored)
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    places = {name: file for file, tensors in files.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall seconds of a second call."""
    timed(function, *arguments)
    return timed(function, *arguments)


@contextmanager
def head_seconds(compiled: list[float]) -> Iterator[list[float]]:
    """A list that grows by the wall seconds of all that a search computes on the head meanwhile, without `compiled`."""
    spent: list[float] = []

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start, before = time.perf_counter(), sum(compiled)
            result = jax.block_until_ready(function(*arguments))
            spent.append(time.perf_counter() - start - (sum(compiled) - before))
            return result

        return call

    with ExitStack() as patches:
        for name in ("distributions", "scores"):
            patches.enter_context(patch.object(head, name, clocked(getattr(head, name))))
        yield spent


def operations(checkpoint: Checkpoint, sequences: int, seqlen: int) -> tuple[float, float]:
    """Operations of a block's run, and of one that stops at the last linear's input."""
    shapes, config = checkpoint.linear_shapes(), checkpoint.config
    tokens = sequences * seqlen
    products = 2 * tokens * sum(math.prod(size) for size in shapes.values())
    last = 2 * tokens * math.prod(shapes[checkpoint.family.linears[-1].name])
    attention = 2 * tokens * seqlen * config.num_attention_heads * config.head_dim  # causal: half of all pairs
    return products + attention, products - last + attention


def operations_needed(checkpoint: Checkpoint, steps: list[int], alone: int, search: Any, final: Any) -> float:
    """Operations of a search and of the final pruning, given `operations` of each one's sequences; the head aside.

    Dense runs stop at the last linear's input, as does the last block's pruned run; in the first block all candidates
    of a step share their dense run.

    Args:
        checkpoint: The model.
        steps: Number of candidates of each step.
        alone: How many times one candidate walks once more.
        search: Of the search's sequences.
        final: Of all sequences.
    """
    blocks, walks = checkpoint.num_blocks, sum(steps) + alone
    whole, short = search
    dense = short * ((blocks - 1) * walks + len(steps) + alone)
    pruned = walks * (whole * (blocks - 1) + short)
    return dense + pruned + final[1] * blocks + final[0] * (blocks - 1)


def budget_of(checkpoint: Checkpoint) -> Budget:
    """70% of a model's weights, row by row."""
    return Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, 0.7, EXACT, make_pattern("rows"))


def parts(checkpoint: Checkpoint, dtype: str, windows: np.ndarray, batch: int) -> dict[str, float]:
    """Seconds of the three parts of one block with `batch` candidates, each compiled on its own."""
    blocks, method = Blocks(checkpoint, dtype, len(windows)), make_method("wanda")
    _, weights = next(iter(blocks.read()))
    hidden = blocks.embed([windows])[0]
    together = jnp.broadcast_to(hidden, (batch, *hidden.shape)) + 0
    budget = budget_of(checkpoint)
    quotas = budget.counts(block_step.candidate(0.7, 0.1, list(budget.shapes), budget.num_blocks))[0]
    quotas = jax.tree.map(lambda leaf: np.stack([leaf] * batch), quotas)

    def dense(hidden: jax.Array) -> Any:
        return programs._dense_run(blocks.spec, ("squares",), weights, hidden)

    def select(statistics: Any, quotas: Any) -> Any:
        return programs._prune(blocks.spec, method, weights, statistics, quotas).masks

    def pruned(hidden: jax.Array, masks: Any) -> Any:
        kept = {name: jnp.where(mask, weights.linears[name], 0) for name, mask in masks.items()}
        hidden, inputs = programs._forward(blocks.spec, Weights(kept, weights.rest), hidden)
        return hidden, {name: statistics_of(x, ("squares",)) for name, x in inputs.items()}

    dense, select, pruned = (jax.jit(jax.vmap(function)) for function in (dense, select, pruned))
    statistics = dense(together)
    masks = select(statistics, quotas)
    return {
        "dense": seconds(dense, together),
        "selection": seconds(select, statistics, quotas),
        "pruned": seconds(pruned, together, masks),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs a search at 70% on random tokens and takes it apart."""
    compiled: list[float] = []
    compiling = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: compiled.append(duration) if name.endswith(compiling) else None
    )
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        root = Path(scratch)
        write_random_llama(root, PRESETS[options.preset], options.dtype)
        return_freed()  # of the model's making, which is no part of the run
        windows = np.random.default_rng(1).integers(0, 2048, (options.samples, options.seqlen))
        np.save(root / "ids.npy", windows)
        config = neuroal_jax.PruneConfig(
            model=str(root),
            sparsity=0.7,
            pruner=options.pruner,
            allocation=options.allocation,
            objective=options.objective,
            candidate_batch=options.candidate_batch,
            devices=options.devices,
            calib=str(root / "ids.npy"),
            eval="none",
            nsamples=options.samples,
            dtype=options.dtype,
            compilation_cache="none",
            out=str(root / "out"),
        )
        with head_seconds(compiled) as on_head:
            manifest = neuroal_jax.prune(config).manifest
        compile_seconds = sum(compiled)
        checkpoint = open_checkpoint(str(root))
        few = windows[: config.search_samples]
        batch = max(1, manifest["candidate_batch"])
        split = parts(checkpoint, options.dtype, few, batch) if options.pruner == "wanda" else {}
        needed = operations_needed(
            checkpoint,
            [len(candidates) for candidates in manifest["candidates"].values()],
            ALLOCATIONS.module(options.allocation).lone_walks(config.plain() | config.changed_by_pattern()),
            operations(checkpoint, len(few), options.seqlen),
            operations(checkpoint, options.samples, options.seqlen),
        )
    walks = sum(len(candidates) for candidates in manifest["candidates"].values())
    of_head = sum(on_head)
    spent = manifest["seconds"]["search"] + manifest["seconds"]["prune"] - compile_seconds - of_head
    best = manifest["devices"] * peak(options.dtype)
    batches = checkpoint.num_blocks * walks / batch
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices": manifest["devices"],
        "peak_operations_per_second": best,
        "operations": needed,
        "seconds": {
            **manifest["seconds"],
            "head": round(of_head, 2),
            "compile": round(compile_seconds, 2),
            "search_and_prune": round(spent, 2),
        },
        "parts_of_the_search": {name: round(value * batches, 2) for name, value in split.items()},
        "share_of_peak": needed / spent / best,
        "memory_bytes": manifest["memory_bytes"],
        "candidate_batch": manifest["candidate_batch"],
        "traces": manifest["traces"],
    }


def growth(dtype: str) -> dict[str, float]:
    """By which power the search's time grows with blocks, candidates, sequences and width, each doubled alone.

    The sizes take turns, so that a machine that is slow for a while is slow for all of them; each one's best counts.
    Blocks are many, because what the first and the last one save is the same for any number of them.
    """
    base = {"blocks": 12, "candidates": 6, "sequences": 4, "width": 256}

    def prepare(scratch: str, blocks: int, candidates: int, sequences: int, width: int) -> Callable[[], Any]:
        write_random_llama(Path(scratch), shape(width, 3 * width, blocks, width // 64, width // 64), dtype)
        checkpoint = open_checkpoint(scratch)
        budget = budget_of(checkpoint)
        lambdas = np.linspace(0.01, 0.25, candidates)
        counts = [budget.counts(block_step.candidate(0.7, x, list(budget.shapes), blocks)) for x in lambdas]
        windows = np.random.default_rng(1).integers(0, 2048, (sequences, 256))
        method = make_method("wanda")
        work = Workload(
            steps=[candidates],
            search_samples=sequences,
            samples=sequences,
            windows=None,
            seqlen=256,
            batch=sequences,
            dtype=dtype,
            save_model=False,
            method=method,
            reads_text=False,
        )
        together = make_plan(checkpoint, work, None).candidate_batch
        walked = Blocks(checkpoint, dtype, sequences)
        return lambda: score(walked, method, alignment.score, windows, counts, together)

    with ExitStack() as stack:
        sizes = {"base": base, **{name: {**base, name: 2 * value} for name, value in base.items()}}
        searches = {
            name: prepare(stack.enter_context(tempfile.TemporaryDirectory()), **size) for name, size in sizes.items()
        }
        stack.enter_context(freed_memory_kept())
        for search in searches.values():
            search()  # compiles
        rounds = [{name: timed(search) for name, search in searches.items()} for _ in range(_ROUNDS)]
    best = {name: min(times[name] for times in rounds) for name in sizes}
    return {name: math.log2(best[name] / best["base"]) for name in base}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_program(lambda: bench(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.search",
        description="A run on random weights: where the time goes, how it grows.",
        examples=("--preset 88m", "--preset 7b --dtype bfloat16 --samples 128 --seqlen 2048"),
    )
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--pruner", default="wanda", choices=["wanda", "sparsegpt"])
    parser.add_argument("--allocation", default="neuroal", choices=[x for x in ALLOCATIONS if ALLOCATIONS[x].searches])
    parser.add_argument("--objective", default="alignment", choices=OBJECTIVES, help="what candidates are scored by")
    parser.add_argument("--devices", default="all", help="how many devices share the work (default: all)")
    parser.add_argument("--candidate-batch", type=int, help="candidates that run together (default: as memory allows)")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences, of which the search uses 8")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--scratch", default=None, help="directory for the random model (default: the system's)")
    parser.add_argument("--growth", action="store_true", help="measure how the time grows instead")
    parser.add_argument("--json", action="store_true")
    return parser


def bench(options: argparse.Namespace) -> None:
    if options.growth:
        exponents = growth(options.dtype)
        print(json.dumps(exponents) if options.json else "\n".join(f"{k}: {v:.2f}" for k, v in exponents.items()))
        return
    result = measure(options)
    if options.json:
        print(json.dumps(result))
        return
    machine = f"{result['devices']} x {result['device']}"
    print(f"{options.preset} on {machine}, {options.samples} sequences of {options.seqlen}, {options.dtype}")
    print(f"matrix products: {result['peak_operations_per_second'] / 1e9:.0f} G operations per second at best")
    print(f"operations needed: {result['operations'] / 1e9:.0f} G; share of the peak: {result['share_of_peak']:.0%}")
    for title in ("seconds", "parts_of_the_search"):
        print(f"{title.replace('_', ' ')}:")
        for phase, value in result[title].items():
            print(f"{phase:>18}: {value:8.2f}")
    for name, value in result["memory_bytes"].items():
        print(f"{name}: {'unknown' if value is None else f'{value / 2**30:.2f} GiB'}")
    print(f"traces: {result['traces']}; candidates per batch: {result['candidate_batch']}")
