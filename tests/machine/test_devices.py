"""Dividing work over devices; this process has one: see `tests/walk/test_divided.py` for several."""

import jax
import pytest

from neuroal_jax.errors import UserError
from neuroal_jax.machine.devices import Devices, devices, one_device


class Fake:
    """Stands for a device that work is only counted for."""


def test_one_device_moves_nothing():
    tree = {"a": object()}
    alone = one_device()
    assert alone.place(tree, 5) is tree
    assert alone.copies(tree, 3) == [tree]
    assert alone.spread([tree, tree]) == [tree, tree] == alone.gathered([tree, tree])
    assert alone.each(4, lambda part: part * part) == [0, 1, 4, 9]
    assert alone.each(0, lambda part: part) == []


def test_parts_take_turns_and_copies_are_no_more_than_parts():
    several = Devices((Fake(), Fake(), Fake()))
    assert [several.turn(part) for part in range(5)] == [0, 1, 2, 0, 1]
    assert devices() == Devices(tuple(jax.local_devices())) == devices(1)


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(UserError, match=r"--devices 5: this process has 1 \(cpu\)"):
        devices(5)
