"""Token ids: files of them, their vocabulary, and how windows are drawn or cut. Knows no text and no tokenizer."""

import hashlib
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import allowed_size, open_plain
from neuroal_jax.machine.memory import refuse_what_cannot_fit

_HOPELESS = 20_000  # documents tried without finding a single one that is long enough


def is_token_file(source: str) -> bool:
    """Whether a source is NumPy's, by its name."""
    return source.lower().endswith((".npy", ".npz"))


def token_hash(ids: np.ndarray) -> str:
    """SHA-256 of token ids and their shape."""
    digest = hashlib.sha256(f"{list(ids.shape)}\0".encode())
    digest.update(np.ascontiguousarray(ids, dtype="<i4").data)
    return digest.hexdigest()


def load_tokens(path: Path, role: str, flag: str) -> np.ndarray:
    """Token ids of a file, 1-D or 2-D; of several arrays in an .npz, the one named after its role.

    Raises:
        UserError: If the file holds anything else, or nothing. The message begins with `flag`.
    """
    try:
        with open_plain(path) as file:  # NumPy leaves a file open that it opened itself and found damaged
            _check_directory(file, allowed_size(path))
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                ids = loaded
                if file.read(1):  # `np.save` into one file again and again
                    raise UserError(f"{flag}: more than one array, or damaged: bytes follow the first one")
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


def _check_directory(file: BinaryIO, allowed: int) -> None:
    """Raises ValueError if an .npz file's directory, beyond which nothing is read, is ambiguous or holds too much."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
            names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"two members are called {double!r}")
        if size > allowed:
            raise ValueError(f"{size} bytes in a file that may hold {allowed}")
    file.seek(0)


def check_ids(ids: np.ndarray, vocab_size: int, flag: str) -> np.ndarray:
    """The ids as int32; raises UserError if one is not of the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise UserError(
            f"{flag}: token id {bad} is outside of the model's vocabulary of {vocab_size}: "
            "the ids are of another tokenizer"
        )
    return ids.astype(np.int32)


def sample(
    documents: Sequence[Callable[[], np.ndarray]], samples: int, seqlen: int, seed: int, flag: str, *, joined: bool
) -> np.ndarray:
    """Draws windows: with Python's `random.seed(seed)`, a document and then a start in it, for each.

    Args:
        documents: Give the ids of each; called at most once, and only when the document is drawn.
        samples: How many windows.
        seqlen: Tokens per window; a document needs more.
        seed: Of the draws.
        flag: What messages begin with.
        joined: Whether `documents` is a single long text, of which only starts are drawn.

    Returns:
        int32 `[samples, seqlen]`.

    Raises:
        UserError: If no document is long enough.
    """
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


def cut(ids: np.ndarray, seqlen: int, flag: str) -> np.ndarray:
    """Windows `[n, seqlen]` that do not overlap, without the tail; raises UserError if there is none."""
    count = len(ids) // seqlen
    if count == 0:
        raise UserError(f"{flag}: has {len(ids)} tokens, fewer than one window of {seqlen}: lower --seqlen")
    return ids[: count * seqlen].reshape(count, seqlen)
