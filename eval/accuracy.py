"""Zero-shot accuracies of a sweep's models, each measured once by a process of lm-eval."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.command.values import flag, optional, positive, text
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import number, read_json

from .grid import Run, list_items
from .zero_shot import TASKS

ZERO_SHOT = ("tasks", "task_data", "limit")
ACCURACY = "accuracy.json"
_MOST_BYTES = 2**28  # more than any manifest or file of accuracies has

# Runs `python -m` a module with its arguments, its output in a log; gives what went wrong, empty if nothing did.
Start = Callable[[list[str], Path], str]


@dataclass(frozen=True)
class ZeroShot:
    """What lm-eval measures of every model: tasks (none: nothing), where their rows lie, how many rows of each."""

    tasks: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None


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
    tasks = TASKS if found["tasks"] == "paper" else tuple(list_items("tasks", found["tasks"]))
    for name in tasks:
        text("tasks", name)
    limit, data = optional(positive, "limit", found["limit"]), optional(text, "task_data", found["task_data"])
    if data is not None and not os.path.isdir(data):
        raise UserError(f"--task-data {data} is no directory")
    return ZeroShot(tasks, data, limit)


def accuracies(run: Run, out: Path, zero_shot: ZeroShot, start: Start) -> dict[str, Any]:
    """Accuracy columns of a finished run, measured if they are not yet; `error` if they cannot be.

    The dense model is measured once for all its runs.
    """
    directory = out / run.name
    if run.config.updates_weights:
        pruned = ["--model", str(run.config.model_directory)]
    else:
        pruned = ["--model", run.config.model, "--masks", str(directory / "masks.safetensors"), "--no-dense"]
    try:
        dense = accuracy(directory.parent / f"dense-{ACCURACY}", ["--model", run.config.model], out, zero_shot, start)
        found = accuracy(directory / ACCURACY, pruned, out, zero_shot, start)
    except UserError as error:
        return {"error": str(error)}
    columns = {f"acc_{name}": value for name, value in found.items()}
    row = {**columns, "acc_mean": _mean(found), "dense_acc_mean": _mean(dense)}
    return {name: None if value is None else round(value, 4) for name, value in row.items()}


def accuracy(place: Path, model: list[str], out: Path, zero_shot: ZeroShot, start: Start) -> dict[str, float | None]:
    """Every task's accuracy of one model, from the file `place`, which a process writes if it does not hold them yet.

    Raises:
        UserError: If that fails, with the process's last words.
    """
    found, error = measured(place, zero_shot), ""
    if found is None:
        options = ["--tasks", ",".join(zero_shot.tasks), "--out", str(place), "--overwrite"]
        options += [] if zero_shot.data is None else ["--task-data", zero_shot.data]
        options += [] if zero_shot.limit is None else ["--limit", str(zero_shot.limit)]
        error = start(["neuroal_jax.eval.zero_shot", *model, *options], log_for(place, out))
        found = measured(place, zero_shot)
    if found is None:
        raise UserError(f"zero-shot: {error}")
    return found


def log_for(place: Path, out: Path) -> Path:
    """Where the output of the process goes that writes the file `place` of a sweep."""
    return out / "logs" / f"{place.relative_to(out).with_suffix('').as_posix().replace('/', '-')}.log"


def measured(path: Path, zero_shot: ZeroShot) -> dict[str, float | None] | None:
    """The accuracies in a file of `eval.zero_shot`; None if there is none, or it was asked for something else."""
    try:
        found = read_json(path, _MOST_BYTES)
        asked = (tuple(found["tasks"]), found["task_data"], found["limit"])
        accuracies = {name: _accuracy(task) for name, task in found["tasks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return accuracies if asked == (zero_shot.tasks, zero_shot.data, zero_shot.limit) else None


def _accuracy(task: Mapping[str, Any]) -> float | None:
    """Of the pruned model, where there is one; None where the task has none."""
    value = task.get("pruned", task.get("dense", {})).get("acc")
    return None if value is None else number(value)


def _mean(values: Mapping[str, float | None]) -> float | None:
    numbers = [value for value in values.values() if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None
