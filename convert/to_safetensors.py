"""Pickled weights to safetensors: `pytorch_model.bin` or its shards, as older models have them. Imports no JAX.

python -m convert.to_safetensors --model DIR_OR_ID --out DIR

No code of the files runs: PyTorch's restricted unpickler makes tensors and plain containers, and refuses all else.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

from collections.abc import Sequence
from pathlib import Path

from neuroal_jax.checkpoint.listing import PICKLED, SAFETENSORS
from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import weight_files
from neuroal_jax.checkpoint.saving import copy_side_files
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.values import refuse_same_directory
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.reading import SteadyFile, check_steady
from neuroal_jax.files.staging import staged
from neuroal_jax.files.writing import naming, write_json

from .command_line import conversion_parser, run_conversion


def convert(model: str, out: Path, *, overwrite: bool = False) -> None:
    """Writes a checkpoint in safetensors: every tensor under its name, in its dtype, one file for each pickled one.

    Tensors that share memory, as a tied head does with the embedding, are written as often as they are named. Memory
    holds one file at a time.

    Args:
        model: Directory or Hub id of a checkpoint with pickled weights.
        out: Directory to write.
        overwrite: Whether to replace a checkpoint that `out` already holds.

    Raises:
        UserError: If the files hold anything but tensors, they and their index disagree, or `out` cannot be written.
    """
    from .pickled import read_tensors, save_tensors

    refuse_same_directory({"--model": model, "--out": str(out)})
    source = locate(model, weights=PICKLED)
    files, index = weight_files(source, PICKLED)
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json: expected a Hugging Face checkpoint directory")
    steady = [SteadyFile.at(file) for file in files]
    inputs = Inputs(("--model", source))
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", inputs=inputs) as staging:
        written: dict[str, str] = {}
        size = 0
        for number, file in enumerate(files, 1):
            shard = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SAFETENSORS.single
            tensors = read_tensors(file)
            if index:
                _check_index(source / PICKLED.index, index, file, set(tensors))
            with naming(staging / shard):
                save_tensors(tensors, staging / shard)
            written |= dict.fromkeys(tensors, shard)
            size += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
        if len(files) > 1:
            content = {"metadata": {"total_size": size}, "weight_map": written}
            write_json(staging / SAFETENSORS.index, content)
        copy_side_files(source, staging)
        check_steady(steady)


def _check_index(path: Path, index: dict[str, str], file: Path, names: set[str]) -> None:
    """Raises UserError unless a file holds the very tensors that the index places in it."""
    listed = {name for name, shard in index.items() if shard == file.name}
    if missing := sorted(listed - names):
        raise UserError(f"{path} places tensor {missing[0]} in {file.name}, which lacks it: download both again")
    if extra := sorted(names - listed):
        raise UserError(f"{file} holds tensor {extra[0]}, which {path} does not place there: download both again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_conversion(convert, make_parser(), arguments)


def make_parser() -> Parser:
    """The command line."""
    models = "checkpoint directory with pytorch_model.bin, or Hub model id"
    examples = ("--model facebook/opt-125m --out opt-125m", "--model old-checkpoint --out checkpoint --overwrite")
    return conversion_parser(__name__, "Write pickled weights as safetensors.", models, examples)
