"""The Llama modules against transformers: logits and every block's hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neuroal_jax.finetune import load_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped-query": {},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 14},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "gelu, other theta and epsilon": {"hidden_act": "gelu", "rope_theta": 123.0, "rms_norm_eps": 1e-3},
    "one block": {"num_hidden_layers": 1},
}


def torch_states(directory, tokens):
    """Hidden states after the embedding and after every block but the last, and logits, from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long(), output_hidden_states=True)
    return [state.numpy() for state in out.hidden_states[:-1]], out.logits.numpy()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_and_hidden_states_equal_transformers(make_llama, options):
    directory = make_llama(**options)
    tokens = np.random.default_rng(1).integers(0, 96, (3, 40))
    states, logits = torch_states(directory, tokens)
    model = load_model(str(directory))
    hidden = model.stem(tokens)
    for block, expected in zip(model.blocks, states, strict=True):
        np.testing.assert_allclose(hidden, expected, atol=1e-5)
        hidden, _ = block(hidden)
    np.testing.assert_allclose(model.head(hidden), logits, atol=1e-4)
    np.testing.assert_allclose(model(tokens), logits, atol=1e-4)


def test_eager_equals_jit(llama):
    model = load_model(str(llama))
    tokens = jnp.arange(20).reshape(2, 10)
    np.testing.assert_allclose(nnx.jit(lambda model, tokens: model(tokens))(model, tokens), model(tokens), atol=1e-5)


def test_half_precision_stays_close(make_llama):
    directory = make_llama(dtype="bfloat16")
    tokens = np.random.default_rng(2).integers(0, 96, (2, 20))
    _, logits = torch_states(directory, tokens)
    half = np.asarray(load_model(str(directory))(tokens).astype(jnp.float32))
    assert load_model(str(directory)).head.embedding.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, logits, atol=0.15)


def test_block_inputs_are_what_its_linears_multiply(llama):
    model = load_model(str(llama))
    block = model.blocks[0]
    hidden, inputs = block(model.stem(np.arange(12)[None]))
    assert set(inputs) == {"attention_input", "attention_output", "mlp_input", "mlp_hidden"}
    residual = model.stem(np.arange(12)[None]) + block.self_attn.o_proj(inputs["attention_output"])
    np.testing.assert_allclose(block.post_attention_layernorm(residual), inputs["mlp_input"], atol=1e-6)
    np.testing.assert_allclose(residual + block.mlp.down_proj(inputs["mlp_hidden"]), hidden, atol=1e-6)


def test_attention_in_slices_equals_attention_at_once(monkeypatch):
    from neuroal_jax.models import layers

    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (5, 9, 4, 6))
    k, v = (jax.random.normal(key, (5, 9, 2, 6)) for key in keys[1:])
    at_once = layers.causal_attention(q, k, v)
    monkeypatch.setattr(layers, "score_bytes", lambda: 2 * 4 * 4 * 9 * 9)
    np.testing.assert_allclose(layers.causal_attention(q, k, v), at_once, atol=1e-6)
    np.testing.assert_allclose(at_once, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)
