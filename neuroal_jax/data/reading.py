"""Text from local files: .txt and .jsonl, also compressed, and .parquet."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import allowed_size, open_text


@dataclass(frozen=True)
class Text:
    """Text before tokenisation: documents, each sampled on its own, or one long text (a single joined document)."""

    documents: Sequence[str]
    joined: bool


def read_text(path: Path, column: str = "text") -> Text:
    """The documents in a column of a .jsonl or .parquet file; any other file is one text.

    Raises:
        UserError: If the file cannot be read, or not as what its name says.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            return Text(_parquet_column(path, column), joined=False)
        with open_text(path) as file:
            if kind in (".jsonl", ".json"):
                lines = [_text_of(line, number, column) for number, line in enumerate(file, 1) if line.strip()]
                return Text(lines, joined=False)
            return Text([file.read()], joined=True)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot be read as text ({error})") from error


def _text_of(line: str, number: int, column: str) -> str:
    try:
        text = json.loads(line)[column]
        if not isinstance(text, str):
            raise TypeError(f"'{column}' is a {type(text).__name__}")
        text.encode()  # half a surrogate pair is no text
        return text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"line {number} is no JSON object with a string '{column}' ({error!r})") from error


def _parquet_column(path: Path, column: str) -> list[str]:
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        if columns.count(column) != 1:
            raise UserError(f"has columns {columns}, expected one named '{column}'")
        with parquet.ParquetFile(path, read_dictionary=[column]) as file:
            documents = _strings(file, column, allowed_size(path))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises OSError, UnicodeDecodeError and others of its own for damaged files
        raise UserError(f"cannot be read as parquet ({error})") from error
    if not all(isinstance(document, str) for document in documents):
        raise UserError(f"column '{column}' holds something other than strings")
    return documents


def _strings(file: Any, column: str, allowed: int) -> list[Any]:
    """A column; raises ValueError if it takes more than `allowed` bytes, before it does.

    It is read as a dictionary: a text that is repeated a million times takes no more room there than in the file.
    """
    import pyarrow
    from pyarrow import compute

    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    size = file.metadata.num_rows + sum(group.total_byte_size for group in groups)
    if size <= allowed:
        chunks = file.read(columns=[column])[column].chunks
        for chunk in chunks:
            if pyarrow.types.is_dictionary(chunk.type):
                lengths = compute.take(compute.binary_length(chunk.dictionary), chunk.indices)
                size += compute.sum(lengths).as_py() or 0
        if size <= allowed:
            return [text for chunk in chunks for text in chunk.to_pylist()]
    raise ValueError(f"it takes {size} bytes or more, far more than text of this file's size does")
