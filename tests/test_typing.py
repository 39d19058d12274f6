"""What type checkers know of the public names: their types, and the mistakes in a user's script."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SCRIPT = """
from pathlib import Path

import neuroal_jax

config = neuroal_jax.PruneConfig(model="demo", sparsity=0.7, allocation="owl", owl_m=3.0, out="run")
reveal_type(neuroal_jax.prune(config))
reveal_type(neuroal_jax.prune(config).report())


def tell(now: neuroal_jax.Progress) -> None:
    print(now.stage, now.done / now.total, now.seconds)


reveal_type(neuroal_jax.prune(config, progress=tell))
reveal_type(config.sparsity)
masks = neuroal_jax.load_masks(Path("run/masks.safetensors"))
reveal_type(masks)
reveal_type(neuroal_jax.load_model("demo"))
reveal_type(neuroal_jax.masks.read_masks(Path("x")))
reveal_type(neuroal_jax.checkpoint.open_checkpoint("demo"))
"""
MISTAKES = """
import neuroal_jax
import neuroal_jax.checkpoint

neuroal_jax.PruneConfig(model=3, out="run")
neuroal_jax.prune("demo")
neuroal_jax.prune(neuroal_jax.PruneConfig(model="demo", out="run")).mask
neuroal_jax.prunes
neuroal_jax.checkpoint.open_checkpoints
neuroal_jax.load_masks(3)
neuroal_jax.prune(neuroal_jax.PruneConfig(model="demo", out="run"), progress=3)
"""


def mypy(tmp_path, script):
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports", "script.py"]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def test_a_user_s_script_is_understood(tmp_path):
    imports = "import neuroal_jax.checkpoint\nimport neuroal_jax.masks\n"
    found = mypy(tmp_path, imports + SCRIPT)
    revealed = [line.split('"')[1] for line in found if "Revealed type" in line]
    assert revealed == [
        "neuroal_jax.run.result.PruneResult",
        "pathlib.Path",
        "neuroal_jax.run.result.PruneResult",
        "float | None",
        "dict[str, numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]]",
        "neuroal_jax.models.causal_lm.CausalLM",
        "neuroal_jax.masks.file.PackedMasks",
        "neuroal_jax.checkpoint.opened.Checkpoint",
    ]
    assert found[-1].startswith("Success"), found


def test_mistakes_are_found(tmp_path):
    found = mypy(tmp_path, MISTAKES)
    lines = [int(line.split(":")[1]) for line in found if ": error:" in line]
    assert lines == [5, 6, 7, 8, 9, 10, 11], found
