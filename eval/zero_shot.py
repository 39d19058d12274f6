"""Zero-shot accuracy of a dense and a pruned model, by lm-eval: its tasks, its prompts, its metrics.

python -m eval.zero_shot --model DENSE --masks OUT/masks.safetensors --out accuracy.json
python -m eval.zero_shot --model DENSE --pruned DIR --tasks rte,boolq --task-data FOLDER
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, positive
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.writing import new_json
from neuroal_jax.masks.file import masks_of
from neuroal_jax.version import versions

from .loading import add_models, files_of_models, quiet
from .text import aligned

if TYPE_CHECKING:
    from .harness import CheckedLM

FORMAT = "neuroal-zero-shot-1"
TASKS = ("rte", "winogrande", "boolq", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")  # the paper's seven
DTYPES = ("auto", "float32", "bfloat16", "float16")
_PACKAGES = ("lm_eval", "transformers", "torch", "datasets")


def evaluate(
    model: str,
    tasks: Sequence[str] = TASKS,
    *,
    masks: Path | None = None,
    pruned: str | None = None,
    dense: bool = True,
    task_data: Path | None = None,
    limit: int | None = None,
    batch_size: int | str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Runs lm-eval on a dense model and, if one is given, on a pruned one.

    Args:
        model: Directory, Hub id or `demo`: the dense model.
        tasks: Names of lm-eval's tasks.
        masks: `masks.safetensors`: the pruned model is the dense one with these applied in memory.
        pruned: Directory or Hub id of the pruned model, instead of masks.
        dense: Whether to measure the dense model too.
        task_data: Folder of the tasks' rows (see `task_data.py`); None: the Hub's data sets.
        limit: Rows of each task, from the first; None: all.
        batch_size: Requests at a time, or `auto`; None: `auto` on a GPU, 8 on a CPU.
        dtype: Compute dtype; `auto`: float32 on a CPU, else the checkpoint's own.
        device: As PyTorch names it; None: `cuda` if there is one, else `cpu`.
        log_samples: Whether the result holds every row's prediction.

    Returns:
        What docs/reference/file-formats.md lists under "accuracy.json": `result["tasks"][task]["pruned"]["acc"]` is a
        number.

    Raises:
        UserError: If an option, a task, its data, the masks or a model is not what is needed.
    """
    if masks is not None and pruned is not None:
        raise UserError("--masks and --pruned both name the pruned model: pass one of them")
    if not dense and masks is None and pruned is None:
        raise UserError("--no-dense leaves nothing to measure: pass --masks or --pruned too")
    if not tasks:
        raise UserError("--tasks names no task")
    dense_path, pruned_path = locate(model), None if pruned is None else locate(pruned, "--pruned")
    source = SafetensorsSource(dense_path)  # here and below: refuses a checkpoint without safetensors before all work
    if pruned_path is not None:
        SafetensorsSource(pruned_path)
    packed = None if masks is None else masks_of(masks, source, model)
    try:
        import torch
        from neuroal_jax.convert.masks_to_torch import apply_masks

        from . import harness
        from .task_data import load_tasks
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): pip install 'neuroal-jax[eval]'") from error
    loaded = load_tasks(tasks, task_data)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device == "cpu"
    settings: dict[str, Any] = {
        "dtype": "float32" if dtype == "auto" and on_cpu else dtype,
        "device": device,
        "batch_size": batch_size or (8 if on_cpu else "auto"),
    }
    definitions = {name: task.task for name, task in loaded.items()}

    found, models = {}, {}

    def measure(state: str, path: Path, name: str, masks: Path | None = None) -> None:
        lm = harness.load_model(path, name, **settings)
        if masks is not None:
            apply_masks(lm.model, masks)
        found[state] = harness.run(lm, definitions, limit)
        models[state] = _describe_model(lm)

    if dense:
        measure("dense", dense_path, model)
    if masks is not None:
        measure("pruned", dense_path, model, masks)
    elif pruned_path is not None:
        measure("pruned", pruned_path, str(pruned))

    rows = {name: _row(name, found, log_samples) for name in tasks}
    for name, task in loaded.items():
        rows[name] |= {"origin": task.origin, "sha256": task.sha256}
    return {
        "format": FORMAT,
        "model": model,
        "pruned": pruned,
        "masks": None if packed is None else {"file": str(masks), "source": packed.source},
        "tasks": rows,
        "mean": {"metric": "acc", "of": list(tasks), **{state: _mean(found[state]) for state in found}},
        "task_data": None if task_data is None else str(task_data),
        "limit": limit,
        **settings,
        "models": models,
        "versions": versions(_PACKAGES),
    }


def _describe_model(lm: "CheckedLM") -> dict[str, Any]:
    bos = lm.tokenizer.bos_token_id
    return {
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "context": lm.max_length,
        "starts_with_bos": bos is not None and lm.tok_encode("a")[:1] == [bos],
        "truncated": lm.truncated,
    }


def _row(name: str, found: Mapping[str, Mapping[str, Any]], log_samples: bool) -> dict[str, Any]:
    shared = {key: next(iter(found.values()))[name][key] for key in ("version", "n", "num_fewshot", "rows_sha256")}
    metrics = {state: results[name]["metrics"] for state, results in found.items()}
    items = {"items": {state: results[name]["items"] for state, results in found.items()}} if log_samples else {}
    return {**shared, **metrics, **items}


def _mean(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean accuracy over tasks, each with equal weight; None if a task has none."""
    values = [result["metrics"].get("acc") for result in results.values()]
    return None if None in values else sum(values) / len(values)


def table(result: Mapping[str, Any]) -> str:
    """The result for people: a line per task and metric."""
    states = [state for state in ("dense", "pruned") if state in result["models"]]
    lines = [("task", "version", "n", "metric", *states)]
    for name, row in result["tasks"].items():
        head = (name, str(row["version"]), str(row["n"]))
        for metric in row[states[0]]:
            if "_stderr" not in metric:
                lines.append((*head, metric, *(_cell(row[state], metric) for state in states)))
                head = ("", "", "")
    mean = result["mean"]
    count = f"mean of {len(mean['of'])}"
    lines.append((count, "", "", "acc", *("" if mean[state] is None else f"{mean[state]:.4f}" for state in states)))
    return aligned(lines)


def _cell(metrics: Mapping[str, float | None], metric: str) -> str:
    name, comma, kept = metric.partition(",")
    value, error = metrics[metric], metrics.get(f"{name}_stderr{comma}{kept}")
    return "" if value is None else f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error, 130 interrupted)."""
    return run_program(lambda: _run(vars(make_parser().parse_args(arguments))))


def _run(options: dict[str, Any]) -> None:
    out, overwrite = options.pop("out"), options.pop("overwrite")
    models = files_of_models(options["model"], options["pruned"], options["masks"])
    inputs = Inputs(*models, *task_files(options["task_data"]))
    with new_json(out, format=FORMAT, overwrite=overwrite, inputs=inputs) as write:
        _quiet()
        result = evaluate(**options)
        print(table(result))
        for state, model in result["models"].items():
            if model["truncated"]:
                print(f"{state}: {model['truncated']} prompts were longer than the model's context, cut on the left")
        write(result)
    if out is not None:
        print(f"written to {out}")


def task_files(directory: str | Path | None) -> list[tuple[str, Path]]:
    """The files of a folder of tasks' rows, each with the flag that names it."""
    folder = Path(directory or "")
    return [("--task-data", path) for path in folder.iterdir()] if directory is not None and folder.is_dir() else []


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        f"python -m {__name__}",
        description="Zero-shot accuracy of a model by lm-eval.",
        examples=(
            "--model meta-llama/Llama-2-7b-hf --masks run/masks.safetensors --out accuracy.json",
            "--model dense --pruned pruned --tasks rte,boolq --task-data rows --limit 100",
        ),
    )
    add_models(parser)
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="do not measure the dense model")
    parser.add_argument(
        "--tasks", type=_names, default=TASKS, metavar="LIST", help=f"tasks of lm-eval (default: {','.join(TASKS)})"
    )
    parser.add_argument(
        "--task-data",
        type=partial(path_to, "task_data"),
        metavar="DIR",
        help="folder of TASK.*.jsonl (.jsonl.gz, .json, .parquet): no Hub",
    )
    parser.add_argument(
        "--limit", type=partial(positive, "limit"), metavar="N", help="only the first N rows of each task"
    )
    parser.add_argument(
        "--batch-size", type=_batch_size, metavar="N", help="requests at a time, or auto (default: auto; 8 on a CPU)"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="compute dtype (auto: float32 on a CPU, else the checkpoint's)"
    )
    parser.add_argument("--device", help="as PyTorch names it (default: cuda if there is one, else cpu)")
    parser.add_argument("--log-samples", action="store_true", help="put every row's prediction into --out")
    parser.add_argument("--out", type=partial(path_to, "out"), metavar="FILE", help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that --out names")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive("batch_size", text)


def _quiet() -> None:
    """Leaves the screen to the result, to errors and to lm-eval's progress bars."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    quiet()
    datasets.disable_progress_bars()
