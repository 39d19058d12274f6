"""Pruners against independent NumPy restatements and hand-made cases."""

import numpy as np
import pytest

from neuroal_jax.models.llama import FAMILY
from neuroal_jax.pruners import PRUNERS
from neuroal_jax.statistics import norms, squared_sums


def magnitude(weight, inputs):
    return np.abs(weight)


def wanda(weight, inputs):
    column = np.sqrt(np.square(inputs).sum(axis=(0, 1)) / len(inputs))
    return np.abs(weight) * column[None, :]


def multiflow(weight, inputs):
    flow = wanda(weight, inputs)
    return np.abs(weight) * np.outer(flow.mean(axis=1), flow.mean(axis=0))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "multiflow"])
def test_scores_equal_numpy(name):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 7)).astype(np.float32)
    inputs = rng.normal(size=(3, 4, 7)).astype(np.float32)
    found = PRUNERS[name].scores(weight, norms(squared_sums({"x": inputs}))["x"])
    np.testing.assert_allclose(found, globals()[name](weight, inputs), rtol=1e-5)


def test_wanda_by_hand():
    scores = PRUNERS["wanda"].scores(np.float32([[1, -2], [3, 0]]), np.float32([10, 0.5]))
    np.testing.assert_array_equal(scores, [[10, 1], [30, 0]])


def test_multiflow_by_hand():
    # flow = [[1, 4], [3, 0]]; row means 2.5 and 1.5; column means 2 and 2.
    scores = PRUNERS["multiflow"].scores(np.float32([[1, -2], [3, 0]]), np.float32([1, 2]))
    np.testing.assert_allclose(scores, [[5, 10], [9, 0]])


@pytest.mark.parametrize("name", PRUNERS)
def test_scores_are_fp32_whatever_the_weights(name):
    import jax.numpy as jnp

    scores = PRUNERS[name].scores(jnp.ones((2, 3), jnp.bfloat16), jnp.ones(3))
    assert scores.dtype == jnp.float32


def test_statistics_do_not_depend_on_how_sequences_are_batched():
    inputs = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
    whole = squared_sums({"x": inputs})["x"]
    parts = np.concatenate([squared_sums({"x": inputs[i : i + 2]})["x"] for i in (0, 2, 4)])
    np.testing.assert_array_equal(whole, parts)
    np.testing.assert_allclose(norms({"x": whole})["x"], np.sqrt((inputs**2).sum((0, 1)) / 6), rtol=1e-6)


def test_every_linear_names_an_input_of_its_block():
    reads = {linear.reads for linear in FAMILY.linears}
    assert {linear.feeds for linear in FAMILY.linears} <= reads
