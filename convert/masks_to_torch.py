"""The PyTorch side of a mask file: apply it to a model in memory, save a pruned checkpoint, verify one. Imports no JAX.

What is pruned packs: `convert.packing` has the two commands that need no masks.

python -m convert.masks_to_torch apply --model DIR --masks FILE --out DIR
python -m convert.masks_to_torch verify --model PRUNED --masks FILE
python -m convert.masks_to_torch pack --model PRUNED --out DIR
python -m convert.masks_to_torch unpack --packed DIR --out DIR
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from neuroal_jax.checkpoint.hugging_face import load_torch_model
from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.checkpoint.saving import copy_edited, copy_side_files
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, refuse_same_directory
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.reading import check_steady
from neuroal_jax.files.staging import staged
from neuroal_jax.masks.file import PackedMasks, check_pruned, check_zeros, masks_of, read_masks
from neuroal_jax.masks.patterns import KeptOf

from .packing import pack, unpack
from .torch_weights import masked_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

SEMI_STRUCTURED_TILE = (32, 64)  # shapes that are multiples of this fit PyTorch's 2:4 kernels in 16 bits

log = logging.getLogger("neuroal_jax")


def apply_masks(model: "torch.nn.Module", path: str | Path, *, saved_by_run: bool = False) -> "torch.nn.Module":
    """Zeros in place, in any dtype and on any device, what a mask file prunes.

    Weights are zeroed once: training moves them again unless their gradients are masked, or the masks are applied after
    every step. Adapters (PEFT) stay as they are: apply the masks again after merging them.

    Args:
        model: A Hugging Face model of the kind that was pruned, or what wraps it (torch.compile, DataParallel, PEFT).
        path: `masks.safetensors`.
        saved_by_run: Whether the model is the one that the run saved, or was fine-tuned from it. Masks of a
            pruner that changes kept weights too are for no other.

    Returns:
        The same model.

    Raises:
        UserError: If the masks are of another model, or of a pruner that changes kept weights without
            `saved_by_run`. Nothing is changed then.

    Example:
        >>> import tempfile, neuroal_jax
        >>> from transformers import AutoModelForCausalLM
        >>> from neuroal_jax.checkpoint.locate import locate
        >>> from neuroal_jax.convert.masks_to_torch import apply_masks
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none", out=tempfile.mkdtemp()
        ... )
        >>> result = neuroal_jax.prune(config)
        >>> model = AutoModelForCausalLM.from_pretrained(locate("demo"))
        >>> pruned = apply_masks(model, result.out / "masks.safetensors")
        >>> sum(int((pruned.get_parameter(name) == 0).sum()) for name in result.masks.packed)
        516096
    """
    import torch

    masks = read_masks(Path(path))
    if masks.updated_weights and not saved_by_run:
        raise UserError(
            f"{path} alone does not hold the result, its pruner changed the kept weights too: load the model that the "
            "run saved and pass saved_by_run=True"
        )
    weights = masked_weights(model, masks)
    with torch.no_grad():
        for name, weight in weights.items():
            kept = torch.from_numpy(masks.mask(name)).to(weight.device)
            weight.masked_fill_(~kept, 0)
    if (use := semi_structured_use(masks)) is not None:
        log.warning(use)  # the level that a library's user sees
    return model


def semi_structured_use(masks: PackedMasks) -> str | None:
    """What PyTorch's 2:4 kernels can make of masks with a pattern; None if nothing."""
    if masks.pattern is None:
        return None
    fitting = sum(fits_semi_structured(masks.mask(name)) for name in masks.packed)
    if not fitting:
        return None
    return (
        f"at most 2 of every 4 stay in {fitting} of {len(masks.packed)} linears of fitting shapes: on CUDA, in float16 "
        "and bfloat16, torch.sparse.to_sparse_semi_structured takes these"
    )


def fits_semi_structured(kept: "np.ndarray | torch.Tensor") -> bool:
    """Whether PyTorch has a 2:4 kernel in 16 bits for a weight `[out, in]`, by what is kept of it."""
    out, width = kept.shape
    if out % SEMI_STRUCTURED_TILE[0] or width % SEMI_STRUCTURED_TILE[1]:
        return False
    return bool((kept.reshape(out, -1, 4).sum(-1) <= 2).all())


def save_pruned(model: str, masks_path: Path, out: Path, *, overwrite: bool = False) -> PackedMasks:
    """Writes the pruned Hugging Face directory: masked tensors in their own dtype, everything else byte for byte.

    Args:
        model: Directory, Hub id or `demo`: the dense checkpoint that the masks were computed from.
        masks_path: `masks.safetensors`.
        out: Directory to write.
        overwrite: Whether to replace a checkpoint that `out` already holds.

    Returns:
        The masks.

    Raises:
        UserError: If the masks were computed from other weights, or something cannot be read or written.
    """
    refuse_same_directory({"--model": model, "--out": str(out), "the masks' directory": str(masks_path.parent)})
    source = SafetensorsSource(locate(model))
    masks = masks_of(masks_path, source, model)
    inputs = Inputs(("--model", locate(model)), ("--masks", masks_path))
    with staged(out, overwrite=overwrite, marker="config.json", flag="--out", inputs=inputs) as staging:
        copy_edited(source, staging, masks.packed, masks.prune)
        copy_side_files(locate(model), staging)
        check_steady(source.steady)
    return masks


@dataclass(frozen=True)
class KeptZeros:
    """Numbers of kept weights that are zero, by tensor, where there are any.

    Attributes:
        now: Of the model.
        then: When the run ended.
        pattern: How many of every few neighbours the masks keep, where they have groups; all of them were checked.
    """

    now: Mapping[str, int]
    then: Mapping[str, int]
    pattern: KeptOf | None = None

    def __str__(self) -> str:
        now, then = sum(self.now.values()), sum(self.then.values())
        groups = "" if self.pattern is None else f"; every group is of the pattern {self.pattern}"
        if self.now == self.then:
            zeros = f", and {then} weights that were zero anyway" if then else ""
            return f"its zeros are exactly the masks{zeros}{groups}"
        return f"all that the masks prune is zero; {now} kept weights are zero too, {then} when the run ended{groups}"


def verify(
    model: "str | Path | torch.nn.Module", masks_path: str | Path, *, load: bool = True, exact: bool = False
) -> KeptZeros:
    """Checks that every weight that the masks prune is zero, in the model of a run or after fine-tuning.

    Args:
        model: The pruned checkpoint, or a model in memory, wrapped or not.
        masks_path: `masks.safetensors`.
        load: Whether to check the weights that transformers loads in PyTorch too, not only the files.
        exact: Whether the kept weights that are zero too must be as many as when the run ended.

    Returns:
        What is known of kept weights that are zero too; as text, one line that says what was found.

    Raises:
        UserError: Naming the tensors that differ, or if the masks are of another model.

    Example:
        >>> import tempfile, neuroal_jax
        >>> from neuroal_jax.convert.masks_to_torch import verify
        >>> folder = tempfile.mkdtemp()
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none",
        ...     out=f"{folder}/run", save_model=f"{folder}/model",
        ... )
        >>> result = neuroal_jax.prune(config)
        >>> print(verify(config.save_model, result.out / "masks.safetensors"))
        its zeros are exactly the masks
    """
    masks = read_masks(Path(masks_path))
    if not isinstance(model, str | Path):
        return _check_module(model, masks, f"this {type(model).__name__}", exact)
    path = locate(str(model))
    now = check_pruned(masks, SafetensorsSource(path), str(model), exact=exact)
    if not load:
        return KeptZeros(now, masks.kept_zeros, masks.pattern)
    try:
        loaded = load_torch_model(path, dtype="auto")
    except ValueError as error:
        raise UserError(f"transformers cannot load {model} ({str(error)[:200]}): pass --files-only") from error
    return _check_module(loaded, masks, f"{model}, loaded in PyTorch,", exact)


def _check_module(model: "torch.nn.Module", masks: PackedMasks, description: str, exact: bool) -> KeptZeros:
    adapted = [name for name, _ in model.named_parameters() if ".base_layer." in name]
    if adapted:
        raise UserError(f"{description} has adapters ({adapted[0]}): merge them first (merge_and_unload)")
    weights = masked_weights(model, masks)
    now = check_zeros(masks, lambda name: (weights[name] == 0).cpu().numpy(), description, exact=exact)
    return KeptZeros(now, masks.kept_zeros, masks.pattern)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done and verified, 2 user error or mismatch)."""

    def work() -> None:
        options = make_parser().parse_args(arguments)
        match options.command:
            case "apply":
                masks = save_pruned(options.model, options.masks, options.out, overwrite=options.overwrite)
                print(f"written to {options.out}")
                if (use := semi_structured_use(masks)) is not None:
                    print(use)
            case "verify":
                found = verify(options.model, options.masks, load=not options.files_only, exact=options.exact)
                print(f"{options.model}: {found}")
            case "pack":
                sizes = pack(options.model, options.out, overwrite=options.overwrite)
                print(f"{sizes}, written to {options.out}")
            case "unpack":
                unpack(options.packed, options.out, overwrite=options.overwrite)
                print(f"written to {options.out}")

    return run_program(work)


def make_parser() -> Parser:
    """The command line, with a parser for each command."""
    parser = Parser(
        f"python -m {__name__}",
        description="Apply or verify a mask file, or pack what is pruned.",
        examples=(
            "apply --model demo --masks run/masks.safetensors --out pruned",
            "verify --model pruned --masks run/masks.safetensors --files-only",
        ),
    )
    commands = parser.add_subparsers(dest="command", required=True)
    apply = commands.add_parser(
        "apply",
        help="write the pruned Hugging Face checkpoint",
        examples=(
            "--model demo --masks run/masks.safetensors --out pruned",
            "--model meta-llama/Llama-2-7b-hf --masks run/masks.safetensors --out pruned --overwrite",
        ),
    )
    check = commands.add_parser(
        "verify",
        help="check that all that the masks prune is zero in a checkpoint",
        examples=(
            "--model pruned --masks run/masks.safetensors --files-only",
            "--model fine-tuned --masks run/masks.safetensors --exact",
        ),
    )
    small = commands.add_parser(
        "pack",
        help="write a pruned checkpoint without its zeros, for storage only",
        examples=("--model pruned --out packed", "--model run/model --out packed --overwrite"),
    )
    whole = commands.add_parser(
        "unpack",
        help="write what was packed as it was, byte for byte",
        examples=("--packed packed --out pruned", "--packed packed --out pruned --overwrite"),
    )
    for command in (apply, check, small):
        command.add_argument("--model", required=True, help="checkpoint directory, Hub model id, or 'demo'")
    whole.add_argument("--packed", required=True, type=partial(path_to, "packed"), help="directory that pack wrote")
    for command in (apply, check):
        command.add_argument("--masks", required=True, type=partial(path_to, "masks"), help="masks.safetensors")
    for command in (apply, small, whole):
        command.add_argument("--out", required=True, type=partial(path_to, "out"), help="directory to write")
        command.add_argument("--overwrite", action="store_true", help="replace a checkpoint that --out already holds")
    check.add_argument("--files-only", action="store_true", help="check the files, without loading them in PyTorch")
    check.add_argument("--exact", action="store_true", help="refuse zeros that training made or undid")
    return parser
