"""A sweep's table: a row per run, as CSV, as Markdown, and in the report."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import number
from neuroal_jax.files.writing import replace_text
from neuroal_jax.report.page import REPORT, is_report, sweep_report

from .grid import Run

# The table's columns; between the two come perplexities and, with tasks, accuracies.
HEAD = (
    *("model", "pruner", "top_up", "step", "objective", "sparsity", "achieved", "seed"),
    *("lambda_block", "lambda_row", "seqlen"),
)
TAIL = ("search_seconds", "prune_seconds", "host_peak_mib", "device_peak_mib", "error")


def describe(run: Run, manifest: Mapping[str, Any] | None, error: str = "") -> dict[str, Any]:
    """A row of the table.

    Raises:
        AttributeError, KeyError, TypeError, ValueError, OverflowError: If the manifest is none of this version.
    """
    row: dict[str, Any] = dict.fromkeys((*HEAD, *TAIL))
    row |= {"model": run.model, "pruner": run.config.pruner, "top_up": run.top_up, "error": error}
    row |= {"step": run.step, "objective": run.objective}
    row |= {"sparsity": run.config.sparsity, "seed": run.config.seed}
    if manifest is None:
        return row
    seconds, memory, token_ppl = manifest["seconds"], manifest["memory_bytes"], manifest["token_ppl"]
    return row | {
        "achieved": number(manifest["sparsity"]["achieved"]),
        "lambda_block": _rounded(manifest["lambda_block"]),
        "lambda_row": _rounded(manifest["lambda_row"]),
        "seqlen": round(number(token_ppl["seqlen"])),
        **_perplexities(token_ppl["texts"]),
        "search_seconds": _rounded(search_seconds(manifest), 1),
        "prune_seconds": _rounded(seconds["prune"], 1),
        "host_peak_mib": round(number(memory["host_peak"]) / 2**20),
        "device_peak_mib": _rounded(memory["device_peak"], 0, 2**20),
    }


def search_seconds(manifest: Mapping[str, Any]) -> float:
    """What a run's search took, or would have taken had other runs not measured a part of it before."""
    walks = manifest.get("reused", [])
    reused = sum(number(walk["seconds"]) for walk in walks if walk["walk"] != "dense-perplexity")
    return number(manifest["seconds"].get("search", 0.0)) + reused


def _perplexities(texts: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Columns of the texts' perplexities; a single text goes without its name."""
    return {
        f"{state}_token_ppl" + (f"_{name}" if len(texts) > 1 else ""): _rounded(text[state], 4)
        for name, text in texts.items()
        for state in ("dense", "pruned")
    }


def _rounded(value: Any, digits: int = 99, unit: float = 1.0) -> float | None:
    return None if value is None else round(number(value) / unit, digits)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table without its empty columns."""
    columns = [column for column in columns_of(rows) if any(row.get(column) not in (None, "") for row in rows)]

    def cell(value: Any) -> str:
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return "" if value is None else text.replace("|", "\\|")

    return "\n".join(markdown_lines(columns, [[cell(row.get(column)) for column in columns] for row in rows]))


def markdown_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines; short rows end in empty cells."""
    filled = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *filled)]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All columns of these rows, in the table's order."""
    measured = dict.fromkeys(name for row in rows for name in row if name not in HEAD and name not in TAIL)
    return [*HEAD, *measured, *TAIL]


def check_tables(out: Path) -> None:
    """Raises UserError for a file that `write_tables` would replace and that is no earlier one of its own."""
    for name, is_ours in TABLES.items():
        path = out / name
        if os.path.lexists(path) and not is_ours(path):
            raise UserError(f"--out {out}: {path} exists already, and no sweep wrote it: move it away")


def _begins_with(start: str) -> Callable[[Path], bool]:
    def begins(path: Path) -> bool:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(start)) == start.encode()

    return begins


# What `write_tables` writes, and how it is recognised.
TABLES = {
    "table.csv": _begins_with(",".join(HEAD[:2])),
    "table.md": _begins_with(f"| {' | '.join(HEAD[:2])} "),
    REPORT: is_report,
}


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
    check_tables(out)
    replace_text(out / "table.csv", text.getvalue())
    replace_text(out / "table.md", markdown(rows) + "\n")
    replace_text(out / REPORT, sweep_report(rows, reports))
