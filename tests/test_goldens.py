"""`--budget reference` against what the released code computed for real models (skipped where the folder is absent)."""

import json

import numpy as np
import pytest

import neuroal_jax
from tests.conftest import DATA

MODELS = ("stories260k",)
PRUNERS, TOP_UPS = ("magnitude", "wanda", "multiflow"), ("uniform", "neuroal")


def cases():
    """Every recorded case that this version can run."""
    found = []
    for model in MODELS:
        path = DATA / "goldens" / model / "cases.json"
        for case in json.loads(path.read_text()) if path.is_file() else []:
            if case["method"] in PRUNERS and case.get("top_up") in TOP_UPS:
                name = case["masks"].removesuffix(".npz")
                found.append(pytest.param(case, id=f"{model}-{name}"))
    return found or [pytest.param(None, id="none")]


@pytest.mark.parametrize("case", cases())
def test_reference_run_equals_the_released_code(data, tmp_path, case):
    tokens = data / "tokens" / "stories-dev.npz"
    config = neuroal_jax.PruneConfig(
        model=str(data / "models" / case["model"]),
        out=str(tmp_path / "out"),
        sparsity=case["sparsity"],
        pruner=case["method"],
        allocation=case["top_up"],
        step=case["step"] or "both",
        budget="reference",
        calib=str(tokens),
        eval=str(tokens),
        nsamples=16,
    )
    result = neuroal_jax.prune(config)
    manifest = result.manifest
    if case["top_up"] == "neuroal":
        assert manifest["lambda_block"] == case["lambda_block"]
        assert manifest["lambda_row"] == case["lambda_row"]
        np.testing.assert_allclose(manifest["scores"]["block"], case["scores_block"], rtol=1e-5)
        np.testing.assert_allclose(manifest["scores"]["row"], case["scores_row"], rtol=1e-5)
    assert manifest["token_ppl"]["pruned"] == pytest.approx(case["token_ppl"], rel=1e-3)
    golden = np.load(data / "goldens" / case["model"] / case["masks"])
    wrong = total = 0
    for name, packed in result.masks.packed.items():
        block, linear = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        wrong += int(np.bitwise_count(packed ^ golden[f"{block}.{linear}"]).sum())
        total += len(packed) * result.masks.widths[name]
    assert wrong <= 1e-4 * total


def test_dense_perplexity_equals_the_released_code(data):
    from eval.perplexity import jax_perplexity

    windows = np.load(data / "tokens" / "stories-dev.npz")["evaluation"]
    value = jax_perplexity(str(data / "models" / "stories260k"), windows, "float32")
    assert value == pytest.approx(3.5783510208129883, rel=1e-5)


@pytest.mark.parametrize("model", ["tiny-opt", "tiny-phi", "tiny-mistral"])
def test_families_that_are_not_implemented_are_refused_by_name(data, model):
    from neuroal_jax.checkpoint import open_checkpoint

    with pytest.raises(neuroal_jax.UserError, match=f"model_type '{model.removeprefix('tiny-')}' is not supported"):
        open_checkpoint(str(data / "models" / model))
