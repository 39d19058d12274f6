"""Methods compared on a pretrained language model, Gemma 3 270M: perplexities, seconds and memory, in Markdown.

python -m benchmarks.real_model --wikitext2 FILE --c4 FILE --calibration FILE [--tasks DIR] [--rows LIST]

The model is made by `benchmarks.gemma` (whose terms of use see) unless `--model` names another one. Each row of the
table at each sparsity is a run of the pruner in a process of its own, or one for each of `--seeds`; runs that are
finished are not run again, and the same command goes on where an interrupted one stopped. Texts come from files, or
else from the Hub.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import gemma
from eval import sweep
from eval.accuracy import ACCURACY, ZeroShot, accuracies
from eval.grid import Run
from eval.table import markdown_lines, search_seconds
from eval.zero_shot import TASKS
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import flag, path_to, positive
from neuroal_jax.errors import UserError
from neuroal_jax.files.claims import claimed
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text, replaced
from neuroal_jax.machine.processor import processor_name, usable_cores

# A row of the table: what `eval.sweep` is to vary, and to what; True gives a flag without a value.
Row = Mapping[str, str | bool]
ROWS: tuple[Row, ...] = (
    {"pruners": "wanda", "top_ups": "uniform"},
    {"pruners": "wanda", "top_ups": "owl"},
    {"pruners": "wanda", "top_ups": "dlp"},
    {"pruners": "wanda", "top_ups": "alpha"},
    {"pruners": "wanda", "top_ups": "dsnot"},
    {"pruners": "wanda", "top_ups": "uniform", "pattern": "2:4"},
    {"pruners": "wanda", "top_ups": "neuroal", "steps": "block"},
    {"pruners": "wanda", "top_ups": "neuroal", "steps": "both"},
    {"pruners": "wanda", "top_ups": "neuroal", "steps": "both", "objectives": "kl"},
    {"pruners": "wanda", "top_ups": "shape"},
    {"pruners": "wanda", "top_ups": "refit"},
    {"pruners": "wanda", "top_ups": "neuroal+refit", "steps": "both"},
    {"pruners": "wanda", "top_ups": "shape+refit"},
    {"pruners": "wanda", "top_ups": "shape+refit", "search_refine": True},
    {"pruners": "sparsegpt", "top_ups": "uniform"},
    {"pruners": "sparsegpt", "top_ups": "uniform", "pattern": "2:4"},
    {"pruners": "sparsegpt", "top_ups": "owl"},
    {"pruners": "sparsegpt", "top_ups": "alpha"},
    {"pruners": "sparsegpt", "top_ups": "neuroal", "steps": "block"},
    {"pruners": "sparsegpt", "top_ups": "shape"},
    {"pruners": "sparsegpt", "top_ups": "refit"},
)
SPARSITIES = "0.5,0.6"
TASK_ROWS = ("wanda uniform", "wanda neuroal both")  # of which, at `TASK_SPARSITY`, lm-eval measures accuracies
TASK_SPARSITY = 0.5
CACHE = ".bench/real-model"
_MOST_BYTES = 2**28  # of a manifest or a file of accuracies


def name_of(row: Row) -> str:
    """`wanda neuroal both`; `in the loop` where candidates are refined."""
    return " ".join(value if isinstance(value, str) else "in the loop" for value in row.values())


def select(names: Sequence[str]) -> list[Row]:
    """The rows of these names, or else whose names begin with these words; all for none.

    Raises:
        UserError: If there is none of a name.
    """
    chosen = [
        [row for row in ROWS if name_of(row) == name]
        or [row for row in ROWS if f"{name_of(row)} ".startswith(f"{name} ")]
        for name in names
    ]
    for name, found in zip(names, chosen, strict=True):
        if not found:
            raise UserError(f"--rows: there is no row {name!r}, expected words of: {', '.join(map(name_of, ROWS))}")
    return [row for row in ROWS if not names or any(row in found for found in chosen)]


def runs_of(row: Row, shared: Mapping[str, Any], out: Path) -> list[Run]:
    """A row's runs, one for each sparsity (its pattern's, where it has one) and seed; errors as `eval.sweep`'s."""
    given = {**shared, **row, "out": out}
    if "pattern" in row:
        del given["sparsities"]
    arguments = [
        part for name, value in given.items() for part in ([flag(name)] if value is True else [flag(name), str(value)])
    ]
    values = sweep.parse_arguments(arguments)
    return sweep.planned({name: value for name, value in values.items() if name not in ("config", "dry_run")}, out)


def cut_texts(model: Path, texts: Mapping[str, str], seqlen: int, windows: int, place: Path) -> list[Path]:
    """The first windows of each text as files of token ids, in a folder that is named by what they hold.

    Raises:
        UserError: If a text cannot be read, or is shorter.
    """
    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.data.windows import Windows, reader_for

    reader, paths = reader_for(open_checkpoint(str(model)), str(model), seqlen), []
    for name, source in texts.items():
        found = reader.evaluation(source, flag(name))
        if len(found.ids) < windows:
            raise UserError(f"{flag(name)} {source} has {len(found.ids)} windows of {seqlen} tokens, not {windows}")
        kept = Windows(found.ids[:windows], name)
        path = place / kept.sha256[:12] / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial_path, partial_path.open("wb") as file:
            np.save(file, kept.ids)
        paths.append(path)
    return paths


def table(dense: Mapping[str, Any], pruned: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown; runs of a row that differ in their seed alone are one line, with their mean and spread.

    Args:
        dense: A manifest, for the dense model's perplexities.
        pruned: Names of rows and their runs' manifests.
    """
    texts = dense["token_ppl"]["texts"]
    head = ["pruner", "method", "sparsity", *(Path(name).stem for name in texts), "search s", "pruning s", "peak MiB"]
    lines = [["dense", "", "0", *(f"{text['dense']:.2f}" for text in texts.values())]]
    repeated: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for name, manifest in pruned:
        repeated.setdefault((name, manifest["sparsity"]["requested"]), []).append(manifest)
    for (name, sparsity), runs in repeated.items():
        pruner, _, method = name.partition(" ")
        found = [[run["token_ppl"]["texts"][text]["pruned"] for run in runs] for text in texts]
        lines.append(
            [
                *(pruner, method, f"{sparsity:g}", *map(_mean_and_spread, found)),
                f"{np.mean([search_seconds(run) for run in runs]):.0f}",
                f"{np.mean([run['seconds']['prune'] for run in runs]):.0f}",
                f"{max(run['memory_bytes']['host_peak'] for run in runs) / 2**20:.0f}",
            ]
        )
    return markdown_lines(head, lines)


def _mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there is more than one."""
    mean = f"{np.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2f}"


def conditions(manifests: Sequence[Mapping[str, Any]], machine: str) -> str:
    """What the numbers of some runs were measured on, of, and with."""
    first = manifests[0]
    calibration = first["data"]["calib"]
    evaluation = first["data"]["eval"]
    stages: dict[str, int] = {}
    for manifest in manifests:
        stages |= {stage: max(len(found), stages.get(stage, 0)) for stage, found in manifest["candidates"].items()}
    searched = min(first["options"]["search_samples"], calibration["windows"])
    search = f"{searched} of them and " if stages else ""
    counts = ", ".join(f"{count} candidates of the {stage} step" for stage, count in stages.items())
    seeds = sorted({manifest["options"]["seed"] for manifest in manifests})
    repeated = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}; " if len(seeds) > 1 else ""
    return (
        f"{Path(first['options']['model']).name}, {first['options']['dtype']}, token_ppl@{evaluation['seqlen']} on "
        f"{evaluation['windows']} windows of each text; {calibration['windows']} calibration sequences of "
        f"{calibration['seqlen']} tokens of C4{f', the search with {search}{counts}' if stages else ''}; "
        f"{repeated}measured on {machine}; each run is a process of its own, and seconds include compiling."
    )


def machine_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and the cores that this process may use."""
    return f"{processor_name(cpuinfo)}, {usable_cores()} cores"


def task_table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: accuracies with their standard errors, of each model's `tasks`, and their mean."""
    tasks = next(iter(found.values()))
    lines = [[task, *(_accuracy(*scores(model[task])) for model in found.values())] for task in tasks]
    means = []
    for model in found.values():
        values, errors = zip(*(scores(task) for task in model.values()), strict=True)
        means.append(_accuracy(float(np.mean(values)), float(np.sqrt(np.sum(np.square(errors)))) / len(errors)))
    return markdown_lines(["task", *found], [*lines, ["mean", *means]])


def scores(task: Mapping[str, Any]) -> tuple[float, float]:
    """Accuracy and standard error of the one model that a file of `eval.zero_shot` has of a task."""
    found = task.get("pruned") or task["dense"]
    return found["acc"], found["acc_stderr"]


def _accuracy(value: float, error: float) -> str:
    return f"{100 * value:.1f} ± {100 * error:.1f}"


def bench(options: argparse.Namespace) -> None:
    """Makes the model, runs what is missing and prints the tables.

    Raises:
        UserError: If anything that is needed is missing, or runs failed (after all others).
    """
    rows = select(options.rows)
    model = options.model or options.cache / "gemma3-270m"
    out: Path = (options.out or options.cache / "runs").absolute()
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with claimed(out, "--out"):
        if options.model is None and not gemma.is_made(model):
            error = sweep.process(["benchmarks.gemma", str(model)], out / "logs" / "gemma.log")
            if error:
                raise UserError(error)
        texts = {name: _source(name, getattr(options, name)) for name in ("wikitext2", "c4")}
        files = cut_texts(model, texts, options.seqlen, options.windows, out / "texts")
        shared = {
            "models": model,
            "sparsities": options.sparsities,
            "seeds": options.seeds,
            "calib": _source("c4", options.calibration),
            "nsamples": options.nsamples,
            "seqlen": options.seqlen,
            "eval": ",".join(map(str, files)),
        }
        runs = {name_of(row): runs_of(row, shared, out) for row in rows}
        every = [run for of_row in runs.values() for run in of_row]
        sweep.protect_inputs(out, every, sweep.inputs_of(every, None, ZeroShot()))
        try:
            sweep.run_all(every, out, ZeroShot(), sweep.process)
        finally:
            text = "\n".join(report(runs, out))
            print(f"\n{text}")
            replace_text(out / "real-model.md", f"{text}\n")
        if options.tasks is not None:
            lines = task_report(runs, out, ZeroShot(TASKS, str(options.tasks), options.limit))
            print("\n" + "\n".join(lines))
            replace_text(out / "real-model.md", "\n".join([text, "", *lines, ""]))


def report(runs: Mapping[str, Sequence[Run]], out: Path) -> list[str]:
    """The table of the runs that are finished, by sparsity, and a line on how it was measured; empty for none."""
    done = [
        (name, read_json(out / run.name / "manifest.json", _MOST_BYTES))
        for name, of_row in runs.items()
        for run in of_row
        if (out / run.name / "manifest.json").is_file()
    ]
    done.sort(key=lambda found: found[1]["sparsity"]["requested"])  # stable: rows stay in their order
    manifests = [manifest for _, manifest in done]
    return [*table(manifests[0], done), "", conditions(manifests, machine_name())] if done else []


def task_report(runs: Mapping[str, Sequence[Run]], out: Path, zero_shot: ZeroShot) -> list[str]:
    """The table of accuracies, of which the missing ones are measured.

    Raises:
        UserError: If they cannot be, or a row is not among the runs.
    """
    places: dict[str, Path] = {}
    for name in TASK_ROWS:
        run = next((run for run in runs.get(name, ()) if run.config.sparsity == TASK_SPARSITY), None)
        if run is None:
            raise UserError(f"--tasks measures {name} at {TASK_SPARSITY}: leave it in --rows and --sparsities")
        print(f"zero-shot: {name}", flush=True)
        error = accuracies(run, out, zero_shot, sweep.process).get("error")
        if error:
            raise UserError(error)
        places.setdefault("dense", (out / run.name).parent / f"dense-{ACCURACY}")
        places[f"{name} {TASK_SPARSITY}"] = out / run.name / ACCURACY
    found = {name: read_json(place, _MOST_BYTES)["tasks"] for name, place in places.items()}
    counts = {task["n"] for model in found.values() for task in model.values()}
    return [*task_table(found), "", f"Accuracy in percent ± standard error; rows of each task: {sorted(counts)}."]


def _source(name: str, file: str | None) -> str:
    return name if file is None else f"{name}={file}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error or failed runs, 130 interrupted)."""
    stopped = "interrupted: finished runs stay; the same command goes on from there"
    return run_program(lambda: bench(make_parser().parse_args(arguments)), interrupted=stopped)


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.real_model",
        description="Methods on Gemma 3 270M.",
        examples=(
            "--rows wanda --sparsities 0.7",
            "--wikitext2 wikitext2.txt --c4 c4-validation.jsonl --calibration c4-train.jsonl --out real-model",
        ),
    )
    add = parser.add_argument
    add("--wikitext2", metavar="FILE", help="WikiText-2's test text, raw, to evaluate (default: the Hub's)")
    add("--c4", metavar="FILE", help="validation documents of C4, to evaluate (default: the Hub's)")
    add("--calibration", metavar="FILE", help="training documents of C4, to calibrate (default: the Hub's)")
    add(
        "--rows",
        type=_items,
        default=[],
        metavar="LIST",
        help="of the table, by name or first words, as 'wanda neuroal'",
    )
    add("--sparsities", default=SPARSITIES, metavar="LIST", help=f"of the table (default: {SPARSITIES})")
    add("--seeds", default="0", metavar="LIST", help="of the calibration sequences, for means and spreads (default: 0)")
    add("--windows", type=partial(positive, "windows"), default=24, help="of each text to evaluate (default: 24)")
    add("--nsamples", type=partial(positive, "nsamples"), default=16, help="calibration sequences (default: 16)")
    add("--seqlen", type=partial(positive, "seqlen"), default=512, help="tokens of all windows (default: 512)")
    add("--tasks", type=partial(path_to, "tasks"), metavar="DIR", help="also lm-eval's accuracies, on rows from here")
    add("--limit", type=partial(positive, "limit"), metavar="N", help="only the first N rows of each task")
    add("--model", type=partial(path_to, "model"), metavar="DIR", help="a model that is there, instead of making Gemma")
    add(
        "--cache",
        type=partial(path_to, "cache"),
        default=CACHE,
        metavar="DIR",
        help=f"for the model (default: {CACHE})",
    )
    add("--out", type=partial(path_to, "out"), metavar="DIR", help="for runs and tables (default: runs in --cache)")
    return parser


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",") if item.strip()]
