"""One table from many runs: models x pruners x top-ups x sparsities x seeds. Finished runs are not run again.

python -m eval.sweep --models demo --pruners wanda,sparsegpt --top-ups uniform,owl --sparsities 0.6,0.7 --out DIR

Every other option of `python -m neuroal_jax.prune` holds for all runs. Each run is a process of its own, so that its
peak memory is its own; it is recognised as finished by its manifest. DIR holds the runs, their logs, `table.csv` and
`table.md`.
"""

import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from neuroal_jax.cli import Parser, add_options, read_yaml
from neuroal_jax.config import AUTO, REFINEMENTS, PruneConfig, flag
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.interrupts import INTERRUPTED, termination_interrupts

# What a sweep varies: the flag, the option of a run that its items set, and help.
AXES = {
    "models": ("model", "checkpoint directories, Hub ids or demo"),
    "pruners": ("pruner", "pruners"),
    "top_ups": ("allocation", "allocations (uniform, neuroal, owl, alpha, an allocation.json), dsnot, or owl+dsnot"),
    "sparsities": ("sparsity", "shares of weights to remove"),
    "seeds": ("seed", "seeds of the sampling"),
}
DEFAULTS: dict[str, list[Any]] = {"pruners": ["wanda"], "top_ups": ["uniform", "neuroal"], "seeds": [0]}
COLUMNS = (
    "model", "pruner", "top_up", "sparsity", "achieved", "seed", "lambda_block", "lambda_row",
    "seqlen", "dense_token_ppl", "pruned_token_ppl",
    "search_seconds", "prune_seconds", "host_peak_mib", "device_peak_mib", "error",
)  # fmt: skip
# Options that do not change a run's result, or that the engine settles by itself.
_IMMATERIAL = {"out", "save_model", "overwrite", "dry_run", "candidate_batch"}


@dataclass(frozen=True)
class Run:
    """One run of a sweep: its place below the sweep's directory, its point on the axes, and its options."""

    name: str
    point: dict[str, Any]
    config: PruneConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error or failed runs, 130 interrupted)."""
    try:
        with termination_interrupts():
            sweep(parse_arguments(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished runs stay; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    return 0


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
    swept = {option for option, _ in AXES.values()} | {"refine", "out", "save_model", "overwrite", "dry_run"}
    add_options(parser, leave_out=swept)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    file = given.pop("config", None)
    allowed = [*AXES, "out", *(option.name for option in fields(PruneConfig) if option.name not in swept)]
    values = {**DEFAULTS, **({} if file is None else read_yaml(Path(file), allowed)), **given}
    for name in (*AXES, "out"):
        if name not in values:
            raise UserError(f"{flag(name)} is missing (see --help)")
    for name in AXES:
        values[name] = _items(name, values[name])
    return values


def _items(name: str, value: Any) -> list[Any]:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = items if isinstance(items, list) else [items]
    if not items or len(set(map(str, items))) < len(items):
        raise UserError(f"{flag(name)} is {value!r}, expected one or more different items")
    return items


def sweep(values: Mapping[str, Any]) -> None:
    """Runs what is missing, one run after the other, and keeps the table up to date after each.

    Raises:
        UserError: If nothing can be run, a directory holds a run with other options, or runs failed (after all others).
    """
    out = Path(str(values["out"]))
    runs, left_out = plan(values, out)
    for reason in left_out:
        print(f"left out: {reason}")
    if not runs:
        raise UserError("no combination can be run")
    known = {run.name: finished(out / run.name, run.config) for run in runs}
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): choose another directory") from error
    rows, failed = [], []
    for number, run in enumerate(runs, 1):
        start, manifest, problem = time.perf_counter(), known[run.name], ""
        if manifest is None:
            manifest, problem = execute(run, out)
        rows.append(describe(run, manifest, problem))
        failed += [run.name] if problem else []
        write_tables(out, rows)
        outcome = problem or f"token_ppl {rows[-1]['pruned_token_ppl']}"
        took = "finished before" if known[run.name] else f"{time.perf_counter() - start:.0f} s"
        print(f"[{number}/{len(runs)}] {run.name}: {outcome} ({took})", flush=True)
    print(markdown(rows))
    print(f"written to {out}/table.csv and {out}/table.md")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {shorten(failed)}; see {out}/logs")


def plan(values: Mapping[str, Any], out: Path) -> tuple[list[Run], list[str]]:
    """All runs of a sweep, and why combinations are left out."""
    names = [Path(str(model)).name for model in values["models"]]
    if len(set(names)) < len(names):
        raise UserError(f"--models holds two models of the name {max(names, key=names.count)}: rename a directory")
    shared = {name: value for name, value in values.items() if name not in AXES and name != "out"}
    runs, left_out = [], []
    for items in product(*(values[name] for name in AXES)):
        point = dict(zip(AXES, items, strict=True))
        allocation, refine = split_top_up(str(point["top_ups"]))
        model = Path(str(point["models"])).name
        top_up = str(point["top_ups"]).replace(os.sep, "_")
        name = f"{model}/{point['pruners']}-{top_up}-{point['sparsities']}-seed{point['seeds']}"
        options = {
            **shared,
            **{option: point[axis] for axis, (option, _) in AXES.items()},
            "allocation": allocation,
            "refine": refine,
            "out": str(out / name),
        }
        try:
            runs.append(Run(name, point, PruneConfig(**_with_effect(options))))
        except UserError as error:
            left_out.append(f"{name}: {error}")
    return runs, left_out


def split_top_up(text: str) -> tuple[str, str]:
    """`owl+dsnot` to an allocation and a refinement; either may stand alone."""
    allocation, plus, refine = text.rpartition("+")
    if plus and refine in REFINEMENTS:
        return allocation, refine
    return ("uniform", text) if text in REFINEMENTS else (text, "none")


def _with_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what is for another method than this run's."""
    only = {option.name: option.metadata["only"] for option in fields(PruneConfig) if option.metadata["only"]}
    return {
        name: value
        for name, value in options.items()
        if name not in only or options.get(only[name][0]) == only[name][1]
    }


def finished(directory: Path, config: PruneConfig) -> dict[str, Any] | None:
    """The manifest of a finished run with these options; None where there is none.

    Raises:
        UserError: If the run that is there had other options.
    """
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        options = manifest["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest ({error}): remove its directory") from error
    for option in fields(PruneConfig):
        name, value = option.name, getattr(config, option.name)
        settled = name in _IMMATERIAL or value == AUTO or (name == "step" and config.pruner == "sparsegpt")
        value = list(value) if isinstance(value, tuple) else value
        if not settled and options.get(name) != value:
            raise UserError(
                f"{directory} holds a run with {flag(name)} {options.get(name)}, not {value}: "
                "choose another --out, or remove that directory"
            )
    return manifest


def execute(run: Run, out: Path) -> tuple[dict[str, Any] | None, str]:
    """Runs a process; returns the manifest, or what went wrong. Its output goes to a log."""
    directory = out / run.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    log = out / "logs" / f"{run.name.replace('/', '-')}.log"
    options = {
        option.name: list(value) if isinstance(value := getattr(run.config, option.name), tuple) else value
        for option in fields(PruneConfig)
    }
    config = log.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(options))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "neuroal_jax.prune", "--config", str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    manifest = finished(directory, run.config)  # also if another sweep was quicker
    if manifest is not None:
        return manifest, ""
    lines = log.read_text().strip().splitlines()
    return None, f"exit code {code}: {lines[-1] if lines else 'no output'}"


def describe(run: Run, manifest: Mapping[str, Any] | None, error: str) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"model": Path(str(run.point["models"])).name, "error": error}
    row |= {"pruner": run.point["pruners"], "top_up": run.point["top_ups"], "seed": run.point["seeds"]}
    row["sparsity"] = run.config.sparsity
    if manifest is None:
        return row
    seconds, memory, token_ppl = manifest["seconds"], manifest["memory_bytes"], manifest["token_ppl"]
    return row | {
        "achieved": manifest["sparsity"]["achieved"],
        "lambda_block": manifest["lambda_block"],
        "lambda_row": manifest["lambda_row"],
        "seqlen": token_ppl["seqlen"],
        "dense_token_ppl": _rounded(token_ppl["dense"], 4),
        "pruned_token_ppl": _rounded(token_ppl["pruned"], 4),
        "search_seconds": _rounded(seconds.get("search", 0.0), 1),
        "prune_seconds": _rounded(seconds["prune"], 1),
        "host_peak_mib": round(memory["host_peak"] / 2**20),
        "device_peak_mib": _rounded(memory.get("device_peak"), 0, 2**20),
    }


def _rounded(value: float | None, digits: int, unit: float = 1.0) -> float | None:
    return None if value is None else round(value / unit, digits)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table without its empty columns."""
    columns = [column for column in COLUMNS if any(row[column] not in (None, "") for row in rows)]

    def line(cells: Iterator[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return "" if value is None else text.replace("|", "\\|")

    lines = [line(iter(columns)), line("---" for _ in columns)]
    return "\n".join(lines + [line(cell(row[column]) for column in columns) for row in rows])


def write_tables(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `table.csv` and `table.md`, each whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (("table.csv", text.getvalue()), ("table.md", markdown(rows) + "\n")):
        part = out / f".{name}.partial"
        part.write_text(content)
        part.replace(out / name)


if __name__ == "__main__":
    sys.exit(main())
