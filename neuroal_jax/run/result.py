"""What a run gives back to whoever called it from Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import number
from neuroal_jax.masks.file import PackedMasks
from neuroal_jax.report.facts import Facts, run_title
from neuroal_jax.report.page import REPORT, is_report, rewrite_report
from neuroal_jax.run.plan import Plan, gib

_ELSEWHERE = "in all but the first of several processes there is no result"


@dataclass(frozen=True, repr=False)
class PruneResult:
    """What a run gives back. In a notebook it shows itself: a summary, and the plots of blocks and candidates.

    Attributes:
        out: Directory of the results; None for a dry run, and in all but the first of several processes.
        plan: Memory in bytes, candidates per batch, sizes; None in all but the first of several processes.
        manifest: The content of manifest.json; empty for a dry run, and in all but the first of several processes.
        masks: The packed masks: `masks.mask(name)` is bool `[out, in]`, True = kept, by Hugging Face name; None
            likewise.
        allocation: Sparsity of every linear: `allocation.blocks[b][linear]`, a number or float64 `[out]`; None
            likewise.

    Example:
        >>> import tempfile, neuroal_jax
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none", out=tempfile.mkdtemp()
        ... )
        >>> result = neuroal_jax.prune(config)
        >>> result.manifest["sparsity"]["zeros"], result.masks.zeros()
        (516096, 516096)
        >>> result.masks.mask("model.layers.0.self_attn.q_proj.weight").shape
        (128, 128)
        >>> result.report().name
        'report.html'
    """

    out: Path | None
    plan: Plan | None
    manifest: Mapping[str, Any]
    masks: PackedMasks | None = None
    allocation: Allocation | None = None

    def report(self) -> Path:
        """The path of report.html, which is written again if it is gone.

        Raises:
            UserError: If there is none (of a dry run), or the directory of the results is gone or damaged.
        """
        if self.out is None:
            raise UserError(f"no report: dry runs write nothing, and {_ELSEWHERE}")
        path = self.out / REPORT
        if not is_report(path):
            rewrite_report(self.out)
        return path

    def __repr__(self) -> str:
        """One line."""
        if self.plan is None:
            return f"PruneResult({_ELSEWHERE})"
        if self.out is None:
            return f"PruneResult(dry run: {self.plan.prunable} prunable weights in {self.plan.num_blocks} blocks)"
        found = self.manifest["token_ppl"]
        if found["dense"] is None:
            return f"PruneResult({run_title(self.manifest)}, in {self.out})"
        dense, pruned = number(found["dense"]), number(found["pruned"])
        perplexity = f"token_ppl@{found['seqlen']} {dense:.2f} -> {pruned:.2f}"
        return f"PruneResult({run_title(self.manifest)}, {perplexity}, in {self.out})"

    def _repr_html_(self) -> str:
        """What a notebook shows: no scripts, nothing from a network."""
        from neuroal_jax.report.notebook import run_html, table  # late, as all that draws

        if self.plan is None:
            return table("Nothing pruned here", {"result": (_ELSEWHERE, "")})
        if self.out is None or self.allocation is None:
            return table("Plan of a dry run", _plan_facts(self.plan))
        return run_html(self.manifest, list(self.allocation.blocks), self.out)


def _plan_facts(plan: Plan) -> Facts:
    return {
        "prunable weights": (f"{plan.prunable:,}", f"in {plan.num_blocks} blocks"),
        "candidates per batch": (str(plan.candidate_batch) if plan.candidate_batch else "no search", ""),
        "device memory peak": (gib(plan.device_peak), f"of {gib(plan.device_available)}; {plan.devices} devices"),
        "host memory peak": (gib(plan.host_peak), "by estimate"),
        "to be written": (gib(plan.output_bytes), f"and for resume at most {gib(plan.state_bytes)}"),
    }
