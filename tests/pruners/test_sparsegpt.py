"""SparseGPT against an independent NumPy restatement in float64, and cases by hand."""

import jax
import numpy as np
import pytest

from neuroal_jax.masks.patterns import PATTERNS, make_pattern
from neuroal_jax.numerics.cholesky import DAMPING, factorise
from neuroal_jax.numerics.selection import TIES_ALL, Quota
from neuroal_jax.numerics.statistics import STATISTICS, measure
from neuroal_jax.pruners import PRUNERS, sparsegpt


def hessian(inputs):
    return measure(inputs, ["hessian"])["hessian"]


def settings_of(group):
    return PRUNERS.settings("sparsegpt", {"sparsegpt_group": group})


def prune(weight, factor, quota, group):
    return sparsegpt.prune(weight, factor, quota, make_pattern("columns", group), settings_of(group))


def oracle_hessian(inputs):
    tokens = inputs.reshape(-1, inputs.shape[2]).astype(np.float64)
    return 2 / len(inputs) * tokens.T @ tokens


def oracle_factor(hessian, damping=0.01):
    """The upper Cholesky factor of the damped Hessian's inverse, the long way, and the dead columns."""
    h = hessian.copy()
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    h += damping * np.diag(h).mean() * np.eye(len(h))
    return np.linalg.cholesky(np.linalg.inv(h)).T, dead


def oracle(weight, hessian, group, choose):
    """`choose(saliency, group number)` gives a group's pruned weights."""
    upper, dead = oracle_factor(hessian)
    w = weight.astype(np.float64)
    mask = np.ones(w.shape, bool)
    for number, start in enumerate(range(0, w.shape[1], group)):
        columns = range(start, min(start + group, w.shape[1]))
        saliency = np.stack([np.zeros(len(w)) if dead[j] else w[:, j] ** 2 / upper[j, j] ** 2 for j in columns], axis=1)
        pruned = choose(saliency, number)
        for place, j in enumerate(columns):
            old = w[:, j].copy()
            w[pruned[:, place], j] = 0
            mask[:, j] = ~pruned[:, place]
            w[:, j + 1 :] -= np.outer((old - w[:, j]) / upper[j, j], upper[j, j + 1 :])
    return w, mask


def exactly(counts):
    def choose(saliency, number):
        pruned = np.zeros(saliency.size, bool)
        pruned[np.argsort(saliency.ravel(), kind="stable")[: counts[number]]] = True
        return pruned.reshape(saliency.shape)

    return choose


def up_to_threshold(sparsity):
    def choose(saliency, number):
        return saliency <= np.sort(saliency.ravel())[int(saliency.size * sparsity)]

    return choose


def problem(out, width, seed=0, sequences=6, tokens=40):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width) + np.eye(width)
    weight = rng.normal(size=(out, width)).astype(np.float32)
    return weight, (rng.normal(size=(sequences, tokens, width)) @ mix).astype(np.float32)


@pytest.mark.parametrize(
    ("out", "width", "group"), [(8, 24, 8), (5, 30, 8), (7, 13, 128), (1, 20, 8), (9, 1, 4), (4, 6, 1)]
)
def test_equals_numpy(out, width, group):
    weight, inputs = problem(out, width)
    sizes = [out * min(group, width - start) for start in range(0, width, group)]
    counts = np.array([size * 6 // 10 for size in sizes], np.int32)
    found, mask = jax.jit(prune, static_argnums=3)(weight, factorise(hessian(inputs)), Quota(counts), group)
    expected, kept = oracle(weight, oracle_hessian(inputs), group, exactly(counts))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert (np.asarray(found)[~kept] == 0).all()
    assert int((~kept).sum()) == counts.sum()


def of_each_row(number):
    def choose(saliency, group):
        return np.argsort(np.argsort(saliency, axis=1, kind="stable"), axis=1) < number

    return choose


@pytest.mark.parametrize(
    ("out", "width", "size", "number"), [(8, 24, 4, 2), (5, 48, 8, 4), (3, 20, 4, 3), (2, 6, 2, 1)]
)
@pytest.mark.parametrize("group", [1, 9, 16, 128])  # how far errors reach at once changes nothing
def test_n_of_m_equals_numpy(out, width, size, number, group):
    weight, inputs = problem(out, width)
    pattern, quota = make_pattern("n_of_m", size), Quota(np.array([number], np.int32))
    found, mask = sparsegpt.prune(weight, factorise(hessian(inputs)), quota, pattern, settings_of(group))
    expected, kept = oracle(weight, oracle_hessian(inputs), size, of_each_row(number))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert set(kept.reshape(-1, size).sum(axis=1)) == {size - number}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
def test_the_released_threshold_equals_numpy(sparsity):
    weight, inputs = problem(6, 20)
    counts = np.array([int(48 * sparsity), int(48 * sparsity), int(24 * sparsity)], np.int32) + 1
    found, mask = prune(weight, factorise(hessian(inputs)), Quota(counts, TIES_ALL), 8)
    expected, kept = oracle(weight, oracle_hessian(inputs), 8, up_to_threshold(sparsity))
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_two_columns_by_hand():
    # Inputs (1, 0) and (1, 1): H = [[4, 2], [2, 2]] for one sequence. With damping d = 0.03 the error of pruning the
    # first column goes to the second by H_12 / H_22 = 2 / 2.03: as if w_1 x_1 were explained by x_2 alone.
    inputs = np.float32([[[1, 0], [1, 1]]])
    found, mask = prune(np.float32([[1.0, 5.0]]), factorise(hessian(inputs)), Quota(np.int32([1])), 2)
    np.testing.assert_array_equal(mask, [[False, True]])
    np.testing.assert_allclose(found, [[0, 5 + 2 / 2.03]], rtol=1e-5)


def test_compensation_keeps_the_output_closer_than_zeroing():
    weight, inputs = problem(16, 32)
    counts = np.array([128, 128], np.int32)
    found, mask = prune(weight, factorise(hessian(inputs)), Quota(counts), 16)
    tokens = inputs.reshape(-1, 32)
    error = np.linalg.norm(tokens @ (np.asarray(found) - weight).T)
    zeroing = np.linalg.norm(tokens @ (np.where(mask, weight, 0) - weight).T)
    assert error < 0.9 * zeroing


def test_dead_columns_go_first_and_what_the_budget_spares_keeps_its_value():
    weight, inputs = problem(4, 12)
    inputs[:, :, [2, 7]] = 0
    factor = factorise(hessian(inputs))
    np.testing.assert_array_equal(np.flatnonzero(factor.dead), [2, 7])
    found, mask = prune(weight, factor, Quota(np.int32([6])), 12)
    assert np.asarray(mask)[:, [2, 7]].tolist() == [[False] * 2] * 3 + [[True] * 2]  # row by row
    np.testing.assert_array_equal(found[3, [2, 7]], weight[3, [2, 7]])
    alive = [j for j in range(12) if j not in (2, 7)]
    np.testing.assert_array_equal(np.asarray(found)[:, alive], weight[:, alive])  # a dead weight leaves no error


def test_equal_saliencies_go_by_index():
    weight = np.ones((3, 4), np.float32)
    factor = factorise(np.eye(4, dtype=np.float32))
    _, mask = prune(weight, factor, Quota(np.int32([5])), 4)
    np.testing.assert_array_equal(np.asarray(mask).ravel(), np.arange(12) >= 5)
    _, mask = prune(weight, factor, Quota(np.int32([5]), TIES_ALL), 4)
    assert not np.asarray(mask).any()


def test_zeros_of_the_source_go_first_even_where_errors_have_moved_them():
    weight, inputs = problem(8, 20)
    zero = np.random.default_rng(1).random(weight.shape) < 0.3
    weight[zero] = 0
    counts = np.array([zero[:, start : start + 8].sum() + 9 for start in (0, 8, 16)], np.int32)

    def choose(saliency, number):
        here = zero[:, 8 * number : 8 * number + 8]
        assert number == 0 or (saliency[here] > 0).any()
        return exactly(counts)(np.where(here, -1, saliency), number)

    quota = Quota(counts, zeros=np.packbits(zero, axis=1))
    found, mask = jax.jit(prune, static_argnums=3)(weight, factorise(hessian(inputs)), quota, 8)
    expected, kept = oracle(weight, oracle_hessian(inputs), 8, choose)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert (np.asarray(found)[zero] == 0).all()


def test_a_rank_deficient_hessian_is_damped():
    _, inputs = problem(6, 24, sequences=1, tokens=5)
    factor = factorise(hessian(inputs))
    assert int(factor.level) == 0
    expected, _ = oracle_factor(oracle_hessian(inputs))
    np.testing.assert_allclose(factor.upper, expected, rtol=2e-3, atol=1e-3)


def test_the_ladder_is_climbed_and_its_end_is_told():
    # An eigenvalue of -0.05 times the mean diagonal: 0.01 does not lift it above zero, 0.1 does.
    h = np.diag(np.float32([1, 1, 1, 1]))
    h[0, 1] = h[1, 0] = 1.05
    factor = factorise(h)
    assert DAMPING[int(factor.level)] == 0.1
    np.testing.assert_allclose(factor.upper, oracle_factor(h.astype(np.float64), 0.1)[0], rtol=1e-4, atol=1e-5)
    h[0, 1] = h[1, 0] = 9
    assert int(factorise(h).level) == len(DAMPING)
    assert int(factorise(np.full((3, 3), np.nan, np.float32)).level) == len(DAMPING)


def test_the_same_under_vmap():
    hessians = np.stack([np.asarray(hessian(problem(4, 10, seed)[1])) for seed in range(3)])
    hessians[1, 0, 1] = hessians[1, 1, 0] = 1.05 * hessians[1, 0, 0]
    together = jax.jit(jax.vmap(factorise))(hessians)
    for index, alone in enumerate(factorise(h) for h in hessians):
        np.testing.assert_allclose(together.upper[index], alone.upper, rtol=1e-5)
        assert int(together.level[index]) == int(alone.level)


def test_the_hessian_streams():
    _, inputs = problem(1, 9, sequences=7)
    filled = np.concatenate([inputs, inputs[-1:], inputs[-1:]])
    total = np.zeros((9, 9), np.float32)
    for first in (0, 3, 6):
        total = STATISTICS["hessian"].update(total, filled[first : first + 3], first, 7)
    np.testing.assert_allclose(total, oracle_hessian(inputs), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(total, hessian(inputs))


def test_it_says_that_weights_change():
    assert PRUNERS["sparsegpt"].updates_weights
    assert not PATTERNS[PRUNERS["sparsegpt"].pattern].by_row
    assert not any(PRUNERS[name].updates_weights for name in PRUNERS if name != "sparsegpt")
