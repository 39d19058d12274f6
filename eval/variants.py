"""The models that are measured side by side: dense baselines, and a pruned model with and without its zeros."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from neuroal_jax.convert.masks_to_torch import apply_masks
from torch import nn

from neuroal_jax.errors import UserError, shorten

from .loading import load_checked
from .sparse_linear import (
    block_linears,
    count_zeros,
    packed_masks,
    semi_structured,
    with_csr,
    with_own_weights,
)

DTYPES = {"dense_fp32": "float32", "dense_bf16": "bfloat16", "dense_fp16": "float16"}


@dataclass(frozen=True)
class Pruned:
    """Where the pruned model comes from: a directory of its own, or masks for the dense one.

    Attributes:
        name: What the user calls it.
        directory: Of its checkpoint; None: it is the dense model with `masks`.
        masks: `masks.safetensors`, which belong to the dense model.
    """

    name: str
    directory: Path | None = None
    masks: Path | None = None


@dataclass(frozen=True)
class Variants:
    """Models to measure.

    Attributes:
        models: By name: dense ones (keys of `DTYPES`), `control` (the pruned model as dense tensors), and the pruned
            model without its zeros (`csr` or `semi_structured`).
        widths: Number of inputs of each pruned linear.
        zeros: Number of zeros in them.
        weights: Number of weights in them.
        kept: Where they are not zero, packed along the input axis, by linear.
    """

    models: dict[str, nn.Module]
    widths: list[int]
    zeros: int
    weights: int
    kept: dict[str, np.ndarray]

    @property
    def baselines(self) -> list[str]:
        """Names of the dense models."""
        return [name for name in self.models if name in DTYPES]

    @property
    def sparse(self) -> str:
        """The name of the model without zeros."""
        return next(name for name in reversed(self.models) if name not in DTYPES)


def on_cpu(dense: Path, name: str, pruned: Pruned) -> Variants:
    """Dense in fp32 and bf16, pruned in fp32 and as CSR; what the fp32 models have in common is in memory once.

    Args:
        dense: Directory of the dense model.
        name: What the user calls it.
        pruned: The pruned one.

    Raises:
        UserError: If a model cannot be loaded, or they are of different shapes.
    """
    fp32 = load_checked(dense, name, "float32", "cpu")
    control = _control(fp32, name, pruned)
    models = {
        "dense_fp32": fp32,
        "dense_bf16": load_checked(dense, name, "bfloat16", "cpu"),
        "control": control,
        "csr": with_csr(control),
    }
    return _variants(models)


def on_cuda(dense: Path, name: str, pruned: Pruned) -> Variants:
    """Dense in fp16 and bf16; the pruned model, dense and as 2:4, in bf16 if the checkpoint is in it, else in fp16.

    Raises:
        UserError: If PyTorch has no GPU, a weight is not 2:4, or as `on_cpu`.
    """
    if not torch.cuda.is_available():
        raise UserError("--backend cuda needs a GPU, and this PyTorch has none: pass --backend cpu")
    own = load_checked(dense, name, "auto", "cpu").dtype
    loaded = {key: load_checked(dense, name, DTYPES[key], "cuda") for key in ("dense_fp16", "dense_bf16")}
    control = _control(loaded["dense_bf16" if own == torch.bfloat16 else "dense_fp16"], name, pruned)
    return _variants({**loaded, "control": control, "semi_structured": semi_structured(control)})


def _control(dense: Any, name: str, pruned: Pruned) -> nn.Module:
    """The pruned model as dense tensors, in the dtype and on the device of a dense one."""
    if pruned.directory is None:
        control = with_own_weights(dense)
        apply_masks(control, str(pruned.masks))
        return control
    dtype = str(dense.dtype).removeprefix("torch.")
    control = load_checked(pruned.directory, pruned.name, dtype, dense.device.type)
    _check_shapes(dense, name, control, pruned.name)
    return control


def _check_shapes(dense: nn.Module, name: str, control: nn.Module, pruned: str) -> None:
    """Raises UserError unless two models have the same parameters by name and shape."""
    ours, theirs = ({key: list(x.shape) for key, x in model.named_parameters()} for model in (dense, control))
    problems = [
        f"{key} is {theirs.get(key, 'missing')}, expected {ours.get(key, 'none')}"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]
    if problems:
        raise UserError(f"--pruned {pruned} is no pruned form of --model {name}: {shorten(problems)}")


def _variants(models: dict[str, nn.Module]) -> Variants:
    linears = block_linears(models["control"])
    widths = [linear.in_features for linear in linears.values()]
    weights = sum(linear.weight.numel() for linear in linears.values())
    evaluated = {key: model.eval() for key, model in models.items()}
    return Variants(evaluated, widths, count_zeros(linears), weights, packed_masks(linears))
