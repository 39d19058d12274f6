"""report.html: a run, or a sweep, as one page with plots that needs no network.

python -m neuroal_jax.report RUN_DIR

writes the report of an earlier run again, from its manifest.json and allocation.json, with the tokens per second of a
generation.json that lies beside them.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from neuroal_jax.allocation import file as allocation_file
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text
from neuroal_jax.report.facts import headline, key_facts, option_facts, run_title
from neuroal_jax.report.generation import GENERATION, GenerationTable, generation_of
from neuroal_jax.report.recorded import FORMAT

REPORT = "report.html"
_MOST_BYTES = 2**30  # of a manifest or an allocation
_START_BYTES, _SIGNS = 2**18, (b"A pruning run of neuroal-jax", b"A sweep of neuroal-jax")  # of pages of all versions


def run_report(
    manifest: Mapping[str, Any], allocation: Mapping[str, Any], generation: GenerationTable | None = None
) -> str:
    """The HTML page of a run.

    Args:
        manifest: The content of manifest.json, which the page also holds as JSON.
        allocation: The content of allocation.json.
        generation: Tokens per second, if they were measured.

    Raises:
        UserError: If the allocation's tensors are not linears of blocks.
    """
    from neuroal_jax.report.rendering import render  # late, as all that draws: most of the package does without it
    from neuroal_jax.report.run_plots import run_sections

    return render(
        "run.html",
        run_title(manifest),
        run_sections(manifest, allocation),
        manifest,
        tiles=headline(manifest),
        facts=key_facts(manifest),
        options=option_facts(manifest),
        generation=generation,
    )


def sweep_report(rows: Sequence[Mapping[str, Any]], links: Sequence[str | None] = ()) -> str:
    """The HTML page of a sweep.

    Args:
        rows: Of the table, each with the same columns; empty columns are left out. `model`, `pruner`, `top_up` and
            `sparsity` are needed, and `error` tells what went wrong.
        links: Where the report of each row's run is, relative to the page; none where there is no such file.
    """
    from neuroal_jax.report.rendering import render
    from neuroal_jax.report.sweep_plots import columns, sweep_sections

    models = dict.fromkeys(str(row["model"]) for row in rows)
    targets = [f"./{quote(os.fsencode(link))}" if link is not None else None for link in links]
    names = columns(rows)
    return render(
        "sweep.html",
        f"Sweep: {', '.join(models)}",
        sweep_sections(rows),
        list(rows),
        failures=[_failure(row) for row in rows if row.get("error")],
        columns=names,
        numeric={name for name in names if all(isinstance(row.get(name), int | float | None) for row in rows)},
        targets=[*targets, *[None] * (len(rows) - len(links))],
    )


def _failure(row: Mapping[str, Any]) -> str:
    names = " ".join(
        str(row.get(name)) for name in ("model", "pruner", "top_up", "step", "objective", "sparsity") if row.get(name)
    )
    return f"{names}: {row['error']}"


def write_report(path: Path, page: str, inputs: Inputs) -> None:
    """Writes a page, whole or not at all, over an earlier one or over nothing.

    Raises:
        UserError: If something else is there.
    """
    if os.path.lexists(path):
        inputs.protect([path], REPORT)
        if not is_report(path):
            raise UserError(f"{path} exists already, and is no report of this program: move it away")
    replace_text(path, page)


def is_report(path: Path) -> bool:
    """Whether a file is a page of this package, which the next one may replace."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(_START_BYTES)
    except OSError:
        return False
    return start.startswith(b"<!DOCTYPE html>") and any(sign in start for sign in _SIGNS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error)."""

    def work() -> None:
        run = make_parser().parse_args(arguments).run
        rewrite_report(run)
        print(f"written to {run / REPORT}")

    return run_program(work)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "python -m neuroal_jax.report",
        description="Writes report.html of an earlier run again.",
        examples=("run", "sweep/demo/wanda-neuroal-0.7-seed0"),
    )
    parser.add_argument(
        "run",
        metavar="RUN_DIR",
        type=partial(path_to, "run_dir"),
        help="directory with manifest.json and allocation.json",
    )
    return parser


def rewrite_report(run: Path) -> None:
    """Writes the report of an earlier run again.

    Raises:
        UserError: If what it is made from is damaged, or something else is in its place.
    """
    page = _read_run(run)
    inputs = Inputs(*(("RUN_DIR", run / name) for name in ("manifest.json", "allocation.json", GENERATION)))
    write_report(run / REPORT, page, inputs)


def _read_run(run: Path) -> str:
    manifest = _read(run / "manifest.json", FORMAT)
    allocation = _read(run / "allocation.json", allocation_file.FORMAT)
    generation = generation_of(run)
    try:
        return run_report(manifest, allocation, generation)
    except UserError as error:
        raise UserError(f"{run}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever the templates and Plotly say of values of other kinds than ours
        raise UserError(
            f"{run}: manifest.json or allocation.json is damaged or of another version ({error!r}): run the pruner "
            "again"
        ) from error


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the directory of a finished run") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != expected:
        raise UserError(f"{path}: format is {found!r}, expected {expected!r}")
    return content
