"""Reading Hugging Face's config.json: every attribute is understood, harmless or refused by name."""

from collections.abc import Collection, Mapping
from typing import Any

from neuroal_jax.errors import UserError, shorten

# Attributes that describe files, generation or training and never change the forward pass.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id
    length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()
)
MAX_BLOCKS = 10_000  # far beyond any model; a damaged number must not make a table of billions of names
_MOE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def refuse_moe(config: Mapping[str, Any]) -> None:
    """Raises UserError if a config describes a mixture of experts."""
    found = [key for key in _MOE if config.get(key)]
    model_type = str(config.get("model_type", ""))
    if found or "moe" in model_type or model_type in ("mixtral", "dbrx", "jamba", "arctic"):
        attribute = f" (config.json has {found[0]})" if found else ""
        raise UserError(
            f"model_type '{model_type}' is a mixture of experts{attribute}: not supported, choose a dense model"
        )


def refuse_unknown(config: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raises UserError naming every attribute that is set and neither in `known` nor harmless.

    An attribute that is null or false is a feature switched off and passes.
    """
    unknown = [
        f"{key}={value!r}"
        for key, value in sorted(config.items())
        if key not in known and key not in _HARMLESS and value is not None and value is not False
    ]
    if unknown:
        raise UserError(
            f"config.json sets attributes that this model family does not implement: {shorten(unknown)}; "
            "they may change the forward pass, so the model is refused (remove them if you know that they do not)"
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


def take_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive, finite number from a config."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        found = "is missing" if value is None else f"is {value!r}"
        raise UserError(f"config.json: {key} {found}, expected a positive number")
    return float(value)


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


def refuse_windows(config: Mapping[str, Any]) -> None:
    """Raises UserError if a config switches on sliding windows in a family that has them implemented nowhere."""
    kinds = config.get("layer_types") or []
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if config.get("use_sliding_window") or not full:
        raise UserError("config.json: use_sliding_window is set: sliding windows are not supported for this family")
