"""Text from local files, in the formats that people have it in: `files/text.py` tells which one a file holds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.rows import Row, RowError, csv_rows, json_rows, kept, parquet_columns, parquet_rows
from neuroal_jax.files.text import UNREADABLE, Kind, kind_of, open_text

_CHATS = ("messages", "conversations")  # columns that are read where there is no text beside them
_ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT's `from`, under the names that chat templates know
_REFUSALS: dict[Kind, str] = {
    "json": "{place} is no JSON object with a string '{column}' ({reason})",
    "csv": "cannot be read as CSV ({place}: {reason})",
    "parquet": "column '{column}' holds something other than strings ({place}: {reason})",
}


@dataclass(frozen=True)
class Chat:
    """A conversation, which a chat template makes a text of.

    Attributes:
        messages: `role` and `content` of each.
        place: Where it stands, for messages to the user.
    """

    messages: tuple[Mapping[str, str], ...]
    place: str


@dataclass(frozen=True)
class Text:
    """Text before tokenisation: documents, each sampled on its own, or one long text (a single joined document)."""

    documents: Sequence[Any]  # all are strings, or all are `Chat`s
    joined: bool

    @property
    def chats(self) -> bool:
        """Whether the documents are conversations."""
        return bool(self.documents) and isinstance(self.documents[0], Chat)

    def is_blank(self) -> bool:
        """Whether there is nothing but white space in it."""
        contents = (message["content"] for chat in self.documents for message in chat.messages)
        return not any(text.strip() for text in (contents if self.chats else self.documents))


def read_text(path: Path, column: str | None = None, usual: str = "text") -> Text:
    """The documents in a column of a table (JSON lines or array, CSV, parquet); any other text is one.

    Args:
        path: The file.
        column: Holds texts, or conversations; None: `usual`, or else `messages` or `conversations`.
        usual: The column where none is named.

    Raises:
        UserError: If the file cannot be read, is no text, or has no such column.
    """
    wanted = (usual, *_CHATS) if column is None else (column,)
    kind: Kind = "text"
    try:
        kind = kind_of(path)
        if kind != "text":
            return _documents(path, kind, wanted)
        with open_text(path) as file:
            return Text([file.read()], joined=True)
    except RowError as error:
        refusal = _REFUSALS[kind].format(place=error.place, column=wanted[0], reason=error.reason)
        raise UserError(refusal) from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot be read as text ({error}): save it as UTF-8") from error
    except UNREADABLE as error:
        raise UserError(f"cannot be read as {'parquet' if kind == 'parquet' else 'text'} ({error})") from error


def _documents(path: Path, kind: Kind, wanted: Sequence[str]) -> Text:
    """A document of every row; raises RowError if one is neither text nor a conversation, as all others."""
    documents: list[str | Chat] = []
    for place, value in kept(_values(path, kind, wanted), path):
        document = _document(path, place, value)
        if documents and type(document) is not type(documents[0]):
            raise RowError(place, "text and conversations in one column")
        documents.append(document)
    return Text(documents, joined=False)


def _values(path: Path, kind: Kind, wanted: Sequence[str]) -> Iterator[Row]:
    """The values of a column, the first of those wanted that the first row has."""
    column = None
    for place, row in _rows(path, kind, wanted):
        if not isinstance(row, dict):
            raise RowError(place, f"it is a {type(row).__name__}")
        column = _choose(wanted, row) if column is None else column
        if column not in row and kind == "csv":
            raise _no_column(wanted[0], row)
        if column not in row:
            raise RowError(place, f"its columns: {_listed(row)}; --text-column names another")
        yield place, row[column]


def _rows(path: Path, kind: Kind, wanted: Sequence[str]) -> Iterable[Row]:
    if kind == "json":
        return json_rows(path)
    if kind == "csv":
        return csv_rows(path, wanted)
    names = parquet_columns(path)
    column = _choose(wanted, names)
    if names.count(column) != 1:
        raise _no_column(wanted[0], names)
    return parquet_rows(path, [column])


def _choose(wanted: Sequence[str], names: Iterable[str]) -> str:
    """The first of the wanted columns that is there, else the first."""
    found = set(names)
    return next((column for column in wanted if column in found), wanted[0])


def _no_column(column: str, names: Iterable[str]) -> UserError:
    return UserError(f"has columns [{_listed(names)}], expected one named '{column}': --text-column names another")


def _listed(names: Iterable[str]) -> str:
    return shorten([repr(name) for name in names], 20).replace(";", ",")


def _document(path: Path, place: str, value: Any) -> str | Chat:
    if isinstance(value, list):
        messages = tuple(_message(place, number, message) for number, message in enumerate(value, 1))
        return Chat(messages, f"{path}: {place}")
    if not isinstance(value, str):
        raise RowError(place, f"the value is a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair is no text
        raise RowError(place, error) from error
    return value


def _message(place: str, number: int, message: Any) -> dict[str, str]:
    if isinstance(message, dict):
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": _ROLES.get(role, role), "content": content}
    raise RowError(place, f"message {number} has no texts 'role' and 'content'")
