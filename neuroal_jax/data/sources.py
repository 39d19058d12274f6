"""What a user's `--calib` and `--eval` name: a text that is known, a local file in its place, or a file alone."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from neuroal_jax.data.reading import Text, read_text
from neuroal_jax.data.texts import TEXTS
from neuroal_jax.data.tokens import is_token_file
from neuroal_jax.errors import UserError


def name_and_file(source: str) -> tuple[str | None, str | None]:
    """The known text whose rules hold, and the file it is read from: of `c4`, of `c4=FILE`, or of `FILE`."""
    if source in TEXTS:
        return source, None
    name, equals, file = source.partition("=")
    named = equals and name in TEXTS and TEXTS[name].hub and not os.path.isfile(source)
    return (name, file) if named else (None, source)


def label(source: str) -> str:
    """What a source is called in tables: the known text's name, or the file's."""
    name, file = name_and_file(source)
    return name or Path(str(file)).name


def files_of(flag: str, sources: Sequence[str]) -> list[tuple[str, str | None]]:
    """The files that sources are read from, each with the flag that names it; None for those of the Hub."""
    return [(flag, name_and_file(source)[1]) for source in sources]


def check_sources(calibration: str, evaluations: Sequence[str], text_column: str | None = None) -> None:
    """Raises UserError for a text that is neither a data set nor a file, and for a column where no file is read."""
    check_text_column([calibration, *evaluations], text_column)
    check_exists(calibration, f"--calib {calibration}")
    for source in evaluations:
        check_exists(source, f"--eval {source}")


def check_text_column(sources: Sequence[str], text_column: str | None) -> None:
    """Raises UserError for a column where no local text is read."""
    files = [file for _, file in map(name_and_file, sources) if file is not None]
    if text_column is not None and all(map(is_token_file, files)):
        raise UserError(f"--text-column {text_column} has no effect: no text is read from a file")


def check_exists(source: str, flag: str) -> None:
    """Raises UserError, which begins with `flag`, for a text that is neither a data set nor a file."""
    name, file = name_and_file(source)
    if file is not None and os.path.isdir(file):
        raise UserError(f"{flag}: is a directory, {_advice(Path(file))}")
    if file is not None and os.path.exists(file) and not os.path.isfile(file):
        raise UserError(f"{flag}: is no regular file: write its content into one")
    if file is not None and not os.path.isfile(file):
        raise UserError(f"{flag}: no such file" + ("" if name else f", and not one of {', '.join(TEXTS)}"))
    if name and file and is_token_file(file):
        raise UserError(f"{flag}: {name}= is for text, whose rules it sets: name the token file alone")


def _advice(directory: Path) -> str:
    """What to do with a directory."""
    if any((directory / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "which datasets wrote: load_from_disk(DIRECTORY), then to_parquet(FILE) of a split, makes a file of it"
    return "expected a file: name one of its files, or join them"


def load_text(source: str, split: str, flag: str, text_column: str | None = None) -> Text:
    """The text of a source.

    Args:
        source: As the user named it.
        split: `train` or `test`, which a file alone does not have.
        flag: What messages begin with.
        text_column: Holds the text in files that have columns; None: the usual one.

    Raises:
        UserError: If it cannot be had, or is empty. The message begins with `flag`.
    """
    name, file = name_and_file(source)
    try:
        text = read_text(Path(source), text_column) if name is None else _known_text(name, file, split, text_column)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if text.is_blank():
        raise UserError(f"{flag}: holds no text")
    return text


def evaluation_windows(source: str) -> int | None:
    """The most windows that an evaluation of a source keeps; None: all."""
    name, _ = name_and_file(source)
    return TEXTS[name].evaluation_windows if name else None


def _known_text(name: str, file: str | None, split: str, text_column: str | None) -> Text:
    code = TEXTS.module(name)
    rows = code.rows(split, TEXTS[name].column) if file is None else _file_rows(name, Path(file), text_column)
    return code.text(rows, split)


def _file_rows(name: str, path: Path, text_column: str | None) -> Sequence[str]:
    """A local file's rows, as the data set on the Hub has them."""
    text = read_text(path, text_column, TEXTS[name].column)
    if text.chats:
        raise UserError(f"holds conversations: {name}= is for text, whose rules it sets; name the file alone")
    if not text.joined:
        return text.documents
    row = getattr(TEXTS.module(name), "row", None)
    if row is None:
        raise UserError("is one text, expected documents: .jsonl, .json.gz or .parquet")
    return [row(line) for line in io.StringIO(text.documents[0])]  # unlike str.splitlines, breaks at newlines only
