"""What to tell of a model that no family implements: what it is, and which text model to take instead."""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from neuroal_jax.models.hf_config import transformers

# Where a model around a text model describes it.
_INNER = ("text_config", "llm_config", "language_config", "text_model", "language_model", "decoder")
_AROUND = ("thinker_config", "talker_config", "model_config")  # of which some have it one level further down
# Attributes of a model that reads more than text: vision_config, audio_config, mm_vision_tower, img_processor, ...
_SENSES = re.compile(
    "(mm_)?(vision|visual|audio|image|img)_?(config|tower|backbone|encoder|model|processor|tokenizer|$).*"
)
_USUAL = {"idefics2": "mistral", "llava": "llama", "mistral3": "mistral", "mllama": "llama", "paligemma": "gemma"}
_USUAL |= {"gemma3": "gemma3_text", "phi4": "phi3", "phi4mm": "phi3", "qwen": "qwen2", "vicuna": "llama"}
_HYBRID = ("qwen3_5", "qwen3_next")  # of which no other part is a text model of the family that they are named after


def refusal(config: Mapping[str, Any], families: Collection[str]) -> str:
    """The message for a config whose `model_type` is none of `families`."""
    model_type = config["model_type"]
    expected = f"expected one of {', '.join(families)}"
    where, inner = _inner(config)
    kind = _kind(model_type)
    senses = any(_SENSES.fullmatch(str(key)) and value is not None for key, value in config.items())
    around = where or kind == "multimodal" or senses
    if config.get("is_encoder_decoder") is True or (kind == "encoder-decoder" and not around):
        return f"model_type '{model_type}' is an encoder-decoder, not supported: {expected}"
    if around:
        advice = _advice(model_type, where, inner, families)
        return f"model_type '{model_type}' is a model around a text model, not supported{advice}"
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
    """The family that a name is made of: qwen2 of qwen2_5_vl_text, gemma3_text of itself, llama of llava_llama."""
    if not isinstance(model_type, str) or model_type.startswith(_HYBRID):
        return None
    name = model_type.replace("-", "_")
    named = [family for family in families if f"_{family}_" in f"_{name}_"]
    usual = [_USUAL.get(word) for word in reversed(name.split("_"))]  # llava_qwen: the text model comes last
    return max(named, key=len) if named else next((family for family in usual if family in families), None)


def _kind(model_type: str) -> str | None:
    """What transformers knows a `model_type` as; None if it does not."""
    library = transformers()
    tables = {"encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM", "multimodal": "MULTIMODAL_LM", "other": "MASKED_LM"}
    try:  # encoders come before the models that can be loaded as decoders, since some of them can
        for kind, task in {**tables, "text": "CAUSAL_LM"}.items():
            if model_type in getattr(library.models.auto.modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
                return kind
    except ImportError:  # the tables need torch, which may be absent
        return "text" if model_type in library.CONFIG_MAPPING else None
    return "other" if model_type in library.CONFIG_MAPPING else None


def _hint(model_type: str, families: Collection[str]) -> str:
    """What was meant, if it is a typing error: never another generation of a family."""
    plain = re.sub(r"[^a-z0-9]", "", model_type.lower())
    close = difflib.get_close_matches(plain, families, n=1, cutoff=0.8)
    same = [name for name in close if re.findall(r"\d+", name) == re.findall(r"\d+", plain)]
    return f"; did you mean '{same[0]}'?" if same else ""
