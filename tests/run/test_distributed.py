"""Runs of several processes: the bytes of one, files of the first one only, and one end for all."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import neuroal_jax
from neuroal_jax.prune import main

ROOT = Path(__file__).parents[2]
# A moment in which each state can be seen; files of at most so many bytes.
PROGRAM = """
import json, resource, sys, time
from neuroal_jax.prune import main
from neuroal_jax.resume import state
arguments, pause, most = json.loads(sys.argv[1])
write = state.State._write
def write_and_wait(self, *args):
    write(self, *args)
    time.sleep(pause)
if pause:
    state.State._write = write_and_wait
if most:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
sys.exit(main(arguments))
"""
ONE_EACH = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost"}
ONE_A_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,elsewhere"}
SHORT = ["--eval", "none", "--seqlen", "16", "--block-lambdas", "0.05,0.1,0.15,0.2"]
# Four candidates in each step: two together are right for one device as for two.
SHORT += ["--row-lambdas", "0.0,0.1,0.15,0.2"]


def slurm(variables, rank):
    """The environment of a process that srun started, on a machine of two devices."""
    here = {"SLURM_NODEID": "0", "SLURM_LOCALID": str(rank)}
    if variables is ONE_A_NODE:
        here = {"SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), **here, **variables}
    return {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", **job}


def start(place, arguments, *, pause=0, most=0, environment=None):
    """Begins a process in a directory of its own, to which its --out belongs."""
    place.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, "-c", PROGRAM, json.dumps([[*map(str, arguments), "--out", "out"], pause, most])]
    environment = {**(environment or os.environ), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(program, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_two(root, arguments, *, first=(), other=(), pause=0, most=0):
    """Begins two processes of a run; the second has a directory of its own."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = f"localhost:{taken.getsockname()[1]}"
    ranks = [[*arguments, "--distributed", f"{place},2,{rank}", *more] for rank, more in ((0, first), (1, other))]
    return (
        start(root / "first", ranks[0], pause=pause, most=most),
        start(root / "other", ranks[1]),
    )


def end(process):
    """The exit code and the last line on stderr, behind progress bars; there is no traceback."""
    _, errors = process.communicate(timeout=120)
    text = errors.decode()
    assert "Traceback" not in text, text
    return process.returncode, text.replace("\r", "\n").strip().rpartition("\n")[2].strip()


def results(out):
    names = ("masks.safetensors", "allocation.json", "model/model.safetensors")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def of_one(root, arguments):
    assert end(start(root / "alone", arguments))[0] == 0
    return root / "alone" / "out"


def wait_for(state, label):
    """Waits until there is a state of a walk."""
    deadline = time.monotonic() + 120
    while not list(state.glob(f"*-{label}-*.hidden")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_under_slurm_a_process_has_its_own_device_and_the_first_writes(llama, tokens, tmp_path):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT, "--candidate-batch", "1"]
    alone = of_one(tmp_path, arguments)
    arguments += ["--distributed", "auto"]
    both = [start(tmp_path / f"{rank}", arguments, environment=slurm(ONE_EACH, rank)) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[1] == (b"", b"")
    assert os.listdir(tmp_path / "1") == []
    assert results(tmp_path / "0" / "out") == results(alone)
    found, expected = manifest(tmp_path / "0" / "out"), manifest(alone)
    assert (found["processes"], found["devices"]) == (2, 1)
    assert expected["processes"] == 1
    assert found["candidates"] == expected["candidates"]


@pytest.mark.slow
def test_under_slurm_one_process_a_node_has_all_devices(llama, tokens, tmp_path):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT, "--candidate-batch", "1"]
    alone = of_one(tmp_path, arguments)
    arguments += ["--distributed", "auto"]
    both = [start(tmp_path / f"{rank}", arguments, environment=slurm(ONE_A_NODE, rank)) for rank in (0, 1)]
    assert [end(process)[0] for process in both] == [0, 0]
    assert results(tmp_path / "0" / "out") == results(alone)
    assert manifest(tmp_path / "0" / "out")["devices"] == 2


LOOP = ["--allocation", "shape", "--shape-depth", "1", "--refine", "refit", "--search-refine", "--search-samples", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "together"),
    [
        (["--pruner", "sparsegpt", "--sparsegpt-group", "24"], 2),
        (["--allocation", "shape", "--shape-depth", "1"], 1),
        (LOOP, 1),
        (["--allocation", "owl", "--refine", "dsnot"], 1),
    ],
    ids=["sparsegpt neuroal", "shape", "refit in the loop", "owl without a search"],
)
def test_two_processes_give_the_bytes_of_one(llama, tokens, tmp_path, method, together):
    options = [*(SHORT if "--pruner" in method else SHORT[:4]), "--candidate-batch", together]
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *options, *method]
    alone = of_one(tmp_path, arguments)
    assert [end(process)[0] for process in start_two(tmp_path, arguments)] == [0, 0]
    assert results(tmp_path / "first" / "out") == results(alone)
    assert manifest(tmp_path / "first" / "out")["candidates"] == manifest(alone)["candidates"]
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "number", "place"),
    [
        (0, signal.SIGKILL, "scores-of-all"),
        (0, signal.SIGTERM, "pruning"),
        (1, signal.SIGKILL, "pruning"),
        (1, signal.SIGTERM, "scores-of-all"),
    ],
)
def test_the_end_of_one_is_the_end_of_all_and_resume_goes_on(llama, tokens, tmp_path, which, number, place):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT]
    alone = of_one(tmp_path, arguments)
    both = start_two(tmp_path, arguments, pause=3)
    state = tmp_path / "first" / ".out.resume"
    wait_for(state, place)
    both[which].send_signal(number)
    killed, other = both[which], both[1 - which]
    code, line = end(killed)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    code, line = end(other)
    assert code == 130
    assert line.startswith(f"interrupted: process {which}")
    assert "ended: see what it said" in line
    if which == 1:
        assert f"of the {place} is kept" in line
        assert "--resume" in line
    assert not (tmp_path / "first" / "out").exists()
    assert list(state.glob("*.hidden"))
    again = start_two(tmp_path, [*arguments, "--resume"])
    stdout = again[0].communicate(timeout=120)[0].decode()
    assert "--resume: going on after block" in stdout
    assert end(again[1]) == (0, "")
    assert results(tmp_path / "first" / "out") == results(alone)
    assert os.listdir(tmp_path / "first") == ["out"]
    assert os.listdir(tmp_path / "other") == []


@pytest.mark.slow
@pytest.mark.parametrize("label", ["search", "pruning"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_other_devices(llama, tokens, tmp_path, before, after, label):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT, "--candidate-batch", "1"]
    arguments += ["--pruner", "sparsegpt", "--sparsegpt-group", "24"]  # weights and Hessians too
    alone = of_one(tmp_path, arguments)
    virtual = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = start(tmp_path / "first", [*arguments, "--devices", before], pause=3, environment=virtual)
    wait_for(tmp_path / "first" / ".out.resume", label)
    run.kill()
    run.communicate()
    again = start(tmp_path / "first", [*arguments, "--devices", after, "--resume"], environment=virtual)
    assert f"--resume: going on after block 0 of the {label}" in again.communicate(timeout=120)[0].decode()
    assert results(tmp_path / "first" / "out") == results(alone)
    assert manifest(tmp_path / "first" / "out")["devices"] == after


@pytest.mark.slow
def test_a_full_disk_of_the_first_ends_both(llama, tokens, tmp_path):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT]
    first, other = start_two(tmp_path, arguments, most=2000)
    code, line = end(first)
    assert code == 2
    assert "File too large" in line
    code, line = end(other)
    assert "File too large" in line
    assert code == 2
    assert not (tmp_path / "first" / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        (["--seed", "1"], [], "--seed is 0 in process 1"),
        ([], ["--model", "/nowhere"], "/nowhere: no such directory"),
        (["--calib", "/nowhere.npz"], [], "/nowhere.npz"),
    ],
)
def test_what_one_cannot_use_ends_both_in_a_line(llama, tokens, tmp_path, first, other, message):
    arguments = ["--model", llama, "--sparsity", "0.6", "--calib", tokens, *SHORT]
    codes, lines = zip(*map(end, start_two(tmp_path, arguments, first=first, other=other)), strict=True)
    assert message in lines[0 if first else 1]
    assert message in lines[0] or "process 0 ended" in lines[1]
    assert codes[0] == 2
    assert codes[1] == (130 if "ended" in lines[1] else 2)
    assert os.listdir(tmp_path / "first") == os.listdir(tmp_path / "other") == []


def test_a_dry_run_waits_for_nobody_and_divides_candidates(llama, tokens, capsys):
    shared = {"model": str(llama), "sparsity": 0.5, "calib": str(tokens), "eval": "none", "dry_run": True}
    shared |= {"device_memory": "1GiB"}
    most = [
        neuroal_jax.prune(neuroal_jax.PruneConfig(**shared, distributed=given)).plan.candidate_batch
        for given in (None, "localhost:4000,2,0", "localhost:4000,7,0")
    ]
    assert most == [14, 7, 2]
    capsys.readouterr()
    result = neuroal_jax.prune(neuroal_jax.PruneConfig(**shared, distributed="localhost:4000,2,1"))
    assert (result.plan, result.out, capsys.readouterr().out) == (None, None, "")


def test_groups_are_checked(llama, capsys):
    for given in ("localhost:4000,2,2", "localhost:4000,2", "localhost,2,0", "localhost:0,2,0", "two", "auto,1"):
        assert main(["--model", str(llama), "--sparsity", "0.5", "--out", "x", "--distributed", given]) == 2
        assert f"--distributed is '{given}', expected auto or HOST:PORT,PROCESSES,RANK" in capsys.readouterr().err
    assert main(["--model", str(llama), "--sparsity", "0.5", "--out", "x", "--distributed", "auto"]) == 2
    assert "--distributed auto reads SLURM_JOB_ID" in capsys.readouterr().err
