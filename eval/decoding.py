"""Greedy generation with a key-value cache, step by step, with its wall and CPU seconds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

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
    """Every model's generations: one after the other in every round, so that a machine that drifts is fair to all."""
    found: dict[str, list[Generated]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            found[name].append(generate(model, prompt, new_tokens))
    return found


def _now(device: torch.device) -> Seconds:
    """The clocks, once the device has done what it was given; the process's counts the seconds of all threads."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())
