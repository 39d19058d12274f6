"""Damaged YAML, manifests and accuracy files of sweeps, and of reports: an error of one line or a sound table."""

import csv
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import accuracy, grid, sweep
from eval.table import markdown
from neuroal_jax.report import page
from tests.eval.test_sweep import arguments, run_sweep
from tests.files.test_fuzz import damaged_bytes, damaged_json, fuzzed, refused_or


@pytest.fixture(scope="module")
def swept(llama, tokens, tmp_path_factory):
    """A finished sweep of one run that searched: its values, its run, and its directory."""
    out = tmp_path_factory.mktemp("damaged") / "out"
    options = {"top-ups": "neuroal", "block-lambdas": "0.05,0.2", "row-lambdas": "0.0,0.1,0.2"}
    given_arguments = arguments(llama, tokens, out, **options)
    assert run_sweep(given_arguments) == 0
    values = sweep.parse_arguments(given_arguments)
    values.pop("dry_run")
    (run,), _ = planned(values, out)
    return values, run, out


def planned(values, out):
    return grid.plan({name: value for name, value in values.items() if name not in ("config", "dry_run")}, out)


def damaged(data, text):
    return data.draw(st.one_of(damaged_json(json.loads(text)).map(str.encode), damaged_bytes(text.encode())))


def never(module, log):
    raise AssertionError(f"{module} was started")


def table(out):
    return list(csv.DictReader((out / "table.csv").read_text().splitlines()))


def check_table(out):
    """Every number of the table is one."""
    for row in table(out):
        for name, value in row.items():
            if name not in ("model", "pruner", "top_up", "step", "error") and value:
                assert not math.isnan(float(value)), name


@fuzzed
@given(data=st.data())
def test_yaml_of_a_sweep(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp()
    valid = {
        "models": ["m", "n"], "pruners": ["wanda"], "top_ups": ["uniform", "owl+dsnot"], "sparsities": [0.5, 0.7],
        "seeds": [0, 1], "out": str(root / "out"), "tasks": ["rte", "boolq"], "task_data": str(root), "limit": 3,
        "nsamples": 4, "owl_m": 4.0, "preset": "paper", "block_lambdas": [0.1, 0.2], "eval": "none",
    }  # fmt: skip
    path = root / "sweep.yaml"
    path.write_bytes(damaged(data, json.dumps(valid)))

    def read():
        values = sweep.parse_arguments(["--config", str(path)])
        return accuracy.take_zero_shot(values), planned(values, root)

    found = refused_or(read)
    if found is not None:
        zero_shot, (runs, _) = found
        assert zero_shot.limit is None or 0 < zero_shot.limit < 2**31
        assert all(isinstance(name, str) for name in zero_shot.tasks)
        assert all(0 < run.config.sparsity < 1 for run in runs)


@fuzzed
@given(data=st.data())
def test_manifests_of_a_sweep(swept, data):
    values, run, out = swept
    path = out / run.name / "manifest.json"
    content = path.read_text()
    try:
        path.write_bytes(damaged(data, content))
        refused_or(lambda: sweep.sweep(values, start=never))
        check_table(out)
    finally:
        path.write_text(content)


@fuzzed
@given(data=st.data())
def test_accuracy_files_of_a_sweep(swept, data):
    _, run, out = swept
    zero_shot = accuracy.ZeroShot(("rte", "boolq"), None, 5)
    task = {"n": 5, "dense": {"acc": 0.5, "acc_stderr": 0.1}, "pruned": {"acc": 0.25, "acc_norm": None}}
    valid = {"tasks": {"rte": task, "boolq": task}, "task_data": None, "limit": 5, "mean": {"acc": 0.25}}

    def write(module, log):
        places[module[module.index("--out") + 1]].write_text(json.dumps(valid))
        return ""

    files = [out / run.name / "accuracy.json", out / run.name.split("/")[0] / "dense-accuracy.json"]
    places = {str(file): file for file in files}
    for file in files:
        file.write_bytes(damaged(data, json.dumps(valid)))
    row = accuracy.accuracies(run, out, zero_shot, write)
    assert set(row) == {"acc_rte", "acc_boolq", "acc_mean", "dense_acc_mean"}
    assert all(value is None or math.isfinite(value) for value in row.values())
    assert markdown([{**sweep.finished(out, run), **row}])


@fuzzed
@given(data=st.data())
def test_reports_of_damaged_runs(swept, data):
    _, run, out = swept
    path = out / run.name / data.draw(st.sampled_from(["manifest.json", "allocation.json"]))
    content = path.read_text()
    try:
        path.write_bytes(damaged(data, content))
        refused_or(lambda: page._read_run(out / run.name))
    finally:
        path.write_text(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": "9" * 5000}, "--limit is 9"),
        ({"limit": "0"}, "--limit is 0"),
        ({"task-data": "\0"}, "--task-data is '\\x00'"),
        ({"out": ""}, "--out is ''"),
        ({"sparsities": "1e999"}, "--sparsity is 1e999"),
        ({"seeds": "99999999999999999999999"}, "--seed is 99999999999999999999999"),
        ({"models": "a\0b"}, "--model is 'a\\x00b'"),
    ],
)
def test_flags_of_a_sweep(llama, tokens, tmp_path, capsys, options, message):
    assert run_sweep(arguments(llama, tokens, tmp_path / "out", tasks="rte") + arguments_of(options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def arguments_of(options):
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_a_model_whose_name_is_no_text_has_its_row(llama, tokens, tmp_path):
    import os
    import shutil

    model = shutil.copytree(llama, tmp_path / os.fsdecode(b"m\xff"))
    assert run_sweep(arguments(model, tokens, tmp_path / "out", **{"top-ups": "uniform"})) == 0
    (row,) = table(tmp_path / "out")
    assert row["model"] == "m\\udcff"
    assert "m\\udcff" in (tmp_path / "out" / "table.md").read_text()


def test_perplexities_beyond_a_floats_range_are_infinite_in_all_that_is_written(
    make_llama, tokens, tmp_path, capsys, monkeypatch
):
    from safetensors.numpy import load_file, save_file

    from eval.perplexity import main as measure
    from neuroal_jax.report.page import main as report

    model = make_llama(seed=3)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    assert run_sweep(arguments(model, tokens, out, **{"top-ups": "uniform"})) == 0
    (row,) = table(out)
    assert row["dense_token_ppl"] == row["pruned_token_ppl"] == "inf"
    (manifest,) = out.rglob("manifest.json")

    def strict(path):
        return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    token_ppl = strict(manifest)["token_ppl"]
    assert token_ppl["dense"] == token_ppl["pruned"] == token_ppl["texts"]["tokens.npz"]["pruned"] == "inf"
    assert run_sweep(arguments(model, tokens, out, **{"top-ups": "uniform"})) == 0  # finished before: read back
    assert table(out) == [row]
    for path in (out / "report.html", manifest.parent / "report.html"):
        assert "Infinity," not in path.read_text().split("<script>")[0]
        assert "inf" in path.read_text().split("<script>")[0]
    assert report([str(manifest.parent)]) == 0
    for backend in ("jax", "torch"):
        file = tmp_path / f"{backend}.json"
        given_arguments = ["--model", str(model), "--text", str(tokens), "--backend", backend, "--out", str(file)]
        with np.errstate(all="raise"):
            assert measure(given_arguments) == 0
        assert strict(file)["texts"]["tokens.npz"]["token_ppl@16"] == "inf"
        assert f"{backend}): inf" in capsys.readouterr().out
