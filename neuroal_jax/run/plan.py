"""What a run will need, before it starts: candidates per batch, memory, bytes written. Shapes only, no weights.

The formula, with C candidates per batch out of K, N search sequences of T tokens, hidden width h, b bytes per value:

    device = 2 * block weights                             (this block and the next; 5 where the device is the host: the
                                                            one before, what the next is read from, and transposes)
           + attention scores of a few sequences           (a constant bound)
           + the most of
             search:     hidden states                     (K * N * T * h)
                       + C * (N * T * widest live activations + pruned block weights + selection of the widest linear)
                       + what the pruner says that it takes, per candidate (a Hessian and its factor for every input)
               with the refinement in the loop: hidden states of all calibration sequences for each of K, and what
               pruning takes for one candidate
               or where the objective reads the head, hidden states, and the final ones of the dense model (h fp32)
                       + a slice of the head's table, its logits for one window and what it expects of the vectors
             pruning:    hidden states                     (of all calibration sequences)
                       + activations of a batch (twice on a CPU, thrice where kept weights are fitted to dense outputs),
                         a pruned block, selection
                       + where they are fitted, one input of all calibration sequences in both blocks
                       + what the pruner and the refinement say that they take
             perplexity: hidden states                     (of one text's windows)
                       + activations of a batch and a pruned block, or
                         a slice of the head's table and its logits for one window
             embedding:  hidden states, and the rows of the table that the tokens of any of these look up
    On several devices, which all have a block's weights, the first one's peak: of K candidates and of the sequences in
    pruning its share (of what is fitted to dense outputs, all), and a batch's inputs on their way to other devices.

    state  = 2 * hidden states + masks                     (on disk, for --resume; and the updated weights)
    host   = Python, JAX, libraries for text and compiled programs (constants) + masks + device where that is the host's
             own memory
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.command.config import PruneConfig
from neuroal_jax.command.values import ALL
from neuroal_jax.data.windows import Windows, default_seqlen
from neuroal_jax.errors import UserError
from neuroal_jax.machine.memory import available_memory
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.models.attention import score_bytes
from neuroal_jax.models.family import by_input
from neuroal_jax.numerics.statistics import SUMS
from neuroal_jax.run.settle import SettledRun
from neuroal_jax.search.objective import OBJECTIVES, Objective
from neuroal_jax.walk.blocks import batch_size, evaluation_batch_size, vocabulary_slices
from neuroal_jax.walk.method import Method
from neuroal_jax.walk.search import candidates_together

_SELECTION_BYTES = 14  # per weight: fp32 score, its sortable bits, ranks of ties, flags
_RUNTIME_BYTES = 420 * 2**20  # Python and JAX
_TEXT_BYTES = 270 * 2**20  # tokenizer and data sets
# To compile and to hold the programs that every run has, and those of a search.
_COMPILER_BYTES, _SEARCH_COMPILER_BYTES = 60 * 2**20, 165 * 2**20
_USABLE = 0.8  # share of free memory to plan with
_LEAST_OF_ESTIMATE = 0.85  # peaks were within 15% of it
_CACHE_BYTES = 64 * 2**20  # on a CPU, candidates run together while their activations are no more: about its cache


@dataclass(frozen=True)
class Workload:
    """The sizes of a run.

    Attributes:
        steps: Number of candidates of each search step; empty without a search.
        search_samples: Search sequences.
        samples: Calibration sequences.
        windows: Evaluation windows of the longest text; None where they are not known before the text is read.
        seqlen: Tokens per sequence.
        batch: Sequences per compiled call outside of the search.
        dtype: Compute dtype.
        save_model: Whether the pruned model is written too.
        method: How weights are chosen.
        reads_text: Whether calibration or evaluation is text, not token ids.
        objective: Of the search.
        refines_candidates: Whether the search refines each candidate.
        devices: How many devices it is divided over.
        searching: How many take part in the search, with those of other processes.
        device_bytes: What each of them has; None: what this machine's first one has.
    """

    steps: list[int]
    search_samples: int
    samples: int
    windows: int | None
    seqlen: int
    batch: int
    dtype: str
    save_model: bool
    method: Method
    reads_text: bool
    objective: Objective = field(default_factory=lambda: next(iter(OBJECTIVES.values())))
    refines_candidates: bool = False
    devices: int = 1
    searching: int = 1
    device_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes: the peaks are estimates, `certain_host` is less than any such run takes.

    Of several devices the peak is the first one's, which computes what is not divided too.
    """

    linears: dict[str, tuple[int, int]]
    num_blocks: int
    prunable: int
    devices: int
    candidate_batch: int
    device_peak: int
    host_peak: int
    certain_host: int
    device_available: int
    devices_share_host: bool
    output_bytes: int
    state_bytes: int


def gib(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"


def reads_text(config: PruneConfig) -> bool:
    """Whether calibration or evaluation is text, not a file of token ids."""
    return not all(source.endswith((".npy", ".npz")) for source in [config.calib, *config.evaluations])


def plan_run(
    settled: SettledRun, calibration: Windows | None, evaluations: Mapping[str, Windows], processes: int = 1
) -> Plan:
    """The plan of a run; before the data is read, with the sizes that the options ask for.

    Until other processes are there, as many of them as `processes` says are taken to have as many devices.
    """
    config = settled.config
    positions = settled.checkpoint.config.max_position_embeddings
    samples, seqlen = config.nsamples, config.seqlen or default_seqlen(config.model, positions)
    if calibration is not None:
        samples, seqlen = calibration.ids.shape
    of_process = len(settled.devices) if config.devices == ALL else int(config.devices)
    work = Workload(
        steps=settled.stage_sizes,
        search_samples=min(config.search_samples, samples),
        samples=samples,
        windows=max((len(windows.ids) for windows in evaluations.values()), default=None if config.evaluations else 0),
        seqlen=seqlen,
        batch=batch_size(seqlen, samples),
        dtype=config.dtype,
        save_model=config.save_model is not None or settled.method.updates_weights,
        method=settled.method,
        reads_text=reads_text(config),
        objective=OBJECTIVES[config.objective],
        refines_candidates=config.search_refine,
        devices=of_process,
        searching=of_process * processes if settled.helpers is None else sum(settled.helpers.devices),
        device_bytes=config.device_memory,
    )
    return make_plan(settled.checkpoint, work, config.candidate_batch)


def make_plan(checkpoint: Checkpoint, work: Workload, limit: int | None) -> Plan:
    """Plans a run; `limit` is the user's bound on candidates per batch."""
    shapes = checkpoint.linear_shapes()
    size = np.dtype(checkpoint_dtype(work.dtype)).itemsize
    hidden = checkpoint.config.hidden_size * size
    block = size * sum(math.prod(shape) for shape in shapes.values())
    live = size * _live_width(checkpoint)
    selection = _SELECTION_BYTES * max(math.prod(shape) for shape in shapes.values())
    available, on_host = device_memory(work.devices) if work.device_bytes is None else (work.device_bytes, False)
    pruner, refinement = work.method.memory(checkpoint.family.linears, shapes, checkpoint.input_widths())
    attention = 2 * max(score_bytes(), 4 * checkpoint.config.num_attention_heads * work.seqlen**2)
    fixed = (5 if on_host else 2) * block + attention

    tokens = work.search_samples * work.seqlen
    per_candidate = tokens * (live + hidden) + block + selection + pruner
    most = -(-max(work.steps, default=0) // work.searching)  # candidates of a device
    finals = most * tokens * hidden
    dense = tokens * 4 * (checkpoint.head_shape()[1] + 3) if work.objective.against_dense and work.steps else 0
    search_fixed = fixed + finals + dense
    fits = int((_USABLE * available - search_fixed) // per_candidate)
    wanted = limit or (_CACHE_BYTES // (tokens * live) if on_host else fits)
    batch = candidates_together(work.steps, max(1, min(wanted, fits)), work.searching) if work.steps else 0
    head = _slice_bytes(checkpoint, work, slopes=work.objective.against_dense) if work.objective.reads_head else 0
    search_peak = search_fixed + max(batch * per_candidate, batch * tokens * hidden + head) if batch else 0

    windows = max(work.samples, work.windows or 0)
    # Of what is fitted: the block as it is now, as it was, and what products take. XLA fuses less on a CPU.
    forwards = (2 if on_host else 1) if work.method.update is None else 3
    walks = 3 if work.method.reads_dense_model else 1  # the dense model's hidden states too, and means of both
    # Of what is fitted to dense outputs, all is on the first device.
    samples = work.samples if work.method.update else _of_device(work.samples, work.batch, work.devices)
    pruning = walks * samples * work.seqlen * hidden + forwards * work.batch * work.seqlen * live
    if work.method.update:  # an input of all that is fitted, in both blocks, but never the last one
        widths = [checkpoint.input_widths()[name] for name in by_input(checkpoint.family.linears)]
        pruning += 2 * samples * work.seqlen * size * max(widths[:-1], default=0)
    pruning += block + selection + pruner + refinement
    if work.devices > 1 and any(name in SUMS for name in work.method.needs):
        # A batch's inputs that are sent to the devices which sum them up, and those that come from the others.
        pruning += 2 * work.batch * work.seqlen * size * sum(checkpoint.input_widths().values())
    if work.refines_candidates and batch:
        everyone = most * work.samples * work.seqlen * hidden
        search_peak = fixed + dense + everyone + max(pruning, most * tokens * hidden + head)
    walk_peak = fixed + max(pruning, *_vocabulary_bytes(checkpoint, work, hidden, live, block))

    mask_bytes = checkpoint.num_blocks * sum(out * -(-width // 8) for out, width in shapes.values())
    device = max(search_peak, walk_peak)
    # A block, what is left of it and the next one; all hidden states where the method reads activations; the masks.
    pruned_tokens = work.samples * work.seqlen * (2 if work.method.reads_dense_model else 1)
    states = pruned_tokens * hidden if work.method.reads_activations else 0
    held = block * (3 if checkpoint.num_blocks > 1 else 2)
    certain = (held + states if on_host else 0) + mask_bytes
    search_tokens = tokens * batch * -(-max(work.steps, default=0) // batch) if batch else 0
    if work.refines_candidates:
        search_tokens = max(work.steps, default=0) * work.samples * work.seqlen + pruned_tokens
    state_tokens = max(search_tokens, pruned_tokens, windows * work.seqlen)
    updated = prunable_weights(shapes, checkpoint.num_blocks) * _stored_size(checkpoint)
    updated *= work.method.updates_weights
    model_bytes = sum(info.size * {"F32": 4}.get(info.dtype, 2) for info in checkpoint.source.infos.values())
    return Plan(
        linears=shapes,
        num_blocks=checkpoint.num_blocks,
        devices=work.devices,
        prunable=prunable_weights(shapes, checkpoint.num_blocks),
        candidate_batch=batch,
        device_peak=device,
        host_peak=_runtime_bytes(work) + mask_bytes + (work.devices * device if on_host else 2 * block),
        certain_host=certain,
        device_available=available,
        devices_share_host=on_host,
        output_bytes=mask_bytes + (model_bytes if work.save_model else 0),
        state_bytes=2 * hidden * state_tokens + dense + mask_bytes + updated,
    )


def refuse_small_devices(plan: Plan) -> None:
    """Raises UserError if a device whose memory is its own has less than the estimate less its error."""
    needed = _LEAST_OF_ESTIMATE * plan.device_peak
    if not plan.devices_share_host and needed > plan.device_available:
        raise UserError(
            f"out of memory: a device needs {plan.device_peak / 2**30:.1f} GiB by estimate and has "
            f"{plan.device_available / 2**30:.1f} GiB: lower --nsamples, --search-samples or --seqlen, or use a "
            "--pruner and a --refine that need less"
        )


def _of_device(samples: int, batch: int, devices: int) -> int:
    """Sequences of the first device, which takes every so many batches one."""
    return min(samples, math.ceil(math.ceil(samples / batch) / devices) * batch)


def _vocabulary_bytes(checkpoint: Checkpoint, work: Workload, hidden: int, live: int, block: int) -> tuple[int, int]:
    """Of perplexity and embedding, in which the vocabulary has a part; `hidden` and `live` are bytes of a token."""
    vocabulary, width = checkpoint.head_shape()
    size, stored = np.dtype(checkpoint_dtype(work.dtype)).itemsize, _stored_size(checkpoint)
    positions = work.seqlen * max(work.samples, work.windows or 0)
    embedding = min(positions, vocabulary) * width * (2 * stored + size) + positions * hidden
    if work.windows == 0:
        return 0, embedding
    tokens = work.seqlen * evaluation_batch_size(work.seqlen)
    head = _slice_bytes(checkpoint, work)
    return work.seqlen * (work.windows or 0) * hidden + max(tokens * live + block, head), embedding


def _slice_bytes(checkpoint: Checkpoint, work: Workload, *, slopes: bool = False) -> int:
    """Of a slice of the head's table, its logits for one window, and with `slopes` the table in fp32 and weights."""
    vocabulary, width = checkpoint.head_shape()
    size, stored = np.dtype(checkpoint_dtype(work.dtype)).itemsize, _stored_size(checkpoint)
    first, end = vocabulary_slices(vocabulary)[0]
    return (end - first) * (width * (2 * stored + size + 4 * slopes) + work.seqlen * (size + 4 + 4 * slopes))


def _stored_size(checkpoint: Checkpoint) -> int:
    """Bytes of a weight in the checkpoint's dtype."""
    return 4 if checkpoint.dtype == "float32" else 2


def _runtime_bytes(work: Workload) -> int:
    searching = _SEARCH_COMPILER_BYTES if work.steps else 0
    compiler = _COMPILER_BYTES + searching + work.method.compiler_bytes
    return _RUNTIME_BYTES + _TEXT_BYTES * work.reads_text + compiler


def checkpoint_dtype(name: str) -> str:
    """A dtype of NumPy's with the size of a compute dtype."""
    return {"bfloat16": "float16"}.get(name, name)


def _live_width(checkpoint: Checkpoint) -> int:
    """Values per token that one block's forward keeps at its widest: linear inputs and outputs of the wider half."""
    shapes = checkpoint.linear_shapes()
    live = checkpoint.input_widths()
    for linear in checkpoint.family.linears:
        live[linear.reads] += shapes[linear.name][0]
    return max(live.values()) + 2 * checkpoint.config.hidden_size


def device_memory(devices: int) -> tuple[int, bool]:
    """Bytes that each of the first `devices` devices can give, and whether they are the host's own memory."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], False
    return available_memory()[0] // devices, True
