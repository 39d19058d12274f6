"""lm-eval's model for transformers, and one run of lm-eval: what it says, in this project's words."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.huggingface import HFLM

from neuroal_jax.checkpoint.hugging_face import load_tokenizer
from neuroal_jax.errors import UserError

from .loading import cannot_load, load_checked


class CheckedLM(HFLM):
    """lm-eval's model, which counts the prompts that it truncates and refuses likelihoods that are no numbers.

    Of a batch it has the head compute no logits before the first choice: most tokens are of prompts, and the head of a
    large vocabulary is most of a small model's work.

    Attributes:
        truncated: Number of requests (prompt and choice) so far that did not fit the model's context.
    """

    truncated = 0
    _first_logit: Mapping[tuple[int, ...], int] = {}  # see `first_logits`; 0 where none stands

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for (_, choice), _, choice_ids in requests:
            if len(choice_ids) > self.max_length:
                raise UserError(
                    f"the choice {choice[:60]!r}... has {len(choice_ids)} tokens, more than the model's context of "
                    f"{self.max_length}, and lm-eval does not truncate choices: leave its task out"
                )
        self._first_logit = first_logits([(prompt, choice) for _, prompt, choice in requests], self.max_length)
        self.truncated += sum(len(prompt) + len(choice) > self.max_length + 1 for _, prompt, choice in requests)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        lost = sum(not math.isfinite(loglikelihood) for loglikelihood, _ in scores)
        if lost:
            raise UserError(
                f"the model gives {lost} of {len(scores)} choices a log-likelihood that is NaN or infinite: "
                "try --dtype float32, and check the model's perplexity"
            )
        return scores

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of the last positions; lm-eval counts positions from the end."""
        first = min(self._first_logit.get(_without_padding(row), 0) for row in inps.tolist())
        if args or kwargs or not first or "logits_to_keep" not in signature(self.model.forward).parameters:
            return super()._model_call(inps, *args, **kwargs)
        with torch.no_grad():
            logits: torch.Tensor = self.model(inps, logits_to_keep=inps.shape[1] - first).logits
        return logits


def first_logits(requests: Sequence[tuple[list[int], list[int]]], context: int) -> dict[tuple[int, ...], int]:
    """Of prompts and choices in token ids, by what a model reads: the first position whose logits a choice needs."""
    found: dict[tuple[int, ...], int] = {}
    for prompt, choice in requests:
        read = (prompt + choice)[-(context + 1) : -1]
        first, key = len(read) - len(choice), _without_padding(read)
        found[key] = min(first, found.get(key, first))
    return found


def _without_padding(tokens: Sequence[int]) -> tuple[int, ...]:
    """What a model reads, whether or not lm-eval has filled it up (with zeros, on the right)."""
    end = len(tokens)
    while end and tokens[end - 1] == 0:
        end -= 1
    return tuple(tokens[:end])


def load_model(path: Path, name: str, dtype: str, device: str, batch_size: int | str) -> CheckedLM:
    """A checkpoint in PyTorch with its tokenizer; no file of it but safetensors holds weights, and none runs code.

    Args:
        path: Directory of the checkpoint.
        name: What the user calls it.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own.
        device: As PyTorch names it.
        batch_size: Requests at a time, or `auto`: as many as fit.

    Raises:
        UserError: If transformers cannot load it, or finds weights missing.
    """
    model = load_checked(path, name, dtype, device)
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise cannot_load(name, device, error) from error
    return CheckedLM(model, tokenizer=tokenizer, batch_size=batch_size)


def run(model: CheckedLM, tasks: Mapping[str, Task], limit: int | None) -> dict[str, dict[str, Any]]:
    """Runs lm-eval on tasks; per task `metrics`, `n`, `num_fewshot`, `version`, `rows_sha256` and `items`.

    `metrics` has every metric of the task and its `_stderr` (null where lm-eval gives none). `items` has a list of one
    value per row for every metric, and `predicted`: the choice with the highest log-likelihood.

    Raises:
        UserError: If lm-eval cannot finish.
    """
    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    try:
        with torch.no_grad():
            found = lm_eval.evaluate(lm=model, task_dict={"tasks": dict(tasks)}, limit=limit, log_samples=True)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError("the device's memory is full: pass a smaller --batch-size") from error
    except Exception as error:  # of the tasks' own programs, which may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"lm-eval failed ({type(error).__name__}: {reason})") from error
    return {name: _describe(name, task, found) for name, task in tasks.items()}


def _describe(name: str, task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    samples = found["samples"][name]
    metrics = {key.removesuffix(",none"): value for key, value in found["results"][name].items() if "," in key}
    items = {metric: [sample[metric] for sample in samples if metric in sample] for metric in samples[0]["metrics"]}
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = ([score for score, _ in sample["filtered_resps"]] for sample in samples)
        items["predicted"] = [scores.index(max(scores)) for scores in likelihoods]
    return {
        "version": found["versions"][name],
        "n": found["n-samples"][name]["effective"],
        "num_fewshot": found["n-shot"][name],
        "rows_sha256": hashlib.sha256("\n".join(sample["doc_hash"] for sample in samples).encode()).hexdigest(),
        "metrics": {metric: _number(value) for metric, value in metrics.items()},
        "items": items,
    }


def _number(value: Any) -> float | None:
    """A metric's value; None for lm-eval's "N/A" and NaN."""
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None
