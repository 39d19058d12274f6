"""Candidates that several processes score together."""

import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuroal_jax.allocation.allocation import Allocation
from neuroal_jax.allocation.problem import Scores
from neuroal_jax.errors import UserError
from neuroal_jax.machine.processes import Link
from neuroal_jax.search.shared import Helpers, divided, help_with


@given(st.integers(1, 40), st.integers(1, 7), st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_every_candidate_is_scored_once_in_the_groups_of_one_process(candidates, together, devices):
    shares = divided(candidates, together, devices)
    assert len(shares) == len(devices)
    assert sorted(number for share in shares for number in share) == list(range(candidates))
    for share in shares:
        groups = [share[first : first + together] for first in range(0, len(share), together)]
        for group in groups:
            assert group[0] % together == 0
            assert group == list(range(group[0], min(group[0] + together, candidates)))
    most = [-(-len(share) // together) / count for share, count in zip(shares, devices, strict=True)]
    assert max(map(np.ceil, most)) == np.ceil(-(-candidates // together) / sum(devices))  # as many rounds as must be


def linked_pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        other = socket.create_connection(server.getsockname())
        return Link(server.accept()[0], "process 1"), Link(other, "process 0")


def candidates(count):
    """Of two blocks; numbers for all rows and rows of their own, in an order that is not the alphabet's."""
    draw = np.random.default_rng(0)
    return [
        Allocation("of a test", tuple({"z": float(draw.random()), "a": draw.random(3)} for _ in range(2)))
        for _ in range(count)
    ]


def by_linear(stage, found, together):
    """Scores that tell candidates, blocks, the order of linears, and what each process was asked, apart."""
    assert (stage, together) == ("block step", 2)
    sums = [
        [[np.sum(s) * (1 + number) for number, s in enumerate(block.values())] for block in candidate.blocks]
        for candidate in found
    ]
    return Scores(of_linears=np.array(sums))


def by_sequence(stage, found, together):
    return Scores(of_sequences=np.array([[c.blocks[0]["z"], c.blocks[1]["z"]] for c in found]))


@pytest.mark.parametrize("score", [by_linear, by_sequence])
@pytest.mark.parametrize("count", [2, 7])  # of two, the other process has none
def test_scores_are_those_of_one_process(score, count):
    ours, theirs = linked_pair()
    expected = score("block step", candidates(count), 2)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(help_with, theirs, score)
        for _ in range(2):  # stages
            found = Helpers([ours], [1, 2]).score("block step", candidates(count), 2, score)
            for name in ("of_linears", "of_sequences"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        ours.close()
        other.result()
    theirs.close()


def test_an_error_of_the_other_process_is_this_ones():
    ours, theirs = linked_pair()
    theirs.close(UserError("block 1: the activations of q are not finite"))
    with pytest.raises(UserError, match="process 1: block 1: the activations of q are not finite"):
        Helpers([ours], [1, 1]).score("block step", candidates(4), 1, lambda *_: by_sequence(*_))
    ours.close()
