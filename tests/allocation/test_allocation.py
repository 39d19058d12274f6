"""The allocation file."""

import json

import numpy as np
import pytest

from neuroal_jax import UserError
from neuroal_jax.allocation import uniform
from neuroal_jax.allocation.allocation import Allocation, mean_sparsity
from neuroal_jax.allocation.file import load_allocation, save_allocation

SHAPES = {"q": (2, 4), "mlp.up": (3, 4)}
NAMES = {f"model.layers.{b}.{linear}.weight": (b, linear) for b in range(2) for linear in SHAPES}


def load(path, content):
    path.write_text(json.dumps(content))
    return load_allocation(path, NAMES, SHAPES, 2)


def test_round_trip_keeps_every_bit(tmp_path):
    allocation = Allocation(
        "neuroal", ({"q": 0.1 + 0.2, "mlp.up": np.array([1 / 3, 0.5, 2 / 3])}, {"q": 0.7, "mlp.up": 0.6})
    )
    save_allocation(tmp_path / "a.json", allocation, NAMES, 0.55)
    read, requested = load_allocation(tmp_path / "a.json", NAMES, SHAPES, 2)
    assert (read.method, requested) == ("neuroal", 0.55)
    assert read.blocks[1] == allocation.blocks[1]
    assert read.blocks[0]["q"] == 0.1 + 0.2
    np.testing.assert_array_equal(read.blocks[0]["mlp.up"], allocation.blocks[0]["mlp.up"])


def test_the_longest_key_of_whole_parts_counts(tmp_path):
    sparsity = {"model": 0.1, "model.layers.1": 0.2, "model.layers.1.mlp": 0.3, "model.layers.0.q.weight": [0.4, 0.5]}
    allocation, requested = load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": sparsity})
    assert requested is None
    assert allocation.blocks[0]["q"].tolist() == [0.4, 0.5]
    assert allocation.blocks[0]["mlp.up"] == 0.1
    assert allocation.blocks[1] == {"q": 0.2, "mlp.up": 0.3}


def test_mean_sparsity_weighs_by_size():
    assert mean_sparsity(uniform.allocation(0.3, list(SHAPES), 2), SHAPES) == pytest.approx(0.3)
    allocation = Allocation("x", ({"q": np.array([0.0, 0.5]), "mlp.up": 1.0},))
    assert mean_sparsity(allocation, SHAPES) == pytest.approx((0.25 * 8 + 12) / 20)


BAD = {
    "uncovered": ({"model.layers.0": 0.5}, r"model\.layers\.1\.q\.weight has no entry"),
    "unknown": ({"model": 0.5, "model.layers.7": 0.5}, r"model\.layers\.7 is no linear or block"),
    "part of a name": ({"model.layers.0": 0.5, "model.layers.1": 0.5, "model.lay": 0.5}, "model.lay is no linear"),
    "rows": ({"model": [0.5]}, "lists 1 rows, expected 2"),
    "above one": ({"model": 1.5}, "is 1.5, expected a number between 0 and 1"),
    "NaN": ({"model": float("nan")}, "NaN is no JSON number"),
    "text": ({"model": "0.5"}, "is '0.5'"),
    "rows of text": ({"model": 0.5, "model.layers.0.q": [0.5, "a"]}, "something other than numbers"),
}


@pytest.mark.parametrize(("sparsity", "message"), BAD.values(), ids=BAD.keys())
def test_bad_entries(tmp_path, sparsity, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": sparsity})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "format is 'list'"),
        ({"format": "x"}, "format is 'x'"),
        ({"format": "neuroal-allocation-1"}, "'sparsity' is missing"),
        ({"format": "neuroal-allocation-1", "sparsity": {"model": 0.5}, "requested": 2}, "'requested' is 2"),
        ({"format": "neuroal-allocation-1", "sparsity": {"model": 0.5}, "method": []}, r"'method' is \[\]"),
    ],
)
def test_bad_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.json", content)


def test_the_borders_are_sparsities_and_the_method_may_be_left_out(tmp_path):
    allocation, _ = load(
        tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": {"model": 0, "model.layers.0": 1}}
    )
    assert allocation.blocks == ({"q": 1.0, "mlp.up": 1.0}, {"q": 0.0, "mlp.up": 0.0})
    assert allocation.method == "file"


@pytest.mark.parametrize("value", [True, None, {}, -0.1, 10**300, [0.5, 1.5], [0.5, True], [0.5, [1]]])
def test_what_is_no_sparsity_is_refused(tmp_path, value):
    sparsity = {"model": 0.5, "model.layers.0.q": value}
    with pytest.raises(UserError, match=r"(fit the model: |as JSON \()model\.layers\.0\.q "):
        load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": sparsity})


def test_several_problems_are_reported_together(tmp_path):
    sparsity = {"model.layers.0": 0.5, "model.layers.1.q": 2, "x": 0.5}
    with pytest.raises(
        UserError, match=r"layers\.1\.q is 2, .*layers\.1\.mlp\.up\.weight has no entry; x is no linear"
    ):
        load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": sparsity})


def test_a_bad_key_is_reported_once(tmp_path):
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": {"model": 2}})
    assert str(caught.value).count("model is 2") == 1


def test_a_key_that_longer_keys_cover_is_accepted(tmp_path):
    sparsity = {"model": 0.1, "model.layers.0": 0.2, "model.layers.1": 0.3}
    allocation, _ = load(tmp_path / "a.json", {"format": "neuroal-allocation-1", "sparsity": sparsity})
    assert allocation.blocks == ({"q": 0.2, "mlp.up": 0.2}, {"q": 0.3, "mlp.up": 0.3})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 5000], ids=range(5))
def test_a_file_that_is_no_json_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        load_allocation(tmp_path / "a.json", NAMES, SHAPES, 2)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="cannot be read as JSON"):
            load_allocation(path, NAMES, SHAPES, 2)
