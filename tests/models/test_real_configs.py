"""config.json files as they are published, every key kept, sizes shrunk: what transformers computes of them."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from neuroal_jax import UserError, load_model
from neuroal_jax.models import FAMILIES, family_of
from tests.conftest import save_random_weights
from tests.models.test_families import torch_states

CONFIGS = json.loads((Path(__file__).parents[1] / "data" / "configs.json").read_text())
VOCABULARY, POSITIONS, BLOCKS, HEADS = 128, 32, 2, 4
TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, (2, 40))  # longer than the context: `dynamic` scaling counts
# Not their own sizes, so that few shapes are compiled.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "ffn_dim": 56,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "sliding_window": 11,
    "max_window_layers": 1,
    "no_rope_layer_interval": 2,
    "sliding_window_pattern": 2,
}


def shrunk(config):
    """A config of a tiny model; all that is no size stays as it is."""
    small = {key: SIZES[key] if key in SIZES and value is not None else value for key, value in config.items()}
    tokens = [key for key, value in config.items() if key.endswith("_token_id") and isinstance(value, int)]
    small |= {key: config[key] % VOCABULARY for key in tokens}
    if config.get("num_key_value_heads"):
        share = config["num_key_value_heads"] / config["num_attention_heads"]
        small["num_key_value_heads"] = HEADS if share == 1 else 2 if share > 1 / 8 else 1
    if config.get("head_dim"):
        small["head_dim"] = 8 if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"] else 12
    if config["model_type"] == "phi":
        small["hidden_size"] = 20 * HEADS  # a share of 0.4 is rotated
    if config["model_type"] == "opt":
        small["max_position_embeddings"] = 64  # a table, whose length no text exceeds
        small["word_embed_proj_dim"] = 32 if config["word_embed_proj_dim"] == config["hidden_size"] else 20
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key):
            small[key] = [*dict.fromkeys(config[key]), *config[key]][:BLOCKS]  # one of each kind first
    for key in ("rope_scaling", "rope_parameters"):
        if "original_max_position_embeddings" in (config.get(key) or {}):
            small[key] = config[key] | {"original_max_position_embeddings": 16}
        if "long_factor" in (config.get(key) or {}):  # one number for each pair of dimensions that are rotated
            pairs = int(SIZES["hidden_size"] // HEADS * config.get("partial_rotary_factor", 1.0)) // 2
            small[key] = config[key] | {name: config[key][name][-pairs:] for name in ("long_factor", "short_factor")}
    if "original_max_position_embeddings" in config:
        small["original_max_position_embeddings"] = 16
    return small


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_published_config_gives_the_logits_of_transformers(tmp_path, config):
    save_random_weights(tmp_path, shrunk(config))
    _, expected = torch_states(tmp_path, TOKENS)
    np.testing.assert_allclose(load_model(str(tmp_path))(TOKENS), expected, atol=1e-4)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


LLAMA = without(shrunk(CONFIGS["Llama-3.1-8B-Instruct"]), "rope_scaling")
QWEN, MISTRAL = shrunk(CONFIGS["Qwen2-0.5B"]), shrunk(CONFIGS["Mistral-7B-v0.1"])
GEMMA, PHI, OPT = shrunk(CONFIGS["gemma-7b-it"]), shrunk(CONFIGS["phi-2"]), shrunk(CONFIGS["opt-125m"])
PHI3, NEOX = shrunk(CONFIGS["Phi-3.5-mini-instruct"]), shrunk(CONFIGS["pythia-70m"])
GEMMA3 = {
    **{key: GEMMA[key] for key in (*SIZES, "hidden_size") if key in GEMMA and key != "ffn_dim"},
    "model_type": "gemma3_text", "head_dim": 12, "num_key_value_heads": 1, "sliding_window": 6, "bos_token_id": 2,
}  # fmt: skip
GRANITE, OLMO2 = shrunk(CONFIGS["granite-3.1-2b-base"]), shrunk(CONFIGS["OLMo-2-0425-1B"])
SMOLLM3 = shrunk(CONFIGS["SmolLM3-3B"])
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3], "long_factor": [2, 3.0, 5.0, 20.0]}
FULL, SLIDING = "full_attention", "sliding_attention"
ODD = {
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "dynamic": LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0},
    "dynamic, short text": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4}, "max_position_embeddings": 64},
    "yarn": QWEN | {"rope_scaling": YARN},
    "yarn, no original length": QWEN | {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    "yarn, the original length outside": QWEN | {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    "yarn, attention factor": QWEN | {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "yarn, betas": QWEN | {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2}},
    "yarn, mscale": QWEN | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}, "rope_theta": 100.0},
    "yarn, not truncated": QWEN | {"rope_scaling": YARN | {"truncate": False}},
    "yarn, both places": QWEN | {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e6}},
    "linear phi": PHI | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn phi": PHI | {"rope_scaling": YARN, "partial_rotary_factor": 0.5},
    "longrope, as long as the original context": LLAMA | {
        "rope_scaling": LONG | {"original_max_position_embeddings": 40}, "max_position_embeddings": 80,
    },
    "longrope, longer by a token": LLAMA | {
        "rope_scaling": LONG | {"original_max_position_embeddings": 39}, "max_position_embeddings": 80,
    },
    "longrope, the original length outside": MISTRAL | {"rope_scaling": LONG, "original_max_position_embeddings": 8},
    "longrope, no original length": QWEN | {"rope_scaling": LONG},
    "longrope, factor": GEMMA | {
        "rope_scaling": LONG | {"factor": 4.0, "original_max_position_embeddings": 16}, "head_dim": 8,
    },
    "longrope, a factor below 1": QWEN | {"rope_scaling": LONG | {"factor": 0.5}},
    "longrope, attention factor": QWEN | {"rope_scaling": LONG | {"attention_factor": 1.3, "factor": 4.0}},
    "longrope phi": PHI | {"rope_scaling": LONG, "partial_rotary_factor": 0.4},
    "longrope phi3, its first name": PHI3 | {
        "rope_scaling": LONG | {"type": "su", "original_max_position_embeddings": 16},
    },
    "longrope phi3, another first name": PHI3 | {"rope_scaling": LONG | {"type": "yarn"}},
    "longrope phi3, under both names": PHI3 | {"rope_scaling": LONG | {"rope_type": "longrope", "type": "su"}},
    "longrope phi3, an original length that does not count": without(PHI3, "original_max_position_embeddings") | {
        "rope_scaling": LONG | {"original_max_position_embeddings": 16},
    },
    "phi3, factors of no rotation": PHI3 | {"rope_scaling": LONG | {"type": "default"}},
    "phi3 without a window": PHI3 | {"sliding_window": None, "rms_norm_eps": 1e-3},
    "phi3 without what has a default": without(PHI3, "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window"),
    "longrope gpt_neox": NEOX | {"rope_scaling": LONG, "rotary_pct": 1.0, "original_max_position_embeddings": 16},
    "dynamic gpt_neox": NEOX | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rotary_pct": 0.5},
    "gpt_neox as transformers 5 saves it": without(NEOX, "rotary_pct", "rotary_emb_base") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "gpt_neox without what has a default": without(NEOX, "rotary_pct", "rotary_emb_base", "use_parallel_residual"),
    "values of another rotation": LLAMA | {"rope_scaling": {"rope_type": "default", "factor": 8.0, "mscale": 2.0}},
    "an unused share of the rotation": LLAMA | {"partial_rotary_factor": 0.5},
    "gemma without activation": without(GEMMA, "hidden_act", "hidden_activation"),
    "gemma with another activation": GEMMA | {"hidden_act": "silu"},
    "gemma, activation under the other name": without(GEMMA, "hidden_act") | {"hidden_activation": "gelu"},
    "qwen with windows": QWEN | {"use_sliding_window": True},
    "qwen with a window everywhere": QWEN | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen with windows of no block": QWEN | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen with windows by layer type": QWEN | {"use_sliding_window": True, "layer_types": [SLIDING, FULL]},
    "mistral without the attribute of its window": without(MISTRAL, "sliding_window"),
    "mistral with layer types": MISTRAL | {"layer_types": [FULL, SLIDING], "head_dim": 8},
    "mistral, no layer has its window": MISTRAL | {"layer_types": [FULL, FULL], "head_dim": 8},
    "llama with layer types": LLAMA | {"layer_types": [FULL, FULL]},
    "llama with a window that it does not read": LLAMA | {"sliding_window": 3, "use_sliding_window": True},
    "causal, not two-directional": GEMMA | {"is_causal": True, "use_bidirectional_attention": False},
    "attributes of other models": LLAMA | {"logits_scaling": 9.0, "embedding_multiplier": 3, "qk_layernorm": True},
    "a plan of several devices": LLAMA | {"base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"}},
    "dropout": LLAMA | {"attention_dropout": 0.5, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "neftune_noise_alpha": 5},
    "gemma 3 as transformers 4 wrote it": GEMMA3 | {
        "rope_theta": 500.0, "rope_local_base_freq": 20.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2, "cache_implementation": "hybrid",
    },
    "gemma 3, rotation of one kind of layer given": GEMMA3 | {
        "rope_parameters": {FULL: {"rope_type": "yarn", "factor": 4.0}, SLIDING: None}, "layer_types": [SLIDING, FULL],
    },
    "granite without factors": without(GRANITE, *(key for key in GRANITE if key.endswith(("multiplier", "scaling")))),
    "olmo 2 without epsilon": without(OLMO2, "rms_norm_eps"),
    "smollm3 without what has a default": without(SMOLLM3, "no_rope_layers", "rope_theta", "tie_word_embeddings"),
    "smollm3, the base beside a scaled rotation": SMOLLM3 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "smollm3, a scaled rotation without a base": without(SMOLLM3, "rope_theta") | {
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "smollm3 with a window where nothing is rotated": without(SMOLLM3, "layer_types") | {
        "use_sliding_window": True, "sliding_window": 11,
    },
    "smollm3 with a window that is not used": without(SMOLLM3, "layer_types") | {"sliding_window": 11},
    "smollm3 with a window by layer type": SMOLLM3 | {"layer_types": [SLIDING, FULL], "sliding_window": 11},
    "tied by default": without(OPT, "tie_word_embeddings"),
    **{f"activation {name}": LLAMA | {"hidden_act": name} for name in ("quick_gelu", "relu2", "mish", "gelu_python")},
}  # fmt: skip


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_an_odd_config_gives_the_logits_of_transformers(tmp_path, config):
    save_random_weights(tmp_path, config)
    _, expected = torch_states(tmp_path, TOKENS)
    np.testing.assert_allclose(load_model(str(tmp_path))(TOKENS), expected, atol=1e-4)


REFUSED = {
    "attention in both directions": (LLAMA | {"is_causal": False}, "is_causal=False"),
    "a causality that is null": (LLAMA | {"is_causal": None}, "is_causal=None"),
    "gemma in both directions": (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    "quantised": (LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config="),
    "quantised somehow": (LLAMA | {"quantization_config": {}}, "quantization_config={}"),
    "other weights": (LLAMA | {"transformers_weights": "other.safetensors"}, "transformers_weights="),
    "another config": (LLAMA | {"configuration_files": ["config.4.0.0.json"]}, "configuration_files="),
    "a config per layer": (LLAMA | {"per_layer_config": {"0": {"num_key_value_heads": 1}}}, "per_layer_config="),
    "fused modules": (LLAMA | {"fusion_config": {"a": 1}}, "fusion_config="),
    "attributes that stand for others": (LLAMA | {"attribute_map": {"rms_norm_eps": "rope_theta"}}, "attribute_map="),
    "a method's name": (LLAMA | {"standardize_rope_params": 1}, "standardize_rope_params=1"),
    "a model inside": (LLAMA | {"text_config": {"model_type": "llama"}}, "text_config="),
    "windows that it does not have": (LLAMA | {"layer_types": [SLIDING, FULL]}, "layer_types has sliding_attention"),
    "chunked attention": (LLAMA | {"layer_types": ["chunked_attention"] * 2}, "layer_types .* expected 2 of"),
    "layer types of another depth": (QWEN | {"layer_types": [FULL]}, "layer_types .* expected 2 of"),
    "layer types without a window": (QWEN | {"layer_types": [SLIDING] * 2}, "no sliding_window is set"),
    "two activations": (GEMMA | {"hidden_activation": "relu"}, "hidden_activation 'relu' and hidden_act 'gelu' differ"),
    "two rotations": (
        QWEN | {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters contradict each other: .*rope_type 'yarn' and 'default'",
    ),
    "two factors": (
        QWEN | {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
        "contradict each other: factor 4.0 and 2.0",
    ),
    "two types in one": (QWEN | {"rope_scaling": YARN | {"rope_type": "linear"}}, "type 'yarn' and rope_type 'linear'"),
    "two thetas": (QWEN | {"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 1000000.0, but 5.0"),
    "an unknown rotation": (LLAMA | {"rope_scaling": {"type": "mrope"}}, "rope scaling type 'mrope' is not supported"),
    "a share of a scaled rotation": (
        LLAMA | {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "partial_rotary_factor is not supported",
    ),
    "a rotation per layer type": (
        QWEN | {"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_parameters has full_attention="
    ),
    "longrope without factors": (QWEN | {"rope_scaling": {"type": "longrope"}}, "short_factor is missing, expected"),
    "longrope with a factor that is none": (
        QWEN | {"rope_scaling": LONG | {"long_factor": [1, 2, 3, True]}}, r"long_factor\[3\] is True.* 'longrope'",
    ),
    "longrope of one position": (
        QWEN | {"rope_scaling": LONG | {"original_max_position_embeddings": 1}}, "max_position_embeddings is 1",
    ),
    "longrope under a name of phi3": (QWEN | {"rope_scaling": LONG | {"type": "su"}}, "scaling type 'su' is not supp"),
    "an odd number of dimensions and longrope": (
        PHI3 | {"rope_scaling": LONG | {"long_factor": [1], "short_factor": [1]}, "partial_rotary_factor": 0.4},
        "3 dimensions of a head are rotated, longrope needs an even number",
    ),
    "gpt_neox with another rotation by its usual name": (NEOX | {"partial_rotary_factor": 0.5}, "but .* rotary_pct"),
    "yarn without a factor": (QWEN | {"rope_scaling": {"type": "yarn"}}, "factor is missing.* 'yarn'"),
    "yarn that overflows": (QWEN | {"rope_scaling": YARN | {"beta_fast": 1e30}}, "beta_fast is 1e[+]30"),
    **{
        f"{key}={value!r}": (LLAMA | {key: value}, f"{key} .*expected")
        for key, value in {
            "attention_dropout": True,
            "bos_token_id": 0.5,
            "dtype": "x",
            "eos_token_id": "2",
            "id2label": [],
            "initializer_range": None,
            "pad_token_id": [0],
            "pretraining_tp": "1",
            "rms_norm_eps": None,
            "rope_parameters": [],
            "rope_scaling": 0,
            "torch_dtype": [],
            "use_cache": 1,
        }.items()
    },
    "another task": (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "architectures .* not supported"),
    "another model's class": (LLAMA | {"architectures": ["MistralForCausalLM"]}, "architectures .* not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_what_changes_numbers_is_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        family_of(config).parse_config(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_model_without_its_head_is_known_by_the_class_that_transformers_has_for_it(model_type):
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    assert family_of({"model_type": model_type, "architectures": [MODEL_MAPPING_NAMES[model_type]]}).name == model_type


def test_code_that_a_config_names_is_not_used_and_said_to_be_so(caplog):
    code = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "custom_pipelines": {"x": {"impl": "evil.P"}},
        "attn_implementation": "kernels-community/flash-attn",
    }
    family_of(LLAMA | code).parse_config(LLAMA | code)
    for key in code:
        assert f"{key} names code outside of transformers: it is not used" in caplog.text
    caplog.clear()
    family_of(LLAMA).parse_config(LLAMA | {"attn_implementation": "sdpa", "auto_map": None})
    assert not caplog.records


def test_a_number_that_transformers_does_not_read_is_ignored_and_said_to_be_so(caplog):
    with caplog.at_level(logging.WARNING):
        config = LLAMA | {"attention_multiplier": 2.0, "temperature": 0.6, "is_llama_config": True, "odd\x1b[2J": 1}
        family_of(config).parse_config(config)
    assert "attention_multiplier=2.0; odd\\x1b[2J=1: ignored" in caplog.text
    assert "temperature" not in caplog.text


def test_most_configs_are_read_without_importing_transformers():
    import subprocess
    import sys

    program = (
        "import json, sys\nfrom neuroal_jax.models import family_of\n"
        "config = json.loads(sys.argv[1])\nfamily_of(config).parse_config(config)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, json.dumps(CONFIGS["Llama-2-7b-hf"])], check=True, timeout=60)
