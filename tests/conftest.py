"""Shared fixtures: tiny random models made on the spot, and the optional folder of real models and goldens."""

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="neuroal-tests-")  # nothing in the user's own
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests of the cache turn it on

import numpy as np
import pytest

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
DATA = Path(os.environ.get("NEUROAL_DATA", Path(__file__).parents[2] / "shared" / "data"))

_MOST_MAPS = 20000


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Forgets compiled programs now and then: each takes memory maps, of which Linux gives a process some 65000."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        sys.modules["jax"].clear_caches()


LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_random_model(
    directory: Path, *, family: str = "Llama", dtype: str = "float32", seed: int = 0, shard: str = "5GB", **options
) -> Path:
    """Saves a random model of transformers, with norms and biases that are not all ones and zeros."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**LLAMA, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    saved = json.loads((directory / "config.json").read_text())
    unused = [key for key in ("intermediate_size", "num_key_value_heads") if key not in type(config)().to_dict()]
    kept = {key: value for key, value in saved.items() if key not in unused}  # of LLAMA's, what the family ignores
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A random grouped-query Llama in fp32."""
    return save_random_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Token ids for the random Llama: `calibration` [6, 16] and `evaluation` [5, 16]."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    rng = np.random.default_rng(0)
    np.savez(path, calibration=rng.integers(0, 96, (6, 16)), evaluation=rng.integers(0, 96, (5, 16)))
    return path


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory) -> Callable[..., Path]:
    """A factory of random models: `make_llama(num_key_value_heads=1)`, `make_llama(family="Phi")`."""
    return lambda **options: save_random_model(tmp_path_factory.mktemp("model"), **options)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models, tokens and goldens; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set NEUROAL_DATA to the folder of real models and goldens")
    return DATA
