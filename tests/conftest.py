"""Shared fixtures: tiny random models made on the spot, and the optional folder of real models and goldens."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest

DATA = Path(os.environ.get("NEUROAL_DATA", Path(__file__).parents[2] / "shared" / "data"))

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_random_llama(directory: Path, *, dtype: str = "float32", seed: int = 0, shard: str = "5GB", **options) -> Path:
    """Saves a random Llama of transformers, with norms and biases that are not all ones and zeros."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A random grouped-query Llama in fp32."""
    return save_random_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """Token ids for the random Llama: `calibration` [6, 16] and `evaluation` [5, 16]."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    rng = np.random.default_rng(0)
    np.savez(path, calibration=rng.integers(0, 96, (6, 16)), evaluation=rng.integers(0, 96, (5, 16)))
    return path


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory) -> Callable[..., Path]:
    """A factory of random Llamas: `make_llama(num_key_value_heads=1)`."""
    return lambda **options: save_random_llama(tmp_path_factory.mktemp("model"), **options)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models, tokens and goldens; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set NEUROAL_DATA to the folder of real models and goldens")
    return DATA
