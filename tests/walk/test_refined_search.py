"""Candidates that are refined before they are scored: as the final model would be, on other sequences."""

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.allocation import uniform
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.masks.budget import Budget
from neuroal_jax.numerics import loss
from neuroal_jax.search import block_step
from neuroal_jax.walk import final, refined_search
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from neuroal_jax.walk.perplexity import perplexity, work
from neuroal_jax.walk.search import score_by_head
from tests.conftest import RUN

IN_THE_LOOP = {"allocation": "shape", "refine": "refit", "search_refine": True, "search_samples": 2, "nsamples": 6}


@pytest.mark.parametrize("pruner", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_a_candidate_is_scored_as_the_final_model_that_it_would_become(llama, pruner):
    checkpoint = open_checkpoint(str(llama))
    options = {"budget": "exact", "sparsegpt_group": 24, "refit_iterations": 5, "refit_search_iterations": 2}
    method = make_method(pruner, "refit", options)
    assert method.of_candidates.refinement_settings["refit_iterations"] == 2
    budget = Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, 0.6, "exact", method.pattern)
    linears, ids = list(budget.shapes), np.random.default_rng(1).integers(3, 96, (5, 16))
    candidates = [
        uniform.allocation(0.6, linears, budget.num_blocks),
        block_step.candidate(0.6, 0.2, linears, budget.num_blocks),
    ]
    counts, fitted, windows = [budget.counts(each) for each in candidates], ids[:3], ids[3:]
    blocks, told = Blocks(checkpoint, "float32", 2), []
    found = refined_search.score(blocks, method, loss, None, fitted, windows, counts, told.append).of_sequences
    expected = []
    for of_candidate in counts:
        results = final.prune(Blocks(checkpoint, "float32", 2), method.of_candidates, fitted, of_candidate)
        expected.append([np.log(perplexity(blocks, windows[i : i + 1], results)) for i in range(2)])
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert sum(told) == 2 * work(checkpoint)
    unrefined = score_by_head(blocks, method, loss, None, windows, counts, 2).of_sequences
    assert np.abs(found - unrefined).min() > 1e-4


def test_a_run_refines_every_candidate_of_every_stage(llama, tokens, tmp_path, monkeypatch):
    fitted, prune_block = [], final.prune_block

    def counting(blocks, method, block, weights, hidden, of_dense, sequences, quotas):
        fitted.append(sequences)
        return prune_block(blocks, method, block, weights, hidden, of_dense, sequences, quotas)

    monkeypatch.setattr(refined_search, "prune_block", counting)
    few = {"shape_ramps": "none", "shape_depth": 1, "shape_etas": "1", "shape_row_lambdas": "0.1"}
    config = {**RUN, "model": str(llama), "calib": str(tokens), "eval": "none", "out": str(tmp_path / "out"), **few}
    result = neuroal_jax.prune(neuroal_jax.PruneConfig(**config, **IN_THE_LOOP))
    candidates = sum(len(found) for found in result.manifest["candidates"].values())
    assert candidates == 4 + 8 + 1 + 1
    assert len(fitted) == candidates * 3 and set(fitted) == {4}
    assert result.manifest["sparsity"]["zeros"] == round(0.6 * result.manifest["sparsity"]["prunable"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": "none"}, "--search-refine has no effect without --refine refit and --allocation neuroal or shape"),
        ({"allocation": "owl"}, "--search-refine has no effect without"),
        ({"allocation": "neuroal"}, "--search-refine does not go with --objective alignment, .*use --objective kl"),
        ({"search_samples": 6}, "--nsamples is 6, expected more than --search-samples 6"),
        ({"search_refine": "yes"}, "--search-refine is 'yes'"),
        ({"search_refine": False, "refit_search_iterations": 2}, "has no effect without --search-refine"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(neuroal_jax.UserError, match=message):
        neuroal_jax.PruneConfig(model="demo", sparsity=0.5, out="out", **{**IN_THE_LOOP, **options})


def test_a_file_with_too_few_sequences_is_refused(llama, tokens, tmp_path):
    config = {**RUN, "model": str(llama), "calib": str(tokens), "eval": "none", "out": str(tmp_path / "out")}
    with pytest.raises(neuroal_jax.UserError, match=r"--search-refine fits .* --calib has 6 in all: give more, or a"):
        neuroal_jax.prune(neuroal_jax.PruneConfig(**config, **{**IN_THE_LOOP, "search_samples": 6, "nsamples": 9}))
    assert not (tmp_path / "out").exists()
