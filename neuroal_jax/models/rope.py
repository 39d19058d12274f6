"""Rotary positions: what config.json says of them, and the rotation of queries and keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neuroal_jax.errors import UserError
from neuroal_jax.models.hf_config import take_bool, take_float, take_int, take_optional_float

# Attributes of config.json that `rope_values` reads.
ROPE_ATTRIBUTES = frozenset(
    {"original_max_position_embeddings", "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta"}
)
_ROTATIONS = ("rope_parameters", "rope_scaling", "rope_theta")
_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, under the names of `rope_parameters`.

    Attributes:
        theta: The base.
        kind: How the base's frequencies are changed for longer contexts.
        factor: How much longer the context is than the one of `original_max_position_embeddings` positions; by
            `dynamic` scaling, how much the base grows with sequences of more than `max_position_embeddings`.
        attention_factor: Factor of queries and of keys.
        short_factor: By `longrope`, how much longer each pair's wave gets; of sequences that are longer than the
            original context, `long_factor`.
        rotated: How many dimensions of a head are rotated, the first ones; None: all.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 1
    max_position_embeddings: int = 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated: int | None = None


def rope_values(config: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    """What a config says of rotary positions, wherever it says it, under the names of `rope_parameters`.

    Args:
        config: config.json.
        theta: The base where it says none.

    Raises:
        UserError: If it says two things.
    """
    outside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    places = [key for key in ("rope_scaling", "rope_parameters") if config.get(key) not in (None, {})]
    found = [{"rope_theta": theta, **_one_place(config, key, outside)} for key in places]
    for values in found[1:]:
        differing = sorted(key for key in {*values, *found[0]} if values.get(key) != found[0].get(key))
        if differing:
            shown = ", ".join(f"{key} {found[0].get(key)!r} and {values.get(key)!r}" for key in differing)
            raise UserError(f"config.json: rope_scaling and rope_parameters contradict each other: {shown}: remove one")
    return found[0] if found else {"rope_theta": theta, **outside, "rope_type": "default"}


def rope_of_layer_type(
    config: Mapping[str, Any], layer_type: str, *, theta_key: str, theta: float, scaled: bool
) -> dict[str, Any]:
    """A config whose layer types have rotations of their own, as a config of layers of one type would be written.

    Args:
        config: config.json; `rope_parameters` has an object for each type (transformers 5), or there are attributes for
            each (transformers 4).
        layer_type: The type, as in `layer_types`.
        theta_key: The attribute that was the type's base.
        theta: Its base where the config does not say.
        scaled: Whether `rope_scaling` is the type's.

    Raises:
        UserError: If `rope_parameters` is no object of objects, or contradicts the attributes.
    """
    given = config.get("rope_parameters")
    if given is not None and not (
        isinstance(given, Mapping) and all(isinstance(value, Mapping | None) for value in given.values())
    ):
        raise UserError(
            f"config.json: rope_parameters is {str(given)[:80]}, expected an object with a rotation for each layer type"
        )
    own = (given or {}).get(layer_type) or {}
    base = take_renamed(config, theta_key, "rope_theta", own)
    flat = {key: value for key, value in config.items() if key not in _ROTATIONS and key != theta_key}
    flat |= {"rope_theta": own.get("rope_theta", theta) if base is None else base, "rope_parameters": own}
    return flat | ({"rope_scaling": config.get("rope_scaling")} if scaled else {})


def take_renamed(config: Mapping[str, Any], name: str, usual: str, parameters: Any) -> float | None:
    """A number of the rotation that stands outside of `rope_parameters` under a family's own name; None if absent.

    Args:
        config: config.json.
        name: The family's name.
        usual: The name in `rope_parameters`.
        parameters: The `rope_parameters` that it belongs to, if there are any.

    Raises:
        UserError: Under that name, if it is no positive number or `parameters` say something else.
    """
    value = take_optional_float(config, name)
    inside = parameters.get(usual) if isinstance(parameters, Mapping) else None
    if None not in (value, inside) and value != inside:
        raise UserError(
            f"config.json: {name} is {config[name]!r}, but rope_parameters has {usual} {inside!r}, "
            "which contradict each other: remove one"
        )
    return value


def _one_place(config: Mapping[str, Any], key: str, outside: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_scaling` or `rope_parameters` says, together with the attributes outside of it."""
    given = config[key]
    if not isinstance(given, Mapping):
        raise UserError(f"config.json: {key} is {given!r}, expected an object")
    nested = [name for name, value in given.items() if isinstance(value, Mapping)]
    if nested:
        raise UserError(
            f"config.json: {key} has {nested[0]}={given[nested[0]]!r}, expected one rotation for all layers"
        )
    values = {name: value for name, value in given.items() if name != "type" and value is not None}
    values["rope_type"] = given.get("rope_type", given.get("type", "default"))
    if given.get("type", values["rope_type"]) != values["rope_type"]:
        raise UserError(
            f"config.json: {key} has type {given['type']!r} and rope_type {values['rope_type']!r}, "
            "which contradict each other: remove one"
        )
    for name, value in outside.items():
        if values.setdefault(name, value) != value:
            raise UserError(
                f"config.json: {name} is {value!r}, but {values[name]!r} in {key}, which contradict each other: "
                "remove one"
            )
    if values["rope_type"] == "default":  # no other value is read then
        values = {key: values[key] for key in ("rope_type", "rope_theta", "partial_rotary_factor") if key in values}
    return values


def take_rope(config: Mapping[str, Any], head_dim: int, max_positions: int, theta: float = 10000.0) -> Rope:
    """Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Like transformers, it reads of them what the type of scaling needs, and ignores the rest.

    Args:
        config: config.json.
        head_dim: How many dimensions of a head are rotated.
        max_positions: `max_position_embeddings`.
        theta: The base where the config says none.

    Raises:
        UserError: For a type of scaling that is not implemented, or a value that is missing or makes no sense.
    """
    values = rope_values(config, theta)
    kind = values["rope_type"]
    if not isinstance(kind, str) or kind not in _KINDS:
        expected = ", ".join(_KINDS)
        raise UserError(f"config.json: rope scaling type {kind!r} is not supported, expected one of {expected}")
    theta = take_float(values, "rope_theta", high=1e30)
    if theta < 1e-3:
        raise UserError(f"config.json: rope_theta is {theta}, expected a number from 0.001")
    if kind == "default":
        return Rope(theta)
    # An attribute outside comes first, as in transformers.
    original = {**values, **{k: config[k] for k in ("original_max_position_embeddings",) if config.get(k) is not None}}
    context = take_int(original, "original_max_position_embeddings", max_positions)
    if kind == "yarn":
        return _take_yarn(values, theta, max_positions, context)
    if kind == "longrope":
        return _take_longrope(values, theta, head_dim, max_positions, context)
    factor = _take_number(values, "factor", kind)
    if kind == "llama3":
        low, high = (_take_number(values, name, kind) for name in ("low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise UserError(f"config.json: rope high_freq_factor {high} must exceed low_freq_factor {low}")
        return Rope(theta, kind, factor, low, high, original_max_position_embeddings=context)
    if kind == "dynamic" and head_dim < 4:
        raise UserError(f"config.json: dynamic rope scaling rotates at least 4 dimensions of a head, not {head_dim}")
    return Rope(theta, kind, factor, max_position_embeddings=max_positions)


def take_partial_rope(config: Mapping[str, Any], head_dim: int, max_positions: int, share: float) -> Rope:
    """`take_rope` of a model type that may rotate a part of every head, `partial_rotary_factor`; `share` by default.

    As in transformers, an odd number of dimensions is rounded up when they are rotated, but not for their frequencies.
    """
    rotated = int(head_dim * take_float(rope_values(config), "partial_rotary_factor", share))
    if not 0 < rotated + rotated % 2 <= head_dim:
        raise UserError(
            f"config.json: {rotated} of {head_dim} dimensions of a head are rotated, expected an even part of them"
        )
    rope = take_rope(config, rotated, max_positions)
    if rotated % 2 and rope.kind in ("longrope", "yarn"):
        raise UserError(f"config.json: {rotated} dimensions of a head are rotated, {rope.kind} needs an even number")
    return replace(rope, rotated=rotated)


def _take_yarn(values: Mapping[str, Any], theta: float, max_positions: int, context: int) -> Rope:
    if theta <= 1:
        raise UserError(f"config.json: rope_theta is {theta}, yarn needs one above 1")
    longer = max_positions / context if "original_max_position_embeddings" in values else None
    factor = _take_number(values, "factor", "yarn", longer)

    def grown(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        inferred = grown(_take_number(values, "mscale", "yarn")) / grown(_take_number(values, "mscale_all_dim", "yarn"))
    else:
        inferred = grown(1.0)
    return Rope(
        theta,
        "yarn",
        factor=factor,
        original_max_position_embeddings=context,
        beta_fast=_take_number({**values, "beta_fast": values.get("beta_fast") or 32}, "beta_fast", "yarn"),
        beta_slow=_take_number({**values, "beta_slow": values.get("beta_slow") or 1}, "beta_slow", "yarn"),
        truncate=take_bool(values, "truncate", True),
        attention_factor=_take_number(values, "attention_factor", "yarn", inferred),
    )


def _take_longrope(values: Mapping[str, Any], theta: float, head_dim: int, max_positions: int, context: int) -> Rope:
    factor = _take_number(values, "factor", "longrope", max_positions / context)
    if factor > 1 and context == 1:
        raise UserError("config.json: original_max_position_embeddings is 1, longrope needs more")
    inferred = math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 else 1.0
    return Rope(
        theta,
        "longrope",
        original_max_position_embeddings=context,
        attention_factor=_take_number(values, "attention_factor", "longrope", inferred),
        short_factor=_take_numbers(values, "short_factor", head_dim // 2),
        long_factor=_take_numbers(values, "long_factor", head_dim // 2),
    )


def _take_numbers(values: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
    """A list of positive numbers, one for each pair of dimensions that are rotated."""
    given = values.get(key)
    if not isinstance(given, list) or len(given) != length:
        found = f"has {len(given)}" if isinstance(given, list) else "is missing" if given is None else f"is {given!r}"
        raise UserError(
            f"config.json: rope {key} {found}, expected a list of {length} numbers, for rope type 'longrope'"
        )
    named = {f"{key}[{number}]": value for number, value in enumerate(given)}
    return tuple(_take_number(named, name, "longrope") for name in named)


def _take_number(values: Mapping[str, Any], key: str, kind: str, default: float | None = None) -> float:
    try:
        return take_float(values, key, default, high=1e6)
    except UserError as error:
        raise UserError(f"{error} below 1e6, for rope scaling type {kind!r}") from error


def rope_frequencies(head_dim: int, rope: Rope, tokens: int) -> Float[np.ndarray, "half"]:
    """Rotation per position, in radians, of each pair of dimensions, in sequences of `tokens` tokens."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    theta = np.float32(rope.theta)
    if rope.kind == "dynamic" and tokens > rope.max_position_embeddings:
        growth = np.float32(rope.factor * tokens / rope.max_position_embeddings - (rope.factor - 1))
        theta *= growth ** np.float32(head_dim / (head_dim - 2))
    plain = np.float32(1.0) / theta**exponents
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":  # slows the long waves down
        turns = rope.original_max_position_embeddings * plain / np.float32(2 * math.pi)  # over the original context
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return keep * plain + (1 - keep) * plain / rope.factor
    if rope.kind == "longrope":
        longer = tokens > rope.original_max_position_embeddings
        return plain / np.asarray(rope.long_factor if longer else rope.short_factor, np.float32)
    if rope.kind == "yarn":
        keep = 1 - _ramp(head_dim, rope)
        return keep * plain + (1 - keep) * plain / np.float32(rope.factor)
    return plain


def _ramp(head_dim: int, rope: Rope) -> Float[np.ndarray, "half"]:
    """0 for pairs that turn `beta_fast` times or more over the original context, 1 at `beta_slow`, linear between."""

    def pair(turns: float) -> float:
        wave = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high  # no division by zero
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)


def rotate(
    x: Float[Array, "b t n h"], *ropes: Rope | None, which: Int[Array, ""] | int = 0, wide: bool = False
) -> Float[Array, "b t n h"]:
    """Rotates dimension i against i + h/2, Hugging Face's layout of rotary embeddings.

    Args:
        x: Queries or keys.
        ropes: The rotations that a model has; None is none at all.
        which: The number of the one to take, where blocks differ.
        wide: Whether sines and cosines are fp32, as in OLMo 2, and not rounded to the dtype of `x`.
    """
    tables = [_cos_and_sin(x.shape[3], rope, x.shape[1]) for rope in ropes]
    # Constants of the program: XLA would compute a sine or cosine again for every sequence, head and use.
    dtype = jnp.float32 if wide else x.dtype
    cos, sin = (jnp.asarray(np.stack(table), dtype)[which] for table in zip(*tables, strict=True))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_part(x: Float[Array, "b t n h"], rope: Rope) -> Float[Array, "b t n h"]:
    """Rotates the first `rope.rotated` dimensions, or one more if that is odd; `rotate` for all of them."""
    size = x.shape[3] if rope.rotated is None else rope.rotated + rope.rotated % 2
    return jnp.concatenate([rotate(x[..., :size], rope), x[..., size:]], axis=-1)


def _cos_and_sin(
    head_dim: int, rope: Rope | None, tokens: int
) -> tuple[Float[np.ndarray, "t 1 half"], Float[np.ndarray, "t 1 half"]]:
    """What `rotate` multiplies queries and keys by, at every position."""
    if rope is None:
        return np.ones((tokens, 1, head_dim // 2), np.float32), np.zeros((tokens, 1, head_dim // 2), np.float32)
    frequencies = rope_frequencies(rope.rotated or head_dim, rope, tokens)
    angles = np.arange(tokens, dtype=np.float32)[:, None, None] * frequencies
    factor = np.float32(rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor
