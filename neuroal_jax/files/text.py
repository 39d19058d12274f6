"""Text out of a file: what the file holds is told by its first bytes, then by its name; unpacked within bounds."""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from neuroal_jax.files.reading import allowed_size, open_plain

Kind = Literal["text", "json", "csv", "parquet"]

# What damaged files raise in their libraries' readers.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
ACCEPTED = (
    ".txt; .jsonl, .ndjson or .json; .csv or .tsv; .parquet; all but the last also as .gz, .bz2, .xz or .zst; "
    ".npy or .npz of token ids"
)

KINDS: dict[str, Kind] = {
    **dict.fromkeys((".json", ".jsonl", ".jsonlines", ".ndjson", ".ldjson", ".jl"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "Zstandard",
    b"PAR1": "parquet",
    b"\x93NUMPY": "a NumPy array",
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!\x1a": "a RAR archive",
    b"\x04\x22\x4d\x18": "LZ4",
    b"%PDF-": "a PDF",
    b"{\\rtf": "RTF",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"ARROW1": "an Arrow table",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"FEA1": "a Feather table",
    b"Obj\x01": "an Avro table",
    b"\x89HDF": "HDF5",
    b"SQLite format 3": "an SQLite database",
}
# Their content is no running text, and the first bytes do not always tell.
_OTHER_FORMATS = frozenset(
    ".html .htm .xhtml .xml .rtf .yaml .yml .toml .pdf .doc .docx .odt .epub .xls .xlsx .ods .zip .tar .tgz .tbz2 .txz "
    ".7z .rar .lzma .lz4 .br .z .arrow .feather .orc .avro .h5 .hdf5 .db .sqlite .pkl .pickle .pt .pth .bin "
    ".safetensors .npy .npz .ipynb .json5 .jsonc".split()
)
_BOMS = {  # UTF-32 first: in little endian, UTF-16's is its beginning
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}
_START = 8000  # bytes; a NUL among them makes a file binary, as git and grep see it

_JSON = re.compile(r"""\s*(\{\s*["'}]|\[[\[\s]*(\{\s*["'}]|"|-?\d+\s*,))""")
_NAME = r'("[^"\n]{1,64}"|[A-Za-z_][\w.-]{0,63})'
_TABLE = re.compile(rf"{_NAME}([,;|\t]){_NAME}(\2{_NAME})*\r?\n")  # a first line of names; prose has spaces
_MARKUP = re.compile(r"\s*<(!doctype|!--|\?xml|html|mediawiki|rss|svg|doc)\b", re.IGNORECASE)
_MARKDOWN_TABLE = re.compile(r"\s*\|.*\|[ \t]*\r?\n[ \t]*\|[ \t:|-]+\|[ \t]*(\r?\n|$)")


def kind_of(path: Path) -> Kind:
    """What a file holds: parquet by its first bytes, else what its name says, else what its text looks like.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is of a format that is no text, or damaged (as all of `UNREADABLE`).
    """
    magic = _magic(_head(path))
    if magic == "parquet":
        return "parquet"
    name = path.name.lower()
    suffix = Path(name.removesuffix(Path(name).suffix) if Path(name).suffix in COMPRESSIONS else name).suffix
    if KINDS.get(suffix) == "parquet" and magic in COMPRESSIONS.values():
        raise ValueError("it is compressed as a whole, as parquet is not: unpack it")
    if suffix in KINDS:
        return KINDS[suffix]
    with open_text(path) as file:  # which names a foreign format by what it is
        start = file.read(_START)
    if suffix in _OTHER_FORMATS:
        raise ValueError(f"{suffix} files are not read as text, expected one of {ACCEPTED}")
    if _JSON.match(start):
        return "json"
    if _TABLE.match(start):
        return "csv"
    if _MARKUP.match(start):
        raise ValueError(f"it holds HTML or XML: take the text out of it, into one of {ACCEPTED}")
    if _MARKDOWN_TABLE.match(start):
        raise ValueError(f"it holds a table of Markdown: write its text into one of {ACCEPTED}")
    return "text"


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Opens a text in UTF-8, or in what its byte order mark says, unpacked if it is compressed.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it holds something else. Reading raises one of `UNREADABLE` where the content is damaged, or
            takes more than it may.
    """
    compression, suffix = _magic(_head(path)), path.suffix.lower()
    if compression in COMPRESSIONS.values():
        file: Any = io.BufferedReader(_Bounded(_unpacked(path, compression), allowed_size(path)), 2**16)
    elif suffix in COMPRESSIONS:
        raise ValueError(f"it is not {COMPRESSIONS[suffix]}, which its name says")
    else:
        file = open_plain(path, 2**16)
    try:
        start = file.peek(_START)[:_START]
        found = _magic(start)
        if found is not None:
            raise ValueError(f"it holds {found}, expected one of {ACCEPTED}")
        encoding = next((encoding for bom, encoding in _BOMS.items() if start.startswith(bom)), "utf-8")
        if encoding == "utf-8" and b"\0" in start:
            raise ValueError("it holds NUL bytes: it is no text, or UTF-16 without a byte order mark")
        return io.TextIOWrapper(file, encoding, newline=newline)
    except BaseException:
        file.close()
        raise


def _head(path: Path) -> bytes:
    with open_plain(path) as file:
        return file.read(_START)


def _magic(start: bytes) -> str | None:
    """The format that first bytes tell, if they do."""
    if start[257:262] == b"ustar":
        return "a tar archive"
    found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    return None if found == "bzip2" and start[4:10] != b"1AY&SY" else found  # "BZh" alone may begin a text


def _unpacked(path: Path, compression: str | None) -> Any:
    if compression == "Zstandard":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    if compression == "gzip":
        return gzip.GzipFile(path)
    return _Streams(open_plain(path), bz2.BZ2Decompressor if compression == "bzip2" else lzma.LZMADecompressor)


class _Streams:
    """A file of one packed stream or more, to its last byte.

    Python's own readers of bzip2 and xz take a damaged stream after the first for the end of the file.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make = file, make
        self._stream = make()

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end; raises one of `UNREADABLE` if the file is damaged."""
        found = b""
        while not found:
            packed = b""
            if self._stream.eof:
                packed = self._next()
                if not packed:
                    break
                self._stream = self._make()
            elif self._stream.needs_input and not (packed := self._file.read(_START)):
                raise EOFError("it ends in the middle of what is packed")
            found = self._stream.decompress(packed, size)
        return found

    def _next(self) -> bytes:
        """The beginning of the next stream, behind padding; nothing at the end of the file."""
        start: bytes = self._stream.unused_data.lstrip(b"\0")
        while not start and (packed := self._file.read(_START)):
            start = packed.lstrip(b"\0")
        return start

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class _Bounded(io.RawIOBase):
    """An unpacked file that ends in a ValueError before its content takes more than it may."""

    def __init__(self, file: Any, allowed: int) -> None:
        self._file = file
        self._left = allowed

    def readable(self) -> bool:
        """Yes: `io.BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer; returns the number of bytes."""
        found = self._file.read(len(buffer))
        self._left -= len(found)
        if self._left < 0:
            raise ValueError("it expands to far more than text does")
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Closes the file too."""
        self._file.close()
        super().close()
