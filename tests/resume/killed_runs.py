"""Kills runs at random moments and goes on with each; fails unless the masks are those of an untouched run.

python -m tests.resume.killed_runs KILLS DIR '{"model": ..., "sparsity": 0.7, ...}'

Each run is a fork of this process, which has imported everything but has never used JAX.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import orbax.checkpoint  # noqa: F401 (for the children)

import neuroal_jax
from neuroal_jax.resume import state
from neuroal_jax.run import pipeline


def start(config, **options):
    """Begins a run in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    state._SHARE = 0  # a state after every block
    try:
        pipeline.prune(neuroal_jax.PruneConfig(**config, **options))
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def finish(process):
    """Waits for a process; returns its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def check(out, reference):
    """Whether `out` holds a complete run; it must hold that or nothing, and lie among hidden directories only."""
    visible = [path.name for path in out.parent.iterdir() if not path.name.startswith(".")]
    assert visible in ([], [out.name]), visible
    if not out.exists():
        return False
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}
    for name in ("masks.safetensors", "allocation.json", "model/model.safetensors"):
        if (reference / name).exists():
            assert (out / name).read_bytes() == (reference / name).read_bytes(), name
    json.loads((out / "manifest.json").read_text())
    return True


def main(kills, directory, config):
    """Prints how many of the kills left a state, and after how many the masks were right."""
    directory = Path(directory)
    reference = directory / "reference" / "out"
    assert finish(start(config, out=str(reference))) == 0  # compiles, too
    begin = time.monotonic()
    assert finish(start(config, out=str(reference), overwrite=True)) == 0
    seconds = time.monotonic() - begin
    draw = random.Random(0)
    killed = kept = right = 0
    while right < kills:
        place = directory / f"run{right}"
        out = place / "out"
        place.mkdir()
        process = start(config, out=str(out))
        time.sleep(draw.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        if finish(process) == 0:  # it was quicker than the kill
            place.rename(directory / f"quick{len(list(directory.iterdir()))}")
            continue
        killed += 1
        complete = check(out, reference)
        kept_state = place / ".out.resume"
        kept += bool(list(kept_state.glob("*.hidden")))
        assert finish(start(config, out=str(out), resume=True, overwrite=complete)) == 0
        assert check(out, reference)
        assert os.listdir(place) == ["out"], os.listdir(place)
        right += 1
    print(f"{killed} kills in runs of {seconds:.1f} s, {kept} left a state, {right} went on to the same masks")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
