"""One table from many runs: every combination of models, pruners, top-ups, steps, objectives, sparsities and seeds.

python -m eval.sweep --models demo --pruners wanda,sparsegpt --top-ups uniform,owl --sparsities 0.6,0.7 --out DIR
python -m eval.sweep --preset paper --out DIR --dry-run

Every other option of `python -m neuroal_jax.prune` holds for all runs. Each run is a process of its own, so that its
peak memory is its own; it is recognised as finished by its manifest. What a run measured of the dense model, and of a
search's candidates, is not measured again by others: it lies in `DIR/measured`. With `--tasks`, lm-eval measures every
pruned model, and every dense one once; with `--generation`, `eval.generation` measures its tokens per second. DIR holds
the runs, their logs, `table.csv`, `table.md`, and `report.html` with plots and a table to sort.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.command.config import all_options
from neuroal_jax.command.parser import Parser, add_options, read_yaml
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import flag, kept_of, path_to, shown
from neuroal_jax.data.sources import files_of
from neuroal_jax.data.texts import PAPER_TEXTS
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.claims import claimed
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import has_format
from neuroal_jax.masks.patterns import NONE, read_pattern
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.report.generation import FORMAT as GENERATION_FORMAT
from neuroal_jax.report.generation import GENERATION
from neuroal_jax.report.page import REPORT

from . import cost
from .accuracy import ACCURACY, ZERO_SHOT, Start, ZeroShot, accuracies, take_zero_shot
from .cost import PAPER_MODELS
from .grid import AXES, Run, list_items, plan
from .speeds import OPTION as GENERATION_OPTION
from .speeds import speeds, take_generation
from .table import TABLES, check_tables, describe, markdown, write_tables
from .zero_shot import FORMAT as ZERO_SHOT_FORMAT
from .zero_shot import TASKS, task_files

DEFAULTS: dict[str, list[Any]] = {
    "pruners": ["wanda"],
    "top_ups": ["uniform", "neuroal"],
    "steps": ["both"],
    "objectives": ["auto"],
    "seeds": [0],
}
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
# Options of a run that are not the same for all runs of a sweep, or that a sweep sets itself.
_NOT_SHARED = {option for option, _ in AXES.values()} | {
    "refine",
    "out",
    "save_model",
    "overwrite",
    "resume",
    "dry_run",
    "device_memory",
    "distributed",
    "measured",
}
_SHOWN = ("pruned_token_ppl", "acc_mean", "decode_tokens_per_second")  # of a finished run, while the sweep goes on
MEASURED = "measured"  # where runs keep what they measured for each other
_MANIFEST_BYTES = 2**28  # more than any manifest has


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


def main(arguments: Sequence[str] | None = None, start: Start = process) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error or failed runs, 130 interrupted).

    Args:
        arguments: Of the command line; None: the process's.
        start: Runs the program of each run.
    """

    def work() -> None:
        values = parse_arguments(arguments)
        (estimate if values.pop("dry_run") else partial(sweep, start=start))(values)

    return run_program(work, interrupted="interrupted: finished runs stay; the same command goes on from there")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        f"python -m {__name__}",
        description="One table from many runs.",
        examples=(
            "--models demo --pruners magnitude,wanda --sparsities 0.6,0.7 --out sweep",
            "--preset paper --out sweep --dry-run",
        ),
    )
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
    speed = parser.add_argument_group("token generation")
    speed.add_argument(
        flag(GENERATION_OPTION), action="store_true", default=None, help="measure tokens per second of every run too"
    )
    add_options(parser, leave_out=_NOT_SHARED)
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The sweep that the command line and its `--config` file describe; flags win over the file.

    Raises:
        UserError: If an option is unknown or an axis is empty.
    """
    given = {name: value for name, value in vars(make_parser().parse_args(arguments)).items() if value is not None}
    file, dry_run = given.pop("config", None), given.pop("dry_run")
    shared = (option.name for option in all_options() if option.name not in _NOT_SHARED)
    from_file = (
        {} if file is None else read_yaml(Path(file), [*AXES, "out", "preset", *ZERO_SHOT, GENERATION_OPTION, *shared])
    )
    preset = given.pop("preset", None) or from_file.pop("preset", None)
    if preset not in (None, *PRESETS):
        raise UserError(f"--preset {shown(preset)} is unknown: expected one of {', '.join(PRESETS)}")
    values = {**DEFAULTS, **PRESETS.get(str(preset), {}), **from_file, **given, "config": file, "dry_run": dry_run}
    asked = read_pattern(kept_of("pattern", values.get("pattern", NONE)))
    if asked is not None and asked.sparsity is not None and "sparsities" not in {**from_file, **given}:
        values["sparsities"] = [asked.sparsity]  # in place of a preset's
    for name in (*AXES, "out"):
        if values.get(name) is None:
            raise UserError(f"{flag(name)} is missing (see --help)")
    for name in AXES:
        values[name] = list_items(name, values[name])
    values["out"] = str(path_to("out", values["out"]))
    return values


def sweep(values: Mapping[str, Any], start: Start = process) -> None:
    """Runs what is missing, one run after the other, and keeps the table up to date after each.

    Raises:
        OSError: If something cannot be written.
        UserError: If nothing can be run, an input would be written to, another process writes to the directory, it
            holds a run with other options, or runs failed (after all others).
    """
    values = dict(values)
    out, file, zero_shot = Path(str(values["out"])), values.pop("config", None), take_zero_shot(values)
    generation = take_generation(values)
    runs = planned(values, out)
    protect_inputs(out, runs, inputs_of(runs, file, zero_shot))
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with claimed(out, "--out"):
        run_all(runs, out, zero_shot, start, generation=generation)


def run_all(runs: list[Run], out: Path, zero_shot: ZeroShot, start: Start, *, generation: bool = False) -> None:
    """The runs one after the other; errors as `sweep`."""
    known = {run.name: finished(out, run) for run in runs}
    rows = dict(known)
    for number, run in enumerate(runs, 1):
        began = time.perf_counter()
        row = known[run.name] or execute(run, out, start)
        if zero_shot.tasks and not row["error"]:
            row |= accuracies(run, out, zero_shot, start)
        if generation and not row["error"]:
            row |= speeds(run, out, start)
        rows[run.name] = row
        write_tables(out, rows)
        outcome = row["error"] or ", ".join(f"{name} {row[name]}" for name in row if name.startswith(_SHOWN))
        took = "finished before" if known[run.name] else f"{time.perf_counter() - began:.0f} s"
        print(f"[{number}/{len(runs)}] {run.name}: {outcome} ({took})", flush=True)
    print(markdown([row for row in rows.values() if row]))
    failed = [name for name, row in rows.items() if row and row["error"]]
    print(f"written to {out}/table.csv, {out}/table.md and {out}/{REPORT}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {shorten(failed)}; see {out}/logs")


def inputs_of(runs: Sequence[Run], config_file: str | None, zero_shot: ZeroShot) -> Inputs:
    """All that a sweep reads; models on the Hub are left to their runs."""
    found: dict[tuple[str, str | Path | None], None] = dict.fromkeys([("--config", config_file)])
    found |= dict.fromkeys(task_files(zero_shot.data))
    for run in runs:
        config = run.config
        top_up = None if config.allocation in ALLOCATIONS else config.allocation
        named = [("--models", os.path.expanduser(config.model)), ("--top-ups", top_up)]
        texts = [*files_of("--calib", [config.calib]), *files_of("--eval", config.evaluations)]
        found |= dict.fromkeys([*named, *texts])
    return Inputs(*found)


def protect_inputs(out: Path, runs: Sequence[Run], inputs: Inputs) -> None:
    """Raises UserError, before anything is written, if a sweep would write into an input or over what others wrote."""
    logs = out / "logs"
    for directory in (logs, out / MEASURED, *dict.fromkeys(out / Path(run.name).parts[0] for run in runs)):
        found = inputs.holding(directory)
        if found is not None:
            raise UserError(f"--out {out}: {directory} would lie in {found}: choose another")
    files = [log_of(logs, run).with_suffix(suffix) for run in runs for suffix in (".log", ".yaml")]
    inputs.protect([*files, *(out / name for name in TABLES)], "--out")
    for path in files:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"--out {out}: {path} is no log of a sweep: move it away")
    check_tables(out)


def log_of(logs: Path, run: Run) -> Path:
    """Where the output of a run goes."""
    return logs / f"{run.name.replace('/', '-')}.log"


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
        print(f"left out: {shorten(list(dict.fromkeys(combinations)))}: {reason}")
    if not runs:
        raise UserError("no combination can be run")
    return runs


def estimate(values: Mapping[str, Any]) -> None:
    """Lists the runs and what they will cost; runs and writes nothing.

    Raises:
        UserError: As `plan`.
    """
    values = dict(values)
    out, _, zero_shot = Path(str(values["out"])), values.pop("config", None), take_zero_shot(values)
    generation = take_generation(values)
    runs = planned(values, out)
    done = {run.name for run in runs if finished(out, run)}
    print(cost.report({run.name: run.config for run in runs}, done, zero_shot.tasks, zero_shot.limit))
    if generation:
        print(
            "after each run its tokens per second are measured: that is not in these hours, and takes memory for the "
            "model twice in fp32, once in bf16 and once as CSR"
        )
    print(f"{len(runs)} runs, of which {len(done)} are finished; nothing was run")


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
    defaults = {option.name: option.default for option in all_options()}  # for options that the run did not know yet
    for name, value in run.config.material().items():
        before = options.get(name, defaults[name])
        if before != value:
            raise UserError(
                f"{path.parent} holds a run with {flag(name)} {before}, not {value}: "
                "choose another --out, or remove that directory"
            )
    return row


def execute(run: Run, out: Path, start: Start) -> dict[str, Any]:
    """Runs the pruner; returns its row, with what went wrong if something did. Its output goes to a log."""
    directory = out / run.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    for name, format in ((ACCURACY, ZERO_SHOT_FORMAT), (GENERATION, GENERATION_FORMAT)):
        if has_format(directory / name, format):  # of a run whose manifest was removed
            (directory / name).unlink()
    log = log_of(out / "logs", run)
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**run.config.plain(), "resume": True, "measured": str(out / MEASURED)}))
    error = start(["neuroal_jax.prune", "--config", str(config)], log)
    row = finished(out, run)  # whatever the exit code: another sweep may have been quicker
    return describe(run, None, error) if row is None else row
