"""Linears that are several in one tensor: pruned as the same weights are where each has a tensor of its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neuroal_jax.allocation import uniform
from neuroal_jax.allocation.problem import Problem
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.models import llama, phi3
from neuroal_jax.models.family import QKV, LinearSpec
from neuroal_jax.search import row_step
from neuroal_jax.walk import final
from tests.models.test_families import SMALL
from tests.search.test_neuroal import problem_of

HEADS, SIZE = 4, 8


def of_phi3(name, array):
    """The tensors of a Llama that one of Phi-3 with two k/v heads is made of; also of masks, and of rows."""
    if "qkv_proj" in name:
        rows = np.split(array, (HEADS * SIZE, (HEADS + 2) * SIZE))
        return {name.replace("qkv_proj", f"{part}_proj"): x for part, x in zip("qkv", rows, strict=True)}
    if "gate_up_proj" in name:
        return {name.replace("gate_up", part): x for part, x in zip(("gate", "up"), np.split(array, 2), strict=True)}
    return {name: array}


PHI = {
    "gpt_neox.": "model.",
    "attention.": "self_attn.",
    "dense_h_to_4h": "fc1",
    "dense_4h_to_h": "fc2",
    "embed_in": "embed_tokens",
    "embed_out": "lm_head",
    "final_layer_norm": "final_layernorm",
}


def of_gpt_neox(name, array):
    """The tensors of a Phi that one of GPT-NeoX is made of: Phi has one norm where the other has two."""
    if "post_attention_layernorm" in name:
        return {}
    for ours, theirs in PHI.items():
        name = name.replace(ours, theirs)
    if "query_key_value" in name:
        heads = array.reshape(HEADS, 3, SIZE, *array.shape[1:])
        return {
            name.replace("query_key_value", f"{part}_proj"): heads[:, i].reshape(-1, *array.shape[1:])
            for i, part in enumerate("qkv")
        }
    return {name: array}


@pytest.fixture(params=["phi3", "gpt_neox"])
def pair(request, make_llama, tmp_path):
    """A model with fused linears, the same without any, and what takes a tensor of the first apart."""
    fused = make_llama(family=request.param, **SMALL)
    tensors = load_file(fused / "model.safetensors")
    if request.param == "phi3":
        split, other = of_phi3, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    else:
        split, other = of_gpt_neox, {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
        for name in [name for name in tensors if "post_attention_layernorm" in name]:
            tensors[name] = tensors[name.replace("post_attention", "input")]
        save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    apart = {key: x for name, array in tensors.items() for key, x in split(name, array).items()}
    if request.param == "gpt_neox":
        apart["lm_head.bias"] = np.zeros(96, np.float32)
    save_file({name: np.ascontiguousarray(x) for name, x in apart.items()}, tmp_path / "model.safetensors")
    config = json.loads((fused / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | other))
    return open_checkpoint(str(fused)), open_checkpoint(str(tmp_path)), split


def pruned_masks(problem, windows, allocation):
    """Whether each weight of each block's linears is kept."""
    model, budget = problem.model, problem.model.budget
    blocks = final.prune(model.blocks, model.method, windows, budget.counts(allocation))
    return [
        {name: np.unpackbits(packed, axis=1, count=problem.shapes[name][1]) for name, packed in block.packed.items()}
        for block in blocks
    ]


def test_the_same_weights_get_the_same_rows_and_masks_fused_or_not(pair, tokens):
    fused, apart, split = pair
    windows = np.load(tokens)["calibration"].astype(np.int32)
    ours, theirs = (problem_of(checkpoint, windows, 0.5) for checkpoint in (fused, apart))
    bases = [uniform.allocation(0.5, problem.linears, 3) for problem in (ours, theirs)]
    # Half of every row: whole numbers, in whatever tensors the rows are.
    for block, other in zip(*map(pruned_masks, (ours, theirs), [windows] * 2, bases), strict=True):
        for name, mask in block.items():
            for key, rows in split(name, mask).items():
                np.testing.assert_array_equal(rows, other[key], err_msg=key)
    _, differences = ours.model.align(bases[0])
    for found, expected in zip(differences, theirs.model.align(bases[1])[1], strict=True):
        for name in found.keys() & expected.keys():
            np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
    # Given the same D - S, all rows are the same bit for bit: those of grouped k/v heads too.
    given = [d | {"block_input": d["attention_input"]} for d in differences]
    for budget in ("exact", "reference"):
        found, expected = (
            row_step.candidate(base, 0.1, given, replace(problem, options={"budget": budget}))
            for problem, base in zip((ours, theirs), bases, strict=True)
        )
        assert np.ptp(next(rows for name, rows in found.blocks[0].items() if "q" in name)) > 0
        for block, other in zip(found.blocks, expected.blocks, strict=True):
            for name, rows in block.items():
                out = ours.shapes[name][0]
                for key, part in split(name, np.broadcast_to(rows, out)).items():
                    np.testing.assert_array_equal(part, np.broadcast_to(other[key], len(part)), err_msg=key)
    # In whole numbers, a row may get one more or less: a linear's remainder goes to other rows than its parts' would.
    found, expected = (
        row_step.candidate(base, 0.1, given, problem) for problem, base in zip((ours, theirs), bases, strict=True)
    )
    masks = [pruned_masks(ours, windows, found), pruned_masks(theirs, windows, expected)]
    for block, other in zip(*masks, strict=True):
        for name, mask in block.items():
            for key, rows in split(name, mask).items():
                assert np.abs(rows.sum(axis=1) - other[key].sum(axis=1, dtype=int)).max() <= 1
                assert (rows != other[key]).mean() < 0.02


def test_rows_of_interleaved_parts_by_hand():
    """Two k/v heads of one dimension, each with two query heads: q q k v, q q k v."""
    linear = LinearSpec("qkv", reads="attention_input", fused=QKV, interleaved=True)
    family = replace(phi3.FAMILY, linears=(linear,))
    config = llama.parse_config(
        {
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 3,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    config = replace(config, head_dim=1)
    differences = [{"attention_input": np.zeros(8), "attention_output": np.float32([0, 2, 4, 2])}] * 2
    base = uniform.allocation(0.5, ["qkv"], 2)

    def rows(budget):
        problem = Problem(0.5, 2, {"qkv": (8, 8)}, family, config, {"budget": budget}, model=None)
        return row_step.candidate(base, 0.1, differences, problem).blocks[0]["qkv"]

    # k and v: the means 1 and 3, spread around the linear's sparsity as the queries' 0, 2, 4, 2 are.
    np.testing.assert_allclose(rows("exact"), [0.6, 0.5, 0.6, 0.6, 0.4, 0.5, 0.4, 0.4])
    np.testing.assert_allclose(rows("reference"), [0.6, 0.5, 0.6, 0.6, 0.4, 0.5, 0.5, 0.5])  # the first two of q's
