"""What the machine's memory is asked and told."""

import ctypes
import threading
import time

import pytest

from neuroal_jax.machine import memory


class Library:
    """A C library that remembers what it was set to."""

    def __init__(self):
        self.values, self.trimmed = {}, 0

    def mallopt(self, parameter, value):
        self.values[parameter] = value
        time.sleep(0)  # lets another thread go on, if it can

    def malloc_trim(self, pad):
        self.trimmed += 1


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library


def test_freed_memory_is_kept_until_the_last_of_several_runs_ends(library):
    first_may_end, first_ended = threading.Event(), threading.Event()

    def first():
        with memory.freed_memory_kept():
            assert first_may_end.wait(60)
        first_ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    with pytest.raises(KeyError), memory.freed_memory_kept():
        first_may_end.set()
        assert first_ended.wait(60)
        assert library.values == memory._KEPT
        assert library.trimmed == 0
        raise KeyError
    thread.join()
    assert library.values == memory._DEFAULTS
    assert library.trimmed == 1
    with memory.freed_memory_kept():
        assert library.values == memory._KEPT
    assert library.values == memory._DEFAULTS


def test_each_of_many_runs_at_a_time_is_counted(library):
    def run():
        for _ in range(200):
            with memory.freed_memory_kept():
                kept.append(dict(library.values) == memory._KEPT)

    kept = []
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(kept)
    assert library.values == memory._DEFAULTS


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with memory.freed_memory_kept():
        pass
