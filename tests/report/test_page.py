"""The page: it is what the manifest says, hostile names stay text, and a damaged run is one line."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from neuroal_jax import report
from neuroal_jax.report import run_report, sweep_report
from neuroal_jax.report.sweep_plots import columns
from tests.report.reports import ROWS, Page, sweep_row

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"


def test_a_run_writes_the_report_of_its_manifest(run):
    out, manifest, allocation = run
    text = (out / "report.html").read_text()
    assert text == run_report(manifest, allocation)
    assert Page(text).json("manifest") == manifest


def test_a_path_that_is_no_text_is_shown_all_the_same(run):
    _, manifest, allocation = run
    odd = {**manifest, "options": {**manifest["options"], "model": "odd\udcff"}}
    assert "<h1>odd? pruned" in run_report(odd, allocation)


def test_hostile_names_stay_text(run):
    manifest = run[1]
    options = {**manifest["options"], "model": HOSTILE, "calib": HOSTILE, "allocation": HOSTILE, "out": HOSTILE}
    evil = {
        **manifest,
        "options": options,
        "device": HOSTILE,
        "measured": {HOSTILE: [0.5] * 5},
        "seconds": {HOSTILE: 1.0},
        "candidates": {HOSTILE: [{HOSTILE: 1.0, "score": 0.5}]},
        "chosen": {HOSTILE: {HOSTILE: 1.0}},
        "alignment": [{HOSTILE: 0.5}] * 5,
        "linears": {HOSTILE: [2, 2]},
        "zeros_per_linear": [{HOSTILE: 1}] * 5,
    }
    allocation = {"sparsity": {f"layers.{block}.{HOSTILE}": [0.25, 0.75] for block in range(5)}}
    evil["data"] = {"calib": {**manifest["data"]["calib"], "origin": HOSTILE}, "eval": None}
    rows = [
        sweep_row(
            model=HOSTILE, pruner=HOSTILE, top_up=HOSTILE, error=HOSTILE, pruned_token_ppl=2.0, dense_token_ppl=1.5
        )
    ]
    for text in (run_report(evil, allocation), sweep_report(rows, [HOSTILE])):
        page = Page(text)
        assert "img" not in page.tags
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert page.tags.count("script") == 4
        assert "<img" not in json.dumps(list(page.json("figures").values()))
    assert Page(run_report(evil, allocation)).json("manifest") == evil


def test_the_page_needs_no_network_and_runs_no_foreign_script(run):
    text = (run[0] / "report.html").read_text()
    page = Page(text)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    policy = next(value for name, value in page.attributes if value and value.startswith("default-src"))
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_a_large_model_stays_small(run):
    _, manifest, _ = run
    linears, rng = list(manifest["linears"]), np.random.default_rng(0)
    names = {
        f"model.layers.{block}.{linear}.weight": rng.random(2000).tolist() for block in range(80) for linear in linears
    }
    counts = [dict.fromkeys(linears, 100) for _ in range(80)]
    scores = [dict.fromkeys(linears, rng.random()) for _ in range(80)]
    large = {**manifest, "zeros_per_linear": counts, "alignment": scores}
    own = len(run_report(large, {"sparsity": names})) - len(run_report(manifest, {"sparsity": names}))
    page = Page(run_report(large, {"sparsity": names}))
    assert own < 200_000
    assert len(page.texts["figures"]) + len(page.texts["manifest"]) < 500_000


def test_a_sweep_leaves_out_empty_columns_and_tells_failures():
    text = sweep_report(ROWS, ["m/wanda owl/report.html", None, None, None, None])
    assert "lambda" not in columns(ROWS)
    assert "acc_mean" in columns(ROWS)
    assert "5 runs, 1 failed" in text
    assert text.count("no &lt;memory&gt;") == 3  # above the table, in its cell and in that cell's value
    assert 'href="./m/wanda%20owl/report.html"' in text
    assert "No run measured one so far." in sweep_report([ROWS[3]])


def test_the_command_writes_the_report_again(run, tmp_path, capsys):
    out = shutil.copytree(run[0], tmp_path / "run")
    (out / "report.html").unlink()
    assert report.main([str(out)]) == 0
    assert (out / "report.html").read_bytes() == (run[0] / "report.html").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in run[0].iterdir()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", None, "cannot be read"),
        ("allocation.json", None, "cannot be read"),
        ("manifest.json", "{", "cannot be read"),
        ("manifest.json", "[]", "format is 'list'"),
        ("allocation.json", '{"format": "x"}', "format is 'x'"),
        ("manifest.json", '{"format": "neuroal-manifest-1"}', "damaged or of another version"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"norm": 0.5}}', "names norm"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"layers.1.fc": 0.5}}', "all from 0 on"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"layers.0.fc": NaN}}', "damaged"),
    ],
)
def test_a_damaged_run_is_one_line_and_keeps_its_report(run, tmp_path, capsys, name, content, message):
    out = shutil.copytree(run[0], tmp_path / "run")
    (out / "report.html").write_text("before")
    (out / name).unlink()
    if content is not None:
        (out / name).write_text(content)
    assert report.main([str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (out / "report.html").read_text() == "before"


def test_importing_the_report_is_light():
    heavy = ("plotly", "jinja2", "jax")
    code = f"import sys, neuroal_jax.report; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
