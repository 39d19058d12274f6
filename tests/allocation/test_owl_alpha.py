"""OWL and AlphaPruning against independent NumPy restatements, and cases by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from neuroal_jax.allocation import alpha, owl
from neuroal_jax.checkpoint.opened import open_checkpoint
from tests.search.test_neuroal import TorchOracle, problem_of

LINEARS = ["q", "k"]


def values(allocation):
    assert all(block["q"] == block["k"] for block in allocation.blocks)
    return [block["q"] for block in allocation.blocks]


def test_owl_by_hand():
    # Ratios 0, 5, 10 percent: densities 0, 0.1, 0.2 around their mean, moved to the mean 0.4.
    assert values(owl.allocation(0.6, 0.1, [0.0, 5.0, 10.0], LINEARS)) == pytest.approx([0.7, 0.6, 0.5])
    assert values(owl.allocation(0.95, 0.1, [0.0, 10.0], LINEARS)) == pytest.approx([0.99, 0.85])
    assert values(owl.allocation(0.6, 0.1, [3.0, 3.0], LINEARS)) == [0.6, 0.6]


def test_outliers_equal_numpy(llama, tokens):
    windows = np.load(tokens)["calibration"]
    checkpoint = open_checkpoint(str(llama))
    decision = owl.allocate(problem_of(checkpoint, windows, 0.6, owl_m=2.5, owl_lambda=0.1))
    found = decision.measured["outliers"]
    expected = []
    oracle = TorchOracle(llama, windows)
    hidden = [oracle.model.model.embed_tokens(oracle.torch.from_numpy(w)[None].long()).detach() for w in windows]
    for block in range(checkpoint.num_blocks):
        hidden, norms = oracle.run_block(block, hidden)
        weights = {name: module.weight.detach().numpy() for name, module in oracle.linears(block).items()}
        pooled = np.concatenate([(np.abs(weights[name]) * norms[name]).ravel() for name in norms])
        expected.append(100 * (pooled > 2.5 * pooled.mean()).mean())
    assert found == pytest.approx(expected, abs=1e-3)
    assert min(found) > 0
    assert decision.allocation == owl.allocation(0.6, 0.1, found, list(checkpoint.linear_shapes()))


def oracle_exponent(eigenvalues):
    """In float64, candidate by candidate, from the definition."""
    x = np.sort(eigenvalues.astype(np.float64))
    edges = np.linspace(np.log10(x[0]), np.log10(x[-1]), 101)
    edges[-1] = np.inf  # the last bin has its right edge
    counts = [((np.log10(x) >= low) & (np.log10(x) < high)).sum() for low, high in pairwise(edges)]
    peak = 10 ** edges[int(np.argmax(counts))]
    best = (math.inf, math.nan)
    for i in range(len(x) - 1):
        if not np.log10(0.95 * peak) <= x[i] <= 1.5 * peak:
            continue
        tail = x[i:]
        exponent = 1 + len(tail) / np.log(tail / x[i]).sum()
        distance = max(abs(1 - (t / x[i]) ** (1 - exponent) - k / len(tail)) for k, t in enumerate(tail))
        best = min(best, (distance if exponent > 1 else 1.0, exponent), key=lambda pair: pair[0])
    return best[1]


@pytest.mark.parametrize("shape", [(40, 40), (30, 80), (80, 30), (2, 9), (128, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_exponents_equal_numpy(shape, seed):
    weight = np.random.default_rng(seed).standard_t(3, shape).astype(np.float32)
    eigenvalues = alpha.spectrum(weight)
    np.testing.assert_allclose(eigenvalues, np.sort(np.linalg.svd(weight.astype(np.float64))[1] ** 2), rtol=1e-3)
    assert alpha.tail_exponent(eigenvalues) == pytest.approx(oracle_exponent(eigenvalues), rel=1e-4)


def test_the_exponent_of_a_power_law():
    # Quantiles of a density x^-2.5 above 1.
    x = (1 - (np.arange(2000) + 0.5) / 2000) ** (-1 / 1.5)
    assert alpha.tail_exponent(x.astype(np.float32)) == pytest.approx(2.5, abs=0.05)


@pytest.mark.parametrize("eigenvalues", [[3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 5.0], [0.0]])
def test_no_tail_no_exponent(eigenvalues):
    assert math.isnan(alpha.tail_exponent(np.float32(eigenvalues)))


def test_rank_deficient_weights_have_the_exponent_of_their_nonzero_spectrum():
    x = np.float32([0, 0, 1, 2, 4, 4.1, 9])
    assert alpha.tail_exponent(x) == alpha.tail_exponent(x[2:])


def test_alpha_allocation_by_hand():
    # Ratios 0.7, 1.3, 1.0 have the mean 1.
    assert values(alpha.allocation(0.5, 0.3, [2.0, 4.0, 3.0], LINEARS, guard=True)) == pytest.approx([0.35, 0.65, 0.5])
    # Ratios 0.7, 1.3, 1.3: the mean is 1.1.
    scaled = values(alpha.allocation(0.5, 0.3, [2.0, 4.0, 4.0], LINEARS, guard=True))
    assert scaled == pytest.approx([0.35 / 1.1, 0.65 / 1.1, 0.65 / 1.1])
    assert np.mean(scaled) == pytest.approx(0.5)


def test_alpha_allocation_may_exceed_one_only_without_the_guard():
    free = values(alpha.allocation(0.8, 0.3, [2.0, 4.0, 3.0], LINEARS, guard=False))
    assert max(free) == pytest.approx(1.04)
    assert max(values(alpha.allocation(0.8, 0.3, [2.0, 4.0, 3.0], LINEARS, guard=True))) == 0.99


@pytest.mark.parametrize("alphas", [[math.nan, math.nan], [3.0, 3.0], [3.0]])
def test_without_differences_alpha_is_uniform(alphas):
    assert values(alpha.allocation(0.6, 0.3, alphas, LINEARS, guard=True)) == pytest.approx([0.6] * len(alphas))


def test_a_block_without_exponent_gets_the_middle():
    assert values(alpha.allocation(0.5, 0.3, [2.0, math.nan, 4.0], LINEARS, guard=True)) == pytest.approx(
        [0.35, 0.5, 0.65]
    )


def test_block_alphas_are_means_over_the_linears_that_have_one():
    spectra = np.float32([[1, 2, 4, 4.1, 9], [1, 2, 3, 3.1, 9]])
    few, many = (np.diag(np.sqrt(spectrum)) for spectrum in spectra)
    alphas = [alpha.tail_exponent(spectrum) for spectrum in spectra]
    one = np.float32([[3.0]])
    assert alpha.block_alpha({"a": few, "b": many, "c": one}, {}) == pytest.approx(np.mean(alphas), rel=1e-4)
    assert math.isnan(alpha.block_alpha({"a": one}, {}))


def test_alpha_looks_at_every_block_of_the_model(llama, tokens):
    checkpoint = open_checkpoint(str(llama))
    windows = np.load(tokens)["calibration"]
    decision = alpha.allocate(problem_of(checkpoint, windows, 0.6, alpha_epsilon=0.3))
    expected = []
    for block in range(checkpoint.num_blocks):
        weights = checkpoint.read_block(block).linears.values()
        spectra = [np.sort(np.linalg.svd(weight.astype(np.float64))[1] ** 2) for weight in weights]
        expected.append(np.mean([oracle_exponent(spectrum) for spectrum in spectra]))
    assert decision.measured["alphas"] == pytest.approx(expected, rel=1e-3)
    linears = list(checkpoint.linear_shapes())
    assert decision.allocation == alpha.allocation(0.6, 0.3, decision.measured["alphas"], linears, guard=True)
