"""What a sweep will cost, before it starts: operations, hours on this machine, bytes on disk. Loads no weights.

Per run, with P prunable weights, a pass of T tokens takes 2 * P * T operations. Attention, the head, and
Hessians with their factors are left out, and text is taken to be as long as under Llama's tokenizer: an estimate, good
to a factor of two.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.data.sources import name_and_file
from neuroal_jax.data.texts import TEXTS
from neuroal_jax.data.windows import default_seqlen
from neuroal_jax.masks.patterns import PATTERNS
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine import NONE, REFINEMENTS

# The paper's models: hidden width, width of keys and values, MLP width, its matrices, blocks.
PAPER_MODELS = {
    "microsoft/phi-2": (2560, 2560, 10240, 2, 32),
    "huggyllama/llama-7b": (4096, 4096, 11008, 3, 32),
    "meta-llama/Llama-2-7b-hf": (4096, 4096, 11008, 3, 32),
    "mistralai/Mistral-7B-v0.1": (4096, 1024, 14336, 3, 32),
    "facebook/opt-6.7b": (4096, 4096, 16384, 2, 32),
}
# Rows of the paper's tasks, choices of each, and tokens of prompt and choice together, about.
_TASKS = {
    "rte": (277, 2, 80),
    "winogrande": (1267, 2, 30),
    "boolq": (3270, 2, 150),
    "hellaswag": (10042, 4, 100),
    "arc_easy": (2376, 4, 35),
    "arc_challenge": (1172, 4, 40),
    "openbookqa": (500, 4, 20),
}
_OTHER_TASK = (1000, 4, 100)
_MISSING_TEXT = 20_000  # tokens of a file that is not here yet
_SHARE_OF_PEAK = 0.6  # of the machine's matrix products


@dataclass(frozen=True)
class Cost:
    """Operations of one run, and bytes that it leaves on disk."""

    operations: float
    disk: float


def prunable_weights(model: str) -> tuple[int, float] | None:
    """Prunable weights of a model and bytes of its checkpoint, if it lies here or is one of the paper's; else None."""
    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.masks import budget

    if model == "demo" or os.path.isdir(model):
        checkpoint = open_checkpoint(model)
        weights = budget.prunable_weights(checkpoint.linear_shapes(), checkpoint.num_blocks)
        return weights, sum(info.size * (4 if info.dtype == "F32" else 2) for info in checkpoint.source.infos.values())
    if model not in PAPER_MODELS:
        return None
    hidden, keys, mlp, matrices, blocks = PAPER_MODELS[model]
    weights = blocks * (2 * hidden * hidden + 2 * hidden * keys + matrices * hidden * mlp)
    return weights, 2.1 * weights  # two bytes each, and the embeddings


def of_run(config: PruneConfig, weights: int, size: float) -> Cost:
    """Of allocation, pruning and perplexities; `weights` and `size` as `prunable_weights` gives them."""
    seqlen = config.seqlen or default_seqlen(config.model)
    calibration, search = config.nsamples * seqlen, config.search_samples * seqlen
    evaluation = sum(_text_tokens(source, seqlen) for source in config.evaluations)
    needs = PRUNERS[config.pruner].needs or (config.refine != NONE and REFINEMENTS[config.refine].needs)
    tokens = 2 * evaluation + (2 * calibration if needs else 0)
    if config.allocation in ALLOCATIONS:
        tokens += calibration if ALLOCATIONS[config.allocation].needs else 0
        tokens += 2 * search * _candidates(config)
    return Cost(2.0 * weights * tokens, weights / 8 + (size if config.model_directory else 0))


def _candidates(config: PruneConfig) -> int:
    """How many candidates a run's search walks with; the row step's base walks once more, with its differences."""
    code = ALLOCATIONS.module(config.allocation)
    by_row = PATTERNS[PRUNERS[config.pruner].pattern].by_row
    options = {**config.plain(), **(code.settle(config.plain(), by_row) if hasattr(code, "settle") else {})}
    sizes = code.stage_sizes(options, config.sparsity or 0.7) if hasattr(code, "stage_sizes") else []
    return sum(sizes) + (len(sizes) > 1)


def of_tasks(weights: int, tasks: Sequence[str], limit: int | None) -> float:
    """Operations of one model over lm-eval's tasks."""
    rows = (_TASKS.get(name, _OTHER_TASK) for name in tasks)
    return 2.0 * weights * sum(min(count, limit or count) * choices * tokens for count, choices, tokens in rows)


def _text_tokens(source: str, seqlen: int) -> int:
    name, file = name_and_file(source)
    if name is not None:
        entry = TEXTS[name]
        return entry.evaluation_tokens or (entry.evaluation_windows or 0) * seqlen
    return os.path.getsize(str(file)) // 4 if os.path.isfile(str(file)) else _MISSING_TEXT


def peak(dtype: str) -> float:
    """Operations per second of large square matrix products on this machine, the best of several."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def report(runs: Sequence[tuple[str, PruneConfig]], tasks: Sequence[str], limit: int | None) -> str:
    """A line per run and a total: operations, hours at a share of this machine's peak, and bytes on disk.

    Args:
        runs: Name and options of every run that is still to do.
        tasks: What lm-eval measures of every pruned model, and once of every dense one.
        limit: Rows of each task; None: all.
    """
    import jax

    speed = _SHARE_OF_PEAK * peak("float32" if jax.default_backend() == "cpu" else "bfloat16")
    models: Mapping[str, tuple[int, float] | None] = {
        name: prunable_weights(name) for name in dict.fromkeys(config.model for _, config in runs)
    }
    lines = [f"{'T operations':>12}  {'hours':>8}  {'GiB':>6}  run"]
    total = Cost(0, 0)

    def add(name: str, cost: Cost) -> None:
        nonlocal total
        total = Cost(total.operations + cost.operations, total.disk + cost.disk)
        lines.append(_line(name, cost, speed))

    for model, sizes in models.items():
        if sizes is not None and tasks:
            add(f"{model}: tasks of the dense model", Cost(of_tasks(sizes[0], tasks, limit), 0))
    for name, config in runs:
        sizes = models[config.model]
        if sizes is None:
            lines.append(f"{'unknown':>12}  {'unknown':>8}  {'?':>6}  {name} (not on this machine)")
            continue
        cost = of_run(config, *sizes)
        add(name, Cost(cost.operations + of_tasks(sizes[0], tasks, limit), cost.disk))
    lines.append(_line("in all", total, speed))
    lines.append(
        f"hours at {speed / 1e12:.3g} T operations a second, {_SHARE_OF_PEAK:.0%} of this machine's matrix products; "
        "reading and compiling come on top"
    )
    return "\n".join(lines)


def _line(name: str, cost: Cost, speed: float) -> str:
    hours = cost.operations / speed / 3600
    digits = max(0, 2 - math.floor(math.log10(hours))) if 0 < hours < 1 else 2
    return f"{cost.operations / 1e12:12.6g}  {hours:8.{min(digits, 6)}f}  {cost.disk / 2**30:6.2f}  {name}"
