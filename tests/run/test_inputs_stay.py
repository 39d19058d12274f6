"""No program removes or replaces what it reads, or what no run of ours wrote: the whole tree is compared."""

import json
import os
import shutil
from pathlib import Path

import pytest

import neuroal_jax
from convert import hf_to_flax, masks_to_torch
from eval import generation, perplexity, sweep, zero_shot
from neuroal_jax import prune
from neuroal_jax.report import main as report
from neuroal_jax.resume import state as states

MODEL, TEXT = "ROOT/models/llama", "ROOT/tokens.npz"
QUICK = ["--sparsity", "0.5", "--allocation", "uniform", "--pruner", "magnitude", "--eval", "none", "--nsamples", "2"]


def contents(root):
    paths = sorted(root.rglob("*"))
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="module")
def made(llama, tokens, tmp_path_factory):
    """`X`: a run's directory with its masks and a model that the run saved; `flax`: a converted model; and texts."""
    root = tmp_path_factory.mktemp("made")
    shutil.copy(tokens, root / "tokens.npz")
    run = ["--model", str(llama), *QUICK, "--calib", str(tokens), "--out", str(root / "X")]
    assert prune.main([*run, "--save-model", str(root / "X/model")]) == 0
    assert prune.main([*run[:-1], str(root / "run"), "--save-model", str(root / "saved")]) == 0
    assert hf_to_flax.main(["--model", str(llama), "--out", str(root / "flax")]) == 0
    shutil.copytree(llama, root / "models/llama")
    return root


@pytest.fixture
def root(made, tmp_path):
    """A copy of it, with times as they were."""
    shutil.copytree(made, tmp_path / "R")
    return tmp_path / "R"


def run(out, *more, model=MODEL, calib=TEXT):
    return prune.main, [*QUICK, "--model", model, "--calib", calib, "--out", out, *more]


def run_over(out, *more, **options):
    return run(out, "--overwrite", *more, **options)


def apply_over(out, masks="ROOT/run/masks.safetensors", model=MODEL):
    return masks_to_torch.main, ["apply", "--model", model, "--masks", masks, "--out", out, "--overwrite"]


def convert(out, *more, model=MODEL):
    return hf_to_flax.main, ["--model", model, "--out", out, *more]


def perplexity_over(out):
    return perplexity.main, ["--model", MODEL, "--text", TEXT, "--out", out, "--overwrite"]


def zero_shot_over(out):
    masks = "ROOT/run/masks.safetensors"
    return zero_shot.main, ["--model", MODEL, "--masks", masks, "--tasks", "rte", "--out", out, "--overwrite"]


def generation_over(out):
    masks = "ROOT/run/masks.safetensors"
    return generation.main, ["--model", MODEL, "--masks", masks, "--prompt-tokens", "3", "--out", out, "--overwrite"]


def sweep_to(out, model=MODEL, calib=TEXT):
    return sweep.main, ["--models", model, "--sparsities", "0.5", "--calib", calib, "--out", out]


def move(old, new):
    def prepare(root):
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return prepare


def link(target, name, make=os.symlink):
    return lambda root: make(root / target, root / name)


def nothing(root):
    pass


def text_called_a_report(directory):
    def prepare(root):
        (root / directory).mkdir(exist_ok=True)
        (root / directory / "report.html").unlink(missing_ok=True)
        (root / "tokens.npz").rename(root / directory / "report.html")

    return prepare


def written(name, content):
    return lambda root: (root / name).write_text(content)


def hard_links(root):
    shutil.rmtree(root / "models/llama")
    shutil.copytree(root / "saved", root / "models/llama", copy_function=os.link)


BELOW = "ROOT/saved/model.safetensors.d"
REFUSED = {
    "the model that an earlier run saved": (nothing, run_over("ROOT/X", model="ROOT/X/model")),
    "the same by a link": (link("X/model", "alias"), run_over("ROOT/X", model="ROOT/alias")),
    "the same, into a link": (link("X", "alias"), run_over("ROOT/alias", model="ROOT/X/model")),
    "a model below OUT/model": (move("models/llama", "X/model/a/b"), run_over("ROOT/X", model="ROOT/X/model/a/b")),
    "a model below --save-model": (
        move("models/llama", BELOW[5:]),
        run_over("ROOT/new", "--save-model", "ROOT/saved", model=BELOW),
    ),
    "the saved model itself": (nothing, run_over("ROOT/new", "--save-model", "ROOT/saved", model="ROOT/saved")),
    "hard links to the saved model": (hard_links, run_over("ROOT/new", "--save-model", "ROOT/saved")),
    "the allocation": (nothing, run_over("ROOT/run", "--allocation", "ROOT/run/allocation.json")),
    "a text that is called like a result": (
        text_called_a_report("run"),
        run_over("ROOT/run", calib="ROOT/run/report.html"),
    ),
    "a text in the saved model": (
        move("tokens.npz", "saved/tokens.npz"),
        run_over("ROOT/new", "--save-model", "ROOT/saved", calib="ROOT/saved/tokens.npz"),
    ),
    "a report of the user": (written("run/report.html", "<html>mine"), run_over("ROOT/run")),
    "a manifest of something else": (written("run/manifest.json", '{"format": "of an app"}'), run_over("ROOT/run")),
    "masks that changed since": (written("run/masks.safetensors", "theirs"), run_over("ROOT/run")),
    "a fine-tuned model": (written("X/model/model.safetensors", "weeks of work"), run_over("ROOT/X")),
    "results without a manifest": (lambda root: (root / "run/manifest.json").unlink(), run("ROOT/run")),
    "results in the saved model": (nothing, run("ROOT/new/run", "--save-model", "ROOT/new")),
    "programs in the saved model": (
        nothing,
        run("ROOT/o", "--save-model", "ROOT/new", "--compilation-cache", "ROOT/new/cache"),
    ),
    "apply, over its own model": (move("models/llama", BELOW[5:]), apply_over("ROOT/saved", model=BELOW)),
    "apply, over its masks": (
        move("run/masks.safetensors", "saved/old/masks.safetensors"),
        apply_over("ROOT/saved", "ROOT/saved/old/masks.safetensors"),
    ),
    "a conversion over its own model": (move("models/llama", "Y/params"), convert("ROOT/Y", model="ROOT/Y/params")),
    "a conversion over a model below": (
        move("models/llama", "flax/params/llama"),
        convert("ROOT/flax", "--overwrite", model="ROOT/flax/params/llama"),
    ),
    "a conversion above its model": (nothing, convert("ROOT/models", "--overwrite")),
    "perplexity over a config": (nothing, perplexity_over(f"{MODEL}/config.json")),
    "perplexity over its text": (nothing, perplexity_over(TEXT)),
    "perplexity over any file": (nothing, perplexity_over("ROOT/run/manifest.json")),
    "zero-shot over its masks": (nothing, zero_shot_over("ROOT/run/masks.safetensors")),
    "zero-shot over any file": (nothing, zero_shot_over("ROOT/run/manifest.json")),
    "generation over its masks": (nothing, generation_over("ROOT/run/masks.safetensors")),
    "generation over any file": (nothing, generation_over("ROOT/run/manifest.json")),
    "a sweep at the parent of a model": (nothing, sweep_to("ROOT/models")),
    "a sweep over a table of the user": (written("table.csv", "mine,too"), sweep_to("ROOT")),
    "a sweep over its text": (text_called_a_report("S"), sweep_to("ROOT/S", calib="ROOT/S/report.html")),
    "a sweep whose logs are a model": (move("models/llama", "S/logs"), sweep_to("ROOT/S", model="ROOT/S/logs")),
    "a report over a file of the user": (written("run/report.html", "<html>mine"), (report, ["ROOT/run"])),
}


@pytest.mark.parametrize(("prepare", "program"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_ours_stays(root, monkeypatch, capsys, prepare, program):
    def computes(*arguments):
        raise AssertionError("it began to compute")

    monkeypatch.setattr("neuroal_jax.run.pipeline.compute", computes)
    prepare(root)
    before = contents(root)
    main, arguments = program
    assert main([argument.replace("ROOT", str(root)) for argument in arguments]) == 2
    assert contents(root) == before
    error = capsys.readouterr().err.strip().split("\n")[-1].split("\r")[-1]
    assert error.startswith("error: ")
    assert "began" not in error


ALLOWED = {
    "results beside the model": run("ROOT/X2", model="ROOT/X/model"),
    "results around the model": run("ROOT/models"),
    "results in the model": run(f"{MODEL}/pruned"),
    "a model in the model": run("ROOT/n", "--save-model", f"{MODEL}/pruned"),
    "over an earlier run": run_over("ROOT/X"),
    "over an earlier model": run_over("ROOT/new", "--save-model", "ROOT/saved"),
    "over a conversion": convert("ROOT/flax", "--overwrite"),
    "a report again": (report, ["ROOT/run"]),
}


@pytest.mark.parametrize("program", ALLOWED.values(), ids=ALLOWED)
def test_what_only_adds_or_replaces_our_own_is_allowed(root, program):
    before = contents(root)
    (root / "X/notes.txt").write_text("mine")
    main, arguments = program
    assert main([argument.replace("ROOT", str(root)) for argument in arguments]) == 0
    after = contents(root)
    gone = {name for name in before if name not in after}
    assert all(name == "X/model" or name.startswith(("X/model/", "flax/params/")) for name in gone)
    assert {name: after[name] for name in before if name.startswith("models/")} == {
        name: content for name, content in before.items() if name.startswith("models/")
    }
    assert (root / "X/notes.txt").read_text() == "mine"
    assert not [name for name in after if name.endswith((".partial", ".lock", ".resume"))]


def test_a_run_of_an_older_version_is_replaced_where_its_files_say_what_they_are(root, capsys):
    def over(name):
        main, arguments = run_over(f"ROOT/{name}")
        return main([argument.replace("ROOT", str(root)) for argument in arguments])

    for name in ("run", "X"):
        manifest = json.loads((root / name / "manifest.json").read_text())
        del manifest["files"]
        manifest["options"]["save_model"] = str(root / name / "model") if name == "X" else None
        (root / name / "manifest.json").write_text(json.dumps(manifest))
    assert over("run") == 0
    assert "files" in json.loads((root / "run/manifest.json").read_text())
    assert over("X") == 2
    assert "(model exists already)" in capsys.readouterr().err
    assert (root / "X/model/model.safetensors").exists()


# What is kept to go on from.


class Stopped(BaseException):
    """Ends a run as nothing else does."""


def prune_from_python(model, tokens, out, **options):
    config = {"model": str(model), "calib": str(tokens), "out": str(out), "sparsity": 0.5, "pruner": "magnitude"}
    options = {"allocation": "uniform", "eval": "none", "nsamples": 2, **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**config, **options))


@pytest.mark.parametrize("place", ["pruned", "params/pruned"])
def test_a_run_in_the_directory_of_its_model_goes_on(made, tmp_path, monkeypatch, caplog, place):
    model = shutil.copytree(made / ("flax" if "params" in place else "models/llama"), tmp_path / "model")
    out = model / place
    monkeypatch.setattr(states, "_SHARE", 0)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("neuroal_jax.run.pipeline.save_masks", lambda *arguments: (_ for _ in ()).throw(Stopped))
        prune_from_python(model, made / "tokens.npz", out)
    assert (out.parent / ".pruned.resume/identity.json").exists()
    with caplog.at_level("INFO", "neuroal_jax"):
        prune_from_python(model, made / "tokens.npz", out, resume=True, save_model=str(tmp_path / "saved"))
    assert "going on after block 2 of the pruning" in caplog.text
    assert (out / "masks.safetensors").read_bytes() == (made / "run/masks.safetensors").read_bytes()
    assert not (out.parent / ".pruned.resume").exists()
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {path.name for path in (made / "saved").iterdir()}


def someone_publishes(out):
    out.mkdir()
    (out / "manifest.json").write_text("{}")


FAILURES = {
    "a full disk": (lambda out: (_ for _ in ()).throw(OSError(28, "No space left on device", str(out))), True),
    "no right to write": (lambda out: (_ for _ in ()).throw(PermissionError(13, "Permission denied", str(out))), True),
    "an interrupt": (lambda out: (_ for _ in ()).throw(KeyboardInterrupt), True),
    "someone else's result": (someone_publishes, False),
    "a file in the way": (lambda out: out.write_text(""), False),
}


@pytest.mark.parametrize(("fail", "kept"), FAILURES.values(), ids=FAILURES)
def test_a_state_stays_where_it_can_help(made, tmp_path, monkeypatch, fail, kept):
    from neuroal_jax.run import outputs

    publish = outputs.Results.publish
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises((neuroal_jax.UserError, KeyboardInterrupt)):
        patch.setattr(outputs.Results, "publish", lambda self: (fail(out), publish(self)))
        prune_from_python(made / "models/llama", made / "tokens.npz", out)
    assert (tmp_path / ".out.resume").exists() == kept
    assert not list(tmp_path.glob("*.partial"))
    if kept:
        prune_from_python(made / "models/llama", made / "tokens.npz", out, resume=True)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_called_like_a_state_stays(made, tmp_path, monkeypatch):
    model = Path(shutil.copytree(made / "models/llama", tmp_path / ".out.resume"))
    prune_from_python(model, made / "tokens.npz", tmp_path / "out")
    assert contents(model) == contents(made / "models/llama")
