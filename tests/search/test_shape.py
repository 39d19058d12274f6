"""The search over shapes: directions and steps by hand, rows against NumPy, the guard, and its course as a whole."""

import math
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroal_jax.allocation import ALLOCATIONS
from neuroal_jax.allocation.allocation import Allocation, mean_sparsity
from neuroal_jax.allocation.problem import Problem, Scores
from neuroal_jax.errors import UserError
from neuroal_jax.masks.budget import Budget
from neuroal_jax.masks.patterns import make_pattern
from neuroal_jax.models import FAMILIES
from neuroal_jax.models import llama as llama_family
from neuroal_jax.search import shape
from neuroal_jax.search.course import Course, Trial, gain
from neuroal_jax.search.directions import depth_direction, directions, kind_directions, quadratic_step
from tests.search.test_neuroal import grouped_model

OPTIONS = {option.name: option.default for option in ALLOCATIONS["shape"].options}
# Wide attention and MLP, so that the kinds differ in size.
SHAPES = {
    "self_attn.q_proj": (8, 4),
    "self_attn.k_proj": (4, 4),
    "self_attn.v_proj": (4, 4),
    "self_attn.o_proj": (4, 8),
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
}
CONFIG = grouped_model()[0]("exact").config


def flat(sparsity, num_blocks=3):
    return Allocation("shape", tuple(dict.fromkeys(SHAPES, sparsity) for _ in range(num_blocks)))


def problem_with(model=None, num_blocks=3, sparsity=0.5, **options):
    return Problem(
        sparsity,
        num_blocks,
        SHAPES,
        llama_family.FAMILY,
        CONFIG,
        {"budget": "exact", **OPTIONS, **options},
        model,
    )


def test_depth_directions_by_hand():
    c, s = math.cos(math.pi / 8), math.cos(3 * math.pi / 8)
    np.testing.assert_allclose(depth_direction(1, 4), [-1, -s / c, s / c, 1])
    np.testing.assert_allclose(depth_direction(2, 4), [-1, 1, 1, -1])
    np.testing.assert_allclose(depth_direction(3, 4), [-s / c, 1, -1, s / c])
    np.testing.assert_allclose(depth_direction(2, 3), [-0.5, 1, -0.5])


@pytest.mark.parametrize(("wave", "num_blocks"), [(4, 4), (5, 4), (1, 1), (2, 2)])
def test_waves_that_blocks_cannot_show_are_none(wave, num_blocks):
    assert not depth_direction(wave, num_blocks).any()


# What of each family's linears is moved which way, by the last part of their names.
SEVEN = ({"q_proj": 1, "k_proj": 1, "v_proj": -1, "o_proj": -1}, {"gate_proj": 1, "down_proj": -1})
KINDS = {
    "opt": ({"q_proj": 1, "k_proj": 1, "v_proj": -1, "out_proj": -1}, None),
    "phi": ({"q_proj": 1, "k_proj": 1, "v_proj": -1, "dense": -1}, None),
    "phi3": (None, None),
    "gpt_neox": (None, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_of_every_family(family):
    linears = import_module(FAMILIES[family]).FAMILY.linears
    shapes = {linear.name: (2, 4) if linear.in_mlp else (2, 3) for linear in linears}
    found = kind_directions(linears, shapes)
    for name, expected in zip(("queries and keys", "gate"), KINDS.get(family, SEVEN), strict=True):
        if expected is None:
            assert name not in found
        else:
            values = [expected.get(linear.name.rpartition(".")[2], 0) for linear in linears]
            np.testing.assert_array_equal(found[name], values)
    mlp = sum(linear.in_mlp for linear in linears)
    share = (len(linears) - mlp) * 6 / (mlp * 8)
    np.testing.assert_allclose(found["MLP"], [share if linear.in_mlp else -1 for linear in linears])


def test_directions_are_of_depth_and_then_of_kinds():
    found = directions(4, 3, llama_family.FAMILY.linears, SHAPES)
    assert list(found) == ["depth 1", "depth 2", "queries and keys", "gate", "MLP"]  # three blocks show two waves
    assert all(values.shape == (3, 7) for values in found.values())
    assert np.ptp(found["depth 1"], axis=1).max() == 0
    assert np.ptp(found["gate"], axis=0).max() == 0
    weights = [math.prod(size) for size in SHAPES.values()]
    assert found["MLP"][0] @ weights == pytest.approx(0)  # as many weights as attention gets back


def parabola(x, lowest, curvature):
    return math.exp(0.5 * curvature * (x - lowest) ** 2 - 1)


@pytest.mark.parametrize(
    ("lowest", "curvature", "expected"),
    [
        (0.03, 8, 0.03),
        (-0.07, 0.5, -0.07),
        (0.034, 8, 0.03),  # whole tenths of the limit
        (0.3, 8, 0.1),
        (-0.3, 8, -0.1),
        (0.03, -8, -0.1),  # of a parabola that opens downwards, downhill
        (-0.03, -8, 0.1),
        (0.0, 8, 0.0),
    ],
)
def test_quadratic_step_by_hand(lowest, curvature, expected):
    scores = [parabola(x, lowest, curvature) for x in (-0.05, 0.0, 0.05)]
    assert quadratic_step(*scores, 0.05, 0.1) == pytest.approx(expected, abs=1e-12)


def test_steps_of_equal_or_zero_scores():
    assert quadratic_step(2.0, 2.0, 2.0, 0.05, 0.1) == 0
    assert quadratic_step(1.0, 2.0, 3.0, 0.05, 0.0) == 0
    assert abs(quadratic_step(0.0, 1.0, 2.0, 0.05, 0.1)) == 0.1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sparsity=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_whatever_is_moved_keeps_bounds_and_budget(data, sparsity, seed):
    problem = problem_with(sparsity=sparsity)
    change = np.random.default_rng(seed).normal(0, data.draw(st.sampled_from([0.01, 0.1, 1.0])), (3, 7))
    moved = shape.moved(flat(sparsity), change, problem)
    values = np.array([list(block.values()) for block in moved.blocks])
    assert values.min() >= 0.01 - 1e-12
    assert values.max() <= 0.99 + 1e-12
    assert mean_sparsity(moved, SHAPES) == pytest.approx(sparsity, abs=1e-9)
    norms = [{name: np.float32(np.random.default_rng(seed).random(8) + 0.1)[:width] for name, width in WIDTHS.items()}]
    rows = shape.rows(moved, 0.2, norms * 3, problem)
    assert mean_sparsity(rows, SHAPES) == pytest.approx(sparsity, abs=1e-9)
    budget = Budget(SHAPES, 3, sparsity, "exact", make_pattern("rows"))
    counted = sum(int(quota.pruned.sum()) for block in budget.counts(rows) for quota in block.values())
    assert counted == round(sparsity * budget.prunable)


WIDTHS = {"attention_input": 4, "attention_output": 8, "mlp_input": 4, "mlp_hidden": 6}


def test_rows_follow_the_logarithm_of_what_they_become():
    rng = np.random.default_rng(0)
    norms = [{name: rng.lognormal(size=width).astype(np.float32) for name, width in WIDTHS.items()} for _ in range(3)]
    norms[1]["mlp_hidden"][2] = 0  # a dead one counts as the smallest that is not
    found = shape.rows(flat(0.5), 0.1, norms, problem_with())

    def oracle(u):
        density = (u - u.min()) / (u.max() - u.min()) * 0.2
        return 1 - (density - density.mean() + 0.5)

    for block, of_block in zip(found.blocks, norms, strict=True):  # the last one, too
        logs = {name: np.log(np.where(x > 0, x, x[x > 0].min()).astype(float)) for name, x in of_block.items()}
        heads = logs["attention_output"].reshape(2, 2, 2)  # k/v head, query heads that share it, dimension
        np.testing.assert_allclose(block["self_attn.q_proj"], oracle(logs["attention_output"]), atol=1e-9)
        np.testing.assert_allclose(block["self_attn.v_proj"], oracle(heads.mean(axis=1).ravel()), atol=1e-9)
        np.testing.assert_allclose(block["self_attn.o_proj"], oracle(logs["mlp_input"]), atol=1e-9)
        np.testing.assert_allclose(block["mlp.up_proj"], oracle(logs["mlp_hidden"]), atol=1e-9)
        assert block["mlp.down_proj"] == pytest.approx(0.5)


def trial(*of_sequences):
    values = np.float64(of_sequences)
    return Trial(flat(0.5), {}, float(values.mean()), values)


def test_gains_are_paired():
    # Gains 0.1, 0.3, 0.2: mean 0.2, standard error 0.1 / sqrt(3); the sequences themselves differ by far more.
    found = gain(trial(1.0, 5.0, 9.0), trial(0.9, 4.7, 8.8), guard=1)
    assert (found.mean, found.error, found.kept) == (pytest.approx(0.2), pytest.approx(0.1 / math.sqrt(3)), True)
    assert not gain(trial(1.0, 5.0, 9.0), trial(0.9, 4.7, 8.8), guard=4).kept
    assert not gain(trial(1.0, 2.0), trial(1.2, 2.2), guard=0).kept
    assert gain(trial(1.0, 1.0), trial(1.9, 0.0), guard=0).kept
    assert not gain(trial(1.0, 1.0), trial(1.9, 0.0), guard=1).kept
    only = gain(trial(1.0), trial(0.9), guard=1)
    assert (only.error, only.kept) == (None, True)


class Known:
    """A model whose objective is known: its logarithm is quadratic around the best sparsities, noisy by sequence."""

    def __init__(self, best, noise=0.0, by_linear=False):
        self.best, self.noise, self.by_linear, self.stages = best, noise, by_linear, {}
        self.rng = np.random.default_rng(0)

    def measure(self, label, needs, of_block, settings=None):
        del needs, of_block, settings
        return {"profiles": [{"outliers": b, "medians": b} for b in range(3)], "spectra": [2.0, 3.0, 4.0]}[label]

    def score(self, stage, candidates):
        self.stages[stage] = candidates
        values = np.array([[[float(np.mean(s)) for s in block.values()] for block in a.blocks] for a in candidates])
        totals = np.exp(3 * np.square(values - self.best).sum(axis=(1, 2)))
        rows = np.array([any(np.ndim(s) for block in a.blocks for s in block.values()) for a in candidates])
        totals = np.where(rows, 0.99 * totals, totals)
        if self.by_linear:
            return Scores(of_linears=np.broadcast_to(totals[:, None, None] / 21, (len(totals), 3, 7)))
        noise = self.noise * self.rng.standard_normal((len(totals), 8))
        return Scores(of_sequences=totals[:, None] + noise - noise.mean(axis=1, keepdims=True))

    def dense_norms(self, candidate):
        del candidate
        rng = np.random.default_rng(1)
        return [{name: rng.lognormal(size=width).astype(np.float32) for name, width in WIDTHS.items()}] * 3


def best_of(**distances):
    around = directions(4, 3, llama_family.FAMILY.linears, SHAPES)
    return 0.5 + sum(distance * around[name.replace("_", " ")] for name, distance in distances.items())


@pytest.mark.parametrize("by_linear", [False, True])
def test_the_search_finds_the_lowest_point_of_a_known_objective(by_linear):
    model = Known(best_of(depth_1=0.06, queries_and_keys=0.04, gate=-0.03), by_linear=by_linear)
    decision = shape.allocate(problem_with(model, shape_ramps=(0.01, 0.02)))
    assert {stage: len(found) for stage, found in decision.stages.items()} == {
        "profiles": 6,
        "directions": 10,
        "line": 5,
        "rows": 3,
    }
    assert list(model.stages) == list(decision.stages)  # each is one call
    lowest = [min(candidate.score for candidate in found) for found in decision.stages.values()]
    assert lowest == sorted(lowest, reverse=True)
    assert lowest[-1] < 0.99 * (1 + 0.1 * (lowest[0] - 1))
    assert decision.chosen.keys() == decision.stages.keys()
    assert decision.chosen["rows"] == {"lambda": 0.06}
    assert any(decision.allocation is tried for tried in model.stages["line"])
    assert any(np.ndim(s) for s in decision.allocation.blocks[0].values())  # its rows stay spread
    assert all(found.kept for found in decision.gains.values())
    assert (decision.objective is None) != by_linear
    mean = mean_sparsity(decision.allocation, SHAPES)
    assert mean == pytest.approx(0.5)


def test_a_refused_winner_leaves_the_best_before_and_a_stage_can_beat_it_later():
    model = Known(best_of(queries_and_keys=0.08, depth_1=0.03), noise=0.004)
    open_, shut = (shape.allocate(problem_with(model, shape_guard=guard)) for guard in (0.0, 1e6))
    assert all(found.kept for found in open_.gains.values())
    assert not any(found.kept for found in shut.gains.values())
    assert shut.chosen == {}
    assert set(shut.gains) == {"profiles", "directions", "line", "rows"}
    assert shut.allocation == shape.fitted(flat(0.5), problem_with())  # the first that was tried


def test_the_line_starts_from_the_base_whatever_a_direction_gave():
    model = Known(best_of(depth_1=0.2))
    decision = shape.allocate(problem_with(model, shape_ramps=(), shape_etas=(0.5,), shape_row_lambdas=()))
    assert list(decision.stages) == ["profiles", "directions", "line"]
    base = next(
        allocation
        for candidate, allocation in zip(decision.stages["profiles"], model.stages["profiles"], strict=True)
        if candidate.parameters == decision.chosen["profiles"]
    )
    (only,) = decision.stages["line"]
    steps = {name: value for name, value in only.parameters.items() if name != "eta"}
    around = directions(4, 3, llama_family.FAMILY.linears, SHAPES)
    change = sum(value * around[name] for name, value in steps.items())
    assert model.stages["line"] == [shape.moved(base, change, problem_with())]


def test_without_directions_or_rows_fewer_stages():
    model = Known(0.5 * np.ones((3, 7)))
    options = {"shape_etas": (), "shape_row_lambdas": ()}
    assert list(shape.allocate(problem_with(model, **options)).stages) == ["profiles", "directions"]
    assert shape.stage_sizes({**OPTIONS, **options}, 0.5) == [6, 14]
    assert shape.stage_sizes(OPTIONS, 0.5) == [6, 3, 14, 5]
    assert (shape.lone_walks(OPTIONS), shape.lone_walks({**OPTIONS, **options})) == (1, 0)


def test_rows_are_left_out_where_there_are_none_to_tell_apart():
    assert shape.settle(OPTIONS, "rows are alike") == {"shape_row_lambdas": ()}
    assert shape.settle({**OPTIONS, "shape_row_lambdas": ()}, "rows are alike") == {}


def test_scores_that_are_not_finite_end_the_search():
    model = SimpleNamespace(score=lambda stage, candidates: Scores(of_sequences=np.full((len(candidates), 2), np.nan)))
    with pytest.raises(UserError, match=r"scores of the stage 'profiles' are not finite.*--dtype float32"):
        Course(model, 1.0).run("profiles", [({}, flat(0.5))])
