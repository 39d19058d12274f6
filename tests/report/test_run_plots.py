"""The plots of a run: their numbers are the manifest's, whichever version wrote it."""

import json
import math
import re

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.report import run_report
from neuroal_jax.report.recorded import per_linear, recorded_candidates
from neuroal_jax.report.run_plots import run_sections
from neuroal_jax.search.lambdas import lambdas_for
from tests.report.reports import figure, trace

PLOTS = ("perplexity", "block-sparsity", "linear-sparsity", "row-sparsity", "alignment")


@pytest.fixture
def sections(run):
    return {section.name: section for section in run_sections(*run[1:])}


def test_figures_hold_the_numbers_of_the_manifest(run, sections):
    _, manifest, _ = run
    assert set(sections) == {*PLOTS, "scores-0", "scores-1", "seconds"}
    token_ppl = manifest["token_ppl"]
    assert figure(sections, "perplexity").data[0].x == (token_ppl["dense"], token_ppl["pruned"])
    assert figure(sections, "seconds").data[0].x == tuple(manifest["seconds"].values())
    for name, step, lambdas in (("scores-0", "block", [0.1, 0.05]), ("scores-1", "row", [0.0, 0.1, 0.2])):
        shown, scores = figure(sections, name), manifest["scores"][step]
        assert shown.layout.xaxis.title.text == "lambda"
        candidates, winner = trace(shown, "candidates"), trace(shown, "winner")
        assert dict(zip(candidates["x"], candidates["y"], strict=True)) == dict(zip(lambdas, scores, strict=True))
        assert candidates.x == tuple(sorted(lambdas))
        assert (winner.x, winner.y) == ((manifest[f"lambda_{step}"],), (min(scores),))
    for line in figure(sections, "alignment").data:
        assert line.y == tuple(block[line.name] for block in manifest["alignment"])
    heat = figure(sections, "linear-sparsity").data[0]
    for linear, values in zip(heat["y"], heat["z"], strict=True):
        size = math.prod(manifest["linears"][linear])
        assert list(values) == [block[linear] / size for block in manifest["zeros_per_linear"]]
    masks = neuroal_jax.load_masks(run[0] / "masks.safetensors")
    assert per_linear({name: int((~mask).sum()) for name, mask in masks.items()}) == manifest["zeros_per_linear"]


def test_block_sparsities_weigh_linears_by_their_size(run, sections):
    _, manifest, _ = run
    shown, total = figure(sections, "block-sparsity"), sum(map(math.prod, manifest["linears"].values()))
    zeros = [sum(block.values()) for block in manifest["zeros_per_linear"]]
    assert sum(zeros) == manifest["sparsity"]["zeros"]
    assert trace(shown, "achieved")["y"] == pytest.approx([count / total for count in zeros], abs=1e-12)
    assert trace(shown, "allocated")["y"] == pytest.approx(trace(shown, "achieved")["y"], abs=1e-3)
    assert trace(shown, "asked").y == (0.7, 0.7)


def test_row_distributions_are_quantiles_of_the_allocation(run, sections):
    _, _, allocation = run
    blocks = per_linear(allocation["sparsity"])
    shown = sections["row-sparsity"].figures
    assert set(shown) == {linear for block in blocks for linear, value in block.items() if isinstance(value, list)}
    for linear, plot in shown.items():
        boxes, ends = plot.data
        for number, block in enumerate(blocks):
            assert boxes["median"][number] == np.median(block[linear])
            assert boxes["q3"][number] == np.quantile(block[linear], 0.75)
            assert ends["y"][number] == np.min(block[linear])
            assert ends["y"][len(blocks) + number] == np.max(block[linear])


def test_what_a_run_lacks_is_told_in_a_sentence(run):
    _, manifest, allocation = run
    lean = json.loads(json.dumps(manifest))
    lean |= {"candidates": {}, "chosen": {}, "alignment": None}
    lean["token_ppl"] |= {"dense": None, "pruned": None, "texts": {}}
    lean["options"] |= {"allocation": "owl", "eval": "none"}
    lean["data"]["eval"] = lean["hashes"]["eval"] = None
    lean["measured"] = {"outliers": [5.5, 2.25, 1.0, 0.5, 0.125]}
    del lean["linears"], lean["zeros_per_linear"]
    flat = {**allocation, "sparsity": dict.fromkeys(allocation["sparsity"], 0.7)}
    sections = {section.name: section for section in run_sections(lean, flat)}
    for name in (*PLOTS, "scores-0"):
        assert sections[name].figures == {}, name
        assert re.match("Not |No ", sections[name].sentence), name
    assert figure(sections, "measured-0").data[0].y == tuple(lean["measured"]["outliers"])
    assert "Not measured: the run had --eval none." in run_report(lean, flat)
    lean.pop("alignment")
    assert "only a search compares activations" in run_report(lean, flat)


def test_every_text_has_its_bars(run):
    _, manifest, allocation = run
    texts = {name: {**manifest["token_ppl"]["texts"]["demo"], "dense": 1.5, "pruned": 2.5} for name in ("a", "b")}
    several = {**manifest, "token_ppl": {**manifest["token_ppl"], "texts": texts}}
    (bars,) = figure({"perplexity": run_sections(several, allocation)[0]}, "perplexity").data
    assert bars.y == ("a, dense", "a, pruned", "b, dense", "b, pruned")
    assert bars.x == (1.5, 2.5, 1.5, 2.5)


def score_plots(manifest, allocation):
    """The section of every step, and the points and the winner of each that was searched."""
    sections = [section for section in run_sections(manifest, allocation) if section.name.startswith("scores")]
    points = [(line.x, line.y) for section in sections for plot in section.figures.values() for line in plot.data]
    return sections, points


def older(manifest, **options):
    """The manifest as earlier versions wrote it: scores without their lambdas."""
    left = {name: value for name, value in manifest.items() if name not in ("candidates", "chosen")}
    return {**left, "options": {**manifest["options"], **options}}


def test_a_row_step_alone_tells_the_score_of_its_base(run):
    _, manifest, allocation = run
    candidates = {**manifest["candidates"], "block": [{"lambda": None, "score": 0.125}]}
    alone = {**manifest, "candidates": candidates, "chosen": {"row": manifest["chosen"]["row"]}}
    alone |= {"lambda_block": None, "scores": {**manifest["scores"], "block": [0.125]}}
    for version in (alone, older(alone, step="row")):
        (block, row), points = score_plots(version, allocation)
        assert block.sentence == "Not searched: the later steps started from what scored 0.125."
        assert not block.figures
        assert len(points) == 2
        assert sorted(trace(row.figures[""], "candidates").y) == sorted(manifest["scores"]["row"])
        assert "candidates of the block step" in run_report(version, allocation)


@pytest.mark.parametrize(
    ("block", "row"),
    [
        ([0.1, 0.05], [0.0, 0.1, 0.2]),
        ("paper", "reference"),
        ("reference", "paper"),
    ],
)
@pytest.mark.parametrize("sparsity", [0.7, 0.8])
def test_an_older_manifest_draws_the_same_points(run, block, row, sparsity):
    _, manifest, allocation = run
    lambdas = lambdas_for("both", *(x if isinstance(x, str) else tuple(x) for x in (block, row)), sparsity)
    steps = {"block": lambdas.block, "row": lambdas.row}
    scores = {step: [1 / (3 + index) for index in range(len(values))] for step, values in steps.items()}
    new = {
        **manifest,
        "candidates": {
            step: [{"lambda": x, "score": score} for x, score in zip(steps[step], scores[step], strict=True)]
            for step in steps
        },
        "chosen": {step: {"lambda": values[-1]} for step, values in steps.items()},
        "scores": scores,
        "sparsity": {**manifest["sparsity"], "requested": sparsity},
        "lambda_block": lambdas.block[-1],
        "lambda_row": lambdas.row[-1],
    }
    old = older(new, block_lambdas=block, row_lambdas=row, step="both")
    drawn = [score_plots(version, allocation) for version in (new, old)]
    assert drawn[0][1] == drawn[1][1]
    assert len(drawn[0][1]) == 4
    assert recorded_candidates(old) == new["candidates"]


@pytest.mark.parametrize("options", [{}, {"block_lambdas": "unknown", "row_lambdas": "unknown", "step": "unknown"}])
def test_recorded_candidates_need_nothing_else(run, options):
    _, manifest, allocation = run
    lean = {name: value for name, value in manifest.items() if name not in ("scores", "lambda_block", "lambda_row")}
    expected = score_plots(manifest, allocation)[1]
    assert score_plots({**lean, "options": options}, allocation)[1] == expected
    assert len(expected) == 4
    page = run_report({**lean, "options": options}, allocation)
    assert "lambda of the row step" in page


@pytest.mark.parametrize("options", [{}, {"block_lambdas": "unknown", "row_lambdas": "unknown", "step": "both"}])
def test_an_older_manifest_with_unknown_lambdas_draws_its_scores_in_order(run, options):
    _, manifest, allocation = run
    _, points = score_plots({**older(manifest), "options": options}, allocation)
    assert points[0] == ((0, 1), tuple(manifest["scores"]["block"]))
    assert points[2] == ((0, 1, 2), tuple(manifest["scores"]["row"]))


def test_any_search_has_its_plot(run):
    _, manifest, allocation = run
    candidates = [{"name": "b", "power": 2, "score": 0.5}, {"name": "a", "power": 1, "score": 0.75}]
    other = {**manifest, "candidates": {"only": candidates}, "chosen": {"only": {"name": "b", "power": 2}}}
    (section,), points = score_plots(other, allocation)
    assert section.heading == "Candidates of the only step"
    assert points == [((1, 2), (0.75, 0.5)), ((2,), (0.5,))]
    assert section.figures[""].layout.xaxis.title.text == "power"
    assert trace(section.figures[""], "winner").name == "winner: b, 2"
