"""Tokens per second of random Llamas, pruned by NeuroAL's allocation and uniformly, as CSR beside dense, in Markdown.

python -m benchmarks.generation [--shapes 2048,4096] [--sparsities 0.5,0.6,0.7,0.8] [--blocks 4] [--new-tokens 32]

Weights do not matter to the speed, zeros and shapes do: the models have a few of a real one's blocks, random weights,
and are pruned by magnitude. What is pruned stays in `--cache`; `eval.generation` measures it anew each time.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.generation import NEW_TOKENS, REPEATS, measure
from eval.loading import quiet
from eval.sweep import process
from eval.table import markdown_lines
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import fraction, path_to, positive, whole
from neuroal_jax.errors import UserError
from neuroal_jax.files.claims import claimed
from neuroal_jax.files.writing import replaced
from neuroal_jax.run.outputs import MANIFEST, MASKS

SHAPES = {"2048": 5632, "4096": 11008}  # hidden and intermediate sizes of Llamas of 1B and 7B
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
ALLOCATIONS = ("uniform", "neuroal")
VOCABULARY, HEAD_SIZE, PROMPT_TOKENS = 32000, 128, 32
CACHE = ".bench/generation"
_CALIBRATION = (8, 32)  # sequences and tokens: of random weights, more tell no more


def make_model(place: Path, hidden: int, intermediate: int, blocks: int, vocabulary: int) -> None:
    """Writes a random Llama in bf16, and random token ids to calibrate with beside it, unless they are there."""
    if (place / "tokens.npy").is_file():
        return
    from benchmarks.search import shape, write_random_llama

    place.mkdir(parents=True, exist_ok=True)
    heads = max(1, hidden // HEAD_SIZE)
    write_random_llama(place, shape(hidden, intermediate, blocks, heads, heads, vocabulary), "bfloat16")
    with replaced(place / "tokens.npy") as whole, whole.open("wb") as file:  # last: where it is, all is
        np.save(file, np.random.default_rng(0).integers(0, vocabulary, _CALIBRATION))


def prune(model: Path, out: Path, allocation: str, sparsity: float) -> None:
    """Prunes by magnitude in a process of its own, unless that was done before.

    Raises:
        UserError: If it fails.
    """
    if (out / MANIFEST).is_file():
        return
    options = {
        "model": model,
        "pruner": "magnitude",
        "allocation": allocation,
        "sparsity": sparsity,
        "calib": model / "tokens.npy",
        "nsamples": _CALIBRATION[0],
        "search-samples": _CALIBRATION[0],
        "seqlen": _CALIBRATION[1],
        "eval": "none",
        "out": out,
    }
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    out.parent.mkdir(parents=True, exist_ok=True)
    error = process(["neuroal_jax.prune", *flags, "--resume"], out.with_name(f"{out.name}.log"))
    if error:
        raise UserError(f"pruning failed ({error}); see {out}.log")


def table(found: Sequence[tuple[str, str, float, Mapping[str, Any]]]) -> list[str]:
    """Lines of Markdown: a row per shape, allocation and sparsity, with what `eval.generation` measured of it."""
    head = ["shape", "allocation", "sparsity", "dense fp32 tok/s", "dense bf16", "pruned dense", "pruned CSR"]
    head += ["CSR / fp32", "in CPU seconds", "CSR / bf16", "prefill CSR / fp32", "fp32 MiB", "CSR MiB"]
    head += ["same tokens", "machine"]
    rows = [[name, allocation, f"{sparsity:g}", *_cells(result)] for name, allocation, sparsity, result in found]
    return markdown_lines(head, rows)


def _cells(result: Mapping[str, Any]) -> list[str]:
    variants = result["variants"]
    rates = [variants[name]["decode"]["tokens_per_second"] for name in ("dense_fp32", "dense_bf16", "control", "csr")]
    fp32, bf16 = (variants["csr"]["ratios"][baseline] for baseline in ("dense_fp32", "dense_bf16"))
    ratios = [fp32["decode"], fp32["decode_cpu"], bf16["decode"], fp32["prefill"]]
    sizes = [variants[name]["bytes"] for name in ("dense_fp32", "csr")]
    return [
        *(f"{rate:.2f}" for rate in rates),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        *(f"{size / 2**20:.0f}" for size in sizes),
        "yes" if result["same_tokens"]["equal"] else "no",
        "shared" if result["unreliable"] else "own",
    ]


def conditions(result: Mapping[str, Any], blocks: int, vocabulary: int) -> str:
    """What the numbers were measured on, and with."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"Random Llamas of {blocks} blocks with a vocabulary of {vocabulary}, which stays dense; "
        f"{result['prompt']['tokens']} prompt tokens, {result['new_tokens']} new ones, medians of {result['repeats']} "
        f"repeats in turns; PyTorch {versions['torch']}, transformers {versions['transformers']}, threads: "
        f"{machine['threads']}, on {machine['cpu']}, {machine['cores']} cores. This is not the paper's engine. Where "
        "the machine was shared, by the signs that `eval.generation` looks for, CPU seconds say more than rates."
    )


def bench(options: argparse.Namespace) -> None:
    """Makes and prunes what is missing, measures all, and prints the table of what was measured.

    Raises:
        UserError: If a shape is unknown, or a run fails.
    """
    unknown = [name for name in options.shapes if name not in SHAPES]
    if unknown:
        raise UserError(f"--shapes {unknown[0]} is unknown: expected one of {', '.join(SHAPES)}")
    options.cache.mkdir(parents=True, exist_ok=True)
    found: list[tuple[str, str, float, Mapping[str, Any]]] = []
    with claimed(options.cache, "--cache"):
        quiet()
        try:
            for name in options.shapes:
                place = options.cache / f"llama-{name}-{options.blocks}-{options.vocabulary}"
                make_model(place / "model", int(name), SHAPES[name], options.blocks, options.vocabulary)
                for sparsity in options.sparsities:
                    for allocation in options.allocations:
                        out = place / f"{allocation}-{sparsity:g}"
                        prune(place / "model", out, allocation, sparsity)
                        result = measure(
                            str(place / "model"),
                            masks=out / MASKS,
                            prompt_tokens=PROMPT_TOKENS,
                            new_tokens=options.new_tokens,
                            repeats=options.repeats,
                            threads=options.threads,
                        )
                        found.append((f"{name}/{SHAPES[name]}", allocation, sparsity, result))
                        reasons = "; ".join(result["unreliable"])
                        print(f"{name} {allocation} {sparsity:g}: {reasons or 'measured'}", flush=True)
        finally:
            if found:
                print("\n".join(["", *table(found), "", conditions(found[0][3], options.blocks, options.vocabulary)]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error, 130 interrupted)."""
    stopped = "interrupted: what was pruned stays; the same command measures it"
    return run_program(lambda: bench(make_parser().parse_args(arguments)), interrupted=stopped)


def make_parser() -> Parser:
    parser = Parser(
        "python -m benchmarks.generation",
        description="Tokens per second of CSR.",
        examples=("--shapes 2048 --sparsities 0.7 --blocks 2", "--shapes 2048,4096 --allocations uniform --threads 2"),
    )
    add = parser.add_argument
    add("--shapes", type=_names, default=[*SHAPES], metavar="LIST", help=f"hidden sizes (default: {','.join(SHAPES)})")
    add("--sparsities", type=_fractions, default=SPARSITIES, metavar="LIST", help="(default: 0.5,0.6,0.7,0.8)")
    add("--allocations", type=_names, default=ALLOCATIONS, metavar="LIST", help="(default: uniform,neuroal)")
    add("--blocks", type=partial(positive, "blocks"), default=4, metavar="N", help="of each model (default: 4)")
    add(
        "--vocabulary",
        type=partial(positive, "vocabulary"),
        default=VOCABULARY,
        metavar="N",
        help=f"of each model: its dense head is more of a few blocks' work than of many (default: {VOCABULARY})",
    )
    add("--new-tokens", type=partial(whole, "new_tokens", low=2), default=NEW_TOKENS, metavar="N")
    add("--repeats", type=partial(positive, "repeats"), default=REPEATS, metavar="N")
    add("--threads", type=partial(positive, "threads"), metavar="N", help="of PyTorch (default: its own choice)")
    add("--cache", type=partial(path_to, "cache"), default=Path(CACHE), metavar="DIR", help=f"(default: {CACHE})")
    return parser


def _names(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _fractions(text: str) -> list[float]:
    return [fraction("sparsities", item) for item in _names(text)]
