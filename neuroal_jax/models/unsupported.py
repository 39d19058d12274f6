"""What to tell of a model that no family implements: what it is, and which text model to take instead."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

# Where a model around a text model describes it.
_INNER = ("text_config", "llm_config", "language_config", "text_model", "language_model", "decoder")
_AROUND = ("thinker_config", "talker_config", "model_config")  # of which some have it one level further down
# Attributes of a model that reads more than text.
_SENSES = (
    "vision_config",
    "audio_config",
    "vision_tower",
    "mm_vision_tower",
    "visual",
    "img_processor",
    "vision_encoder",
)
_USUAL = {"idefics2": "mistral", "llava": "llama", "mistral3": "mistral", "mllama": "llama", "paligemma": "gemma"}


def refusal(config: Mapping[str, Any], families: Collection[str]) -> str:
    """The message for a config whose `model_type` is none of `families`."""
    model_type = config["model_type"]
    expected = f"expected one of {', '.join(families)}"
    where, inner = _inner(config)
    kind = _kind(model_type)
    if where or kind == "multimodal" or any(config.get(key) for key in _SENSES):
        advice = _advice(model_type, where, inner, families)
        return f"model_type '{model_type}' is a model around a text model, not supported{advice}"
    if kind == "encoder-decoder" or config.get("is_encoder_decoder") is True:
        return f"model_type '{model_type}' is an encoder-decoder, not supported: {expected}"
    if kind == "other":
        return f"model_type '{model_type}' is no causal language model, not supported: {expected}"
    hint = "" if kind else _hint(model_type, families)
    return f"model_type '{model_type}' is not supported, {expected}{hint}"


def _inner(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Where a config describes a text model, and what it says of it."""
    places = [("", config), *((f"{key}.", config[key]) for key in _AROUND if isinstance(config.get(key), Mapping))]
    for prefix, outer in places:
        for key in _INNER:
            if isinstance(outer.get(key), Mapping):
                return f"{prefix}{key}", outer[key]
    return "", {}


def _advice(model_type: str, where: str, inner: Mapping[str, Any], families: Collection[str]) -> str:
    """Which text model to take."""
    given = inner.get("model_type")
    said = f" ({where}.model_type is '{given}')" if isinstance(given, str) else ""
    text = _family_in(given, families) or (None if said else _family_in(model_type, families))
    if text is None:
        return f"{said}: take a text model, of model_type {', '.join(families)}"
    source = inner.get("_name_or_path")
    example = f", here {source}" if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    return f": take the text model alone, a checkpoint of model_type '{text}'{said}{example}"


def _family_in(model_type: Any, families: Collection[str]) -> str | None:
    """The family that a name is made of: qwen2 of qwen2_5_vl_text, llama of llava_llama."""
    words = re.split(r"[-_]", model_type) if isinstance(model_type, str) else []
    usual = [_USUAL[word] for word in words[:1] if word in _USUAL]
    return next((word for word in [*words, *usual] if word in families), None)


def _kind(model_type: str) -> str | None:
    """What transformers knows a `model_type` as; None if it does not."""
    from transformers.models.auto import modeling_auto as auto

    if model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if model_type in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return "multimodal"
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:  # encoders, which can be loaded as decoders too
        return "other"
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "text"
    return "other" if model_type in auto.CONFIG_MAPPING_NAMES else None


def _hint(model_type: str, families: Collection[str]) -> str:
    """What was meant, if it is a typing error: never another generation of a family."""
    plain = re.sub(r"[^a-z0-9]", "", model_type.lower())
    close = difflib.get_close_matches(plain, families, n=1, cutoff=0.8)
    same = [name for name in close if re.findall(r"\d+", name) == re.findall(r"\d+", plain)]
    return f"; did you mean '{same[0]}'?" if same else ""
