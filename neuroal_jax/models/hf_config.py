"""Reading Hugging Face's config.json: an attribute is read, without effect on the forward pass, or refused by name."""

import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from neuroal_jax.errors import UserError, one_line, shorten

log = logging.getLogger("neuroal_jax")

# Attributes of transformers' config classes that say nothing of the forward pass.
_HARMLESS = frozenset(
    """
    _attn_implementation _experts_implementation _name_or_path architectures attention_dropout base_model_ep_plan
    base_model_pp_plan base_model_tp_plan bos_token_id chunk_size_feed_forward dtype eos_token_id id2label
    initializer_range is_encoder_decoder label2id model_type name_or_path num_labels output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version
    unk_token_id use_cache
    """.split()
)
# The types of JSON that some of them have; transformers loads no config with others.
_TYPES: dict[str, tuple[type, ...]] = {
    "attention_dropout": (int, float, type(None)),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "pretraining_tp"), (int, type(None))),
    **dict.fromkeys(("dtype", "torch_dtype"), (str, dict, type(None))),
    "eos_token_id": (int, list, type(None)),
    "id2label": (dict, type(None)),
    "initializer_range": (float,),
    "use_cache": (bool,),
}
_TYPE_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a decimal number",
    int: "a whole number",
    list: "a list",
    str: "text",
    type(None): "null",
}
_DTYPES = frozenset(
    "float32 float float64 double float16 half bfloat16 float8_e4m3fn float8_e5m2 int8 uint8 int16 int32 int64".split()
)
# Attributes that no config class lists and that transformers' common code reads of every model: without effect as here.
_COMMON: dict[str, Any] = {
    "is_causal": True,
    **dict.fromkeys(("compression_config", "quantization_config", "fusion_config")),
    **dict.fromkeys(("configuration_files", "transformers_weights")),  # other files in place of those that are read
    **dict.fromkeys(("decoder", "generator", "text_config", "text_encoder")),  # another model inside
}
_CODE = ("auto_map", "custom_pipelines")  # by which transformers would load code from elsewhere
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
MAX_BLOCKS = 10_000  # far beyond any model; a damaged number must not make a table of billions of names
_MOE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def refuse_moe(config: Mapping[str, Any]) -> None:
    """Raises UserError if a config describes a mixture of experts."""
    found = [key for key in _MOE if config.get(key)]
    model_type = str(config.get("model_type", ""))
    dense = any(config.get(key) == 0 for key in _MOE) and not found  # granitemoehybrid without experts
    if found or ("moe" in model_type and not dense) or model_type in ("mixtral", "dbrx", "jamba", "arctic"):
        attribute = f" (config.json has {found[0]})" if found else ""
        raise UserError(
            f"model_type '{model_type}' is a mixture of experts{attribute}: not supported, choose a dense model"
        )


def check_attributes(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Looks at the attributes that a family does not read. transformers is the measure.

    What its config class for the `model_type` does not know, its model never reads. What the class knows has no effect
    at its default value.

    Args:
        config: config.json.
        known: Attributes that the family reads, or that only training reads.

    Raises:
        UserError: Naming every attribute that may change the forward pass.
    """
    _check_types(config)
    unread = {key: value for key, value in config.items() if key not in known and key not in _HARMLESS}
    if not unread:
        return  # as of most models: importing transformers takes seconds
    defaults = _Defaults(config.get("model_type"))
    changing = [f"{key}={value!r}" for key, value in sorted(unread.items()) if not defaults.without_effect(key, value)]
    if changing:
        raise UserError(
            f"config.json sets attributes that this model family does not implement: {shorten(changing)}; "
            "they may change the forward pass, so the model is refused (remove them if you know that they do not)"
        )
    ignored = [f"{key}={value!r}" for key, value in sorted(unread.items()) if defaults.surprises(key, value)]
    if ignored:
        log.warning(
            "%s", one_line(f"config.json: {shorten(ignored)}: ignored, as transformers does for {defaults.name}")
        )


def _check_types(config: Mapping[str, Any]) -> None:
    """Raises UserError for what keeps a config, and so the copy that is saved with a model, from being loaded."""
    for key, types in _TYPES.items():
        if key in config and type(config[key]) not in types:
            expected = " or ".join(_TYPE_NAMES[kind] for kind in types)
            raise UserError(f"config.json: {key} is {config[key]!r}, expected {expected}")
    for key in ("dtype", "torch_dtype"):
        if isinstance(config.get(key), str):
            take_choice(config, key, _DTYPES, "")


def transformers() -> Any:
    """The library, imported where it is needed only; torch is not missing: none of this needs it."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


class _Defaults:
    """The default values of transformers' config class for a `model_type`."""

    def __init__(self, model_type: Any) -> None:
        library = transformers()
        self.name = model_type
        known = model_type in library.CONFIG_MAPPING  # its `get` finds nothing
        self._class = library.CONFIG_MAPPING[model_type] if known else library.PreTrainedConfig
        self._generation = set(library.GenerationConfig().to_dict())

    def without_effect(self, key: str, value: Any) -> bool:
        """Whether transformers' model is the same without this attribute."""
        if key not in _COMMON and not hasattr(self._class, key):
            return True
        default = _COMMON[key] if key in _COMMON else getattr(self._class, key)
        if value is None or value is False:
            return default is None or default is False or isinstance(default, property)
        return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)

    def surprises(self, key: str, value: Any) -> bool:
        """Whether someone could believe that an attribute counts: a number that is no setting of generation."""
        unknown = key not in _COMMON and not hasattr(self._class, key) and not key.startswith("_")
        number = isinstance(value, int | float) and not isinstance(value, bool) and value != 0
        return unknown and number and key not in self._generation


def note_code(config: Mapping[str, Any]) -> None:
    """Tells that code which a checkpoint brings, or names, is not used."""
    kernels = [key for key in _KERNELS if "/" in str(config.get(key))]
    for key in [*(key for key in _CODE if config.get(key)), *kernels]:
        log.warning(
            "config.json: %s names code outside of transformers: it is not used, the model is computed as a plain %s",
            key,
            config["model_type"],
        )


def take_int(
    config: Mapping[str, Any], key: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1
) -> int:
    """A whole number from `low` to `high` from a config."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        found = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"config.json: {key} {found}, expected a whole number from {low} to {high}")
    return value


def take_float(config: Mapping[str, Any], key: str, default: float | None = None, *, high: float = 1e300) -> float:
    """A positive number below `high` from a config; null is none."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < high:
        found = f"is {value!r}" if key in config else "is missing"
        raise UserError(f"config.json: {key} {found}, expected a positive number")
    return float(value)


def take_optional_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float | None:
    """A positive number from a config; null, or absence without a default, is None."""
    return None if config.get(key, default) is None else take_float(config, key, default)


def take_bool(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false from a config."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r}, expected true or false")
    return value


def take_choice(config: Mapping[str, Any], key: str, choices: Collection[str], default: str) -> str:
    """One of some names from a config."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"config.json: {key} {value!r} is not supported, expected one of {sorted(choices)}")
    return value


def take_window(config: Mapping[str, Any], default: int | None) -> int | None:
    """`sliding_window`: null switches it off, absence means the default."""
    return None if config.get("sliding_window", default) is None else take_int(config, "sliding_window", default)


def take_windowed_layers(config: Mapping[str, Any], blocks: int) -> tuple[bool, ...] | None:
    """Whether each of `blocks` blocks has a sliding window, by `layer_types`; None where that is not given."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    names = {"sliding_attention": True, "full_attention": False, "attention": False}  # the last: as older files have it
    if not isinstance(kinds, list) or len(kinds) != blocks or any(str(kind) not in names for kind in kinds):
        raise UserError(
            f"config.json: layer_types {str(kinds)[:60]}, expected {blocks} of sliding_attention, full_attention"
        )
    return tuple(names[str(kind)] for kind in kinds)


def refuse_windows(config: Mapping[str, Any], blocks: int) -> None:
    """Raises UserError if `layer_types` has sliding windows, for a family without them."""
    if any(take_windowed_layers(config, blocks) or ()):
        raise UserError("config.json: layer_types has sliding_attention: this model_type has no sliding windows")
