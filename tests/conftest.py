"""Shared fixtures: tiny random models made on the spot. Compiled programs are kept from one session to the next."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

# Before anything imports JAX; the processes that tests start inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")  # nothing in the user's own
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import numpy as np
import pytest

from tests import shape_checks

shape_checks.install()
DATA = Path(os.environ.get("NEUROAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
MANY_MODELS = ("test_families.py", "test_goldens.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A room's tests share fixtures and programs: one process runs them. Files of many models are taken apart by model.

    (`--dist loadgroup` does nothing under pytest 9.2, whose `nodeid` pytest-xdist 3.8 cannot set.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoomAndModel(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            model = re.search(r"\[(\w+(-\w+)?)", test)  # two words: stories260k-wanda, tiny-opt, llama
            return f"{file} {model[1]}" if model and file.endswith(MANY_MODELS) else file.rpartition("/")[0]

    return ByRoomAndModel(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Output of tests with paths that are no text: pytest-xdist cannot send it as it is, and ends the process."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


def pytest_collection_modifyitems(items):
    """The rooms that take longest come first, so that no process is left alone with one of them in the end."""
    long = ("walk", "run", "models", "resume")
    items.sort(key=lambda item: item.path.parent.name not in long)


LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# A whole run's options. With one model, one length and one number of candidates, runs share their compiled programs.
RUN = {"sparsity": 0.6, "seqlen": 16, "block_lambdas": "0.05,0.2", "row_lambdas": "0.0,0.1,0.2"}


def save_random_model(
    directory: Path, *, family: str = "llama", dtype: str = "float32", seed: int = 0, shard: str = "5GB", **options
) -> Path:
    """Saves a random model of transformers, with norms and biases that are not all ones and zeros.

    `family` is a `model_type`: transformers knows the classes that belong to it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**LLAMA, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard)
    saved = json.loads((directory / "config.json").read_text())
    unused = [key for key in ("intermediate_size", "num_key_value_heads") if key not in type(config)().to_dict()]
    kept = {key: value for key, value in saved.items() if key not in unused}  # of LLAMA's, what the family ignores
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def save_random_weights(directory: Path, config: dict, *, seed: int = 0) -> None:
    """Saves the random model that transformers makes of a config.json, beside that very file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))


def untraced(number: int) -> dict[str, int]:
    """Options of a random model whose programs no other test of this `number` (96 or more) has this process trace.

    They are traced anew for another config, and compiled anew where the vocabulary counts; what is left of them is what
    the other random models' blocks compile to, which the cache has.
    """
    return {"vocab_size": number, "max_position_embeddings": number}


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """One process compiles those of hundreds of tests."""
    from neuroal_jax.machine import compilation

    compilation.make_room()


@pytest.fixture
def default_signals():
    """Signals that do what they usually do: `nohup` and shells make jobs in the background ignore some of them."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
    """A factory of random models: `make_llama(num_key_value_heads=1)`, `make_llama(family="phi")`."""
    return lambda **options: save_random_model(tmp_path_factory.mktemp("model"), **options)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real models, tokens and goldens; tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no {DATA}: set NEUROAL_DATA to the folder of real models and goldens")
    return DATA


@pytest.fixture(scope="module")
def browser():
    """Chromium, which tests skip where it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: install it to test pages in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
