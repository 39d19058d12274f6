"""Runs pages' blocks as a reader would, each page in a folder of its own; prints what went wrong, as JSON by page.

One process runs all of them: libraries are imported and programs compiled once. Only what needs a shell has one.
Prune runs are small: they get few sequences and candidates beside their own flags.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from docs.hooks.programs import PROGRAMS

SMALL = ["--nsamples", "4", "--search-samples", "2", "--block-lambdas", "0.05,0.1", "--row-lambdas", "0.1,0.2"]


def run_page(page, blocks):
    """Runs the blocks of a page in the current folder; Python's share their names."""
    names = {"__name__": "__main__"}
    for language, line, code in blocks:
        if language == "python":
            exec(compile(code, f"{page}:{line}", "exec"), names)
        else:
            for command in code.splitlines():
                print(f"{page}:{line}: {command}", flush=True)
                run_line(command)


def run_line(line):
    """Runs a line of shell: a program of this project here, anything else in a shell."""
    words = shlex.split(line, comments=True)
    plain = not any(set(word) & set("|&;<>") for word in words)
    if plain and words[:2] == ["python", "-m"] and words[2] in PROGRAMS:
        small = SMALL if words[2] in ("neuroal_jax.prune", "eval.sweep") else []
        try:
            code = import_module(PROGRAMS[words[2]]).main([*words[3:], *small])
        except SystemExit as end:  # of --help
            code = end.code
        assert not code, f"exit code {code}: {line}"
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)


def main():
    failed, root, output = {}, Path.cwd(), sys.stdout
    for page, blocks in json.load(sys.stdin).items():
        folder = root / page.replace("/", "-")
        folder.mkdir()
        os.chdir(folder)
        began, said = time.monotonic(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                run_page(page, blocks)
        except Exception:
            failed[page] = f"{said.getvalue()[-2000:]}\n{traceback.format_exc()}"
        print(f"{page}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(failed), file=output)


if __name__ == "__main__":
    main()
