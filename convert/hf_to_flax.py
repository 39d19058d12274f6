"""Hugging Face to Flax: writes an Orbax checkpoint with Flax paths and orientation, which `--model` accepts too.

python -m convert.hf_to_flax --model DIR --out DIR
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, refuse_same_directory
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.staging import staged
from neuroal_jax.files.writing import write_json


def convert(model: str, out: Path, *, overwrite: bool = False) -> None:
    """Writes `out/params` (Orbax), the SHA-256 of its files, config.json and the tokenizer.

    No value changes: only the linears are transposed. Going back gives every tensor bit for bit.

    Args:
        model: Directory, Hub id or `demo`.
        out: Directory to write.
        overwrite: Whether to replace a checkpoint that `out` already holds.

    Raises:
        UserError: If the model cannot be read or `out` cannot be written.
    """
    import numpy as np
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.checkpoint.orbax import PARAMS, file_digests
    from neuroal_jax.checkpoint.saving import DIGESTS, copy_side_files
    from neuroal_jax.finetune import flax_params

    refuse_same_directory({"--model": model, "--out": str(out)})
    checkpoint = open_checkpoint(model)
    inputs = Inputs(("--model", checkpoint.path))
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", inputs=inputs) as staging:
        arrays = {path: np.ascontiguousarray(array) for path, array in flax_params(checkpoint).items()}
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((staging / PARAMS).absolute(), unflatten_dict(arrays, sep="."))
        write_json(staging / DIGESTS, file_digests(staging / PARAMS))
        copy_side_files(checkpoint.path, staging)
        checkpoint.check_unchanged()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="python -m convert.hf_to_flax", description="Write a checkpoint in Flax.")
    parser.add_argument("--model", required=True, help="checkpoint directory, Hub model id, or 'demo'")
    parser.add_argument("--out", required=True, type=partial(path_to, "out"), help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that --out already holds")

    def work() -> None:
        options = parser.parse_args(arguments)
        convert(options.model, options.out, overwrite=options.overwrite)
        print(f"written to {options.out}")

    return run_program(work)
