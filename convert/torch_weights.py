"""The weights that masks name, in a PyTorch model, whatever wraps it."""

from typing import TYPE_CHECKING

from neuroal_jax.errors import UserError, shorten
from neuroal_jax.masks.file import PackedMasks, uncovered
from neuroal_jax.masks.wrapped import match_names

if TYPE_CHECKING:
    import torch

# What a parameter's name tells of weights that are not there as they are, and what to do.
_HINTS = {
    "_flat_param": "FSDP holds its weights flat: apply the masks before wrapping",
    "_fsdp_wrapped_module": "FSDP may hold parts of its weights only: use FSDP.summon_full_params(model)",
    "parametrizations": "remove the parametrizations first (torch.nn.utils.parametrize.remove_parametrizations)",
    "weight_orig": "make the pruning of PyTorch permanent first (torch.nn.utils.prune.remove)",
}


def masked_weights(model: "torch.nn.Module", masks: PackedMasks) -> "dict[str, torch.nn.Parameter]":
    """The parameters that the masks prune, by the masks' names.

    torch.compile, DataParallel, FSDP with whole weights and PEFT are looked through, and so is any module that holds
    the model. Of a layer with an adapter it is the weight below the adapter.

    Raises:
        UserError: If the masks are of another model, or its weights are not there as numbers, saying what to do.
    """
    parameters = dict(model.named_parameters())
    found = match_names(masks.packed, parameters)
    problems = uncovered(found, {name: parameter.shape for name, parameter in parameters.items()})
    for name, packed in masks.packed.items():
        if name not in found:
            problems.append(f"{name} is not in the model")
        elif problem := _problem(parameters[found[name]], (packed.shape[0], masks.widths[name])):
            problems.append(f"{found[name]} {problem}")
    if problems:
        hint = next((f" ({hint})" for part, hint in _HINTS.items() if any(part in name for name in parameters)), "")
        raise UserError(
            f"the masks are of another model than this {type(model).__name__} as it is now: {shorten(problems)}{hint}"
        )
    return {name: parameters[found[name]] for name in masks.packed}


def _problem(parameter: "torch.nn.Parameter", shape: tuple[int, int]) -> str | None:
    if hasattr(parameter, "ds_shape"):
        return "is held by DeepSpeed in parts: use deepspeed.zero.GatheredParameters"
    if hasattr(parameter, "placements"):
        return "is held in parts by several devices (DTensor): apply the masks before fully_shard"
    if not parameter.is_floating_point():
        return f"is {parameter.dtype}, quantized: apply the masks before quantization"
    if tuple(parameter.shape) != shape:
        return f"has shape {list(parameter.shape)}, the mask {list(shape)}"
    if parameter.is_meta:
        return "has no values (it is on the meta device): load the weights first"
    return None
