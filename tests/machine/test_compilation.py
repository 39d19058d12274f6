"""The cache of compiled programs: where it is, that it is used, that a run does without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.machine import compilation
from neuroal_jax.run import pipeline
from neuroal_jax.run.settle import settle

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


def maps():
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux bounds the memory maps of a process")
@pytest.mark.parametrize(("limit", "forgets"), [(2, True), (2**31, False)])
def test_a_run_forgets_programs_before_the_system_has_no_room_for_more(
    llama, tokens, tmp_path, monkeypatch, limit, forgets
):
    (tmp_path / "limit").write_text(f"{limit}\n")
    monkeypatch.setattr(compilation, "_MAPS", (Path("/proc/self/maps"), tmp_path / "limit"))
    before = maps()
    programs = [jax.jit(lambda x, number=number: jnp.sort(x) * number) for number in range(30)]
    for of_number in programs:
        of_number(np.arange(3.0))
    assert maps() > before + 30  # each takes some
    filled, traced = maps(), []
    config = neuroal_jax.PruneConfig(
        model=str(llama), sparsity=0.5, pruner="magnitude", allocation="uniform", calib=str(tokens), eval="none",
        out=str(tmp_path / "out"),
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "settle", lambda config: traced.append(maps()) or settle(config))
    neuroal_jax.prune(config)
    assert (traced[0] < filled - 30) == forgets


def test_without_such_a_bound_nothing_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "_MAPS", (tmp_path / "none", tmp_path / "none"))
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("it was"))
    compilation.make_room()
