"""OWL, AlphaPruning and DSnoT on a model like Gemma 3, against NumPy that sees what transformers' own model computes.

Norms with a unit offset before and after attention and MLP, normed queries and keys, one head of keys and values,
blocks with a window and blocks without, a tied head: whatever of these a statistic had to know, it would miss here.
"""

import numpy as np
import pytest

from neuroal_jax.allocation import alpha, owl, uniform
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.masks.budget import Budget
from neuroal_jax.walk import final
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from tests.allocation.test_owl_alpha import oracle_exponent
from tests.conftest import save_random_weights
from tests.refine.test_dsnot import exact_row, measures
from tests.search.test_neuroal import problem_of

GEMMA = {
    "model_type": "gemma3_text",
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
SPARSITY, CYCLES = 0.6, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    save_random_weights(directory, GEMMA)
    return directory


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(1).integers(3, 96, (6, 16))


def walk(directory, windows, prune=None):
    """Every block's `{linear: (weight, its input [sequence, token, in])}` in one run of transformers' model.

    `prune(block, name, weight, input)` gives masks, with which a block runs once more: what it gives then is what the
    next one sees. Without it all blocks are dense.
    """
    import torch
    from transformers import AutoModelForCausalLM

    net, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), []

    def watched(layer, forward):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}

        def run(*args, **kwargs):
            inputs = {}
            hooks = [
                module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].numpy()}))
                for name, module in linears.items()
            ]
            output = forward(*args, **kwargs)
            for hook in hooks:
                hook.remove()
            weights = {name: module.weight.detach().numpy().copy() for name, module in linears.items()}
            found.append({name: (weights[name], inputs[name]) for name in linears})
            if prune is None:
                return output
            for name, module in linears.items():
                module.weight[~torch.from_numpy(prune(len(found) - 1, name, weights[name], inputs[name]))] = 0
            return forward(*args, **kwargs)

        return run

    for layer in net.model.layers:
        layer.forward = watched(layer, layer.forward)
    with torch.no_grad():
        net.model(torch.from_numpy(windows), use_cache=False)
    return found


def test_outliers_and_exponents(model, windows):
    checkpoint = open_checkpoint(str(model))
    outliers, alphas = [], []
    for block in walk(model, windows):
        scores = np.concatenate([measures(weight, inputs)[2].ravel() for weight, inputs in block.values()])
        outliers.append(100 * (scores > 2.5 * scores.mean()).mean())
        spectra = [np.sort(np.linalg.svd(weight.astype(np.float64))[1] ** 2) for weight, _ in block.values()]
        alphas.append(np.mean([oracle_exponent(spectrum) for spectrum in spectra]))
    assert min(outliers) > 0 and len(set(outliers)) == len(set(alphas)) == 3
    found = owl.allocate(problem_of(checkpoint, windows, SPARSITY, owl_m=2.5, owl_lambda=0.1))
    assert found.measured["outliers"] == pytest.approx(outliers, abs=1e-3)
    densities = 0.2 * (np.array(outliers) - min(outliers)) / np.ptp(outliers)
    expected = SPARSITY + densities.mean() - densities  # more outliers, denser
    sparsities = [block["self_attn.q_proj"] for block in found.allocation.blocks]
    assert sparsities == pytest.approx(expected.tolist(), abs=1e-4)
    found = alpha.allocate(problem_of(checkpoint, windows, SPARSITY, alpha_epsilon=0.3))
    assert found.measured["alphas"] == pytest.approx(alphas, rel=1e-3)


def test_the_masks_of_a_whole_walk_with_dsnot(model, windows):
    checkpoint = open_checkpoint(str(model))
    method = make_method("wanda", "dsnot", {"budget": "exact", "dsnot_cycles": CYCLES})
    budget = Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, SPARSITY, "exact", method.pattern)
    counts = budget.counts(uniform.allocation(SPARSITY, list(checkpoint.linear_shapes()), checkpoint.num_blocks))
    results = final.prune(Blocks(checkpoint, "float32", 4), method, windows, counts)
    swapped, errors = 0, {False: 0.0, True: 0.0}

    def refined(block, name, weight, inputs):
        nonlocal swapped
        contributions, gain, score = measures(weight, inputs)
        rank = np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1)
        before = rank >= np.asarray(counts[block][name].pruned)[:, None]
        after = before
        if not name.startswith("mlp."):
            rows = zip(before, contributions, gain, score, strict=True)
            after = np.array([exact_row(*row, CYCLES, 0.1) for row in rows])
            for state, mask in ((False, before), (True, after)):  # what DSnoT is to make small
                errors[state] += np.square(np.where(mask, 0, contributions).sum(axis=1)).sum()
        swapped += int((after & ~before).sum())
        found = np.unpackbits(results[block].packed[name], axis=1, count=weight.shape[1]).astype(bool)
        np.testing.assert_array_equal(found, after, f"{block} {name}")
        return after

    walk(model, windows, refined)
    assert swapped > 100
    assert errors[True] < 0.2 * errors[False]
