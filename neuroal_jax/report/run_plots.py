"""The plots of a run, with the numbers that it recorded. Imports no JAX."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from neuroal_jax.files.reading import number as read_number
from neuroal_jax.report.figures import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    SYMBOLS,
    Section,
    around,
    bars,
    block_axis,
    figure,
    heatmap,
    label,
    level,
    line,
    number,
    points,
)
from neuroal_jax.report.recorded import (
    Manifest,
    PerLinear,
    achieved,
    per_linear,
    recorded_candidates,
    recorded_winners,
)
from neuroal_jax.search.objective import OBJECTIVES

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
_NO_COUNTS = "Not recorded: this run's manifest does not count the zeros of each linear."


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
        block_sparsity(manifest, allocated),
        _linear_sparsity(manifest),
        _row_sparsity(allocated),
        *candidate_scores(manifest),
        _alignment(manifest),
        *_measured(manifest),
        _seconds(manifest),
    ]


def _perplexity(manifest: Manifest) -> Section:
    values = manifest["token_ppl"]
    section = ("perplexity", f"Perplexity, token_ppl@{values['seqlen']}")
    if values["dense"] is None or values["pruned"] is None:
        return Section(*section, "Not measured: the run had --eval none.", {})
    texts = values["texts"]
    named = {
        f"{name}, {state}" if len(texts) > 1 else state: read_number(text[state])
        for name, text in texts.items()
        for state in ("dense", "pruned")
    }
    sentence = "Perplexity of the model on the evaluation text before and after pruning; lower is better."
    beyond = [name for name, value in named.items() if not math.isfinite(value)]
    if beyond:
        sentence += f" Beyond the range of numbers: {', '.join(beyond)}."
    colors = dict(zip(named, [GREY, BLUE] * len(texts), strict=True))
    shown = {name: value for name, value in named.items() if name not in beyond}
    plot = bars("token perplexity", shown, [colors[name] for name in shown], "%{x:.4f}") if shown else None
    return Section(*section, sentence, {"": plot} if plot else {})


def block_sparsity(manifest: Manifest, allocated: PerLinear) -> Section:
    """Zeros of every block, beside what was allocated to it."""
    section = ("block-sparsity", "Sparsity per block")
    if "zeros_per_linear" not in manifest:
        return Section(*section, _NO_COUNTS, {})
    blocks = list(range(len(allocated)))
    asked = _block_means(manifest, allocated)
    found = _block_means(manifest, achieved(manifest))
    target = manifest["sparsity"]["requested"]
    traces = [
        line("achieved", blocks, found, BLUE),
        points("allocated", blocks, asked, ORANGE, "circle-open", 14),
        level(f"asked of the model: {number(target)}", [-0.4, len(blocks) - 0.6], target),
    ]
    scale = {"range": around([*asked, *found, target])}
    sentence = "Share of zeros in the linears of every block, and what the allocation gives it (mean over its weights)."
    return Section(
        *section, sentence, {"": figure(traces, "block", "sparsity", xaxis=block_axis(len(blocks)), yaxis=scale)}
    )


def _block_means(manifest: Manifest, values: PerLinear) -> list[float]:
    """Mean over the weights of each block; a list of one number per row counts with its mean."""
    sizes = {linear: math.prod(shape) for linear, shape in manifest["linears"].items()}
    total = sum(sizes.values())
    return [sum(float(np.mean(block[linear])) * size for linear, size in sizes.items()) / total for block in values]


def _linear_sparsity(manifest: Manifest) -> Section:
    section = ("linear-sparsity", "Sparsity per linear")
    if "zeros_per_linear" not in manifest:
        return Section(*section, _NO_COUNTS, {})
    blocks = achieved(manifest)
    rows = {linear: [block[linear] for block in blocks] for linear in manifest["linears"]}
    sentence = "Share of zeros in every linear of every block, counted in what is written."
    return Section(*section, sentence, {"": heatmap("sparsity", rows)})


def _row_sparsity(allocated: PerLinear) -> Section:
    section = ("row-sparsity", "Sparsity of the rows")
    linears = dict.fromkeys(linear for block in allocated for linear in block)
    by_row = [linear for linear in linears if any(isinstance(block.get(linear), list) for block in allocated)]
    if not by_row:
        return Section(*section, "No distribution to show: all rows of a linear have one sparsity.", {})
    ends = [
        float(x) for block in allocated for linear in by_row for x in (np.min(block[linear]), np.max(block[linear]))
    ]
    scale = {"range": around(ends)}
    figures = {linear: _row_quantiles([block[linear] for block in allocated], scale) for linear in by_row}
    sentence = (
        "How the allocation spreads sparsity over the rows of each linear: boxes hold the middle half, whiskers 5% to "
        "95%, dots are the lowest and the highest row; a line alone is one sparsity for all rows."
    )
    left_out = [linear for linear in linears if linear not in by_row]
    if left_out:
        sentence += f" One sparsity for all rows in every block: {', '.join(left_out)}."
    return Section(*section, sentence, figures)


def _row_quantiles(rows_of_blocks: Sequence[Any], scale: Mapping[str, Any]) -> go.Figure:
    blocks = list(range(len(rows_of_blocks)))
    quantiles = [np.quantile(rows, QUANTILES).tolist() for rows in rows_of_blocks]
    lowest, lower, quarter, median, three_quarters, upper, highest = map(list, zip(*quantiles, strict=True))
    boxes = go.Box(
        name="rows",
        x=blocks,
        lowerfence=lower,
        q1=quarter,
        median=median,
        q3=three_quarters,
        upperfence=upper,
        showlegend=False,
    )
    ends = points("lowest and highest", [*blocks, *blocks], [*lowest, *highest], ORANGE, "circle", 5)
    ends.showlegend = False
    return figure([boxes, ends], "block", "sparsity", 270, block_axis(len(blocks)), scale)


def candidate_scores(manifest: Manifest) -> list[Section]:
    """A section for every step whose candidates were recorded, or one for all where each goes on from the last."""
    winners = recorded_winners(manifest)
    objective = manifest.get("options", {}).get("objective", "alignment")
    if manifest.get("gains"):
        return [_course(recorded_candidates(manifest), winners, manifest["gains"], objective)]
    sections = [
        _step_scores((f"scores-{index}", f"Candidates of the {step} step"), candidates, winners.get(step), objective)
        for index, (step, candidates) in enumerate(recorded_candidates(manifest).items())
        if candidates
    ]
    nothing = Section("scores-0", "Candidates", "Not searched: this run's allocation had no candidates.", {})
    return sections or [nothing]


def _course(
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    winners: Mapping[str, Mapping[str, Any]],
    gains: Mapping[str, Mapping[str, Any]],
    objective: str,
) -> Section:
    """All candidates in the order in which they were tried, and the winners that were kept."""
    traces, stars, first = [], [], 0
    for index, (stage, candidates) in enumerate(stages.items()):
        places, color = list(range(first, first + len(candidates))), COLORS[index % len(COLORS)]
        scores = [each["score"] for each in candidates]
        trace = points(stage, places, scores, color, SYMBOLS[index % len(SYMBOLS)], 9)
        trace.text = [label(_described(each)) for each in candidates]
        trace.hovertemplate = "%{text}: %{y}<extra></extra>"
        traces.append(trace)
        if stage in winners:
            stars.append(min(zip(places, scores, strict=True), key=lambda pair: pair[1]))
        first += len(candidates)
    traces.append(points("winners", [x for x, _ in stars], [y for _, y in stars], RED, "star", 17))
    found = "; ".join(f"{stage}: {_gained(gain)}" for stage, gain in gains.items())
    sentence = (
        "Score of every candidate in the order in which the stages of the search tried them, and the winner of each "
        f"stage that was kept; lower is better. Each winner against the best before it: {found}."
    )
    plot = figure(traces, "candidate", f"{objective} score", yaxis={"type": "log"})
    return Section("course", "Course of the search", sentence, {"": plot})


def _described(candidate: Mapping[str, Any]) -> str:
    named = {name: value for name, value in candidate.items() if name != "score"}
    return ", ".join(f"{name} {number(x) if _is_number(x) else x}" for name, x in named.items())


def _gained(gain: Mapping[str, Any]) -> str:
    error = "" if gain["error"] is None else f" ± {gain['error']:.2g}"
    return f"{'kept' if gain['kept'] else 'refused'}, better by {gain['mean']:.3g}{error}"


def _step_scores(
    section: tuple[str, str],
    candidates: Sequence[Mapping[str, Any]],
    chosen: Mapping[str, Any] | None,
    objective: str,
) -> Section:
    if chosen is None:
        scores = ", ".join(number(candidate["score"]) for candidate in candidates)
        return Section(*section, f"Not searched: the later steps started from what scored {scores}.", {})
    parameter = next((name for name in candidates[0] if name != "score" and _all_numbers(name, candidates)), None)
    places = [index if parameter is None else each[parameter] for index, each in enumerate(candidates)]
    shown = sorted(zip(places, candidates, strict=True), key=lambda pair: (pair[0], pair[1]["score"]))
    matching = [pair for pair in shown if chosen.items() <= pair[1].items()]
    place, winner = min(matching or shown, key=lambda pair: pair[1]["score"])
    names = ", ".join(number(x) if _is_number(x) else str(x) for x in chosen.values())
    traces = [
        line("candidates", [x for x, _ in shown], [each["score"] for _, each in shown], BLUE),
        points(f"winner: {names}", [place], [winner["score"]], RED, "star", 17),
    ]
    meaning = f" ({OBJECTIVES[objective].help})" if objective in OBJECTIVES else ""
    sentence = f"Score of every candidate by {objective}{meaning}, and the winner; lower is better."
    plot = figure(traces, parameter or "candidate", "score", yaxis={"exponentformat": "power"})
    return Section(*section, sentence, {"": plot})


def _all_numbers(name: str, candidates: Sequence[Mapping[str, Any]]) -> bool:
    return all(_is_number(candidate.get(name)) for candidate in candidates)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alignment(manifest: Manifest) -> Section:
    section = ("alignment", "Alignment per linear")
    blocks: PerLinear | None = manifest.get("alignment")
    if not blocks:
        return Section(*section, "Not measured: only a search compares activations (with --objective alignment).", {})
    linears = list(dict.fromkeys(linear for block in blocks for linear in block))
    traces = []
    for index, linear in enumerate(linears):
        color, symbol = COLORS[index % len(COLORS)], SYMBOLS[index % len(SYMBOLS)]
        trace = line(linear, range(len(blocks)), [block.get(linear) for block in blocks], color, symbol)
        trace.marker.size = 16 - 10 * index / len(linears)  # linears of one input coincide: all stay visible
        traces.append(trace)
    highest = max(value for block in blocks for value in block.values())
    scale = {"range": [-0.05 * highest, 1.1 * highest], "exponentformat": "power"}
    sentence = (
        "Each linear's part in the score of the winning candidate: how much pruning changed the pattern of its inputs. "
        "Lower is better; all parts add up to the winner's score; linears that read the same input have the same part."
    )
    plot = figure(traces, "block", "alignment score", 420, block_axis(len(blocks)), scale)
    return Section(*section, sentence, {"": plot})


_MEASURED = {
    "outliers": ("Outliers per block", "percent", "Share of scores far above the mean, from which OWL allocates."),
    "medians": ("Median scores per block", "median", "Median of each block's Wanda scores, from which DLP allocates."),
    "alphas": ("Heavy tails per block", "alpha", "Exponent of the tail of each block's spectra (AlphaPruning)."),
}


def _measured(manifest: Manifest) -> list[Section]:
    """What the allocation measured of every block; no section for one that measures nothing."""
    sections = []
    for index, (name, values) in enumerate(manifest["measured"].items()):
        heading, unit, sentence = _MEASURED.get(name, (name, name, "Measured of every block."))
        trace = line(heading, range(len(values)), values, GREEN)
        plot = figure([trace], "block", unit, 320, block_axis(len(values)))
        sections.append(Section(f"measured-{index}", heading, sentence, {"": plot}))
    return sections


def _seconds(manifest: Manifest) -> Section:
    phases = {phase.replace("_", " "): value for phase, value in manifest["seconds"].items()}
    sentence = "Wall time of every phase of the run, in the order in which they began, compiling included."
    return Section("seconds", "Time per phase", sentence, {"": bars("seconds", phases, SKY, "%{x} s")})
