"""Runs the blocks of a page in the current folder, as a reader would: Python's share their names."""

import json
import subprocess
import sys

if __name__ == "__main__":
    page, names = sys.argv[1], {"__name__": "__main__"}
    for language, line, code in json.load(sys.stdin):
        print(f"--- {page}:{line}", flush=True)
        if language == "python":
            exec(compile(code, f"{page}:{line}", "exec"), names)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
