"""Token perplexity of a model, dense or pruned, by this project's forward pass or by transformers in PyTorch.

python -m eval.perplexity --model DIR [--masks FILE] [--text wikitext2,c4,ptb] [--backend torch] [--out FILE]
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, positive, sources
from neuroal_jax.data.texts import PAPER_TEXTS, TEXTS
from neuroal_jax.errors import UserError

if TYPE_CHECKING:
    import torch

    from neuroal_jax.checkpoint.opened import Checkpoint

FORMAT = "neuroal-perplexity-1"
Perplexity = Callable[[np.ndarray], float]  # of windows: token ids [n, seqlen]
_LOGITS = 2**27  # most logits of one call in PyTorch: 512 MiB in fp32


def jax_perplexity(model: str, windows: np.ndarray, dtype: str, masks: Path | None = None) -> float:
    """`exp(mean over windows of mean next-token loss)`; windows are token ids `[n, seqlen]`; errors as `in_jax`."""
    return in_jax(model, dtype, masks)(windows)


def torch_perplexity(model: str, windows: np.ndarray, dtype: str, masks: Path | None = None) -> float:
    """The same number from transformers' own model; errors as `load_in_torch`."""
    return in_torch(model, dtype, masks)(windows)


def in_jax(model: str, dtype: str, masks: Path | None) -> Perplexity:
    """Opens a model once, to measure several texts.

    Raises:
        UserError: If the masks are of another model, or do not hold their result alone.
    """
    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.masks.file import masks_of
    from neuroal_jax.walk.blocks import Blocks
    from neuroal_jax.walk.final import BlockResult
    from neuroal_jax.walk.perplexity import perplexity

    checkpoint = open_checkpoint(model)
    results = None
    if masks is not None:
        packed = masks_of(masks, checkpoint.source, model).packed
        results = [BlockResult({}, {}, {}, {}) for _ in range(checkpoint.num_blocks)]
        for name, (block, linear) in checkpoint.prunable().items():
            results[block].packed[linear] = packed[name]

    def measure(windows: np.ndarray) -> float:
        return perplexity(Blocks(checkpoint, dtype), windows, results)

    return measure


def in_torch(model: str, dtype: str, masks: Path | None) -> Perplexity:
    """Loads a model once, to measure several texts, on a GPU if PyTorch sees one."""
    import torch

    from neuroal_jax.walk.blocks import batch_size

    loaded = load_in_torch(model, dtype, masks)

    def perplexity(windows: np.ndarray) -> float:
        count, seqlen = windows.shape
        batch = max(1, min(batch_size(seqlen, count), _LOGITS // (seqlen * loaded.config.vocab_size)))
        losses = []
        with torch.no_grad():
            for ids in torch.from_numpy(windows.astype(np.int64)).split(batch):
                ids = ids.to(loaded.device)
                losses.append(next_token_losses(loaded(ids).logits, ids).double().mean(dim=1).cpu())
        loss = torch.cat(losses).mean().item()
        if not np.isfinite(loss):
            raise UserError(f"the loss of {model} is {loss} in {dtype}: try --dtype float32, or another checkpoint")
        with np.errstate(over="ignore"):  # as `walk.perplexity`
            return float(np.exp(loss))

    return perplexity


def next_token_losses(logits: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
    """The loss of every token but the first, in nats: logits `[n, t, vocabulary]`, ids `[n, t]`, losses `[n, t - 1]`.

    By `logsumexp`, which adds up in pairs. PyTorch's `cross_entropy` and `log_softmax` add number after number in fp32:
    for large vocabularies that is wrong in the fourth decimal, or in the fifth where the vocabulary is the last axis.
    """
    logits = logits.float()
    chosen = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logits.logsumexp(-1)[:, :-1] - chosen


def load_in_torch(model: str, dtype: str, masks: Path | None = None) -> Any:
    """The model as transformers loads it, pruned by `masks`, on a GPU if PyTorch sees one.

    Raises:
        UserError: If transformers cannot load it, or the masks are not of this model.
    """
    import torch
    from transformers.utils import logging

    from neuroal_jax.checkpoint.hugging_face import load_torch_model
    from neuroal_jax.checkpoint.locate import locate
    from neuroal_jax.checkpoint.safetensors import SafetensorsSource
    from neuroal_jax.masks.file import masks_of

    logging.disable_progress_bar()
    path = locate(model)
    if masks is not None:
        masks_of(masks, SafetensorsSource(path), model)
    try:
        loaded = load_torch_model(path, dtype=getattr(torch, dtype))
    except ValueError as error:
        raise UserError(f"transformers cannot load {model} ({str(error)[:200]})") from error
    if masks is not None:
        import_module("neuroal_jax.convert.masks_to_torch").apply_masks(loaded, masks)
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


BACKENDS = {"jax": in_jax, "torch": in_torch}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run_program(lambda: measure(make_parser().parse_args(arguments)))


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        f"python -m {__name__}",
        description="Token perplexity of a model, dense or pruned.",
        examples=(
            "--model demo --masks run/masks.safetensors",
            "--model pruned --text wikitext2,c4 --dtype bfloat16 --out perplexity.json",
        ),
    )
    parser.add_argument("--model", required=True, help="checkpoint directory, Hub model id, or 'demo'")
    parser.add_argument(
        "--masks", type=partial(path_to, "masks"), help="masks.safetensors of this model: measure it pruned"
    )
    parser.add_argument(
        "--text",
        metavar="LIST",
        help=f"{', '.join(TEXTS)}, or files as for --eval of the pruner; wikitext2=FILE treats a local file as "
        f"the text of that name (default: {','.join(PAPER_TEXTS)}; demo for the demo model)",
    )
    parser.add_argument("--text-column", metavar="NAME", help="column of the text in files, as for the pruner")
    parser.add_argument(
        "--seqlen",
        type=partial(positive, "seqlen"),
        help="tokens per window (default: 2048, or as many as the model takes)",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="compute dtype")
    parser.add_argument("--backend", default="jax", choices=BACKENDS, help="whose forward pass")
    parser.add_argument(
        "--out", type=partial(path_to, "out"), metavar="FILE", help="also write the results here, as JSON"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every text, prints a line for each, and writes what `--out` asks for.

    Raises:
        UserError: If the model, the masks or a text cannot be used, or `--out` not be written.
    """
    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.data.sources import check_text_column, files_of
    from neuroal_jax.files.protection import Inputs
    from neuroal_jax.files.writing import new_json

    texts = sources(options.text or ("demo" if options.model == "demo" else ",".join(PAPER_TEXTS)))
    check_text_column(texts, options.text_column)
    checkpoint = open_checkpoint(options.model)
    inputs = Inputs(("--model", checkpoint.path), ("--masks", options.masks), *files_of("--text", texts))
    with new_json(options.out, format=FORMAT, overwrite=options.overwrite, inputs=inputs) as write:
        result = _measure(options, checkpoint, texts)
        write(result)
    return result


def _measure(options: argparse.Namespace, checkpoint: "Checkpoint", names: list[str]) -> dict[str, Any]:
    from neuroal_jax.data.windows import read_evaluations, reader_for
    from neuroal_jax.run.manifest import describe_windows
    from neuroal_jax.version import RESULT_PACKAGES, versions

    reader = reader_for(checkpoint, options.model, options.seqlen, options.text_column)
    evaluations = read_evaluations(reader, names, "--text")
    perplexity = BACKENDS[options.backend](options.model, options.dtype, options.masks)
    texts: dict[str, Any] = {}
    for name, windows in evaluations.items():
        value = perplexity(windows.ids)
        count, seqlen = windows.ids.shape
        texts[name] = {f"token_ppl@{seqlen}": value, **(describe_windows(windows) or {})}
        print(f"token_ppl@{seqlen} ({windows.origin}, {count} windows, {options.backend}): {value:.4f}", flush=True)
    return {
        "format": FORMAT,
        "model": options.model,
        "masks": None if options.masks is None else str(options.masks),
        "backend": options.backend,
        "dtype": options.dtype,
        "texts": texts,
        "versions": versions(RESULT_PACKAGES),
    }
