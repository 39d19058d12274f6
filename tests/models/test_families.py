"""Every family against transformers: logits, every block's hidden states, and every tensor there and back."""

import json
from importlib import import_module
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neuroal_jax import PruneConfig, UserError, load_masks, load_model, prune
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.command.config import ALLOCATIONS, PRUNERS, REFINEMENTS
from neuroal_jax.masks.file import check_pruned
from neuroal_jax.models import FAMILIES
from neuroal_jax.models.family import expand
from tests.conftest import RUN

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0]}
SMALL = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
GRANITE = {
    "attention_multiplier": 0.15, "embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.22,
    "tie_word_embeddings": True,
}  # fmt: skip
VARIANTS = {
    "llama multi-head": {"num_key_value_heads": 4},
    "llama grouped-query": {},
    "llama multi-query": {"num_key_value_heads": 1},
    "llama wide heads": {"head_dim": 14},
    "llama biases": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"tie_word_embeddings": True},
    "llama llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "llama other activation, theta and epsilon": {"hidden_act": "gelu", "rope_theta": 123.0, "rms_norm_eps": 1e-3},
    "llama one block": {"num_hidden_layers": 1},
    "mistral no window": {"family": "mistral", "sliding_window": None},
    "mistral sliding window": {"family": "mistral", "sliding_window": 7},
    "mistral wide heads": {"family": "mistral", "head_dim": 12, "num_key_value_heads": 1},
    "qwen2": {"family": "qwen2"},
    "qwen2 windows": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2 tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 biases, tied": {"family": "qwen3", "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "gemma": {"family": "gemma", "head_dim": 12, **SMALL},
    "gemma multi-query": {"family": "gemma", "head_dim": 16, "num_key_value_heads": 1, **SMALL},
    "gemma2": {"family": "gemma2", "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 9, **SMALL},
    "gemma2 softcaps": {
        "family": "gemma2", "head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, **SMALL,
    },
    "gemma2 no softcaps": {
        "family": "gemma2", "head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, **SMALL,
    },
    "gemma3": {
        "family": "gemma3_text", "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **SMALL,
    },
    "gemma3, a pattern of layers": {"family": "gemma3_text", "head_dim": 8, "sliding_window_pattern": 2, **SMALL},
    "gemma3, one kind of block": {
        "family": "gemma3_text", "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention"] * 3, **SMALL,
    },
    "gemma3, scaled rotation, softcaps": {
        "family": "gemma3_text", "head_dim": 8, "sliding_window_pattern": 3, "final_logit_softcapping": 1.5,
        "attn_logit_softcapping": 0.5, "num_key_value_heads": 1, "tie_word_embeddings": False, **SMALL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 8.0},
        },
    },
    "granite": {"family": "granite", **GRANITE},
    "granite biases, untied": {
        "family": "granite", **GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False,
    },
    "granite without factors, wide heads": {"family": "granite", "head_dim": 12, **SMALL},
    "olmo2": {"family": "olmo2", "num_key_value_heads": 4, **SMALL},
    "olmo2 grouped-query": {"family": "olmo2", "rope_theta": 500.0, **SMALL},
    "olmo2 biases, tied": {"family": "olmo2", "attention_bias": True, "tie_word_embeddings": True, **SMALL},
    "olmo2 wide heads": {"family": "olmo2", "head_dim": 12, "num_key_value_heads": 1, **SMALL},
    "opt": {"family": "opt", "ffn_dim": 56},
    "opt 350m": {"family": "opt", "ffn_dim": 56, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "opt no biases": {"family": "opt", "ffn_dim": 40, "enable_bias": False, "layer_norm_elementwise_affine": False},
    "opt no final norm": {"family": "opt", "ffn_dim": 40, "_remove_final_layer_norm": True},
    "opt untied": {"family": "opt", "ffn_dim": 56, "tie_word_embeddings": False},
    "phi": {"family": "phi", "num_key_value_heads": 4},
    "phi grouped-query, normed queries and keys": {"family": "phi", "qk_layernorm": True},
    "phi3": {"family": "phi3", **SMALL},
    "phi3 window, multi-head": {"family": "phi3", "sliding_window": 7, "num_key_value_heads": 4, **SMALL},
    "phi3 part of heads, tied": {"family": "phi3", "partial_rotary_factor": 0.75, "tie_word_embeddings": True, **SMALL},
    "phi3 odd part of wide heads": {"family": "phi3", "head_dim": 12, "partial_rotary_factor": 0.6, **SMALL},
    "phi3 longrope": {
        "family": "phi3", "rope_parameters": LONGROPE, "original_max_position_embeddings": 16, **SMALL,
    },
    "gpt_neox": {"family": "gpt_neox"},
    "gpt_neox one after the other": {"family": "gpt_neox", "use_parallel_residual": False, "hidden_act": "gelu_fast"},
    "gpt_neox no biases, tied": {"family": "gpt_neox", "attention_bias": False, "tie_word_embeddings": True},
    "gpt_neox odd part": {"family": "gpt_neox", "rotary_pct": 0.4, "rotary_emb_base": 500},
    "phi other rotation": {"family": "phi", "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 2, **SMALL},
    "smollm3 no rotation first": {
        "family": "smollm3", "no_rope_layers": [0, 1, 0, 1], "rope_theta": 50.0, "tie_word_embeddings": False, **SMALL,
    },
    "smollm3 windows, biases": {
        "family": "smollm3", "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6,
        "attention_bias": True, "mlp_bias": True, **SMALL,
    },
    "smollm3 windows by layer type": {
        "family": "smollm3", "no_rope_layer_interval": 3, "use_sliding_window": True, "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], **SMALL,
    },
    "smollm3 no rotation, one block": {
        "family": "smollm3", "no_rope_layer_interval": 1, "num_hidden_layers": 1, "head_dim": 12, **SMALL,
    },
}  # fmt: skip


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


def test_olmo2_rounds_rotated_queries_not_the_rotation(make_llama, monkeypatch):
    from neuroal_jax.models import gated
    from neuroal_jax.models.rope import rotate

    attention = load_model(str(make_llama(family="olmo2", dtype="bfloat16", **SMALL))).blocks[0].self_attn
    monkeypatch.setattr(gated, "causal_attention", lambda q, k, v, **options: q)
    x = jax.random.normal(jax.random.key(0), (1, 30, 32), jnp.bfloat16)
    queries = attention.q_norm(attention.q_proj(x)).reshape(1, 30, 4, 8)
    expected = rotate(queries.astype(jnp.float32), attention.config.rope).astype(jnp.bfloat16)
    np.testing.assert_array_equal(attention.mix(x), expected.reshape(1, 30, 32))


def test_block_inputs_are_what_its_linears_multiply(llama):
    model = load_model(str(llama))
    block = model.blocks[0]
    hidden, inputs = block(model.stem(np.arange(12)[None]))
    assert set(inputs) == {"attention_input", "attention_output", "mlp_input", "mlp_hidden"}
    residual = model.stem(np.arange(12)[None]) + block.self_attn.o_proj(inputs["attention_output"])
    np.testing.assert_allclose(block.post_attention_layernorm(residual), inputs["mlp_input"], atol=1e-6)
    np.testing.assert_allclose(residual + block.mlp.down_proj(inputs["mlp_hidden"]), hidden, atol=1e-6)


def test_attention_in_slices_equals_attention_at_once(monkeypatch):
    from neuroal_jax.models import attention

    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (5, 9, 4, 6))
    k, v = (jax.random.normal(key, (5, 9, 2, 6)) for key in keys[1:])
    at_once = attention.causal_attention(q, k, v, scale=6**-0.5)
    monkeypatch.setattr(attention, "score_bytes", lambda: 2 * 4 * 4 * 9 * 9)
    np.testing.assert_allclose(attention.causal_attention(q, k, v, scale=6**-0.5), at_once, atol=1e-6)
    np.testing.assert_allclose(at_once, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("slices", [False, True])
def test_attention_has_the_gradient_of_plain_attention_and_the_same_value_under_vmap(monkeypatch, slices):
    from neuroal_jax.models import attention

    if slices:
        monkeypatch.setitem(attention.SCORE_BYTES, "cpu", 1)
    q, k, v = (jax.random.normal(jax.random.key(i), (3, 10, heads, 6)) for i, heads in enumerate((4, 2, 2)))

    def ours(q, k, v):
        return attention.causal_attention(q, k, v, scale=6**-0.5)

    def gradients(attend):
        return jax.grad(lambda *qkv: jnp.sum(attend(*qkv) ** 2), (0, 1, 2))(q, k, v)

    expected = gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    for found, plain in zip(gradients(ours), expected, strict=True):
        np.testing.assert_allclose(found, plain, atol=1e-5)
    together = jax.vmap(ours, (0, None, 0))(jnp.stack([q, 2 * q]), k, jnp.stack([v, 3 * v]))
    np.testing.assert_allclose(together[1], ours(2 * q, k, 3 * v), atol=1e-5)


ONE_OF_EACH = {
    "gemma": {"head_dim": 8, **SMALL},
    "gemma2": {"head_dim": 8, "sliding_window": 9, **SMALL},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2, **SMALL},
    "gpt_neox": {},
    "granite": GRANITE,
    "llama": {},
    "mistral": {"sliding_window": 9},
    "olmo2": SMALL,
    "opt": {"ffn_dim": 56, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "phi": {"qk_layernorm": True},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 9, **SMALL},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2, **SMALL},
}
LLAMA_LIKE = set(ONE_OF_EACH) - {"gpt_neox", "llama", "opt", "phi", "phi3"}  # their blocks are made of Llama's parts


def test_each_registered_family_is_tested():
    assert set(ONE_OF_EACH) == set(FAMILIES)


KINDS = {
    "q, k": ("q_proj", "k_proj"),
    "v": ("v_proj",),
    "q, k; q, k; v": ("qkv_proj", "query_key_value"),
    "o": ("o_proj", "out_proj", "dense"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "dense_h_to_4h"),
    "gate; up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "dense_4h_to_h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_feeds_what_tells_the_kinds_of_linears(family):
    linears = import_module(FAMILIES[family]).FAMILY.linears
    mixed = {part.feeds for linear in linears if not linear.in_mlp for part in linear.parts if part.selects}

    def kind(linear, part):
        if linear.in_mlp:
            return "gate" if part.selects else "down" if part.feeds_next_block else "up"
        return "q, k" if part.selects else "v" if part.feeds in mixed else "o"

    for linear in linears:
        assert linear.name.rpartition(".")[2] in KINDS["; ".join(kind(linear, part) for part in linear.parts)]
    assert {part.feeds for linear in linears for part in linear.parts} <= {linear.reads for linear in linears}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_hugging_face_to_flax_and_back_is_bit_exact(make_llama, family, dtype):
    checkpoint = open_checkpoint(str(make_llama(family=family, dtype=dtype, **ONE_OF_EACH[family])))
    params = nnx.to_flat_state(nnx.state(load_model(str(checkpoint.path)), nnx.Param))
    params = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in params}
    names = expand(checkpoint.rules, checkpoint.num_blocks)
    assert set(names) == set(checkpoint.source.infos)
    owners = {rule.hf: rule.flax for rule in checkpoint.rules if rule.tied}  # a tied table may stand under the head
    for name, (rule, block) in names.items():
        path = rule.flax.format(block=block)
        back = params[path if path in params else owners[rule.hf]]
        back = np.ascontiguousarray(back.T if rule.transpose else back)
        assert back.dtype == checkpoint.read(name).dtype
        assert back.tobytes() == np.ascontiguousarray(checkpoint.read(name)).tobytes(), name


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in LLAMA_LIKE else ()) for name in ONE_OF_EACH]
)
def test_every_family_prunes_saves_and_verifies(make_llama, tokens, tmp_path, family):
    from convert.masks_to_torch import apply_masks, verify
    from eval.perplexity import torch_perplexity

    model = make_llama(family=family, **ONE_OF_EACH[family])
    masks, saved = tmp_path / "out" / "masks.safetensors", str(tmp_path / "model")
    result = prune(
        PruneConfig(
            model=str(model), calib=str(tokens), eval=str(tokens), out=str(tmp_path / "out"), save_model=saved, **RUN,
        )
    )  # fmt: skip
    sparsity = result.manifest["sparsity"]
    assert sparsity["zeros"] == round(0.6 * sparsity["prunable"]) == result.masks.zeros()
    assert result.manifest["traces"].get("compare", 1) == 1
    verify(saved, masks)
    windows = np.load(tokens)["evaluation"]
    assert torch_perplexity(saved, windows, "float32") == pytest.approx(
        result.manifest["token_ppl"]["pruned"], rel=1e-4
    )
    from transformers import AutoModelForCausalLM

    apply_masks(AutoModelForCausalLM.from_pretrained(model), masks)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if name in LLAMA_LIKE else ()) for name in ONE_OF_EACH]
)
def test_every_family_keeps_two_of_every_four(make_llama, tokens, tmp_path, family):
    model = make_llama(family=family, **ONE_OF_EACH[family])
    for pruner in ("wanda", "sparsegpt"):
        out = str(tmp_path / pruner)
        result = prune(
            PruneConfig(model=str(model), calib=str(tokens), eval="none", out=out, pruner=pruner, pattern="2:4")
        )
        for name, mask in load_masks(tmp_path / pruner / "masks.safetensors").items():
            assert (mask.reshape(-1, 4).sum(axis=1) == 2).all(), name
        assert result.manifest["sparsity"]["achieved"] == 0.5


# Every pruner, allocation and refinement, each with several of the others; all combinations for Llama.
COMBINATIONS = [
    ("sparsegpt", "neuroal", "none"),
    ("wanda", "owl", "dsnot"),
    ("multiflow", "alpha", "none"),
    ("magnitude", "neuroal", "dsnot"),
    ("sparsegpt", "owl", "none"),
    ("wanda", "shape", "none"),
    ("multiflow", "dlp", "dsnot+refit"),
]
EVERY = [
    combination
    for combination in product(PRUNERS, ALLOCATIONS, REFINEMENTS)
    if (combination[0], combination[2]) != ("sparsegpt", "dsnot")
]


@pytest.mark.parametrize(
    ("family", "combinations"),
    [
        pytest.param("llama", COMBINATIONS[:3], id="llama"),
        pytest.param("llama", EVERY, id="llama-every", marks=pytest.mark.slow),
        *(
            pytest.param(family, COMBINATIONS, id=family, marks=pytest.mark.slow)
            for family in ("opt", "phi", "phi3", "gpt_neox", "gemma3_text")  # those whose blocks differ most
        ),
    ],
)
def test_every_pruner_allocation_and_refinement_hits_the_exact_budget(
    make_llama, tokens, tmp_path, family, combinations
):
    model = make_llama(family=family, **ONE_OF_EACH[family])
    for pruner, allocation, refine in combinations:
        out = tmp_path / f"{pruner}-{allocation}-{refine}"
        result = prune(
            PruneConfig(
                model=str(model), pruner=pruner, allocation=allocation, refine=refine, out=str(out), calib=str(tokens),
                eval="none", **RUN,
            )
        )  # fmt: skip
        sparsity = result.manifest["sparsity"]
        assert sparsity["zeros"] == round(0.6 * sparsity["prunable"]) == result.masks.zeros(), out.name
        if (out / "model").exists():
            check_pruned(result.masks, open_checkpoint(str(out / "model")).source, "the saved model")


REFUSED = {
    "Gemma activations": ("gemma", {"hidden_activation": "silu"}, "hidden_activation 'silu' and hidden_act"),
    "Gemma2 layers": ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
    "Gemma3 rotations": (
        "gemma3_text",
        {"rope_parameters": {"rope_theta": 1e6}},
        "rope_parameters is .* a rotation for each layer type",
    ),
    "Gemma3 rotations twice": (
        "gemma3_text",
        {"rope_local_base_freq": 5.0},
        "rope_local_base_freq is 5.0, but rope_parameters has rope_theta 10000.0",
    ),
    "Gemma3 base of the local rotation": ("gemma3_text", {"rope_local_base_freq": 0}, "rope_local_base_freq is 0"),
    "Gemma3 in both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "Phi rotation": (
        "phi",
        {"partial_rotary_factor": 1.5, "rope_parameters": None},
        "dimensions of a head are rotated",
    ),
    "OPT heads": ("opt", {"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
    "OPT attribute": ("opt", {"is_causal": False}, "is_causal=False"),
    "Phi3 rotation": (
        "phi3",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        "'linear' is not supported, expected default",
    ),
    "Phi3 layers": ("phi3", {"layer_types": ["full_attention"] * 3}, "layer_types and sliding_window 9 disagree"),
    "Phi3 factors": ("phi3", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor has 1, .* list of 4"),
    "Phi3 attribute": ("phi3", {"is_causal": False}, "is_causal=False"),
    "GPT-NeoX heads": ("gpt_neox", {"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
    "GPT-NeoX wide heads": ("gpt_neox", {"head_dim": 16}, "num_attention_heads 4 times head_dim 16"),
    "GPT-NeoX rotation by the usual names": (
        "gpt_neox",
        {"rope_theta": 5.0, "rope_parameters": None},
        "rope_theta is 5.0, but GPT-NeoX reads rotary_emb_base",
    ),
    "GPT-NeoX rotation twice": ("gpt_neox", {"rotary_pct": 0.5}, "rotary_pct is 0.5, but .* 0.25"),
    "GPT-NeoX share": ("gpt_neox", {"rotary_pct": "all"}, "rotary_pct is 'all', expected a positive number"),
    "GPT-NeoX attribute": ("gpt_neox", {"is_causal": False}, "is_causal=False"),
    "Granite factor": ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0, expected a positive number"),
    "Granite windows": ("granite", {"layer_types": ["sliding_attention"] * 3}, "no sliding windows"),
    "OLMo 2 windows": ("olmo2", {"layer_types": ["sliding_attention"] * 3}, "no sliding windows"),
    "SmolLM3 rotations": ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is .1, 0., expected 3 numbers"),
    "SmolLM3 interval": (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 0},
        "no_rope_layer_interval is 0",
    ),
    "SmolLM3 windows": ("smollm3", {"layer_types": ["sliding_attention"] * 3}, "no sliding_window is set"),
    "Qwen MoE": ("qwen2", {"model_type": "qwen2_moe"}, "mixture of experts"),
    "Mixtral": ("mistral", {"model_type": "mixtral"}, "mixture of experts"),
}


@pytest.mark.parametrize(("family", "change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_family_does_not_implement_is_refused_by_name(make_llama, family, change, message):
    directory = make_llama(family=family, **ONE_OF_EACH[family])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(directory))


def test_reference_budget_keeps_mistrals_q_k_v_rows_uniform(make_llama):
    from neuroal_jax.allocation import uniform
    from neuroal_jax.allocation.problem import Problem
    from neuroal_jax.search import row_step

    checkpoint = open_checkpoint(str(make_llama(family="mistral")))
    shapes, family = checkpoint.linear_shapes(), checkpoint.family
    rng = np.random.default_rng(0)
    widths = {linear.reads: shapes[linear.name][1] for linear in family.linears}
    differences = [{name: rng.normal(size=width).astype(np.float32) for name, width in widths.items()}] * 3
    base = uniform.allocation(0.6, list(shapes), 3)

    def first_block(budget):
        problem = Problem(0.6, 3, shapes, family, checkpoint.config, {"budget": budget}, model=None)
        return row_step.candidate(base, 0.1, differences, problem).blocks[0]

    exact, reference = first_block("exact"), first_block("reference")
    assert np.ptp(exact["self_attn.k_proj"]) > 0
    assert np.ptp(reference["self_attn.k_proj"]) == 0
    assert np.ptp(reference["self_attn.o_proj"]) > 0
