"""Several runs in one process at a time: the bytes of one after the other, and each knows its own programs only."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

import neuroal_jax
from tests.conftest import RUN

SEARCH = {"pruner": "multiflow", "step": "block"}
UNIFORM = {"pruner": "wanda", "allocation": "uniform", "eval": "none"}
# By pair: the two runs' options, and whether they prune the same model.
PAIRS = {
    "the same run twice": (UNIFORM, UNIFORM, True),
    "two pruners": (UNIFORM, {**UNIFORM, "pruner": "sparsegpt", "sparsegpt_group": 24}, True),
    "two pruners, two models": (UNIFORM, SEARCH, False),
}
# What a run traces that is alone with a new model.
TRACES = {
    "wanda": {"add_statistics": 1, "prune": 1, "run": 1},
    "sparsegpt": {"add_statistics": 1, "prune": 1, "run": 1},
    "multiflow": {
        **{"run": 2, "add_logits": 1, "dense_run": 1, "dense_runs": 1, "compare": 1, "compare_last": 1},
        **{"prune_candidates": 1, "add_statistics": 1, "prune": 1, "apply_masks": 1},
    },
}
ANY_MODEL = {"embed", "window_losses"}  # depend on shapes alone: an earlier run's may serve


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**config))


def files(out):
    names = ("masks.safetensors", "allocation.json", "model/model.safetensors")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


@pytest.mark.parametrize("pair", PAIRS)
def test_runs_at_a_time_give_the_bytes_of_one_after_the_other(make_llama, tokens, tmp_path, pair):
    *runs, same = PAIRS[pair]
    # Programs are kept by shape: these models have some that no other test has.
    sizes = [201 + 10 * list(PAIRS).index(pair) + number for number in range(2)]
    models = [make_llama(num_hidden_layers=2, vocab_size=size, intermediate_size=size) for size in sizes]
    models = models[:1] * 2 if same else models
    together = Barrier(3)

    def start(number, **options):
        together.wait()
        return run(models[number], tokens, tmp_path / f"at-a-time{number}", **runs[number], **options)

    with ThreadPoolExecutor(3) as threads:
        started = [threads.submit(start, number) for number in range(2)]
        dry = threads.submit(start, 1, dry_run=True)
        results = [future.result() for future in started]
    for number, (options, result) in enumerate(zip(runs, results, strict=True)):
        run(models[number], tokens, tmp_path / f"alone{number}", **options)
        expected = files(tmp_path / f"alone{number}")
        assert files(tmp_path / f"at-a-time{number}") == expected
        assert len(expected) == 2 + (options["pruner"] == "sparsegpt")
        own = TRACES[options["pruner"]]
        traces = {name: count for name, count in result.manifest["traces"].items() if name not in ANY_MODEL}
        assert set(traces) <= set(own)
        assert same or traces == own
    assert dry.result().out is None
    assert dry.result().manifest == {}
    assert dry.result().plan.linears == results[1].plan.linears
