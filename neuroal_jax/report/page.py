"""report.html: a run, or a sweep, as one page with plots that needs no network.

python -m neuroal_jax.report RUN_DIR

writes the report of an earlier run again, from its manifest.json and allocation.json.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from neuroal_jax.allocation import file as allocation_file
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import read_json
from neuroal_jax.files.writing import replace_text
from neuroal_jax.report.plots import Section, columns, run_sections, sweep_sections

REPORT = "report.html"
_MOST_BYTES = 2**30  # of a manifest or an allocation
_HASH_LENGTH = 12  # characters of a hash that are shown; the whole is in the cell's title

Facts = Mapping[str, Any]  # a name and a text, or a text and a longer one that shows on hovering


def run_report(manifest: Mapping[str, Any], allocation: Mapping[str, Any]) -> str:
    """The HTML page of a run.

    Args:
        manifest: The content of manifest.json, which the page also holds as JSON.
        allocation: The content of allocation.json.

    Raises:
        UserError: If the allocation's tensors are not linears of blocks.
    """
    sections = run_sections(manifest, allocation)
    options, sparsity = manifest["options"], manifest["sparsity"]
    title = f"{options['model']} pruned to {sparsity['requested']:.6g} sparsity with {_method(options)}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        "<p class=soft>A pruning run of neuroal-jax. Zeros in dense tensors alone make nothing smaller or faster.</p>",
        _tiles(_headline(manifest)),
        "<h2>Key facts</h2>",
        _facts(_key_facts(manifest)),
        *map(_section, sections),
        "<details><summary>All options</summary>",
        _facts({f"--{name.replace('_', '-')}": _option(manifest, name) for name in options}),
        "</details>",
    ]
    return _page(title, body, sections, "manifest", manifest)


def sweep_report(rows: Sequence[Mapping[str, Any]], links: Sequence[str | None] = ()) -> str:
    """The HTML page of a sweep.

    Args:
        rows: Of the table, each with the same columns; empty columns are left out. `model`, `pruner`, `top_up` and
            `sparsity` are needed, and `error` tells what went wrong.
        links: Where the report of each row's run is, relative to the page; none where there is no such file.
    """
    sections = sweep_sections(rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    failed = [row for row in rows if row.get("error")]
    title = f"Sweep: {', '.join(map(str, models))}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=soft>A sweep of neuroal-jax: {len(rows)} runs, {len(failed)} failed.</p>",
        *(f"<p class=bad>{html.escape(_failure(row))}</p>" for row in failed),
        *map(_section, sections),
        "<section><h2>All runs</h2><p>A click on a heading sorts by it, another one the other way round.</p>",
        _sortable(rows, links),
        "</section>",
    ]
    return _page(title, body, sections, "rows", list(rows))


def _failure(row: Mapping[str, Any]) -> str:
    names = " ".join(str(row.get(name)) for name in ("model", "pruner", "top_up", "sparsity") if name in row)
    return f"{names}: {row['error']}"


def _page(title: str, body: list[str], sections: Sequence[Section], source_name: str, source: Any) -> str:
    from plotly.offline import get_plotlyjs  # late: most of the package does without it

    figures = {
        f"{section.name}-{index}": figure
        for section in sections
        for index, figure in enumerate(section.figures.values())
    }
    library, script = get_plotlyjs(), _asset("page.js")
    page = Template(_asset("page.html")).substitute(
        title=html.escape(title),
        hashes=" ".join(map(_source_hash, (library, script))),
        style=_asset("style.css"),
        body="\n".join(body),
        source_name=source_name,
        source=_json(source),
        figures=_json(figures),
        library=library,
        script=script,
    )
    return page.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text


def _asset(name: str) -> str:
    return (files("neuroal_jax") / "report" / "assets" / name).read_text(encoding="utf-8")


def _source_hash(script: str) -> str:
    """Names a script in the page's security policy: no other one runs."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON that cannot end the script element which holds it."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _section(section: Section) -> str:
    plots = []
    for index, title in enumerate(section.figures):
        heading = f"<h3>{html.escape(title)}</h3>" if title else ""
        label = html.escape(f"Plot: {section.heading} {title}".strip())
        plots.append(
            f'<div>{heading}<div class=plot id="{section.name}-{index}" role=img aria-label="{label}"></div></div>'
        )
    grid = f"<div class=plots>{''.join(plots)}</div>" if plots else ""
    heading, sentence = html.escape(section.heading), html.escape(section.sentence)
    return f'<section id="{section.name}"><h2>{heading}</h2><p>{sentence}</p>{grid}</section>'


def _tiles(facts: Facts) -> str:
    tiles = "".join(
        f"<div class=tile><span>{html.escape(name)}</span><b>{html.escape(value)}</b>"
        f"<span>{html.escape(note)}</span></div>"
        for name, (value, note) in facts.items()
    )
    return f"<div class=tiles>{tiles}</div>"


def _facts(facts: Facts) -> str:
    lines = []
    for name, value in facts.items():
        text, title = value if isinstance(value, tuple) else (value, "")
        hover = f' title="{html.escape(title)}"' if title else ""
        lines.append(f"<tr><th scope=row>{html.escape(name)}</th><td{hover}>{html.escape(text)}</td></tr>")
    return f"<div class=scroll tabindex=0><table class=facts>{''.join(lines)}</table></div>"


def _sortable(rows: Sequence[Mapping[str, Any]], links: Sequence[str | None]) -> str:
    names = columns(rows)
    numeric = {name for name in names if all(_is_number(row.get(name)) or row.get(name) is None for row in rows)}
    heads = "".join(
        f"<th scope=col{' class=number' if name in numeric else ''}>"
        f"<button type=button>{html.escape(name)}</button></th>"
        for name in names
    )
    targets = [*links, *[None] * (len(rows) - len(links))]
    lines = [
        "".join(_cell(name, row.get(name), name in numeric, target if name == names[0] else None) for name in names)
        for row, target in zip(rows, targets, strict=True)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        "<div class=scroll tabindex=0><table class=sortable>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(name: str, value: Any, number: bool, link: str | None) -> str:
    raw = "" if value is None else str(value)
    text = html.escape(f"{value:.6g}" if isinstance(value, float) else raw)
    if link is not None:
        text = f'<a href="./{html.escape(quote(link))}">{text}</a>'
    style = "number" if number else "long bad" if name == "error" else ""
    return f'<td class="{style}" data-value="{html.escape(raw)}">{text}</td>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _method(options: Mapping[str, Any]) -> str:
    parts = [options["pruner"], Path(options["allocation"]).name, options["refine"]]
    return " + ".join(part for part in parts if part != "none")


def _headline(manifest: Mapping[str, Any]) -> Facts:
    sparsity, token_ppl = manifest["sparsity"], manifest["token_ppl"]
    dense, pruned = token_ppl["dense"], token_ppl["pruned"]
    perplexity = ("not measured", "the run had --eval none")
    if dense is not None and pruned is not None:
        perplexity = (f"{dense:.2f} \u2192 {pruned:.2f}", f"dense \u2192 pruned: {pruned / dense:.2f} times")
    return {
        f"token_ppl@{token_ppl['seqlen']}": perplexity,
        "sparsity achieved": (f"{sparsity['achieved']:.6f}", f"{sparsity['requested']:.6g} asked"),
        "zeros": (f"{sparsity['zeros']:,}", f"of {sparsity['prunable']:,} prunable weights"),
        "time": (f"{sum(manifest['seconds'].values()):.1f} s", f"on {manifest['device']}"),
    }


def _key_facts(manifest: Mapping[str, Any]) -> Facts:
    options, hashes, memory = manifest["options"], manifest["hashes"], manifest["memory_bytes"]
    facts: dict[str, Any] = {
        "model": str(options["model"]),
        "pruner": options["pruner"],
        "allocation": options["allocation"],
        "refinement": options["refine"],
        "lambda of the block step": _chosen(manifest["lambda_block"]),
        "lambda of the row step": _chosen(manifest["lambda_row"]),
        "budget": options["budget"],
        "seed": str(options["seed"]),
        "calibration": _windows(manifest["data"]["calib"]),
        "evaluation": "; ".join(map(_windows, manifest["token_ppl"]["texts"].values())) or "none",
    }
    if options["allocation"] == "neuroal":
        facts["sequences of the search"] = str(options["search_samples"])
    if manifest["damping"]:
        facts["damping of the Hessians"] = (
            f"at most {max(x for block in manifest['damping'] for x in block.values()):g}"
        )
    facts |= {"compute dtype": options["dtype"], "device": manifest["device"]}
    facts["memory peak"] = f"host {_mib(memory['host_peak'])}, device {_mib(memory['device_peak'])}"
    for name, value in hashes.items():
        facts[f"SHA-256 of {_HASHED.get(name, name)}"] = "none" if value is None else (value[:_HASH_LENGTH], value)
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return facts


_HASHED = {
    "model": "all weights",
    "prunable": "the prunable weights",
    "config": "config.json",
    "calib": "the calibration's tokens",
    "eval": "the evaluation's tokens",
}


def _chosen(value: float | None) -> str:
    return "not searched" if value is None else f"{value:g}"


def _windows(windows: Mapping[str, Any]) -> str:
    return f"{windows['origin']}: {windows['windows']} sequences of {windows['seqlen']} tokens"


def _mib(size: int | None) -> str:
    return "not reported" if size is None else f"{size / 2**20:.0f} MiB"


def _option(manifest: Mapping[str, Any], name: str) -> str:
    value, asked = manifest["options"][name], manifest["asked"]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text} (asked: {asked[name]})" if name in asked else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error)."""
    parser = Parser(prog="python -m neuroal_jax.report", description="Writes report.html of an earlier run again.")
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="directory with manifest.json and allocation.json")

    def work() -> None:
        run = parser.parse_args(arguments).run
        replace_text(run / REPORT, _read_run(run))
        print(f"written to {run / REPORT}")

    return run_program(work)


def _read_run(run: Path) -> str:
    from neuroal_jax.run import manifest as manifests

    manifest = _read(run / "manifest.json", manifests.FORMAT)
    allocation = _read(run / "allocation.json", allocation_file.FORMAT)
    try:
        return run_report(manifest, allocation)
    except UserError as error:
        raise UserError(f"{run}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{run}: manifest.json or allocation.json is damaged or of another version ({error!r}): "
            "run the pruner again"
        ) from error


def _read(path: Path, expected: str) -> dict[str, Any]:
    try:
        content = read_json(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): name the directory of a finished run") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != expected:
        raise UserError(f"{path}: format is {found!r}, expected {expected!r}")
    return content
