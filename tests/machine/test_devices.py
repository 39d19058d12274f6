"""Dividing work over devices; this process has one, taken several times: for more see `tests/walk/test_divided.py`."""

from threading import Barrier

import jax
import jax.numpy as jnp
import pytest

from neuroal_jax.errors import UserError
from neuroal_jax.machine.devices import Devices, devices, one_device


def thrice():
    return Devices(one_device().every * 3)


def test_one_device_moves_nothing():
    tree = {"a": object()}
    alone = one_device()
    assert alone.place(tree, 5) is tree
    assert alone.copies(tree, 3) == [tree]
    assert alone.spread([tree, tree]) == [tree, tree] == alone.gathered([tree, tree])
    assert alone.each(4, lambda part: part * part) == [0, 1, 4, 9]
    assert alone.each(0, lambda part: part) == []


def test_parts_take_turns_at_the_same_time_and_come_back_in_order():
    several, together = thrice(), Barrier(3, timeout=30)

    def work(part):
        if part < 3:
            together.wait()  # for the first part of every device
        return part * part

    assert [several.turn(part) for part in range(5)] == [0, 1, 2, 0, 1]
    assert several.each(7, work) == [part * part for part in range(7)]
    assert several.each(1, lambda part: part) == [0]
    assert several.each(0, lambda part: part) == []


def test_copies_are_no_more_than_devices_or_parts():
    array = jnp.arange(3)
    assert [len(thrice().copies(array, parts)) for parts in (0, 1, 2, 3, 7)] == [1, 1, 2, 3, 3]
    assert len(thrice().spread([array] * 5)) == 5


def test_an_error_of_a_part_ends_the_others():
    done, together = [], Barrier(3, timeout=30)

    def work(part):
        if part < 3:
            together.wait()
        if part == 2:
            raise UserError("of part 2")
        done.append(part)

    with pytest.raises(UserError, match="of part 2"):
        thrice().each(3000, work)
    assert len(done) < 2000  # of the two other devices' parts


def test_devices_are_those_of_the_process():
    assert devices() == Devices(tuple(jax.local_devices())) == devices(1)
    with pytest.raises(UserError, match=r"--devices 5: this process has 1 \(cpu\)"):
        devices(5)
