"""For fine-tuning in JAX: the model as a Flax module, masks beside its parameters, and zeros that stay zero."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from neuroal_jax.checkpoint.opened import Checkpoint, open_checkpoint
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.models.causal_lm import CausalLM
from neuroal_jax.models.family import expand


def load_model(model: str, dtype: str | None = None) -> CausalLM:
    """A checkpoint as a Flax (NNX) module, all of it in memory.

    Args:
        model: Directory, Hub id or `demo`.
        dtype: dtype of the parameters; None keeps the checkpoint's.

    Returns:
        The module: called with int token ids `[batch, tokens]` it gives logits `[batch, tokens, vocabulary]`. Kernels
        are `[in, out]`, as Flax has them.

    Raises:
        UserError: If the checkpoint cannot be read.

    Example:
        >>> import jax.numpy as jnp, neuroal_jax
        >>> model = neuroal_jax.load_model("demo", "float32")
        >>> model(jnp.zeros((2, 16), int)).shape
        (2, 16, 768)
    """
    checkpoint = open_checkpoint(model)
    params = {path: jnp.asarray(array, dtype) for path, array in flax_params(checkpoint).items()}
    owners = {rule.hf: rule.flax for rule in checkpoint.rules if not rule.tied}
    params |= {rule.flax: params[owners[rule.hf]] for rule in checkpoint.rules if rule.tied}
    for block in range(checkpoint.num_blocks):
        constants = checkpoint.family.block_constants(checkpoint.config, block)
        params |= {f"blocks.{block}.{path}": jnp.asarray(value) for path, value in constants.items()}
    abstract = nnx.eval_shape(lambda: CausalLM(checkpoint.family, checkpoint.config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    flat = [(path, leaf.replace(params[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def flax_params(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every parameter by Flax path, in Flax orientation, in the checkpoint's dtype; tied uses are left out."""
    params = {}
    for hf, (rule, block) in expand(checkpoint.rules, checkpoint.num_blocks).items():
        params[rule.flax.format(block=block)] = rule.across(checkpoint.read(hf))
    return params


def mask_tree(masks: Mapping[str, np.ndarray], checkpoint: Checkpoint, params: Any) -> Any:
    """Masks arranged like `params`: bool arrays of the kernels' shapes, and None where nothing is pruned.

    Args:
        masks: bool `[out, in]` by Hugging Face name, as `load_masks` gives them.
        checkpoint: The model that the masks belong to: its table maps the names.
        params: A pytree with the Flax model's paths, e.g. `nnx.state(model, nnx.Param)`.

    Returns:
        A tree like `params`, of bool `[in, out]` (True = kept) and None.

    Raises:
        UserError: If a mask has no kernel, or one of another shape, or a linear has no mask.

    Example:
        >>> import tempfile, neuroal_jax
        >>> from flax import nnx
        >>> from neuroal_jax.checkpoint import open_checkpoint
        >>> config = neuroal_jax.PruneConfig(
        ...     model="demo", sparsity=0.7, allocation="uniform", nsamples=4, eval="none", out=tempfile.mkdtemp()
        ... )
        >>> masks = neuroal_jax.load_masks(neuroal_jax.prune(config).out / "masks.safetensors")
        >>> params = nnx.state(neuroal_jax.load_model("demo"), nnx.Param)
        >>> tree = neuroal_jax.mask_tree(masks, open_checkpoint("demo"), params)
        >>> tree["blocks"][0]["mlp"]["up_proj"]["kernel"][...].shape
        (128, 256)
    """
    names, prunable = expand(checkpoint.rules, checkpoint.num_blocks), checkpoint.prunable()
    lacking = [name for name in prunable if name not in masks]
    by_path: dict[str, np.ndarray] = {}
    for hf, mask in masks.items():
        if hf not in prunable:
            raise UserError(f"the masks are of another model: it has no linear {hf}")
        rule, block = names[hf]
        by_path[rule.flax.format(block=block)] = rule.across(mask)
    if lacking:
        raise UserError(f"the masks are of another model, or incomplete: {shorten(lacking)} have none")

    def masked(path: tuple[Any, ...], leaf: Any) -> Any:
        mask = by_path.pop(_dotted(path), None)
        if mask is not None and mask.shape != leaf.shape:
            raise UserError(f"mask of {_dotted(path)} has shape {list(mask.shape)}, the kernel {list(leaf.shape)}")
        return None if mask is None else jnp.asarray(mask)

    tree = jax.tree_util.tree_map_with_path(masked, params)
    if by_path:
        raise UserError(f"params have no {sorted(by_path)[0]}: pass the parameters of the model that was pruned")
    return tree


def _dotted(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def keep_pruned(masks: Any) -> optax.GradientTransformation:
    """An optax transformation that keeps pruned weights at zero; chain it last.

    Where a mask prunes, the update becomes `-parameter`, so that the parameter is zero after it whatever it was before
    and whatever momentum or weight decay came earlier in the chain.

    Args:
        masks: A tree like the parameters, of bool arrays of their shapes (True = kept) and None, as `mask_tree` makes
            it.

    Returns:
        The transformation; its state is empty. Its `update` needs the parameters.

    Raises:
        ValueError: In `update`, without parameters, or where a mask and its parameter differ in shape.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from neuroal_jax import keep_pruned
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([3.0])}
        >>> optimizer = optax.chain(
        ...     optax.sgd(0.5), keep_pruned({"kernel": jnp.array([True, False]), "bias": None})
        ... )
        >>> gradients = {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
        >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"].tolist()
        [0.5, 0.0]
    """

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("keep_pruned needs the parameters: call update(updates, state, params)")

        def keep_zero(mask: Any, update: Any, param: Any) -> Any:
            if mask is not None and mask.shape != param.shape:
                raise ValueError(f"a mask has shape {list(mask.shape)}, its parameter {list(param.shape)}")
            return update if mask is None else jnp.where(mask, update, -param)

        return jax.tree.map(keep_zero, masks, updates, params, is_leaf=lambda leaf: leaf is None), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
