"""Runs on several devices give the bytes of one: virtual devices of a CPU, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Batches of four windows, so that there are several to divide.
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import neuroal_jax
from neuroal_jax.walk import blocks
blocks._BATCH_TOKENS = blocks._EVALUATION_TOKENS = 4 * int(sys.argv[1])
out = Path(sys.argv[2])
for number, options in enumerate(json.loads(sys.argv[3])):
    place = out / str(number)
    manifest = neuroal_jax.prune(neuroal_jax.PruneConfig(out=str(place), **options)).manifest
    files = [place / "masks.safetensors", place / "allocation.json", *sorted(place.glob("model/*.safetensors"))]
    print(json.dumps({
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "scores": manifest["candidates"], "batch": manifest["candidate_batch"], "perplexity": manifest["token_ppl"],
        "devices": manifest["devices"], "measured": manifest["measured"],
    }))
"""
# The candidates of a call are given, as scores of others may differ in their last bits.
METHODS = {
    "wanda neuroal": {"pruner": "wanda", "allocation": "neuroal", "candidate_batch": 1},
    "sparsegpt uniform": {"pruner": "sparsegpt", "allocation": "uniform", "sparsegpt_group": 24},
}
MORE_METHODS = {
    "wanda neuroal": {"pruner": "wanda", "allocation": "neuroal", "candidate_batch": 7},
    "sparsegpt neuroal in bfloat16": {
        "pruner": "sparsegpt", "allocation": "neuroal", "candidate_batch": 7, "dtype": "bfloat16",
    },
    "wanda owl dsnot": {"pruner": "wanda", "allocation": "owl", "refine": "dsnot"},
    "wanda shape": {"pruner": "wanda", "allocation": "shape", "shape_depth": 1, "candidate_batch": 1},
    "wanda shape in the loop": {
        "pruner": "wanda", "allocation": "shape", "refine": "refit", "search_refine": True, "shape_depth": 1,
        "candidate_batch": 1,
    },
}  # fmt: skip


def found(root, shared, methods, devices, seqlen):
    """What every method gives on so many devices."""
    runs = [{**shared, **options, "devices": devices} for options in methods.values()]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seqlen), str(root / f"{devices}"), json.dumps(runs)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(methods, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_run_on_three_devices_gives_the_bytes_of_one(llama, tokens, tmp_path):
    shared = {"model": str(llama), "sparsity": 0.6, "calib": str(tokens), "eval": str(tokens), "seqlen": 16}
    shared |= {"block_lambdas": "0.05,0.2", "row_lambdas": "0.0,0.1,0.2", "nsamples": 14}
    alone = found(tmp_path, shared, METHODS, 1, 16)
    several = found(tmp_path, shared, METHODS, 3, 16)
    for name in METHODS:
        assert several[name].pop("devices") == 3
        assert alone[name].pop("devices") == 1
        assert several[name] == alone[name], name


@pytest.mark.slow
def test_two_devices_give_the_bytes_of_one(tmp_path):
    shared = {"model": "demo", "sparsity": 0.7, "calib": "demo", "eval": "demo", "nsamples": 16, "seqlen": 64}
    alone = found(tmp_path, shared, MORE_METHODS, 1, 64)
    several = found(tmp_path, shared, MORE_METHODS, 2, 64)
    for name in MORE_METHODS:
        assert {**several[name], "devices": 1} == alone[name], name
        assert several[name]["devices"] == 2
