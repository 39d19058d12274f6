"""The plots of a sweep: means and spreads over seeds."""

from neuroal_jax.report.page import sweep_report
from neuroal_jax.report.sweep_plots import sweep_sections
from tests.report.reports import ROWS, sweep_row, trace


def test_a_sweep_shows_means_and_spreads_over_seeds():
    perplexity, accuracy = sweep_sections(ROWS)
    assert list(perplexity.figures) == ["m", "n"]
    shown = perplexity.figures["m"]
    line = trace(shown, "wanda + owl")
    assert (line.x, line.y) == ((0.5, 0.7), ((18.25 + 100.5) / 2, 9.75))
    assert line.error_y.array == line.error_y.arrayminus == (100.5 - 59.375, 0)
    assert trace(shown, "dense").y == (16.5, 16.5)
    assert shown.layout.yaxis.type == "log"
    assert len(shown.data) == 2  # nothing for the method whose run failed
    at_one_sparsity = perplexity.figures["n"]  # a dot a method
    dot = trace(at_one_sparsity, "wanda + owl")
    assert (dot.x, dot.y) == ((20.0,), ("wanda + owl",))
    assert trace(at_one_sparsity, "dense").x == (7.5, 7.5)
    assert list(accuracy.figures) == ["n"]


def test_steps_of_a_search_are_lines_of_their_own():
    rows = [sweep_row(top_up="neuroal", step=step, pruned_token_ppl=9.5) for step in ("block", "both")]
    (section,) = sweep_sections([*rows, *ROWS[:3]])
    names = [line.name for line in section.figures["m"].data]
    assert names[:3] == ["wanda + neuroal (block)", "wanda + neuroal (both)", "wanda + owl"]
    assert "m wanda neuroal block 0.5: no" in sweep_report([{**rows[0], "error": "no"}, rows[1]])


def test_objectives_of_a_search_are_lines_of_their_own():
    found = (None, "kl")
    rows = [sweep_row(top_up="neuroal", step="both", objective=x, pruned_token_ppl=9.5) for x in found]
    (section,) = sweep_sections(rows)
    names = [line.name for line in section.figures["m"].data]
    assert names[:2] == ["wanda + neuroal (both)", "wanda + neuroal (both, kl)"]
    assert "m wanda neuroal both kl 0.5: no" in sweep_report([rows[0], {**rows[1], "error": "no"}])
