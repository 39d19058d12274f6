"""How weights are chosen once it is known how many: the pruner, its pattern and the refinement of one run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neuroal_jax.masks.patterns import N_OF_M, Pattern, make_pattern, read_pattern
from neuroal_jax.masks.patterns import NONE as ANY
from neuroal_jax.models.family import LinearSpec, Shapes
from neuroal_jax.numerics.least_squares import Products, Solution
from neuroal_jax.numerics.selection import Quota
from neuroal_jax.numerics.statistics import Statistics
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine import NONE, REFINEMENTS
from neuroal_jax.registry import NO_SETTINGS, Settings


@dataclass(frozen=True)
class Method:
    """What the programs that prune are specialised to.

    Attributes:
        pruner: Its name.
        settings: The values of its options.
        pattern: Which weights compete.
        refinement: Its name, or two names joined by +; `none` leaves pruned weights as they are.
        refinement_settings: The values of its options.
    """

    pruner: str
    settings: Settings
    pattern: Pattern
    refinement: str = NONE
    refinement_settings: Settings = NO_SETTINGS

    @property
    def unrefined(self) -> "Method":
        """Without the refinement, which plays no part in a search."""
        return replace(self, refinement=NONE, refinement_settings=NO_SETTINGS)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that pruning a block takes."""
        refinement = {need for name in self._refinements for need in REFINEMENTS[name].needs}
        return tuple(sorted({*PRUNERS[self.pruner].needs, *refinement}))

    @property
    def reads_activations(self) -> bool:
        """Whether a block is pruned by what comes in, not by its weights alone."""
        return bool(self.needs) or self.update is not None

    @property
    def reads_dense_model(self) -> bool:
        """Whether the dense model walks along."""
        return self.update is not None and self.update.dense_share > 0

    @property
    def updates_weights(self) -> bool:
        """Whether kept weights change too."""
        return PRUNERS[self.pruner].updates_weights or self.update is not None

    @property
    def update(self) -> "Update | None":
        """The refinement's part that changes the kept weights, once a block's masks are there; None without one."""
        names = [name for name in self._refinements if REFINEMENTS[name].updates_weights]
        return Update(names[0], REFINEMENTS.restricted(names[0], self.refinement_settings)) if names else None

    @property
    def of_candidates(self) -> "Method":
        """As candidates of a search are refined."""
        pairs = (pair for name in self._refinements for pair in REFINEMENTS[name].in_search)
        settings = self.refinement_settings
        values = {option: min(settings[option], settings[limit]) for option, limit in pairs}
        return replace(self, refinement_settings=settings.replaced(values))

    @property
    def of_masks(self) -> "Method":
        """Without the refinement's part that changes the kept weights."""
        names = [name for name in self._refinements if not REFINEMENTS[name].updates_weights]
        if not names:
            return self.unrefined
        return replace(
            self, refinement=names[0], refinement_settings=REFINEMENTS.restricted(names[0], self.refinement_settings)
        )

    def prepare(self, statistics: Statistics) -> Any:
        """What the linears that share an input need of its statistics."""
        return self._code.prepare(statistics) if hasattr(self._code, "prepare") else statistics

    def prune(
        self, weight: Float[Array, "out in"], prepared: Any, quota: Quota
    ) -> tuple[Float[Array, "out in"], Bool[Array, "out in"]]:
        """A pruned weight, zeros where the mask is False, and the mask (True = kept)."""
        if hasattr(self._code, "prune"):
            weight, mask = self._code.prune(weight, prepared, quota, self.pattern, self.settings)
            return weight, mask
        mask = ~self.pattern.select(self._code.scores(weight, prepared), quota)
        return jnp.where(mask, weight, 0), mask

    def damping(self, prepared: Mapping[str, Any]) -> dict[str, Int[Array, ""]]:
        """By input, the index into `cholesky.DAMPING` that its Hessian took; empty for pruners without one."""
        if not hasattr(self._code, "damping"):
            return {}
        return {name: self._code.damping(of_input) for name, of_input in prepared.items()}

    def sequence_weights(self, sequences: int) -> Float[Array, "sequence"]:
        """By what each sequence counts in the objective of a search."""
        if self.settings.reference and hasattr(self._code, "reference_weights"):
            weights: Array = self._code.reference_weights(sequences)
            return weights
        return jnp.ones(sequences)

    def refine(
        self,
        mask: Bool[Array, "out in"],
        weight: Float[Array, "out in"],
        statistics: Statistics,
        linear: LinearSpec,
    ) -> Bool[Array, "out in"]:
        """The mask that the refinement makes of a mask, of `of_masks`; `weight` is the dense one."""
        code = REFINEMENTS.module(self.refinement)
        refined: Array = code.refine(mask, weight, statistics, linear, self.pattern, self.refinement_settings)
        return refined

    def memory(self, linears: Sequence[LinearSpec], shapes: Shapes, widths: Mapping[str, int]) -> tuple[int, int]:
        """Bytes beside a block's weights that the pruner takes, and those that the refinement takes.

        Args:
            linears: Of a block.
            shapes: `(out, in)` of each.
            widths: Of each input.
        """
        pruner = self._code.memory(shapes, widths) if hasattr(self._code, "memory") else 0
        refinements = [code.memory(linears, shapes) for code in self._refinement_code if hasattr(code, "memory")]
        return pruner, max(refinements, default=0)  # one after the other

    @property
    def compiler_bytes(self) -> int:
        """To compile and to hold what is special to this method."""
        return sum(getattr(code, "COMPILER_BYTES", 0) for code in (self._code, *self._refinement_code))

    @property
    def _code(self) -> ModuleType:
        return PRUNERS.module(self.pruner)

    @property
    def _refinement_code(self) -> list[ModuleType]:
        return [REFINEMENTS.module(name) for name in self._refinements]

    @property
    def _refinements(self) -> tuple[str, ...]:
        """What the refinement is made of."""
        return REFINEMENTS.named(self.refinement)


@dataclass(frozen=True)
class Update:
    """How kept weights change once a block's masks are there.

    Attributes:
        refinement: Its name.
        settings: The values of its options.
    """

    refinement: str
    settings: Settings

    @property
    def dense_share(self) -> float:
        """See `Refinement`."""
        option = REFINEMENTS[self.refinement].dense_share
        return 0.0 if option is None else self.settings[option]

    def __call__(
        self,
        weight: Float[Array, "out in"],
        start: Float[Array, "out in"],
        mask: Bool[Array, "out in"],
        products: Products,
    ) -> Solution:
        """The kept weights of all linears that read an input, see `Refinement`."""
        found: Solution = REFINEMENTS.module(self.refinement).update(weight, start, mask, products, self.settings)
        return found


def make_method(pruner: str, refinement: str = NONE, options: Mapping[str, Any] | None = None) -> Method:
    """A method of registered parts, with the values of a run's `options` by name, or else with the defaults."""
    reference = bool(options and options["budget"] == "reference")
    entry, code = PRUNERS[pruner], PRUNERS.module(pruner)
    # Scores are the same under both budgets, and so are the programs, unless sequences count otherwise in the search.
    differs = hasattr(code, "prune") or hasattr(code, "reference_weights")
    settings = PRUNERS.settings(pruner, options, reference=reference and differs)
    asked = read_pattern((options or {}).get("pattern", ANY))
    if asked is None:
        pattern = make_pattern(entry.pattern, settings[entry.pattern_size] if entry.pattern_size else None)
    else:
        pattern = make_pattern(N_OF_M, asked.size)
    if refinement == NONE:
        return Method(pruner, settings, pattern)
    return Method(pruner, settings, pattern, refinement, REFINEMENTS.settings(refinement, options, reference=reference))
