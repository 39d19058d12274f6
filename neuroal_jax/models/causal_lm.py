"""A whole model: stem, blocks and head of a family, as one Flax module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float, Integer

from neuroal_jax.models.family import Family


class CausalLM(nnx.Module):
    """A causal language model of any family, with the parameter paths of the family's table.

    The engine itself never builds one (it walks one block at a time); it is what conversion, fine-tuning and tests use.
    """

    def __init__(self, family: Family, config: Any, *, rngs: nnx.Rngs) -> None:
        self.stem = family.stem(config, rngs)
        self.blocks = nnx.List([family.block(config, rngs) for _ in range(config.num_hidden_layers)])
        for number, block in enumerate(self.blocks):
            constants = {path: jnp.asarray(x) for path, x in family.block_constants(config, number).items()}
            nnx.update(block, unflatten_dict(constants, sep="."))
        self.head = family.head(config, rngs)
        if config.tie_word_embeddings:
            self.head.embedding = self.stem.embedding

    def __call__(self, tokens: Integer[Array, "b t"]) -> Float[Array, "b t v"]:
        """Logits of every position."""
        hidden = self.stem(tokens)
        for block in self.blocks:
            hidden, _ = block(hidden)
        return self.head(hidden)


def abstract_params(family: Family, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a model's parameters by Flax path; every block stands as `blocks.{block}`; nothing is allocated.

    A tied head appears under its own path too.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    parts = {"stem": family.stem, "blocks.{block}": family.block, "head": family.head}
    for prefix, build in parts.items():
        state = nnx.state(nnx.eval_shape(lambda build=build: build(config, nnx.Rngs(0))), nnx.Param)
        for path, leaf in nnx.to_flat_state(state):
            shapes[".".join((prefix, *map(str, path)))] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return shapes
