"""Whole numbers of weights per row: exact totals, hand-made cases, the released code's rounding."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroal_jax import UserError
from neuroal_jax.allocation import uniform
from neuroal_jax.allocation.allocation import Allocation, mean_sparsity
from neuroal_jax.masks.budget import Budget
from neuroal_jax.masks.patterns import make_pattern
from neuroal_jax.numerics.rounding import largest_remainder
from neuroal_jax.numerics.selection import TIES_ALL, TIES_HIGH, TIES_LOW

SHAPES = {"a": (6, 5), "b": (3, 17)}
SPARSITIES = [0.1, 0.5, 0.6, 0.7, 0.8, 0.95]


def budget(allocation, sparsity, kind="exact", group=None):
    pattern = make_pattern("columns", group) if group else make_pattern("rows")
    return Budget(SHAPES, len(allocation.blocks), sparsity, kind, pattern)


def exact_counts(allocation, sparsity, group=None):
    return budget(allocation, sparsity, group=group).counts(allocation)


def reference_counts(allocation, group=None):
    return budget(allocation, 0.5, "reference", group).counts(allocation)


def zeros_of(counts):
    return sum(int(quota.pruned.sum()) for block in counts for quota in block.values())


def random_allocation(seed, blocks=4):
    rng = np.random.default_rng(seed)
    return Allocation(
        "random", tuple({"a": rng.uniform(0.01, 0.99, 6), "b": float(rng.uniform(0.01, 0.99))} for _ in range(blocks))
    )


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.001, 0.999])
@pytest.mark.parametrize("seed", range(3))
def test_exact_total(sparsity, seed):
    counts = exact_counts(random_allocation(seed), sparsity)
    assert zeros_of(counts) == round(sparsity * 4 * (30 + 51))
    for block in counts:
        for linear, rows in block.items():
            assert rows.pruned.shape == (SHAPES[linear][0],)
            assert rows.pruned.min() >= 0
            assert rows.pruned.max() <= SHAPES[linear][1]


def test_uniform_by_hand():
    # 0.7 * 81 = 56.7 a block, 113.4 in all: 113 zeros, 57 and 56; in the first block 21 and 35.7, so 21 and 36.
    counts = exact_counts(uniform.allocation(0.7, list(SHAPES), 2), 0.7)
    assert zeros_of(counts) == 113
    assert [sum(int(rows.pruned.sum()) for rows in block.values()) for block in counts] == [57, 56]
    assert counts[0]["a"].pruned.tolist() == [4, 4, 4, 3, 3, 3]
    assert counts[0]["b"].pruned.tolist() == [12, 12, 12]


def test_exact_counts_follow_the_fractions():
    allocation = random_allocation(0)
    mean = mean_sparsity(allocation, SHAPES)
    counts = exact_counts(allocation, mean)
    for block, sparsities in zip(counts, allocation.blocks, strict=True):
        # A row is rounded, and a linear's remainder spread over its rows: less than one weight for either.
        assert np.abs(block["a"].pruned - sparsities["a"] * 5).max() < 2
        assert np.abs(block["b"].pruned - sparsities["b"] * 17).max() < 2


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 3)), min_size=1, max_size=12),
    off=st.integers(-3, 3),
)
def test_largest_remainder_sums_to_the_total(parts, off):
    ideals = [ideal for ideal, _ in parts]
    capacities = [math.ceil(ideal) + room for ideal, room in parts]
    total = min(max(round(sum(ideals)) + off, 0), sum(capacities))
    result = largest_remainder(ideals, total, capacities)
    assert result.sum() == total
    assert all(0 <= n <= capacity for n, capacity in zip(result, capacities, strict=True))


def test_largest_remainder_by_hand():
    assert largest_remainder([1.5, 2.25, 0.25], 4, [9, 9, 9]).tolist() == [2, 2, 0]
    assert largest_remainder([0.5, 0.5, 0.5, 0.5], 2, [1] * 4).tolist() == [1, 1, 0, 0]


@st.composite
def sparse_models(draw):
    """Where the linears of some blocks are zero, packed: nowhere, in whole rows, everywhere, at random."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    zero = []
    for _ in range(draw(st.integers(1, 3))):
        shares = {name: draw(st.sampled_from([0, 0.1, 0.5, 0.95, 1])) for name in SHAPES}
        of_rows = {name: rng.random((SHAPES[name][0], 1)) * 2 * share for name, share in shares.items()}
        zero.append({name: rng.random(SHAPES[name]) < of_rows[name] for name in SHAPES})
    return zero


@settings(max_examples=200, deadline=None)
@given(zero=sparse_models(), more=st.floats(0, 1), group=st.sampled_from([None, 1, 4, 128]), seed=st.integers(0, 99))
def test_zeros_of_the_source_are_part_of_the_exact_total(zero, more, group, seed):
    packed = [{name: np.packbits(bits, axis=1) for name, bits in block.items()} for block in zero]
    prunable, zeros = len(zero) * 81, sum(int(bits.sum()) for block in zero for bits in block.values())
    total = min(prunable - 1, zeros + round(more * (prunable - zeros)))
    if not 0 < zeros <= total:
        return
    pattern = make_pattern("columns", group) if group else make_pattern("rows")
    exact = Budget(SHAPES, len(zero), total / prunable, "exact", pattern, packed)
    assert (exact.source_zeros, exact.total) == (zeros, total)
    counts = exact.counts(random_allocation(seed, len(zero)))
    assert zeros_of(counts) == total
    rng = np.random.default_rng(seed)
    for bits, quotas in zip(zero, counts, strict=True):
        for name, quota in quotas.items():
            scores = rng.integers(0, 2, SHAPES[name]).astype(np.float32)  # many others score 0 too
            pruned = np.asarray(pattern.select(scores, quota))
            assert pruned.sum() == quota.pruned.sum()
            assert not (bits[name] & ~pruned).any()


def test_rows_with_many_zeros_lose_these_and_the_others_make_up_for_it():
    zero = {"a": np.zeros((6, 5), bool), "b": np.zeros((3, 17), bool)}
    zero["a"][0], zero["b"][1, :15] = True, True
    packed = {name: np.packbits(bits, axis=1) for name, bits in zero.items()}
    counts = Budget(SHAPES, 1, 0.5, "exact", make_pattern("rows"), [packed]).counts(
        uniform.allocation(0.5, list(SHAPES), 1)
    )
    assert counts[0]["a"].pruned.tolist() == [5, 2, 2, 2, 2, 2]  # 15 of 30: rows of 2.5 with one of at least 5
    assert counts[0]["b"].pruned.tolist() == [5, 15, 5]  # 25 of 51
    np.testing.assert_array_equal(counts[0]["b"].zeros, packed["b"])


def test_fewer_zeros_than_there_are_is_refused_and_reference_counts_as_ever():
    packed = [{"a": np.packbits(np.ones((6, 5), bool), axis=1), "b": np.zeros((3, 3), np.uint8)}]
    with pytest.raises(UserError, match=r"--sparsity 0.3 leaves 24 zeros, but 30 of the model's 81 .*\(0.370370\)"):
        Budget(SHAPES, 1, 0.3, "exact", make_pattern("rows"), packed)
    reference = Budget(SHAPES, 1, 0.3, "reference", make_pattern("rows"), packed)
    (counts,) = reference.counts(uniform.allocation(0.3, list(SHAPES), 1))
    assert {name: quota.pruned.tolist() for name, quota in counts.items()} == {"a": [1] * 6, "b": [5] * 3}
    assert all(quota.zeros is None for quota in counts.values())


def test_fit_mean_leaves_a_fitting_allocation_alone():
    allocation = random_allocation(1)
    assert budget(allocation, mean_sparsity(allocation, SHAPES)).fit(allocation) is allocation


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_fit_mean_shifts_and_clips(sparsity):
    allocation = random_allocation(2)
    fitted = budget(allocation, sparsity).fit(allocation)
    assert mean_sparsity(fitted, SHAPES) == pytest.approx(sparsity, abs=1e-9)
    values = np.concatenate([np.atleast_1d(s) for block in fitted.blocks for s in block.values()])
    before = np.concatenate([np.atleast_1d(s) for block in allocation.blocks for s in block.values()])
    assert values.min() >= 0.01
    assert values.max() <= 0.99
    inside = (values > 0.01 + 1e-9) & (values < 0.99 - 1e-9)
    shifts = (values - before)[inside]
    assert np.ptp(shifts) < 1e-9  # everything that is not clipped moved by the same amount


def test_reference_rounds_each_row_down():
    counts = reference_counts(Allocation("x", ({"a": 0.7, "b": np.array([0.25, 0.5, 0.9])},)))
    assert counts[0]["a"].pruned.tolist() == [3] * 6  # int(5 * 0.7)
    assert counts[0]["a"].ties == TIES_LOW
    # kept: int(float32(0.75) * 17) = 12, int(8.5) = 8, int(float32(0.1) * 17) = 1
    assert counts[0]["b"].pruned.tolist() == [5, 9, 16]
    assert counts[0]["b"].ties == TIES_HIGH


def test_count_chooses_the_budget():
    allocation = uniform.allocation(0.7, list(SHAPES), 2)
    exact, reference = (budget(allocation, 0.7, kind) for kind in ("exact", "reference"))
    assert zeros_of(exact.counts(allocation)) == exact.total == 113
    assert zeros_of(reference.counts(allocation)) == 2 * (6 * 3 + 3 * 11)
    assert exact.prunable == 2 * (30 + 51)


@pytest.mark.parametrize("sparsity", [*SPARSITIES, 0.001, 0.999])
@pytest.mark.parametrize("group", [1, 4, 5, 128])
def test_exact_total_in_groups(sparsity, group):
    counts = exact_counts(random_allocation(0), sparsity, group)
    assert zeros_of(counts) == round(sparsity * 4 * (30 + 51))
    for block in counts:
        for linear, quota in block.items():
            out, width = SHAPES[linear]
            sizes = [out * min(group, width - start) for start in range(0, width, group)]
            assert (quota.pruned <= sizes).all()
            assert quota.pruned.min() >= 0
            # In proportion: no group is more than one weight from its share.
            assert np.abs(quota.pruned - np.array(sizes) * quota.pruned.sum() / (out * width)).max() < 1


def test_reference_groups_include_the_score_at_the_threshold():
    counts = reference_counts(Allocation("x", ({"a": 0.5, "b": 0.7},)), 4)
    assert counts[0]["a"].pruned.tolist() == [int(24 * 0.5) + 1, int(6 * 0.5) + 1]
    assert counts[0]["b"].pruned.tolist() == [int(12 * 0.7) + 1] * 4 + [int(3 * 0.7) + 1]
    assert counts[0]["a"].ties == TIES_ALL


def test_reference_groups_refuse_what_the_released_code_fails_on():
    with pytest.raises(UserError, match=r"sparsity of 1\.0420 .*--budget exact"):
        reference_counts(Allocation("alpha", ({"a": 1.042, "b": 0.5},)), 4)


def test_reference_rows_of_more_than_everything_lose_everything():
    counts = reference_counts(Allocation("alpha", ({"a": 1.042, "b": 0.5},)))
    assert counts[0]["a"].pruned.tolist() == [5] * 6


def test_fit_mean_brings_numbers_above_one_back():
    allocation = Allocation("alpha", ({"a": 1.3, "b": 0.5},))
    fitted = budget(allocation, 0.6).fit(allocation)
    assert mean_sparsity(fitted, SHAPES) == pytest.approx(0.6, abs=1e-9)
    assert fitted.blocks[0]["a"] <= 1


def test_a_reference_budget_fits_nothing():
    allocation = random_allocation(0)
    assert budget(allocation, 0.5, "reference").fit(allocation) is allocation
