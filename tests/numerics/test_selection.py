"""Radix selection against a stable sort, bit for bit."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from neuroal_jax.numerics.selection import TIES_ALL, TIES_HIGH, TIES_LOW, Quota, select_smallest


def by_sort(scores, counts, ties_high=False):
    """The oracle: a stable argsort of each row."""
    mask = np.zeros(scores.shape, bool)
    for row, (values, count) in enumerate(zip(scores, counts, strict=True)):
        order = np.argsort(values, kind="stable")
        if ties_high:  # what a stable descending sort does not keep
            order = np.argsort(-values, kind="stable")[::-1]
        mask[row, order[:count]] = True
    return mask


FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1.0])
SHAPES = st.sampled_from([(1, 1), (3, 2), (5, 9), (9, 1)])  # few: each is compiled
MATRICES = hnp.arrays(np.float32, SHAPES, elements=FLOATS)
SELECT = jax.jit(select_smallest)


@settings(max_examples=150, deadline=None)
@given(scores=MATRICES, data=st.data(), ties=st.sampled_from([TIES_LOW, TIES_HIGH]))
def test_equals_the_stable_sort(scores, data, ties):
    counts = np.array([data.draw(st.integers(0, scores.shape[1])) for _ in scores], np.int32)
    chosen = np.asarray(SELECT(scores, Quota(counts, ties)))
    np.testing.assert_array_equal(chosen, by_sort(scores, counts, ties == TIES_HIGH))


@settings(max_examples=50, deadline=None)
@given(scores=MATRICES, data=st.data())
def test_all_ties_means_everything_up_to_the_last_one_chosen(scores, data):
    counts = np.array([data.draw(st.integers(0, scores.shape[1])) for _ in scores], np.int32)
    chosen = np.asarray(SELECT(scores, Quota(counts, TIES_ALL)))
    for row, values, count in zip(chosen, scores, counts, strict=True):
        expected = values <= np.sort(values)[count - 1] if count else np.zeros(len(values), bool)
        np.testing.assert_array_equal(row, expected)


def test_marks_exactly_the_counts_among_equal_scores():
    scores = np.full((5, 7), 2.5, np.float32)
    counts = np.array([0, 1, 3, 6, 7], np.int32)
    low = np.asarray(select_smallest(scores, Quota(counts)))
    high = np.asarray(select_smallest(scores, Quota(counts, TIES_HIGH)))
    np.testing.assert_array_equal(low, np.arange(7) < counts[:, None])
    np.testing.assert_array_equal(high, np.arange(7) >= 7 - counts[:, None])


@pytest.mark.parametrize("width", [31, 32, 33, 100, 257, 70000])
@pytest.mark.parametrize("ties", [TIES_LOW, TIES_HIGH])
def test_equal_scores_at_the_ends_of_rows_of_any_width(width, ties):
    scores = np.random.default_rng(width).choice(np.float32([0, 1, 2]), (6, width))
    scores[:, [0, -1]] = 1
    counts = np.linspace(0, width, 6).astype(np.int32)
    chosen = np.asarray(select_smallest(scores, Quota(counts, ties)))
    np.testing.assert_array_equal(chosen, by_sort(scores, counts, ties == TIES_HIGH))


@pytest.mark.parametrize("width", [1, 2, 31, 257])
def test_denormals_keep_their_order(width):
    scores = (np.arange(width, dtype=np.float32)[::-1] * np.float32(1e-45))[None]
    counts = np.array([width // 2], np.int32)
    np.testing.assert_array_equal(np.asarray(select_smallest(scores, Quota(counts))), by_sort(scores, counts))


def test_same_under_vmap_and_jit():
    rng = np.random.default_rng(0)
    scores = rng.choice(np.float32([0, 1, 2, 3]), (3, 4, 50))
    counts = rng.integers(0, 51, (3, 4)).astype(np.int32)
    ties = np.array([TIES_LOW, TIES_HIGH, TIES_LOW])
    together = np.asarray(jax.jit(jax.vmap(select_smallest))(scores, Quota(counts, ties)))
    for index in range(3):
        np.testing.assert_array_equal(together[index], by_sort(scores[index], counts[index], ties[index] == TIES_HIGH))


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8])
def test_same_in_chunks(monkeypatch, rows):
    monkeypatch.setattr("neuroal_jax.numerics.selection._CHUNK_BYTES", {})
    monkeypatch.setattr("neuroal_jax.numerics.selection._CHUNK_BYTES_ELSEWHERE", 4 * 4 * 20)  # 4 rows
    rng = np.random.default_rng(rows)
    scores = rng.choice(np.float32([0, 1, 2, 3, 4]), (2, rows, 20))
    counts = rng.integers(0, 21, (2, rows)).astype(np.int32)
    together = jax.jit(jax.vmap(lambda s, c, t: select_smallest(s, Quota(c, t))))(scores, counts, np.array([0, 1]))
    for index in range(2):
        np.testing.assert_array_equal(together[index], by_sort(scores[index], counts[index], index == 1))
