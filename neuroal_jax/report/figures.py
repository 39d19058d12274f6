"""What the plots of all reports share: one template, and the few kinds of marks. Imports Plotly, but no JAX.

Every function takes names as plain text and escapes it: Plotly reads labels as HTML.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's colours, told apart with any kind of colour vision, on white and on black.
BLUE, ORANGE, GREEN, SKY, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
GREY = "#808890"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

_TOOLBAR = 36  # pixels above every plot, so that the toolbar covers nothing
_AROUND_BARS = 114  # pixels: that, and the axis below
_FEW_BLOCKS = 12  # up to which each has its tick

# page.js adds what depends on the reader's screen: the page's light or dark colours, and legends below narrow plots.
_AXIS = {"zeroline": False, "automargin": True}
TEMPLATE = go.layout.Template(
    layout={
        "colorway": COLORS,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"t": _TOOLBAR, "r": 16, "b": 48, "l": 48},
        "legend": {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
        "hovermode": "closest",
        "modebar": {"orientation": "h", "bgcolor": "rgba(0,0,0,0)", "remove": ["select2d", "lasso2d", "autoScale2d"]},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    },
    data={
        "scatter": [
            {
                "mode": "lines+markers",
                "line": {"width": 2},
                "marker": {"size": 8},
                "cliponaxis": False,
                "hovertemplate": "%{x}: %{y}",
            }
        ],
        "bar": [
            {
                "textposition": "outside",
                "cliponaxis": False,
                "hovertemplate": "%{y}: %{x}<extra></extra>",
            }
        ],
        "box": [{"boxpoints": False, "line": {"color": BLUE, "width": 1.5}}],
        "heatmap": [
            {
                "colorscale": "Cividis",
                "xgap": 1,
                "ygap": 1,
                "colorbar": {"title": {"side": "right"}, "thickness": 12, "tickformat": ".3~f"},
            }
        ],
    },
)


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence, and the figures that the sentence explains or says why there are none.

    Attributes:
        name: Of the section's element; its figures are `name-0`, `name-1` and so on.
        heading: Plain text, as the next.
        sentence: What the figures show, or why there are none.
        figures: Figures by title; the title of an only figure is not shown.
    """

    name: str
    heading: str
    sentence: str
    figures: Mapping[str, go.Figure]


def label(text: str) -> str:
    """Plain text for Plotly, which reads a subset of HTML in all that it writes; lines stay lines."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def number(value: float) -> str:
    """A number for people to read."""
    return f"{value:.6g}"


def figure(
    traces: Sequence[Any],
    x: str = "",
    y: str = "",
    height: int = 360,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
) -> go.Figure:
    """A figure in the reports' template.

    Args:
        traces: What is drawn.
        x: The title of the horizontal axis.
        y: The title of the vertical axis.
        height: In pixels.
        xaxis: More properties of the horizontal axis.
        yaxis: More properties of the vertical axis.
    """
    layout = go.Layout(
        template=TEMPLATE,
        height=height,
        xaxis={"title": {"text": label(x)}, **(xaxis or {})},
        yaxis={"title": {"text": label(y)}, **(yaxis or {})},
    )
    return go.Figure(list(traces), layout)


def line(
    name: str, x: Sequence[Any], y: Sequence[Any], color: str, symbol: str = "circle", dash: str = "solid"
) -> go.Scatter:
    """Points that a line joins."""
    marker, style = {"color": color, "symbol": symbol}, {"color": color, "dash": dash}
    return go.Scatter(name=label(name), x=list(x), y=list(y), line=style, marker=marker)


def points(name: str, x: Sequence[Any], y: Sequence[Any], color: str, symbol: str, size: int) -> go.Scatter:
    """Points alone; open symbols are drawn with a thick line."""
    marker = {"color": color, "symbol": symbol, "size": size, "line": {"width": 2 if "open" in symbol else 0}}
    return go.Scatter(name=label(name), mode="markers", x=list(x), y=list(y), marker=marker)


def level(name: str, ends: Sequence[float], value: float) -> go.Scatter:
    """A horizontal line."""
    style = {"color": GREY, "dash": "dash"}
    return go.Scatter(name=label(name), mode="lines", x=list(ends), y=[value, value], line=style, hovertemplate="%{y}")


def bars(unit: str, values: Mapping[str, float], color: str | list[str], text: str) -> go.Figure:
    """Horizontal bars, the first on top, each with its number beside it.

    Args:
        unit: The title of the axis.
        values: By name.
        color: Of all bars, or of each.
        text: Plotly's template of the number, as `%{x} s`.
    """
    trace = go.Bar(
        orientation="h",
        x=list(values.values()),
        y=[label(name) for name in values],
        marker={"color": color},
        texttemplate=text,
    )
    room = {"range": [0, 1.35 * max(values.values())]}
    return figure([trace], unit, "", _AROUND_BARS + 34 * len(values), room, {"autorange": "reversed"})


def heatmap(unit: str, rows: Mapping[str, Sequence[float]]) -> go.Figure:
    """A row of cells, one for each block, under every name; the first is on top."""
    values = [list(row) for row in rows.values()]
    low, high = around([value for row in values for value in row])
    blocks = len(values[0])
    cells = go.Heatmap(
        x=list(range(blocks)),
        y=[label(name) for name in rows],
        z=values,
        zmin=low,
        zmax=high,
        colorbar={"title": {"text": label(unit)}},
        hovertemplate="block %{x}, %{y}: %{z}<extra></extra>",
    )
    xaxis = {**block_axis(blocks), "showgrid": False}
    return figure([cells], "block", "", 150 + 30 * len(rows), xaxis, {"autorange": "reversed", "showgrid": False})


def block_axis(blocks: int) -> dict[str, Any]:
    """An axis of block numbers, the same for all plots of a run."""
    ticks = {"dtick": 1} if blocks <= _FEW_BLOCKS else {}
    return {"range": [-0.6, blocks - 0.4], "tickformat": "d", **ticks}


def around(values: Sequence[float], least: float = 0.02) -> list[float]:
    """A range around values, `least` wide at least: it does not blow up their rounding errors."""
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), (least - (high - low)) / 2)
    return [low - pad, high + pad]
