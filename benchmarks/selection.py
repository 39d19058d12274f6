"""Selection of the k smallest scores per row: radix select against jnp.sort, and their equality bit for bit.

python -m benchmarks.selection [--rows 2048] [--width 4096]
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import positive
from neuroal_jax.numerics.selection import Quota, select_smallest


def seconds(function: Callable[..., jax.Array], *args: Any, repeats: int = 5) -> float:
    """The median time of a compiled call."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_program(lambda: bench(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.selection",
        description="Radix select against jnp.sort.",
        examples=("--rows 512 --width 512", "--rows 4096 --width 11008"),
    )
    for name, default, help in (("rows", 2048, "of scores"), ("width", 4096, "scores in a row")):
        text = f"{help} (default: {default})"
        parser.add_argument(f"--{name}", type=partial(positive, name), default=default, metavar="N", help=text)
    return parser


def bench(options: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    scores = np.abs(rng.normal(size=(options.rows, options.width))).astype(np.float32)
    scores[:, ::7] = scores[:, :1]  # ties
    counts = rng.integers(0, options.width + 1, options.rows).astype(np.int32)
    chosen = np.asarray(jax.jit(select_smallest)(scores, Quota(counts)))
    rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    radix = seconds(jax.jit(select_smallest), jnp.asarray(scores), Quota(jnp.asarray(counts)))
    sort = seconds(jax.jit(lambda x: jnp.sort(x, axis=1)), jnp.asarray(scores))
    print(f"equal to the stable sort: {bool((chosen == (rank < counts[:, None])).all())}")
    print(f"radix select: {scores.size / radix / 1e6:.0f} million scores/s")
    print(f"jnp.sort: {scores.size / sort / 1e6:.0f} million scores/s")
    print(f"ratio: {sort / radix:.1f}")
