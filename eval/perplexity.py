"""Token perplexity of a checkpoint, by this project's forward pass or by transformers in PyTorch.

python -m eval.perplexity --model DIR --text FILE [--backend torch]
"""

import sys
from collections.abc import Sequence

import numpy as np

from neuroal_jax.cli import Parser
from neuroal_jax.errors import UserError


def jax_perplexity(model: str, windows: np.ndarray, dtype: str) -> float:
    """`exp(mean over windows of mean next-token loss)`; windows are token ids `[n, seqlen]`."""
    from neuroal_jax.block_ops import Method
    from neuroal_jax.checkpoint import open_checkpoint
    from neuroal_jax.walk import Walk, batch_size

    return Walk(
        open_checkpoint(model), Method("magnitude"), dtype, batch_size(windows.shape[1], len(windows))
    ).perplexity(windows)


def torch_perplexity(model: str, windows: np.ndarray, dtype: str) -> float:
    """The same number from transformers' own model, one window at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    from neuroal_jax.locate import locate

    loaded = AutoModelForCausalLM.from_pretrained(
        locate(model), dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    ).eval()
    losses = []
    with torch.no_grad():
        for window in torch.from_numpy(windows.astype(np.int64)):
            logits = loaded(window[None]).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    return float(np.exp(np.mean(losses)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="python -m eval.perplexity", description="Token perplexity of a checkpoint.")
    parser.add_argument("--model", required=True, help="checkpoint directory, Hub model id, or 'demo'")
    parser.add_argument("--text", required=True, help="wikitext2, c4, ptb, demo, or a file as for --eval of the pruner")
    parser.add_argument("--seqlen", type=positive, default=None, help="tokens per window (default: 2048; 128 for demo)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="compute dtype")
    parser.add_argument("--backend", default="jax", choices=["jax", "torch"], help="whose forward pass")
    try:
        options = parser.parse_args(arguments)
        windows = read_windows(options.model, options.text, options.seqlen)
        measure = jax_perplexity if options.backend == "jax" else torch_perplexity
        value = measure(options.model, windows, options.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"token_ppl@{windows.shape[1]} ({options.text}, {len(windows)} windows, {options.backend}): {value:.4f}")
    return 0


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def read_windows(model: str, text: str, seqlen: int | None) -> np.ndarray:
    """Token ids `[n, seqlen]` of a text under a model's tokenizer."""
    from neuroal_jax.checkpoint import open_checkpoint
    from neuroal_jax.data import reader_for

    return reader_for(open_checkpoint(model), model, seqlen).evaluation(text).ids


if __name__ == "__main__":
    sys.exit(main())
