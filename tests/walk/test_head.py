"""What the head says of candidates, by slices of the vocabulary: against logits that are all there at once."""

import numpy as np
import pytest

from neuroal_jax import UserError, load_model
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.models import FAMILIES
from neuroal_jax.numerics import kl, loss
from neuroal_jax.walk import head
from neuroal_jax.walk.blocks import Blocks
from tests.models.test_families import GRANITE, ONE_OF_EACH, SMALL

HEADS = {
    **{family: {"family": family, **options} for family, options in ONE_OF_EACH.items()},
    "softcap": {"family": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5, **SMALL},
    "no softcap": {"family": "gemma2", "head_dim": 8, "final_logit_softcapping": None, **SMALL},
    "opt, no final norm": {"family": "opt", "ffn_dim": 40, "_remove_final_layer_norm": True},
}


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_each_registered_head_is_tested():
    assert {options["family"] for options in HEADS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_those_of_whole_logits(make_llama, name, monkeypatch):
    monkeypatch.setattr("neuroal_jax.walk.blocks._SLICE_TOKENS", 40)
    directory = str(make_llama(num_hidden_layers=1, **HEADS[name]))
    blocks, model = Blocks(open_checkpoint(directory), "float32"), load_model(directory)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 96, (3, 10)).astype(np.int32)
    dense = 3 * rng.standard_normal((3, 10, 32)).astype(np.float32)
    candidates = [
        dense,
        *(dense + scale * rng.standard_normal(dense.shape).astype(np.float32) for scale in (0.1, 1, 5)),
    ]
    of_dense, *of_pruned = (log_softmax(np.asarray(model.head(x), np.float64)) for x in (dense, *candidates))
    kept = head.distributions(blocks, dense)
    bent = getattr(model.head, "softcap", None) is not None
    assert ((kept.slope is None), (kept.features is None)) == (bent, not bent)
    groups = [np.stack(candidates[:2]), np.stack(candidates[2:])]
    found = head.scores(blocks, kl, kept, ids, list(groups))
    expected = [(np.exp(of_dense) * (of_dense - pruned)).sum(axis=-1).mean(axis=-1) for pruned in of_pruned]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=3e-6)
    assert found[3].min() > 10 * found[1].max() > 0
    losses = [-np.take_along_axis(pruned[:, :-1], ids[:, 1:, None], axis=-1).mean(axis=(1, 2)) for pruned in of_pruned]
    np.testing.assert_allclose(head.scores(blocks, loss, None, ids, list(groups)), losses, rtol=1e-5)


def test_scores_are_the_same_whatever_is_beside_a_candidate(make_llama):
    blocks = Blocks(open_checkpoint(str(make_llama(num_hidden_layers=1))), "float32")
    hidden = np.random.default_rng(0).standard_normal((5, 3, 10, 32)).astype(np.float32)
    kept, ids = head.distributions(blocks, hidden[0]), np.zeros((3, 10), np.int32)
    one = [head.scores(blocks, kl, kept, ids, [x[None]])[0] for x in hidden]
    np.testing.assert_array_equal(head.scores(blocks, kl, kept, ids, [hidden]), one)


def test_half_precision_sums_in_full(make_llama, monkeypatch):
    monkeypatch.setattr("neuroal_jax.walk.blocks._SLICE_TOKENS", 40)
    directory = str(make_llama(num_hidden_layers=1, dtype="bfloat16", family="granite", **GRANITE))
    blocks, model = Blocks(open_checkpoint(directory), "bfloat16"), load_model(directory)
    rng = np.random.default_rng(0)
    dense, pruned = (blocks.put({"x": 3 * rng.standard_normal((2, 10, 32))})["x"] for _ in range(2))
    of_dense, of_pruned = (log_softmax(np.asarray(model.head(x).astype(float), np.float64)) for x in (dense, pruned))
    kept = head.distributions(blocks, dense)
    assert {str(array.dtype) for array in kept if array is not None} == {"float32"}
    found = head.scores(blocks, kl, kept, np.zeros((2, 10), np.int32), [dense[None], pruned[None]])
    assert np.abs(found[0]).max() < 1e-5
    expected = (np.exp(of_dense) * (of_dense - of_pruned)).sum(axis=-1).mean(axis=-1)
    np.testing.assert_allclose(found[1], expected, rtol=0.01)


def test_what_is_not_finite_is_refused(make_llama):
    blocks = Blocks(open_checkpoint(str(make_llama(num_hidden_layers=1))), "float32")
    ids, hidden = np.zeros((3, 10), np.int32), np.full((3, 10, 32), np.nan, np.float32)
    with pytest.raises(UserError, match="distributions are not finite in float32: try --dtype float32"):
        head.distributions(blocks, hidden)
    with pytest.raises(UserError, match="scores of candidates are not finite"):
        head.scores(blocks, loss, None, ids, [hidden[None]])
