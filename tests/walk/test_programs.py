"""Programs are kept by what they use, and lower for every kind of device."""

from contextlib import nullcontext

import jax
import pytest

import neuroal_jax
from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.machine.programs import watched_traces
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.refine import REFINEMENTS
from neuroal_jax.walk.method import make_method
from tests.conftest import RUN, untraced

KEPT = [name for name, pruner in PRUNERS.items() if not pruner.updates_weights]
SEARCHES = [name for name, allocation in ALLOCATIONS.items() if allocation.searches]
# Every pruner, allocation and refinement once.
METHODS = [
    *({"pruner": pruner, "allocation": SEARCHES[0]} for pruner in PRUNERS),
    *({"pruner": KEPT[0], "allocation": allocation} for allocation in ALLOCATIONS if allocation != SEARCHES[0]),
    *({"pruner": KEPT[0], "allocation": "uniform", "refine": refinement} for refinement in REFINEMENTS),
]


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**config)).manifest["traces"]


def test_another_pruner_has_its_own_programs_traced_and_no_others(make_llama, tokens, tmp_path):
    model = make_llama(**untraced(97))
    assert run(model, tokens, tmp_path / "first", pruner="wanda", allocation="uniform")["add_statistics"] == 1
    for pruner in ("magnitude", "multiflow"):
        assert run(model, tokens, tmp_path / pruner, pruner=pruner, allocation="uniform") == {"prune": 1}


def test_another_pruner_under_a_search_has_its_own_programs_traced_and_no_others(make_llama, tokens, tmp_path):
    model = make_llama(**untraced(98))
    assert run(model, tokens, tmp_path / "first", pruner="wanda")["dense_runs"] == 1
    own = {"prune_candidates": 1, "prune": 1}
    assert run(model, tokens, tmp_path / "second", pruner="multiflow") == own


def test_programs_of_both_budgets_are_the_same_where_the_released_code_computes_the_same():
    reference = {"budget": "reference"}
    for pruner in ("magnitude", "wanda", "multiflow"):
        assert make_method(pruner, options=reference) == make_method(pruner)
    assert make_method("sparsegpt", options=reference) != make_method("sparsegpt")
    assert make_method("wanda", "dsnot", reference) != make_method("wanda", "dsnot")
    assert make_method("wanda", "dsnot", reference).unrefined == make_method("wanda")


@pytest.fixture(scope="module")
def traces(make_llama, tokens, tmp_path_factory):
    """All programs of runs with every method, each with what it was traced for."""
    model, root = make_llama(**untraced(99)), tmp_path_factory.mktemp("out")
    jax.clear_caches()  # of programs that depend on shapes alone, which other tests have too
    with watched_traces() as traces, pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuroal_jax.run.compute.watched_traces", lambda: nullcontext(traces))
        for number, method in enumerate(METHODS):
            run(model, tokens, root / str(number), **method)
    return traces


def test_the_traces_are_those_of_every_method(traces):
    assert {method[kind] for method in METHODS for kind in method} == {*PRUNERS, *ALLOCATIONS, *REFINEMENTS}
    programs = {"embed", "run", "add_statistics", "observe", "prune", "apply_masks", "add_logits"}
    programs |= {"window_losses", "add_products", "update_weights", "mean"}
    programs |= {"dense_run", "dense_runs", "prune_candidates", "compare", "compare_last", "outlier_share"}
    programs |= {"begin_candidates", "run_candidates", "add_candidates", "finish_candidates", "features"}
    programs |= {"add_dense", "finish_dense", "median_score"}
    assert {trace.name for trace in traces} == programs
    pruned = {trace.arguments[1] for trace in traces if trace.name == "prune"}
    assert {method.pruner for method in pruned} == set(PRUNERS)
    updates = {trace.arguments[0].refinement for trace in traces if trace.name == "update_weights"}
    assert {method.refinement for method in pruned} | updates == {"none", *REFINEMENTS}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_program_lowers_for_accelerators(traces, platform):
    problems = []
    for trace in traces:
        try:
            jax.export.export(trace.compiled, platforms=(platform,))(*trace.arguments)
        except Exception as error:
            problems.append(f"{trace.name}: {' '.join(str(error).split())[:300]}")
    assert problems == []
