"""A softmax's normalizer, streamed."""

from itertools import pairwise

import numpy as np
import pytest

from neuroal_jax.numerics import softmax


@pytest.mark.parametrize("edges", [[0, 50], [0, 7, 8, 50], [0, 49, 50]])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_slices_give_the_losses_of_the_whole(edges, scale):
    rng = np.random.default_rng(0)
    logits = (scale * rng.standard_normal((4, 5, 50))).astype(np.float32)
    tokens = rng.integers(0, 50, (4, 5))
    tokens[0] = [0, 7, 8, 48, 49]
    found, chosen = softmax.no_logits((4, 5)), np.zeros((4, 5), np.float32)
    for first, last in pairwise(edges):
        found = softmax.add(found, logits[..., first:last])
        chosen = softmax.choose(chosen, logits[..., first:last], tokens, np.asarray(first))
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    expected = np.log(np.exp(wide - top[..., None]).sum(axis=-1)) + top
    expected -= np.take_along_axis(wide, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(softmax.losses(found, chosen), expected, rtol=2e-6, atol=2e-6 * scale)
