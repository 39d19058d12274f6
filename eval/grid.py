"""The runs of a sweep: every combination of its lists that makes sense, and where each one's results go."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.command.config import AUTO, METHODS, OWN_OPTIONS, STEPS, PruneConfig
from neuroal_jax.command.values import flag
from neuroal_jax.errors import IllegalCombination, UserError
from neuroal_jax.refine import CHAINS, NONE, REFINEMENTS
from neuroal_jax.search.objective import OBJECTIVES

_TOP_UPS = f"allocations ({', '.join(ALLOCATIONS)}, an allocation.json), {', '.join(CHAINS)}, or owl+dsnot"
# What a sweep varies: the flag, the option of a run that its items set, and help.
AXES = {
    "models": ("model", "checkpoint directories, Hub ids or demo"),
    "pruners": ("pruner", "pruners"),
    "top_ups": ("allocation", _TOP_UPS),
    "steps": ("step", f"for top-ups that search, which of NeuroAL's steps: {', '.join(STEPS)}"),
    "objectives": ("objective", f"for top-ups that search, what they make small: auto, {', '.join(OBJECTIVES)}"),
    "sparsities": ("sparsity", "shares of weights to remove"),
    "seeds": ("seed", "seeds of the sampling"),
}

_OF_A_SEARCH = {"steps", "objectives"}  # the axes that may make no difference to a run


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Its place below the sweep's directory.
        model: As the table calls it.
        top_up: As the table calls it.
        step: Which of NeuroAL's steps it searches; None if none.
        objective: What it makes small; None if it does not search, or by its allocation's own objective.
        config: Its options.
    """

    name: str
    model: str
    top_up: str
    step: str | None
    objective: str | None
    config: PruneConfig


def plan(values: Mapping[str, Any], out: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs of a sweep, and which combinations are left out and why.

    Raises:
        UserError: If an item or an option is none, two runs are one, or an option has an effect in no run. Steps and
            objectives that make no difference to a run make one run.
    """
    shared = {name: value for name, value in values.items() if name not in AXES and name != "out"}
    runs: dict[str, Run] = {}
    points: dict[str, dict[str, Any]] = {}
    left_out, without_effect = [], {name for name, value in shared.items() if value is not False}
    for items in product(*(values[name] for name in AXES)):
        point = dict(zip(AXES, items, strict=True))
        allocation, refine = split_top_up(str(point["top_ups"]))
        options = {option: point[axis] for axis, (option, _) in AXES.items()}
        options |= {"allocation": allocation, "refine": refine}
        options |= {name: value for name, value in shared.items() if _has_effect(name, options)}
        without_effect -= set(options)
        try:
            config = PruneConfig(**options, out=str(out))
        except IllegalCombination as error:
            searches = allocation in ALLOCATIONS and ALLOCATIONS[allocation].searches
            shown = [axis for axis in AXES if axis != "seeds" and (axis not in _OF_A_SEARCH or searches)]
            combination = " ".join(str(point[axis]) for axis in shown if point[axis] != AUTO)
            left_out.append((combination, str(error)))
            continue
        run = _place(config, out)
        other = points.setdefault(run.name, point)
        differing = {axis for axis in AXES if point[axis] != other[axis]}
        if run.name in runs and not (differing and differing <= _OF_A_SEARCH):
            raise UserError(
                f"two runs are called {run.name}: name every model, top-up, step, objective, sparsity and seed once"
            )
        runs.setdefault(run.name, run)
    for name in without_effect:
        if name in OWN_OPTIONS:
            _, kind, method = OWN_OPTIONS[name]
            needed = f"{flag(kind)} {method}, which is"
        else:
            needed = "a search and a refinement that updates weights (as --top-ups shape+refit), which are"
        raise UserError(f"{flag(name)} has no effect without {needed} in no run of the sweep")
    return list(runs.values()), left_out


def _has_effect(name: str, options: Mapping[str, Any]) -> bool:
    allocation, refinements = options["allocation"], REFINEMENTS.named(options["refine"])
    of_candidates = {option for part in refinements for _, option in REFINEMENTS[part].in_search}
    if name == "search_refine" or name in of_candidates:
        searches = allocation in ALLOCATIONS and ALLOCATIONS[allocation].searches
        return searches and any(REFINEMENTS[part].updates_weights for part in refinements)
    if name not in OWN_OPTIONS:
        return True
    _, kind, method = OWN_OPTIONS[name]
    return method in METHODS[kind].named(options[kind])


def _place(config: PruneConfig, out: Path) -> Run:
    """A run with its directory, named by its options as they were understood; NeuroAL's step where it is not both."""
    config = replace(config, **config.changed_by_pattern())
    step = config.step if config.searches and ALLOCATIONS[config.allocation].steps else None
    own = not config.searches or config.objective == ALLOCATIONS[config.allocation].objective
    objective = None if own else config.objective
    model = Path(config.model).name
    if model in ("", ".", ".."):
        model = Path(config.model).resolve().name or "root"
    top_up = config.allocation if config.refine == NONE else f"{config.allocation}+{config.refine}"
    top_up = top_up.removeprefix("uniform+") + (" in the loop" if config.search_refine else "")
    method = top_up.replace(os.sep, "_").replace(" ", "-")[-100:]
    pattern = None if config.kept_of is None else config.pattern.replace(":", "of")
    method += "".join(f"-{part}" for part in (pattern, step, objective) if part not in (None, "both"))
    place = f"{config.pruner}-{method}-{config.sparsity!r}-seed{config.seed}"
    return Run(f"{model}/{place}", model, top_up, step, objective, replace(config, out=str(out / model / place)))


def split_top_up(text: str) -> tuple[str, str]:
    """`owl+dsnot` to an allocation and a refinement; either may stand alone."""
    chains = (chain for chain in CHAINS if text == chain or text.endswith(f"+{chain}"))
    refine = max(chains, key=len, default=NONE)
    if refine == NONE:
        return text, NONE
    return ("uniform" if text == refine else text.removesuffix(f"+{refine}")), refine


def list_items(name: str, value: Any) -> list[Any]:
    """A list, given as one or as text with commas; raises UserError if an item is missing."""
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if not items or "" in items or None in items:
        raise UserError(f"{flag(name)} is {value!r}, expected one or more items, separated by commas")
    return items
