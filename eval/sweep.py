"""One table from many runs: models x pruners x top-ups x sparsities x seeds. Finished runs are not run again.

python -m eval.sweep --models demo --pruners wanda,sparsegpt --top-ups uniform,owl --sparsities 0.6,0.7 --out DIR
python -m eval.sweep --preset paper --out DIR --dry-run

Every other option of `python -m neuroal_jax.prune` holds for all runs. Each run is a process of its own, so that its
peak memory is its own; it is recognised as finished by its manifest. With `--tasks`, lm-eval measures every pruned
model, and every dense one once. DIR holds the runs, their logs, `table.csv`, `table.md`, and `report.html` with plots
and a table to sort.
"""

import csv
import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from neuroal_jax.command.config import PRUNERS, REFINEMENTS, PruneConfig, flag
from neuroal_jax.command.parser import Parser, add_options, read_yaml
from neuroal_jax.command.program import run_program
from neuroal_jax.data.texts import PAPER_TEXTS
from neuroal_jax.errors import IllegalCombination, UserError, shorten
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text
from neuroal_jax.report.page import REPORT, sweep_report

from . import cost
from .cost import PAPER_MODELS
from .zero_shot import TASKS

# What a sweep varies: the flag, the option of a run that its items set, and help.
AXES = {
    "models": ("model", "checkpoint directories, Hub ids or demo"),
    "pruners": ("pruner", "pruners"),
    "top_ups": ("allocation", "allocations (uniform, neuroal, owl, alpha, an allocation.json), dsnot, or owl+dsnot"),
    "sparsities": ("sparsity", "shares of weights to remove"),
    "seeds": ("seed", "seeds of the sampling"),
}
DEFAULTS: dict[str, list[Any]] = {"pruners": ["wanda"], "top_ups": ["uniform", "neuroal"], "seeds": [0]}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "models": [*PAPER_MODELS],
        "pruners": list(PRUNERS),
        "top_ups": ["uniform", "dsnot", "owl", "alpha", "neuroal"],
        "sparsities": [0.6, 0.7, 0.8],
        "eval": ",".join(PAPER_TEXTS),
        "tasks": ",".join(TASKS),
    }
}
# The table's columns; between the two come perplexities and, with tasks, accuracies.
HEAD = ("model", "pruner", "top_up", "sparsity", "achieved", "seed", "lambda_block", "lambda_row", "seqlen")
TAIL = ("search_seconds", "prune_seconds", "host_peak_mib", "device_peak_mib", "error")
ZERO_SHOT = ("tasks", "task_data", "limit")
ACCURACY = "accuracy.json"
_MEASURED = ("pruned_token_ppl", "acc_mean")
# To a run's result:
_IMMATERIAL = {"out", "save_model", "overwrite", "resume", "dry_run", "candidate_batch", "compilation_cache"}
_OF_THE_SEARCH = {"step", "block_lambdas", "row_lambdas", "search_samples"}
_MANIFEST_BYTES = 2**28  # more than any manifest has


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its place below the sweep's directory, the names in its row, and its options."""

    name: str
    model: str
    top_up: str
    config: PruneConfig


@dataclass(frozen=True)
class ZeroShot:
    """What lm-eval measures of every model: tasks (none: nothing), where their rows lie, how many rows of each."""

    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error or failed runs, 130 interrupted)."""

    def work() -> None:
        values = parse_arguments(arguments)
        (estimate if values.pop("dry_run") else sweep)(values)

    return run_program(work, interrupted="interrupted: finished runs stay; the same command goes on from there")


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The sweep that the command line and its `--config` file describe; flags win over the file.

    Raises:
        UserError: If an option is unknown or an axis is empty.
    """
    parser = Parser(prog="python -m eval.sweep", description="One table from many runs.", allow_abbrev=False)
    axes = parser.add_argument_group("sweep", "lists, separated by commas")
    for name, (_, text) in AXES.items():
        default = f" (default: {','.join(map(str, DEFAULTS[name]))})" if name in DEFAULTS else ""
        axes.add_argument(flag(name), metavar="LIST", help=text + default)
    axes.add_argument("--out", metavar="DIR", help="directory for the runs and the table")
    axes.add_argument("--config", metavar="FILE", help="YAML file of these options; flags win over it")
    axes.add_argument("--preset", choices=PRESETS, help="the paper's grid; other options change it")
    axes.add_argument("--dry-run", action="store_true", help="list the runs and estimate their cost; run nothing")
    tasks = parser.add_argument_group("zero-shot accuracy")
    tasks.add_argument(
        "--tasks", metavar="LIST", help="tasks of lm-eval, separated by commas, or paper: the paper's seven"
    )
    tasks.add_argument("--task-data", metavar="DIR", help="folder of the tasks' rows, as for eval.zero_shot")
    tasks.add_argument("--limit", metavar="N", help="only the first N rows of each task")
    swept = {option for option, _ in AXES.values()} | {"refine", "out", "save_model", "overwrite", "resume", "dry_run"}
    add_options(parser, leave_out=swept)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    file, dry_run = given.pop("config", None), given.pop("dry_run")
    shared = (option.name for option in fields(PruneConfig) if option.name not in swept)
    from_file = {} if file is None else read_yaml(Path(file), [*AXES, "out", "preset", *ZERO_SHOT, *shared])
    preset = given.pop("preset", None) or from_file.pop("preset", None)
    if preset not in (None, *PRESETS):
        raise UserError(f"--preset {preset} is unknown: expected one of {', '.join(PRESETS)}")
    values = {**DEFAULTS, **PRESETS.get(str(preset), {}), **from_file, **given, "dry_run": dry_run}
    for name in (*AXES, "out"):
        if values.get(name) is None:
            raise UserError(f"{flag(name)} is missing (see --help)")
    for name in AXES:
        values[name] = _items(name, values[name])
    return values


def take_zero_shot(values: dict[str, Any]) -> ZeroShot:
    """Takes what is said about tasks out of a sweep's values.

    Raises:
        UserError: If it makes no sense.
    """
    found = {name: values.pop(name, None) for name in ZERO_SHOT}
    if found["tasks"] in (None, "none"):
        without = [name for name in ("task_data", "limit") if found[name] is not None]
        if without:
            raise UserError(f"{flag(without[0])} has no effect without --tasks")
        return ZeroShot()
    tasks = TASKS if found["tasks"] == "paper" else tuple(map(str, _items("tasks", found["tasks"])))
    limit = found["limit"]
    if limit is not None and not (str(limit).isdecimal() and int(limit) > 0):
        raise UserError(f"--limit is {limit}, expected a whole number of at least 1")
    data = found["task_data"]
    if data is not None and not os.path.isdir(data):
        raise UserError(f"--task-data {data} is no directory")
    return ZeroShot(tasks, data, None if limit is None else int(limit))


def _items(name: str, value: Any) -> list[Any]:
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    items = [item.strip() if isinstance(item, str) else item for item in items]
    if not items or "" in items or None in items:
        raise UserError(f"{flag(name)} is {value!r}, expected one or more items, separated by commas")
    return items


def sweep(values: Mapping[str, Any]) -> None:
    """Runs what is missing, one run after the other, and keeps the table up to date after each.

    Raises:
        OSError: If something cannot be written.
        UserError: If nothing can be run, a directory holds a run with other options, or runs failed (after all others).
    """
    values = dict(values)
    out, zero_shot = Path(str(values["out"])), take_zero_shot(values)
    runs = planned(values, out)
    known = {run.name: finished(out, run) for run in runs}
    rows = dict(known)
    (out / "logs").mkdir(parents=True, exist_ok=True)
    for number, run in enumerate(runs, 1):
        start = time.perf_counter()
        row = known[run.name] or execute(run, out)
        if zero_shot.tasks and not row["error"]:
            row |= accuracies(run, out, zero_shot)
        rows[run.name] = row
        write_tables(out, rows)
        outcome = row["error"] or ", ".join(f"{name} {row[name]}" for name in row if name.startswith(_MEASURED))
        took = "finished before" if known[run.name] else f"{time.perf_counter() - start:.0f} s"
        print(f"[{number}/{len(runs)}] {run.name}: {outcome} ({took})", flush=True)
    print(markdown([row for row in rows.values() if row]))
    failed = [name for name, row in rows.items() if row and row["error"]]
    print(f"written to {out}/table.csv, {out}/table.md and {out}/{REPORT}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {shorten(failed)}; see {out}/logs")


def planned(values: Mapping[str, Any], out: Path) -> list[Run]:
    """All runs, after a word about what is left out.

    Raises:
        UserError: As `plan`, and if nothing is left.
    """
    runs, left_out = plan(values, out)
    reasons: dict[str, list[str]] = {}
    for combination, reason in left_out:
        reasons.setdefault(reason, []).append(combination)
    for reason, combinations in reasons.items():
        print(f"left out: {shorten(combinations)}: {reason}")
    if not runs:
        raise UserError("no combination can be run")
    return runs


def estimate(values: Mapping[str, Any]) -> None:
    """Lists the runs and what they will cost; runs and writes nothing.

    Raises:
        UserError: As `plan`.
    """
    values = dict(values)
    out, zero_shot = Path(str(values["out"])), take_zero_shot(values)
    runs = planned(values, out)
    done = {run.name for run in runs if finished(out, run)}
    print(
        cost.report([(run.name, run.config) for run in runs if run.name not in done], zero_shot.tasks, zero_shot.limit)
    )
    print(f"{len(runs)} runs, of which {len(done)} are finished; nothing was run")


def plan(values: Mapping[str, Any], out: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """All runs of a sweep, and which combinations are left out and why.

    Raises:
        UserError: If an item or an option is none, two runs are one, or an option has an effect in no run.
    """
    shared = {name: value for name, value in values.items() if name not in AXES and name != "out"}
    runs: dict[str, Run] = {}
    left_out, without_effect = [], set(shared)
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
            combination = f"{point['models']} {point['pruners']} {point['top_ups']} {point['sparsities']}"
            left_out.append((combination, str(error)))
            continue
        run = _place(config, out)
        if run.name in runs:
            raise UserError(f"two runs are called {run.name}: name every model, top-up, sparsity and seed once")
        runs[run.name] = run
    for name in without_effect:
        method, value = _ONLY[name]
        raise UserError(f"{flag(name)} has no effect without {flag(method)} {value}, which is in no run of the sweep")
    return list(runs.values()), left_out


_ONLY = {option.name: option.metadata["only"] for option in fields(PruneConfig) if option.metadata["only"]}


def _has_effect(name: str, options: Mapping[str, Any]) -> bool:
    return name not in _ONLY or options[_ONLY[name][0]] == _ONLY[name][1]


def _place(config: PruneConfig, out: Path) -> Run:
    """A run with its directory, named by its options as they were understood."""
    model = Path(config.model).name
    if model in ("", ".", ".."):
        model = Path(config.model).resolve().name or "root"
    top_up = config.allocation if config.refine == "none" else f"{config.allocation}+{config.refine}"
    top_up = top_up.removeprefix("uniform+")
    place = f"{config.pruner}-{top_up.replace(os.sep, '_')[-100:]}-{config.sparsity!r}-seed{config.seed}"
    return Run(f"{model}/{place}", model, top_up, replace(config, out=str(out / model / place)))


def split_top_up(text: str) -> tuple[str, str]:
    """`owl+dsnot` to an allocation and a refinement; either may stand alone."""
    allocation, plus, refine = text.rpartition("+")
    if plus and refine in REFINEMENTS:
        return allocation, refine
    return ("uniform", text) if text in REFINEMENTS else (text, "none")


def finished(out: Path, run: Run) -> dict[str, Any] | None:
    """The row of a finished run with these options; None where there is none.

    Raises:
        UserError: If the run that is there had other options.
    """
    path = out / run.name / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path, _MANIFEST_BYTES)
        options = {**manifest["options"], **manifest["asked"]}
        row = describe(run, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is no manifest of this version ({error}): remove its directory") from error
    ignored = _IMMATERIAL | (set() if run.config.allocation == "neuroal" else _OF_THE_SEARCH)
    for name, value in run.config.plain().items():
        if name not in ignored and options.get(name) != value:
            raise UserError(
                f"{path.parent} holds a run with {flag(name)} {options.get(name)}, not {value}: "
                "choose another --out, or remove that directory"
            )
    return row


def execute(run: Run, out: Path) -> dict[str, Any]:
    """Runs a process; returns its row, with what went wrong if something did. Its output goes to a log."""
    directory = out / run.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    (directory / ACCURACY).unlink(missing_ok=True)  # of a run whose manifest was removed
    log = out / "logs" / f"{run.name.replace('/', '-')}.log"
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**run.config.plain(), "resume": True}))
    error = process(["neuroal_jax.prune", "--config", str(config)], log)
    row = finished(out, run)  # whatever the exit code: another sweep may have been quicker
    return describe(run, None, error) if row is None else row


def process(module: list[str], log: Path) -> str:
    """Runs `python -m` a module with its arguments, its output in a log; what went wrong, empty if nothing did."""
    with log.open("w") as output:
        started = subprocess.Popen([sys.executable, "-m", *module], stdout=output, stderr=subprocess.STDOUT)
        try:
            code = started.wait()
        except KeyboardInterrupt:
            started.terminate()
            started.wait()
            raise
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'}" if code else ""


def accuracies(run: Run, out: Path, zero_shot: ZeroShot) -> dict[str, Any]:
    """Accuracy columns of a finished run, measured if they are not yet; `error` if they cannot be.

    The dense model is measured once for all its runs.
    """
    directory = out / run.name
    if run.config.pruner == "sparsegpt":
        pruned = ["--model", read_json(directory / "manifest.json", _MANIFEST_BYTES)["options"]["save_model"]]
    else:
        pruned = ["--model", run.config.model, "--masks", str(directory / "masks.safetensors"), "--no-dense"]
    try:
        dense = accuracy(directory.parent / f"dense-{ACCURACY}", ["--model", run.config.model], out, zero_shot)
        found = accuracy(directory / ACCURACY, pruned, out, zero_shot)
    except UserError as error:
        return {"error": str(error)}
    columns = {f"acc_{name}": value for name, value in found.items()}
    row = {**columns, "acc_mean": _mean(found), "dense_acc_mean": _mean(dense)}
    return {name: _rounded(value, 4) for name, value in row.items()}


def accuracy(place: Path, model: list[str], out: Path, zero_shot: ZeroShot) -> dict[str, float | None]:
    """Every task's accuracy of one model, from the file `place`, which a process writes if it does not hold them yet.

    Raises:
        UserError: If that fails, with the process's last words.
    """
    found, error = measured(place, zero_shot), ""
    if found is None:
        options = ["--tasks", ",".join(zero_shot.tasks), "--out", str(place), "--overwrite"]
        options += [] if zero_shot.data is None else ["--task-data", zero_shot.data]
        options += [] if zero_shot.limit is None else ["--limit", str(zero_shot.limit)]
        log = out / "logs" / f"{place.relative_to(out).with_suffix('').as_posix().replace('/', '-')}.log"
        error = process(["neuroal_jax.eval.zero_shot", *model, *options], log)
        found = measured(place, zero_shot)
    if found is None:
        raise UserError(f"zero-shot: {error}")
    return {name: task.get("pruned", task.get("dense", {})).get("acc") for name, task in found.items()}


def measured(path: Path, zero_shot: ZeroShot) -> Mapping[str, Any] | None:
    """The tasks of a file of `eval.zero_shot`; None if there is none, or it was asked for something else."""
    try:
        found = read_json(path, _MANIFEST_BYTES)
        asked = (tuple(found["tasks"]), found["task_data"], found["limit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    tasks: Mapping[str, Any] = found["tasks"]
    return tasks if asked == (zero_shot.tasks, zero_shot.data, zero_shot.limit) else None


def _mean(values: Mapping[str, float | None]) -> float | None:
    numbers = [value for value in values.values() if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None


def describe(run: Run, manifest: Mapping[str, Any] | None, error: str = "") -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = dict.fromkeys((*HEAD, *TAIL))
    row |= {"model": run.model, "pruner": run.config.pruner, "top_up": run.top_up, "error": error}
    row |= {"sparsity": run.config.sparsity, "seed": run.config.seed}
    if manifest is None:
        return row
    seconds, memory, token_ppl = manifest["seconds"], manifest["memory_bytes"], manifest["token_ppl"]
    return row | {
        "achieved": manifest["sparsity"]["achieved"],
        "lambda_block": manifest["lambda_block"],
        "lambda_row": manifest["lambda_row"],
        "seqlen": token_ppl["seqlen"],
        **_perplexities(token_ppl["texts"]),
        "search_seconds": _rounded(seconds.get("search", 0.0), 1),
        "prune_seconds": _rounded(seconds["prune"], 1),
        "host_peak_mib": round(memory["host_peak"] / 2**20),
        "device_peak_mib": _rounded(memory["device_peak"], 0, 2**20),
    }


def _perplexities(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Columns of the texts' perplexities; a single text goes without its name."""
    return {
        f"{state}_token_ppl" + (f"_{name}" if len(texts) > 1 else ""): _rounded(text[state], 4)
        for name, text in texts.items()
        for state in ("dense", "pruned")
    }


def _rounded(value: float | None, digits: int, unit: float = 1.0) -> float | None:
    return None if value is None else round(value / unit, digits)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table without its empty columns."""
    columns = [column for column in columns_of(rows) if any(row.get(column) not in (None, "") for row in rows)]

    def line(cells: Iterator[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return "" if value is None else text.replace("|", "\\|")

    lines = [line(iter(columns)), line("---" for _ in columns)]
    return "\n".join(lines + [line(cell(row.get(column)) for column in columns) for row in rows])


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All columns of these rows, in the table's order."""
    measured = dict.fromkeys(name for row in rows for name in row if name not in HEAD and name not in TAIL)
    return [*HEAD, *measured, *TAIL]


def write_tables(out: Path, found: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Writes `table.csv`, `table.md` and `report.html` of the runs that are done, each whole or not at all."""
    done = [name for name, row in found.items() if row]
    columns = columns_of([row for row in found.values() if row])
    rows = [{column: row.get(column) for column in columns} for row in found.values() if row]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    reports = [f"{name}/{REPORT}" if (out / name / REPORT).is_file() else None for name in done]
    replace_text(out / "table.csv", text.getvalue())
    replace_text(out / "table.md", markdown(rows) + "\n")
    replace_text(out / REPORT, sweep_report(rows, reports))


if __name__ == "__main__":
    sys.exit(main())
