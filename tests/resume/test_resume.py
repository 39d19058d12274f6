"""Going on with an interrupted run: the same masks from every point, refusals by name, nothing left at the end."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.prune import main
from neuroal_jax.resume import state as states
from tests.conftest import RUN

ROOT = Path(__file__).parents[2]
SMALL = {"step": "block", "pruner": "magnitude"}
KILLS = int(os.environ.get("NEUROAL_KILLS", "3"))


@pytest.fixture(autouse=True)
def every_block(monkeypatch):
    """A state after every block, however long writing takes."""
    monkeypatch.setattr(states, "_SHARE", 0)


@pytest.fixture(scope="module")
def model(make_llama):
    return make_llama(num_hidden_layers=2)


def run(model, tokens, out, **options):
    config = {**RUN, "model": str(model), "calib": str(tokens), "eval": str(tokens), "out": str(out), **options}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**config))


class Killed(BaseException):
    """Ends a run as nothing else does."""


def run_until(monkeypatch, writes, *arguments, error=Killed, **options):
    """A run that ends right after its `writes`-th state was written; whether it ended so."""
    write, left = states.State._write, [writes]

    def write_and_end(self, *args):
        write(self, *args)
        left[0] -= 1
        if not left[0]:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(states.State, "_write", write_and_end)
        try:
            run(*arguments, **options)
        except error:
            return True
    return False


def files(out):
    names = ("masks.safetensors", "allocation.json", "model/model.safetensors")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


FEW = {"shape_ramps": "0.1", "shape_depth": 1, "shape_etas": "1,2", "shape_row_lambdas": "0.1"}
CASES = {
    "both steps": {"eval": "none"},
    "magnitude, row step": {"pruner": "magnitude", "step": "row"},
    "multiflow, uniform": {"pruner": "multiflow", "allocation": "uniform", "eval": "none"},
    "sparsegpt": {"pruner": "sparsegpt", "sparsegpt_group": 24, "allocation": "uniform", "dtype": "bfloat16"},
    "owl": {"allocation": "owl", "eval": "none", "refine": "dsnot"},
    "by kl": {"eval": "none", "objective": "kl"},
    "alpha": {"allocation": "alpha", "eval": "none"},
    "refit": {"allocation": "uniform", "eval": "none", "refine": "refit", "nsamples": 5},
    "shape": {"allocation": "shape", "eval": "none", **FEW},
    "refit in the loop": {
        **{"allocation": "neuroal", "step": "block", "eval": "none", "objective": "kl", "refine": "refit"},
        **{"search_refine": True, "search_samples": 2},
    },
}


SLOW = ("magnitude, row step", "multiflow, uniform", "alpha")


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, options in CASES.items()],
)
def test_a_run_goes_on_from_every_block_to_the_same_bytes(model, tokens, tmp_path, monkeypatch, options):
    expected = run(model, tokens, tmp_path / "whole", **options)
    out, points = tmp_path / "out", 0
    while run_until(monkeypatch, 1, model, tokens, out, resume=True, **options):  # each time one block further
        points += 1
        assert [path.name for path in tmp_path.iterdir()] != ["out"]
        assert not out.exists()
    result = neuroal_jax.load_masks(out / "masks.safetensors")
    assert files(out) == files(tmp_path / "whole")
    assert len(result) == len(expected.masks.packed)
    again = json.loads((out / "manifest.json").read_text())
    recorded = (
        "scores",
        "alignment",
        "measured",
        "gains",
        "damping",
        "refit",
        "token_ppl",
        "zeros_per_linear",
        "sparsity",
    )
    for key in recorded:
        assert again[key] == expected.manifest[key], key
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    before = {"uniform": 0, "owl": 1, "alpha": 1, "shape": 8}.get(
        options.get("allocation"), (2 if options["step"] == "row" else 1) if "step" in options else 3
    )
    before += "objective" in options  # the dense model's distributions
    assert points == 2 * (before + 1 + 2 * ("eval" not in options))


def test_skipped_blocks_are_written_with_the_next(model, tokens, tmp_path, monkeypatch):
    run(model, tokens, tmp_path / "whole")
    write, calls = states.State._write, []

    def every_third(self, *args):
        calls.append(args)
        if len(calls) % 3 == 0:
            write(self, *args)
        if len(calls) == 11:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(states.State, "_write", every_third)
        run(model, tokens, tmp_path / "out")
    run(model, tokens, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_state_is_written_only_when_it_is_cheap(model, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "_SHARE", 1e9)
    writes = []
    write = states.State._write
    monkeypatch.setattr(states.State, "_write", lambda self, *args: (writes.append(args), write(self, *args)))
    run(model, tokens, tmp_path / "out", eval="none", allocation="uniform")
    assert [item.block for _, item, _ in writes] == [1]  # the last block, which leaves no hidden states


@pytest.fixture
def interrupted(model, tokens, tmp_path, monkeypatch):
    """The place of a run that ended in the middle of its search."""
    assert run_until(monkeypatch, 3, model, tokens, tmp_path / "out", **SMALL)
    return tmp_path / "out", SMALL


@pytest.fixture(scope="module")
def reference(model, tokens, tmp_path_factory):
    """The files of that run, had it gone on."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(model, tokens, out, **SMALL)
    return files(out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pruner": "wanda"}, "--pruner is wanda, in the interrupted run it was magnitude"),
        ({"sparsity": 0.5}, "--sparsity is 0.5, in the interrupted run it was 0.6"),
        ({"dtype": "bfloat16"}, "--dtype is bfloat16, in the interrupted run it was float32"),
        ({"eval": "none"}, "--eval is none"),
        ({"nsamples": 4}, "--nsamples is 4, in the interrupted run it was 128"),
    ],
)
def test_other_options_are_refused_by_name(model, tokens, interrupted, changed, message):
    out, options = interrupted
    before = sorted(out.with_name(".out.resume").rglob("*"))
    with pytest.raises(neuroal_jax.UserError, match=f"{message}.*run without --resume"):
        run(model, tokens, out, **{**options, **changed}, resume=True)
    assert sorted(out.with_name(".out.resume").rglob("*")) == before


def test_what_does_not_change_the_masks_may_change(model, tokens, interrupted, reference):
    out, options = interrupted
    run(model, tokens, out, **options, resume=True, candidate_batch=1, save_model=str(out.parent / "saved"))
    assert (out / "masks.safetensors").read_bytes() == reference["masks.safetensors"]


def test_another_model_and_other_tokens_are_refused_by_name(model, tokens, tmp_path, monkeypatch):
    mine, calib = tmp_path / "model", tmp_path / "tokens.npz"
    shutil.copytree(model, mine)
    shutil.copy(tokens, calib)
    options = {"allocation": "uniform", "eval": "none", "pruner": "magnitude"}
    assert run_until(monkeypatch, 1, mine, calib, tmp_path / "out", **options)
    found = np.load(tokens)
    np.savez(calib, calibration=found["evaluation"], evaluation=found["evaluation"])
    with pytest.raises(neuroal_jax.UserError, match="the SHA-256 of the calibration tokens is "):
        run(mine, calib, tmp_path / "out", resume=True, **options)
    shutil.copy(tokens, calib)
    os.utime(mine / "model.safetensors")
    with pytest.raises(neuroal_jax.UserError, match=r"bytes and time of the model's model\.safetensors is "):
        run(mine, calib, tmp_path / "out", resume=True, **options)


def test_other_weights_behind_the_same_files_are_refused_in_the_end(model, tokens, interrupted):
    out, options = interrupted
    place = out.with_name(".out.resume") / "identity.json"
    about = json.loads(place.read_text())
    place.write_text(json.dumps({**about, "weights": "0" * 64}))
    with pytest.raises(neuroal_jax.UserError, match="the weights' SHA-256 is "):
        run(model, tokens, out, **options, resume=True)
    assert not out.exists()


def test_without_resume_a_run_starts_over(model, tokens, interrupted, caplog):
    out, options = interrupted
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, out, **{**options, "pruner": "wanda"})
    assert "starting over: the state of an interrupted run is removed" in caplog.text
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_resume_without_a_state_starts_from_the_beginning(model, tokens, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, tmp_path / "out", allocation="uniform", eval="none", resume=True)
    assert "no interrupted run to go on with" in caplog.text


def damage_identity(state):
    (state / "identity.json").write_text('{"identity": [')


def remove_identity(state):
    (state / "identity.json").unlink()


def stored(state):
    """The files with arrays: outputs of blocks, and the hidden states after the last one."""
    found = [*state.glob("*.hidden"), *state.glob("*.outputs")]
    assert len(found) > 2
    return found


def truncate(state):
    for path in stored(state):
        os.truncate(path, path.stat().st_size // 2)


def flip(state):
    for path in stored(state):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def flip_a_number(state):
    (path,) = state.glob("*.hidden")
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF  # of the last array: the file itself is whole
    path.write_bytes(content)


def remove_an_output(state):
    sorted(state.glob("*.outputs"))[0].unlink()


def exchange_outputs(state):
    first, second, *_ = sorted(state.glob("*.outputs"))
    shutil.copy(second, first)


def add_what_a_kill_leaves(state):
    shutil.copy(next(state.glob("*.hidden")), state / ".09-search-00001.hidden.123-456.partial")
    shutil.copy(next(state.glob("*.outputs")), state / "02-pruning-00001.outputs")
    (state / ".identity.json.123.partial").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        damage_identity,
        remove_identity,
        truncate,
        flip,
        flip_a_number,
        remove_an_output,
        exchange_outputs,
        add_what_a_kill_leaves,
    ],
)
def test_a_damaged_state_costs_no_more_than_time(model, tokens, interrupted, reference, tmp_path, damage, caplog):
    out, options = interrupted
    damage(tmp_path / ".out.resume")
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, out, **options, resume=True)
    assert (" is damaged " in caplog.text) == (damage is not add_what_a_kill_leaves)
    assert files(out) == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_user_error_leaves_no_state(model, tokens, tmp_path, monkeypatch):
    def fail(*args):
        raise neuroal_jax.UserError("no")

    monkeypatch.setattr("neuroal_jax.walk.final.prune", fail)
    with pytest.raises(neuroal_jax.UserError, match="no"):
        run(model, tokens, tmp_path / "a" / "out", allocation="uniform")
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_cannot_be_written_stops_no_run(model, tokens, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neuroal_jax.resume.store.save_file", full)
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, tmp_path / "out", allocation="uniform", eval="none")
    assert caplog.text.count("the state cannot be written any more") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_share_a_state(model, tokens, tmp_path, caplog):
    from neuroal_jax.files.claims import take

    (tmp_path / ".out.resume").mkdir()
    (tmp_path / ".out.resume" / "theirs").touch()
    lock = take(tmp_path / ".out.resume")
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        run(model, tokens, tmp_path / "out", allocation="uniform", eval="none", resume=True)
    os.close(lock)
    assert "another run uses" in caplog.text
    assert (tmp_path / ".out.resume" / "theirs").exists()


def test_a_terminated_run_says_how_to_go_on(model, tokens, tmp_path):
    program = (
        "import os, signal, sys\nfrom neuroal_jax.resume import state\nfrom neuroal_jax.prune import program\n"
        "write = state.State._write\n"
        "def write_and_end(*a):\n    write(*a)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "state.State._write = write_and_end\nprogram()"
    )
    arguments = ["--model", model, "--sparsity", 0.6, "--calib", tokens, "--eval", "none", "--allocation", "uniform"]
    arguments = [*map(str, arguments), "--seqlen", "16", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.strip().splitlines()[-1] == (
        "interrupted: the state after block 0 of the pruning is kept; the same command with --resume goes on from there"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".out.resume"]
    assert main([*arguments, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_go_on(model, tokens, tmp_path):
    config = {**RUN, **SMALL, "model": str(model), "calib": str(tokens), "eval": str(tokens)}
    config["compilation_cache"] = str(tmp_path / "cache")  # a kill may cut off what is being written
    command = [sys.executable, "-m", "tests.resume.killed_runs", str(KILLS), str(tmp_path), json.dumps(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{KILLS} went on to the same masks" in done.stdout
