"""Rotary positions: what config.json says of them, and the rotation of queries and keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuroal_jax.errors import UserError
from neuroal_jax.models.hf_config import refuse_unknown, take_float, take_int

# Attributes of config.json that `take_rope` and `rope_values` read; a family may read `partial_rotary_factor` too.
ROPE_ATTRIBUTES = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base and, for `llama3` scaling, its four constants."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None


def rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of rotary positions, wherever it says it."""
    values = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key) or {}
        if not isinstance(value, Mapping):
            raise UserError(f"config.json: {key} is {value!r}, expected an object")
        if not value:
            continue
        kind = value.get("rope_type", value.get("type", "default"))
        if values.get("rope_type", kind) != kind:
            raise UserError(
                f"config.json: rope scaling types {values['rope_type']!r} and {kind!r} contradict each other"
            )
        values |= {name: x for name, x in value.items() if name != "type" and x is not None}
        values["rope_type"] = kind
    return values


def take_rope(config: Mapping[str, Any], default_theta: float = 10000.0) -> Rope:
    """Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Raises:
        UserError: For any scaling type other than `default` and `llama3`.
    """
    merged = rope_values(config)
    merged.pop("partial_rotary_factor", None)  # for the family to read
    theta = take_float({"rope_theta": merged.pop("rope_theta", None)}, "rope_theta", default_theta)
    kind = merged.pop("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise UserError(f"config.json: rope scaling type {kind!r} is not supported, expected 'default' or 'llama3'")
    if kind == "default":
        refuse_unknown(merged, frozenset())
        return Rope(theta)
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    refuse_unknown(merged, frozenset(fields))
    rope = Rope(
        theta,
        factor=take_float(merged, "factor"),
        low_freq_factor=take_float(merged, "low_freq_factor"),
        high_freq_factor=take_float(merged, "high_freq_factor"),
        original_max_position_embeddings=take_int(merged, "original_max_position_embeddings"),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise UserError(
            f"config.json: rope high_freq_factor {rope.high_freq_factor} must exceed "
            f"low_freq_factor {rope.low_freq_factor}"
        )
    return rope


def rope_frequencies(head_dim: int, rope: Rope) -> Float[np.ndarray, "half"]:
    """Rotation per position, in radians, of each pair of dimensions; `llama3` slows the long waves down."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.original_max_position_embeddings is None:
        return plain
    turns = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)  # over the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def rotate(x: Float[Array, "b t n h"], frequencies: Float[np.ndarray, "half"]) -> Float[Array, "b t n h"]:
    """Rotates dimension i against i + h/2, Hugging Face's layout of rotary embeddings."""
    angles = np.arange(x.shape[1], dtype=np.float32)[:, None, None] * frequencies
    # Constants of the program: XLA would compute a sine or cosine again for every sequence, head and use.
    cos, sin = (jnp.asarray(table(angles), x.dtype) for table in (np.cos, np.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
