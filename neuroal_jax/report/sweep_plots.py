"""The plots of a sweep: each measure against sparsity, with the numbers of its table. Imports no JAX."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from neuroal_jax.report.figures import COLORS, DASHES, GREY, SYMBOLS, Section, figure, level, line, number

Row = Mapping[str, Any]
Method = tuple[str, str]  # pruner, and top-up with its step
_ACCURACY = "acc_mean"


def sweep_sections(rows: Sequence[Row]) -> list[Section]:
    """The plots of a sweep: each measure against sparsity, one figure per model, one line per pruner and top-up."""
    measures = [column for column in columns(rows) if column.startswith("pruned_token_ppl") or column == _ACCURACY]
    sections = [_measure(f"measure-{index}", measure, rows) for index, measure in enumerate(measures)]
    return sections or [Section("measure-0", "Perplexity against sparsity", "No run measured one so far.", {})]


def columns(rows: Sequence[Row]) -> list[str]:
    """The columns of a table that hold something, in order."""
    names = dict.fromkeys(column for row in rows for column in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]


def _measure(name: str, measure: str, rows: Sequence[Row]) -> Section:
    measured = [row for row in rows if _is_drawn(row.get(measure))]
    figures = {
        str(model): _against_sparsity(
            [row for row in measured if row["model"] == model], [row for row in rows if row["model"] == model], measure
        )
        for model in dict.fromkeys(row["model"] for row in measured)
    }
    accuracy = measure == _ACCURACY
    heading = f"{'Mean accuracy' if accuracy else measure.removeprefix('pruned_')} against sparsity"
    sentence = (
        f"Mean over seeds of every pruner and top-up, with the spread from the lowest to the highest seed; "
        f"{'higher' if accuracy else 'lower'} is better."
    )
    return Section(name, heading, sentence, figures)


def _is_drawn(value: float | None) -> bool:
    """Whether a value is there, and within the range of numbers: no axis reaches further."""
    return value is not None and math.isfinite(value)


def _against_sparsity(measured: Sequence[Row], rows: Sequence[Row], measure: str) -> go.Figure:
    """One model's figure.

    Args:
        measured: The rows that hold the measure.
        rows: All rows of the model: a method keeps its style whichever measure is drawn.
        measure: The column.
    """
    accuracy = measure == _ACCURACY
    title = "mean accuracy" if accuracy else "token perplexity"
    scale = {} if accuracy else {"type": "log", "tickformat": "~g"}
    dense = f"dense_{measure.removeprefix('pruned_')}"
    levels = list(dict.fromkeys(row[dense] for row in rows if _is_drawn(row.get(dense))))
    lines = _method_lines(measured, rows, measure)
    sparsities = [row["sparsity"] for row in measured]
    if len(set(sparsities)) == 1:
        return _at_one_sparsity(lines, levels, f"{title}\nat sparsity {number(sparsities[0])}", scale)
    ends = [min(sparsities) - 0.01, max(sparsities) + 0.01]
    traces = [*lines, *(level(f"dense: {number(value)}", ends, value) for value in levels)]
    return figure(traces, "sparsity", title, 480, {"range": ends}, scale)


def _top_up(row: Row) -> str:
    """With the step that a search took, and its objective where it is not the usual one: `neuroal (block, kl)`."""
    details = [str(row[name]) for name in ("step", "objective") if row.get(name)]
    return f"{row['top_up']} ({', '.join(details)})" if details else str(row["top_up"])


def _method_lines(measured: Sequence[Row], rows: Sequence[Row], measure: str) -> list[go.Scatter]:
    """The mean over seeds by sparsity, with its spread, of every method that has one."""
    pruners, top_ups = list(dict.fromkeys(row["pruner"] for row in rows)), list(dict.fromkeys(map(_top_up, rows)))
    seeds: dict[Method, dict[float, list[float]]] = {}
    for row in measured:
        method = seeds.setdefault((row["pruner"], _top_up(row)), {})
        method.setdefault(row["sparsity"], []).append(row[measure])
    lines = []
    for (pruner, top_up), values in seeds.items():
        # Colours for the longer list, so that as many lines as possible differ at a glance.
        style = (top_ups.index(top_up), pruners.index(pruner))
        bright, dashed = style if len(top_ups) >= len(pruners) else style[::-1]
        sparsities = sorted(values)
        means = [sum(values[x]) / len(values[x]) for x in sparsities]
        trace = line(
            f"{pruner} + {top_up}",
            sparsities,
            means,
            COLORS[bright % len(COLORS)],
            SYMBOLS[bright % len(SYMBOLS)],
            DASHES[dashed % len(DASHES)],
        )
        trace.error_y = {
            "type": "data",
            "symmetric": False,
            "array": [max(values[x]) - mean for x, mean in zip(sparsities, means, strict=True)],
            "arrayminus": [mean - min(values[x]) for x, mean in zip(sparsities, means, strict=True)],
            "visible": any(len(of_seeds) > 1 for of_seeds in values.values()),
            "thickness": 1,
        }
        lines.append(trace)
    return lines


def _at_one_sparsity(
    lines: Sequence[go.Scatter], levels: Sequence[float], title: str, scale: Mapping[str, Any]
) -> go.Figure:
    """One dot a method, each in its own row, where points above one another could not be told apart."""
    methods = [trace.name for trace in lines]
    dots = [
        go.Scatter(
            name=trace.name,
            mode="markers",
            x=trace.y,
            y=[trace.name],
            error_x=trace.error_y.to_plotly_json(),
            marker=trace.marker,
            showlegend=False,
            hovertemplate="%{y}: %{x}<extra></extra>",
        )
        for trace in lines
    ]
    ends = {"color": GREY, "symbol": "line-ns-open", "size": 10}  # markers keep the line off the plot's edge
    dense = [
        level(f"dense: {number(value)}", [], value).update(
            x=[value, value], y=[methods[0], methods[-1]], mode="lines+markers", marker=ends, showlegend=True
        )
        for value in levels
    ]
    rows = {"autorange": "reversed", "categoryarray": methods, "categoryorder": "array"}
    return figure([*dots, *dense], title, "", 160 + 26 * len(methods), scale, rows)
