"""The PyTorch side of a mask file: apply it to a model in memory, save a pruned checkpoint, verify one. Imports no JAX.

python -m convert.masks_to_torch apply --model DIR --masks FILE --out DIR
python -m convert.masks_to_torch verify --model PRUNED --masks FILE
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.checkpoint.saving import copy_edited, copy_side_files
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, refuse_same_directory
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.reading import check_steady
from neuroal_jax.files.staging import staged
from neuroal_jax.masks.file import PackedMasks, check_pruned, masks_of, pruned_problem, read_masks, uncovered

if TYPE_CHECKING:
    import torch


def apply_masks(model: "torch.nn.Module", path: str | Path, *, saved_by_run: bool = False) -> "torch.nn.Module":
    """Zeros in place, in any dtype and on any device, what a mask file prunes.

    Args:
        model: A Hugging Face model of the kind that was pruned.
        path: `masks.safetensors`.
        saved_by_run: Whether the model is the one that the run saved, or was fine-tuned from it. Masks of a
            pruner that changes kept weights too are for no other.

    Returns:
        The same model.

    Raises:
        UserError: If the masks are of another model, or of a pruner that changes kept weights without
            `saved_by_run`. Nothing is changed then.
    """
    import torch

    masks = read_masks(Path(path))
    if masks.updated_weights and not saved_by_run:
        raise UserError(
            f"{path} alone does not hold the result, its pruner changed the kept weights too: load the model that the "
            "run saved and pass saved_by_run=True"
        )
    weights = _weights_of(model, masks)
    with torch.no_grad():
        for name, weight in weights.items():
            kept = torch.from_numpy(masks.mask(name)).to(weight.device)
            weight.masked_fill_(~kept, 0)
    return model


def _weights_of(model: "torch.nn.Module", masks: PackedMasks) -> dict[str, Any]:
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    problems = uncovered(masks, shapes)
    for name, packed in masks.packed.items():
        shape = (packed.shape[0], masks.widths[name])
        if name not in parameters:
            problems.append(f"{name} is not in the model")
        elif tuple(parameters[name].shape) != shape:
            problems.append(f"{name} has shape {list(parameters[name].shape)}, the mask {list(shape)}")
    if problems:
        raise UserError(f"the masks are of another model than this {type(model).__name__}: {shorten(problems)}")
    return {name: parameters[name] for name in masks.packed}


def save_pruned(model: str, masks_path: Path, out: Path, *, overwrite: bool = False) -> None:
    """Writes the pruned Hugging Face directory: masked tensors in their own dtype, everything else byte for byte.

    Args:
        model: Directory, Hub id or `demo`: the dense checkpoint that the masks were computed from.
        masks_path: `masks.safetensors`.
        out: Directory to write.
        overwrite: Whether to replace a checkpoint that `out` already holds.

    Raises:
        UserError: If the masks were computed from other weights, or something cannot be read or written.
    """
    refuse_same_directory({"--model": model, "--out": str(out), "the masks' directory": str(masks_path.parent)})
    source = SafetensorsSource(locate(model))
    masks = masks_of(masks_path, source, model)
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", stale="model*.safetensors*") as staging:
        copy_edited(source, staging, masks.packed, masks.prune)
        copy_side_files(locate(model), staging)
        check_steady(source.steady)


def verify(model: str, masks_path: Path, *, load: bool = True) -> None:
    """Checks that the zeros of a pruned checkpoint are exactly what the masks prune.

    Args:
        model: The pruned checkpoint.
        masks_path: `masks.safetensors`.
        load: Whether to check the weights that transformers loads in PyTorch too, not only the files.

    Raises:
        UserError: Naming the tensors that differ.
    """
    masks = read_masks(masks_path)
    path = locate(model)
    check_pruned(masks, SafetensorsSource(path), model)
    if not load:
        return
    from transformers import AutoModelForCausalLM

    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds
        raise UserError(f"transformers cannot load {model} ({str(error)[:200]}): pass --files-only") from error
    problems = []
    for name, weight in _weights_of(loaded, masks).items():
        zero = (weight == 0).cpu().numpy()
        problem = pruned_problem(masks.mask(name), zero, masks.kept_zeros.get(name, 0))
        if problem:
            problems.append(f"{name} {problem}")
    if problems:
        raise UserError(f"{model}, loaded in PyTorch, is not what the masks describe: {shorten(problems)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done and verified, 2 user error or mismatch)."""
    parser = Parser(prog="python -m convert.masks_to_torch", description="Apply or verify a mask file.")
    commands = parser.add_subparsers(dest="command", required=True)
    apply = commands.add_parser("apply", help="write the pruned Hugging Face checkpoint")
    check = commands.add_parser("verify", help="check that a checkpoint's zeros are exactly the masks")
    for command in (apply, check):
        command.add_argument("--model", required=True, help="checkpoint directory, Hub model id, or 'demo'")
        command.add_argument("--masks", required=True, type=partial(path_to, "masks"), help="masks.safetensors")
    apply.add_argument("--out", required=True, type=partial(path_to, "out"), help="directory to write")
    apply.add_argument("--overwrite", action="store_true", help="replace a checkpoint that --out already holds")
    check.add_argument("--files-only", action="store_true", help="check the files, without loading them in PyTorch")

    def work() -> None:
        options = parser.parse_args(arguments)
        if options.command == "apply":
            save_pruned(options.model, options.masks, options.out, overwrite=options.overwrite)
            print(f"written to {options.out}")
        else:
            verify(options.model, options.masks, load=not options.files_only)
            print(f"{options.model}: its zeros are exactly the masks")

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
