"""From seconds to tokens per second: medians, spreads, ratios, and what speaks against them. Imports no PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

NARROW, SPARSE, LONG = 1024, 0.6, 128  # inputs of a linear, share of zeros, rows of a prompt
LEAST_USE = 0.8  # share of its threads' time that a decode on a machine of its own uses
MOST_SPREAD = 0.2  # from the shortest to the longest repeat, as a share of the median
SLACK = 0.5  # of the load average


@dataclass(frozen=True)
class Seconds:
    """Wall and CPU seconds; the latter of all threads of the process."""

    wall: float
    cpu: float

    def __sub__(self, earlier: "Seconds") -> "Seconds":
        return Seconds(self.wall - earlier.wall, self.cpu - earlier.cpu)


def phase(tokens: int, seconds: Sequence[Seconds]) -> dict[str, Any]:
    """The figures of a phase of generation, prefill or decode.

    Args:
        tokens: How many it reads or makes, each time.
        seconds: Of its repeats.
    """
    clocks = {"wall": [each.wall for each in seconds], "cpu": [each.cpu for each in seconds]}
    figures: dict[str, Any] = {"tokens": tokens}
    for clock, values in clocks.items():
        middle = median(values)
        spread = (max(values) - min(values)) / middle if middle else 0.0
        figures[clock] = {"seconds": values, "median": middle, "spread": spread}
    return {**figures, "tokens_per_second": tokens / figures["wall"]["median"]}


def ratios(variants: Mapping[str, Mapping[str, Any]], name: str, baselines: Sequence[str]) -> dict[str, Any]:
    """How many times as quick a variant is as each baseline, in wall seconds, and in the decode's CPU seconds too."""
    own = variants[name]
    return {
        baseline: {
            "prefill": own["prefill"]["tokens_per_second"] / variants[baseline]["prefill"]["tokens_per_second"],
            "decode": own["decode"]["tokens_per_second"] / variants[baseline]["decode"]["tokens_per_second"],
            "decode_cpu": _quotient(variants[baseline]["decode"]["cpu"]["median"], own["decode"]["cpu"]["median"]),
        }
        for baseline in baselines
    }


def _quotient(dividend: float, divisor: float) -> float | None:
    return dividend / divisor if divisor else None  # a clock may be too coarse for what a tiny model takes


def unreliable(
    variants: Mapping[str, Mapping[str, Any]], threads: int, cores: int, load: float | None, *, on_cpu: bool = True
) -> list[str]:
    """Why the figures may be those of a machine that did other work, too; empty if nothing says so.

    Two signs count, each by itself:

    - the decode that used most of its threads' time used less than `LEAST_USE` of it (on a CPU);
    - wall or CPU seconds of a decode differ by more than `MOST_SPREAD` between repeats.

    With one of these, a load average at the start beyond what this program's threads or the other cores would make is
    told too: alone it may be of what this program did the minute before.

    Args:
        variants: Their figures.
        threads: Of PyTorch.
        cores: That the process may use.
        load: The load average; None where the system has none.
        on_cpu: Whether the models run on the CPU.
    """
    reasons = []
    decodes = {name: variant["decode"] for name, variant in variants.items()}
    used = max(decode["cpu"]["median"] / decode["wall"]["median"] for decode in decodes.values())
    if on_cpu and used < LEAST_USE * threads:
        reasons.append(
            f"no decode used more than {used:.2f} of {threads} threads: they waited for other programs, or the model "
            "is too small for so many"
        )
    for name, decode in decodes.items():
        wall, cpu = decode["wall"]["spread"], decode["cpu"]["spread"]
        if wall > MOST_SPREAD and cpu <= MOST_SPREAD:
            reasons.append(f"{name}: wall seconds differ by {wall:.0%}, CPU seconds by {cpu:.0%}: it had to wait")
        elif on_cpu and cpu > MOST_SPREAD:
            reasons.append(f"{name}: CPU seconds differ by {cpu:.0%} between repeats: the machine's speed changed")
    expected = max(threads, cores - threads) + SLACK
    if reasons and load is not None and load > expected:
        reasons.append(f"the load average was {load:.2f} at the start, beyond {expected:g}: other programs ran")
    return reasons


def warnings_of(
    widths: Sequence[int], sparsity: float, prompt_tokens: int, variants: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What a reader of the figures on a CPU should know.

    Args:
        widths: Number of inputs of each pruned linear.
        sparsity: Share of zeros in them.
        prompt_tokens: Rows of the prefill.
        variants: Their figures, `csr` and `dense_bf16` among them.
    """
    found = []
    narrow = [width for width in widths if width < NARROW]
    if narrow:
        found.append(
            f"{len(narrow)} of {len(widths)} linears have fewer than {NARROW} inputs (the narrowest {min(narrow)}): "
            "there a product takes less time than what is around it"
        )
    if sparsity < SPARSE:
        found.append(f"the sparsity is {sparsity:.3f}: below {SPARSE}, indices cost CSR more than zeros save")
    if prompt_tokens >= LONG:
        found.append(f"the prompt has {prompt_tokens} rows: from {LONG} on, dense products are quicker than CSR's")
    rates = {name: variants[name]["decode"]["tokens_per_second"] for name in ("csr", "dense_bf16")}
    if rates["dense_bf16"] > rates["csr"]:
        found.append(
            "the dense model in bf16 decodes faster than the pruned one as CSR here: "
            f"{rates['dense_bf16']:.2f} tokens a second, not {rates['csr']:.2f}"
        )
    return found
