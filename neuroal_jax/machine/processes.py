"""Several processes of one run: the first one runs it, the others compute what it asks them for.

Each speaks to the first over TCP, in JSON and arrays: nothing of what comes in is executed. Whoever ends, however that
comes about, closes the connection, which ends the others: a run never waits for a process that is gone.
"""

import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from safetensors.numpy import load, save

from neuroal_jax.errors import UserError, one_line
from neuroal_jax.machine.interrupts import interrupt

_PATIENCE = 110.0  # seconds that processes may start one after the other
_RETRY = 0.2  # seconds
_STRANGER = 10.0  # seconds in which a connection says who it is
_HELLO_BYTES = 2**20
_LENGTHS = struct.Struct("!QQ")
# A host that is gone without a word is noticed after a minute, whether it was told something or not.
_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}

Arrays = Mapping[str, np.ndarray]


class Group(NamedTuple):
    """The processes of a run, and which of them this is.

    Attributes:
        host: Of the first one.
        port: On which it waits for the others.
        processes: How many they are.
        rank: Number of this one.
    """

    host: str
    port: int
    processes: int
    rank: int


class Message(NamedTuple):
    """What one process tells another."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Link:
    """A connection to another process of the run.

    Attributes:
        peer: The other one, by a name for people.
    """

    def __init__(self, connection: socket.socket, peer: str) -> None:
        """Takes a connection that nobody else reads from."""
        self.peer = peer
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in _ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._stream = cast(BinaryIO, connection.makefile("rwb"))
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._waits = self._over = False
        self._thread = threading.Thread(target=self._listen, name=f"from {peer}", daemon=True)
        self._thread.start()

    def send(self, facts: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Sends a message; raises KeyboardInterrupt if the other process is gone."""
        try:
            write(self._stream, facts, arrays or {})
        except OSError:
            raise KeyboardInterrupt(self._gone()) from None

    def receive(self) -> Message:
        """The next message.

        Raises:
            UserError: Which ended the other process.
            KeyboardInterrupt: If the other process is gone.
        """
        self._waits = True
        try:
            message = self._messages.get()
        finally:
            self._waits = False
        if message is None:
            raise KeyboardInterrupt(self._gone())
        if "error" in message.facts:
            raise UserError(f"{self.peer}: {message.facts['error']}")
        return message

    def close(self, error: BaseException | None = None) -> None:
        """Ends the connection, and says why: the run is over, or an error of this process."""
        self._over = True
        with suppress(OSError, ValueError):
            if error is None or isinstance(error, UserError | OSError):
                write(self._stream, {"end": True} if error is None else {"error": one_line(str(error))}, {})
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(_STRANGER)  # which the end of the stream ends
        with suppress(OSError, ValueError):
            self._stream.close()
        self._connection.close()

    def _listen(self) -> None:
        """Queues what comes in; interrupts the program where it does not wait for what ends it."""
        ended = False
        while not ended:
            try:
                message = read(self._stream)
            except (OSError, ValueError):
                message = None
            ended = message is None or not message.facts.keys().isdisjoint({"end", "error"})
            waits = self._waits
            self._messages.put(message)
            if ended and not waits and not self._over and (message is None or "error" in message.facts):
                interrupt(self._gone() if message is None else f"{self.peer}: {message.facts['error']}")

    def _gone(self) -> str:
        return f"{self.peer} ended: see what it said"


def write(stream: BinaryIO, facts: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes a message."""
    head, body = json.dumps(dict(facts)).encode(), save({name: np.asarray(x, order="C") for name, x in arrays.items()})
    stream.write(_LENGTHS.pack(len(head), len(body)))
    stream.write(head)
    stream.write(body)
    stream.flush()


def read(stream: BinaryIO, limit: int | None = None) -> Message | None:
    """The next message, of at most `limit` bytes; None where the stream ends. Raises ValueError if it is none."""
    lengths = _exactly(stream, _LENGTHS.size)
    if lengths is None:
        return None
    head, body = _LENGTHS.unpack(lengths)
    if limit is not None and head + body > limit:
        raise ValueError("it is no message of this program")
    content = _exactly(stream, head + body)
    if content is None:
        return None
    facts = json.loads(content[:head])
    if not isinstance(facts, dict):
        raise ValueError("it is no message of this program")
    try:
        return Message(facts, load(content[head:]))
    except Exception as error:  # safetensors raises its own
        raise ValueError("it is no message of this program") from error


def _exactly(stream: BinaryIO, size: int) -> bytes | None:
    """So many bytes, of which an unbuffered stream gives some at a time; None where it ends before."""
    content = bytearray()
    while len(content) < size:
        part = stream.read(size - len(content))
        if not part:
            return None
        content += part
    return bytes(content)


@contextmanager
def linked(group: Group) -> Iterator[Link]:
    """The connection of another process to the first one.

    Raises:
        UserError: If the first one cannot be reached.
    """
    deadline, connection = time.monotonic() + _PATIENCE, None
    while connection is None:
        try:
            connection = socket.create_connection((group.host, group.port), timeout=_STRANGER)
        except OSError as error:
            if time.monotonic() > deadline:
                place = f"{group.host}:{group.port}"
                raise UserError(
                    f"--distributed: process {group.rank} found no first process at {place} in {_PATIENCE:.0f} s "
                    f"({error.strerror or error}): start all {group.processes} together, and name its host"
                ) from None
            time.sleep(_RETRY)
    with closing(Link(connection, "process 0")) as link:
        yield link


@contextmanager
def closing(link: Link) -> Iterator[Link]:
    """Closes a link in the end, with what ended this process."""
    try:
        yield link
    except BaseException as error:
        link.close(error)
        raise
    link.close()


@contextmanager
def waiting(group: Group) -> Iterator["Waiting"]:
    """The first process, for which the others are waiting from now on.

    Raises:
        UserError: If there is no such place to wait at.
    """
    at_home = group.host in ("localhost", "127.0.0.1")
    try:
        server = socket.create_server(("127.0.0.1" if at_home else "", group.port), backlog=group.processes)
    except OSError as error:
        raise UserError(
            f"--distributed: port {group.port} cannot be waited at ({error.strerror}): choose another one"
        ) from None
    with server, ExitStack() as links:
        yield Waiting(server, group, links)


class Waiting:
    """The first process of a group.

    Attributes:
        links: To the others, in the order of their ranks, once they are gathered.
    """

    links: Sequence[Link] = ()

    def __init__(self, server: socket.socket, group: Group, links: ExitStack) -> None:
        """Takes a place to wait at; `links` are closed in the end."""
        self._server, self._group, self._links = server, group, links
        self._deadline = time.monotonic() + _PATIENCE

    def gather(self, about: Mapping[str, Any]) -> list[Message]:
        """Waits for the other processes; what each says of itself, see `introduce`, in the order of their ranks.

        Args:
            about: What all processes must have alike, by names for people.

        Raises:
            UserError: If one does not come, or has something else.
        """
        found: dict[int, tuple[Message, Link]] = {}
        while len(found) + 1 < self._group.processes:
            hello, connection = self._accept(sorted({*range(1, self._group.processes)} - found.keys()))
            rank = hello.facts["rank"]
            peer = f"process {rank} of {self._group.processes} ({hello.facts['host']})"
            link = self._links.enter_context(closing(Link(connection, peer)))
            if rank in found or not 0 < rank < self._group.processes:
                raise UserError(f"--distributed: {peer} has a number that another one has, or that there is not")
            _compare(peer, hello.facts["about"], json.loads(json.dumps(dict(about))))
            found[rank] = (hello, link)
        self._server.close()
        ranks = sorted(found)
        self.links = [found[rank][1] for rank in ranks]
        return [found[rank][0] for rank in ranks]

    def _accept(self, missing: Sequence[int]) -> tuple[Message, socket.socket]:
        """The next process that says which one it is; others' connections are dropped."""
        while True:
            self._server.settimeout(max(self._deadline - time.monotonic(), 0.01))
            try:
                connection = self._server.accept()[0]
            except TimeoutError:
                raise UserError(
                    f"--distributed: of {self._group.processes} processes, number {', '.join(map(str, missing))} did "
                    f"not come in {_PATIENCE:.0f} s: start all of them together"
                ) from None
            connection.settimeout(_STRANGER)
            with suppress(OSError, ValueError), connection.makefile("rb", buffering=0) as stream:
                hello = read(cast(BinaryIO, stream), _HELLO_BYTES)
                if hello is not None and {"rank", "host", "about"} <= hello.facts.keys():
                    return hello, connection
                if hello is not None and "error" in hello.facts:
                    raise UserError(f"another process: {hello.facts['error']}")
            connection.close()


def introduce(link: Link, group: Group, about: Mapping[str, Any], **more: Any) -> None:
    """Tells the first process which one this is, what it has, and `more`."""
    link.send({"rank": group.rank, "host": socket.gethostname(), "about": dict(about), **more})


def _compare(peer: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError naming the first thing that another process has otherwise."""
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"--distributed: {name} is {theirs.get(name)!r} in {peer} and {ours.get(name)!r} in process 0: start "
                "all processes with the same command, on machines that are alike"
            )
