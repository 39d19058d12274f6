"""What transformers gets to see of a checkpoint, and to load from it: no code, nothing that names code. Without JAX.

Of config.json, transformers takes more than a model's sizes: `attn_implementation` names a repository whose kernels it
downloads and runs. It also picks up adapters and code that lie beside the weights, and waits for a FIFO for ever.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from neuroal_jax.checkpoint.listing import refuse_packed
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import read_json
from neuroal_jax.machine.memory import is_exhausted

T = TypeVar("T")

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
_MOST_BYTES = 2**28  # of a config; tokenizer_config.json lists all added tokens
# Keys by which a config makes transformers import, download or choose code, at any depth.
_FOREIGN = frozenset(
    """auto_map custom_generate custom_pipelines use_kernels kernel_config
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    experts_implementation _experts_implementation _experts_implementation_internal""".split()
)
_NEVER_SEEN = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf")
_SAFE = {"local_files_only": True, "trust_remote_code": False}


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a directory, as `AutoTokenizer` loads it.

    Raises:
        ValueError: If transformers cannot load it; the message says why.
        UserError: If a config is no valid JSON, or names a class that is no tokenizer.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missing: it is not needed here
    from transformers import AutoTokenizer

    return _loaded(path, lambda seen: AutoTokenizer.from_pretrained(seen, **_SAFE))


def load_config(path: Path) -> Any:
    """The config in a directory, as `AutoConfig` loads it; errors as `load_tokenizer`."""
    from transformers import AutoConfig

    return _loaded(path, lambda seen: AutoConfig.from_pretrained(seen, **_SAFE))


def load_torch_model(path: Path, **options: Any) -> Any:
    """The causal language model in a directory, as `AutoModelForCausalLM` loads it, from safetensors only.

    Raises:
        ValueError: If transformers cannot load it; the message says why.
        UserError: If config.json is no valid JSON, or the model is quantized or packed.
    """
    refuse_packed([file.name for file in path.iterdir()], str(path))
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    from transformers import AutoModelForCausalLM

    return _loaded(
        path, lambda seen: AutoModelForCausalLM.from_pretrained(seen, use_safetensors=True, **_SAFE, **options)
    )


def _loaded(path: Path, load: Callable[[Path], T]) -> T:
    with _seen(path) as seen:
        try:
            return load(seen)
        except Exception as error:  # transformers and PyTorch raise many kinds
            if is_exhausted(error):
                raise
            raise ValueError(" ".join(str(error).split()).replace(str(seen), str(path))) from error


@contextmanager
def _seen(path: Path) -> Iterator[Path]:
    """A directory of links to a checkpoint's plain files, with a config.json that names no code."""
    with tempfile.TemporaryDirectory(prefix="neuroal-") as place:
        # By the model's name, which tells transformers some; its parsers take no bytes that are no text.
        seen = Path(place) / path.absolute().name.encode(errors="replace").decode()
        seen.mkdir()
        for file in path.iterdir():
            hidden = file.name in (_CONFIG, _TOKENIZER_CONFIG) or file.name.startswith("adapter_")
            if file.is_file() and not hidden and file.suffix not in _NEVER_SEEN:
                (seen / file.name).symlink_to(file.absolute())
        for name in (_CONFIG, _TOKENIZER_CONFIG):
            if os.path.lexists(path / name):
                (seen / name).write_text(json.dumps(_config(path / name)), encoding="utf-8")
        yield seen


def _config(file: Path) -> dict[str, Any]:
    """A config without what names code."""
    try:
        config = read_json(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected an object")
    if config.get("quantization_config"):
        raise UserError(f"{file}: the model is quantized ('quantization_config'), expected one in floating point")
    _check_tokenizer_class(file, config.get("tokenizer_class"))
    # The code of a tokenizer is refused by transformers: there is no other that would give the same tokens.
    return _without_foreign(config) if file.name == _CONFIG else config


def _without_foreign(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_foreign(item) for key, item in value.items() if key not in _FOREIGN}
    return [_without_foreign(item) for item in value] if isinstance(value, list) else value


def _check_tokenizer_class(file: Path, name: Any) -> None:
    """Raises UserError for a name by which transformers would load something else: it takes any class that it has."""
    if name is None:
        return
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    found = tokenizer_class_from_name(name) if isinstance(name, str) else object
    if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise UserError(f"{file}: 'tokenizer_class' is {name!r}, which is no tokenizer of transformers")
