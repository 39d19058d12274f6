"""What a run will need, before it starts: candidates per batch, memory, bytes written. Shapes only, no weights.

The formula, with C candidates per batch out of K, N search sequences of T tokens, hidden width h, b bytes per value:

    device = 2 * block weights                             (this block and the next; 5 where the device is the host: the
                                                            one before, what the next is read from, and transposes)
           + hidden states                                 (K * N * T * h, or all calibration and evaluation windows)
           + C * (N * T * widest live activations + pruned block weights + selection of the widest linear)
           + with SparseGPT, per candidate: every input's Hessian and its factor, twice the widest to factorise it, and
             the widest linear three times, all fp32
           + with DSnoT, outside of the search: sorts of the widest linear
           + attention scores of a few sequences           (a constant bound)
    state  = 2 * hidden states + masks                     (on disk, for --resume; SparseGPT: and the updated weights)
    host   = Python, JAX and compiled programs (constants) + masks + device where that is the host's own memory
"""

import math
from dataclasses import dataclass

import numpy as np

from neuroal_jax.checkpoint.opened import Checkpoint
from neuroal_jax.machine.memory import available_memory
from neuroal_jax.masks.budget import prunable_weights
from neuroal_jax.models.layers import score_bytes
from neuroal_jax.walk.blocks import candidates_together
from neuroal_jax.walk.programs import Method

_SELECTION_BYTES = 14  # per weight: fp32 score, its sortable bits, ranks of ties, flags
_REFINEMENT_BYTES = 36  # per weight: contributions, scores, gains, two sorts with their keys
_RUNTIME_BYTES = 420 * 2**20  # Python and JAX
_TEXT_BYTES = 270 * 2**20  # tokenizer and data sets
# To compile and to hold the programs of each kind that a run has.
_COMPILER_BYTES = {"prune": 60 * 2**20, "search": 165 * 2**20, "hessian": 110 * 2**20, "dsnot": 60 * 2**20}
_USABLE = 0.8  # share of free memory to plan with
_CACHE_BYTES = 64 * 2**20  # on a CPU, candidates run together while their activations are no more: about its cache


@dataclass(frozen=True)
class Workload:
    """The sizes of a run.

    Attributes:
        steps: Number of candidates of each search step; empty without a search.
        search_samples: Search sequences.
        samples: Calibration sequences.
        windows: Evaluation windows; None where they are not known before the text is read.
        seqlen: Tokens per sequence.
        batch: Sequences per compiled call outside of the search.
        dtype: Compute dtype.
        save_model: Whether the pruned model is written too.
        method: How weights are chosen.
        reads_text: Whether calibration or evaluation is text, not token ids.
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


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes: the peaks are estimates, `certain_host` is less than any such run takes."""

    linears: dict[str, tuple[int, int]]
    num_blocks: int
    prunable: int
    candidate_batch: int
    device_peak: int
    host_peak: int
    certain_host: int
    device_available: int
    output_bytes: int
    state_bytes: int


def make_plan(checkpoint: Checkpoint, work: Workload, limit: int | None) -> Plan:
    """Plans a run; `limit` is the user's bound on candidates per batch."""
    shapes = checkpoint.linear_shapes()
    size = np.dtype(checkpoint_dtype(work.dtype)).itemsize
    hidden = checkpoint.config.hidden_size * size
    block = size * sum(math.prod(shape) for shape in shapes.values())
    live = size * _live_width(checkpoint)
    selection = _SELECTION_BYTES * max(math.prod(shape) for shape in shapes.values())
    available, on_host = device_memory()
    hessians = _hessian_bytes(checkpoint) if "hessian" in work.method.needs else 0
    refinement = _REFINEMENT_BYTES * max(map(math.prod, shapes.values())) if work.method.refine else 0
    attention = 2 * max(score_bytes(), 4 * checkpoint.config.num_attention_heads * work.seqlen**2)
    fixed = (5 if on_host else 2) * block + attention

    tokens = work.search_samples * work.seqlen
    per_candidate = tokens * (live + hidden) + block + selection + hessians
    search_fixed = fixed + sum(work.steps[-1:]) * tokens * hidden
    fits = int((_USABLE * available - search_fixed) // per_candidate)
    wanted = limit or (_CACHE_BYTES // (tokens * live) if on_host else fits)
    batch = candidates_together(work.steps, max(1, min(wanted, fits))) if work.steps else 0
    search_peak = search_fixed + batch * per_candidate if batch else 0

    windows = max(work.samples, work.windows or 0)
    walk_tokens = work.batch * work.seqlen
    walk_peak = fixed + windows * work.seqlen * hidden + walk_tokens * live + block + selection + hessians + refinement

    mask_bytes = checkpoint.num_blocks * sum(out * -(-width // 8) for out, width in shapes.values())
    device = max(search_peak, walk_peak)
    # A block, what is left of it and the next one; all hidden states where the method reads activations; the masks.
    states = work.samples * work.seqlen * hidden if work.method.needs else 0
    held = block * (3 if checkpoint.num_blocks > 1 else 2)
    certain = (held + states if on_host else 0) + mask_bytes
    search_tokens = tokens * batch * -(-max(work.steps, default=0) // batch) if batch else 0
    updated = prunable_weights(shapes, checkpoint.num_blocks) * _stored_size(checkpoint)
    updated *= work.method.pruner.updates_weights
    model_bytes = sum(info.size * {"F32": 4}.get(info.dtype, 2) for info in checkpoint.source.infos.values())
    return Plan(
        linears=shapes,
        num_blocks=checkpoint.num_blocks,
        prunable=prunable_weights(shapes, checkpoint.num_blocks),
        candidate_batch=batch,
        device_peak=device,
        host_peak=_runtime_bytes(work) + mask_bytes + (device if on_host else 2 * block),
        certain_host=certain,
        device_available=available,
        output_bytes=mask_bytes + (model_bytes if work.save_model else 0),
        state_bytes=2 * hidden * max(search_tokens, windows * work.seqlen) + mask_bytes + updated,
    )


def _stored_size(checkpoint: Checkpoint) -> int:
    """Bytes of a weight in the checkpoint's dtype."""
    return 4 if checkpoint.dtype == "float32" else 2


def _runtime_bytes(work: Workload) -> int:
    has = {
        "prune": True,
        "search": bool(work.steps),
        "hessian": "hessian" in work.method.needs,
        "dsnot": work.method.refine is not None,
    }
    compiler = sum(size for kind, size in _COMPILER_BYTES.items() if has[kind])
    return _RUNTIME_BYTES + _TEXT_BYTES * work.reads_text + compiler


def checkpoint_dtype(name: str) -> str:
    """A dtype of NumPy's with the size of a compute dtype."""
    return {"bfloat16": "float16"}.get(name, name)


def _live_width(checkpoint: Checkpoint) -> int:
    """Values per token that one block's forward keeps at its widest: linear inputs and outputs of the wider half."""
    shapes = checkpoint.linear_shapes()
    readers: dict[str, int] = {}
    for linear in checkpoint.family.linears:
        out, width = shapes[linear.name]
        readers[linear.reads] = readers.get(linear.reads, width) + out
    widest = max(readers.values())
    return widest + 2 * checkpoint.config.hidden_size


def _hessian_bytes(checkpoint: Checkpoint) -> int:
    """What SparseGPT holds while it prunes one block."""
    shapes = checkpoint.linear_shapes()
    widths = {linear.reads: shapes[linear.name][1] for linear in checkpoint.family.linears}
    squares = [width**2 for width in widths.values()]
    return 4 * (2 * sum(squares) + 2 * max(squares) + 3 * max(math.prod(shape) for shape in shapes.values()))


def device_memory() -> tuple[int, bool]:
    """Bytes that the first device can give, and whether they are the host's own memory."""
    import jax

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], False
    return available_memory()[0], True
