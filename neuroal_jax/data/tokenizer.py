"""A model's tokenizer, as a function from text to ids."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.checkpoint import hugging_face
from neuroal_jax.errors import UserError
from neuroal_jax.machine.memory import is_exhausted, refuse_what_cannot_fit

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_ENCODING_BYTES = 32  # that a tokenizer takes for each character, at least


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a function.

    Attributes:
        encode: From text to ids, int32 `[n]`.
        bos: Its BOS id, if it has one.
        description: Its class, and the SHA-256 of its files.
    """

    encode: Callable[[str], np.ndarray]
    bos: int | None
    description: dict[str, str]

    def begins_with_bos(self) -> bool:
        """Whether `encode` puts a BOS in front."""
        return self.bos is not None and list(self.encode("a")[:1]) == [self.bos]


def load_tokenizer(model: Path, *, without_bos: bool) -> Tokenizer:
    """The tokenizer in a model's directory, with the special tokens that it adds, BOS only unless `without_bos`.

    Raises:
        UserError: If it cannot be loaded, or has no BOS to leave out; from `encode`, if it cannot read a text.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # a long text is cut into windows: its length is no reason to warn
    try:
        tokenizer = hugging_face.load_tokenizer(model)
    except (UserError, ValueError) as error:
        raise UserError(
            f"the tokenizer in {model} cannot be loaded ({str(error)[:200]}): pass token ids (.npy) instead"
        ) from error
    bos = tokenizer.bos_token_id
    encode = partial(_encode, tokenizer, model)
    description = {"class": type(tokenizer).__name__, "sha256": _tokenizer_sha256(model)}
    if not without_bos:
        return Tokenizer(encode, bos, description)
    if bos is None:
        raise UserError(f"the tokenizer in {model} has no BOS token, which this family needs in front of every window")

    def encode_without(text: str) -> np.ndarray:
        ids = encode(text)
        return ids[1:] if list(ids[:1]) == [bos] else ids

    return Tokenizer(encode_without, bos, description)


def _tokenizer_sha256(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in _TOKENIZER_FILES for path in model.glob(name) if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _encode(tokenizer: Any, model: Path, text: str) -> np.ndarray:
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
