"""Rows of tables that someone else wrote: JSON lines or an array, CSV, parquet; strictly, and within bounds."""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuroal_jax.files.reading import allowed_size, parse_json
from neuroal_jax.files.text import open_text

Row = tuple[str, Any]  # where it stands in its file ("line 3"), and what stands there

_SPACE = re.compile(r"\s*")
_BATCH = 2**12  # rows of a parquet file that are decoded together
_OBJECT_BYTES = 128  # that a value takes as a Python object, beside its content, at most
_TOO_MUCH = "it expands to far more than text does"


class RowError(ValueError):
    """A row that cannot be read.

    Attributes:
        place: Where it stands in its file.
        reason: What is wrong with it.
    """

    def __init__(self, place: str, reason: object) -> None:
        super().__init__(f"{place}: {reason}")
        self.place, self.reason = place, reason


def kept(rows: Iterable[Row], path: Path) -> Iterator[Row]:
    """Rows that the caller keeps; raises ValueError before they take more memory than their file may."""
    left = allowed_size(path)
    for place, value in rows:
        left -= _object_bytes(value)
        if left < 0:
            raise ValueError(_TOO_MUCH)
        yield place, value


def _object_bytes(value: Any) -> int:
    """What a value of JSON takes in memory."""
    size = sys.getsizeof(value) + 16  # the pointer to it, and what is lost between objects
    if isinstance(value, dict):
        return size + sum(_object_bytes(key) + _object_bytes(item) for key, item in value.items())
    return size + sum(map(_object_bytes, value)) if isinstance(value, list) else size


def json_rows(path: Path) -> Iterator[Row]:
    """The values of JSON lines, blank ones left out, or the items of an array.

    Raises:
        RowError: If one is not strict JSON, see `parse_json`.
        ValueError: If one may take more memory than the file may; as `open_text`, like the rest of `UNREADABLE`.
    """
    allowed = allowed_size(path)
    with open_text(path) as file:
        lines = ((f"line {number}", line) for number, line in enumerate(file, 1) if line.strip())
        place, first = next(lines, ("", ""))
        if first.lstrip().startswith("["):
            yield from _items(first + file.read(), allowed)
        elif first:
            for where, line in itertools.chain([(place, first)], lines):
                _check_structure(line, allowed)
                if line.strip() == "{":
                    raise RowError(where, "an object of several lines, expected one on each, or an array of them")
                yield where, _parse(where, line)


def _check_structure(text: str, allowed: int) -> None:
    """Raises ValueError if the values of a JSON text may take more than `allowed` bytes: the 3 of `[],` become 72."""
    if 72 * (text.count(",") + text.count("[")) + 256 * text.count("{") > allowed:
        raise ValueError(_TOO_MUCH)


def _items(text: str, allowed: int) -> Iterator[Row]:
    """The items of a JSON array, one at a time: all together may take far more memory than their text."""
    _check_structure(text, allowed)
    decoder, number = json.JSONDecoder(), 0
    position = _after_space(text, text.index("[") + 1)
    more = not text.startswith("]", position)
    while more:
        number += 1
        try:
            end = decoder.raw_decode(text, position)[1]
        except (ValueError, RecursionError) as error:
            raise RowError(f"item {number}", error) from error
        yield f"item {number}", _parse(f"item {number}", text[position:end])
        position = _after_space(text, end)
        more = text.startswith(",", position)
        position = _after_space(text, position + more)
    if not text.startswith("]", position) or text[position + 1 :].strip():
        raise RowError(f"item {number}", "neither another item nor the end of the array follows")


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too


def _parse(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise RowError(place, error) from error


def csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[Row]:
    """The rows of a CSV file by the names in its first line.

    What parts its columns is a comma or, if that gives none of the `wanted` columns, a tab, semicolon or bar.

    Raises:
        RowError: If a row has not as many fields as there are names, or its quotes are damaged.
        ValueError: If it names a column twice; as `open_text`, like the rest of `UNREADABLE`.
    """
    with open_text(path, newline="") as file, _fields_of_any_length():
        start = next((line for line in file if line.strip()), "")
        reader = csv.reader(itertools.chain([start], file), delimiter=_delimiter(start, wanted), strict=True)
        names: list[str] | None = None
        try:
            for fields in reader:
                place = f"line {reader.line_num}"
                if names is None:
                    names = [name.strip() for name in fields]
                    double = next((name for name in names if name and names.count(name) > 1), None)
                    if double is not None:
                        raise RowError(place, f"names column {double!r} twice")
                elif fields and len(fields) != len(names):
                    raise RowError(place, f"has {len(fields)} fields, expected {len(names)} as the first line")
                elif fields:
                    yield place, dict(zip(names, fields, strict=True))
        except csv.Error as error:
            raise RowError(f"line {reader.line_num}", error) from error


def _delimiter(line: str, wanted: Sequence[str]) -> str:
    """What parts the names of a first line."""

    def names(delimiter: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]

    return max(",\t;|", key=lambda delimiter: (not set(wanted).isdisjoint(names(delimiter)), len(names(delimiter))))


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Fields end at 128 KiB by default; documents do not."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def parquet_columns(path: Path) -> list[str]:
    """The names of a parquet file's columns; errors as `parquet_rows`."""
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except Exception as error:  # pyarrow raises OSError, UnicodeDecodeError and others of its own for damaged files
        raise ValueError(str(error)) from error


def parquet_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a parquet file, of all `columns` or of some.

    Texts are decoded as dictionaries: one that is repeated a million times takes no more room than in the file. What
    rows take as Python objects is counted before they become such.

    Raises:
        ValueError: If it is damaged, or takes more memory than a file of its size may.
    """
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            texts, batch = _check_metadata(file, columns, allowed_size(path))
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            yield from _counted(file.iter_batches(batch, columns=columns), allowed_size(path))
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ValueError(str(error)) from error


def _counted(batches: Iterator[Any], left: int) -> Iterator[Row]:
    number = itertools.count(1)
    for batch in batches:
        left -= sum(_size(column) + _OBJECT_BYTES * len(column) for column in batch.columns)
        if left < 0:
            raise ValueError(_TOO_MUCH)
        for row in batch.to_pylist():
            yield f"row {next(number)}", row


def _check_metadata(file: Any, columns: Sequence[str] | None, allowed: int) -> tuple[list[str], int]:
    """Which texts to decode as dictionaries, and how many rows to decode together.

    Raises:
        ValueError: If the columns take more than `allowed` bytes by the file's own account.
    """
    texts, batch, size = [], _BATCH, 0
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    for number in range(len(file.schema)):
        column = file.schema.column(number)
        if columns is not None and not any(f"{column.path}.".startswith(f"{name}.") for name in columns):
            continue
        chunks = [group.column(number) for group in groups]
        width = max(column.length or 0, 16)  # of a value, at least: of its place in lists and dictionaries
        size += sum(chunk.total_uncompressed_size + width * chunk.num_values for chunk in chunks)
        if column.physical_type == "BYTE_ARRAY":
            if any("DELTA_BYTE_ARRAY" in chunk.encodings for chunk in chunks):
                batch = 1  # each text may repeat the one before, and pyarrow makes no dictionary of them
            else:
                texts.append(column.path)
    if size > allowed:
        raise ValueError(f"it takes {size} bytes or more, far more than text of this file's size does")
    return texts, batch


def _size(array: Any) -> int:
    """About how many bytes the values of an Arrow array take as Python objects, beyond the outermost ones."""
    import pyarrow
    from pyarrow import compute

    kind = pyarrow.types
    if kind.is_dictionary(array.type) and array.type.value_type in (pyarrow.string(), pyarrow.binary()):
        lengths = compute.take(compute.binary_length(array.dictionary), array.indices)
        return compute.sum(lengths).as_py() or 0
    if kind.is_struct(array.type):
        return sum(_size(field) + _OBJECT_BYTES * len(field) for field in array.flatten())
    if kind.is_map(array.type):
        return sum(_size(part) + _OBJECT_BYTES * len(part) for part in (array.keys, array.items))
    if kind.is_list(array.type) or kind.is_large_list(array.type) or kind.is_fixed_size_list(array.type):
        values = array.flatten()
        return _size(values) + _OBJECT_BYTES * len(values)
    return int(array.nbytes)
