"""Processes that speak to each other; here they are threads of one."""

import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest

from neuroal_jax.errors import OtherProcessFailed, UserError
from neuroal_jax.machine import processes
from neuroal_jax.machine.group import Group
from neuroal_jax.machine.processes import Link, closing, introduce, linked, read, waiting, write


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def group(size):
    """The processes of a run, of which every rank is given."""
    port = free_port()
    return [Group("localhost", port, size, rank) for rank in range(size)]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 0.5)
    monkeypatch.setattr(processes, "_STRANGER", 0.2)


def test_messages_are_what_was_sent():
    arrays = {"number": np.float64(0.1), "rows": np.arange(6.0)[::2], "none": np.zeros((0, 3), np.int32)}
    stream = io.BytesIO()
    write(stream, {"stage": "Zeile ½", "n": [1, None]}, arrays)
    write(stream, {}, {})
    stream.seek(0)
    facts, found = read(stream)
    assert facts == {"stage": "Zeile ½", "n": [1, None]}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert read(stream) == ({}, {})
    assert read(stream) is None


@pytest.mark.parametrize(
    "content", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(16) + b"x", b"\0" * 7 + b"\2" + b"\0" * 8 + b"[]"]
)
def test_what_is_no_message_is_refused(content):
    with pytest.raises(ValueError):
        read(io.BytesIO(content), limit=1000)


def test_the_first_one_hears_of_all_in_the_order_of_their_ranks():
    ranks = group(3)

    def other(one):
        with linked(one) as link:
            introduce(link, {"--sparsity": 0.5, "rows": (1, 2)}, devices=one.rank * 10)
            asked = link.receive()
            link.send({}, {"twice": 2 * asked.arrays["x"]})
            return link.receive().facts

    with ThreadPoolExecutor(2) as threads:
        others = [threads.submit(other, one) for one in ranks[:0:-1]]
        with waiting(ranks[0]) as first:
            told = first.gather({"--sparsity": 0.5, "rows": (1, 2)})
            assert [of_other["devices"] for of_other in told] == [10, 20]
            for number, link in enumerate(first.links):
                link.send({}, {"x": np.arange(number)})
            found = [link.receive().arrays["twice"].tolist() for link in first.links]
        assert found == [[], [0]]
        assert [other.result() for other in others] == [{"end": True}] * 2


def test_a_stranger_is_dropped_and_one_that_does_not_come_is_named(impatient):
    ranks = group(3)
    with ExitStack() as strangers, waiting(ranks[0]) as first:
        for content in (b"GET / HTTP/1.1\r\n\r\n", b""):  # one speaks another language, one nothing
            stranger = strangers.enter_context(socket.create_connection(("localhost", ranks[0].port)))
            stranger.sendall(content)
        with linked(ranks[2]), pytest.raises(UserError, match="of 3 processes, number 1 did not come"):
            first.gather({})


def test_a_first_process_that_is_not_there_is_named(impatient):
    (_, other) = group(2)
    with pytest.raises(UserError, match=f"process 1 found no first process at localhost:{other.port}"), linked(other):
        pass


def test_a_port_that_is_taken_is_named():
    ranks = group(2)
    with socket.create_server(("127.0.0.1", ranks[0].port)):  # noqa: SIM117 (the outer one does not fail)
        with pytest.raises(UserError, match=f"port {ranks[0].port} cannot be waited at"), waiting(ranks[0]):
            pass


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"--sparsity": 0.6, "--seed": 1}, r"--sparsity is 0.6 in process 1 of 2 \(.*\) and 0.5 in process 0"),
        ({"--sparsity": 0.5}, "--seed is None in process 1"),
        ({"--sparsity": 0.5, "--seed": 1, "--more": 2}, "--more is 2 in process 1 .* and None in process 0"),
    ],
)
def test_processes_that_are_not_alike_end_both(theirs, message):
    ranks = group(2)

    def other():
        with linked(ranks[1]) as link:
            introduce(link, theirs)
            return link.receive()

    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(other)
        with pytest.raises(UserError, match=message), waiting(ranks[0]) as first:
            first.gather({"--sparsity": 0.5, "--seed": 1})
        with pytest.raises(UserError, match=f"process 0: .*{message}"):
            found.result()


@pytest.mark.parametrize(("rank", "size"), [(1, 3), (2, 4), (0, 3), (3, 3)])
def test_a_process_that_is_there_already_or_of_another_group_is_refused(rank, size):
    ranks = group(3)
    expected = f"number {rank} of {size}: expected one of 3 that is not there yet"
    with waiting(ranks[0]) as first, linked(ranks[1]), linked(ranks[2]._replace(rank=rank, processes=size)):  # noqa: SIM117
        with pytest.raises(UserError, match=expected):  # at once, whoever else may come
            first.gather({})


def test_a_process_may_take_its_time_before_it_says_what_it_has(impatient):
    ranks = group(2)
    with waiting(ranks[0]) as first, ThreadPoolExecutor(1) as threads, linked(ranks[1]) as link:
        told = threads.submit(first.gather, {"--seed": 1})
        time.sleep(1)  # more than a stranger has
        introduce(link, {"--seed": 1}, devices=4)
        assert told.result(10) == [{"about": {"--seed": 1}, "devices": 4}]


def test_an_error_of_the_first_is_told_before_it_cleans_up():
    ranks = group(2)
    with waiting(ranks[0]) as first, linked(ranks[1]) as link:
        introduce(link, {})
        first.gather({})
        with pytest.raises(UserError, match="of the first"), first.told():
            raise UserError("of the first")
        with pytest.raises(OtherProcessFailed, match="process 0: of the first"):
            link.receive()


@pytest.fixture
def link(monkeypatch):
    """A link, the other end, and what the program was interrupted with."""
    notes = []
    came = threading.Event()
    monkeypatch.setattr(processes, "interrupt", lambda note, **_: (notes.append((note, _)), came.set()))
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as theirs:
        ours = Link(server.accept()[0], "process 7")
        yield ours, theirs, notes, came
        ours.close()


def test_a_process_that_is_gone_interrupts_whoever_computes(link):
    ours, theirs, notes, came = link
    theirs.close()
    assert came.wait(10)
    assert notes == [("process 7 ended: see what it said", {"at_last": None})]
    with pytest.raises(KeyboardInterrupt, match="process 7 ended"):
        ours.receive()


def test_an_error_of_another_process_interrupts_whoever_computes(link):
    ours, theirs, notes, came = link
    write(theirs.makefile("wb"), {"error": "the disk is full"}, {})
    assert came.wait(10)
    assert notes == [("process 7: the disk is full", {"failed": True, "at_last": None})]
    with pytest.raises(UserError, match="process 7: the disk is full"):
        ours.receive()


def test_a_loss_right_behind_a_message_is_not_missed(link):
    ours, theirs, _, came = link
    found = []

    def wait():
        try:
            found.append(ours.receive())
        except KeyboardInterrupt as error:
            found.append(str(error))

    waits = threading.Thread(target=wait)
    waits.start()
    time.sleep(0.1)
    write(theirs.makefile("wb"), {"scores": 1}, {})
    theirs.close()
    waits.join(10)
    assert found == ["process 7 ended: see what it said"] or came.wait(10)


def test_the_end_of_the_run_interrupts_nobody(link):
    ours, theirs, notes, came = link
    write(theirs.makefile("wb"), {"end": True}, {})
    theirs.close()
    assert ours.receive().facts == {"end": True}
    assert not came.wait(0.3)
    ours.close()
    assert notes == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, {"end": True}),
        (UserError("--x is wrong"), {"error": "--x is wrong"}),
        (OSError(28, "No space left on device", "/out"), {"error": "[Errno 28] No space left on device: '/out'"}),
        (KeyboardInterrupt(), None),
        (ZeroDivisionError("a fault"), None),
    ],
)
def test_whoever_ends_says_why_where_a_user_can_mend_it(link, error, said):
    ours, theirs, _, _ = link
    if error is None:
        with closing(ours):
            pass
    else:
        with pytest.raises(type(error)), closing(ours):
            raise error
    message = read(theirs.makefile("rb"))
    assert (message and message.facts) == said
