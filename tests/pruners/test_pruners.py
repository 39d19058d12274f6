"""Pruners against independent NumPy restatements and hand-made cases."""

import numpy as np
import pytest

from neuroal_jax.numerics.selection import Quota
from neuroal_jax.numerics.statistics import measure, norms
from neuroal_jax.pruners import magnitude, multiflow, wanda
from neuroal_jax.walk.method import make_method

MODULES = {"magnitude": magnitude, "wanda": wanda, "multiflow": multiflow}


def oracle_magnitude(weight, inputs):
    return np.abs(weight)


def oracle_wanda(weight, inputs):
    column = np.sqrt(np.square(inputs).sum(axis=(0, 1)) / len(inputs))
    return np.abs(weight) * column[None, :]


def oracle_multiflow(weight, inputs):
    flow = oracle_wanda(weight, inputs)
    return np.abs(weight) * np.outer(flow.mean(axis=1), flow.mean(axis=0))


def squares(inputs):
    return measure(inputs, ["squares"])["squares"]


def prepared(name, statistics):
    """What a pruner makes of its input's statistics; itself, if it makes nothing of them."""
    return MODULES[name].prepare(statistics) if hasattr(MODULES[name], "prepare") else statistics


@pytest.mark.parametrize("name", ["magnitude", "wanda", "multiflow"])
def test_scores_equal_numpy(name):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 7)).astype(np.float32)
    inputs = rng.normal(size=(3, 4, 7)).astype(np.float32)
    found = MODULES[name].scores(weight, prepared(name, {"squares": squares(inputs)}))
    np.testing.assert_allclose(found, globals()[f"oracle_{name}"](weight, inputs), rtol=1e-5)


def test_wanda_by_hand():
    scores = wanda.scores(np.float32([[1, -2], [3, 0]]), np.float32([10, 0.5]))
    np.testing.assert_array_equal(scores, [[10, 1], [30, 0]])


def test_multiflow_by_hand():
    # flow = [[1, 4], [3, 0]]; row means 2.5 and 1.5; column means 2 and 2.
    scores = multiflow.scores(np.float32([[1, -2], [3, 0]]), np.float32([1, 2]))
    np.testing.assert_allclose(scores, [[5, 10], [9, 0]])


@pytest.mark.parametrize("name", MODULES)
def test_scores_are_fp32_whatever_the_weights(name):
    import jax.numpy as jnp

    scores = MODULES[name].scores(jnp.ones((2, 3), jnp.bfloat16), prepared(name, {"squares": jnp.ones((1, 3))}))
    assert scores.dtype == jnp.float32


@pytest.mark.parametrize("name", MODULES)
def test_the_lowest_scores_of_each_row_go(name):
    rng = np.random.default_rng(2)
    weight, inputs = rng.normal(size=(5, 7)).astype(np.float32), rng.normal(size=(3, 4, 7)).astype(np.float32)
    method, counts = make_method(name), np.int32([0, 1, 3, 6, 7])
    pruned, mask = method.prune(weight, method.prepare(measure(inputs, method.needs)), Quota(counts))
    rank = np.argsort(np.argsort(globals()[f"oracle_{name}"](weight, inputs), axis=1), axis=1)
    np.testing.assert_array_equal(mask, rank >= counts[:, None])
    np.testing.assert_array_equal(pruned, np.where(rank >= counts[:, None], weight, 0))


def test_collected_statistics_equal_numpy():
    inputs = np.random.default_rng(3).normal(1, 2, size=(6, 5, 4)).astype(np.float32)
    found = measure(inputs, {"squares", "sums", "variances"})
    np.testing.assert_allclose(found["squares"], (inputs**2).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["sums"], inputs.sum(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["variances"], inputs.var(axis=1), rtol=1e-5)
    assert set(found) == {"squares", "sums", "variances"}


def test_statistics_do_not_depend_on_how_sequences_are_batched():
    inputs = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
    whole = squares(inputs)
    parts = np.concatenate([squares(inputs[i : i + 2]) for i in (0, 2, 4)])
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_allclose(norms(whole), np.sqrt((inputs**2).sum((0, 1)) / 6), rtol=1e-6)
