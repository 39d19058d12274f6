"""Plans for models and devices that are not here, from configs and headers alone."""

import json
import math
import struct

import pytest

import neuroal_jax
from neuroal_jax.errors import UserError
from neuroal_jax.models import family_of
from neuroal_jax.models.causal_lm import abstract_params
from neuroal_jax.models.family import expand
from neuroal_jax.walk.search import candidates_together

# Llama's hidden and intermediate sizes, blocks, heads, key heads.
SHAPES = {"7b": (4096, 11008, 32, 32, 32), "70b": (8192, 28672, 80, 64, 8), "405b": (16384, 53248, 126, 128, 8)}


def save_header(directory, name):
    """A checkpoint in bfloat16 whose file is a header and a hole."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32000}
    config |= dict(zip(names, SHAPES[name], strict=True))
    (directory / "config.json").write_text(json.dumps(config))
    family = family_of(config)
    parsed = family.parse_config(config)
    shapes, header, end = abstract_params(family, parsed), {}, 0
    for tensor, (rule, _) in expand(family.rules(parsed), parsed.num_hidden_layers).items():
        size = shapes[rule.flax].shape[::-1] if rule.transpose else shapes[rule.flax].shape
        begin, end = end, end + 2 * math.prod(size)
        header[tensor] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return directory


def plan(model, **options):
    config = {"model": str(model), "sparsity": 0.7, "dry_run": True, "eval": "none", "calib": "demo", "seqlen": 2048}
    return neuroal_jax.prune(neuroal_jax.PruneConfig(**{**config, **options})).plan


def test_devices_that_are_not_here_share_candidates_and_sequences(tmp_path):
    model = save_header(tmp_path, "7b")
    one, eight = (plan(model, devices=devices, device_memory="80GiB") for devices in (1, 8))
    assert (one.devices, eight.devices) == (1, 8)
    assert eight.candidate_batch == 2  # 13 and 14 candidates
    assert eight.device_peak < 0.6 * one.device_peak
    assert one.device_available == eight.device_available == 80 * 2**30
    fitted = [plan(model, devices=n, device_memory="80GiB", refine="refit", allocation="uniform") for n in (1, 8)]
    assert fitted[0].device_peak == fitted[1].device_peak  # all sequences are on the first


def test_a_70b_model_needs_no_divided_weights(tmp_path):
    model = save_header(tmp_path, "70b")
    assert plan(model, devices=8, device_memory="80GiB").device_peak < 40 * 2**30
    assert plan(model, devices=8, device_memory="80GiB", pruner="sparsegpt").device_peak < 68 * 2**30


def test_what_a_device_cannot_hold_is_refused(tmp_path):
    model = save_header(tmp_path, "405b")
    assert plan(model, devices=8, device_memory="80GiB").device_peak < 80 * 2**30
    with pytest.raises(UserError, match=r"a device needs \d+\.\d GiB by estimate and has 80\.0 GiB"):
        plan(model, devices=8, device_memory="80GiB", pruner="sparsegpt")


@pytest.mark.parametrize("value", ["80", "80 GiB", "80GiB", "0.5MB", 2**20])
def test_memory_has_a_unit(value):
    sizes = {"80": 80, "80 GiB": 80 * 2**30, "80GiB": 80 * 2**30, "0.5MB": 500_000}
    config = neuroal_jax.PruneConfig(model="demo", sparsity=0.5, dry_run=True, device_memory=value)
    assert config.device_memory == sizes.get(value, value)


@pytest.mark.parametrize("option", [{"device_memory": "80 apples"}, {"device_memory": -1}, {"devices": 0}])
def test_bad_devices_are_named(option):
    (name,) = option
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is "):
        neuroal_jax.PruneConfig(model="demo", sparsity=0.5, dry_run=True, **option)


def test_a_plan_for_other_devices_is_no_run(tmp_path):
    with pytest.raises(UserError, match="--device-memory plans for devices that are not here: add --dry-run"):
        neuroal_jax.PruneConfig(model="demo", sparsity=0.5, out=str(tmp_path / "out"), device_memory="80GiB")


@pytest.mark.parametrize(
    ("sizes", "limit", "devices", "expected"),
    [
        ([13, 14], 14, 1, 14), ([13, 14], 6, 1, 2), ([13, 14], 14, 8, 2), ([13, 14], 14, 14, 1), ([13, 14], 14, 2, 7),
        ([6, 3, 14, 5], 14, 1, 3), ([6, 3, 14, 5], 14, 4, 1), ([5], 1, 3, 1),
    ],
)  # fmt: skip
def test_candidates_together_leave_few_places_and_devices_empty(sizes, limit, devices, expected):
    assert candidates_together(sizes, limit, devices) == expected
