"""Tokens per second of a pruned model: greedy generation through transformers and PyTorch, dense models beside it.

python -m eval.generation --model DENSE --masks OUT/masks.safetensors --out OUT/generation.json
python -m eval.generation --model DENSE --pruned DIR --threads 8 --prompt-file FILE

Measured in turns: dense in fp32 and in bf16, the pruned model as dense tensors (`control`), and its linears as CSR
matrices. On a GPU (`--backend cuda`) 2:4 takes the place of CSR. This is PyTorch as everyone has it, not the engine of
the paper.
"""

from neuroal_jax.command.process import as_process

if __name__ == "__main__":
    as_process(__spec__.name)  # before the imports that take a moment

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.command.parser import Parser
from neuroal_jax.command.program import run_program
from neuroal_jax.command.values import path_to, positive, whole
from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import Inputs
from neuroal_jax.files.writing import new_json
from neuroal_jax.machine.processor import load_average, processor_name, usable_cores
from neuroal_jax.masks.file import kept_sha256, masks_of
from neuroal_jax.report.generation import FORMAT, GENERATION
from neuroal_jax.version import versions

from . import rates
from .loading import add_models, files_of_models, quiet
from .prompts import make_prompt
from .text import aligned

if TYPE_CHECKING:
    import torch

    from .decoding import Generated

BACKENDS = ("cpu", "cuda")
NEW_TOKENS, REPEATS = 32, 5


def measure(
    model: str,
    *,
    masks: Path | None = None,
    pruned: str | None = None,
    backend: str = "cpu",
    prompt: str | None = None,
    prompt_file: Path | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measures how many tokens a second a dense and a pruned model read and generate.

    Args:
        model: Directory, Hub id or `demo`: the dense model.
        masks: `masks.safetensors`: the pruned model is the dense one with these applied in memory.
        pruned: Directory or Hub id of the pruned model, instead of masks.
        backend: `cpu`: CSR; `cuda`: 2:4.
        prompt: Text to start from; None: a sentence in English.
        prompt_file: A file with that text.
        prompt_tokens: Or so many random token ids, which need no tokenizer.
        new_tokens: How many are generated, always all of them, at least 2: the prompt's pass gives the first.
        repeats: Of every variant, after one that is not counted.
        threads: Of PyTorch; None: as many as it takes by itself.

    Returns:
        What docs/reference/file-formats.md lists under "generation.json".

    Raises:
        UserError: If an option, the prompt, the masks or a model is not what is needed.
    """
    if masks is not None and pruned is not None:
        raise UserError("--masks and --pruned both name the pruned model: pass one of them")
    if masks is None and pruned is None:
        raise UserError("the pruned model is missing: pass --masks or --pruned")
    if new_tokens < 2:
        raise UserError(f"--new-tokens is {new_tokens}, expected at least 2: the prompt's pass gives the first")
    load = load_average()  # before anything here adds to it
    dense_path, pruned_path = locate(model), None if pruned is None else locate(pruned, "--pruned")
    source = SafetensorsSource(dense_path)  # here and below: refuses a checkpoint without safetensors before all work
    if pruned_path is not None:
        SafetensorsSource(pruned_path)
    packed = None if masks is None else masks_of(masks, source, model)
    try:
        import torch

        from . import decoding, variants
    except ImportError as error:
        raise UserError(f"PyTorch is not installed ({error}): pip install 'neuroal-jax[eval]'") from error
    start = make_prompt(dense_path, model, new_tokens, text=prompt, file=prompt_file, tokens=prompt_tokens)
    build = variants.on_cpu if backend == "cpu" else variants.on_cuda
    found = build(dense_path, model, variants.Pruned(pruned or model, pruned_path, masks))
    ids = torch.tensor([start.ids], device=backend)
    pair = ("control", found.sparse)
    with decoding.threads_of_torch(threads) as used_threads:
        generations = decoding.in_turns(found.models, ids, new_tokens, repeats)
        difference = decoding.first_difference(*pair, found.models, ids, generations)
    figures = {name: _figures(found.models[name], generations[name], len(start.ids)) for name in found.models}
    sparsity = found.zeros / found.weights
    on_cpu = backend == "cpu"
    return {
        "format": FORMAT,
        "model": model,
        "pruned": pruned,
        "masks": None if packed is None else {"file": str(masks), "source": packed.source},
        "backend": backend,
        "prompt": {"origin": start.origin, "tokens": len(start.ids), "sha256": start.sha256},
        "new_tokens": new_tokens,
        "repeats": repeats,
        "kept_sha256": kept_sha256(found.kept if packed is None else packed.packed),
        "sparsity": {"zeros": found.zeros, "weights": found.weights, "achieved": sparsity},
        "variants": {
            name: {**figures[name], "ratios": rates.ratios(figures, name, found.baselines)} for name in figures
        },
        "same_tokens": {"variants": [*pair], "equal": difference is None, "first_difference": difference},
        "warnings": rates.warnings_of(found.widths, sparsity, len(start.ids), figures) if on_cpu else [],
        "unreliable": rates.unreliable(figures, used_threads, usable_cores(), load, on_cpu=on_cpu),
        "machine": {
            "cpu": processor_name(),
            "gpu": None if on_cpu else torch.cuda.get_device_name(),
            "cores": usable_cores(),
            "threads": used_threads,
            "load_average": {"start": load, "end": load_average()},
            "torch_config": torch.__config__.show(),
        },
        "versions": versions(("torch", "transformers")),
    }


def _figures(model: "torch.nn.Module", generations: "Sequence[Generated]", prompt_tokens: int) -> dict[str, Any]:
    """What is told of one variant, but its ratios."""
    from .sparse_linear import stored_bytes

    tokens = list(generations[-1].tokens)
    return {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bytes": stored_bytes(model),
        "prefill": rates.phase(prompt_tokens, [each.prefill for each in generations]),
        "decode": rates.phase(len(tokens) - 1, [each.decode for each in generations]),
        "tokens": tokens,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people: a line per variant, and what is to be said of them."""
    variants = result["variants"]
    baselines = list(next(iter(variants.values()))["ratios"])
    head = ["variant", "prefill tok/s", "decode tok/s", "spread", "decode CPU s"]
    lines = [[*head, *(f"decode / {name} (CPU)" for name in baselines), "MiB"]]
    for name, variant in variants.items():
        decode = variant["decode"]
        lines.append(
            [
                name,
                f"{variant['prefill']['tokens_per_second']:.2f}",
                f"{decode['tokens_per_second']:.2f}",
                f"{decode['wall']['spread']:.0%}",
                f"{decode['cpu']['median']:.3f}",
                *(_ratio(variant["ratios"][baseline]) for baseline in baselines),
                f"{variant['bytes'] / 2**20:.1f}",
            ]
        )
    return "\n".join([aligned(lines), *_sentences(result)])


def _ratio(ratios: Mapping[str, float | None]) -> str:
    cpu = ratios["decode_cpu"]
    return f"{ratios['decode']:.2f} ({'-' if cpu is None else f'{cpu:.2f}'})"


def _sentences(result: Mapping[str, Any]) -> list[str]:
    """How it was measured, whether tokens are the same, and what to be careful with."""
    machine, same = result["machine"], result["same_tokens"]
    first = (
        f"{result['prompt']['tokens']} prompt tokens, always {result['new_tokens']} new ones (none ends the text); "
        f"medians of {result['repeats']} repeats in turns; {result['sparsity']['achieved']:.4f} of the linears' "
        f"weights are zero; threads: {machine['threads']}, on {machine['gpu'] or machine['cpu']}"
    )
    names = " and ".join(same["variants"])
    difference = same["first_difference"]
    tokens = f"{names} generate the same tokens"
    if difference is not None:
        of_each = "; ".join(
            f"{name}: {difference[name]['token']}, logits "
            + ", ".join(f"{token}: {logit:.6g}" for token, logit in difference[name]["logits"].items())
            for name in same["variants"]
        )
        tokens = f"{names} differ from new token {difference['position']} on ({of_each})"
    cautions = [f"warning: {text}" for text in result["warnings"]]
    return [first, tokens, *cautions, *(f"unreliable: {text}" for text in result["unreliable"])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 user error, 130 interrupted)."""
    return run_program(lambda: _run(vars(make_parser().parse_args(arguments))))


def _run(options: dict[str, Any]) -> None:
    out, overwrite = options.pop("out"), options.pop("overwrite")
    models = files_of_models(options["model"], options["pruned"], options["masks"])
    inputs = Inputs(*models, ("--prompt-file", options["prompt_file"]))
    with new_json(out, format=FORMAT, overwrite=overwrite, inputs=inputs) as write:
        quiet()
        result = measure(**options)
        print(table(result))
        write(result)
    if out is not None:
        print(f"written to {out}")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        f"python -m {__name__}",
        examples=(
            "--model demo --masks run/masks.safetensors --out run/generation.json",
            "--model meta-llama/Llama-2-7b-hf --pruned pruned --threads 8 --new-tokens 64",
        ),
        description="Tokens per second of a pruned model, with dense ones beside it.",
    )
    add_models(parser)
    add = parser.add_argument
    add("--backend", default="cpu", choices=BACKENDS, help="cpu: CSR in fp32; cuda: 2:4 in 16 bits (default: cpu)")
    add("--prompt", metavar="TEXT", help="what generation starts from (default: a sentence in English)")
    add("--prompt-file", type=partial(path_to, "prompt_file"), metavar="FILE", help="a file with the prompt's text")
    add(
        "--prompt-tokens",
        type=partial(positive, "prompt_tokens"),
        metavar="N",
        help="N random tokens as prompt, for models without a tokenizer",
    )
    add(
        "--new-tokens",
        type=partial(whole, "new_tokens", low=2),
        default=NEW_TOKENS,
        metavar="N",
        help=f"tokens to generate, always all of them (default: {NEW_TOKENS})",
    )
    add(
        "--repeats",
        type=partial(positive, "repeats"),
        default=REPEATS,
        metavar="N",
        help=f"of every variant (default: {REPEATS})",
    )
    add("--threads", type=partial(positive, "threads"), metavar="N", help="of PyTorch (default: its own choice)")
    add(
        "--out",
        type=partial(path_to, "out"),
        metavar="FILE",
        help=f"JSON file to write; the report of a run shows {GENERATION} in its directory",
    )
    add("--overwrite", action="store_true", help="replace a file that --out names")
    return parser
