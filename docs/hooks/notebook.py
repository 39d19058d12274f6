"""The tutorial as a page: its notebook's cells as Markdown, with their outputs where it was executed."""

import html
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

EXECUTE = "NEUROAL_DOCS_EXECUTE"  # set to 1: notebooks are executed, for minutes, and their outputs are shown
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def page_of(path: Path) -> tuple[str, list[str]]:
    """A notebook as Markdown, and the HTML that belongs where this says `output(0)`, `output(1)` and so on.

    Raises:
        RuntimeError: If it is executed and a cell fails.
    """
    notebook = _executed(path) if os.environ.get(EXECUTE) == "1" else json.loads(path.read_text())
    blocks: list[str] = []
    outputs: list[str] = []
    for cell in notebook["cells"]:
        source = _text(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            blocks.append(source)
        elif cell["cell_type"] == "code" and source:
            blocks.append(f"```python\n{source}\n```")
            for shown in cell["outputs"]:
                outputs.append(_shown(shown))
                blocks.append(f"output({len(outputs) - 1})")
    return "\n\n".join(blocks), outputs


def with_outputs(page: str, outputs: list[str]) -> str:
    """The HTML of a page with the outputs in their places."""
    return re.sub(r"<p>output\((\d+)\)</p>", lambda found: outputs[int(found[1])], page)


def _executed(path: Path) -> dict[str, Any]:
    """A notebook with what its cells give, run in an empty folder that goes away again."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    return dict(notebook)


def _shown(output: dict[str, Any]) -> str:
    """An output of a cell as HTML: what is richest of what it offers."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in ("text/html", "image/svg+xml"):
        if kind in data:
            return f'<div class="notebook-output">{_text(data[kind])}</div>'
    if "image/png" in data:
        picture = _text(data["image/png"]).replace("\n", "")
        return f'<div class="notebook-output"><img alt="a plot" src="data:image/png;base64,{picture}"></div>'
    text = html.escape(_COLOURS.sub("", _text(data.get("text/plain", ""))).rstrip())
    return f'<div class="notebook-output"><pre><code>{text}</code></pre></div>'


def _text(value: str | list[str]) -> str:
    """A notebook keeps text as one string, or line by line."""
    return value if isinstance(value, str) else "".join(value)
