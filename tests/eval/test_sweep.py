"""Sweeps: what is run, what is left out, finished before, killed, failed; and the tables."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest

import neuroal_jax
from eval import accuracy, grid, sweep
from eval import table as tables
from neuroal_jax import PruneConfig, UserError

ROOT = Path(__file__).parents[2]


def arguments(llama, tokens, out, **options):
    values = {
        "models": llama, "pruners": "magnitude", "top-ups": "uniform,owl", "sparsities": 0.6, "out": out,
        "calib": tokens, "eval": tokens, **options,
    }  # fmt: skip
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def in_this_process(module, log):
    """Runs a program as `sweep.process` does, but here: programs that are compiled stay so."""
    name, *given = module
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = import_module(name).main(given)
    log.write_text(output.getvalue())
    lines = output.getvalue().strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'no output'}" if code else ""


def run_sweep(given):
    return sweep.main(given, start=in_this_process)


def table(out):
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def swept(llama, tokens, tmp_path_factory):
    """One finished sweep of two runs."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert run_sweep(arguments(llama, tokens, out)) == 0
    return out


def test_the_table_tells_what_the_manifests_tell(swept, llama):
    rows = table(swept)
    assert [row["top_up"] for row in rows] == ["uniform", "owl"]
    for row in rows:
        manifest = json.loads((swept / llama.name / f"magnitude-{row['top_up']}-0.6-seed0/manifest.json").read_text())
        assert float(row["pruned_token_ppl"]) == pytest.approx(manifest["token_ppl"]["pruned"], abs=1e-4)
        assert float(row["dense_token_ppl"]) == pytest.approx(manifest["token_ppl"]["dense"], abs=1e-4)
        assert float(row["achieved"]) == manifest["sparsity"]["achieved"]
        assert (row["sparsity"], row["seed"], row["seqlen"], row["error"]) == ("0.6", "0", "16", "")
        assert float(row["prune_seconds"]) == round(manifest["seconds"]["prune"], 1)
        assert int(row["host_peak_mib"]) > 100
    lines = (swept / "table.md").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].count("|") == lines[2].count("|")
    assert "lambda_block" not in lines[0]  # empty everywhere


def test_finished_runs_are_not_run_again(swept, llama, tokens, capsys):
    manifests = {path: path.stat().st_mtime_ns for path in swept.rglob("manifest.json")}
    assert len(manifests) == 2
    assert run_sweep(arguments(llama, tokens, swept)) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("manifest.json")} == manifests


def test_a_finished_run_with_other_options_is_not_taken_for_this_one(swept, llama, tokens, capsys):
    assert run_sweep(arguments(llama, tokens, swept, nsamples=3)) == 2
    assert "holds a run with --nsamples 128, not 3" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(llama, tokens, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "eval.sweep", *arguments(llama, tokens, out, pruners="magnitude,wanda")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    published = out / llama.name / "magnitude-uniform-0.6-seed0"
    while first.poll() is None and not published.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # into the second run
    os.kill(first.pid, signal.SIGTERM)
    assert "goes on from there" in first.communicate(timeout=60)[1]
    assert first.returncode == 130
    done = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    assert 1 <= len(done) < 4
    assert not list(out.rglob("*.partial"))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert again.stdout.count("finished before") == len(done)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [row["error"] for row in table(out)] == [""] * 4


def test_a_second_sweep_of_a_directory_is_refused_at_once(llama, tokens, tmp_path, capsys):
    out, link, codes = tmp_path / "out", tmp_path / "link", []
    given = {"top-ups": "uniform", "eval": "none"}

    def start(module, log):
        link.symlink_to(out)
        for name in (out, link):
            codes.append(run_sweep(arguments(llama, tokens, name, **given, pruners="wanda")))
            assert f"--out {out}: process {os.getpid()} on" in capsys.readouterr().err
        return in_this_process(module, log)

    assert sweep.main(arguments(llama, tokens, out, **given), start=start) == 0
    assert codes == [2, 2]
    assert [row["pruner"] for row in table(out)] == ["magnitude"]
    assert [path.name for path in (out / "logs").iterdir() if "wanda" in path.name] == []
    assert run_sweep(arguments(llama, tokens, link, **given, pruners="wanda")) == 0  # the lock is gone with its holder


def test_a_run_that_fails_is_a_row_and_the_others_run(llama, tokens, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert run_sweep(arguments(f"{broken},{llama}", tokens, tmp_path / "out", **{"top-ups": "uniform"})) == 2
    captured = capsys.readouterr()
    assert "1 of 2 runs failed: broken/magnitude-uniform-0.6-seed0" in captured.err
    failed, done = table(tmp_path / "out")
    assert "model_type is None" in failed["error"]
    assert failed["pruned_token_ppl"] == ""
    assert float(done["pruned_token_ppl"]) > 1


def test_combinations_that_make_no_sense_are_left_out_with_their_reason():
    values = {
        "models": ["demo"], "pruners": ["wanda", "sparsegpt"], "top_ups": ["dsnot", "owl+dsnot", "neuroal"],
        "steps": ["row"], "objectives": ["auto"], "sparsities": [0.5, 0.7], "seeds": [0, 1],
    }  # fmt: skip
    runs, left_out = grid.plan(values, Path("out"))
    assert len(runs) == 3 * 2 * 2
    assert {run.config.pruner for run in runs} == {"wanda"}
    assert len(left_out) == 3 * 2 * 2
    assert sum("--refine dsnot does not go with" in reason for _, reason in left_out) == 8
    assert sum("--step row does not go with" in reason for _, reason in left_out) == 4
    with pytest.raises(UserError, match="no combination"):
        sweep.sweep({**values, "pruners": ["sparsegpt"], "out": "never-made"})
    assert not Path("never-made").exists()


def test_steps_multiply_only_the_runs_that_search():
    values = {
        "models": ["demo"], "pruners": ["wanda", "sparsegpt"], "top_ups": ["uniform", "owl+dsnot", "neuroal"],
        "steps": ["block", "row", "both"], "objectives": ["auto"], "sparsities": [0.5], "seeds": [0],
    }  # fmt: skip
    runs, left_out = grid.plan(values, Path("out"))
    assert [(run.name.removeprefix("demo/"), run.step) for run in runs] == [
        ("wanda-uniform-0.5-seed0", None),
        ("wanda-owl+dsnot-0.5-seed0", None),
        ("wanda-neuroal-block-0.5-seed0", "block"),
        ("wanda-neuroal-row-0.5-seed0", "row"),
        ("wanda-neuroal-0.5-seed0", "both"),
        ("sparsegpt-uniform-0.5-seed0", None),
        ("sparsegpt-neuroal-block-0.5-seed0", "block"),  # all there is of both
    ]
    assert [run.config.step for run in runs if run.step] == [run.step for run in runs if run.step]
    assert dict(left_out).keys() == {"demo sparsegpt owl+dsnot 0.5", "demo sparsegpt neuroal row 0.5"}
    for changed in ({"steps": ["both", "both"]}, {"sparsities": ["0.5", ".50"]}):
        with pytest.raises(UserError, match="two runs are called demo/wanda-uniform"):
            grid.plan({**values, **changed}, Path("out"))
    with pytest.raises(UserError, match="--step None is unknown"):
        grid.plan({**values, "top_ups": ["uniform"], "steps": ["both", None]}, Path("out"))


def test_a_search_that_has_no_steps_is_one_run_for_all_of_them():
    values = {"models": ["demo"], "pruners": ["wanda", "sparsegpt"], "top_ups": ["shape", "dlp"]}
    values |= {"steps": ["block", "row", "both"], "objectives": ["auto"], "sparsities": [0.6], "seeds": [0]}
    runs, left_out = grid.plan(values, Path("out"))
    assert [(run.config.pruner, run.top_up, run.step, run.objective) for run in runs] == [
        (pruner, top_up, None, None) for pruner in ("wanda", "sparsegpt") for top_up in ("shape", "dlp")
    ]
    assert [run.config.objective for run in runs[::2]] == ["kl", "kl"]
    assert left_out == []


def test_objectives_multiply_only_the_runs_that_search():
    values = {
        "models": ["demo"], "pruners": ["wanda"], "top_ups": ["uniform", "neuroal"], "steps": ["block", "both"],
        "objectives": ["auto", "alignment", "kl"], "sparsities": [0.5], "seeds": [0],
    }  # fmt: skip
    runs, left_out = grid.plan(values, Path("out"))
    assert [(run.name.removeprefix("demo/wanda-"), run.objective, run.config.objective) for run in runs] == [
        ("uniform-0.5-seed0", None, "alignment"),
        ("neuroal-block-0.5-seed0", None, "alignment"),
        ("neuroal-block-kl-0.5-seed0", "kl", "kl"),
        ("neuroal-0.5-seed0", None, "alignment"),
        ("neuroal-kl-0.5-seed0", "kl", "kl"),
    ]
    assert tables.describe(runs[-1], None)["objective"] == "kl"
    _, left_out = grid.plan({**values, "budget": "reference"}, Path("out"))
    assert [combination for combination, _ in left_out] == [
        "demo wanda neuroal block kl 0.5",
        "demo wanda neuroal both kl 0.5",
    ]
    with pytest.raises(UserError, match="two runs are called demo/wanda-uniform"):
        grid.plan({**values, "objectives": ["kl", "kl"]}, Path("out"))


def test_a_sweep_measures_the_dense_model_once(llama, tokens, tmp_path):
    """And a block step, and finds what each run finds alone."""
    given = {"top-ups": "uniform,neuroal", "steps": "block,both", "row-lambdas": "0,0.1,0.2,0.3", "candidate-batch": 2}
    given = arguments(llama, tokens, tmp_path / "out", **given, **{"block-lambdas": "0.05,0.2"})
    assert run_sweep(given) == 0
    first, block, both = table(tmp_path / "out")
    assert [row["step"] for row in (first, block, both)] == ["", "block", "both"]
    manifests = [
        json.loads((tmp_path / "out" / llama.name / f"magnitude-{name}-0.6-seed0/manifest.json").read_text())
        for name in ("uniform", "neuroal-block", "neuroal")
    ]
    reused = [[walk["walk"] for walk in manifest["reused"]] for manifest in manifests]
    assert reused == [[], ["dense-perplexity"], ["dense-perplexity", "search"]]
    assert manifests[2]["reused"][0]["run"].endswith("magnitude-uniform-0.6-seed0")
    seconds = manifests[2]["seconds"]["search"] + manifests[2]["reused"][1]["seconds"]  # as if it were alone
    assert float(both["search_seconds"]) == round(seconds, 1)
    options = {**manifests[2]["options"], "out": str(tmp_path / "alone"), "measured": None, "resume": False}
    alone = neuroal_jax.prune(PruneConfig(**options)).manifest
    for key in ("token_ppl", "scores", "zeros_per_linear", "alignment"):
        assert alone[key] == manifests[2][key], key
    shutil.rmtree(tmp_path / "out" / llama.name)
    assert run_sweep(given) == 0  # as after a kill: of nothing but what was measured
    assert [row["pruned_token_ppl"] for row in table(tmp_path / "out")] == [
        row["pruned_token_ppl"] for row in (first, block, both)
    ]


def test_options_reach_only_the_runs_that_they_are_for():
    values = {
        "models": ["demo"], "pruners": ["wanda"],
        "top_ups": ["uniform", "owl", "dsnot", "owl+dsnot", "refit", "owl+dsnot+refit"],
        "steps": ["both"], "objectives": ["auto"], "sparsities": ["0.5"], "seeds": ["3"], "owl_m": 3,
        "dsnot_cycles": "7", "refit_damping": "0.3",
    }  # fmt: skip
    found = [run.config for run in grid.plan(values, Path("out"))[0]]
    assert [(config.allocation, config.refine) for config in found] == [
        ("uniform", "none"), ("owl", "none"), ("uniform", "dsnot"), ("owl", "dsnot"), ("uniform", "refit"),
        ("owl", "dsnot+refit"),
    ]  # fmt: skip
    assert [config.owl_m for config in found] == [5, 3, 5, 3, 5, 3]
    assert [config.dsnot_cycles for config in found] == [50, 50, 7, 7, 50, 7]
    assert [config.refit_damping for config in found] == [0.1, 0.1, 0.1, 0.1, 0.3, 0.3]
    assert [config.updates_weights for config in found] == [False] * 4 + [True] * 2
    assert {config.seed for config in found} == {3}


def test_the_refit_is_in_the_loop_where_there_are_both():
    values = {
        "models": ["demo"], "pruners": ["wanda"],
        "top_ups": ["uniform", "refit", "owl+refit", "shape", "shape+dsnot", "shape+refit", "shape+dsnot+refit"],
        "steps": ["both"], "objectives": ["auto"], "sparsities": ["0.5"], "seeds": ["0"], "search_refine": True,
    }  # fmt: skip
    runs, left_out = grid.plan(values, Path("out"))
    assert [run.config.search_refine for run in runs] == [False] * 5 + [True] * 2
    assert left_out == []


def test_runs_stay_inside_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in (".", "..", "/", "x/.."):
        values = {"models": [model], "pruners": ["wanda"], "top_ups": ["uniform"], "steps": ["both"]}
        values |= {"objectives": ["auto"], "sparsities": [0.5], "seeds": [0]}
        (run,) = grid.plan(values, Path("out"))[0]
        assert run.config.out == f"out/{run.name}"
        assert ".." not in run.name
        assert not run.name.startswith("/")


def test_another_dtype_is_another_run(llama, tokens, tmp_path, capsys):
    first = arguments(llama, tokens, tmp_path, **{"top-ups": "uniform", "dtype": "bfloat16"})
    assert run_sweep(first) == 0
    assert run_sweep(first) == 0
    assert "finished before" in capsys.readouterr().out
    assert run_sweep(arguments(llama, tokens, tmp_path, **{"top-ups": "uniform"})) == 2
    assert "--dtype bfloat16, not auto" in capsys.readouterr().err
    assert run_sweep([*first, "--row-lambdas", "0.1"]) == 0  # no search, no difference


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("models: [a, b]\nsparsities: [0.6, 0.7]\nout: x\nowl-m: 3\nsteps: block\ntop_ups: owl\n")
    values = sweep.parse_arguments(["--config", str(file), "--models", "c", "--steps", "row,both"])
    assert (values["models"], values["sparsities"], values["top_ups"]) == (["c"], [0.6, 0.7], ["owl"])
    assert (values["out"], values["owl_m"], values["steps"]) == ("x", 3, ["row", "both"])
    assert (values["pruners"], values["seeds"]) == (["wanda"], [0])


def test_a_pattern_is_a_sparsity_and_part_of_a_run_s_name(capsys, tmp_path):
    values = sweep.parse_arguments(["--models", "demo", "--pattern", "2:4", "--out", str(tmp_path)])
    assert values["sparsities"] == [0.5]
    lists = {name: values[name] for name in grid.AXES} | {"pruners": ["wanda", "sparsegpt"], "pattern": "2:4"}
    runs, left_out = grid.plan(lists, tmp_path)
    assert [run.name for run in runs] == ["demo/wanda-uniform-2of4-0.5-seed0", "demo/sparsegpt-uniform-2of4-0.5-seed0"]
    assert ["leaves --allocation neuroal nothing to decide" in reason for _, reason in left_out] == [True, True]
    assert sweep.main(["--models", "demo", "--pattern", "auto:8", "--out", str(tmp_path), "--dry-run"]) == 2
    assert "--sparsities is missing" in capsys.readouterr().err
    assert sweep.main(["--models", "demo", "--pattern", "8", "--out", str(tmp_path), "--dry-run"]) == 2
    assert "--pattern is '8', expected N:M" in capsys.readouterr().err


BAD = {
    "no models": ([], "--models is missing"),
    "no out": (["--models", "demo", "--sparsities", "0.5"], "--out is missing"),
    "an empty list": (["--models", ",", "--sparsities", "0.5", "--out", "x"], "--models is ','"),
    "one item twice": (["--models", "demo", "--sparsities", "0.5,.50", "--out", "x"], "two runs are called demo/"),
    "one top-up twice": (
        ["--models", "demo", "--sparsities", "0.5", "--top-ups", "dsnot,uniform+dsnot", "--out", "x"], "two runs are",
    ),
    "two models of one name": (["--models", "a/m,b/m", "--sparsities", "0.5", "--out", "x"], "called m/wanda"),
    "one wrong sparsity": (["--models", "demo", "--sparsities", "0.6,7", "--out", "x"], "--sparsity is 7"),
    "one wrong top-up": (
        ["--models", "demo", "--sparsities", "0.6", "--top-ups", "owl,owll", "--out", "x"], "did you mean owl?",
    ),
    "an option for no run": (
        ["--models", "demo", "--sparsities", "0.6", "--owl-m", "3", "--out", "x"], "which is in no run of the sweep",
    ),
    "a refit in no loop": (
        ["--models", "demo", "--sparsities", "0.6", "--top-ups", "refit,shape", "--search-refine", "--out", "x"],
        "--search-refine has no effect without a search and a refinement",
    ),
    "a wrong option": (["--models", "demo", "--sparsities", "0.6", "--nsamples", "abc", "--out", "x"], "--nsamples is"),
    "an unknown flag": (["--model", "demo"], "unrecognized arguments"),
    "no pruner of that name": (
        ["--models", "demo", "--sparsities", "0.5", "--out", "x", "--pruners", "wanda,wandas"], "did you mean wanda?",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD.keys())
def test_bad_sweeps_are_one_line(capsys, given, message):
    assert run_sweep(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("x").exists()


def test_an_unknown_key_of_the_file_is_named(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text("model: demo\n")
    assert run_sweep(["--config", str(tmp_path / "s.yaml")]) == 2
    assert "did you mean models?" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_one_line(llama, tokens, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_sweep(arguments(llama, tokens, tmp_path / "file" / "x")) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_file_in_the_way_of_a_run_is_one_line(llama, tokens, tmp_path, capsys):
    (tmp_path / llama.name).write_text("")
    assert run_sweep(arguments(llama, tokens, tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"options": [], "asked": {}}', '{"options": {}, "asked": {}}'])
def test_a_manifest_that_is_none_is_named(llama, tokens, tmp_path, capsys, content):
    place = tmp_path / llama.name / "magnitude-uniform-0.6-seed0"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(content)
    assert run_sweep(arguments(llama, tokens, tmp_path)) == 2
    assert "is no manifest" in capsys.readouterr().err


# Accuracies, presets and what is estimated.


@pytest.fixture(scope="module")
def rows_of_tasks(tmp_path_factory):
    """Rows of two of lm-eval's tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = {
        "rte": [{"sentence1": f"a {i}", "sentence2": "b", "label": i % 2} for i in range(4)],
        "openbookqa": [
            {
                "id": str(i),
                "question_stem": f"the {i}",
                "choices": {"text": ["one", "two", "three", "four"], "label": list("ABCD")},
                "answerKey": "ABCD"[i],
            }
            for i in range(4)
        ],
    }
    for name, items in rows.items():
        (folder / f"{name}.test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_accuracies_are_those_of_lm_eval_and_measured_once(rows_of_tasks, tmp_path):
    out = tmp_path / "out"
    values = {"models": "demo", "pruners": "magnitude,sparsegpt", "top-ups": "uniform", "sparsities": 0.6, "out": out}
    values |= {"tasks": "rte,openbookqa", "task-data": rows_of_tasks, "limit": 3, "nsamples": 4, "eval": "none"}
    command = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    assert run_sweep(command) == 0
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*accuracy.json")}
    assert len(files) == 3  # of the dense model one, for both runs
    for row in table(out):
        found = json.loads((out / f"demo/{row['pruner']}-uniform-0.6-seed0/accuracy.json").read_text())["tasks"]
        state = {"magnitude": "pruned", "sparsegpt": "dense"}[row["pruner"]]  # the latter's model is a saved one
        for name in ("rte", "openbookqa"):
            assert float(row[f"acc_{name}"]) == pytest.approx(found[name][state]["acc"], abs=1e-4)
            assert found[name]["n"] == 3
        mean = (float(row["acc_rte"]) + float(row["acc_openbookqa"])) / 2
        assert float(row["acc_mean"]) == pytest.approx(mean, abs=1e-4)
    before = (out / "table.csv").read_bytes()
    assert run_sweep(command) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (out / "table.csv").read_bytes() == before


@pytest.mark.parametrize("content", [None, "{", "[]", '{"tasks": {"rte": {}}, "task_data": null, "limit": 4}'])
def test_accuracies_of_something_else_are_not_taken(tmp_path, content):
    if content is not None:
        (tmp_path / "accuracy.json").write_text(content)
    assert accuracy.measured(tmp_path / "accuracy.json", accuracy.ZeroShot(("rte",), None, 3)) is None


def test_accuracies_that_cannot_be_had_are_an_error_of_the_row(tmp_path, capsys):
    values = {
        "models": "demo",
        "pruners": "magnitude",
        "top-ups": "uniform",
        "sparsities": 0.6,
        "out": tmp_path / "out",
    }
    values |= {"tasks": "rte", "task-data": tmp_path, "nsamples": 4, "eval": "none"}
    assert run_sweep([str(part) for name, value in values.items() for part in (f"--{name}", value)]) == 2
    assert "1 of 1 runs failed" in capsys.readouterr().err
    (row,) = table(tmp_path / "out")
    assert row["error"].startswith("zero-shot: exit code 2: error: ")
    assert "rte" in row["error"]


def test_several_texts_have_columns_of_their_own():
    rows = [{"model": "m", **tables._perplexities({"a": {"dense": 1, "pruned": 2}, "b": {"dense": 3, "pruned": 4}})}]
    columns = tables.columns_of(rows)
    assert columns[len(tables.HEAD) : -len(tables.TAIL)] == [
        "dense_token_ppl_a", "pruned_token_ppl_a", "dense_token_ppl_b", "pruned_token_ppl_b",
    ]  # fmt: skip
    assert list(tables._perplexities({"a": {"dense": 1, "pruned": 2}})) == ["dense_token_ppl", "pruned_token_ppl"]


def test_the_paper_s_grid_is_listed_with_its_cost_and_nothing_is_made(tmp_path, capsys):
    assert run_sweep(["--preset", "paper", "--out", str(tmp_path / "x"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # 5 models, 4 pruners, 5 top-ups, 3 sparsities, without DSnoT on SparseGPT.
    assert "285 runs, of which 0 are finished" in printed
    assert "left out: microsoft/phi-2 sparsegpt dsnot 0.6" in printed
    assert "Llama-2-7b-hf/wanda-neuroal-0.7-seed0" in printed
    assert not (tmp_path / "x").exists()
    values = sweep.parse_arguments(["--preset", "paper", "--out", "x", "--models", "a/b", "--sparsities", "0.5"])
    assert (values["models"], values["sparsities"]) == (["a/b"], ["0.5"])
    assert values["eval"] == "wikitext2,c4,ptb"
    assert accuracy.take_zero_shot(values).tasks == sweep.TASKS


BAD_TASKS = {
    "no tasks": (["--limit", "3"], "--limit has no effect without --tasks"),
    "no folder": (["--tasks", "rte", "--task-data", "nowhere"], "--task-data nowhere is no directory"),
    "no number": (["--tasks", "rte", "--limit", "0"], "--limit is 0"),
    "no preset": (["--preset", "papers"], "invalid choice"),
}


@pytest.mark.parametrize(("given", "message"), BAD_TASKS.values(), ids=BAD_TASKS.keys())
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_bad_tasks_are_one_line(capsys, given, message, dry):
    assert run_sweep(["--models", "demo", "--sparsities", "0.5", "--out", "x", *given, *dry]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("x").exists()
