"""DSnoT against independent NumPy restatements, one row at a time, of the exact and of the released rules."""

import numpy as np
import pytest

from neuroal_jax.masks.patterns import make_pattern
from neuroal_jax.models.llama import FAMILY
from neuroal_jax.numerics.statistics import measure
from neuroal_jax.refine import REFINEMENTS
from neuroal_jax.refine.dsnot import refine

LINEARS = {linear.name: linear for linear in FAMILY.linears}


def measures(weight, inputs):
    """Expected contributions m, gains m / v, and Wanda scores, in float64."""
    x = inputs.astype(np.float64)
    m = weight * x.sum(axis=1).mean(axis=0)
    return m, m / x.var(axis=1).mean(axis=0), np.abs(weight) * np.sqrt((x**2).sum(axis=(0, 1)) / len(x))


def exact_row(mask, m, gain, score, cycles, threshold):
    mask, error = mask.copy(), m[~mask].sum()
    growable, prunable = set(np.flatnonzero(~mask)), set(np.flatnonzero(mask))
    for _ in range(cycles):
        if abs(error) <= threshold:
            break
        sign = 1 if error > 0 else -1
        candidates = [j for j in prunable if sign * m[j] < 0]
        if not growable or not candidates:
            break
        grown = max(growable, key=lambda j: sign * gain[j])
        pruned = min(candidates, key=lambda j: score[j])
        growable.remove(grown)
        prunable.remove(pruned)
        mask[grown], mask[pruned] = True, False
        error += m[pruned] - m[grown]
    return mask


def group_row(mask, m, gain, score, size, cycles, threshold):
    """The same, where a weight changes places with one of its own group, or else the next one comes back."""
    mask, error, swaps = mask.copy(), m[~mask].sum(), 0
    growable, prunable = set(np.flatnonzero(~mask)), set(np.flatnonzero(mask))
    while growable and swaps < cycles and abs(error) > threshold:
        sign = 1 if error > 0 else -1
        grown = max(growable, key=lambda j: sign * gain[j])
        growable.remove(grown)
        candidates = [j for j in prunable if j // size == grown // size and sign * m[j] < 0]
        if candidates:
            pruned = min(candidates, key=lambda j: score[j])
            prunable.remove(pruned)
            mask[grown], mask[pruned] = True, False
            error += m[pruned] - m[grown]
            swaps += 1
    return mask


def released_linear(mask, m, gain, score, cycles, threshold):
    """Two lists per row, walked from both ends, whatever crosses; rows that are done write the opposite."""
    mask = mask.copy()
    grow = [sorted(range(len(row)), key=lambda j, r=i: 0 if mask[r, j] else gain[r, j]) for i, row in enumerate(mask)]
    prune = []
    for i, row in enumerate(mask):
        kept = np.flatnonzero(row)
        negative = sorted((j for j in kept if m[i, j] < 0), key=lambda j, r=i: score[r, j])
        positive = sorted((j for j in kept if m[i, j] > 0), key=lambda j, r=i: -score[r, j])
        prune.append(negative + positive)
    error = np.where(mask, 0, m).sum(axis=1)
    active = np.ones(len(mask), bool)
    over, under = np.zeros(len(mask), int), np.zeros(len(mask), int)
    for _ in range(cycles):
        active &= np.abs(error) > threshold
        for i in range(len(mask)):
            if error[i] > 0:
                grown, pruned = grow[i][len(grow[i]) - 1 - over[i]], prune[i][over[i]]
                over[i] += 1
            else:
                grown, pruned = grow[i][under[i]], prune[i][len(prune[i]) - 1 - under[i]]
                under[i] += 1
            mask[i, pruned] = not active[i]
            mask[i, grown] = active[i]
            if active[i]:
                error[i] += m[i, pruned] - m[i, grown]
        if not active.any():
            break
    return mask


def problem(out, width, seed=0, sparsity=0.5):
    rng = np.random.default_rng(seed)
    inputs = (rng.normal(size=(3, 11, width)) + rng.normal(size=width)).astype(np.float32)
    weight = rng.normal(size=(out, width)).astype(np.float32)
    _, _, score = measures(weight, inputs)
    rank = np.argsort(np.argsort(score, axis=1, kind="stable"), axis=1)
    return weight, inputs, rank >= int(width * sparsity)


def refined(mask, weight, inputs, linear="self_attn.q_proj", reference=False, size=None, **options):
    statistics = measure(inputs, REFINEMENTS["dsnot"].needs)
    own = {f"dsnot_{name}": value for name, value in options.items()}
    settings = REFINEMENTS.settings("dsnot", own, reference=reference)
    pattern = make_pattern("rows") if size is None else make_pattern("n_of_m", size)
    return np.asarray(refine(mask, weight, statistics, LINEARS[linear], pattern, settings))


@pytest.mark.parametrize("cycles", [1, 4, 50])
@pytest.mark.parametrize("width", [40, 9, 2])
@pytest.mark.parametrize("seed", range(3))
def test_exact_equals_numpy(cycles, width, seed):
    weight, inputs, mask = problem(16, width, seed)
    found = refined(mask, weight, inputs, cycles=cycles)
    m, gain, score = measures(weight, inputs)
    expected = [exact_row(*row, cycles, 0.1) for row in zip(mask, m, gain, score, strict=True)]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found.sum(axis=1), mask.sum(axis=1))
    assert width == 2 or (found != mask).any()


@pytest.mark.parametrize("cycles", [1, 4, 50])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_within_groups_equals_numpy(cycles, size, seed):
    weight, inputs, _ = problem(16, 40, seed)
    m, gain, score = measures(weight, inputs)
    rank = np.argsort(np.argsort(score.reshape(16, -1, size), axis=2), axis=2)
    mask = (rank >= size // 2).reshape(16, 40)
    found = refined(mask, weight, inputs, cycles=cycles, size=size)
    expected = [group_row(*row, size, cycles, 0.1) for row in zip(mask, m, gain, score, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert (found.reshape(16, -1, size).sum(axis=2) == size - size // 2).all()
    assert (found != mask).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.1, 5.0])
def test_reference_equals_numpy(seed, threshold):
    weight, inputs, mask = problem(12, 60, seed)
    found = refined(mask, weight, inputs, cycles=12, threshold=threshold, reference=True)
    np.testing.assert_array_equal(found, released_linear(mask, *measures(weight, inputs), 12, threshold))


def test_reference_stops_at_the_width_of_a_narrow_layer():
    weight, inputs, mask = problem(12, 8)
    few = refined(mask, weight, inputs, cycles=8, reference=True)
    np.testing.assert_array_equal(few, refined(mask, weight, inputs, cycles=50, reference=True))


def test_one_swap_by_hand():
    # All sums of x are 4, so m = 4 w; weights 0 and 3 are pruned: error 4 * (2 + 1) = 12 > 0. Variances are 1, 1, 4, 1:
    # weight 0 has the larger gain and comes back; of the kept ones, with m < 0, weight 2 has the smaller score.
    x = np.array([[0, 2, 0, 2], [0, 2, 0, 2], [-1, 3, -1, 3], [0, 2, 0, 2]], np.float32).T[None]
    weight = np.float32([[2, -3, -1, 1]])
    mask = np.array([[False, True, True, False]])
    assert refined(mask, weight, x, cycles=1).tolist() == [[True, True, False, False]]
    # The error is now 12 - 4 - 8 = 0: nothing more happens.
    assert refined(mask, weight, x, cycles=50).tolist() == [[True, True, False, False]]


def test_what_is_zero_anyway_is_not_grown_back():
    # As above, but what would come back, with a gain of 0, is zero in the checkpoint; the other gain is negative.
    x = np.full((1, 2, 4), 2, np.float32) + np.float32([[-1], [1]])
    mask = np.array([[False, True, True, False]])
    weight = np.float32([[0, -3, 1, -2]])
    assert refined(mask, weight, x, cycles=1).tolist() == [[False, True, False, True]]
    weight[0, 0] = 1e-3  # its gain is above the other's, and the error is negative: still the other one
    assert refined(mask, weight, x, cycles=1).tolist() == [[False, True, False, True]]
    weight[0] = [0, 3, -1, 0]
    weight[0, 3] = 0
    assert refined(mask, weight, x, threshold=0.0).tolist() == mask.tolist()
    weight[0] = [0, -3, -1, 2]  # after weight 3 only the zero is left, with the error still positive
    assert refined(mask, weight, x, cycles=50).tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("linear", LINEARS)
def test_the_masks_of_the_mlp_stay(linear):
    weight, inputs, mask = problem(16, 40)
    assert (refined(mask, weight, inputs, linear) == mask).all() == linear.startswith("mlp.")


def test_rows_within_the_threshold_are_left_alone():
    weight, inputs, mask = problem(10, 30)
    np.testing.assert_array_equal(refined(mask, weight, inputs, threshold=1e9), mask)


def test_constant_scores_and_dead_inputs():
    weight, inputs = np.ones((3, 6), np.float32), np.ones((2, 5, 6), np.float32)
    inputs[:, :, 4] = 0
    mask = np.tile(np.arange(6) >= 3, (3, 1))
    found = refined(mask, weight, inputs)  # no variance anywhere, no kept weight with m < 0
    np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize(("out", "width"), [(1, 12), (7, 1)])
@pytest.mark.parametrize("kept", [True, False])
def test_rows_without_a_choice(out, width, kept):
    weight, inputs, _ = problem(out, width)
    mask = np.full((out, width), kept)
    np.testing.assert_array_equal(refined(mask, weight, inputs), mask)
