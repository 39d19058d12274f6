"""The correlations of objectives with perplexity."""

import numpy as np
import pytest

from benchmarks import objectives
from neuroal_jax.search.objective import OBJECTIVES


def test_ranks_by_hand():
    assert objectives.spearman([1, 2, 3, 4], [10, 20, 30, 1000]) == pytest.approx(1)
    assert objectives.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert objectives.spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_a_table_of_every_objective(make_llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(objectives, "_SEARCH_TOKENS", 32)
    monkeypatch.setattr(objectives, "_EVALUATION_TOKENS", 32)
    """Magnitude needs no calibration: what a search sees is what is pruned in the end."""
    ids = np.random.default_rng(0).integers(0, 96, (4, 16))
    np.save(tmp_path / "ids.npy", ids)
    given = {"model": make_llama(num_hidden_layers=2), "calib": tmp_path / "ids.npy", "eval": tmp_path / "ids.npy"}
    arguments = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    arguments += ["--seqlen", "16", "--sparsities", "0.6", "--random", "1", "--pruner", "magnitude"]
    assert objectives.main(arguments) == 0
    head, _, row, _, conditions = capsys.readouterr().out.strip().splitlines()
    assert [cell.strip() for cell in head.split("|")][2:-2] == list(OBJECTIVES)
    found = [float(cell) for cell in row.split("|")[2:-2]]
    assert all(-1 <= x <= 1 for x in found)
    assert found[2] == 1  # the loss of the search set, which is also the evaluation's
    assert "10 allocations, 2 x 16 tokens to search" in conditions
