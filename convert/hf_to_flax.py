"""Hugging Face to Flax: writes an Orbax checkpoint with Flax paths and orientation, which `--model` accepts too.

python -m convert.hf_to_flax --model DIR --out DIR
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.values import refuse_same_directory
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.staging import staged
from neuroal_jax.files.writing import write_json
from neuroal_jax.machine.memory import is_exhausted

from .command_line import conversion_parser, run_conversion

_WAIT, _MOST_WAITS = 0.1, 50  # seconds, and how often


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
    if str(out.absolute()).encode(errors="replace").decode() != str(out.absolute()):
        raise UserError(f"--out {out}: Orbax takes no path with bytes that are no UTF-8: choose another")
    checkpoint = open_checkpoint(model)
    inputs = Inputs(("--model", checkpoint.path))
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", inputs=inputs) as staging:
        arrays = {path: np.ascontiguousarray(array) for path, array in flax_params(checkpoint).items()}
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save((staging / PARAMS).absolute(), unflatten_dict(arrays, sep="."))
        except BaseException as error:  # Orbax and TensorStore raise many kinds
            _wait_for_writes(staging)
            if is_exhausted(error) or not isinstance(error, Exception):
                raise
            raise UserError(f"--out {out} cannot be written ({_reason(error)})") from error
        write_json(staging / DIGESTS, file_digests(staging / PARAMS))
        copy_side_files(checkpoint.path, staging)
        checkpoint.check_unchanged()


def _wait_for_writes(directory: Path) -> None:
    """Waits, a moment at most, until the threads that TensorStore leaves behind make no more files in a directory."""
    before = None
    for _ in range(_MOST_WAITS):
        now = {str(path) for path in directory.rglob("*")}
        if now == before:
            return
        before = now
        time.sleep(_WAIT)


def _reason(error: Exception) -> str:
    """What the system said, if TensorStore tells it."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error)[:200]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_conversion(convert, make_parser(), arguments)


def make_parser() -> Parser:
    """The command line."""
    models = "checkpoint directory, Hub model id, or 'demo'"
    examples = ("--model demo --out demo-flax", "--model meta-llama/Llama-2-7b-hf --out llama-flax --overwrite")
    return conversion_parser(__name__, "Write a checkpoint in Flax.", models, examples)
