"""A checkpoint as a model in PyTorch: whole, or a line that says what is wrong."""

from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

from neuroal_jax.checkpoint.hugging_face import load_torch_model
from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.command.values import path_to
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.machine.memory import is_exhausted


def load_checked(path: Path, name: str, dtype: str, device: str) -> Any:
    """The causal language model in a directory; no file of it but safetensors holds weights, and none runs code.

    Args:
        path: Directory of the checkpoint.
        name: What the user calls it.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own.
        device: As PyTorch names it.

    Raises:
        UserError: If transformers cannot load it, or finds weights missing.
    """
    try:
        model, report = load_torch_model(path, dtype=dtype, output_loading_info=True)
        model.to(device)
    except UserError:
        raise
    except Exception as error:  # PyTorch raises many kinds
        if is_exhausted(error):
            raise
        raise cannot_load(name, device, error) from error
    if report["missing_keys"]:
        missing = shorten(sorted(report["missing_keys"]))
        raise UserError(f"{name} lacks weights, which transformers would draw at random: {missing}")
    return model


def files_of_models(model: str, pruned: str | None, masks: Path | None) -> list[tuple[str, Path | None]]:
    """What a program reads that is given a dense model and a pruned one or masks, each with the flag that names it."""
    alone = pruned is not None and masks is None  # both together are refused later
    return [
        ("--model", locate(model)),
        ("--pruned", locate(str(pruned), "--pruned") if alone else None),
        ("--masks", masks),
    ]


def add_models(parser: ArgumentParser) -> None:
    """The flags for a dense model and a pruned one."""
    parser.add_argument("--model", required=True, help="the dense model: checkpoint directory, Hub model id, or 'demo'")
    parser.add_argument(
        "--masks", type=partial(path_to, "masks"), metavar="FILE", help="masks.safetensors, to be applied in memory"
    )
    parser.add_argument("--pruned", metavar="DIR", help="a saved pruned checkpoint, instead of --masks")


def quiet() -> None:
    """Has transformers leave the screen to the result and to errors."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def cannot_load(name: str, device: str, error: Exception) -> UserError:
    """What to say of a model or a tokenizer that transformers cannot load."""
    return UserError(f"transformers cannot load {name} on {device} ({' '.join(str(error).split())[:200]})")
