"""Least squares on a mask against the normal equations of every row's kept columns, in float64."""

import jax
import numpy as np
import pytest

from neuroal_jax.numerics.least_squares import add_products, no_products, solve


def problem(out=7, width=12, tokens=40, seed=0, density=0.5):
    """Dense weights, a mask, the input as it is now and as it was, `[sequence, token, in]`."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(width, width)) / np.sqrt(width) + np.eye(width)
    dense = (rng.normal(size=(4, tokens // 4, width)) @ mixed).astype(np.float32)
    now = (dense + 0.3 * rng.normal(size=dense.shape)).astype(np.float32)
    weight = rng.normal(size=(out, width)).astype(np.float32)
    return weight, rng.random((out, width)) < density, now, dense


def products_of(weight, now, dense=None):
    same = dense is None
    everyone = np.ones(len(now), bool)
    start = no_products(now.shape[-1], len(weight), same=same)
    return add_products(start, now, now if same else dense, weight, everyone)


def solved(weight, mask, now, dense=None, start=None, damping=0.1, iterations=60, tolerance=0.0):
    options = {"damping": damping, "iterations": iterations, "tolerance": tolerance}
    start = np.where(mask, weight, 0) if start is None else start
    found = jax.jit(lambda *arguments: solve(*arguments, **options))(
        weight, start, mask, products_of(weight, now, dense)
    )
    return jax.tree.map(np.asarray, found)


def oracle(weight, mask, now, dense=None, damping=0.1):
    x = now.reshape(-1, now.shape[-1]).astype(np.float64)
    then = x if dense is None else dense.reshape(x.shape).astype(np.float64)
    gram, found = x.T @ x, np.zeros(weight.shape)
    strength = damping * np.mean(np.diag(gram))
    for row, kept, solution in zip(weight.astype(np.float64), mask, found, strict=True):
        system = gram[np.ix_(kept, kept)] + strength * np.eye(kept.sum())
        solution[kept] = np.linalg.lstsq(system, x[:, kept].T @ (then @ row) + strength * row[kept], rcond=None)[0]
    return found


def outputs(x, weight):
    return x.reshape(-1, x.shape[-1]).astype(np.float64) @ weight.T.astype(np.float64)


@pytest.mark.parametrize("damping", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("both", [True, False], ids=["two inputs", "one input"])
@pytest.mark.parametrize("out", [7, 12, 20])
def test_every_row_solves_its_normal_equations(damping, seed, both, out):
    weight, mask, now, dense = problem(out, seed=seed)
    dense = dense if both else None
    found = solved(weight, mask, now, dense, damping=damping)
    np.testing.assert_allclose(found.weight, oracle(weight, mask, now, dense, damping), atol=2e-4)
    assert not found.weight[~mask].any()


@pytest.mark.parametrize("out", [7, 20])
def test_the_errors_are_those_of_the_outputs(out):
    weight, mask, now, dense = problem(out)
    found = solved(weight, mask, now, dense, iterations=3)
    expected = outputs(dense, weight)
    for errors, of in ((found.before, np.where(mask, weight, 0)), (found.after, found.weight)):
        np.testing.assert_allclose(errors, np.square(outputs(now, of) - expected).sum(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.dense, np.square(expected).sum(axis=0), rtol=1e-4)
    assert found.iterations == 3


def test_each_iteration_makes_every_row_s_objective_smaller():
    weight, mask, now, dense = problem(out=20)
    x = now.reshape(-1, now.shape[-1])
    strength = 0.1 * np.square(x).sum(axis=0).mean()
    expected, before = outputs(dense, weight), np.inf
    for iterations in range(1, 5):
        found = solved(weight, mask, now, dense, iterations=iterations).weight
        objective = np.square(outputs(now, found) - expected).sum(axis=0)
        objective += strength * np.where(mask, np.square(found - weight), 0).sum(axis=1)
        assert (objective <= before * (1 + 1e-6)).all()  # a row may be solved
        assert objective.sum() < np.sum(before)
        before = objective


def test_fewer_tokens_than_columns_are_enough_with_damping():
    weight, mask, now, dense = problem(width=24, tokens=8)
    found = solved(weight, mask, now, dense, iterations=200)
    np.testing.assert_allclose(found.weight, oracle(weight, mask, now, dense), atol=1e-3)


def test_inputs_that_are_always_zero_leave_their_weights_as_they_were():
    weight, mask, now, dense = problem()
    now[..., 3] = dense[..., 3] = 0
    found = solved(weight, mask, now, dense)
    np.testing.assert_allclose(found.weight[:, 3], np.where(mask, weight, 0)[:, 3], rtol=1e-6)
    np.testing.assert_allclose(found.weight, oracle(weight, mask, now, dense), atol=2e-4)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_no_input_at_all_leaves_everything(damping):
    weight, mask, now, dense = problem()
    found = solved(weight, mask, 0 * now, 0 * dense, damping=damping)
    np.testing.assert_array_equal(found.weight, np.where(mask, weight, 0))
    assert not found.before.any() and not found.after.any() and found.iterations == 0


def test_without_damping_dead_columns_do_no_harm():
    weight, mask, now, dense = problem()
    now[..., 3] = dense[..., 3] = 0
    found = solved(weight, mask, now, dense, damping=0.0)
    np.testing.assert_array_equal(found.weight[:, 3], np.where(mask, weight, 0)[:, 3])
    assert np.isfinite(found.weight).all()


def test_rows_without_and_with_all_weights():
    weight, mask, now, _ = problem()
    mask[0], mask[1] = False, True
    found = solved(weight, mask, now)
    assert not found.weight[0].any()
    np.testing.assert_allclose(found.before[0], found.dense[0])
    np.testing.assert_allclose(found.weight[1], weight[1], atol=1e-5)  # nothing to mend


def test_one_column():
    weight, _, now, dense = problem(out=3, width=1)
    mask = np.array([[True], [False], [True]])
    x, then = now.ravel().astype(np.float64), dense.ravel().astype(np.float64)
    share = (x @ then + 0.1 * x @ x) / (1.1 * x @ x)
    np.testing.assert_allclose(solved(weight, mask, now, dense).weight, np.where(mask, share * weight, 0), rtol=1e-5)


def test_where_it_starts_does_not_matter_in_the_end():
    weight, mask, now, dense = problem()
    start = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    found = solved(weight, mask, now, dense, start=start)
    np.testing.assert_allclose(found.weight, oracle(weight, mask, now, dense), atol=2e-4)


def test_it_ends_where_enough_is_solved():
    weight, mask, now, dense = problem()
    few, many = (solved(weight, mask, now, dense, tolerance=tolerance) for tolerance in (1e-1, 1e-3))
    assert 1 <= few.iterations < many.iterations < 60
    np.testing.assert_allclose(many.weight, oracle(weight, mask, now, dense), atol=5e-3)


@pytest.mark.parametrize("out", [7, 20], ids=["by way of outputs", "by way of inputs"])
def test_products_of_batches_are_those_of_all_and_what_fills_up_does_not_count(out):
    weight, _, now, dense = problem(out)
    whole = products_of(weight, now[:3], dense[:3])
    state = no_products(now.shape[-1], out, same=False)
    for first in (0, 2):
        batch = slice(first, first + 2)
        state = add_products(state, now[batch], dense[batch], weight, first + np.arange(2) < 3)
    x, then = (array[:3].reshape(-1, array.shape[-1]).astype(np.float64) for array in (now, dense))
    of_outputs = (weight @ then.T @ x, np.square(then @ weight.T).sum(axis=0))
    expected = (x.T @ x, *((x.T @ then, then.T @ then) if out > 12 else of_outputs))
    for found in (state, whole):
        for sums, truth in zip((found.gram, *found.dense), expected, strict=True):
            np.testing.assert_allclose(sums, truth, rtol=1e-5, atol=2e-4)
