"""Tidies files before a commit, for `.pre-commit-config.yaml`: fails if it changed one, or one is too large.

.venv/bin/python .ci/tidy.py FILE ...
"""

import json
import re
import sys
from pathlib import Path

LARGEST = 2 * 10**6  # bytes; the demo's weights fit
TEXTS = {".cff", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
GIVEN = ("neuroal_jax/demo/", "tests/data/")  # whose bytes are recorded elsewhere


def tidied(name: str, content: bytes) -> bytes:
    """A notebook without outputs, or a text of ours without blanks at ends of lines; anything else as it is."""
    if name.endswith(".ipynb"):
        return without_outputs(content)
    ours = Path(name).suffix in TEXTS and not name.startswith(GIVEN)
    return re.sub(rb"[ \t]+$", b"", content, flags=re.MULTILINE) if ours else content


def without_outputs(content: bytes) -> bytes:
    """A notebook's JSON, the same bytes if there is nothing to remove."""
    notebook = json.loads(content)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if not any(cell.get("outputs") or cell.get("execution_count") for cell in code):
        return content
    for cell in code:
        cell.update(outputs=[], execution_count=None)
    return (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode()


def main(names: list[str]) -> int:
    """Tidies files; returns 1 if one was not as it should be."""
    wrong = 0
    for path in map(Path, names):
        content = path.read_bytes()
        tidy = tidied(path.as_posix(), content)
        if len(tidy) > LARGEST:
            print(f"{path} has {len(tidy)} bytes, expected at most {LARGEST}: keep it elsewhere")
        elif tidy != content:
            path.write_bytes(tidy)
            print(f"{path} was tidied: add it again")
        wrong += tidy != content or len(tidy) > LARGEST
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
