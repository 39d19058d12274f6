"""Names of weights as PyTorch's wrappers spell them: torch.compile, DataParallel, FSDP, PEFT and the like."""

from collections import defaultdict
from collections.abc import Collection, Iterable

from neuroal_jax.errors import UserError

# What wrappers put between the names of modules, around a model or around one layer.
_PARTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


def match_names(wanted: Collection[str], found: Iterable[str]) -> dict[str, str]:
    """Which of the names `found` stands for each of `wanted`; a name that none stands for is left out.

    `_orig_mod.module.model.norm.weight` stands for `model.norm.weight`; so does what any module that holds the model
    puts in front (`base_model.model.model.norm.weight`), or what a part of the model leaves out (`norm.weight`).

    Raises:
        UserError: If it cannot be told which of two weights is meant.
    """
    spellings = defaultdict(list)
    for name in found:
        spellings[".".join(part for part in name.split(".") if part not in _PARTS)].append(name)
    places = {place for name in list(wanted)[:1] for plain in spellings if (place := _place(plain, name)) is not None}
    if ("", "") in places:
        places = {("", "")}
    if len(places) > 1:
        holders = sorted(added.rstrip(".") for added, _ in places)
        raise UserError(f"there are several models in this one ({', '.join(holders)}): pass the one that was pruned")
    matches = {}
    for added, left_out in places:
        for name in wanted:
            names = spellings.get(added + name.removeprefix(left_out), [])
            if len(names) > 1:
                raise UserError(f"{' and '.join(names)} could both be {name}: pass the model inside its wrapper")
            if names:
                matches[name] = names[0]
    return matches


def _place(plain: str, name: str) -> tuple[str, str] | None:
    """What `plain` has in front of `name`, and what of it is left out there; None if they name different weights."""
    if plain == name or plain.endswith(f".{name}"):
        return plain.removesuffix(name), ""
    if name.endswith(f".{plain}"):
        return "", name.removesuffix(plain)
    return None
