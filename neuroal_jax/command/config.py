"""Every option of a run, in one place: its default, its group and help on the command line, what it affects.

Methods bring options of their own, which stand in the methods' registries and become fields and flags here.
"""

import inspect
import math
import os
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.command import values
from neuroal_jax.command.values import AUTO, flag
from neuroal_jax.data.texts import TEXTS
from neuroal_jax.errors import IllegalCombination, UserError
from neuroal_jax.masks.patterns import N_OF_M, PATTERNS, KeptOf, read_pattern
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine import CHAINS, NONE, REFINEMENTS
from neuroal_jax.registry import Option, Registry
from neuroal_jax.search.objective import OBJECTIVES

DEMO_MODEL = "demo"
NEUROAL, UNIFORM = "neuroal", "uniform"  # what `--allocation auto` is
BUDGETS = ("exact", "reference")
STEPS = ("block", "row", "both")
DTYPES = (AUTO, "float32", "bfloat16", "float16")

# What an option changes: the result; the result of runs that search; or nothing but where, how fast and whether.
Affects = Literal["result", "search", "nothing"]


def _option(
    default: Any, group: str, help: str, affects: Affects = "result", choices: tuple[str, ...] | None = None
) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "affects": affects, "choices": choices})


# The options by which a run names its methods, and the registries that hold them.
METHODS: dict[str, Registry[Any]] = {"pruner": PRUNERS, "allocation": ALLOCATIONS, "refine": REFINEMENTS}
# By own option of a method: that option, the option that names the method, and the method.
OWN_OPTIONS: dict[str, tuple[Option, str, str]] = {
    option.name: (option, kind, method)
    for kind, registry in METHODS.items()
    for method, entry in registry.items()
    for option in entry.options
}

if TYPE_CHECKING:
    OptionsOfMethods: Any
else:
    OptionsOfMethods = make_dataclass(
        "OptionsOfMethods",
        [
            (name, type(own.default), _option(own.default, "methods", own.help))
            for name, (own, *_) in OWN_OPTIONS.items()
        ],
        frozen=True,
        kw_only=True,
    )


def _listed(entries: Registry[Any]) -> str:
    """Names with what they are, where the name does not say it."""
    return ", ".join(
        name if entry.help.lower() == name else f"{name} ({entry.help})" for name, entry in entries.items()
    )


_HURT = "".join(
    f"; --allocation {name} was decided without the latter and makes it worse than uniform does"
    for name, entry in ALLOCATIONS.items()
    if entry.hurts_updates
)


@dataclass(frozen=True)
class PruneConfig(OptionsOfMethods):
    """Options of one run; `neuroal_jax.prune(PruneConfig(...))` is the command in Python.

    Values may be strings, as the command line gives them; they are converted and checked on construction. All are given
    by keyword, and named as the flags are; `dataclasses.replace` makes a variant.

    Raises:
        UserError: Naming the flag, what was found and what is expected.

    Example:
        >>> from neuroal_jax import PruneConfig
        >>> config = PruneConfig(model="demo", sparsity="0.7", pruner="wanda", row_lambdas="0.05,0.1")
        >>> config.sparsity, config.row_lambdas, config.allocation, config.calib
        (0.7, (0.05, 0.1), 'neuroal', 'demo')
        >>> config.directory
        'runs/demo-0.7-wanda-neuroal'
    """

    model: str = _option(
        MISSING, "model", f"checkpoint directory (Hugging Face or Orbax), Hub model id, or '{DEMO_MODEL}'"
    )
    sparsity: float | None = _option(
        None, "what to prune", "share of the prunable weights to remove, e.g. 0.7 (default: the allocation file's)"
    )
    pruner: str = _option("wanda", "what to prune", "how important a weight is", choices=tuple(PRUNERS))
    pattern: str = _option(
        NONE,
        "what to prune",
        "N:M: N of every M neighbouring inputs of a row stay, as 2:4; auto:M: every block has its own N of M",
    )
    allocation: str = _option(
        AUTO,
        "what to prune",
        f"how much goes where: {_listed(ALLOCATIONS)}, or an allocation.json to reuse; auto: neuroal, or uniform where "
        "--pattern N:M leaves no choice",
    )
    refine: str = _option(
        NONE,
        "what to prune",
        f"what to mend after pruning: {_listed(REFINEMENTS)}{_HURT}",
        choices=(NONE, *CHAINS),
    )
    budget: str = _option(
        "exact", "what to prune", "exact number of zeros, or the released code's rounding", choices=BUDGETS
    )
    objective: str = _option(
        AUTO,
        "search",
        f"what a search makes small: {_listed(OBJECTIVES)}; auto: what the allocation's authors take",
        affects="search",
        choices=(AUTO, *OBJECTIVES),
    )
    search_refine: bool = _option(
        False,
        "search",
        "refine the kept weights of every candidate too, on the calibration sequences that the search leaves over",
        affects="search",
    )
    step: str = _option("both", "search", "which steps of NeuroAL to search", affects="search", choices=STEPS)
    block_lambdas: str | tuple[float, ...] = _option(
        AUTO,
        "search",
        "paper, reference or numbers like 0.05,0.1; auto: paper, or reference with --budget reference",
        affects="search",
    )
    row_lambdas: str | tuple[float, ...] = _option(
        AUTO, "search", "as --block-lambdas, for the row step", affects="search"
    )
    candidate_batch: int | None = _option(
        None,
        "search",
        "most lambda candidates to run together (default: what fits in memory; on a CPU, its cache)",
        affects="nothing",
    )
    calib: str = _option(
        AUTO,
        "data",
        f"calibration text: {', '.join(TEXTS)}, or a file (.txt, .jsonl, .json, .csv, also compressed; .parquet; "
        ".npy or .npz of token ids); auto: c4, or demo for the demo model",
    )
    text_column: str | None = _option(
        None,
        "data",
        "column that holds the text in .jsonl, .json, .csv and .parquet files, or conversations, which the tokenizer's "
        "chat template makes text of (default: text, or else messages or conversations)",
    )
    nsamples: int = _option(128, "data", "calibration sequences")
    search_samples: int = _option(8, "data", "of these, how many the search uses", affects="search")
    seqlen: int | None = _option(
        None,
        "data",
        "tokens per sequence (default: 2048, or as many as the model takes; 128 for the demo model; a 2-D token file's "
        "width)",
    )
    seed: int = _option(0, "data", "seed of the sampling")
    eval: str = _option(
        AUTO,
        "data",
        "texts for token perplexity before and after, as --calib, separated by commas, or none; "
        "auto: wikitext2, or demo for the demo model",
    )
    dtype: str = _option(
        AUTO, "model", "compute dtype; auto is float32 on a CPU, else the checkpoint's own", choices=DTYPES
    )
    devices: int | str = _option(
        values.ALL,
        "model",
        "how many of this process's devices candidates and sequences are divided over, or all",
        affects="nothing",
    )
    distributed: str | None = _option(
        None,
        "model",
        "with several processes that search together: HOST:PORT,PROCESSES,RANK of this one, where the first one runs "
        "and writes, or auto under Slurm",
        affects="nothing",
    )
    device_memory: int | None = _option(
        None,
        "output",
        "with --dry-run: memory of each of --devices that are not here, e.g. 80GiB (default: this machine's)",
        affects="nothing",
    )
    compilation_cache: str = _option(
        AUTO,
        "model",
        "directory that keeps compiled programs, or none; auto: the user's cache directory, for the command only",
        affects="nothing",
    )
    measured: str | None = _option(
        None,
        "output",
        "directory in which runs keep for each other what they measure of the dense model and of candidates, as a "
        "sweep's runs do: what is there already is not measured again",
        affects="nothing",
    )
    out: str | None = _option(
        None,
        "output",
        "directory for masks, allocation, manifest and report (default: runs/MODEL-SPARSITY-PRUNER-ALLOCATION, with "
        "pattern and refinement)",
        affects="nothing",
    )
    save_model: str | None = _option(
        None, "output", "also write the pruned model as a Hugging Face checkpoint here", affects="nothing"
    )
    dry_run: bool = _option(
        False, "output", "print the plan, memory and output sizes; load no weights, write nothing", affects="nothing"
    )
    overwrite: bool = _option(
        False, "output", "replace a run that --out or --save-model already holds", affects="nothing"
    )
    resume: bool = _option(
        False, "output", "go on with an interrupted run of these options, if there is one", affects="nothing"
    )

    def __post_init__(self) -> None:
        """Converts and checks every value."""
        demo = self.model == DEMO_MODEL
        object.__setattr__(self, "pattern", values.kept_of("pattern", self.pattern))
        object.__setattr__(self, "allocation", _allocation(self._allocation_asked()))
        converted = {
            "model": values.text("model", self.model),
            "sparsity": self._sparsity(),
            "objective": self._objective(),
            "block_lambdas": self._lambda_set("block_lambdas"),
            "row_lambdas": self._lambda_set("row_lambdas"),
            "candidate_batch": values.optional(values.positive, "candidate_batch", self.candidate_batch),
            "calib": _source("calib", self.calib, "demo" if demo else "c4"),
            "eval": _source("eval", self.eval, "demo" if demo else "wikitext2"),
            "nsamples": values.positive("nsamples", self.nsamples),
            "search_samples": values.positive("search_samples", self.search_samples),
            "text_column": values.optional(values.name, "text_column", self.text_column),
            "seqlen": values.optional(values.positive, "seqlen", self.seqlen),
            "seed": values.whole("seed", self.seed, low=0),
            "devices": values.count_or_all("devices", self.devices),
            "distributed": values.optional(values.processes, "distributed", self.distributed),
            "device_memory": values.optional(values.memory_size, "device_memory", self.device_memory),
            "compilation_cache": values.text("compilation_cache", self.compilation_cache),
            "measured": values.optional(values.text, "measured", self.measured),
            "out": values.optional(values.text, "out", self.out),
            "save_model": values.optional(values.text, "save_model", self.save_model),
            "dry_run": values.boolean("dry_run", self.dry_run),
            "search_refine": values.boolean("search_refine", self.search_refine),
            "overwrite": values.boolean("overwrite", self.overwrite),
            "resume": values.boolean("resume", self.resume),
            **{name: values.own_option(own, getattr(self, name)) for name, (own, *_) in OWN_OPTIONS.items()},
        }
        for name, value in converted.items():
            object.__setattr__(self, name, value)
        for option in fields(self):
            if option.metadata["choices"]:
                values.choice(option.name, getattr(self, option.name), option.metadata["choices"])
        self._check_combinations()
        if self.device_memory is not None and not self.dry_run:
            raise UserError("--device-memory plans for devices that are not here: add --dry-run")
        if self.sparsity is None and self.allocation in ALLOCATIONS:
            raise UserError("--sparsity is missing: give the share of weights to remove, e.g. --sparsity 0.7")
        places = {"--model": self.model, "--out": self.directory, "--save-model": self.model_directory}
        values.refuse_same_directory({**places, "--measured": self.measured})
        cache = None if self.compilation_cache in (AUTO, "none") else self.compilation_cache
        others = {"--out": self.directory, "--compilation-cache": cache, "--measured": self.measured}
        values.refuse_within("--save-model", self.model_directory, others)

    def _check_combinations(self) -> None:
        """Options without effect, and methods that do not go together."""
        for name, (own, kind, method) in OWN_OPTIONS.items():
            value = getattr(self, name)
            if value != own.default and method not in METHODS[kind].named(getattr(self, kind)):
                shown = ",".join(map(str, value)) or NONE if isinstance(value, tuple) else value
                raise UserError(f"{flag(name)} {shown} has no effect without {flag(kind)} {method}")
        swaps = any(not REFINEMENTS[name].updates_weights for name in REFINEMENTS.named(self.refine))
        if swaps and PRUNERS[self.pruner].updates_weights:
            raise IllegalCombination(
                f"--refine {self.refine} does not go with --pruner {self.pruner}: the kept weights already make up for "
                "the pruned ones, so one that is grown back would count twice; use --refine none or another pruner"
            )
        self._check_pattern()
        if self.searches and self.budget == "reference" and OBJECTIVES[self.objective].reads_head:
            raise IllegalCombination(
                f"--objective {self.objective} does not go with --budget reference, which repeats the released code: "
                "use --objective alignment or --budget exact"
            )
        self._check_search_refine()
        self.changed_by_pattern()  # or says why it cannot be

    def _check_pattern(self) -> None:
        asked = self.kept_of
        if asked is None:
            return
        if self.budget == "reference":
            raise IllegalCombination(
                f"--pattern {asked} does not go with --budget reference, as the released code prunes no groups: use "
                "--budget exact"
            )
        if asked.kept is not None and self.allocation in ALLOCATIONS and self.allocation != UNIFORM:
            raise IllegalCombination(
                f"--pattern {asked} keeps as much in every block and row, which leaves --allocation {self.allocation} "
                f"nothing to decide: use --allocation uniform, or --pattern auto:{asked.size}"
            )

    def _check_search_refine(self) -> None:
        if not self.search_refine:
            for name in REFINEMENTS.named(self.refine):
                for _, option in REFINEMENTS[name].in_search:
                    if getattr(self, option) != OWN_OPTIONS[option][0].default:
                        raise UserError(f"{flag(option)} {getattr(self, option)} has no effect without --search-refine")
            return
        if not self.refine_updates or not self.searches:
            updating = " or ".join(name for name, entry in REFINEMENTS.items() if entry.updates_weights)
            searching = " or ".join(name for name, entry in ALLOCATIONS.items() if entry.searches)
            raise IllegalCombination(
                f"--search-refine has no effect without --refine {updating} and --allocation {searching}"
            )
        if not OBJECTIVES[self.objective].reads_head:
            raise IllegalCombination(
                f"--search-refine does not go with --objective {self.objective}, which compares what comes before the "
                "weights that are refined: use --objective kl"
            )
        if self.nsamples <= self.search_samples:
            raise UserError(
                f"--search-refine fits candidates on calibration sequences outside of those that they are scored on: "
                f"--nsamples is {self.nsamples}, expected more than --search-samples {self.search_samples}"
            )

    @property
    def refine_updates(self) -> bool:
        """Whether the refinement changes kept weights."""
        return any(REFINEMENTS[name].updates_weights for name in REFINEMENTS.named(self.refine))

    @property
    def updates_weights(self) -> bool:
        """Whether kept weights change too, so that masks alone do not hold the result."""
        return PRUNERS[self.pruner].updates_weights or self.refine_updates

    @property
    def directory(self) -> str:
        """Where the results go; by default, a place that is named after what was asked for."""
        if self.out is not None:
            return self.out
        model = os.path.basename(os.path.abspath(self.model))[:100] or "model"
        sparsity = "" if self.sparsity is None else f"{self.sparsity:g}"
        groups = "" if self.pattern == NONE else self.pattern.replace("auto:", "auto").replace(":", "of")
        allocation = self.allocation if self.allocation in ALLOCATIONS else Path(self.allocation).stem
        refine = "" if self.refine == NONE else self.refine
        return os.path.join("runs", "-".join(filter(None, [model, sparsity, groups, self.pruner, allocation, refine])))

    @property
    def model_directory(self) -> str | None:
        """Where the pruned model goes; always somewhere where masks alone do not hold the result."""
        if self.save_model is None and self.updates_weights:
            return os.path.join(self.directory, "model")
        return self.save_model

    @property
    def evaluations(self) -> list[str]:
        """The sources of `eval`, one by one; empty for none."""
        return [] if self.eval == "none" else values.sources(self.eval)

    @property
    def searches(self) -> bool:
        """Whether candidates are scored."""
        return self.allocation in ALLOCATIONS and ALLOCATIONS[self.allocation].searches

    @property
    def kept_of(self) -> KeptOf | None:
        """How many of every few neighbours stay; None where these are no sets of competitors."""
        return read_pattern(self.pattern)

    @property
    def by_row(self) -> bool:
        """Whether every row has a number of its own, so that an allocation can tell rows apart."""
        return PATTERNS[PRUNERS[self.pruner].pattern if self.kept_of is None else N_OF_M].by_row

    @property
    def rows_alike(self) -> str:
        """Why an allocation cannot tell rows apart, where it cannot, naming the option."""
        if self.kept_of is None:
            return f"--pruner {self.pruner} chooses over all rows of a linear"
        return f"--pattern {self.pattern} keeps as many in every row"

    def changed_by_pattern(self) -> dict[str, Any]:
        """Options of the search that are others where rows are alike, by name: NeuroAL has no row step then.

        Raises:
            IllegalCombination: If nothing would be left of what was asked for.
        """
        if self.allocation not in ALLOCATIONS or self.by_row:
            return {}
        code = ALLOCATIONS.module(self.allocation)
        changes: dict[str, Any] = code.settle(self.plain(), self.rows_alike) if hasattr(code, "settle") else {}
        return changes

    def plain(self) -> dict[str, Any]:
        """All options by name, as JSON and YAML have them."""
        found = ((option.name, getattr(self, option.name)) for option in fields(self))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found}

    def material(self) -> dict[str, Any]:
        """Of `plain`, the options that the result depends on."""
        affecting = {"result", "search"} if self.searches else {"result"}
        wanted = {option.name for option in fields(self) if option.metadata["affects"] in affecting}
        return {name: value for name, value in self.plain().items() if name in wanted}

    def _allocation_asked(self) -> str:
        if self.allocation != AUTO:
            return self.allocation
        return NEUROAL if self.kept_of is None or self.kept_of.kept is None else UNIFORM

    def _sparsity(self) -> float | None:
        """The sparsity that was asked for, or that the pattern has."""
        found, asked = values.optional(values.fraction, "sparsity", self.sparsity), self.kept_of
        if asked is None:
            return found
        if asked.sparsity is None:
            return found
        if found is not None and not math.isclose(found, asked.sparsity, abs_tol=1e-6):
            raise IllegalCombination(
                f"--sparsity {found:g} and --pattern {asked}, which is {asked.sparsity:g}, differ: leave one of them "
                "out"
            )
        return asked.sparsity

    def _objective(self) -> str:
        if self.objective != AUTO:
            return self.objective
        return ALLOCATIONS[self.allocation].objective if self.allocation in ALLOCATIONS else next(iter(OBJECTIVES))

    def _lambda_set(self, name: str) -> str | tuple[float, ...]:
        value = getattr(self, name)
        if value == AUTO:
            return "reference" if self.budget == "reference" else "paper"
        return values.lambdas(name, value)


def all_options() -> list[Field[Any]]:
    """The options in the order in which people read them: the methods' own ones before the data."""
    return sorted(fields(PruneConfig), key=lambda option: _GROUPS.index(option.metadata["group"]))


def _with_attributes(text: str) -> str:
    """A docstring with every option, which the fields alone know."""
    about = (f"    {option.name}: {option.metadata['help']}" for option in all_options())
    return inspect.cleandoc(text).replace("Raises:\n", "\n".join(["Attributes:", *about, "", "Raises:", ""]), 1)


_GROUPS = ["model", "what to prune", "search", "methods", "data", "output"]
if PruneConfig.__doc__:  # python -OO has none
    PruneConfig.__doc__ = _with_attributes(PruneConfig.__doc__)


def _source(name: str, value: Any, default: str) -> str:
    return default if value == AUTO else values.text(name, value)


def _allocation(value: Any) -> str:
    found = values.text("allocation", value)
    if found not in ALLOCATIONS and not os.path.isfile(found):
        close = values.unknown("allocation", found, ALLOCATIONS)
        raise UserError(f"{close}, or an allocation.json that exists")
    return found
