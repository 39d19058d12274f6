"""NeuroAL's candidates by hand, and the whole search against an independent restatement on a torch model."""

import numpy as np
import pytest

from neuroal_jax.allocation import uniform
from neuroal_jax.allocation.allocation import mean_sparsity
from neuroal_jax.allocation.problem import Problem
from neuroal_jax.allocation.spread import spread
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.masks.budget import Budget
from neuroal_jax.models import llama as llama_family
from neuroal_jax.numerics import alignment
from neuroal_jax.run.progress import stage
from neuroal_jax.search import block_step, neuroal, row_step
from neuroal_jax.search.lambdas import block_lambdas, lambdas_for, row_lambdas
from neuroal_jax.search.walked import WalkedModel
from neuroal_jax.walk import final
from neuroal_jax.walk.blocks import Blocks
from neuroal_jax.walk.method import make_method
from neuroal_jax.walk.search import candidates_together

LINEARS = ["q", "k"]


def problem_of(checkpoint, windows, sparsity, **options):
    """The problem of a checkpoint under Wanda: windows for all, two candidates at a time."""
    method, shapes = make_method("wanda"), checkpoint.linear_shapes()
    budget = Budget(shapes, checkpoint.num_blocks, sparsity, "exact", method.pattern)
    blocks = Blocks(checkpoint, "float32", 4)
    model = WalkedModel(blocks, method, budget, "alignment", windows, windows, 2, stage)
    options = {"budget": "exact", **options}
    return Problem(sparsity, checkpoint.num_blocks, shapes, checkpoint.family, checkpoint.config, options, model)


def test_block_candidate_by_hand():
    allocation = block_step.candidate(0.6, 0.1, LINEARS, 5)
    assert [block["q"] for block in allocation.blocks] == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7])
    assert all(block["q"] == block["k"] for block in allocation.blocks)


def test_block_candidate_guard():
    assert [b["q"] for b in block_step.candidate(0.2, 0.25, LINEARS, 3).blocks] == pytest.approx([0.01, 0.2, 0.45])
    assert [b["q"] for b in block_step.candidate(0.8, 0.25, LINEARS, 3).blocks] == pytest.approx([0.55, 0.8, 0.99])


def test_one_block_keeps_the_sparsity():
    assert block_step.candidate(0.6, 0.25, LINEARS, 1).blocks == ({"q": 0.6, "k": 0.6},)


def test_lambda_sets():
    assert block_lambdas("paper", 0.8) == (
        0.01,
        0.02,
        0.03,
        0.05,
        0.06,
        0.07,
        0.08,
        0.09,
        0.1,
        0.12,
        0.15,
        0.2,
        0.25,
    )
    reference = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
    assert block_lambdas("reference", 0.7) == reference
    assert block_lambdas("reference", 0.8) == reference[:-1]
    assert row_lambdas("reference") == (0.0, *reference)
    assert lambdas_for("row", "paper", (0.3,), 0.7).steps == [1]
    assert lambdas_for("both", "paper", "paper", 0.7).steps == [13, 14]
    assert lambdas_for("block", "reference", "paper", 0.8).steps == [13]


def test_spread_by_hand():
    # Densities 0, 0.1, 0.2 around their mean 0.1, moved to the mean 0.4: 0.3, 0.4, 0.5.
    np.testing.assert_allclose(spread(0.6, 0.1, np.array([3.0, 4.0, 5.0])), [0.7, 0.6, 0.5])
    np.testing.assert_array_equal(spread(0.6, 0.1, np.array([2.0, 2.0])), [0.6, 0.6])


def test_key_and_value_rows_get_the_mean_of_the_query_heads_that_share_them():
    # Two k/v heads of two dimensions, each shared by two query heads.
    u = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0])
    np.testing.assert_array_equal(row_step.pool_heads(u, 2, 2), [2.0, 3.0, 20.0, 30.0])


def grouped_model():
    config = llama_family.parse_config(
        {
            "vocab_size": 8,
            "hidden_size": 4,
            "intermediate_size": 3,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 2,
        }
    )
    shapes = {
        "self_attn.q_proj": (8, 4),
        "self_attn.k_proj": (4, 4),
        "self_attn.v_proj": (4, 4),
        "self_attn.o_proj": (4, 8),
        "mlp.gate_proj": (3, 4),
        "mlp.up_proj": (3, 4),
        "mlp.down_proj": (4, 3),
    }
    differences = [
        {
            "attention_input": np.zeros(4, np.float32),
            "attention_output": np.float32([0, 0, 4, 4, 0, 0, 8, 8]),
            "mlp_input": np.float32([0, 1, 2, 3]),
            "mlp_hidden": np.float32([5, 5, 5]),
        }
    ] * 2

    def problem(budget):
        return Problem(0.5, 2, shapes, llama_family.FAMILY, config, {"budget": budget}, model=None)

    return problem, shapes, differences


def test_row_candidate_by_hand():
    problem, shapes, differences = grouped_model()
    base = uniform.allocation(0.5, list(shapes), 2)
    first, last = row_step.candidate(base, 0.1, differences, problem("exact")).blocks
    np.testing.assert_allclose(first["self_attn.o_proj"], [0.6, 0.5 + 1 / 30, 0.5 - 1 / 30, 0.4])
    # k: head 0 pools query heads 0 and 1 to 2, head 1 pools heads 2 and 3 to 4.
    np.testing.assert_allclose(first["self_attn.k_proj"], [0.6, 0.6, 0.4, 0.4])
    np.testing.assert_allclose(first["self_attn.v_proj"], [0.6, 0.6, 0.4, 0.4])
    np.testing.assert_allclose(first["self_attn.q_proj"], 0.575 - 0.025 * np.float64([0, 0, 4, 4, 0, 0, 8, 8]))
    assert first["mlp.gate_proj"] == 0.5  # all equal
    assert first["mlp.down_proj"] == 0.5  # the next block's first input never differs
    assert last == base.blocks[1]
    assert mean_sparsity(row_step.candidate(base, 0.1, differences, problem("exact")), shapes) == pytest.approx(0.5)


def test_reference_row_candidate_takes_the_first_rows_and_lists_all():
    problem, shapes, differences = grouped_model()
    first, last = row_step.candidate(
        uniform.allocation(0.5, list(shapes), 2), 0.1, differences, problem("reference")
    ).blocks
    np.testing.assert_array_equal(first["self_attn.k_proj"], first["self_attn.q_proj"][:4])
    np.testing.assert_array_equal(last["mlp.down_proj"], [0.5] * 4)


def test_row_sparsities_are_clipped():
    problem, shapes, differences = grouped_model()
    first, _ = row_step.candidate(uniform.allocation(0.9, list(shapes), 2), 0.4, differences, problem("exact")).blocks
    assert first["self_attn.o_proj"].max() == 0.99


def test_alignment_by_hand():
    dense, pruned = np.float32([1, 3]), np.float32([1, 1])
    assert float(alignment.score(dense, pruned)) == pytest.approx(np.hypot(0.25, 0.25) / 2)
    assert float(alignment.score(dense, dense)) == 0
    assert float(alignment.score(dense, np.zeros(2, np.float32))) == pytest.approx(np.hypot(0.25, 0.75) / 2)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"), [([13, 14], 99, 14), ([13, 14], 13, 7), ([13, 14], 6, 2), ([5], 3, 1), ([1], 8, 1)]
)
def test_candidates_together_wastes_little(sizes, limit, expected):
    assert candidates_together(sizes, limit) == expected


class TorchOracle:
    """NeuroAL as the paper states it, on transformers' own Llama: hooks, sorts, one sequence at a time."""

    ORDER = tuple(linear.name for linear in llama_family.FAMILY.linears)

    def __init__(self, directory, windows):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.windows = windows

    def linears(self, block):
        modules = dict(self.model.model.layers[block].named_modules())
        return {name: modules[name] for name in self.ORDER}

    def run_block(self, block, hidden):
        """Output of a block for every sequence, and the norms of its linears' inputs."""
        torch, sums = self.torch, {name: 0.0 for name in self.ORDER}

        def watch(name):
            def hook(_, inputs):
                sums[name] = sums[name] + inputs[0].double().square().sum((0, 1))

            return hook

        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in self.linears(block).items()]
        layer, rotary = self.model.model.layers[block], self.model.model.rotary_emb
        outputs = []
        with torch.no_grad():
            for h in hidden:
                positions = torch.arange(h.shape[1])[None]
                mask = torch.full((h.shape[1],) * 2, float("-inf")).triu(1)[None, None]
                out = layer(h, attention_mask=mask, position_embeddings=rotary(h, positions))
                outputs.append(out[0] if isinstance(out, tuple) else out)
        for hook in hooks:
            hook.remove()
        return outputs, {name: (value / len(hidden)).sqrt().numpy() for name, value in sums.items()}

    def mask_of(self, weight, norms, pruned):
        scores = np.abs(weight) * norms.astype(np.float32)
        mask = np.ones(weight.shape, bool)
        for row, count_ in enumerate(pruned):
            mask[row, np.argsort(scores[row], kind="stable")[:count_]] = False
        return mask

    def walk(self, counts, restore):
        """Scores of all linears summed, D - S of every linear, and masks."""
        torch = self.torch
        with torch.no_grad():
            hidden = [self.model.model.embed_tokens(torch.from_numpy(w)[None].long()) for w in self.windows]
        score, differences, masks, saved = 0.0, [], [], []
        for block in range(self.model.config.num_hidden_layers):
            _, dense = self.run_block(block, hidden)
            masks.append({})
            for name, module in self.linears(block).items():
                saved.append((module, module.weight.detach().clone()))
                mask = self.mask_of(module.weight.detach().numpy(), dense[name], counts[block][name].pruned)
                masks[-1][name] = mask
                module.weight.data[~torch.from_numpy(mask)] = 0
            hidden, pruned = self.run_block(block, hidden)
            for name in self.ORDER:
                d, s = dense[name], pruned[name]
                score += np.linalg.norm(d / d.sum() - s / s.sum()) / len(d)
            differences.append({name: dense[name] - pruned[name] for name in self.ORDER})
        if restore:
            for module, weight in saved:
                module.weight.data = weight
        return score, differences, masks


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="grouped-query"),
        pytest.param({"num_key_value_heads": 4}, id="multi-head", marks=pytest.mark.slow),
    ],
)
def test_search_equals_an_independent_restatement(make_llama, tokens, options):
    directory = make_llama(**options)
    checkpoint = open_checkpoint(str(directory))
    shapes, s = checkpoint.linear_shapes(), 0.6
    windows = np.load(tokens)["calibration"].astype(np.int32)
    lambdas = {"block_lambdas": (0.02, 0.1, 0.2), "row_lambdas": (0.0, 0.1, 0.25)}
    problem = problem_of(checkpoint, windows, s, step="both", **lambdas)
    found = neuroal.allocate(problem)
    budget, scores = problem.model.budget, {}
    for step, candidates in found.stages.items():
        assert tuple(candidate.parameters["lambda"] for candidate in candidates) == lambdas[f"{step}_lambdas"]
        scores[step] = [candidate.score for candidate in candidates]

    oracle = TorchOracle(directory, windows)
    candidates = [block_step.candidate(s, x, list(shapes), checkpoint.num_blocks) for x in lambdas["block_lambdas"]]
    walks = [oracle.walk(budget.counts(candidate), restore=True) for candidate in candidates]
    np.testing.assert_allclose(scores["block"], [score for score, _, _ in walks], rtol=1e-4)
    best = int(np.argmin(scores["block"]))
    assert found.chosen["block"]["lambda"] == lambdas["block_lambdas"][best]

    _, differences, _ = walks[best]
    rows = {
        "self_attn.o_proj": "mlp.gate_proj",
        "mlp.gate_proj": "mlp.down_proj",
        "self_attn.q_proj": "self_attn.o_proj",
    }
    for block in range(checkpoint.num_blocks - 1):
        for linear, target in rows.items():
            density = 1 - found.allocation.blocks[block][linear]
            u = differences[block][target]
            base = candidates[best].blocks[block][linear]
            expected = (u - u.min()) / np.ptp(u) * 2 * found.chosen["row"]["lambda"]
            expected = np.clip(expected - expected.mean() + 1 - base, 0.01, 0.99)
            np.testing.assert_allclose(density, expected, atol=2e-4)

    score, _, masks = oracle.walk(budget.counts(found.allocation), restore=False)
    assert min(scores["row"]) == pytest.approx(score, rel=1e-4)
    assert sum(sum(block.values()) for block in found.objective) == pytest.approx(score, rel=1e-4)
    pruned = final.prune(problem.model.blocks, problem.model.method, windows, budget.counts(found.allocation))
    for block, block_masks in enumerate(masks):
        for name, mask in block_masks.items():
            bits = np.unpackbits(pruned[block].packed[name], axis=1, count=mask.shape[1])
            assert (bits != mask).mean() < 0.003, (block, name)
