"""The processes of a run. Quick to import: options name them."""

from typing import NamedTuple


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
