"""Tokens per second of a sweep's models, each measured once by a process of its own."""

from pathlib import Path
from typing import Any

from neuroal_jax.command.values import boolean
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import number, read_json
from neuroal_jax.report.generation import FORMAT, GENERATION, is_of_run
from neuroal_jax.report.page import rewrite_report

from .accuracy import Start, log_for
from .generation import NEW_TOKENS, REPEATS
from .grid import Run

OPTION = "generation"
PROMPT_TOKENS = 32  # random ones: models without a tokenizer are measured too, and all alike
_MOST_BYTES = 2**28  # more than any file of them has


def take_generation(values: dict[str, Any]) -> bool:
    """Takes out of a sweep's values whether generation is measured; raises UserError if it says neither yes nor no."""
    value = values.pop(OPTION, None)
    return value is not None and boolean(OPTION, value)


def speeds(run: Run, out: Path, start: Start) -> dict[str, Any]:
    """Columns of a finished run's generation, measured if it is not yet; `error` if it cannot be."""
    place = out / run.name / GENERATION
    found, error = measured(place, run), ""
    if found is None:
        error = start(["neuroal_jax.eval.generation", *_arguments(run, place)], log_for(place, out))
        found = measured(place, run)
        if found is not None:
            try:
                rewrite_report(place.parent)
            except UserError as problem:
                return {**found, "error": str(problem)}
    return {"error": f"generation: {error}"} if found is None else found


def _arguments(run: Run, place: Path) -> list[str]:
    masks = ["--masks", str(place.parent / "masks.safetensors")]
    pruned = ["--pruned", str(run.config.model_directory)] if run.config.updates_weights else masks
    settings = {"prompt-tokens": PROMPT_TOKENS, "new-tokens": NEW_TOKENS, "repeats": REPEATS}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["--model", run.config.model, *pruned, *options, "--out", str(place), "--overwrite"]


def measured(path: Path, run: Run) -> dict[str, Any] | None:
    """The columns of a file of `eval.generation`; None if there is none, or something else was measured."""
    asked = (FORMAT, run.config.model, "cpu", "prompt-tokens", PROMPT_TOKENS, NEW_TOKENS, REPEATS)
    try:
        found = read_json(path, _MOST_BYTES)
        prompt, csr = found["prompt"], found["variants"]["csr"]
        settings = (found["format"], found["model"], found["backend"], prompt["origin"], prompt["tokens"])
        columns = {
            "decode_tokens_per_second": round(number(csr["decode"]["tokens_per_second"]), 2),
            "decode_vs_dense_fp32": round(number(csr["ratios"]["dense_fp32"]["decode"]), 3),
            "decode_reliable": "no" if found["unreliable"] else "yes",
        }
        same = (*settings, found["new_tokens"], found["repeats"]) == asked and is_of_run(found, path.parent)
        return columns if same else None
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
