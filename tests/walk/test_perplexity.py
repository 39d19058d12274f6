"""Perplexity by slices of the vocabulary and batches of windows: the same number whatever is cut how."""

import numpy as np
import pytest

from neuroal_jax import load_model
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.walk import programs
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.perplexity import perplexity, work

# Heads that are tied, have biases, bend their logits, project to another width.
HEADS = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"family": "phi"},
    "softcap": {"family": "gemma2", "head_dim": 8, "final_logit_softcapping": 0.5},
    "projected": {"family": "opt", "ffn_dim": 56, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
}


def windows(count, seqlen=16):
    return np.random.default_rng(3).integers(0, 96, (count, seqlen)).astype(np.int32)


def expected(model, ids):
    """From the whole model's logits, in float64."""
    logits = np.asarray(load_model(str(model))(ids), np.float64)[:, :-1]
    chosen = np.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return np.exp((np.log(np.exp(logits).sum(axis=-1)) - chosen).mean())


@pytest.mark.parametrize("head", HEADS)
def test_the_vocabulary_in_slices_gives_the_losses_of_the_whole(make_llama, head, monkeypatch):
    model, ids = make_llama(num_hidden_layers=1, **HEADS[head]), windows(4)
    blocks = Blocks(open_checkpoint(str(model)), "float32")
    whole = perplexity(blocks, ids)
    monkeypatch.setattr("neuroal_jax.walk.blocks._SLICE_TOKENS", 40)
    assert [first for first, _ in blocks.head_slices()] == [0, 40, 80]
    assert perplexity(blocks, ids) == pytest.approx(whole, rel=1e-6)
    assert whole == pytest.approx(expected(model, ids), rel=1e-5)


def test_only_the_rows_of_the_tokens_of_a_large_table_reach_the_device(llama, monkeypatch):
    blocks, ids = Blocks(open_checkpoint(str(llama)), "float32"), windows(7)
    tables, embed = [], programs.embed

    def watched(graph, params, tokens):
        tables.append(params["embedding"].shape)
        return embed(graph, params, tokens)

    monkeypatch.setattr(programs, "embed", watched)
    few, more = blocks.embed([ids[:2], ids[2:3]]), blocks.embed([ids])
    assert tables == [(3 * 16, 32)] * 2 + [(96, 32)]
    np.testing.assert_array_equal(np.concatenate(few), more[0][:3])


def test_batches_of_evaluation_are_of_one_size_and_hold_each_window_once(llama, monkeypatch):
    ids, seen = windows(5), []
    monkeypatch.setattr("neuroal_jax.walk.blocks._EVALUATION_TOKENS", 2 * 16 + 3)
    run = programs.run
    monkeypatch.setattr(programs, "run", lambda *args: seen.append(len(args[-1])) or run(*args))
    checkpoint = open_checkpoint(str(llama))
    for calibration_batch in (1, 6):
        found = perplexity(Blocks(checkpoint, "float32", calibration_batch), ids)
        assert found == pytest.approx(expected(llama, ids), rel=1e-5)
    assert seen == 2 * checkpoint.num_blocks * [2, 2, 1]


def test_progress_counts_the_head_as_its_share_of_the_products(llama, monkeypatch):
    told = []
    monkeypatch.setattr("neuroal_jax.walk.blocks._SLICE_TOKENS", 40)
    checkpoint = open_checkpoint(str(llama))
    perplexity(Blocks(checkpoint, "float32"), windows(5), None, told.append)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 56
    assert told == [0, block, block, block, 40 * 32, 40 * 32, 16 * 32]
    assert work(checkpoint) == sum(told)
