"""Every option of a run, in one place: its default, its group and help on the command line, what it accepts."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from neuroal_jax.errors import IllegalCombination, UserError

PRUNERS = ("magnitude", "wanda", "multiflow", "sparsegpt")
ALLOCATIONS = ("uniform", "neuroal", "owl", "alpha")
REFINEMENTS = ("none", "dsnot")
HUB_TEXTS = ("wikitext2", "c4", "ptb")
TEXTS = (*HUB_TEXTS, "demo")
LAMBDA_SETS = ("paper", "reference")
AUTO = "auto"
MAX_LAMBDA = 0.5  # densities span 2 * lambda, and no span exceeds 1


def _option(
    default: Any,
    group: str,
    help: str,
    choices: tuple[str, ...] | None = None,
    only: tuple[str, str] | None = None,
) -> Any:
    """A field; `only` names the one option and value with which it has an effect."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, "only": only})


@dataclass(frozen=True)
class PruneConfig:
    """Options of one run; `neuroal_jax.prune(PruneConfig(...))` is the command in Python.

    Values may be strings, as the command line gives them; they are converted and checked on construction.

    Raises:
        UserError: Naming the flag, what was found and what is expected.
    """

    model: str = _option(MISSING, "model", "checkpoint directory (Hugging Face or Orbax), Hub model id, or 'demo'")
    sparsity: float | None = _option(
        None, "what to prune", "share of the prunable weights to remove, e.g. 0.7 (default: the allocation file's)"
    )
    pruner: str = _option("wanda", "what to prune", "how important a weight is", PRUNERS)
    allocation: str = _option(
        "neuroal",
        "what to prune",
        "how much goes where: uniform, neuroal, owl, alpha (AlphaPruning), or an allocation.json to reuse",
    )
    refine: str = _option("none", "what to prune", "swap weights after pruning", REFINEMENTS)
    step: str = _option("both", "search", "which steps of NeuroAL to search", ("block", "row", "both"))
    block_lambdas: str | tuple[float, ...] = _option(
        AUTO, "search", "paper, reference or numbers like 0.05,0.1; auto: paper, or reference with --budget reference"
    )
    row_lambdas: str | tuple[float, ...] = _option(AUTO, "search", "as --block-lambdas, for the row step")
    owl_m: float = _option(
        5.0, "methods", "OWL: outliers exceed this many times the mean score", only=("allocation", "owl")
    )
    owl_lambda: float = _option(0.08, "methods", "OWL: half the span of the densities", only=("allocation", "owl"))
    alpha_epsilon: float = _option(
        0.3, "methods", "AlphaPruning: half the span of the ratios", only=("allocation", "alpha")
    )
    dsnot_cycles: int = _option(50, "methods", "DSnoT: most swaps per row", only=("refine", "dsnot"))
    dsnot_threshold: float = _option(
        0.1, "methods", "DSnoT: rows with at most this error are left alone", only=("refine", "dsnot")
    )
    sparsegpt_group: int = _option(128, "methods", "SparseGPT: columns pruned together", only=("pruner", "sparsegpt"))
    candidate_batch: int | None = _option(
        None, "search", "most lambda candidates to run together (default: what fits in memory; on a CPU, its cache)"
    )
    budget: str = _option(
        "exact", "what to prune", "exact number of zeros, or the released code's rounding", ("exact", "reference")
    )
    calib: str = _option(
        AUTO,
        "data",
        "calibration text: c4, wikitext2, ptb, demo, or a file (.txt and .jsonl, also .gz; .parquet; "
        ".npy or .npz of token ids); auto: c4, or demo for the demo model",
    )
    nsamples: int = _option(128, "data", "calibration sequences")
    search_samples: int = _option(8, "data", "of these, how many the search uses")
    seqlen: int | None = _option(
        None, "data", "tokens per sequence (default: 2048; 128 for the demo model; a 2-D token file's width)"
    )
    seed: int = _option(0, "data", "seed of the sampling")
    eval: str = _option(
        AUTO,
        "data",
        "texts for token perplexity before and after, as --calib, separated by commas, or none; "
        "auto: wikitext2, or demo for the demo model",
    )
    dtype: str = _option(
        AUTO,
        "model",
        "compute dtype; auto is float32 on a CPU, else the checkpoint's own",
        (AUTO, "float32", "bfloat16", "float16"),
    )
    compilation_cache: str = _option(
        AUTO,
        "model",
        "directory that keeps compiled programs, or none; auto: the user's cache directory, for the command only",
    )
    out: str | None = _option(None, "output", "directory for masks, allocation, manifest and report")
    save_model: str | None = _option(None, "output", "also write the pruned model as a Hugging Face checkpoint here")
    dry_run: bool = _option(False, "output", "print the plan, memory and output sizes; load no weights, write nothing")
    overwrite: bool = _option(False, "output", "replace a run that --out or --save-model already holds")
    resume: bool = _option(False, "output", "go on with an interrupted run of these options, if there is one")

    def __post_init__(self) -> None:
        """Converts and checks every value."""
        demo = self.model == "demo"
        converted = {
            "model": _text("model", self.model),
            "sparsity": _optional(_fraction, "sparsity", self.sparsity),
            "allocation": _allocation(self.allocation),
            "block_lambdas": self._lambda_set("block_lambdas"),
            "row_lambdas": self._lambda_set("row_lambdas"),
            "owl_m": _ranged("owl_m", self.owl_m, 0, math.inf),
            "owl_lambda": _ranged("owl_lambda", self.owl_lambda, 0, MAX_LAMBDA),
            "alpha_epsilon": _ranged("alpha_epsilon", self.alpha_epsilon, 0, 1),
            "dsnot_cycles": _positive("dsnot_cycles", self.dsnot_cycles),
            "dsnot_threshold": _ranged("dsnot_threshold", self.dsnot_threshold, 0, math.inf),
            "sparsegpt_group": _positive("sparsegpt_group", self.sparsegpt_group),
            "candidate_batch": _optional(_positive, "candidate_batch", self.candidate_batch),
            "calib": _source("calib", self.calib, "demo" if demo else "c4"),
            "eval": _source("eval", self.eval, "demo" if demo else "wikitext2"),
            "nsamples": _positive("nsamples", self.nsamples),
            "search_samples": _positive("search_samples", self.search_samples),
            "seqlen": _optional(_positive, "seqlen", self.seqlen),
            "seed": _whole("seed", self.seed, low=0),
            "compilation_cache": _text("compilation_cache", self.compilation_cache),
            "out": _optional(_text, "out", self.out),
            "save_model": _optional(_text, "save_model", self.save_model),
            "dry_run": _boolean("dry_run", self.dry_run),
            "overwrite": _boolean("overwrite", self.overwrite),
            "resume": _boolean("resume", self.resume),
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        for option in fields(self):
            choices = option.metadata["choices"]
            value = getattr(self, option.name)
            if choices and value not in choices:
                raise UserError(_unknown(option.name, value, choices))
        self._refuse_without_effect()
        if self.pruner == "sparsegpt":
            self._check_sparsegpt()
        if not self.dry_run and self.out is None:
            raise UserError("--out is missing: name the directory for the results")
        if self.sparsity is None and self.allocation in ALLOCATIONS:
            raise UserError("--sparsity is missing: give the share of weights to remove, e.g. --sparsity 0.7")
        refuse_same_directory({"--model": self.model, "--out": self.out, "--save-model": self.model_directory})

    def _refuse_without_effect(self) -> None:
        for option in fields(self):
            value, only = getattr(self, option.name), option.metadata["only"]
            if only and value != option.default and getattr(self, only[0]) != only[1]:
                raise UserError(f"{flag(option.name)} {value} has no effect without {flag(only[0])} {only[1]}")

    def _check_sparsegpt(self) -> None:
        """SparseGPT changes the kept weights, and chooses over all rows: what follows from that."""
        if self.refine != "none":
            raise IllegalCombination(
                f"--refine {self.refine} does not go with --pruner sparsegpt: the kept weights already make up for the "
                "pruned ones, so one that is grown back would count twice; use --refine none or another pruner"
            )
        if self.allocation == "neuroal" and self.step == "row":
            raise IllegalCombination(
                "--step row does not go with --pruner sparsegpt, which chooses over all rows of a linear: "
                "use --step block or another pruner"
            )

    @property
    def model_directory(self) -> str | None:
        """Where the pruned model goes: SparseGPT's masks alone do not hold its result, so it is always saved."""
        if self.save_model is None and self.pruner == "sparsegpt" and self.out is not None:
            return os.path.join(self.out, "model")
        return self.save_model

    @property
    def evaluations(self) -> list[str]:
        """The sources of `eval`, one by one; empty for none."""
        return [] if self.eval == "none" else sources(self.eval)

    def plain(self) -> dict[str, Any]:
        """All options by name, as JSON and YAML have them."""
        values = ((option.name, getattr(self, option.name)) for option in fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    def _lambda_set(self, name: str) -> str | tuple[float, ...]:
        value = getattr(self, name)
        if value == AUTO:
            return "reference" if self.budget == "reference" else "paper"
        return _lambdas(name, value)


def sources(text: str) -> list[str]:
    """Texts separated by commas; a file whose name has a comma stands alone."""
    return [text] if os.path.isfile(text) else [os.path.expanduser(item.strip()) for item in text.split(",")]


def refuse_same_directory(paths: Mapping[str, str | None]) -> None:
    """Raises UserError if two of these directories, by flag, are one."""
    seen: dict[str, str] = {}
    for flag, value in paths.items():
        if value is not None and not (flag == "--model" and value == "demo"):
            path = os.path.realpath(value)
            if path in seen:
                raise UserError(f"{seen[path]} and {flag} are the same directory, {value}: choose another")
            seen[path] = flag


def check_names(values: Mapping[str, Any], known: Collection[str], origin: str) -> dict[str, Any]:
    """Option names with underscores; raises UserError for one that is not `known`."""
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{origin}: " + _unknown("option", str(key), tuple(known)).removeprefix("--option "))
        if name in result:
            raise UserError(f"{origin}: {name} appears twice")
        result[name] = value
    return result


def flag(name: str) -> str:
    """An option's flag on the command line."""
    return "--" + name.replace("_", "-")


def _unknown(name: str, value: Any, choices: tuple[str, ...]) -> str:
    close = get_close_matches(str(value), choices, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{flag(name)} {value} is unknown{hint}: expected one of {', '.join(choices)}"


def _optional(convert: Any, name: str, value: Any) -> Any:
    return None if value is None else convert(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise UserError(f"{flag(name)} is {value!r}, expected a name or a path")
    return os.path.expanduser(value)


def _source(name: str, value: Any, default: str) -> str:
    return default if value == AUTO else _text(name, value)


def _number(name: str, value: Any, expected: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{flag(name)} is {value!r}, expected {expected}") from None


def _fraction(name: str, value: Any) -> float:
    expected = "a number between 0 and 1, both excluded"
    number = _number(name, value, expected)
    if not 0 < number < 1:  # false for NaN too
        raise UserError(f"{flag(name)} is {value}, expected {expected}")
    return number


def _whole(name: str, value: Any, low: int) -> int:
    expected = f"a whole number of at least {low}"
    number = _number(name, value, expected)
    if not math.isfinite(number) or number != int(number) or not low <= number < 2**31:
        raise UserError(f"{flag(name)} is {value}, expected {expected}")
    return int(number)


def _ranged(name: str, value: Any, low: float, high: float) -> float:
    bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
    number = _number(name, value, f"a number {bounds}")
    if not low <= number <= high or not math.isfinite(number):
        raise UserError(f"{flag(name)} is {value}, expected a number {bounds}")
    return number


def _positive(name: str, value: Any) -> int:
    return _whole(name, value, low=1)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{flag(name)} is {value!r}, expected true or false")
    return value


def _allocation(value: Any) -> str:
    text = _text("allocation", value)
    if text not in ALLOCATIONS and not os.path.isfile(text):
        close = _unknown("allocation", text, ALLOCATIONS)
        raise UserError(f"{close}, or an allocation.json that exists")
    return text


def _lambdas(name: str, value: Any) -> str | tuple[float, ...]:
    if isinstance(value, str) and value in LAMBDA_SETS:
        return value
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    expected = f"'paper', 'reference' or numbers from 0 to {MAX_LAMBDA}"
    if not isinstance(items, list | tuple):
        items = [items]
    if not items:
        raise UserError(f"{flag(name)} is empty, expected {expected}")
    numbers = tuple(_number(name, item, expected) for item in items)
    bad = [number for number in numbers if not 0 <= number <= MAX_LAMBDA]
    if bad:
        raise UserError(f"{flag(name)} holds {bad[0]}, expected {expected}")
    return numbers
