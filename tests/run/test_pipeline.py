"""Whole runs: outputs, exact budgets, determinism, traces, reuse, resistance to failures."""

import itertools
import json
import logging
from dataclasses import replace
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import neuroal_jax
from neuroal_jax.checkpoint import open_checkpoint
from neuroal_jax.machine.programs import watched_traces
from neuroal_jax.masks import check_pruned, load_masks, read_masks
from neuroal_jax.walk import final, head_programs, programs
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.perplexity import perplexity
from tests.conftest import RUN, untraced


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out)}
    if options.get("pruner") == "sparsegpt":
        config["sparsegpt_group"] = 24  # two or three groups
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
    for step, lambdas in {"block": (0.05, 0.2), "row": (0.0, 0.1, 0.2)}.items():
        scores = manifest["scores"][step]
        assert manifest["candidates"][step] == [
            {"lambda": strength, "score": score} for strength, score in zip(lambdas, scores, strict=True)
        ]
        assert manifest["chosen"][step] == {"lambda": lambdas[int(np.argmin(scores))]}
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


def test_several_texts_are_measured_one_by_one(finished, llama, tokens, tmp_path):
    np.save(tmp_path / "other.npy", np.load(tokens)["calibration"])
    options = {"allocation": str(finished[1] / "out" / "allocation.json"), "eval": f"{tokens},{tmp_path}/other.npy"}
    measured = run(llama, tokens, tmp_path / "out", **options).manifest
    token_ppl = measured["token_ppl"]
    first, second = token_ppl["texts"].values()
    assert list(token_ppl["texts"]) == ["tokens.npz", "other.npy"]
    assert (token_ppl["dense"], token_ppl["pruned"]) == (first["dense"], first["pruned"])
    assert finished[0].manifest["token_ppl"]["pruned"] == first["pruned"]
    assert (first["windows"], second["windows"]) == (5, 6)
    alone = run(llama, tokens, tmp_path / "alone", **{**options, "eval": f"{tmp_path}/other.npy"}).manifest
    assert alone["token_ppl"]["pruned"] == second["pruned"] != first["pruned"]


def test_the_alignment_of_the_winner_adds_up_to_its_score(finished, llama, tokens, tmp_path):
    def total(manifest):
        return sum(value for block in manifest["alignment"] for value in block.values())

    manifest = finished[0].manifest
    assert total(manifest) == pytest.approx(min(manifest["scores"]["row"]), rel=1e-12)
    linears = [linear.name for linear in open_checkpoint(str(llama)).family.linears]
    assert [list(block) for block in manifest["alignment"]] == [linears] * 3
    block_only = run(llama, tokens, tmp_path / "out", step="block", eval="none").manifest
    assert total(block_only) == pytest.approx(min(block_only["scores"]["block"]), rel=1e-12)
    assert run(llama, tokens, tmp_path / "u", allocation="uniform", eval="none").manifest["alignment"] is None


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


STEPS = ({"step": "block"}, {"step": "row"}, {"allocation": "uniform"})
QUICK = [("magnitude", STEPS[0]), ("wanda", STEPS[1]), ("multiflow", STEPS[2])]


@pytest.mark.parametrize(
    ("pruner", "options"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(("magnitude", "wanda", "multiflow"), STEPS)
    ],
)
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


@pytest.mark.parametrize(
    ("blocks", "lambdas"),
    [
        (2, "0.01,0.02,0.05,0.1,0.2"),
        (4, "0.1"),
        pytest.param(2, "0.1", marks=pytest.mark.slow),
        pytest.param(4, "0.01,0.02,0.05,0.1,0.2", marks=pytest.mark.slow),
    ],
)
def test_each_walk_function_is_traced_once(make_llama, tokens, tmp_path, blocks, lambdas):
    model = make_llama(num_hidden_layers=blocks, **untraced(100 + 10 * blocks + lambdas.count(",")))
    result = run(model, tokens, tmp_path / "out", block_lambdas=lambdas, row_lambdas=lambdas, candidate_batch=2)
    walks = {"add_statistics", "prune", "add_logits", "dense_run", "dense_runs"}
    walks |= {"prune_candidates", "compare", "compare_last"}
    traces = dict(result.manifest["traces"])
    # These do not depend on the model's config: an earlier test's may serve. Calibration, search and evaluation have a
    # shape each; no more than these are embedded, and a block only runs on the first and the last of them.
    assert traces.pop("apply_masks", 1) == 1
    assert traces.pop("window_losses", 1) == 1
    assert traces.pop("embed", 1) <= 3
    assert traces.pop("run") == 2
    assert traces == dict.fromkeys(walks, 1)


def test_reference_budget_misses_the_target_as_the_released_code_does(llama, tokens, tmp_path):
    result = run(llama, tokens, tmp_path / "out", budget="reference", allocation="uniform", eval="none")
    checkpoint = open_checkpoint(str(llama))
    per_block = sum(out * int(width * 0.6) for out, width in checkpoint.linear_shapes().values())
    assert result.manifest["sparsity"]["zeros"] == 3 * per_block
    assert result.manifest["options"]["block_lambdas"] == [0.05, 0.2]


@pytest.fixture(scope="module")
def sparse_llama(make_llama):
    """A model with zeros: a third of its weights, unevenly, whole rows, half of a linear, negative ones."""
    model = make_llama(seed=5)
    tensors = load_file(model / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in open_checkpoint(str(model)).prunable():
        tensors[name][rng.random(tensors[name].shape) < rng.random((len(tensors[name]), 1)) * 0.6] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:, ::2] = -0.0
    tensors["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def zeros_in(model):
    checkpoint = open_checkpoint(str(model))
    return {name: checkpoint.read(name) == 0 for name in checkpoint.prunable()}


@pytest.mark.parametrize(
    "options",
    [
        {"pruner": "magnitude", "allocation": "uniform", "sparsity": 0.35},
        {"pruner": "wanda", "step": "both"},
        {"pruner": "multiflow", "allocation": "uniform", "refine": "dsnot"},
        {"pruner": "sparsegpt", "step": "block"},
        {"pruner": "wanda", "allocation": "uniform", "refine": "dsnot+refit"},
    ],
    ids=lambda options: options.get("refine", options["pruner"]),
)
def test_the_exact_budget_counts_the_zeros_that_are_written(sparse_llama, tokens, tmp_path, options):
    from convert.masks_to_torch import verify

    before = zeros_in(sparse_llama)
    sparsity = run(sparse_llama, tokens, tmp_path / "out", save_model=str(tmp_path / "model"), **options).manifest[
        "sparsity"
    ]
    after = zeros_in(tmp_path / "model")
    assert sparsity["zeros"] == sum(int(zero.sum()) for zero in after.values())
    assert sparsity["zeros"] == round(sparsity["requested"] * sparsity["prunable"]) == sparsity["pruned"]
    assert sparsity["source_zeros"] == sum(int(zero.sum()) for zero in before.values()) > 0.3 * sparsity["prunable"]
    assert all((after[name] | ~zero).all() for name, zero in before.items())  # no zero comes back
    masks = read_masks(tmp_path / "out" / "masks.safetensors")
    assert not masks.kept_zeros
    assert all((masks.mask(name) == ~zero).all() for name, zero in after.items())
    verify(str(tmp_path / "model"), tmp_path / "out" / "masks.safetensors", load=False)


def test_fewer_zeros_than_the_model_has_are_refused_before_anything_is_computed(
    sparse_llama, tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr("neuroal_jax.run.pipeline.compute", None)
    with pytest.raises(neuroal_jax.UserError, match=r"--sparsity 0.2 leaves \d+ zeros, but \d+ of the model's"):
        run(sparse_llama, tokens, tmp_path / "out", sparsity=0.2)
    assert not list(tmp_path.iterdir())


def test_a_reference_budget_on_a_source_with_zeros_tells_both_numbers(sparse_llama, tokens, tmp_path, caplog):
    from convert.masks_to_torch import verify

    with caplog.at_level(logging.INFO, "neuroal_jax"):
        options = {"budget": "reference", "allocation": "uniform", "sparsity": 0.2, "pruner": "magnitude"}
        result = run(sparse_llama, tokens, tmp_path / "out", save_model=str(tmp_path / "model"), **options)
    sparsity, masks = result.manifest["sparsity"], read_masks(tmp_path / "out" / "masks.safetensors")
    found = {name: int(zero.sum()) for name, zero in zeros_in(tmp_path / "model").items()}
    assert sparsity["zeros"] == sum(found.values())
    assert sparsity["pruned"] == masks.zeros() < sparsity["source_zeros"]
    assert sparsity["zeros"] - sparsity["pruned"] == sum(masks.kept_zeros.values())
    assert sparsity["achieved"] == sparsity["zeros"] / sparsity["prunable"]
    per_linear = result.manifest["zeros_per_linear"]
    assert {
        f"model.layers.{number}.{name}.weight": n
        for number, block in enumerate(per_linear)
        for name, n in block.items()
    } == found
    before = f"of these zeros, {sparsity['source_zeros']} were in the model before; the masks prune {masks.zeros()}"
    assert before in caplog.text
    verify(str(tmp_path / "model"), tmp_path / "out" / "masks.safetensors", load=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_below_the_smallest_normal_number_are_no_zeros(make_llama, tokens, tmp_path, dtype):
    from convert.masks_to_torch import verify

    model = make_llama(dtype=dtype, seed=7)
    tensors = load_file(model / "model.safetensors")
    smallest = ml_dtypes.finfo(np.dtype(dtype)).smallest_subnormal
    rng = np.random.default_rng(0)
    for name in open_checkpoint(str(model)).prunable():
        tiny = rng.random(tensors[name].shape) < 0.7
        tensors[name][tiny] = (rng.integers(1, 90, tiny.sum()) * np.float32(smallest)).astype(dtype)
        tensors[name][rng.random(tensors[name].shape) < 0.2] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = {"allocation": "uniform", "save_model": str(tmp_path / "model"), "eval": "none"}
    sparsity = run(model, tokens, tmp_path / "out", sparsity=0.5, **options).manifest["sparsity"]
    saved, masks = open_checkpoint(str(tmp_path / "model")), load_masks(tmp_path / "out" / "masks.safetensors")
    zeros = 0
    for name, mask in masks.items():
        stored = saved.read(name)
        zeros += int((stored == 0).sum())
        expected = np.where(mask, tensors[name], tensors[name].dtype.type(0))
        np.testing.assert_array_equal(stored.view(np.uint8), expected.view(np.uint8))
    assert zeros == sparsity["zeros"] == round(0.5 * sparsity["prunable"])
    verify(str(tmp_path / "model"), tmp_path / "out" / "masks.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_an_update_would_round_to_zero_is_stored_as_a_number(dtype):
    exact = np.float32([[1e-46, -1e-9, 0.5, 0.0, -0.0]])
    stored = exact.astype(dtype)
    kept = np.array([[True, True, True, False, True]])
    final._keep_nonzero(stored, kept, exact)
    assert ((stored != 0) == kept).all()
    assert (np.signbit(stored) == np.signbit(exact)).all()
    assert float(abs(stored[0, 0])) < 1e-7


def test_orbax_gives_the_same_masks(llama, tokens, tmp_path, finished, monkeypatch):
    from convert.hf_to_flax import convert

    first, _ = finished
    convert(str(llama), tmp_path / "flax")
    monkeypatch.chdir(tmp_path)
    again = run("flax", tokens, tmp_path / "out", save_model=str(tmp_path / "model"))  # a relative path will do
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
    from neuroal_jax.checkpoint.safetensors import SafetensorsSource

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
    config = {"model": str(llama), "sparsity": 0.7, "dry_run": True, "seqlen": 16, "nsamples": 8, "eval": "none"}
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


def test_a_full_disk_leaves_nothing_but_the_state_to_go_on_from(llama, tokens, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    options = {"save_model": str(tmp_path / "model"), "allocation": "uniform", "pruner": "magnitude", "eval": "none"}
    with monkeypatch.context() as patch, pytest.raises(neuroal_jax.UserError, match="No space left"):
        patch.setattr("neuroal_jax.run.pipeline.save_masks", fail)
        run(llama, tokens, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]
    run(llama, tokens, tmp_path / "out", **options, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "model", ".model.neuroal-files.json"}


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
    with pytest.raises(neuroal_jax.UserError, match=r"block 1.*mlp\.down_proj.*not finite"):
        run(model, tokens, tmp_path / "out")


def test_traces_are_told_once_with_what_they_were_for(llama):
    blocks = Blocks(open_checkpoint(str(llama)), "float32", 1)
    with watched_traces() as traces:
        for _ in range(2):
            perplexity(blocks, np.zeros((1, 11), np.int32))
    expected = {"embed": programs.embed, "run": programs.run}
    expected |= {"add_logits": head_programs.add_logits, "window_losses": head_programs.window_losses}
    assert {trace.name: trace.compiled for trace in traces} == expected
    assert len(traces) == 4
    hidden = traces[1].arguments[-1]
    assert (hidden.shape, hidden.dtype) == ((1, 11, 32), np.float32)


@pytest.fixture(scope="module")
def sparsegpt(llama, tokens, tmp_path_factory):
    """One run with SparseGPT, which saves its model without being asked."""
    root = tmp_path_factory.mktemp("sparsegpt")
    return run(llama, tokens, root / "out", pruner="sparsegpt"), root / "out"


def test_sparsegpt_saves_the_model_that_it_measured(sparsegpt, llama, tokens):
    from convert.masks_to_torch import verify
    from eval.perplexity import torch_perplexity

    result, out = sparsegpt
    assert sorted(path.name for path in out.iterdir()) == [
        "allocation.json",
        "manifest.json",
        "masks.safetensors",
        "model",
        "report.html",
    ]
    assert result.manifest["options"]["save_model"] == str(out / "model")
    verify(str(out / "model"), out / "masks.safetensors")
    windows = np.load(tokens)["evaluation"]
    measured = torch_perplexity(str(out / "model"), windows, "float32")
    assert measured == pytest.approx(result.manifest["token_ppl"]["pruned"], rel=1e-4)
    masks, source, saved = (
        load_masks(out / "masks.safetensors"),
        open_checkpoint(str(llama)),
        open_checkpoint(str(out / "model")),
    )
    changed = [(saved.read(name) != source.read(name))[mask].mean() for name, mask in masks.items()]
    assert min(changed) > 0.2


def test_sparsegpt_searches_the_block_step_only_and_says_so(llama, tokens, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        result = run(llama, tokens, tmp_path / "out", pruner="sparsegpt", eval="none")
    assert "the search goes on with --step block" in caplog.text
    assert result.manifest["options"]["step"] == "block"
    assert result.manifest["asked"]["step"] == "both"
    assert (len(result.manifest["scores"]["block"]), result.manifest["scores"]["row"]) == (2, [])
    assert result.manifest["lambda_row"] is None


def test_the_manifest_records_every_damping(sparsegpt, llama):
    linears = list(open_checkpoint(str(llama)).linear_shapes())
    assert sparsegpt[0].manifest["damping"] == [dict.fromkeys(linears, 0.01)] * 3


def test_a_hessian_that_needs_more_damping_is_recorded_and_told(make_llama, tokens, tmp_path, monkeypatch, caplog):
    def climb(ladder):
        for module in ("numerics.cholesky", "walk.blocks", "walk.final", "run.console"):
            monkeypatch.setattr(f"neuroal_jax.{module}.DAMPING", ladder)

    # Programs are kept by shape: each ladder has its own, which no other test uses.
    model = make_llama(intermediate_size=57)
    climb((-1.0, 0.3))
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        result = run(model, tokens, tmp_path / "out", pruner="sparsegpt", allocation="uniform", eval="none")
    assert {value for block in result.manifest["damping"] for value in block.values()} == {0.3}
    assert "21 of 21 linears took more than the damping" in caplog.text
    model = make_llama(intermediate_size=58)
    climb((-1.0,))
    for allocation in ("uniform", "neuroal"):
        with pytest.raises(neuroal_jax.UserError, match=r"block 0: the Hessian of attention_input has no finite"):
            run(model, tokens, tmp_path / "bad", pruner="sparsegpt", allocation=allocation, eval="none")
    assert not (tmp_path / "bad").exists()


def test_masks_of_sparsegpt_cannot_be_applied_to_the_dense_model(sparsegpt, llama, tmp_path):
    from convert.masks_to_torch import save_pruned

    with pytest.raises(neuroal_jax.UserError, match="its pruner changed the kept weights too"):
        save_pruned(str(llama), sparsegpt[1] / "masks.safetensors", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_sparsegpt_keeps_the_dtype_of_the_checkpoint(make_llama, tokens, tmp_path):
    model = make_llama(dtype="bfloat16")
    result = run(model, tokens, tmp_path / "out", pruner="sparsegpt", allocation="uniform", dtype="float32")
    saved = open_checkpoint(str(tmp_path / "out" / "model"))
    assert saved.dtype == "bfloat16"
    check_pruned(result.masks, saved.source, "saved")
    ids = np.load(tokens)["evaluation"]
    measured = perplexity(Blocks(saved, "float32", len(ids)), ids)
    assert measured == pytest.approx(result.manifest["token_ppl"]["pruned"], rel=1e-5)


def test_sparsegpt_does_not_depend_on_batches(llama, tokens, tmp_path, monkeypatch, sparsegpt):
    monkeypatch.setattr(
        "neuroal_jax.walk.blocks._BATCH_TOKENS", 64
    )  # 4 sequences at a time, of 6: the last batch is filled up
    again = run(llama, tokens, tmp_path / "out", pruner="sparsegpt")
    for name, packed in sparsegpt[0].masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)


def test_an_allocation_that_lists_rows_is_not_for_sparsegpt(llama, tokens, tmp_path, finished, sparsegpt):
    rows, blocks = (str(place / "allocation.json") for place in (finished[1] / "out", sparsegpt[1]))
    with pytest.raises(neuroal_jax.UserError, match="lists rows, but --pruner sparsegpt"):
        run(llama, tokens, tmp_path / "out", pruner="sparsegpt", allocation=rows)
    again = run(llama, tokens, tmp_path / "out", pruner="sparsegpt", allocation=blocks, eval="none")
    for name, packed in sparsegpt[0].masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)


@pytest.mark.parametrize(("allocation", "measured"), [("owl", "outliers"), ("alpha", "alphas")])
def test_the_manifest_tells_what_an_allocation_rests_on(llama, tokens, tmp_path, allocation, measured):
    options = {"owl_m": 2.5} if allocation == "owl" else {}
    result = run(llama, tokens, tmp_path / "out", allocation=allocation, eval="none", refine="dsnot", **options)
    values = result.manifest["measured"][measured]
    sparsities = [block["mlp.up_proj"] for block in result.allocation.blocks]
    order = np.argsort(values) if allocation == "alpha" else np.argsort(values)[::-1]
    assert np.argsort(sparsities).tolist() == order.tolist()
    assert read_masks(tmp_path / "out" / "masks.safetensors").metadata["method"] == f"wanda + {allocation} + dsnot"
    again = run(
        llama,
        tokens,
        tmp_path / "again",
        allocation=str(tmp_path / "out" / "allocation.json"),
        eval="none",
        refine="dsnot",
    )
    for name, packed in result.masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)


def test_an_allocation_of_alpha_above_one_can_be_read_back(llama, tokens, tmp_path, monkeypatch):
    alphas = itertools.cycle([1.0, 3.0, 2.0])  # of the model's blocks
    monkeypatch.setattr("neuroal_jax.allocation.alpha.block_alpha", lambda *block: next(alphas))
    options = {"sparsity": 0.8, "budget": "reference", "eval": "none"}
    first = run(llama, tokens, tmp_path / "out", allocation="alpha", **options)
    assert max(block["mlp.up_proj"] for block in first.allocation.blocks) > 1
    again = run(llama, tokens, tmp_path / "again", allocation=str(tmp_path / "out" / "allocation.json"), **options)
    for name, packed in first.masks.packed.items():
        np.testing.assert_array_equal(again.masks.packed[name], packed)
    with pytest.raises(neuroal_jax.UserError, match="released code fails there"):
        run(llama, tokens, tmp_path / "x", allocation="alpha", pruner="sparsegpt", **options)
    exact = run(llama, tokens, tmp_path / "y", allocation="alpha", pruner="sparsegpt", sparsity=0.8, eval="none")
    assert max(block["mlp.up_proj"] for block in exact.allocation.blocks) <= 0.99
    assert exact.manifest["sparsity"]["zeros"] == round(0.8 * exact.manifest["sparsity"]["prunable"])


def test_dsnot_changes_the_attention_only(llama, tokens, tmp_path):
    plain = run(llama, tokens, tmp_path / "plain", allocation="uniform", eval="none")
    refined = run(
        llama, tokens, tmp_path / "refined", allocation="uniform", eval="none", refine="dsnot", dsnot_threshold=0
    )
    first = {name: bits for name, bits in plain.masks.packed.items() if "layers.0." in name}
    changed = {name for name, bits in first.items() if (refined.masks.packed[name] != bits).any()}
    assert changed
    assert all("self_attn" in name for name in changed)
    for name in plain.masks.packed:
        np.testing.assert_array_equal(refined.masks.mask(name).sum(axis=1), plain.masks.mask(name).sum(axis=1))


def test_an_overwritten_run_leaves_no_model_of_the_old_masks(llama, tokens, tmp_path):
    options = {"allocation": "uniform", "eval": "none"}
    run(llama, tokens, tmp_path / "out", pruner="sparsegpt", **options)
    with pytest.raises(neuroal_jax.UserError, match="already holds a result"):
        run(llama, tokens, tmp_path / "out", pruner="sparsegpt", **options)
    first = (tmp_path / "out/model/model.safetensors").read_bytes()
    run(llama, tokens, tmp_path / "out", pruner="sparsegpt", sparsity=0.5, overwrite=True, **options)
    assert (tmp_path / "out/model/model.safetensors").read_bytes() != first
    run(llama, tokens, tmp_path / "out", allocation="uniform", eval="none", overwrite=True)
    assert not (tmp_path / "out/model").exists()


def test_a_directory_of_the_user_is_not_taken_for_the_model(llama, tokens, tmp_path):
    (tmp_path / "out/model").mkdir(parents=True)
    (tmp_path / "out/model/notes.txt").write_text("mine")
    with pytest.raises(neuroal_jax.UserError, match="exists already"):
        run(llama, tokens, tmp_path / "out", pruner="sparsegpt", allocation="uniform", eval="none")
    run(llama, tokens, tmp_path / "out", allocation="uniform", eval="none")
    run(llama, tokens, tmp_path / "out", allocation="uniform", eval="none", overwrite=True)
    assert (tmp_path / "out/model/notes.txt").read_text() == "mine"


def test_updated_weights_that_the_dtype_cannot_hold_are_named(make_llama, tokens, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = make_llama(seed=8, dtype="float16")
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[2].mlp.down_proj.weight.uniform_(-1, 1).sign_().mul_(65000)
    loaded.save_pretrained(model)
    with pytest.raises(neuroal_jax.UserError, match=r"layers\.2\.mlp\.down_proj\.weight.*not finite in float16"):
        run(model, tokens, tmp_path / "out", pruner="sparsegpt", allocation="uniform", eval="none")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_token_files_knows_their_length(llama, tokens):
    config = {"model": str(llama), "sparsity": 0.7, "dry_run": True, "calib": str(tokens), "eval": str(tokens)}
    found = neuroal_jax.prune(neuroal_jax.PruneConfig(**config)).plan
    given = neuroal_jax.prune(neuroal_jax.PruneConfig(**config, seqlen=16)).plan
    assert found == replace(given, device_available=found.device_available)
    with pytest.raises(neuroal_jax.UserError, match="no such file"):
        neuroal_jax.prune(neuroal_jax.PruneConfig(**{**config, "eval": "missing.npz"}))
