"""What is told of a model that no family implements: never another family's name as if it were a typing error."""

import pytest

from neuroal_jax import UserError
from neuroal_jax.models import FAMILIES, family_of

VICUNA = {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama", "vocab_size": 32064}
INSIDE = {
    "llava": ({"model_type": "llava", "text_config": VICUNA}, "llama", "is 'llama'.*lmsys/vicuna"),
    "llava next": ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral", "text_config"),
    "onevision": ({"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}, "qwen2", "text_config"),
    "an old llava": ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, "llama", "around a text model"),
    "llava with qwen": ({"model_type": "llava_qwen", "mm_vision_tower": "siglip"}, "qwen2", "around a text model"),
    "instructblip": ({"model_type": "instructblip", "text_config": {"model_type": "vicuna"}}, "llama", "is 'vicuna'"),
    "mllama": ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "llama", "mllama_text"),
    "paligemma": ({"model_type": "paligemma", "text_config": {"model_type": "gemma2"}}, "gemma2", "text_config"),
    "mistral3": ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, "mistral", "text_config"),
    "idefics2": ({"model_type": "idefics2", "text_config": {"model_type": "mistral"}}, "mistral", "text_config"),
    "qwen2_vl, flat": ({"model_type": "qwen2_vl", "vision_config": {}}, "qwen2", "around a text model"),
    "2.5 vl": ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2", "2_5_vl_text"),
    "qwen3 vl": ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "qwen3", "text_config"),
    "internvl": ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "qwen2", "llm_config"),
    "phi3_v": ({"model_type": "phi3_v", "img_processor": {"name": "clip"}}, "phi3", "around a text model"),
    "omni": (
        {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"model_type": "qwen2_5_omni_text"}}},
        "qwen2",
        "thinker_config.text_config.model_type",
    ),
    "gemma3": ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "gemma3_text", "text_config"),
    "gemma3, untyped": ({"model_type": "gemma3", "text_config": {"head_dim": 256}}, "gemma3_text", "'gemma3' is"),
    "phi-4 multimodal": ({"model_type": "phi4_multimodal", "vision_config": {}}, "phi3", "around a text model"),
    "phi-4 multimodal, its first name": (
        {"model_type": "phi4mm", "img_processor": None, "audio_processor": {"name": "cascades"}}, "phi3", "'phi4mm' is",
    ),
    "granite speech": ({"model_type": "granite_speech", "text_config": {"model_type": "granite"}}, "granite", "is 'gr"),
    "blip-2": ({"model_type": "blip-2", "text_config": {"model_type": "opt"}}, "opt", "text_config"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "text", "message"), INSIDE.values(), ids=INSIDE)
def test_a_model_around_a_text_model_is_told_which_one_to_take(config, text, message):
    with pytest.raises(UserError, match=message) as caught:
        family_of(config)
    assert f"take the text model alone, a checkpoint of model_type '{text}'" in str(caught.value)


NAMES = """
    gemma3n_text gemma4000 gpt2 gpt_neo gpt_neox_japanese mamba ministral olmo olmo3 phi-msft phi4 qwen qwen3_next
"""
OTHERS = {
    "gemma3n": ({"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}}, "3n_text'.: take a text"),
    "gemma4": ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}, "4_text'.: take a text model"),
    "a hybrid text model": ({"model_type": "qwen3_5", "vision_config": {}}, "around a text model, not supp.*: take a"),
    "speech": ({"model_type": "ultravox", "audio_model_id": "openai/whisper"}, "around a text model, not"),
    "eyes of its own": ({"model_type": "molmo", "vision_backbone": {"image_size": 14}}, "around a text model, not"),
    "llama4": ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "model_type is 'llama4_text'"),
    "a config of no type": ({"model_type": "aria", "text_config": {"model_type": ["x"]}}, "around a text model"),
    "t5gemma": (
        {"model_type": "t5gemma", "decoder": {"model_type": "t5_gemma_module"}, "is_encoder_decoder": True},
        "is an encoder-decoder",
    ),
    "a hybrid without experts": ({"model_type": "granitemoehybrid", "num_local_experts": 0}, "'\\w+' is not supp"),
    "t5": ({"model_type": "t5"}, "is an encoder-decoder"),
    "an own encoder-decoder": ({"model_type": "mine", "is_encoder_decoder": True}, "is an encoder-decoder"),
    "bert": ({"model_type": "bert"}, "is no causal language model"),
    "clip": ({"model_type": "vit"}, "is no causal language model"),
    **{
        name: ({"model_type": name}, f"'{name}' is not supported, expected one of gemma, ") for name in NAMES.split()
    },
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), OTHERS.values(), ids=OTHERS)
def test_another_architecture_is_told_what_it_is(config, message):
    with pytest.raises(UserError, match=message) as caught:
        family_of(config)
    assert "did you mean" not in str(caught.value)
    assert ", ".join(FAMILIES) in str(caught.value)


@pytest.mark.parametrize(
    "typo, meant",
    [("llamas", "llama"), ("LLaMA", "llama"), ("qwen-2", "qwen2"), ("mistrall", "mistral"), ("OLMo-2", "olmo2")],
)
def test_a_typing_error_is_recognised(typo, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        family_of({"model_type": typo})


def test_without_torch_less_is_told(monkeypatch):
    class Absent:
        def __getattribute__(self, name):
            raise ImportError("modeling_auto requires PyTorch")

    monkeypatch.setattr("transformers.models.auto.modeling_auto", Absent())
    with pytest.raises(UserError, match="model_type 't5' is not supported, expected one of gemma"):
        family_of({"model_type": "t5"})
    with pytest.raises(UserError, match="did you mean 'llama'"):
        family_of({"model_type": "lama"})
