"""The hooks of mkdocs.yml: notebooks become pages, and pages get the parts that come from the code."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # mkdocs loads this file alone, from anywhere

from docs.hooks import notebook, parts

_OUTPUTS: dict[str, list[str]] = {}  # by page


def on_files(files: Any, config: Any) -> Any:
    """Gives every notebook a page of its name; the notebook stays beside it, to be downloaded."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = _page(file.src_uri)
        text, _OUTPUTS[page] = notebook.page_of(Path(file.abs_src_path))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fills in the parts of a page; links to a notebook lead to its page."""
    text = parts.fill(markdown, page.file.src_uri)
    return re.sub(r"(\]\([^)\s]*)\.ipynb(#[^)]*)?\)", r"\1.md\2)", text)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Puts the outputs of a notebook into its page."""
    return notebook.with_outputs(html, _OUTPUTS.get(page.file.src_uri, []))


def _page(notebook: str) -> str:
    return f"{notebook.removesuffix('.ipynb')}.md"
