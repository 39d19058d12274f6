"""Token windows for calibration and perplexity: from the Hub's data sets, from text files, or from token ids."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neuroal_jax.data.reading import Text
from neuroal_jax.data.sources import check_exists, evaluation_windows, label, load_text
from neuroal_jax.data.tokenizer import Tokenizer, load_chat_tokenizer, load_tokenizer
from neuroal_jax.data.tokens import check_ids, cut, is_token_file, load_tokens, sample, token_hash
from neuroal_jax.errors import UserError

if TYPE_CHECKING:
    from neuroal_jax.checkpoint.opened import Checkpoint

DEFAULT_SEQLEN = 2048
DEMO_SEQLEN = 128


def default_seqlen(model: str, positions: int = DEFAULT_SEQLEN) -> int:
    """Tokens per window where no one says: as the paper, less for the embedded demo and for shorter `positions`."""
    return min(DEMO_SEQLEN if model == "demo" else DEFAULT_SEQLEN, positions)


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
        return token_hash(self.ids)


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
        text_column: Holds the text in files that have columns; None: the usual one.
    """

    model: Path
    vocab_size: int
    max_seqlen: int
    seqlen: int | None
    default_seqlen: int = DEFAULT_SEQLEN
    bos_every_window: bool = False
    text_column: str | None = None

    def calibration(self, source: str, samples: int, seed: int) -> Windows:
        """Samples windows: with Python's `random.seed(seed)`, a document and then a start in it, `samples` times.

        A document needs more than seqlen tokens; of one long text only starts are drawn. A 2-D array of token ids is
        used row by row, unsampled.

        Raises:
            UserError: If the source is unknown, empty, too short, or not of this model's vocabulary.
        """
        flag = f"--calib {source}"
        check_exists(source, flag)
        if is_token_file(source):
            ids = self._load_tokens(source, "calibration", flag)
            if ids.ndim == 2:
                self._check_width(ids.shape[1], flag)
                return Windows(ids[:samples], source)
            seqlen = self._length()
            return Windows(sample([lambda: ids], samples, seqlen, seed, flag, joined=True), source)
        seqlen = self._length()
        text = load_text(source, "train", flag, self.text_column)
        tokenizer = self._tokenizer(text, flag)
        documents = [partial(tokenizer.read, document) for document in text.documents]
        length = seqlen - self.bos_every_window
        ids = sample(documents, samples, length, seed, flag, joined=text.joined)
        return self._windows(ids, source, flag, text, tokenizer)

    def evaluation(self, source: str, flag: str = "--eval") -> Windows:
        """Cuts a text into windows that do not overlap, dropping the tail; a 2-D array is used as it is.

        `flag` is the command's name for it, in messages.

        Raises:
            UserError: As `calibration`.
        """
        flag = f"{flag} {source}"
        check_exists(source, flag)
        if is_token_file(source):
            ids = self._load_tokens(source, "evaluation", flag)
            if ids.ndim == 2:
                self._check_width(ids.shape[1], flag)
                return Windows(ids, source)
            return Windows(cut(ids, self._length(), flag), source)
        seqlen = self._length()
        text = load_text(source, "test", flag, self.text_column)
        tokenizer = self._tokenizer(text, flag)
        whole = ("" if text.chats else " ").join(map(tokenizer.render, text.documents))
        ids = tokenizer.encode(whole)
        most = evaluation_windows(source)
        if most is not None:
            ids = ids[: most * seqlen]
        windows = self._windows(cut(ids, seqlen - self.bos_every_window, flag), source, flag, text, tokenizer)
        return replace(windows, text_sha256=hashlib.sha256(whole.encode()).hexdigest())

    def _tokenizer(self, text: Text, flag: str) -> Tokenizer:
        load = load_chat_tokenizer if text.chats else load_tokenizer
        try:
            return load(self.model, without_bos=self.bos_every_window)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error

    def _windows(self, ids: np.ndarray, source: str, flag: str, text: Text, tokenizer: Tokenizer) -> Windows:
        """Windows of a text, with BOS in front of each for a family that wants it."""
        begins = tokenizer.begins_with_bos(text.documents[0] if text.chats else "a")
        bos = "every document" if begins else "nowhere"
        if self.bos_every_window:
            ids = np.concatenate([np.full((len(ids), 1), tokenizer.bos, np.int32), ids], axis=1)
            bos = "every window"
        return Windows(check_ids(ids, self.vocab_size, flag), source, bos, tokenizer.description)

    def _load_tokens(self, source: str, role: str, flag: str) -> np.ndarray:
        return check_ids(load_tokens(Path(source), role, flag), self.vocab_size, flag)

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


def reader_for(checkpoint: "Checkpoint", model: str, seqlen: int | None, text_column: str | None = None) -> Reader:
    """The reader for an opened model; `model` is what the user called it, the others what the user asked for."""
    limits = (checkpoint.config.vocab_size, checkpoint.config.max_position_embeddings)
    bos = checkpoint.family.bos_every_window
    return Reader(checkpoint.path, *limits, seqlen, default_seqlen(model, limits[1]), bos, text_column)


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
