"""`--budget reference` against what the released code computed for real models.

One of them is in this repository; the others are looked for in the folder NEUROAL_DATA.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import neuroal_jax
from tests.conftest import DATA

STORIES = Path(__file__).parent / "data" / "stories260k"


class Recorded(NamedTuple):
    """Where a model is, its token ids, and what was recorded for them."""

    model: Path
    tokens: Path
    goldens: Path


RECORDED = {"stories260k": Recorded(STORIES / "model", STORIES / "tokens.npz", STORIES / "goldens")} | {
    model: Recorded(DATA / "models" / model, DATA / "tokens" / "bpe-dev.npz", DATA / "goldens" / model)
    for model in ("tiny-opt", "tiny-phi", "tiny-mistral")
}
# Each pruner and each top-up; all others are slow.
QUICK = [
    "magnitude-alpha-both-70.npz",
    "wanda-neuroal-both-70.npz",
    "multiflow-dsnot-both-60.npz",
    "sparsegpt-owl-both-70.npz",
]


def is_chaotic(case):
    """Whether a rounding error may change what comes after it, so that up to 0.3% of the bits differ.

    One weight of SparseGPT on the other side of a threshold changes all that are updated after it. On the undertrained
    models some cases have one early, and which ones depends on how a processor rounds: on one machine these were three
    of eighteen, on another one two others too. Under DSnoT one case goes another way from two MultiFlow scores in one
    row of block 2 whose difference is 2e-7 of them.
    """
    if case["method"] == "sparsegpt":
        return case["model"] != "stories260k"
    return (case["model"], case["masks"]) == ("tiny-mistral", "multiflow-dsnot-both-60.npz")


def recorded_cases(model):
    """What was recorded for a model; skips the test where that is absent."""
    path = RECORDED[model].goldens / "cases.json"
    if not path.is_file():
        pytest.skip(f"no {path}: set NEUROAL_DATA to the folder of real models and goldens")
    return json.loads(path.read_text())


def cases():
    """Every recorded case of pruning; those that run the same compiled programs follow each other."""
    found = []
    for model, recorded in RECORDED.items():
        path = recorded.goldens / "cases.json"
        pruned = [case for case in json.loads(path.read_text()) if case["method"] != "dense"] if path.is_file() else []
        for case in sorted(pruned, key=lambda case: (case["method"], case["top_up"], case["step"] or "")):
            quick = model == "stories260k" and case["masks"] in QUICK
            name = f"{model}-{case['masks'].removesuffix('.npz')}"
            found.append(pytest.param(case, id=name, marks=() if quick else pytest.mark.slow))
    return found


def check_scores(scores, expected, case):
    """All within 1e-5; on the undertrained models one candidate of a step may differ by up to 1e-3.

    There a single row can sit on a rounding boundary of `int(float32(1 - s) * in)`, or a pair of Wanda scores be closer
    than fp32 tells apart, and one weight more or less moves that candidate's score by some 1e-5 to 1e-4. With SparseGPT
    a weight that falls on the other side of the threshold changes all that come after it: some candidates differ by up
    to 1e-2.
    """
    assert len(scores) == len(expected)
    errors = np.abs(np.array(scores) / np.array(expected) - 1)
    if case["method"] == "sparsegpt":
        assert errors.max(initial=0) < 2e-2
        assert not scores or np.median(errors) < (2e-3 if is_chaotic(case) else 1e-3)
    else:
        assert (errors > 1e-5).sum() <= (case["model"] != "stories260k")
        assert errors.max(initial=0) < 1e-3


def check_allocation(allocation, expected):
    """Every linear within 1e-5; the record has the mean, least and largest row where rows differ.

    Under grouped-query attention its numbers are of as many rows as there are queries, of which k and v use the first:
    there only the range can be compared.
    """
    for key, value in expected.items():
        linear, block = key.rsplit("-", 1)
        rows = np.atleast_1d(allocation.blocks[int(block)][linear])
        queries = np.atleast_1d(allocation.blocks[int(block)]["self_attn.q_proj"])
        if isinstance(value, dict) and linear[-6:] in ("k_proj", "v_proj") and len(rows) < len(queries):
            assert value["min"] - 1e-5 <= rows.min() <= rows.max() <= value["max"] + 1e-5, key
            continue
        recorded = value if isinstance(value, dict) else dict.fromkeys(("mean", "min", "max"), value)
        found = {"mean": rows.mean(), "min": rows.min(), "max": rows.max()}
        assert found == pytest.approx(recorded, abs=1e-5), key


def reference_run(case, out, **options):
    recorded = RECORDED[case["model"]]
    dsnot = {"refine": "dsnot", "dsnot_cycles": 20} if case["top_up"] == "dsnot" else {}
    config = neuroal_jax.PruneConfig(
        model=str(recorded.model),
        out=str(out),
        sparsity=case["sparsity"],
        pruner=case["method"],
        allocation="uniform" if dsnot else case["top_up"],
        step=case["step"] or "both",
        budget="reference",
        calib=str(recorded.tokens),
        eval=str(recorded.tokens),
        nsamples=16,
        **{**dsnot, **options},
    )
    return neuroal_jax.prune(config)


def wrong_bits(result, golden):
    """The share of mask bits that differ."""
    wrong = total = 0
    for name, packed in result.masks.packed.items():
        block, linear = name.split("layers.")[1].removesuffix(".weight").split(".", 1)
        wrong += int(np.bitwise_count(packed ^ golden[f"{block}.{linear}"]).sum())
        total += len(packed) * result.masks.widths[name]
    return wrong / total


@pytest.mark.parametrize("case", cases())
def test_reference_run_equals_the_released_code(tmp_path, case):
    result = reference_run(case, tmp_path / "out")
    manifest, chaotic = result.manifest, is_chaotic(case)
    check_scores(manifest["scores"]["block"], case["scores_block"], case)
    check_scores(manifest["scores"]["row"], case["scores_row"], case)
    if chaotic and manifest["lambda_block"] != case["lambda_block"]:
        # Two candidates closer than that noise: ours must be as good by the record. Then prune with the recorded one.
        ours = case["scores_block"][int(np.argmin(manifest["scores"]["block"]))]
        assert ours < 1.005 * min(case["scores_block"])
        result = reference_run(case, tmp_path / "again", block_lambdas=(case["lambda_block"],))
    assert result.manifest["lambda_block"] == case["lambda_block"]
    assert result.manifest["lambda_row"] == case["lambda_row"]
    check_allocation(result.allocation, case["allocation"])
    exactness = (1e-2, 1e-3) if chaotic or case["method"] == "sparsegpt" else (1e-3, 1e-4)
    assert result.manifest["token_ppl"]["pruned"] == pytest.approx(case["token_ppl"], rel=exactness[0])
    golden = np.load(RECORDED[case["model"]].goldens / case["masks"])
    assert wrong_bits(result, golden) <= (4e-3 if chaotic else exactness[1])


@pytest.mark.parametrize("model", RECORDED)
def test_dense_perplexity_equals_the_released_code(model):
    from eval.perplexity import jax_perplexity

    (dense,) = [case["token_ppl"] for case in recorded_cases(model) if case["method"] == "dense"]
    windows = np.load(RECORDED[model].tokens)["evaluation"].astype(np.int32)
    assert jax_perplexity(str(RECORDED[model].model), windows, "float32") == pytest.approx(dense, rel=1e-5)
