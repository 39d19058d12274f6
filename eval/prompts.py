"""What generation starts from: token ids of a text, or random ones."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuroal_jax.checkpoint.hugging_face import load_config, load_tokenizer
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import read_bounded

TEXT = "The quick brown fox jumps over the lazy dog, and the river carries its reflection down to the sea. After that,"
_MOST_BYTES = 2**20  # of a prompt
_SEED = 0


@dataclass(frozen=True)
class Prompt:
    """Token ids to start from, and where they come from, in words."""

    ids: tuple[int, ...]
    origin: str

    @property
    def sha256(self) -> str:
        """Of the token ids."""
        return hashlib.sha256(" ".join(map(str, self.ids)).encode()).hexdigest()


def make_prompt(
    path: Path, name: str, new_tokens: int, *, text: str | None, file: Path | None, tokens: int | None
) -> Prompt:
    """The prompt for a model, which leaves room for the new tokens.

    Args:
        path: Directory of the checkpoint with its tokenizer.
        name: What the user calls it.
        new_tokens: How many will follow.
        text: Of `--prompt`.
        file: Of `--prompt-file`.
        tokens: Of `--prompt-tokens`, how many random ones. Of these three, one at most; none: `TEXT`.

    Raises:
        UserError: If there is no such prompt, no tokenizer, or not enough room.
    """
    given = {"--prompt": text, "--prompt-file": file, "--prompt-tokens": tokens}
    several = [flag for flag, value in given.items() if value is not None]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)} both name the prompt: pass one of them")
    flag = several[0] if several else "the default prompt"
    try:
        config = load_config(path)
    except ValueError as error:
        raise UserError(f"transformers cannot read the config of {name} ({str(error)[:200]})") from error
    text_config = config.get_text_config()
    vocabulary, context = (getattr(text_config, key, None) for key in ("vocab_size", "max_position_embeddings"))
    if not isinstance(vocabulary, int):
        raise UserError(f"the config of {name} has no vocab_size: expected a causal language model of text")
    if tokens is not None:
        ids = _random(tokens, vocabulary)
    elif file is not None:
        ids = _tokenized(path, name, _read(file))
    else:
        ids = _tokenized(path, name, TEXT if text is None else text)
    if not ids:
        raise UserError(f"{flag} holds no tokens")
    if max(ids) >= vocabulary:
        raise UserError(f"the tokenizer of {name} gives token {max(ids)}, beyond its vocabulary of {vocabulary}")
    if context is not None and len(ids) + new_tokens > context:
        raise UserError(
            f"{flag} has {len(ids)} tokens, and --new-tokens {new_tokens} follow: more than the context of {name}, "
            f"which is {context}"
        )
    return Prompt(ids, flag.removeprefix("--"))


def _read(file: Path) -> str:
    try:
        return read_bounded(file, _MOST_BYTES).decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt-file {file} cannot be read ({error})") from error


def _tokenized(path: Path, name: str, text: str) -> tuple[int, ...]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is no text in UTF-8 ({error.reason})") from error
    try:
        tokenizer: Any = load_tokenizer(path)
        return tuple(tokenizer(text)["input_ids"])
    except ValueError as error:
        raise UserError(
            f"{name} has no tokenizer that transformers can load ({str(error)[:200]}): pass --prompt-tokens N "
            "for random ones"
        ) from error


def _random(count: int, vocabulary: int) -> tuple[int, ...]:
    draw = random.Random(_SEED)
    return tuple(draw.randrange(vocabulary) for _ in range(count))
