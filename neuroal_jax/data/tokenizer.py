"""A model's tokenizer, as a function from text to ids."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuroal_jax.checkpoint import hugging_face
from neuroal_jax.data.reading import Chat
from neuroal_jax.errors import UserError
from neuroal_jax.machine.memory import is_exhausted, refuse_what_cannot_fit

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_ENCODING_BYTES = 32  # that a tokenizer takes for each character, at least
# Some chat templates write today's date: this one, so that the same chats give the same tokens tomorrow.
_SAME_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer as a function.

    Attributes:
        encode: From text to ids, int32 `[n]`.
        bos: Its BOS id, if it has one.
        description: Its class, and the SHA-256 of its files.
        render: From a document to the text that is encoded; a chat template for conversations.
    """

    encode: Callable[[str], np.ndarray]
    bos: int | None
    description: dict[str, str]
    render: Callable[[Any], str] = str

    def read(self, document: str | Chat) -> np.ndarray:
        """The ids of a document."""
        return self.encode(self.render(document))

    def begins_with_bos(self, document: str | Chat = "a") -> bool:
        """Whether a BOS is put in front."""
        return self.bos is not None and list(self.read(document)[:1]) == [self.bos]


def load_tokenizer(model: Path, *, without_bos: bool) -> Tokenizer:
    """The tokenizer in a model's directory, with the special tokens that it adds, BOS only unless `without_bos`.

    Raises:
        UserError: If it cannot be loaded, or has no BOS to leave out; from `encode`, if it cannot read a text.
    """
    loaded = _load(model)
    description = {"class": type(loaded).__name__, "sha256": _tokenizer_sha256(model)}
    tokenizer = Tokenizer(partial(_encode, loaded, model), loaded.bos_token_id, description)
    return _without_bos(tokenizer, model) if without_bos else tokenizer


def load_chat_tokenizer(model: Path, *, without_bos: bool) -> Tokenizer:
    """The tokenizer for conversations: its chat template writes all special tokens, BOS only unless `without_bos`.

    The template runs in transformers' sandbox, whose code can compute but reach nothing.

    Raises:
        UserError: As `load_tokenizer`, and if it has no chat template; from `render`, if that takes no such
            conversation.
    """
    loaded = _load(model)
    try:
        template = loaded.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"the tokenizer in {model} has no chat template, without which messages are no text: name a column of "
            "text with --text-column, or take the tokenizer of a chat model"
        ) from error
    description = {
        "class": type(loaded).__name__,
        "sha256": _tokenizer_sha256(model),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }
    encode = partial(_encode, loaded, model, add_special_tokens=False)
    if "strftime_now" in template:
        template = _SAME_DATE + template
    tokenizer = Tokenizer(encode, loaded.bos_token_id, description, partial(_render, loaded, model, template))
    return _without_bos(tokenizer, model) if without_bos else tokenizer


def _render(loaded: Any, model: Path, template: str, chat: Chat) -> str:
    try:
        rendered = loaded.apply_chat_template(list(chat.messages), chat_template=template, tokenize=False)
        rendered.encode()
        return str(rendered)
    except Exception as error:  # whatever the template's author had in mind
        if is_exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{chat.place} does not fit the chat template in {model} ({reason})") from error


def _load(model: Path) -> Any:
    from transformers.utils import logging

    logging.set_verbosity_error()  # a long text is cut into windows: its length is no reason to warn
    try:
        return hugging_face.load_tokenizer(model)
    except (UserError, ValueError) as error:
        raise UserError(
            f"the tokenizer in {model} cannot be loaded ({str(error)[:200]}): pass token ids (.npy) instead"
        ) from error


def _without_bos(tokenizer: Tokenizer, model: Path) -> Tokenizer:
    """The tokenizer without the BOS in front."""
    if tokenizer.bos is None:
        raise UserError(f"the tokenizer in {model} has no BOS token, which this family needs in front of every window")

    def encode(text: str) -> np.ndarray:
        ids = tokenizer.encode(text)
        return ids[1:] if list(ids[:1]) == [tokenizer.bos] else ids

    return replace(tokenizer, encode=encode)


def _tokenizer_sha256(model: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for name in _TOKENIZER_FILES for path in model.glob(name) if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _encode(tokenizer: Any, model: Path, text: str, **options: Any) -> np.ndarray:
    if len(text) > 2**20:  # where tokenizers gets no memory, it ends the process
        refuse_what_cannot_fit(_ENCODING_BYTES * len(text), "give a shorter text")
    try:
        return np.array(tokenizer(text, **options)["input_ids"], dtype=np.int32)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises several kinds for inconsistent files, and panics, which is none
        if is_exhausted(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the tokenizer in {model} cannot read this text ({reason}): pass token ids (.npy) instead"
        ) from error
