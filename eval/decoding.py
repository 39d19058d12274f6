"""Greedy generation with a key-value cache, step by step, with its wall and CPU seconds."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neuroal_jax.errors import UserError

from .rates import Seconds


@dataclass(frozen=True)
class Generated:
    """What a model made of a prompt.

    Attributes:
        tokens: The new tokens. The prompt's forward pass gives the first, each later pass one more.
        prefill: Of the prompt's forward pass.
        decode: Of all later ones.
        logits: `[vocabulary]`, of which the last new token has the highest.
    """

    tokens: tuple[int, ...]
    prefill: Seconds
    decode: Seconds
    logits: torch.Tensor


@torch.inference_mode()
def generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> Generated:
    """Generates exactly so many tokens, the likeliest one each time, whether or not one of them ends a text.

    Args:
        model: A causal language model of transformers.
        prompt: Token ids `[1, length]`, on the model's device.
        new_tokens: At least 1.
    """
    begun = _now(prompt.device)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(dim=-1)  # [1, 1]
    tokens = [int(token)]
    filled = _now(prompt.device)
    while len(tokens) < new_tokens:
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(dim=-1)
        tokens.append(int(token))
    return Generated(tuple(tokens), filled - begun, _now(prompt.device) - filled, out.logits[0, -1])


def in_turns(
    models: Mapping[str, nn.Module], prompt: torch.Tensor, new_tokens: int, repeats: int
) -> dict[str, list[Generated]]:
    """Every model's generations: one after the other in every round, so that a machine that drifts is fair to all.

    A first round, which finds memory and caches cold, is not counted.

    Raises:
        UserError: If a model computes no numbers.
    """
    found: dict[str, list[Generated]] = {name: [] for name in models}
    for _ in range(1 + repeats):
        for name, model in models.items():
            found[name].append(generate(model, prompt, new_tokens))
    for name, (cold, *_) in found.items():
        if not cold.logits.isfinite().all():
            raise UserError(f"{name} gives logits that are NaN or infinite: check the perplexity of the model")
    return {name: counted for name, (_, *counted) in found.items()}


def first_difference(
    ours: str,
    theirs: str,
    models: Mapping[str, nn.Module],
    prompt: torch.Tensor,
    generations: Mapping[str, Sequence[Generated]],
) -> dict[str, Any] | None:
    """The first new token in which two models differ in their last generation; None where there is none.

    Returns:
        Its `position` (0: the first new one) and, by model, the `token` and the `logits` of both tokens there.
    """
    pairs = list(zip(*(generations[name][-1].tokens for name in (ours, theirs)), strict=True))
    position = next((place for place, (one, other) in enumerate(pairs) if one != other), None)
    if position is None:
        return None
    described: dict[str, Any] = {"position": position}
    for name, token in zip((ours, theirs), pairs[position], strict=True):
        logits = generate(models[name], prompt, position + 1).logits
        described[name] = {"token": token, "logits": {str(each): float(logits[each]) for each in pairs[position]}}
    return described


@contextmanager
def threads_of_torch(number: int | None) -> Iterator[int]:
    """Has PyTorch use so many threads meanwhile (None: as many as before); yields how many these are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _now(device: torch.device) -> Seconds:
    """The clocks, once the device has done what it was given; the process's counts the seconds of all threads."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())
