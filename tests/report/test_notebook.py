"""What a result shows of itself: in one line, and in a notebook."""

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import plotly.graph_objects as go
import pytest

import neuroal_jax
from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.report import notebook
from neuroal_jax.report.notebook import _ticks
from neuroal_jax.run.result import PruneResult
from tests.conftest import RUN
from tests.report.test_page import HOSTILE

MOST = 200_000  # characters of a cell


@pytest.fixture(scope="module")
def result(llama, tokens, tmp_path_factory):
    options = {**RUN, "model": str(llama), "calib": str(tokens), "eval": str(tokens)}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**options, out=tmp_path_factory.mktemp("result") / "out"))


def plots(shown):
    """The plots of a cell, by heading: texts, and numbers that hovering tells."""
    found = {}
    for svg in re.findall("<svg.*?</svg>", shown):
        tree = ElementTree.fromstring(svg)
        texts = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]
        found[tree.get("aria-label")] = texts, [node.text for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    return found


def cells(shown):
    """The table of a cell."""
    table = ElementTree.fromstring(shown[: shown.index("</table>") + len("</table>")])
    return {row[0].text: row[1].text for row in table.iter("tr")}


def test_it_is_the_run_s_numbers(result):
    shown = result._repr_html_()
    manifest, found = result.manifest, cells(shown)
    assert found["model"] == manifest["options"]["model"]
    assert (found["pruner"], found["allocation"]) == ("wanda", "neuroal")
    assert found["lambda of the block step"] == f"{manifest['lambda_block']:g}"
    assert found["lambda of the row step"] == f"{manifest['lambda_row']:g}"
    assert found["sparsity achieved"] == f"{manifest['sparsity']['achieved']:.6f} (0.6 asked)"
    dense, pruned = (manifest["token_ppl"][state] for state in ("dense", "pruned"))
    assert found["token_ppl@16 of tokens.npz"] == f"{dense:.2f} → {pruned:.2f} (dense → pruned)"
    assert found["results"] == str(result.out)
    drawn = plots(shown)
    assert list(drawn) == ["Sparsity per block", "Candidates of the block step", "Candidates of the row step"]
    sizes = [out * width for out, width in manifest["linears"].values()]
    zeros = [sum(block.values()) / sum(sizes) for block in manifest["zeros_per_linear"]]
    texts, numbers = drawn["Sparsity per block"]
    assert numbers[:3] == [f"{block}: {share:.6g}" for block, share in enumerate(zeros)]
    assert {"achieved", "allocated", "block", "0", "1", "2"} <= set(texts)
    scores = zip((0.05, 0.2), manifest["scores"]["block"], strict=True)
    assert drawn["Candidates of the block step"][1][:2] == [f"{strength:g}: {score:.6g}" for strength, score in scores]
    assert len(shown) < 30_000


def test_it_needs_no_script_and_no_network(result):
    shown = result._repr_html_().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search("<script|<img|<link|<style|http|url\\(|@import| on[a-z]+=", shown)


@pytest.mark.parametrize(
    ("scale", "scores", "shown"),
    [
        ("linear", [0.5, 0.0, -1.0], 3),
        ("linear", [None, float("nan"), float("inf")], 0),
        ("linear", [1e18, 1e18], 2),
        ("linear", [1e308, 0.5], 1),
        ("linear", [1e-320, 0.0], 2),
        ("log", [0.5, 0.0, -1.0], 1),
        ("log", [0.0], 0),
        ("log", [1e-300, 1e299], 2),
    ],
)
def test_scores_of_any_size_are_drawn(scale, scores, shown):
    trace = go.Scatter(x=list(range(len(scores))), y=scores, name="scores")
    drawn = plots(notebook.svg(go.Figure(trace, {"yaxis": {"type": scale}}), "heading"))
    assert [len(numbers) for _, numbers in drawn.values()] == [shown] * bool(shown)


def test_hostile_names_stay_text(result):
    manifest = json.loads(json.dumps(result.manifest))
    manifest["options"] |= {"model": HOSTILE, "allocation": HOSTILE, "objective": HOSTILE}
    manifest["token_ppl"]["texts"] = {HOSTILE: manifest["token_ppl"]["texts"]["tokens.npz"]}
    manifest["candidates"] = {HOSTILE: [{HOSTILE: 1.0, "score": 0.5}, {HOSTILE: 2.0, "score": 0.25}]}
    manifest["chosen"] = {HOSTILE: {HOSTILE: 2.0}}
    shown = replace(result, manifest=manifest, out=result.out / HOSTILE / "odd\udcff")._repr_html_()
    assert "<img" not in shown
    assert "</script" not in shown
    assert cells(shown)["model"] == HOSTILE
    assert f"Candidates of the {HOSTILE} step" in plots(shown)
    shown.encode()


def test_a_large_model_and_a_shape_s_course_stay_small(result):
    blocks = 200
    manifest = {**result.manifest, "zeros_per_linear": result.manifest["zeros_per_linear"][:1] * blocks}
    manifest["candidates"] = {"profiles": [{"profile": str(n), "score": 10.0**n} for n in range(-3, 40)]}
    manifest["chosen"] = {"profiles": {"profile": "-3"}}
    manifest["gains"] = {"profiles": {"mean": 1.0, "error": None, "kept": True}}
    allocation = Allocation("x", tuple({name: np.ones(2) for name in manifest["linears"]} for _ in range(blocks)))
    shown = replace(result, manifest=manifest, allocation=allocation)._repr_html_()
    assert list(plots(shown)) == ["Sparsity per block", "Course of the search"]
    assert len(shown) < MOST


def test_one_line_of_every_kind(result, llama, tokens):
    dense, pruned = (result.manifest["token_ppl"][state] for state in ("dense", "pruned"))
    assert repr(result) == (
        f"PruneResult({llama} pruned to 0.6 sparsity with wanda + neuroal, "
        f"token_ppl@16 {dense:.2f} -> {pruned:.2f}, in {result.out})"
    )
    options = {"model": str(llama), "sparsity": 0.6, "calib": str(tokens), "eval": "none"}
    dry = neuroal_jax.prune(neuroal_jax.PruneConfig(**options, dry_run=True))
    assert repr(dry) == f"PruneResult(dry run: {dry.plan.prunable} prunable weights in 3 blocks)"
    assert cells(dry._repr_html_())["prunable weights"] == f"{dry.plan.prunable:,} (in 3 blocks)"
    other = PruneResult(None, None, {})
    assert "the first of several processes" in repr(other)
    assert "the first of several processes" in cells(other._repr_html_())["result"]
    for without in (dry, other):
        with pytest.raises(neuroal_jax.UserError, match="no report: dry runs write nothing"):
            without.report()


def test_the_report_is_there_again(result):
    before = result.report().read_text()
    result.report().unlink()
    path = result.report()
    assert path == result.out / "report.html"
    assert path.read_text() == before
    with pytest.raises(neuroal_jax.UserError, match=r"manifest\.json cannot be read"):
        replace(result, out=result.out / "gone").report()


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0.58, 0.62, False, [0.58, 0.59, 0.6, 0.61, 0.62]),
        (-0.6, 2.4, True, [0, 1, 2]),
        (-0.6, 31.4, True, [0, 10, 20, 30]),
        (0.0, 9e-10, False, [0, 2e-10, 4e-10, 6e-10, 8e-10]),
    ],
)
def test_ticks_are_round_numbers(low, high, whole, expected):
    assert _ticks(low, high, whole=whole) == expected
