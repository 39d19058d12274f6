"""Token windows for calibration and perplexity: from the Hub's data sets, from text files, or from token ids."""

import hashlib
import io
import json
import os
import random
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from neuroal_jax.checkpoint.locate import DEMO
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import allowed_size, open_text
from neuroal_jax.machine.memory import is_exhausted, refuse_what_cannot_fit

if TYPE_CHECKING:
    from neuroal_jax.checkpoint.opened import Checkpoint

HUB_TEXTS = ("wikitext2", "c4", "ptb")
TEXTS = (*HUB_TEXTS, "demo")
DEFAULT_SEQLEN = 2048
DEMO_SEQLEN = 128
_C4_EVALUATION = (1100, 256)  # documents read, windows kept: the usual cut of C4's validation set
_COLUMNS = {"c4": "text", "wikitext2": "text", "ptb": "sentence"}
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_HOPELESS = 20_000  # documents tried without finding a single one that is long enough
_ENCODING_BYTES = 32  # that a tokenizer takes for each character, at least

Encode = Callable[[str], Sequence[int] | np.ndarray]


def default_seqlen(model: str) -> int:
    """Tokens per window where no one says: as the paper, less for the embedded demo."""
    return DEMO_SEQLEN if model == "demo" else DEFAULT_SEQLEN


@dataclass(frozen=True)
class Text:
    """Text before tokenisation: documents, each sampled on its own, or one long text (a single joined document)."""

    documents: Sequence[str]
    joined: bool


@dataclass(frozen=True)
class Windows:
    """Token ids and where they come from.

    Attributes:
        ids: int32 `[n, seqlen]`.
        origin: The source as it was named.
        bos: Where the tokenizer puts a BOS: `every window`, `every document` or `nowhere`; None for token files.
        tokenizer: Its class, and the SHA-256 of its files; None for token files.
        text_sha256: Of the documents; None for token files, and for calibration, which draws few of many.
    """

    ids: np.ndarray
    origin: str
    bos: str | None = None
    tokenizer: dict[str, str] | None = None
    text_sha256: str | None = None

    @property
    def starts_with_bos(self) -> bool:
        """Whether the first window begins with a BOS that the tokenizer put there."""
        return self.bos not in (None, "nowhere")

    @property
    def sha256(self) -> str:
        """Hash of the ids and their shape."""
        digest = hashlib.sha256(f"{list(self.ids.shape)}\0".encode())
        digest.update(np.ascontiguousarray(self.ids, dtype="<i4").data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reader:
    """How to turn text into windows for one model.

    Attributes:
        model: The model's directory: where the tokenizer lies.
        vocab_size: Ids must be below it.
        max_seqlen: The most positions that the model was made for.
        seqlen: Tokens per window as given, or None.
        default_seqlen: Tokens per window where neither the user nor a 2-D token file says.
        bos_every_window: Whether every window of a text begins with BOS, not only the text (Gemma). Token files are
            taken as they are.
    """

    model: Path
    vocab_size: int
    max_seqlen: int
    seqlen: int | None
    default_seqlen: int = DEFAULT_SEQLEN
    bos_every_window: bool = False

    def calibration(self, source: str, samples: int, seed: int) -> Windows:
        """Samples windows: with Python's `random.seed(seed)`, a document and then a start in it, `samples` times.

        A document needs more than seqlen tokens; of one long text only starts are drawn. A 2-D array of token ids is
        used row by row, unsampled.

        Raises:
            UserError: If the source is unknown, empty, too short, or not of this model's vocabulary.
        """
        flag = f"--calib {source}"
        _check_exists(source, flag)
        if _is_token_file(source):
            ids = self._check_ids(_load_tokens(Path(source), "calibration", flag), flag)
            if ids.ndim == 2:
                self._check_width(ids.shape[1], flag)
                return Windows(ids[:samples], source)
            seqlen = self._length()
            return Windows(_sample([lambda: ids], samples, seqlen, seed, flag, joined=True), source)
        seqlen = self._length()
        text = _load_text(source, "train", flag)
        tokenizer = _tokenizer(self.model, self.bos_every_window)
        documents = [partial(_tokenise, tokenizer.encode, document) for document in text.documents]
        length = seqlen - self.bos_every_window
        ids = _sample(documents, samples, length, seed, flag, joined=text.joined)
        return self._windows(ids, source, flag, tokenizer)

    def evaluation(self, source: str, flag: str = "--eval") -> Windows:
        """Cuts a text into windows that do not overlap, dropping the tail; a 2-D array is used as it is.

        `flag` is the command's name for it, in messages.

        Raises:
            UserError: As `calibration`.
        """
        flag = f"{flag} {source}"
        _check_exists(source, flag)
        if _is_token_file(source):
            ids = self._check_ids(_load_tokens(Path(source), "evaluation", flag), flag)
            if ids.ndim == 2:
                self._check_width(ids.shape[1], flag)
                return Windows(ids, source)
            return Windows(_cut(ids, self._length(), flag), source)
        seqlen = self._length()
        text = _load_text(source, "test", flag)
        tokenizer = _tokenizer(self.model, self.bos_every_window)
        whole = " ".join(text.documents)
        ids = _tokenise(tokenizer.encode, whole)
        if _named(source)[0] == "c4":
            ids = ids[: _C4_EVALUATION[1] * seqlen]
        windows = self._windows(_cut(ids, seqlen - self.bos_every_window, flag), source, flag, tokenizer)
        return replace(windows, text_sha256=hashlib.sha256(whole.encode()).hexdigest())

    def _windows(self, ids: np.ndarray, source: str, flag: str, tokenizer: "_Tokenizer") -> Windows:
        """Windows of a text, with BOS in front of each for a family that wants it."""
        bos = "every document" if tokenizer.begins_with_bos() else "nowhere"
        if self.bos_every_window:
            ids = np.concatenate([np.full((len(ids), 1), tokenizer.bos, np.int32), ids], axis=1)
            bos = "every window"
        return Windows(self._check_ids(ids, flag), source, bos, tokenizer.description)

    def _length(self) -> int:
        seqlen = self.seqlen or self.default_seqlen
        if seqlen > self.max_seqlen:
            raise UserError(
                f"--seqlen {seqlen} exceeds the model's max_position_embeddings {self.max_seqlen}: "
                f"pass --seqlen {self.max_seqlen} or less"
            )
        if seqlen < 2:
            raise UserError("--seqlen 1 leaves nothing to predict: pass 2 or more")
        return seqlen

    def _check_width(self, width: int, flag: str) -> None:
        if self.seqlen not in (None, width):
            raise UserError(
                f"{flag}: rows have {width} tokens, expected {self.seqlen} as --seqlen or the other token file says"
            )
        if not 2 <= width <= self.max_seqlen:
            raise UserError(
                f"{flag}: rows have {width} tokens, expected 2 to the model's max_position_embeddings {self.max_seqlen}"
            )

    def _check_ids(self, ids: np.ndarray, flag: str) -> np.ndarray:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"{flag}: token id {bad} is outside of the model's vocabulary of {self.vocab_size}: "
                "the ids are of another tokenizer"
            )
        return ids.astype(np.int32)


def reader_for(checkpoint: "Checkpoint", model: str, seqlen: int | None) -> Reader:
    """The reader for an opened model; `model` is what the user called it, `seqlen` what the user asked for."""
    limits = (checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)
    return Reader(checkpoint.path, *limits, seqlen, default_seqlen(model), checkpoint.family.bos_every_window)


def _named(source: str) -> tuple[str | None, str | None]:
    """The known text whose rules hold, and the file it is read from: of `c4`, of `c4=FILE`, or of `FILE`."""
    name, equals, file = source.partition("=")
    if source in TEXTS:
        return source, None
    return (name, file) if equals and name in HUB_TEXTS and not os.path.isfile(source) else (None, source)


def label(source: str) -> str:
    """What a source is called in tables: the known text's name, or the file's."""
    name, file = _named(source)
    return name or Path(str(file)).name


def read_evaluations(reader: Reader, sources: Sequence[str], flag: str = "--eval") -> dict[str, Windows]:
    """Evaluation windows of every source, by its label.

    Raises:
        UserError: If one cannot be used, or two have one label.
    """
    labels = [label(source) for source in sources]
    for name in labels:
        if labels.count(name) > 1:
            raise UserError(f"{flag}: two of {', '.join(sources)} are called {name}: name every text once")
    return {name: reader.evaluation(source, flag) for name, source in zip(labels, sources, strict=True)}


def check_sources(calibration: str, evaluations: Sequence[str]) -> None:
    """Raises UserError for a text that is neither a data set nor a file."""
    _check_exists(calibration, f"--calib {calibration}")
    for source in evaluations:
        _check_exists(source, f"--eval {source}")


def _check_exists(source: str, flag: str) -> None:
    name, file = _named(source)
    if file is not None and not os.path.isfile(file):
        raise UserError(f"{flag}: no such file" + ("" if name else f", and not one of {', '.join(TEXTS)}"))
    if name and file and _is_token_file(file):
        raise UserError(f"{flag}: {name}= is for text, whose rules it sets: name the token file alone")


def _is_token_file(source: str) -> bool:
    return source.endswith((".npy", ".npz"))


def _load_tokens(path: Path, role: str, flag: str) -> np.ndarray:
    """Token ids of a file, 1-D or 2-D; of several arrays in an .npz, the one named after its role."""
    try:
        with path.open("rb") as file:  # NumPy leaves a file open that it opened itself and found damaged
            _check_expansion(file, allowed_size(path))
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                ids = loaded
            else:
                names = loaded.files
                if role not in names and len(names) != 1:
                    raise UserError(f"{flag}: holds arrays {names}, expected a single one or one named '{role}'")
                ids = loaded[role if role in names else names[0]]
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for damaged files
        raise UserError(f"{flag}: cannot be read as NumPy token ids ({error})") from error
    if not isinstance(ids, np.ndarray):
        raise UserError(f"{flag}: holds something that is no array")
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise UserError(f"{flag}: holds {ids.dtype} of shape {list(ids.shape)}, expected whole numbers, 1-D or 2-D")
    if ids.size == 0:
        raise UserError(f"{flag}: holds no tokens")
    return ids


def _check_expansion(file: BinaryIO, allowed: int) -> None:
    """Raises ValueError if an .npz file's directory, beyond which nothing is read, holds more than `allowed` bytes."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > allowed:
            raise ValueError(f"{size} bytes in a file that may hold {allowed}")
    file.seek(0)


def _load_text(source: str, split: str, flag: str) -> Text:
    name, file = _named(source)
    if name == "demo":
        text = _read_text(DEMO / ("calibration.jsonl" if split == "train" else "evaluation.txt"), flag)
    elif name is None:
        text = _read_text(Path(source), flag)
    else:
        rows = _hub_rows(name, split, flag) if file is None else _file_rows(name, Path(file), flag)
        text = _as_in_the_paper(name, split, rows)
    if not any(document.strip() for document in text.documents):
        raise UserError(f"{flag}: holds no text")
    return text


def _as_in_the_paper(name: str, split: str, rows: Sequence[str]) -> Text:
    """How the paper's code makes a text of a data set's rows."""
    if name == "c4":
        return Text(rows if split == "train" else list(rows[: _C4_EVALUATION[0]]), joined=False)
    between = "\n\n" if (name, split) == ("wikitext2", "test") else " "
    return Text([between.join(rows)], joined=True)


def _file_rows(name: str, path: Path, flag: str) -> list[str]:
    """A local file's rows, as the data set on the Hub has them."""
    text = _read_text(path, flag, column=_COLUMNS[name])
    if not text.joined:
        return list(text.documents)
    if name == "c4":
        raise UserError(f"{flag}: is one text, expected documents: .jsonl, .json.gz or .parquet")
    lines = io.StringIO(text.documents[0])  # unlike str.splitlines, breaks at newlines only
    if name == "ptb":
        return [line.strip() for line in lines]
    return [line if line.strip() else "" for line in lines]  # WikiText2's rows end in a newline, empty ones have none


def _hub_rows(source: str, split: str, flag: str) -> Sequence[str]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if source == "c4":
            name = "train" if split == "train" else "validation"
            file = (
                "en/c4-train.00000-of-01024.json.gz" if name == "train" else "en/c4-validation.00000-of-00008.json.gz"
            )
            rows = datasets.load_dataset("allenai/c4", data_files={name: file}, split=name)
        elif source == "wikitext2":
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        else:  # its own loader is a script, which is never run: the Hub's conversion to parquet is read instead
            rows = datasets.load_dataset("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=split)
        return rows[_COLUMNS[source]]
    except Exception as error:  # datasets raises many kinds: no network, no such revision, a changed layout
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{flag}: the Hugging Face Hub gave no data ({type(error).__name__}: {reason}): "
            "give a local .txt, .jsonl, .parquet, .npy or .npz file instead"
        ) from error


def _read_text(path: Path, flag: str, column: str = "text") -> Text:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".parquet":
            return Text(_parquet_column(path, flag, column), joined=False)
        with open_text(path) as file:
            if kind in (".jsonl", ".json"):
                return Text(
                    [_text_of(line, number, flag, column) for number, line in enumerate(file, 1) if line.strip()], False
                )
            return Text([file.read()], joined=True)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{flag}: cannot be read as text ({error})") from error


def _text_of(line: str, number: int, flag: str, column: str) -> str:
    try:
        text = json.loads(line)[column]
        if not isinstance(text, str):
            raise TypeError(f"'{column}' is a {type(text).__name__}")
        text.encode()  # half a surrogate pair is no text
        return text
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{flag}: line {number} is no JSON object with a string '{column}' ({error!r})") from error


def _parquet_column(path: Path, flag: str, column: str) -> list[str]:
    from pyarrow import parquet

    try:
        columns = parquet.read_schema(path).names
        if columns.count(column) != 1:
            raise UserError(f"{flag}: has columns {columns}, expected one named '{column}'")
        with parquet.ParquetFile(path, read_dictionary=[column]) as file:
            documents = _strings(file, column, allowed_size(path))
    except UserError:
        raise
    except Exception as error:  # pyarrow raises OSError, UnicodeDecodeError and others of its own for damaged files
        raise UserError(f"{flag}: cannot be read as parquet ({error})") from error
    if not all(isinstance(document, str) for document in documents):
        raise UserError(f"{flag}: column '{column}' holds something other than strings")
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


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer as a function, its BOS id, and what it is."""

    encode: Encode
    bos: int | None
    description: dict[str, str]

    def begins_with_bos(self) -> bool:
        return self.bos is not None and list(self.encode("a")[:1]) == [self.bos]


def _tokenizer(model: Path, without_bos: bool = False) -> _Tokenizer:
    """The model's tokenizer, special tokens (but not `without_bos`) included."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missing: it is not needed here
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # a long text is cut into windows: its length is no reason to warn
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for missing and damaged files
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer in {model} cannot be loaded ({reason}): pass token ids (.npy) instead"
        ) from error
    bos = tokenizer.bos_token_id
    encode = partial(_encode, tokenizer, model)
    description = {"class": type(tokenizer).__name__, "sha256": _tokenizer_sha256(model)}
    if not without_bos:
        return _Tokenizer(encode, bos, description)
    if bos is None:
        raise UserError(f"the tokenizer in {model} has no BOS token, which this family needs in front of every window")

    def encode_without(text: str) -> Sequence[int] | np.ndarray:
        ids = encode(text)
        return ids[1:] if list(ids[:1]) == [bos] else ids

    return _Tokenizer(encode_without, bos, description)


def _tokenizer_sha256(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in _TOKENIZER_FILES for path in model.glob(name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _encode(tokenizer: Any, model: Path, text: str) -> Sequence[int] | np.ndarray:
    if len(text) > 2**20:  # where tokenizers gets no memory, it ends the process
        refuse_what_cannot_fit(_ENCODING_BYTES * len(text), "give a shorter text")
    try:
        return np.array(tokenizer(text)["input_ids"], dtype=np.int32)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises several kinds for inconsistent files, and panics, which is none
        if is_exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer in {model} cannot read this text ({reason}): pass token ids (.npy) instead"
        ) from error


def _tokenise(encode: Encode, text: str) -> np.ndarray:
    return np.array(encode(text), dtype=np.int32)


def _sample(
    documents: Sequence[Callable[[], np.ndarray]], samples: int, seqlen: int, seed: int, flag: str, *, joined: bool
) -> np.ndarray:
    """Draws `samples` windows; each document is tokenised at most once, and only when it is drawn."""
    refuse_what_cannot_fit(samples * (8 * seqlen + 100), "lower --nsamples or --seqlen")
    rng = random.Random(seed)
    lengths: dict[int, int] = {}
    usable: dict[int, np.ndarray] = {}
    windows: list[np.ndarray] = []
    while len(windows) < samples:
        index = 0 if joined else rng.randint(0, len(documents) - 1)
        if index not in lengths:
            ids = documents[index]()
            lengths[index] = len(ids)
            if len(ids) > seqlen:
                usable[index] = ids
        if index in usable:
            ids = usable[index]
            start = rng.randint(0, len(ids) - seqlen - 1)
            windows.append(ids[start : start + seqlen])
        elif not usable and len(lengths) >= min(len(documents), _HOPELESS):
            raise UserError(
                f"{flag}: no document has more than {seqlen} tokens, the longest of {len(lengths)} has "
                f"{max(lengths.values())}: lower --seqlen or give longer text"
            )
    return np.stack(windows).astype(np.int32)


def _cut(ids: np.ndarray, seqlen: int, flag: str) -> np.ndarray:
    count = len(ids) // seqlen
    if count == 0:
        raise UserError(f"{flag}: has {len(ids)} tokens, fewer than one window of {seqlen}: lower --seqlen")
    return ids[: count * seqlen].reshape(count, seqlen)
