"""lm-eval's tasks with rows from local files. Prompts, targets and metrics stay lm-eval's own.

A task's file is `TASK.*.jsonl`, `.json` or `.parquet` (`TASK.jsonl` too), the first two also compressed. Its rows
serve as the split that the task evaluates, under the columns that its data set has on the Hub, or in one of `LAYOUTS`.
Which columns those are is found by rendering prompts with lm-eval's definition of the task; no list of them is kept
here.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from neuroal_jax.errors import UserError
from neuroal_jax.files.rows import RowError, json_rows, kept, parquet_rows
from neuroal_jax.files.text import COMPRESSIONS, KINDS, UNREADABLE, kind_of

_JSON = [suffix for suffix, kind in KINDS.items() if kind == "json"]
SUFFIXES = (
    *(suffix for suffix, kind in KINDS.items() if kind in ("json", "parquet")),
    *(suffix + compressed for suffix in _JSON for compressed in COMPRESSIONS),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """A known layout of a task's rows other than the Hub's.

    Attributes:
        columns: The columns that it needs.
        instead_of: The Hub's column that it lacks.
        convert: What a row becomes; raises ValueError if it cannot.
        processed: Whether the rows are what the task's `process_docs` makes, so that it must not run again.
    """

    columns: tuple[str, ...]
    instead_of: str
    convert: Callable[[Row], Row]
    processed: bool = False


def _answer_to_label(row: Row) -> Row:
    if not isinstance(row["answer"], bool):
        raise ValueError(f"'answer' is {row['answer']!r}, expected true or false")
    return {**row, "label": int(row["answer"])}


def _gold_to_label(row: Row) -> Row:
    return {**row, "label": row["gold"]}


LAYOUTS = {
    "boolq": Layout(("passage", "question", "answer"), "label", _answer_to_label),  # BoolQ's own, not SuperGLUE's
    "hellaswag": Layout(("query", "choices", "gold"), "endings", _gold_to_label, processed=True),
}


@dataclass(frozen=True)
class Loaded:
    """A task of lm-eval, where its rows come from, and the file's SHA-256 (None: not from a file)."""

    task: Task
    origin: str
    sha256: str | None = None


@dataclass(frozen=True)
class _Rows:
    """The rows of a file and where each stands in it (`line 3`)."""

    file: Path
    rows: list[Row]
    places: list[str]

    def columns(self) -> str:
        return ", ".join(self.rows[0])


def load_tasks(names: Sequence[str], directory: Path | None) -> dict[str, Loaded]:
    """Tasks of lm-eval by name; with a directory, over its files, else over the Hub's data sets.

    Raises:
        UserError: If a name is no single task, data is missing, or rows lack what the task needs.
    """
    _check_names(names)
    if directory is not None and not directory.is_dir():
        raise UserError(f"--task-data {directory}: no such directory")
    return {name: _from_hub(name) if directory is None else _from_file(name, directory) for name in names}


@cache
def _manager() -> TaskManager:
    return TaskManager()  # reads all of lm-eval's definitions, which takes seconds


def _check_names(names: Sequence[str]) -> None:
    singles = _manager().all_subtasks
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"--tasks names {name} twice")
        if name in _manager().all_groups or name in _manager().all_tags:
            raise UserError(f"--tasks: {name} is a group of lm-eval's tasks: name the single tasks of it")
        if name not in singles:
            close = get_close_matches(name, singles, 3)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists all"
            raise UserError(f"--tasks: lm-eval has no task {name!r}: {hint}")


def _from_hub(name: str) -> Loaded:
    try:
        (task,) = _manager().load(name)["tasks"].values()
    except Exception as error:  # datasets raises many kinds: no network, a gated data set, a changed layout
        raise UserError(
            f"lm-eval cannot load task {name} ({_reason(error)}): give its rows as a file, with --task-data"
        ) from error
    return Loaded(task, " ".join(str(part) for part in (task.DATASET_PATH, task.DATASET_NAME) if part))


def _from_file(name: str, directory: Path) -> Loaded:
    definition = _manager().task_index[name].cfg or {}
    split = definition.get("test_split") or definition.get("validation_split")
    if "class" in definition or split is None:
        raise UserError(f"--task-data: lm-eval's task {name} is a program of its own, which takes no rows from files")
    file = _find(name, directory)
    rows = _read(file)
    rows, processed = _convert(LAYOUTS.get(name), rows)
    build = _Builder(name, definition, split, processed)
    needed = _needed_columns(build, rows)
    _check_columns(rows, needed)
    _check_types(rows, needed)
    _check_class_numbers(build, rows, needed)
    try:
        task = build(rows.rows)
    except Exception as error:  # a value that Arrow or the task's process_docs does not take
        raise UserError(f"{file}: its rows do not fit lm-eval's task {name} ({_reason(error)})") from error
    if task.config.num_fewshot and not task.sampler.df:
        raise UserError(
            f"--task-data: lm-eval's task {name} shows {task.config.num_fewshot} examples of another split, "
            "which its file does not have: leave it out"
        )
    _check_rendering(name, task, rows)
    return Loaded(task, str(file), hashlib.sha256(file.read_bytes()).hexdigest())


def _find(name: str, directory: Path) -> Path:
    named = sorted(path for path in directory.iterdir() if path.name.startswith(f"{name}.") and path.is_file())
    files = [path for path in named if path.name.lower().endswith(SUFFIXES)]
    if not files:
        others = f"; {named[0].name} is none" if named else ""
        raise UserError(f"--task-data {directory} holds no {name}.*.jsonl (nor .jsonl.gz, .json, .parquet{others})")
    if len(files) > 1:
        found = ", ".join(path.name for path in files)
        raise UserError(f"--task-data {directory} holds several files for {name}: {found}: keep one")
    return files[0]


def _read(file: Path) -> _Rows:
    try:
        numbered = list(kept(parquet_rows(file) if kind_of(file) == "parquet" else json_rows(file), file))
    except RowError as error:
        raise UserError(f"{file}: {error.place} is no JSON ({error.reason})") from error
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read ({_reason(error)})") from error
    if not numbered:
        raise UserError(f"{file} holds no rows")
    for place, row in numbered:
        if not isinstance(row, dict):
            raise UserError(f"{file}: {place} is a {type(row).__name__}, expected an object of columns")
    return _Rows(file, [row for _, row in numbered], [place for place, _ in numbered])


def _convert(layout: Layout | None, rows: _Rows) -> tuple[_Rows, bool]:
    """Rows as the Hub has them, and whether the task's `process_docs` is done."""
    columns = rows.rows[0].keys()
    if layout is None or layout.instead_of in columns or not set(layout.columns) <= columns:
        return rows, False
    _check_columns(rows, layout.columns)
    converted = []
    for place, row in zip(rows.places, rows.rows, strict=True):
        try:
            converted.append(layout.convert(row))
        except ValueError as error:
            raise UserError(f"{rows.file}: {place}: {error}") from error
    return replace(rows, rows=converted), layout.processed


def _check_columns(rows: _Rows, needed: Collection[str]) -> None:
    """Raises UserError unless every row holds a value in every needed column."""
    for place, row in zip(rows.places, rows.rows, strict=True):
        for column in needed:
            if column not in row:
                raise _lacking(rows, column, place)
            if _holds_null(row[column]):
                raise UserError(f"{rows.file}: {place} holds null in column {column!r}: give it a value or remove it")


def _lacking(rows: _Rows, column: str, place: str) -> UserError:
    return UserError(
        f"{rows.file}: {place} lacks column {column!r} (columns found: {rows.columns()}): "
        "rename or add it, as the task's data set on the Hugging Face Hub has it"
    )


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None


@dataclass(frozen=True)
class _Builder:
    """Builds lm-eval's task over given rows, with nothing else of its definition changed."""

    name: str
    definition: dict[str, Any]
    split: str
    processed: bool

    def __call__(self, rows: list[Row]) -> ConfigurableTask:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        evaluated = datasets.Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])
        # Splits for few-shot examples exist but are empty, so that no evaluated row can ever be shown as an example.
        few_shot = (self.definition.get("fewshot_config") or {}).get("split")
        others = [self.definition.get(key) for key in ("training_split", "validation_split", "fewshot_split")]
        splits = {name: evaluated.select([]) for name in (*others, few_shot)} | {self.split: evaluated}
        changes = {"custom_dataset": lambda **_: splits, **({"process_docs": None} if self.processed else {})}
        group = {"group": "from files", "task": [{"task": self.name, **changes}]}  # lm-eval's way to change a task
        (task,) = _manager().load(group)["tasks"].values()
        assert isinstance(task, ConfigurableTask)
        return task


def _check_types(rows: _Rows, needed: Collection[str]) -> None:
    """Raises UserError for the first value of another type than most others of its needed column.

    Datasets would make them alike without a word, `true` and 0.0 of the numbers 1 and 0.
    """
    for column in needed:
        found = [list(dict.fromkeys(_types(row[column], column))) for row in rows.rows]
        counts = Counter(pair for pairs in found for pair in pairs)
        usual: dict[str, str] = {}
        for part, kind in sorted(counts, key=lambda pair: -counts[pair]):
            usual.setdefault(part, kind)
        for place, pairs in zip(rows.places, found, strict=True):
            for part, kind in pairs:
                if kind != usual[part]:
                    raise UserError(f"{rows.file}: {place} holds a {kind} in column {part!r}, the others {usual[part]}")


def _types(value: Any, part: str) -> Iterator[tuple[str, str]]:
    """The types in a value, each with the part of the column that has it."""
    yield part, type(value).__name__
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _types(item, f"{part}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _types(item, f"{part}[]")


def _check_class_numbers(build: _Builder, rows: _Rows, needed: Collection[str]) -> None:
    """Raises UserError for a column of booleans or decimal numbers that the task takes for whole ones, as Python does.

    It does if nothing changes when the whole number stands in its place; in a prompt, `True` and `1` differ.
    """
    first = rows.rows[0]
    task = build([first])
    rendered = _render(task, task.eval_docs[0])
    for column in needed:
        value = first[column]
        if not isinstance(value, bool | float) or not math.isfinite(value):
            continue
        if not _differs(build, {**first, column: int(value)}, None, rendered):
            raise UserError(
                f"{rows.file}: {rows.places[0]} holds {value!r} in column {column!r}, "
                f"a {type(value).__name__}, where the task {build.name} takes whole numbers"
            )


def _needed_columns(build: _Builder, rows: _Rows) -> list[str]:
    """The first row's columns without which lm-eval would ask or expect something else of it.

    Raises:
        UserError: If the first row lacks a column.
    """
    first = rows.rows[0]
    if build.processed or "process_docs" not in build.definition:
        # lm-eval takes a bare name that is no column for a text, and would ask the model "question_stem".
        for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            name = build.definition.get(key)
            if isinstance(name, str) and name.isidentifier() and name not in first:
                raise _lacking(rows, name, rows.places[0])
    try:
        task = build([first])
        rendered = _render(task, task.eval_docs[0])
    except Exception as error:  # whatever the task's functions and templates raise
        column = _missing_column(error, first)
        if column is not None:
            raise _lacking(rows, column, rows.places[0]) from error
        raise _misfit(build.name, rows, 0, _reason(error)) from error
    return [column for column in first if _differs(build, first, column, rendered)]


def _differs(build: _Builder, row: Row, without: str | None, rendered: Any) -> bool:
    try:
        task = build([{name: value for name, value in row.items() if name != without}])
        return bool(_render(task, task.eval_docs[0]) != rendered)
    except Exception:  # as above: the task cannot do without
        return True


def _missing_column(error: Exception, row: Row) -> str | None:
    """The column whose absence an error is about, if it is."""
    if isinstance(error, KeyError) and isinstance(error.args[0], str):
        return None if error.args[0] in row or error.args[0] in row.values() else error.args[0]
    undefined = re.fullmatch(r"'(\w+)' is undefined", str(error))
    return undefined[1] if undefined else None


def _render(task: ConfigurableTask, doc: Row) -> tuple[list[Any], Any, Any]:
    """What lm-eval asks the model about a row, the target, and the choices."""
    context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
    requests = task.construct_requests(doc, context, metadata=(task.task_name, 0, 1))
    choices = None if task.config.doc_to_choice is None else task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return [request.args for request in (requests if isinstance(requests, list) else [requests])], target, choices


def _check_rendering(name: str, task: ConfigurableTask, rows: _Rows) -> None:
    """Raises UserError if a row gives no prompt, or has a target that is none of its choices."""
    for number, doc in enumerate(task.eval_docs):
        try:
            _, target, choices = _render(task, doc)
        except Exception as error:  # as above
            raise _misfit(name, rows, number, _reason(error)) from error
        if task.OUTPUT_TYPE != "multiple_choice":
            continue
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise _misfit(name, rows, number, f"choices {choices!r} are not all texts")
        for one in target if isinstance(target, list) else [target]:
            known = one in choices if isinstance(one, str) else isinstance(one, int) and one in range(len(choices))
            if not known:
                raise _misfit(name, rows, number, f"the target {one!r} is none of the {len(choices)} choices")


def _misfit(name: str, rows: _Rows, number: int, reason: str) -> UserError:
    place = rows.places[number] if number < len(rows.places) else f"document {number + 1}"
    return UserError(
        f"{rows.file}: {place} does not fit lm-eval's task {name} ({reason}; columns found: {rows.columns()})"
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
