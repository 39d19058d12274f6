"""What a fixed list of runs writes, as SHA-256: two versions of this project that print the same write the same bytes.

python -m benchmarks.bytes --model DIR --tokens FILE.npz [--only TEXT]

The list: the embedded demo and the model given, every pruner on every allocation and refinement, exact and reference.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import neuroal_jax
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program

PRUNERS = ("magnitude", "wanda", "multiflow", "sparsegpt")
TOP_UPS = {
    "uniform": {"allocation": "uniform"},
    "owl": {"allocation": "owl"},
    "alpha": {"allocation": "alpha"},
    "neuroal": {"allocation": "neuroal"},
    "dsnot": {"allocation": "uniform", "refine": "dsnot", "dsnot_cycles": 20},
}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def hashes(options: dict[str, Any]) -> str:
    """One line: digests of the masks, the allocation, the scores and the saved weights; or why there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        try:
            manifest = neuroal_jax.prune(neuroal_jax.PruneConfig(**options, sparsity=0.7, out=str(out))).manifest
        except neuroal_jax.UserError as error:
            return f"refused: {digest(str(error).encode())}"
        found = {name: digest((out / name).read_bytes()) for name in ("masks.safetensors", "allocation.json")}
        found["scores"] = digest(json.dumps([manifest["scores"], manifest["token_ppl"]["pruned"]]).encode())
        saved = sorted((out / "model").glob("*.safetensors"))
        found |= {"weights": digest(b"".join(path.read_bytes() for path in saved))} if saved else {}
        return " ".join(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_program(lambda: bench(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.bytes",
        description="SHA-256 of what a fixed list of runs writes.",
        examples=("--model DIR --tokens tokens.npz", "--model DIR --tokens tokens.npz --only 'demo wanda'"),
    )
    parser.add_argument("--model", required=True, help="a checkpoint directory beside the demo")
    parser.add_argument("--tokens", required=True, help="its token file, with `calibration` and `evaluation`")
    parser.add_argument("--only", default="", help="runs whose name holds this text")
    return parser


def bench(options: argparse.Namespace) -> None:
    logging.getLogger("neuroal_jax").setLevel(logging.WARNING)
    models = {
        "demo": {"model": "demo", "nsamples": 32},
        Path(options.model).name: {"model": options.model, "calib": options.tokens, "eval": options.tokens},
    }
    for model, pruner, top_up, budget in product(models, PRUNERS, TOP_UPS, ("exact", "reference")):
        name = f"{model} {pruner} {top_up} {budget}"
        if options.only in name and (pruner, top_up) != ("sparsegpt", "dsnot"):
            print(
                f"{name}: {hashes({**models[model], **TOP_UPS[top_up], 'pruner': pruner, 'budget': budget})}",
                flush=True,
            )
