"""What the text of README.md and docs/ says of the repository: links, paths, options."""

import ast
import json
import re
import subprocess
import sys

import pytest

from docs.hooks import house, parts, programs
from docs.hooks.imports import ENGINE, MODULES, folder
from neuroal_jax.command.config import all_options
from neuroal_jax.command.values import flag
from tests.docs.pages import PAGES, ROOT, name, prose

TEXTS = [*PAGES, *(ROOT / file for file in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
FOLDERS = ("neuroal_jax", "convert", "eval", "tests", "benchmarks", "docs", ".github", ".ci")


def anchors(path):
    """The anchors of a Markdown file's headings, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.+?) *$", prose(path.read_text()), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()) for heading in headings]
    return {slug.replace(" ", "-") for slug in slugs}


@pytest.mark.parametrize("text", [text for text in TEXTS if text.parent == ROOT], ids=name)
def test_every_link_of_the_repository_s_own_pages_leads_somewhere(text):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose(text.read_text())):
        file, _, anchor = target.partition("#")
        path = ROOT / file if file else text
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("text", TEXTS, ids=name)
def test_every_path_of_the_repository_in_the_text_exists(text):
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(text.read_text())):
        if re.fullmatch(r"\.?\w[\w.-]*(/[\w.-]+)*/?", span) and span.partition("/")[0] in FOLDERS and "/" in span:
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"[\w/]+\.py", span):
            assert (ROOT / span).exists() or any(str(path).endswith(f"/{span}") for path in MODULES.values()), span


def test_the_command_line_page_has_every_option_once():
    page = programs.options_page()
    for option in all_options():
        assert page.count(f"| `{flag(option.name)}`{{ #") == 1, option.name
    assert len(re.findall(r"^\| `--", page, re.MULTILINE)) == len(all_options())
    others = programs.programs_page()
    for module in programs.PROGRAMS:
        assert module == programs.PRUNE or programs.flags_of(programs.parser_of(module)) <= {
            *re.findall(r"--?[a-z][\w-]*", others)
        }


def test_the_house_has_every_room_and_its_arrows_make_every_import():
    found, picture = house.edges(), house.picture()
    for room in {folder(module) for module in MODULES} - {"neuroal_jax"}:
        assert f">{room}</text>" in picture
    down = house.reduced(found)
    assert {("walk", "resume"), ("files", "machine")} <= down and ("prune", "errors") not in down
    assert house.reduced({("a", "b"), ("b", "c"), ("a", "c")}) == {("a", "b"), ("b", "c")}


def test_parts_are_filled_in_or_refused_by_name():
    assert "Added" in parts.fill("a\n<!-- part: changelog -->\nb", "changelog.md")
    assert "| folder of" in parts.fill("<!-- part: section The house -->", "develop/house.md")
    with pytest.raises(ValueError, match="no part 'nothing'"):
        parts.fill("<!-- part: nothing -->", "x.md")
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        parts.fill("<!-- part: section Nothing -->", "x.md")


def test_links_of_included_text_lead_to_pages_or_become_words():
    text = "[a](CHANGELOG.md) [b](SECURITY.md#x) [c](docs/install.md#y) [d](https://x.y) [e](#z)"
    assert parts.linked(text, "develop/x.md") == "[a](../changelog.md) b [c](../install.md#y) [d](https://x.y) [e](#z)"


def test_the_reference_has_every_public_name_once():
    import neuroal_jax

    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    named = re.findall(r"^::: [\w.]+\.(\w+)$", parts.fill(page, "reference/python.md"), re.MULTILINE)
    assert sorted(named) == sorted({*neuroal_jax.__all__, *parts.public_names()})


def test_the_reference_is_made_without_jax():
    code = (
        "import sys; from docs.hooks import house, parts, programs; programs.options_page(); programs.programs_page(); "
        "house.picture(); print([name for name in ('jax', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path, monkeypatch):
    from docs.hooks import notebook

    monkeypatch.delenv(notebook.EXECUTE, raising=False)
    outputs = [
        {"output_type": "stream", "text": ["1 < 2\n"]},
        {"output_type": "display_data", "data": {"text/plain": "x", "text/html": ["<b>", "bold</b>"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "print('1 < 2')", "outputs": outputs},
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    text, shown = notebook.page_of(tmp_path / "x.ipynb")
    assert text == "# Title\ntext\n\n```python\nprint('1 < 2')\n```\n\noutput(0)\n\noutput(1)"
    page = notebook.with_outputs("<p>output(0)</p>\n<p>output(1)</p>", shown)
    assert "1 &lt; 2</code>" in page and "<b>bold</b>" in page and "output(" not in page


def said(paths):
    """All pieces of text in the code, in which messages are found."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


NOT_OURS = {
    "unrecognized arguments",
    "the following arguments are required",
    "No space left on device",
}  # of argparse, and of the system
MESSAGES = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "reference" / "errors.md").read_text(), re.MULTILINE)


def test_the_errors_that_the_reference_explains_are_what_programs_say():
    code = said([*ENGINE, *(ROOT / "convert").glob("*.py"), *(ROOT / "eval").glob("*.py")])
    missing = []
    for message in (span for cell in MESSAGES for span in re.findall(r"`([^`]+)`", cell)):
        pieces = re.split(r"\.\.\.|\b[A-Z]+\b|'[^']*'|--[\w-]+|\b\d[\w.:]*|[():;?]", message)
        longest = max(pieces, key=len).strip(" ,.")
        if longest not in code and longest not in NOT_OURS:
            missing.append(longest)
    assert len(MESSAGES) > 40 and missing == []
