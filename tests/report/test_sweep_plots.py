"""The plots of a sweep: means and spreads over seeds."""

from neuroal_jax.report.sweep_plots import sweep_sections
from tests.report.reports import ROWS, trace


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
