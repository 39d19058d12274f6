"""DLP against an independent NumPy restatement, and by hand."""

import numpy as np
import pytest

from neuroal_jax.allocation import dlp
from neuroal_jax.checkpoint.opened import open_checkpoint
from tests.search.test_neuroal import TorchOracle, problem_of


def test_dlp_by_hand():
    # Medians 1, 2, 3: densities 0, 0.1, 0.2 around their mean, moved to the mean 0.4.
    found = dlp.allocation(0.6, 0.1, [1.0, 2.0, 3.0], ["q", "k"])
    assert [block["q"] for block in found.blocks] == pytest.approx([0.7, 0.6, 0.5])
    assert all(block["q"] == block["k"] for block in found.blocks)
    assert [block["q"] for block in dlp.allocation(0.95, 0.1, [0.0, 1.0], ["q"]).blocks] == [0.99, pytest.approx(0.85)]


@pytest.mark.parametrize("shapes", [[(3, 5)], [(4, 5), (3, 5)], [(1, 1), (1, 1)]])
def test_medians_equal_numpy(shapes):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(size).astype(np.float32) for size in shapes]
    weights[0][0, 0] = -0.0
    squares = [rng.random((2, size[1])).astype(np.float32) for size in shapes]
    scores = [np.abs(w) * np.sqrt(np.mean(s, axis=0)) for w, s in zip(weights, squares, strict=True)]
    pooled = np.sort(np.concatenate([x.ravel() for x in scores]))
    assert float(dlp.median_score(weights, squares)) == pytest.approx(pooled[(len(pooled) - 1) // 2], rel=1e-6)


def test_medians_of_a_model_equal_numpy(llama, tokens):
    windows = np.load(tokens)["calibration"]
    checkpoint = open_checkpoint(str(llama))
    decision = dlp.allocate(problem_of(checkpoint, windows, 0.6, dlp_lambda=0.1))
    oracle, expected = TorchOracle(llama, windows), []
    hidden = [oracle.model.model.embed_tokens(oracle.torch.from_numpy(w)[None].long()).detach() for w in windows]
    for block in range(checkpoint.num_blocks):
        hidden, norms = oracle.run_block(block, hidden)
        weights = {name: module.weight.detach().numpy() for name, module in oracle.linears(block).items()}
        expected.append(np.median(np.concatenate([(np.abs(weights[name]) * norms[name]).ravel() for name in norms])))
    assert decision.measured["medians"] == pytest.approx(expected, rel=1e-3)
    assert decision.allocation == dlp.allocation(
        0.6, 0.1, decision.measured["medians"], list(checkpoint.linear_shapes())
    )
