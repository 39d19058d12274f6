"""The refit of a whole walk, against NumPy that sees what transformers' own model computes; and that it ends whole."""

import json
from itertools import pairwise

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.allocation import uniform
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.errors import UserError
from neuroal_jax.masks import check_pruned, load_masks
from neuroal_jax.masks.budget import Budget
from neuroal_jax.models.family import by_input
from neuroal_jax.refine import refit
from neuroal_jax.walk import final, programs
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from tests.conftest import RUN, save_random_model
from tests.models.test_families import ONE_OF_EACH
from tests.numerics.test_least_squares import oracle

SPARSITY, DAMPING = 0.6, 0.2
ORDER = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]


def pruned_blocks(model, windows, pruner, refinement, batch=4, **options):
    checkpoint = open_checkpoint(str(model))
    method = make_method(pruner, refinement, {"budget": "exact", "refit_damping": DAMPING, **options})
    budget = Budget(checkpoint.linear_shapes(), checkpoint.num_blocks, SPARSITY, "exact", method.pattern)
    counts = budget.counts(uniform.allocation(SPARSITY, list(budget.shapes), budget.num_blocks))
    return final.prune(Blocks(checkpoint, "float32", batch), method, windows, counts)


@pytest.fixture
def windows():
    return np.random.default_rng(1).integers(3, 96, (6, 16))


@pytest.fixture
def exactly_solved(monkeypatch):
    """As many iterations as the equations take; programs are kept by options, and no other test has these."""
    monkeypatch.setattr(refit, "_TOLERANCE", 1e-6)
    return {"refit_iterations": 211}


def inputs_of(layer, call):
    """The inputs of a layer's linears, by name, in one run of transformers' layer."""
    import torch

    found, linears = {}, [(name, part) for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)]
    hooks = [
        part.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].numpy().copy()}))
        for name, part in linears
    ]
    output = call()
    for hook in hooks:
        hook.remove()
    return found, output


@pytest.mark.parametrize(("pruner", "share"), [("wanda", 0.0), ("wanda", 0.25), ("sparsegpt", 0.5)])
def test_every_linear_is_refitted_on_what_comes_in_behind_the_ones_before_it(
    make_llama, windows, exactly_solved, pruner, share
):
    import torch
    from transformers import AutoModelForCausalLM

    model = make_llama(num_hidden_layers=2)
    results = pruned_blocks(model, windows, pruner, "refit", refit_dense_share=share, **exactly_solved)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        of_dense = net(torch.from_numpy(windows), output_hidden_states=True).hidden_states
    compared = 0

    def watched(number, layer, forward):
        linears = dict(layer.named_modules())

        def run(hidden, *args, **kwargs):
            nonlocal compared
            aim = (1 - share) * hidden + share * of_dense[number]
            dense_inputs, _ = inputs_of(layer, lambda: forward(aim, *args, **kwargs))
            dense = {name: linears[name].weight.detach().numpy().copy() for name in dense_inputs}
            for name, weight in dense.items():
                kept = np.unpackbits(results[number].packed[name], axis=1, count=weight.shape[1]).astype(bool)
                linears[name].weight[~torch.from_numpy(kept)] = 0
            for group in ORDER:
                now, _ = inputs_of(layer, lambda: forward(hidden, *args, **kwargs))
                for name in group:
                    kept = (linears[name].weight != 0).numpy()
                    expected = oracle(dense[name], kept, now[name], dense_inputs[name], DAMPING)
                    found = results[number].updated[name]
                    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
                    np.testing.assert_array_equal(found != 0, kept)
                    output = dense_inputs[name] @ dense[name].T
                    for weight, error in ((linears[name].weight.numpy(), "error_before"), (found, "error_after")):
                        size = np.linalg.norm(now[name] @ weight.T - output) / np.linalg.norm(output)
                        if error == "error_after" or pruner == "wanda":  # SparseGPT's own weights are not known here
                            assert results[number].refits[name][error] == pytest.approx(size, rel=1e-3)
                    linears[name].weight[:] = torch.from_numpy(found)
                    compared += 1
            return forward(hidden, *args, **kwargs)

        return run

    with torch.no_grad():
        for number, layer in enumerate(net.model.layers):
            layer.forward = watched(number, layer, layer.forward)
        net.model(torch.from_numpy(windows), use_cache=False)
    assert compared == 14
    errors = [record for result in results for record in result.refits.values()]
    assert all(record["error_after"] < record["error_before"] for record in errors)


def test_masks_do_not_change(make_llama, windows):
    model = make_llama(num_hidden_layers=2)
    for refinement in ("none", "dsnot"):
        chain = "refit" if refinement == "none" else f"{refinement}+refit"
        plain, refitted = (pruned_blocks(model, windows, "wanda", name)[0] for name in (refinement, chain))
        for name, packed in plain.packed.items():
            np.testing.assert_array_equal(refitted.packed[name], packed)
        assert plain.refits == {} and plain.updated == {}
        assert refitted.refits.keys() == plain.packed.keys()


def test_batches_do_not_count(make_llama, windows):
    model = make_llama(num_hidden_layers=2)
    whole, split = (pruned_blocks(model, windows, "magnitude", "refit", batch)[-1] for batch in (6, 4))
    for name, weight in whole.updated.items():
        np.testing.assert_allclose(split.updated[name], weight, atol=1e-3 * np.abs(weight).max())


FAST = ("llama", "phi3")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ONE_OF_EACH]
)
def test_no_input_depends_on_linears_of_a_later_one(tmp_path, family):
    model = save_random_model(tmp_path / "model", family=family, **ONE_OF_EACH[family])
    blocks = Blocks(open_checkpoint(str(model)), "float32")
    _, weights = next(blocks.read())
    width = blocks.checkpoint.config.hidden_size
    hidden = np.random.default_rng(0).normal(size=(1, 4, width)).astype(np.float32)

    def inputs(changed=(), **known):
        linears = {name: weight + (name in changed) for name, weight in weights.linears.items()}
        return programs._forward(blocks.spec, weights._replace(linears=linears), hidden, known)[1]

    expected, groups = inputs(), by_input(blocks.spec.linears)
    for place, name in enumerate(groups):
        later = [linear for group in list(groups.values())[place:] for linear in group]
        np.testing.assert_array_equal(inputs(later)[name], expected[name], name)
    for before, name in pairwise(groups):  # an input that is known takes the place of what computes it
        np.testing.assert_array_equal(inputs(**{before: expected[before]})[name], expected[name], name)
    first = next(iter(groups))
    doubled = inputs(**{first: 2 * expected[first]})
    for linear in blocks.spec.linears:
        if linear.reads == first:
            assert all(np.any(doubled[part.feeds] != expected[part.feeds]) for part in linear.parts)


@pytest.fixture(scope="module")
def refitted(make_llama, tokens, tmp_path_factory):
    out = tmp_path_factory.mktemp("refit") / "out"
    model = make_llama(dtype="bfloat16")
    return run(model, tokens, out, refine="refit", allocation="owl"), model, out


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**config))


def test_a_run_saves_the_model_that_it_measured(refitted, tokens):
    from convert.masks_to_torch import verify
    from eval.perplexity import torch_perplexity

    result, _, out = refitted
    sparsity = result.manifest["sparsity"]
    assert sparsity["zeros"] == round(0.6 * sparsity["prunable"])
    verify(str(out / "model"), out / "masks.safetensors")
    saved = open_checkpoint(str(out / "model"))
    check_pruned(result.masks, saved.source, "saved")
    for name, mask in load_masks(out / "masks.safetensors").items():
        np.testing.assert_array_equal(np.asarray(saved.read(name), np.float32) != 0, mask)
    measured = torch_perplexity(str(out / "model"), np.load(tokens)["evaluation"], "float32")
    assert measured == pytest.approx(result.manifest["token_ppl"]["pruned"], rel=1e-4)


def test_the_manifest_has_a_record_of_every_linear(refitted):
    _, model, out = refitted
    found = json.loads((out / "manifest.json").read_text())["refit"]
    linears = list(open_checkpoint(str(model)).linear_shapes())
    assert [list(block) for block in found] == [linears] * 3
    for block in found:
        for record in block.values():
            assert record.keys() == {"error_before", "error_after", "iterations"}
            assert 0 < record["error_after"] < record["error_before"]
            assert 1 <= record["iterations"] <= 8
    assert "after the refit" in (out / "report.html").read_text()


def test_an_allocation_that_hurts_it_is_told(llama, caplog):
    plan = {"model": str(llama), "sparsity": 0.6, "dry_run": True, "seqlen": 16, "eval": "none"}
    for allocation, refine, told in (("neuroal", "refit", 1), ("uniform", "refit", 1), ("neuroal", "dsnot", 1)):
        neuroal_jax.prune(neuroal_jax.PruneConfig(**plan, allocation=allocation, refine=refine))
        assert caplog.text.count("--allocation neuroal was decided without --refine refit") == told


def test_activations_that_are_not_finite_are_named(make_llama, tokens, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = make_llama(seed=9)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"block 1: the input or the output of mlp\.up_proj is not finite"):
        run(model, tokens, tmp_path / "out", pruner="magnitude", refine="refit", allocation="uniform", eval="none")
    assert not (tmp_path / "out").exists()


def test_the_plan_knows_what_it_takes(llama):
    blocks = Blocks(open_checkpoint(str(llama)), "float32")
    shapes = blocks.checkpoint.linear_shapes()
    expected = 4 * max(3 * 32**2 + 10 * 2 * 56 * 32, 3 * 56**2 + 10 * 32 * 56)
    assert refit.memory(blocks.spec.linears, shapes) == expected
    plan = {"model": str(llama), "sparsity": 0.6, "dry_run": True, "seqlen": 16, "eval": "none", "pruner": "magnitude"}
    plain, refitted = (
        neuroal_jax.prune(neuroal_jax.PruneConfig(**plan, allocation="uniform", refine=name)).plan
        for name in ("none", "refit")
    )
    assert refitted.device_peak >= plain.device_peak + expected
    assert refitted.certain_host > plain.certain_host  # hidden states of all sequences
    assert refitted.output_bytes > plain.output_bytes + 4 * plain.prunable  # the model
