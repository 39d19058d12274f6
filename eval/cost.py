"""What a sweep will cost, before it starts: operations, hours on this machine, bytes on disk. Loads no weights.

With P prunable weights, a head of H weights, attention of A numbers (heads of all blocks together) and windows of n
tokens, a token takes 2 * P + 2 * A * n operations on its way through the blocks (half of all pairs of tokens attend),
and 2 * H where its loss is measured or a search reads the head. What a run finds measured by one before it costs
nothing, as in the sweep.
Hessians, their factors, spectra, selecting weights and solving for them are left out.

Texts are as long as they are where they lie here beside the model; else as under Llama's tokenizer, about.
"""

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.data.sources import name_and_file
from neuroal_jax.data.texts import TEXTS
from neuroal_jax.data.tokens import is_token_file
from neuroal_jax.data.windows import default_seqlen, reader_for
from neuroal_jax.models.family import by_input
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine import REFINEMENTS
from neuroal_jax.search.objective import OBJECTIVES

if TYPE_CHECKING:
    from neuroal_jax.checkpoint.opened import Checkpoint

# The paper's models: hidden width, width of keys and values, MLP width, its matrices, blocks, vocabulary.
PAPER_MODELS = {
    "microsoft/phi-2": (2560, 2560, 10240, 2, 32, 51200),
    "huggyllama/llama-7b": (4096, 4096, 11008, 3, 32, 32000),
    "meta-llama/Llama-2-7b-hf": (4096, 4096, 11008, 3, 32, 32000),
    "mistralai/Mistral-7B-v0.1": (4096, 1024, 14336, 3, 32, 32000),
    "facebook/opt-6.7b": (4096, 4096, 16384, 2, 32, 50272),
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
_BYTES_A_TOKEN = 4
_BASE = "base"  # of a row step: its walk
_SHARE_OF_PEAK = 0.6  # of the machine's matrix products


Key = tuple[object, ...]


@dataclass(frozen=True)
class Cost:
    """Operations, and bytes that stay on disk."""

    operations: float
    disk: float = 0


@dataclass(frozen=True)
class Sizes:
    """Of a model.

    Attributes:
        weights: Prunable ones.
        attention: Heads times their size, of all blocks together.
        head: Weights that a token is multiplied by for its loss.
        disk: Bytes of its checkpoint.
        blocks: How many.
        inputs: Of a block's linears, in order: how wide each is, and how many outputs they have that read it.
    """

    weights: int
    attention: int
    head: int
    disk: float
    blocks: int
    inputs: tuple[tuple[int, int], ...]

    def through_blocks(self, windows: float, seqlen: int) -> float:
        """Operations of windows on their way through all blocks."""
        return windows * seqlen * (2.0 * self.weights + 2.0 * self.attention * seqlen)

    def to_inputs_and_products(self, windows: float, seqlen: int) -> float:
        """Operations of fitting kept weights: of each input in two blocks, and of its products; solving is left out."""
        operations, before = 0.0, 0
        for width, outputs in self.inputs:
            operations += 2 * 2.0 * before + 2.0 * (width**2 + 2 * width * min(width, outputs))
            before += width * outputs
        attention = 2 * (len(self.inputs) - 1) * 2.0 * self.attention * seqlen
        return windows * seqlen * (self.blocks * operations + attention)

    def through_head(self, windows: float, tokens: int) -> float:
        """Operations of the logits of `tokens` tokens of every window."""
        return windows * tokens * 2.0 * self.head

    def losses(self, windows: float, seqlen: int) -> float:
        """Operations of the losses of windows, the blocks included."""
        return self.through_blocks(windows, seqlen) + self.through_head(windows, seqlen - 1)


@dataclass(frozen=True)
class Lengths:
    """Of a run's data: tokens in a sequence, calibration sequences, and windows of every evaluation text."""

    seqlen: int
    samples: int
    windows: tuple[float, ...]


def sizes_of(model: str) -> Sizes | None:
    """Of a model that lies here or is one of the paper's; else None."""
    from neuroal_jax.masks import budget

    checkpoint = _opened(model)
    if checkpoint is not None:
        config, infos = checkpoint.config, checkpoint.source.infos
        heads = config.num_attention_heads
        return Sizes(
            weights=budget.prunable_weights(checkpoint.linear_shapes(), checkpoint.num_blocks),
            attention=heads * getattr(config, "head_dim", config.hidden_size // heads) * checkpoint.num_blocks,
            head=math.prod(checkpoint.head_shape()),
            disk=sum(info.size * (4 if info.dtype == "F32" else 2) for info in infos.values()),
            blocks=checkpoint.num_blocks,
            inputs=_inputs(checkpoint),
        )
    if model not in PAPER_MODELS:
        return None
    hidden, keys, mlp, matrices, blocks, vocabulary = PAPER_MODELS[model]
    weights = blocks * (2 * hidden * hidden + 2 * hidden * keys + matrices * hidden * mlp)
    inputs = (hidden, hidden + 2 * keys), (hidden, hidden), (hidden, (matrices - 1) * mlp), (mlp, hidden)
    disk = 2.1 * weights  # two bytes each, and the embeddings
    return Sizes(weights, hidden * blocks, vocabulary * hidden, disk, blocks, inputs)


def _inputs(checkpoint: "Checkpoint") -> tuple[tuple[int, int], ...]:
    """See `Sizes`."""
    shapes, widths = checkpoint.linear_shapes(), checkpoint.input_widths()
    groups = by_input(checkpoint.family.linears)
    return tuple((widths[name], sum(shapes[linear][0] for linear in group)) for name, group in groups.items())


def _opened(model: str) -> "Checkpoint | None":
    from neuroal_jax.checkpoint.opened import open_checkpoint

    return open_checkpoint(model) if model == "demo" or os.path.isdir(model) else None


def lengths_of(
    model: str, calib: str, evaluations: tuple[str, ...], samples: int, seqlen: int | None, text_column: str | None
) -> Lengths:
    """The lengths of a run's data.

    Raises:
        UserError: If what is here cannot be used.
    """
    checkpoint = _opened(model)
    positions = () if checkpoint is None else (checkpoint.config.max_position_embeddings,)
    length = seqlen or default_seqlen(model, *positions)
    if checkpoint is not None and is_token_file(calib) and os.path.isfile(calib):
        samples, length = reader_for(checkpoint, model, seqlen).calibration(calib, samples, seed=0).ids.shape

    def windows(source: str) -> float:
        name, file = name_and_file(source)
        entry = None if name is None else TEXTS[name]
        here = os.path.isfile(file) if file is not None else entry is not None and not entry.hub
        if here and checkpoint is not None:
            return len(reader_for(checkpoint, model, length, text_column).evaluation(source).ids)
        tokens = os.path.getsize(str(file)) / _BYTES_A_TOKEN if here and file is not None else None
        tokens = tokens or (entry and entry.evaluation_tokens) or _MISSING_TEXT
        return (entry and entry.evaluation_windows) or tokens / length

    return Lengths(length, samples, tuple(map(windows, evaluations)))


def walks_of(config: PruneConfig, sizes: Sizes, lengths: Lengths) -> Iterator[tuple[Key | None, float]]:
    """Every walk of a run with its operations; those that runs keep for each other by what tells them apart."""
    seqlen, data = lengths.seqlen, (config.model, config.calib, config.seed)
    calibration = sizes.through_blocks(lengths.samples, seqlen)
    searched = min(config.search_samples, lengths.samples)
    search, head = sizes.through_blocks(searched, seqlen), sizes.through_head(searched, seqlen)
    losses = [sizes.losses(windows, seqlen) for windows in lengths.windows]
    yield from (((config.model, text), loss) for text, loss in zip(config.evaluations, losses, strict=True))
    if config.allocation in ALLOCATIONS and ALLOCATIONS[config.allocation].needs:
        yield (*data, config.allocation), calibration
    stages, objective = _stages(config), OBJECTIVES[config.objective]
    if stages and objective.against_dense:  # for its distributions, and what they expect of the head's vectors
        yield (*data, config.search_samples, "distributions"), search + 2 * head
    for stage, candidates in stages.items():  # each is pruned and compared, or seen by the head
        compared = not objective.reads_head or stage[-1] == _BASE
        dense = compared or PRUNERS[config.pruner].needs
        operations = search * (2 if dense else 1) + (0 if compared else head)
        if config.search_refine and not compared:
            fitted = lengths.samples - searched
            operations = search + head + 2 * sizes.through_blocks(fitted, seqlen)
            operations += sizes.to_inputs_and_products(fitted, seqlen)
        key = (*data, config.allocation, config.pruner, config.sparsity, config.objective, *stage)
        key += (config.refine,) if config.search_refine else ()
        yield key, operations * candidates
    refinements = [REFINEMENTS[name] for name in REFINEMENTS.named(config.refine)]
    reads = [PRUNERS[config.pruner].needs, *(entry.needs or entry.updates_weights for entry in refinements)]
    if any(reads):
        yield None, 2 * calibration  # for statistics, and pruned, for the next block
    if config.refine_updates:
        # and the dense model, which walks along
        yield None, sizes.to_inputs_and_products(lengths.samples, seqlen) + calibration
    yield None, sum(losses)


def _stages(config: PruneConfig) -> dict[Key, int]:
    """The candidates of each stage of a run's search, by what tells it from other stages of its sweep."""
    if not config.searches or not hasattr(code := ALLOCATIONS.module(config.allocation), "stage_sizes"):
        return {}
    options = config.plain() | config.changed_by_pattern()
    sizes, rows_alone = code.stage_sizes(options, config.sparsity), options["step"] == "row"
    stages: dict[Key, int] = {(rows_alone, *sizes[: place + 1]): size for place, size in enumerate(sizes)}
    alone = code.lone_walks(options)
    return {**stages, (rows_alone, *sizes, _BASE): alone} if alone else stages


def of_tasks(sizes: Sizes, tasks: Sequence[str], limit: int | None) -> float:
    """Operations of one model over lm-eval's tasks."""
    rows = (_TASKS.get(name, _OTHER_TASK) for name in tasks)
    tokens = sum(min(count, limit or count) * choices * tokens for count, choices, tokens in rows)
    return 2.0 * (sizes.weights + sizes.head) * tokens


def costs_of(
    runs: Sequence[PruneConfig], done: Sequence[PruneConfig], models: Mapping[str, Sizes | None]
) -> Iterator[Cost | None]:
    """Of each run, one after the other, where those that are `done` were before; None for models of unknown sizes.

    Raises:
        UserError: If a text that is here cannot be used.
    """
    lengths = cache(lengths_of)  # each text is read once
    measured: set[Key | None] = set()
    for number, config in enumerate([*done, *runs]):
        sizes, cost = models[config.model], None
        if sizes is not None:
            texts = (tuple(config.evaluations), config.nsamples, config.seqlen, config.text_column)
            walks = list(walks_of(config, sizes, lengths(config.model, config.calib, *texts)))
            disk = sizes.weights / 8 + (sizes.disk if config.model_directory else 0)
            cost = Cost(sum(operations for key, operations in walks if key not in measured), disk)
            measured |= {key for key, _ in walks if key is not None}
        if number >= len(done):
            yield cost


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


def report(runs: Mapping[str, PruneConfig], done: Collection[str], tasks: Sequence[str], limit: int | None) -> str:
    """A line per run that is left and a total: operations, hours at a share of this machine's peak, bytes on disk.

    Args:
        runs: The options of every run, by name.
        done: Names of those that are finished.
        tasks: What lm-eval measures of every pruned model, and once of every dense one.
        limit: Rows of each task; None: all.

    Raises:
        UserError: If a model or a text that is here cannot be used.
    """
    import jax

    speed = _SHARE_OF_PEAK * peak("float32" if jax.default_backend() == "cpu" else "bfloat16")
    left = {name: config for name, config in runs.items() if name not in done}
    finished = [config for name, config in runs.items() if name in done]
    models = {config.model: sizes_of(config.model) for config in runs.values()}
    costs: dict[str, Cost | None] = {}
    for model in dict.fromkeys(config.model for config in left.values()) if tasks else ():
        sizes = models[model]
        if sizes is not None:
            costs[f"{model}: tasks of the dense model"] = Cost(of_tasks(sizes, tasks, limit))
    for (name, config), cost in zip(left.items(), costs_of([*left.values()], finished, models), strict=True):
        sizes = models[config.model]
        of_its_tasks = 0 if sizes is None else of_tasks(sizes, tasks, limit)
        costs[name] = None if cost is None else Cost(cost.operations + of_its_tasks, cost.disk)
    lines = [f"{'T operations':>12}  {'hours':>8}  {'GiB':>6}  run"]
    for name, cost in costs.items():
        unknown = f"{'unknown':>12}  {'unknown':>8}  {'?':>6}  {name} (not on this machine)"
        lines.append(unknown if cost is None else _line(name, cost, speed))
    known = [cost for cost in costs.values() if cost is not None]
    lines.append(_line("in all", Cost(sum(cost.operations for cost in known), sum(cost.disk for cost in known)), speed))
    lines.append(
        f"hours at {speed / 1e12:.3g} T operations a second, {_SHARE_OF_PEAK:.0%} of this machine's matrix products; "
        "reading and compiling come on top"
    )
    return "\n".join(lines)


def _line(name: str, cost: Cost, speed: float) -> str:
    hours = cost.operations / speed / 3600
    digits = max(0, 2 - math.floor(math.log10(hours))) if 0 < hours < 1 else 2
    return f"{cost.operations / 1e12:12.6g}  {hours:8.{min(digits, 6)}f}  {cost.disk / 2**30:6.2f}  {name}"
