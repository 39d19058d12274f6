"""Whole runs: outputs, exact budgets, determinism, traces, reuse, resistance to failures."""

import json
import logging

import jax
import numpy as np
import pytest

import neuroal_jax
from neuroal_jax import block_ops
from neuroal_jax.checkpoint import open_checkpoint
from neuroal_jax.masks import load_masks, read_masks

RUN = {"seqlen": 16, "block_lambdas": "0.05,0.2", "row_lambdas": "0.0,0.1,0.2"}


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), "sparsity": 0.6}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**{**config, **options}))


def zeros(masks):
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.fixture(scope="module")
def finished(llama, tokens, tmp_path_factory):
    """One complete run with both steps and a saved model."""
    root = tmp_path_factory.mktemp("run")
    return run(llama, tokens, root / "out", save_model=str(root / "model")), root


def test_manifest_tells_the_whole_run(finished, llama):
    result, root = finished
    manifest = json.loads((root / "out" / "manifest.json").read_text())
    assert manifest == result.manifest
    assert manifest["lambda_block"] in (0.05, 0.2)
    assert manifest["lambda_row"] in (0.0, 0.1, 0.2)
    assert [len(manifest["scores"][step]) for step in ("block", "row")] == [2, 3]
    assert manifest["lambda_block"] == (0.05, 0.2)[int(np.argmin(manifest["scores"]["block"]))]
    assert manifest["sparsity"]["zeros"] == round(0.6 * manifest["sparsity"]["prunable"])
    assert set(manifest["seconds"]) >= {"read", "perplexity_dense", "search", "prune", "perplexity_pruned", "write"}
    assert set(manifest["hashes"]) == {"model", "prunable", "config", "calib", "eval"}
    assert manifest["options"]["sparsity"] == 0.6
    assert manifest["token_ppl"]["dense"] > 1
    assert manifest["versions"]["neuroal_jax"] == neuroal_jax.__version__


def test_masks_have_hugging_face_names_and_the_counts_of_the_manifest(finished, llama):
    result, root = finished
    masks = load_masks(root / "out" / "masks.safetensors")
    checkpoint = open_checkpoint(str(llama))
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: checkpoint.source.infos[name].shape for name in checkpoint.prunable()
    }
    assert zeros(masks) == result.manifest["sparsity"]["zeros"]


def test_saved_model_is_the_source_with_zeros(finished, llama):
    _, root = finished
    masks = load_masks(root / "out" / "masks.safetensors")
    source, saved = open_checkpoint(str(llama)), open_checkpoint(str(root / "model"))
    for name in source.source.infos:
        expected = np.where(masks[name], source.read(name), 0) if name in masks else source.read(name)
        np.testing.assert_array_equal(saved.read(name), expected)
    assert (root / "model" / "config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_transformers_gives_the_saved_model_the_printed_perplexity(finished, tokens):
    from eval.perplexity import torch_perplexity

    result, root = finished
    windows = np.load(tokens)["evaluation"]
    assert torch_perplexity(str(root / "model"), windows, "float32") == pytest.approx(
        result.manifest["token_ppl"]["pruned"], rel=1e-4
    )


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.6, 0.7, 0.8, 0.95])
def test_exact_budget_at_every_sparsity(llama, tokens, tmp_path, sparsity):
    result = run(llama, tokens, tmp_path / "out", sparsity=sparsity, eval="none")
    masks = load_masks(tmp_path / "out" / "masks.safetensors")
    assert zeros(masks) == round(sparsity * sum(mask.size for mask in masks.values()))
    assert result.manifest["token_ppl"]["pruned"] is None


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "multiflow"])
@pytest.mark.parametrize("options", [{"allocation": "uniform"}, {"step": "block"}, {"step": "row"}])
def test_every_pruner_with_every_step(llama, tokens, tmp_path, pruner, options):
    result = run(llama, tokens, tmp_path / "out", pruner=pruner, eval="none", **options)
    scores = result.manifest["scores"]
    expected = {"uniform": (0, 0), "block": (2, 0), "row": (1, 3)}[options.get("step", "uniform")]
    assert (len(scores["block"]), len(scores["row"])) == expected
    assert (result.manifest["lambda_block"] is None) == (options != {"step": "block"})
    assert zeros(load_masks(tmp_path / "out" / "masks.safetensors")) == result.manifest["sparsity"]["zeros"]


def test_two_runs_and_every_candidate_batch_give_the_same_bytes(llama, tokens, tmp_path, finished):
    _, root = finished
    expected = (root / "out" / "masks.safetensors").read_bytes()
    for batch in (None, 1, 2, 3):
        out = tmp_path / f"batch{batch}"
        run(llama, tokens, out, candidate_batch=batch, eval="none")
        assert (out / "masks.safetensors").read_bytes() == expected, batch


def test_the_allocation_file_repeats_the_run_without_a_search(llama, tokens, tmp_path, finished):
    first, root = finished
    allocation = root / "out" / "allocation.json"
    again = run(llama, tokens, tmp_path / "out", allocation=str(allocation), sparsity=None, eval="none")
    assert again.manifest["scores"] == {"block": [], "row": []}
    assert again.manifest["sparsity"]["requested"] == 0.6
    assert again.masks.packed.keys() == first.masks.packed.keys()
    for name, packed in first.masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)


def test_an_allocation_file_moves_to_another_sparsity(llama, tokens, tmp_path, finished):
    _, root = finished
    allocation = root / "out" / "allocation.json"
    result = run(llama, tokens, tmp_path / "out", allocation=str(allocation), sparsity=0.5, eval="none")
    assert result.manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("lambdas", ["0.1", "0.01,0.02,0.05,0.1,0.2"])
def test_each_walk_function_is_traced_once(make_llama, tokens, tmp_path, blocks, lambdas):
    jax.clear_caches()
    model = make_llama(num_hidden_layers=blocks)
    result = run(model, tokens, tmp_path / "out", block_lambdas=lambdas, row_lambdas=lambdas, candidate_batch=2)
    walks = {"embed", "run", "input_sums", "prune", "apply_masks", "search", "align", "window_losses"}
    traces = result.manifest["traces"]
    assert set(traces) == walks
    # The stem sees two shapes, the search's batch and the walk's; everything that walks the blocks sees one.
    assert {name: traces[name] for name in walks - {"embed"}} == dict.fromkeys(walks - {"embed"}, 1)
    assert traces["embed"] <= 2


def test_reference_budget_misses_the_target_as_the_released_code_does(llama, tokens, tmp_path):
    result = run(llama, tokens, tmp_path / "out", budget="reference", allocation="uniform", eval="none")
    checkpoint = open_checkpoint(str(llama))
    per_block = sum(out * int(width * 0.6) for out, width in checkpoint.linear_shapes().values())
    assert result.manifest["sparsity"]["zeros"] == 3 * per_block
    assert result.manifest["options"]["block_lambdas"] == [0.05, 0.2]


def test_a_source_with_zeros_still_verifies(make_llama, tokens, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    from convert.masks_to_torch import verify

    model = make_llama(seed=5)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight[:, ::2] = 0
        loaded.model.layers[0].mlp.up_proj.weight[3] = 0
    loaded.save_pretrained(model)
    run(model, tokens, tmp_path / "out", sparsity=0.2, allocation="uniform", save_model=str(tmp_path / "model"))
    kept_zeros = read_masks(tmp_path / "out" / "masks.safetensors").kept_zeros
    assert kept_zeros["model.layers.1.mlp.up_proj.weight"] > 0
    verify(str(tmp_path / "model"), tmp_path / "out" / "masks.safetensors")


def test_orbax_gives_the_same_masks(llama, tokens, tmp_path, finished):
    from convert.hf_to_flax import convert

    first, _ = finished
    convert(str(llama), tmp_path / "flax")
    again = run(tmp_path / "flax", tokens, tmp_path / "out", save_model=str(tmp_path / "model"))
    assert again.manifest["hashes"]["model"] == first.manifest["hashes"]["model"]
    for name, packed in first.masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)
    saved = open_checkpoint(str(tmp_path / "model"))
    for name, mask in load_masks(tmp_path / "out" / "masks.safetensors").items():
        np.testing.assert_array_equal(saved.read(name), np.where(mask, open_checkpoint(str(llama)).read(name), 0))


def test_half_precision_checkpoints_prune_and_save_in_their_own_dtype(make_llama, tokens, tmp_path):
    model = make_llama(dtype="bfloat16")
    result = run(model, tokens, tmp_path / "out", dtype="bfloat16", save_model=str(tmp_path / "model"))
    saved = open_checkpoint(str(tmp_path / "model"))
    assert saved.dtype == "bfloat16"
    assert result.manifest["sparsity"]["achieved"] == pytest.approx(0.6, abs=1e-4)


def test_dry_run_reads_no_weights_and_writes_nothing(llama, tmp_path, monkeypatch, caplog):
    from neuroal_jax.tensors import SafetensorsSource

    def read(self, name):
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        result = neuroal_jax.prune(
            neuroal_jax.PruneConfig(model=str(llama), sparsity=0.7, dry_run=True, seqlen=16, out=str(tmp_path / "out"))
        )
    assert not (tmp_path / "out").exists()
    assert result.plan.candidate_batch == 14
    for expected in ("mlp.down_proj", "candidates per batch: 14", "device memory peak", "host memory peak", "bytes"):
        assert expected in caplog.text


def test_candidate_batch_bounds_the_plan(llama):
    config = {"model": str(llama), "sparsity": 0.7, "dry_run": True, "seqlen": 16}
    bounded = neuroal_jax.prune(neuroal_jax.PruneConfig(**config, candidate_batch=7)).plan
    free = neuroal_jax.prune(neuroal_jax.PruneConfig(**config)).plan
    assert bounded.candidate_batch == 7
    assert bounded.device_peak < free.device_peak


def test_planned_mask_bytes_are_the_written_ones(finished):
    result, _ = finished
    packed = sum(bits.nbytes for bits in result.masks.packed.values())
    weights = sum(info.size * 4 for info in open_checkpoint(str(finished[1] / "model")).source.infos.values())
    assert result.plan.output_bytes == packed + weights


def test_overwrite_replaces_a_run_and_keeps_other_files(llama, tokens, tmp_path):
    out = tmp_path / "out"
    run(llama, tokens, out, eval="none", allocation="uniform")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(neuroal_jax.UserError, match="already holds a result"):
        run(llama, tokens, out, eval="none", allocation="uniform", sparsity=0.5)
    assert json.loads((out / "manifest.json").read_text())["sparsity"]["requested"] == 0.6
    run(llama, tokens, out, eval="none", allocation="uniform", sparsity=0.5, overwrite=True)
    assert json.loads((out / "manifest.json").read_text())["sparsity"]["requested"] == 0.5
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_failure_in_the_middle_leaves_nothing(llama, tokens, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr("neuroal_jax.pipeline.save_masks", fail)
    with pytest.raises(neuroal_jax.UserError, match="No space left"):
        run(llama, tokens, tmp_path / "out", save_model=str(tmp_path / "model"), allocation="uniform")
    assert list(tmp_path.iterdir()) == []


def test_activations_that_overflow_are_named(make_llama, tokens, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = make_llama(seed=6)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    loaded.save_pretrained(model)
    with pytest.raises(neuroal_jax.UserError, match=r"block 1.*mlp\.down_proj.*not finite"):
        run(model, tokens, tmp_path / "out", eval="none", allocation="uniform")
    with pytest.raises(neuroal_jax.UserError, match="dense model's loss"):
        run(model, tokens, tmp_path / "out")


def test_trace_counter_counts(llama):
    before = block_ops.trace_counts["embed"]
    checkpoint = open_checkpoint(str(llama))
    from neuroal_jax.walk import Walk

    walk = Walk(checkpoint, "wanda", "float32", 1)
    for _ in range(2):
        walk.perplexity(np.zeros((1, 11), np.int32))
    assert block_ops.trace_counts["embed"] == before + 1
