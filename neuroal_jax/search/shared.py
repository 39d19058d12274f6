"""Candidates of a stage, divided over several processes: the first one says which, each scores its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuroal_jax.allocation.allocation import Allocation, Sparsity
from neuroal_jax.allocation.problem import Scores
from neuroal_jax.machine.processes import Link

# Of a stage's title, candidates, and how many run together: their scores.
Score = Callable[[str, Sequence[Allocation], int], Scores]


@dataclass(frozen=True)
class Helpers:
    """The other processes of a run, as its first one sees them.

    Attributes:
        links: To each of them.
        devices: How many devices the first one has, and each of them.
    """

    links: Sequence[Link]
    devices: Sequence[int]

    def begin(self, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Tells all what searches have in common."""
        for link in self.links:
            link.send(facts, arrays)

    def score(self, stage: str, candidates: Sequence[Allocation], together: int, here: Score) -> Scores:
        """Scores of all candidates, those of the first process by `here`.

        Candidates that run together are the same as in one process, so that their scores are: the groups go to the
        devices of all processes in turn, and the last group to whoever is next.

        Raises:
            UserError: Which ended another process.
            KeyboardInterrupt: If another process is gone.
        """
        shares = divided(len(candidates), together, self.devices)
        for link, share in zip(self.links, shares[1:], strict=True):
            if share:
                link.send({"stage": stage, "together": together, **_facts(candidates)}, _arrays(candidates, share))
        found = [here(stage, [candidates[number] for number in shares[0]], together)]
        for link, share in zip(self.links, shares[1:], strict=True):
            found += [Scores(**link.receive().arrays)] if share else []
        return _in_order(found, [number for share in shares for number in share])


def help_with(link: Link, here: Score) -> None:
    """Scores what the first process sends, until it says that the run is over."""
    while "end" not in (message := link.receive()).facts:
        facts = message.facts
        candidates = _candidates(facts, message.arrays)
        scores = here(facts["stage"], candidates, facts["together"])
        link.send({}, scores.arrays)


def divided(candidates: int, together: int, devices: Sequence[int]) -> list[list[int]]:
    """The numbers of the candidates that each process scores; there is one process for each of `devices`."""
    turns = [process for process, count in enumerate(devices) for _ in range(count)]
    shares: list[list[int]] = [[] for _ in devices]
    for number in range(candidates):
        shares[turns[number // together % len(turns)]].append(number)
    return shares


def _facts(candidates: Sequence[Allocation]) -> dict[str, Any]:
    """What all of them have; the order of the linears is that in which they are summed up."""
    return {"method": candidates[0].method, "linears": list(candidates[0].blocks[0])}


def _arrays(candidates: Sequence[Allocation], share: Sequence[int]) -> dict[str, np.ndarray]:
    """Sparsities of some candidates, by candidate, block and linear; a number for all rows has no axis."""
    return {
        f"{place}/{block}/{linear}": np.asarray(sparsity, dtype=np.float64)
        for place, number in enumerate(share)
        for block, of_block in enumerate(candidates[number].blocks)
        for linear, sparsity in of_block.items()
    }


def _candidates(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Allocation]:
    """What `_facts` and `_arrays` say."""

    def sparsity(place: int, block: int, linear: str) -> Sparsity:
        found = arrays[f"{place}/{block}/{linear}"]
        return found if found.ndim else float(found)

    places, blocks = (len({name.split("/")[part] for name in arrays}) for part in (0, 1))
    return [
        Allocation(
            facts["method"],
            tuple({name: sparsity(place, block, name) for name in facts["linears"]} for block in range(blocks)),
        )
        for place in range(places)
    ]


def _in_order(found: Sequence[Scores], numbers: Sequence[int]) -> Scores:
    """All scores as one, in the order of the candidates' numbers."""
    order, parts = np.argsort(numbers), [scores.arrays for scores in found]
    return Scores(**{name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]})
