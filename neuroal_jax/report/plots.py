"""The plots of a report: plotly.js figures as plain data, with the numbers as a run recorded them. Imports no JAX."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuroal_jax.errors import UserError

Figure = dict[str, Any]
Manifest = Mapping[str, Any]
PerLinear = list[dict[str, Any]]  # per block, a value for each linear

# Okabe and Ito's colours, told apart with any kind of colour vision, on white and on black.
BLUE, ORANGE, GREEN, SKY, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#CC79A7"
GREY = "#808890"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_FEW = 12  # blocks, up to which each has its tick
_TENSOR = re.compile(r"^(?:.*?\.)?(\d+)\.(.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class Section:
    """A part of the page: a heading, a sentence, and the figures that the sentence explains or says why there are none.

    Attributes:
        name: Of the section's element; its figures are `name-0`, `name-1` and so on.
        heading: Plain text, as the next.
        sentence: What the figures show, or why there are none.
        figures: Plotly figures by title; the title of an only figure is not shown.
    """

    name: str
    heading: str
    sentence: str
    figures: Mapping[str, Figure]


def run_sections(manifest: Manifest, allocation: Mapping[str, Any]) -> list[Section]:
    """All plots of a run.

    Args:
        manifest: The content of manifest.json.
        allocation: The content of allocation.json.

    Raises:
        UserError: If a tensor of the allocation has no block in its name.
    """
    allocated = per_linear(allocation["sparsity"])
    return [
        _perplexity(manifest),
        _block_sparsity(manifest, allocated),
        _linear_sparsity(manifest),
        _row_sparsity(manifest, allocated),
        _scores(manifest, "block"),
        _scores(manifest, "row"),
        _alignment(manifest),
        *_measured(manifest),
        _seconds(manifest),
    ]


def per_linear(tensors: Mapping[str, Any]) -> PerLinear:
    """Regroups values by tensor name (`model.layers.3.mlp.up_proj.weight`) as one object per block, linears by name.

    Raises:
        UserError: If a name holds no number of a block, or the blocks are not 0, 1, 2 and so on.
    """
    blocks: dict[int, dict[str, Any]] = {}
    for tensor, value in tensors.items():
        match = _TENSOR.match(tensor)
        if match is None:
            raise UserError(
                f"the allocation names {tensor}, expected a linear of a block, as model.layers.0.mlp.up_proj"
            )
        blocks.setdefault(int(match[1]), {})[match[2]] = value
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise UserError(f"the allocation has blocks {sorted(blocks)[:5]}..., expected all from 0 on")
    return [blocks[number] for number in range(len(blocks))]


def achieved(manifest: Manifest) -> PerLinear:
    """Share of zeros in every linear, per block."""
    shapes = manifest["linears"]
    return [
        {linear: zeros / math.prod(shapes[linear]) for linear, zeros in block.items()}
        for block in manifest["zeros_per_linear"]
    ]


def _block_means(manifest: Manifest, values: PerLinear) -> list[float]:
    """Mean over the weights of each block; a list of one number per row counts with its mean."""
    sizes = {linear: math.prod(shape) for linear, shape in manifest["linears"].items()}
    total = sum(sizes.values())
    return [sum(float(np.mean(block[linear])) * size for linear, size in sizes.items()) / total for block in values]


def _perplexity(manifest: Manifest) -> Section:
    values = manifest["token_ppl"]
    section = ("perplexity", f"Perplexity, token_ppl@{values['seqlen']}")
    if values["dense"] is None or values["pruned"] is None:
        return Section(*section, "Not measured: the run had --eval none.", {})
    texts = values["texts"]
    bars = {
        f"{name}, {state}" if len(texts) > 1 else state: text[state]
        for name, text in texts.items()
        for state in ("dense", "pruned")
    }
    sentence = "Perplexity of the model on the evaluation text before and after pruning; lower is better."
    return Section(*section, sentence, {"": _bars("token perplexity", bars, [GREY, BLUE] * len(texts), "%{x:.4f}")})


def _block_sparsity(manifest: Manifest, allocated: PerLinear) -> Section:
    section = ("block-sparsity", "Sparsity per block")
    if "zeros_per_linear" not in manifest:
        return Section(*section, _NO_COUNTS, {})
    blocks = list(range(len(allocated)))
    asked = _block_means(manifest, allocated)
    found = _block_means(manifest, achieved(manifest))
    target = manifest["sparsity"]["requested"]
    traces = [
        {**_line("achieved", blocks, found, BLUE), "line": {"color": BLUE, "width": 2}},
        {
            **_line("allocated", blocks, asked, ORANGE),
            "mode": "markers",
            "marker": {"color": ORANGE, "symbol": "circle-open", "size": 14, "line": {"width": 2}},
        },
        _level(f"asked of the model: {_number(target)}", [-0.4, len(blocks) - 0.6], target),
    ]
    layout = _layout(
        "block", "sparsity", 340, xaxis=_block_axis(len(blocks)), yaxis={"range": _range([*asked, *found, target])}
    )
    sentence = "Share of zeros in the linears of every block, and what the allocation gives it (mean over its weights)."
    return Section(*section, sentence, {"": {"data": traces, "layout": layout}})


_NO_COUNTS = "Not recorded: this run's manifest does not count the zeros of each linear."


def _linear_sparsity(manifest: Manifest) -> Section:
    section = ("linear-sparsity", "Sparsity per linear")
    if "zeros_per_linear" not in manifest:
        return Section(*section, _NO_COUNTS, {})
    found, linears = achieved(manifest), list(manifest["linears"])
    rows = [[block[linear] for block in found] for linear in linears]
    low, high = _range([value for row in rows for value in row])
    cells = {
        "type": "heatmap",
        "x": list(range(len(found))),
        "y": [html.escape(linear) for linear in linears],
        "z": rows,
        "zmin": low,
        "zmax": high,
        "colorscale": "Cividis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"title": {"text": "sparsity", "side": "right"}, "thickness": 12, "tickformat": ".3~f"},
        "hovertemplate": "block %{x}, %{y}: %{z}<extra></extra>",
    }
    layout = _layout(
        "block", "", 130 + 30 * len(linears), xaxis=_block_axis(len(found)), yaxis={"autorange": "reversed"}
    )
    layout["xaxis"]["showgrid"] = layout["yaxis"]["showgrid"] = False
    sentence = "Share of zeros in every linear of every block, counted in the masks."
    return Section(*section, sentence, {"": {"data": [cells], "layout": layout}})


def _row_sparsity(manifest: Manifest, allocated: PerLinear) -> Section:
    section = ("row-sparsity", "Sparsity of the rows")
    names = list(dict.fromkeys(linear for block in allocated for linear, value in block.items() if _by_row(value)))
    if not names:
        method = manifest["options"]["allocation"]
        step = ", --step block" if method == "neuroal" and manifest["options"]["step"] == "block" else ""
        sentence = f"No distribution to show: all rows of a linear have one sparsity (--allocation {method}{step})."
        return Section(*section, sentence, {})
    everything = [x for block in allocated for linear in names for x in (np.min(block[linear]), np.max(block[linear]))]
    axis = {"range": _range([float(value) for value in everything])}
    figures = {}
    for name in names:
        blocks = list(range(len(allocated)))
        quantiles = [np.quantile(block[name], QUANTILES).tolist() for block in allocated]
        lowest, lower, quarter, median, three_quarters, upper, highest = map(list, zip(*quantiles, strict=True))
        boxes = {
            "type": "box",
            "name": "rows",
            "x": blocks,
            "lowerfence": lower,
            "q1": quarter,
            "median": median,
            "q3": three_quarters,
            "upperfence": upper,
            "boxpoints": False,
            "line": {"color": BLUE, "width": 1.5},
            "showlegend": False,
        }
        ends = {
            "type": "scatter",
            "mode": "markers",
            "name": "lowest and highest",
            "x": [*blocks, *blocks],
            "y": [*lowest, *highest],
            "marker": {"color": ORANGE, "size": 5},
            "showlegend": False,
        }
        layout = _layout("block", "sparsity", 250, xaxis=_block_axis(len(blocks)), yaxis=axis)
        figures[name] = {"data": [boxes, ends], "layout": layout}
    left_out = [linear for linear in allocated[0] if linear not in names]
    sentence = (
        "How the allocation spreads sparsity over the rows of each linear: boxes hold the middle half, whiskers 5% to "
        "95%, dots are the lowest and the highest row; a line alone is one sparsity for all rows."
    )
    if left_out:
        sentence += f" One sparsity for all rows in every block: {', '.join(left_out)}."
    return Section(*section, sentence, figures)


def _by_row(sparsity: Any) -> bool:
    return isinstance(sparsity, list)


def _scores(manifest: Manifest, step: str) -> Section:
    section = (f"scores-{step}", f"Lambda candidates, {step} step")
    scores, best = manifest["scores"][step], manifest[f"lambda_{step}"]
    if best is None:
        return Section(*section, _why_not_searched(manifest, step), {})
    pairs = sorted(zip(_candidates(manifest, step), scores, strict=True))
    lambdas, sorted_scores = [x for x, _ in pairs], [y for _, y in pairs]
    winner = {
        **_line(f"winner: {_number(best)}", [best], [min(scores)], RED),
        "mode": "markers",
        "marker": {"color": RED, "symbol": "star", "size": 17},
    }
    layout = _layout("lambda", "alignment score", 340, yaxis={"exponentformat": "power"})
    sentence = (
        "Score of every candidate (how far pruning moves the activations, over all linears) and the winner; "
        "lower is better."
    )
    data = [_line("candidates", lambdas, sorted_scores, BLUE), winner]
    return Section(*section, sentence, {"": {"data": data, "layout": layout}})


def _candidates(manifest: Manifest, step: str) -> Sequence[float]:
    from neuroal_jax.search.lambdas import lambdas_for

    options = manifest["options"]
    block, row = (x if isinstance(x, str) else tuple(x) for x in (options["block_lambdas"], options["row_lambdas"]))
    lambdas = lambdas_for(options["step"], block, row, manifest["sparsity"]["requested"])
    return lambdas.block if step == "block" else lambdas.row


def _why_not_searched(manifest: Manifest, step: str) -> str:
    options, scores = manifest["options"], manifest["scores"][step]
    if options["allocation"] != "neuroal":
        return f"Not searched: --allocation {options['allocation']} has no lambda candidates."
    base = f" The uniform allocation under it scored {scores[0]:.6g}." if scores else ""
    return f"Not searched: the run had --step {options['step']}.{base}"


def _alignment(manifest: Manifest) -> Section:
    section = ("alignment", "Alignment per linear")
    blocks: PerLinear | None = manifest.get("alignment")
    if not blocks:
        return Section(*section, "Not measured: only a search compares activations.", {})
    linears = list(dict.fromkeys(linear for block in blocks for linear in block))
    data = []
    for index, linear in enumerate(linears):
        color, symbol = COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]
        values = [block.get(linear) for block in blocks]
        line = _line(html.escape(linear), list(range(len(blocks))), values, color, symbol)
        line["marker"]["size"] = 16 - 10 * index / len(linears)  # linears of one input coincide: all stay visible
        data.append(line)
    highest = max(value for block in blocks for value in block.values())
    scale = {"range": [-0.05 * highest, 1.1 * highest], "exponentformat": "power"}
    layout = _layout("block", "alignment score", 400, xaxis=_block_axis(len(blocks)), yaxis=scale)
    sentence = (
        "Each linear's part in the score of the winning candidate: how much pruning changed the pattern of its inputs. "
        "Lower is better; all parts add up to the winner's score; linears that read the same input have the same part."
    )
    return Section(*section, sentence, {"": {"data": data, "layout": layout}})


_MEASURED = {
    "outliers": ("Outliers per block", "percent", "Share of scores far above the mean, from which OWL allocates."),
    "alphas": ("Heavy tails per block", "alpha", "Exponent of the tail of each block's spectra (AlphaPruning)."),
}


def _measured(manifest: Manifest) -> list[Section]:
    """What OWL or AlphaPruning measured; no section for other allocations."""
    sections: list[Section] = []
    for name, values in manifest["measured"].items():
        heading, unit, sentence = _MEASURED.get(name, (name, name, "Measured of every block."))
        line = _line(html.escape(heading), list(range(len(values))), values, GREEN)
        layout = _layout("block", html.escape(unit), 300, xaxis=_block_axis(len(values)), yaxis={})
        sections.append(
            Section(f"measured-{len(sections)}", heading, sentence, {"": {"data": [line], "layout": layout}})
        )
    return sections


def _seconds(manifest: Manifest) -> Section:
    seconds = manifest["seconds"]
    bars = {phase.replace("_", " "): value for phase, value in seconds.items()}
    sentence = "Wall time of every phase of the run, in the order in which they began, compiling included."
    return Section("seconds", "Time per phase", sentence, {"": _bars("seconds", bars, SKY, "%{x} s")})


def sweep_sections(rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The plots of a sweep: each measure against sparsity, one figure per model, one line per pruner and top-up."""
    measures = [column for column in columns(rows) if column.startswith("pruned_token_ppl") or column == "acc_mean"]
    sections = []
    for index, measure in enumerate(measures):
        models = dict.fromkeys(row["model"] for row in rows if row.get(measure) is not None)
        figures = {
            str(model): _against_sparsity([row for row in rows if row["model"] == model], measure) for model in models
        }
        accuracy = measure == "acc_mean"
        heading = f"{'Mean accuracy' if accuracy else measure.removeprefix('pruned_')} against sparsity"
        sentence = (
            f"Mean over seeds of every pruner and top-up, with the spread from the lowest to the highest seed; "
            f"{'higher' if accuracy else 'lower'} is better."
        )
        sections.append(Section(f"measure-{index}", heading, sentence, figures))
    return sections or [Section("measure-0", "Perplexity against sparsity", "No run measured one so far.", {})]


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a table that hold something, in order."""
    names = dict.fromkeys(column for row in rows for column in row)
    return [name for name in names if any(row.get(name) not in (None, "") for row in rows)]


def _against_sparsity(rows: Sequence[Mapping[str, Any]], measure: str) -> Figure:
    pruners, top_ups = (list(dict.fromkeys(row[column] for row in rows)) for column in ("pruner", "top_up"))
    methods = list(dict.fromkeys((row["pruner"], row["top_up"]) for row in rows))
    data = []
    for pruner, top_up in methods:
        seeds: dict[float, list[float]] = {}
        for row in rows:
            if (row["pruner"], row["top_up"]) == (pruner, top_up) and row.get(measure) is not None:
                seeds.setdefault(row["sparsity"], []).append(row[measure])
        if not seeds:
            continue
        # Colours for the longer list, so that as many lines as possible differ at a glance.
        style = (top_ups.index(top_up), pruners.index(pruner))
        bright, dashed = style if len(top_ups) >= len(pruners) else style[::-1]
        sparsities = sorted(seeds)
        means = [sum(seeds[s]) / len(seeds[s]) for s in sparsities]
        line = _line(
            html.escape(f"{pruner} + {top_up}"),
            sparsities,
            means,
            COLORS[bright % len(COLORS)],
            SYMBOLS[bright % len(SYMBOLS)],
            DASHES[dashed % len(DASHES)],
        )
        line["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [max(seeds[s]) - mean for s, mean in zip(sparsities, means, strict=True)],
            "arrayminus": [mean - min(seeds[s]) for s, mean in zip(sparsities, means, strict=True)],
            "visible": any(len(values) > 1 for values in seeds.values()),
            "thickness": 1,
        }
        data.append(line)
    is_accuracy = measure == "acc_mean"
    dense = "dense_acc_mean" if is_accuracy else measure.replace("pruned_", "dense_")
    label = "mean accuracy" if is_accuracy else "token perplexity"
    spread = [x for line in data for x in line["x"]]
    ends = [min(spread) - 0.01, max(spread) + 0.01]
    if dense != measure:
        for level in dict.fromkeys(row[dense] for row in rows if row.get(dense) is not None):
            data.append(_level(f"dense: {_number(level)}", ends, level))
    scale = {} if is_accuracy else {"type": "log", "tickformat": "~g"}
    if len(set(spread)) == 1:
        return _at_one_sparsity(data, f"{label}<br>at sparsity {_number(spread[0])}", scale)
    layout = _layout("sparsity", label, 460, xaxis={"range": ends}, yaxis=scale)
    return {"data": data, "layout": layout}


def _at_one_sparsity(lines: list[dict[str, Any]], title: str, scale: dict[str, Any]) -> Figure:
    """One dot a method, each in its own row, where points above one another could not be told apart."""
    methods = [line["name"] for line in lines if "error_y" in line]
    data = []
    for line in lines:
        if "error_y" in line:
            turned = {"x": line["y"], "y": [line["name"]], "error_x": line["error_y"], "mode": "markers"}
        else:
            ends = {"color": GREY, "symbol": "line-ns-open", "size": 10}  # markers keep the line off the plot's edge
            turned = {"x": line["y"], "y": [methods[0], methods[-1]], "mode": "lines+markers", "marker": ends}
        rest = {key: value for key, value in line.items() if key not in ("error_y", "hovertemplate")}
        data.append({**rest, **turned, "showlegend": "error_y" not in line})
    axis = {"autorange": "reversed", "categoryarray": methods, "categoryorder": "array"}
    return {"data": data, "layout": _layout(title, "", 140 + 26 * len(methods), xaxis=scale, yaxis=axis)}


def _bars(unit: str, values: Mapping[str, float], color: str | list[str], text: str) -> Figure:
    """Horizontal bars, the first on top, each with its number beside it."""
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": list(values.values()),
        "y": [html.escape(name) for name in values],
        "marker": {"color": color},
        "texttemplate": text,
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y}: %{x}<extra></extra>",
    }
    room = {"range": [0, 1.35 * max(values.values())]}
    return {
        "data": [bars],
        "layout": _layout(unit, "", 100 + 34 * len(values), xaxis=room, yaxis={"autorange": "reversed"}),
    }


def _line(
    name: str, x: Sequence[Any], y: Sequence[Any], color: str, symbol: str = "circle", dash: str = "solid"
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"color": color, "symbol": symbol, "size": 8},
        "cliponaxis": False,
        "hovertemplate": "%{x}: %{y}",
    }


def _level(name: str, ends: Sequence[float], value: float) -> dict[str, Any]:
    """A horizontal line."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(ends),
        "y": [value, value],
        "line": {"color": GREY, "width": 2, "dash": "dash"},
        "hovertemplate": "%{y}",
    }


def _layout(x: str, y: str, height: int, **axes: dict[str, Any]) -> dict[str, Any]:
    return {
        "height": height,
        "xaxis": {"title": {"text": x}, **axes.get("xaxis", {})},
        "yaxis": {"title": {"text": y}, **axes.get("yaxis", {})},
    }


def _block_axis(blocks: int) -> dict[str, Any]:
    ticks = {"dtick": 1} if blocks <= _FEW else {}
    return {"range": [-0.6, blocks - 0.4], "tickformat": "d", **ticks}


def _range(values: Sequence[float], least: float = 0.02) -> list[float]:
    """An axis around values that does not blow up their rounding errors."""
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), (least - (high - low)) / 2)
    return [low - pad, high + pad]


def _number(value: float) -> str:
    return f"{value:.6g}"
