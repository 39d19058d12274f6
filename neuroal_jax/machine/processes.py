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

from neuroal_jax.errors import OtherProcessFailed, UserError, one_line
from neuroal_jax.machine.group import Group
from neuroal_jax.machine.interrupts import interrupt

_PATIENCE = 110.0  # seconds that processes may start one after the other
_RETRY = 0.2  # seconds
_AT_LAST = 60.0  # seconds that a process which writes nothing may take to end
_STRANGER = 10.0  # seconds in which a connection says who it is
_HELLO_BYTES = 2**20
_LENGTHS = struct.Struct("!QQ")
# A host that is gone without a word is noticed after a minute, whether it was told something or not.
_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}

Arrays = Mapping[str, np.ndarray]


class Message(NamedTuple):
    """What one process tells another."""

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Link:
    """A connection to another process of the run.

    Attributes:
        peer: The other one, by a name for people.
    """

    def __init__(self, connection: socket.socket, peer: str, at_last: float | None = None) -> None:
        """Takes a connection that nobody else reads from; `at_last`: see `interrupt`."""
        self.peer = peer
        self._at_last = at_last
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in _ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._stream = cast(BinaryIO, connection.makefile("rwb"))
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._end: Message | None = None
        self._waits = self._ended = self._over = self._closed = False
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
            OtherProcessFailed: By a user error of its own.
            KeyboardInterrupt: If the other process is gone.
        """
        self._waits = True
        try:
            message = self._messages.get()
        finally:
            self._waits = False
        if self._ended:  # perhaps right behind this message, which the listener then left to be said here
            message = self._end
        if message is None:
            raise KeyboardInterrupt(self._gone())
        if "error" in message.facts:
            raise OtherProcessFailed(f"{self.peer}: {message.facts['error']}")
        return message

    def ignore(self) -> None:
        """From now on the other one's end interrupts nobody: this process is at its own."""
        self._over = True

    def close(self, error: BaseException | None = None) -> None:
        """Ends the connection, and says why: the run is over, or an error of this process. The first call counts."""
        self.ignore()
        if self._closed:
            return
        self._closed = True
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
        while not self._ended:
            try:
                message = read(self._stream)
            except Exception:  # of a connection that is gone, or too little memory for what comes: the end, too
                message = None
            if message is None or not message.facts.keys().isdisjoint({"end", "error"}):
                self._end, self._ended = message, True
            waits = self._waits
            self._messages.put(message)
        if waits or self._over:
            return
        if self._end is None:
            interrupt(self._gone(), at_last=self._at_last)
        elif "error" in self._end.facts:
            interrupt(f"{self.peer}: {self._end.facts['error']}", failed=True, at_last=self._at_last)

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
    sizes = _LENGTHS.unpack(lengths)
    if limit is not None and sum(sizes) > limit:
        raise ValueError("it is no message of this program")
    head, body = (_exactly(stream, size) for size in sizes)
    if head is None or body is None:
        return None
    try:
        facts = dict(json.loads(head))
        return Message(facts, load(body))
    except Exception as error:  # safetensors raises its own
        raise ValueError("it is no message of this program") from error


def _exactly(stream: BinaryIO, size: int) -> bytes | None:
    """So many bytes, of which an unbuffered stream gives some at a time; None where it ends before."""
    parts: list[bytes] = []
    while (missing := size - sum(map(len, parts))) > 0:
        parts.append(stream.read(missing))
        if not parts[-1]:
            return None
    return b"".join(parts)  # of one part, itself


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
            if connection.getsockname() == connection.getpeername():  # with itself, on a port that nobody waits at
                connection.close()
                connection = None
                raise ConnectionRefusedError("nobody waits there")
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                place = f"{group.host}:{group.port}"
                raise UserError(
                    f"--distributed: process {group.rank} found no first process at {place} in {_PATIENCE:.0f} s "
                    f"({getattr(error, 'strerror', None) or error}): start all {group.processes} together, and name "
                    "its host"
                ) from None
            time.sleep(_RETRY)
    with closing(Link(connection, "process 0", at_last=_AT_LAST)) as link:
        link.send({"rank": group.rank, "host": socket.gethostname(), "processes": group.processes})
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
            f"--distributed: port {group.port} cannot be waited at ({error.strerror}): name another one with "
            "HOST:PORT,PROCESSES,RANK"
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

    def gather(self, about: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Waits for the other processes; what each says of itself, see `introduce`, in the order of their ranks.

        Args:
            about: What all processes must have alike, by names for people.

        Raises:
            UserError: If one does not come, or has something else.
        """
        size, found = self._group.processes, dict[int, Link]()
        deadline = time.monotonic() + _PATIENCE
        while len(found) + 1 < size:
            facts, connection = self._accept(deadline, sorted({*range(1, size)} - found.keys()))
            rank, peer = facts["rank"], f"process {facts['rank']} of {size} ({facts['host']})"
            link = self._links.enter_context(closing(Link(connection, peer)))
            if facts["processes"] != size or rank in found or rank not in range(1, size):
                raise UserError(
                    f"--distributed: a process on {facts['host']} is number {rank} of {facts['processes']}: expected "
                    f"one of {size} that is not there yet"
                )
            found[rank] = link
        self._server.close()
        self.links = [found[rank] for rank in sorted(found)]
        ours, told = json.loads(json.dumps(dict(about))), []
        for link in self.links:
            told.append(link.receive().facts)
            _compare(link.peer, told[-1]["about"], ours)
        return told

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the others of an error at once, before whatever else has to be cleaned up after it."""
        try:
            yield
        except BaseException as error:
            for link in self.links:
                link.ignore()
            for link in self.links:
                link.close(error)
            raise

    def _accept(self, deadline: float, missing: Sequence[int]) -> tuple[dict[str, Any], socket.socket]:
        """The next process that says which one it is; others' connections are dropped."""
        while True:
            self._server.settimeout(max(deadline - time.monotonic(), 0.01))
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
                kinds = {"rank": int, "processes": int, "host": str}
                if hello is not None and all(isinstance(hello.facts.get(name), kinds[name]) for name in kinds):
                    return hello.facts, connection
            connection.close()


def introduce(link: Link, about: Mapping[str, Any], **more: Any) -> None:
    """Tells the first process what this one has, and `more`."""
    link.send({"about": dict(about), **more})


def _compare(peer: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises UserError naming the first thing that another process has otherwise."""
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"--distributed: {name} is {theirs.get(name)!r} in {peer} and {ours.get(name)!r} in process 0: start "
                "all processes with the same command, on machines that are alike"
            )
