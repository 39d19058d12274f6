"""Masks during fine-tuning in JAX: zeros stay zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neuroal_jax import PruneConfig, UserError, keep_pruned, load_masks, load_model, mask_tree, prune
from neuroal_jax.checkpoint.opened import open_checkpoint


@pytest.fixture(scope="module")
def pruned(llama, tokens, tmp_path_factory):
    root = tmp_path_factory.mktemp("finetune")
    prune(
        PruneConfig(
            model=str(llama), sparsity=0.6, allocation="uniform", calib=str(tokens), eval="none",
            out=str(root / "out"), save_model=str(root / "model"),
        )
    )  # fmt: skip
    return root


def test_pruned_weights_stay_zero_and_the_rest_learns(pruned):
    masks = load_masks(pruned / "out" / "masks.safetensors")
    checkpoint = open_checkpoint(str(pruned / "model"))
    model = load_model(str(pruned / "model"))
    graph, params = nnx.split(model)
    tree = mask_tree(masks, checkpoint, params)
    optimizer = optax.chain(optax.adamw(1e-2, weight_decay=0.1), keep_pruned(tree))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (4, 12)))

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for _ in range(10):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    trained = nnx.merge(graph, params)
    for name, mask in masks.items():
        _, _, block, part, linear, _ = name.split(".")
        kernel = np.asarray(getattr(getattr(trained.blocks[int(block)], part), linear).kernel[...])
        assert (kernel[~mask.T] == 0).all()
        assert not np.array_equal(kernel, checkpoint.read(name).T)


def test_weights_that_were_not_zero_become_zero(pruned, llama):
    masks = load_masks(pruned / "out" / "masks.safetensors")
    params = nnx.state(load_model(str(llama)), nnx.Param)  # the dense model
    transform = keep_pruned(mask_tree(masks, open_checkpoint(str(llama)), params))
    updates, _ = transform.update(jax.tree.map(jnp.ones_like, params), transform.init(params), params)
    after = optax.apply_updates(params, updates)
    kernel = np.asarray(after["blocks"][0]["mlp"]["up_proj"]["kernel"][...])
    mask = masks["model.layers.0.mlp.up_proj.weight"].T
    assert (kernel[~mask] == 0).all()
    assert (kernel[mask] != 0).all()


def test_errors(pruned, llama, make_llama):
    masks = load_masks(pruned / "out" / "masks.safetensors")
    other = make_llama(intermediate_size=24)
    checkpoint = open_checkpoint(str(other))
    with pytest.raises(UserError, match=r"mask of blocks\.0\.mlp.*has shape"):
        mask_tree(masks, checkpoint, nnx.state(load_model(str(other))))
    with pytest.raises(UserError, match=r"no linear model\.layers\.2"):
        small = make_llama(num_hidden_layers=2)
        mask_tree(masks, open_checkpoint(str(small)), nnx.state(load_model(str(small))))
    with pytest.raises(UserError, match=r"params have no blocks\.0"):
        mask_tree(masks, open_checkpoint(str(llama)), {"stem": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"a mask has shape \[2\], its parameter \[3, 2\]"):
        params = {"a": jnp.ones((3, 2))}
        keep_pruned({"a": jnp.ones(2, bool)}).update(params, optax.EmptyState(), params)
    with pytest.raises(ValueError, match="needs the parameters"):
        keep_pruned({"a": None}).update({"a": jnp.ones(1)}, optax.EmptyState())
