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


def check_sources(calibration: str, evaluations: Sequence[str]) -> None:
    """Raises UserError for a text that is neither a data set nor a file."""
    check_exists(calibration, f"--calib {calibration}")
    for source in evaluations:
        check_exists(source, f"--eval {source}")


def check_exists(source: str, flag: str) -> None:
    """Raises UserError, which begins with `flag`, for a text that is neither a data set nor a file."""
    name, file = name_and_file(source)
    if file is not None and not os.path.isfile(file):
        raise UserError(f"{flag}: no such file" + ("" if name else f", and not one of {', '.join(TEXTS)}"))
    if name and file and is_token_file(file):
        raise UserError(f"{flag}: {name}= is for text, whose rules it sets: name the token file alone")


def load_text(source: str, split: str, flag: str) -> Text:
    """The text of a source; `split` is `train` or `test`, which a file alone does not have.

    Raises:
        UserError: If it cannot be had, or is empty. The message begins with `flag`.
    """
    name, file = name_and_file(source)
    try:
        text = read_text(Path(source)) if name is None else _known_text(name, file, split)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not any(document.strip() for document in text.documents):
        raise UserError(f"{flag}: holds no text")
    return text


def evaluation_windows(source: str) -> int | None:
    """The most windows that an evaluation of a source keeps; None: all."""
    name, _ = name_and_file(source)
    return TEXTS[name].evaluation_windows if name else None


def _known_text(name: str, file: str | None, split: str) -> Text:
    code = TEXTS.module(name)
    rows = code.rows(split, TEXTS[name].column) if file is None else _file_rows(name, Path(file))
    return code.text(rows, split)


def _file_rows(name: str, path: Path) -> Sequence[str]:
    """A local file's rows, as the data set on the Hub has them."""
    text = read_text(path, TEXTS[name].column)
    if not text.joined:
        return text.documents
    row = getattr(TEXTS.module(name), "row", None)
    if row is None:
        raise UserError("is one text, expected documents: .jsonl, .json.gz or .parquet")
    return [row(line) for line in io.StringIO(text.documents[0])]  # unlike str.splitlines, breaks at newlines only
