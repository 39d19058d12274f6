"""A run's result as a piece of HTML for notebooks: a table, and the report's plots of blocks and candidates.

The plots are drawn here, as SVG: no scripts, no network, some kilobytes, and the colours of whatever is around them.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from neuroal_jax.files.reading import number as read_number
from neuroal_jax.report.facts import Facts, headline, key_facts
from neuroal_jax.report.figures import around, number
from neuroal_jax.report.recorded import Manifest, PerLinear
from neuroal_jax.report.run_plots import block_sparsity, candidate_scores

_WIDTH, _HEIGHT = 480, 240  # pixels of a plot, and of what is around the marks
_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 44, 16, 42
_LARGEST = 1e300  # beyond it, the room around points is no number
_SHOWN = ("model", "pruner", "pattern", "allocation", "refinement")  # of the report's facts, those of any run


def run_html(manifest: Manifest, allocated: PerLinear, out: Path) -> str:
    """The summary of a run, and its plots of sparsity by block and of candidates' scores.

    Args:
        manifest: The content of manifest.json.
        allocated: Sparsity of every linear, per block: a number, or one for each row.
        out: Where the results lie.
    """
    sections = [block_sparsity(manifest, allocated), *candidate_scores(manifest)]
    plots = [svg(plot, section.heading) for section in sections for plot in section.figures.values()]
    whole = table("Pruned", run_facts(manifest, out)) + "".join(plots)
    return whole.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text


def run_facts(manifest: Manifest, out: Path) -> Facts:
    """What to see of a run at a glance."""
    facts = {name: (text, "") for name, (text, _) in key_facts(manifest).items() if _in_summary(name)}
    facts = {name: fact for name, fact in facts.items() if fact[0] != "none"}
    found = manifest["token_ppl"]
    perplexities = {
        f"token_ppl@{found['seqlen']} of {name}": (
            f"{read_number(text['dense']):.2f} \u2192 {read_number(text['pruned']):.2f}",
            "dense \u2192 pruned",
        )
        for name, text in found["texts"].items()
    }
    others = {name: fact for name, fact in headline(manifest).items() if not name.startswith("token_ppl")}
    return {**facts, **others, **perplexities, "results": (str(out), "")}


def _in_summary(name: str) -> bool:
    return name in _SHOWN or name.endswith(" step")  # the winner's parameters


def table(caption: str, facts: Facts) -> str:
    """Names with texts, and their notes in brackets."""
    left = ' style="text-align: left"'
    rows = (
        f"<tr><th{left}>{html.escape(name)}</th>"
        f"<td{left}>{html.escape(text)}{html.escape(f' ({note})') if note else ''}</td></tr>"
        for name, (text, note) in facts.items()
    )
    return f"<table><caption{left}>{html.escape(caption)}</caption>{''.join(rows)}</table>"


def svg(figure: go.Figure, heading: str) -> str:
    """A figure of points and lines, or nothing without any; hovering over a point tells its numbers."""
    layout = figure.layout
    of_y = math.log10 if layout.yaxis.type == "log" else float
    traces = [_drawn(trace, positive=of_y is math.log10) for trace in figure.data]
    xs, ys = ([v for trace in traces for v in trace[axis]] for axis in ("x", "y"))
    if not xs:
        return ""
    left, right = layout.xaxis.range or around(xs)
    low, high = layout.yaxis.range or around([of_y(y) for y in ys], 0.0)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # or rounding is all that there would be to see
        room = max(1.0, 1e-3 * abs(low))
        low, high = low - room, high + room

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    whole = layout.xaxis.tickformat == "d"
    parts = [_text(heading, _LEFT, 14, "start", bold=True)]
    for tick in _ticks(left, right, whole=whole):
        x, bottom = place(tick, low)
        parts.append(_text(f"{tick:g}", x, bottom + 16, "middle"))
    for tick in _ticks(low, high):
        x, y = place(left, tick)
        parts.append(f'<path d="M{x:.1f} {y:.1f}H{_WIDTH - _RIGHT}" stroke="currentColor" stroke-opacity=".2"/>')
        parts.append(_text(f"{10**tick:.2g}" if of_y is math.log10 else f"{tick:.4g}", x - 6, y + 4, "end"))
    parts.append(_text(_plain(layout.xaxis.title.text), (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "middle"))
    at = float(_LEFT)
    for trace in traces:
        spots = [place(x, of_y(y)) for x, y in zip(trace["x"], trace["y"], strict=True)]
        parts.append(_marks(trace, spots))
        parts.append(f'<circle cx="{at + 4:.0f}" cy="28" r="4" {_paint(trace)}/>')
        parts.append(_text(trace["name"], at + 12, 32, "start"))
        at += 30 + 6.5 * len(trace["name"])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{html.escape(heading)}" font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def _drawn(trace: go.Scatter, *, positive: bool) -> dict[str, Any]:
    """What is drawn of a trace: points whose numbers have room around them, on a logarithmic axis positive ones."""
    pairs = [(x, y) for x, y in zip(trace.x, trace.y, strict=True) if y is not None and abs(y) < _LARGEST]
    pairs = [(x, y) for x, y in pairs if y > 0 or not positive]
    mode = trace.mode or "lines+markers"
    return {
        "name": _plain(trace.name),
        "x": [float(x) for x, _ in pairs],
        "y": [float(y) for _, y in pairs],
        "color": trace.marker.color or trace.line.color,
        "open": "open" in (trace.marker.symbol or ""),
        "radius": (trace.marker.size or 8) / 2 if "markers" in mode else 0,
        "joined": "lines" in mode,
        "dashed": trace.line.dash not in (None, "solid"),
    }


def _marks(trace: Mapping[str, Any], spots: Sequence[tuple[float, float]]) -> str:
    parts = []
    if trace["joined"] and spots:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        dashes = ' stroke-dasharray="6 4"' if trace["dashed"] else ""
        parts.append(f'<path d="M{way}" fill="none" stroke="{trace["color"]}" stroke-width="2"{dashes}/>')
    if radius := trace["radius"]:
        circles = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{of_x:g}: {number(of_y)}</title></circle>'
            for (x, y), of_x, of_y in zip(spots, trace["x"], trace["y"], strict=True)
        )
        parts.append(f"<g {_paint(trace)}>{''.join(circles)}</g>")
    return "".join(parts)


def _paint(trace: Mapping[str, Any]) -> str:
    fill = "none" if trace["open"] else trace["color"]
    return f'fill="{fill}" stroke="{trace["color"]}" stroke-width="{2 if trace["open"] else 0}"'


def _text(text: str, x: float, y: float, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{weight}>{html.escape(text)}</text>'
    )


def _plain(label: str | None) -> str:
    """The text that was written for Plotly, see `figures.label`."""
    return html.unescape((label or "").replace("<br>", " "))


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Some round numbers from `low` to `high`."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    step = max(step, 1.0) if whole else step
    return [float(f"{n * step:.9g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
