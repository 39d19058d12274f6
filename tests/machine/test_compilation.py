"""The cache of compiled programs: where it is, that it is used, that a run does without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(llama, tokens, out, cache, pruner="magnitude", **environment):
    arguments = ["--model", llama, "--sparsity", "0.5", "--pruner", pruner, "--allocation", "uniform"]
    arguments += ["--calib", tokens, "--eval", "none", "--out", out]
    arguments += [] if cache is None else ["--compilation-cache", cache]
    program = (
        "import sys, jax, jax.monitoring as m\nhits = []\n"
        "m.register_event_listener(lambda name, **_: hits.append(name) if name.endswith('cache_hits') else None)\n"
        "from neuroal_jax.prune import main\ncode = main()\nprint('hits', len(hits))\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | environment,
    )  # fmt: skip
    assert "Warning" not in done.stderr
    return int(done.stdout.split("hits ")[1])


def test_a_second_run_finds_the_programs_of_the_first(llama, tokens, tmp_path):
    cache = tmp_path / "cache"
    assert run(llama, tokens, tmp_path / "a", cache, "wanda") == 0
    assert len(list(cache.iterdir())) > 1
    assert run(llama, tokens, tmp_path / "b", cache, "wanda") > 1
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    assert first["traces"] == second["traces"]
    assert (tmp_path / "a/masks.safetensors").read_bytes() == (tmp_path / "b/masks.safetensors").read_bytes()


def test_by_default_it_is_in_the_users_cache_directory(llama, tokens, tmp_path):
    run(llama, tokens, tmp_path / "a", None, XDG_CACHE_HOME=str(tmp_path / "home"))
    assert list((tmp_path / "home/neuroal-jax/compiled").iterdir())


def test_a_cache_that_jax_was_told_to_use_stays(llama, tokens, tmp_path):
    run(
        llama,
        tokens,
        tmp_path / "a",
        None,
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert not (tmp_path / "neuroal-jax").exists()


@pytest.mark.parametrize("cache", ["none", "/proc/no/such"])
def test_a_run_does_without_it(llama, tokens, tmp_path, cache):
    assert run(llama, tokens, tmp_path / "a", cache, XDG_CACHE_HOME=str(tmp_path / "home")) == 0
    assert not (tmp_path / "home").exists()
