"""Reading checkpoints: every dtype and layout bit for bit, there and back."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from neuroal_jax import UserError, load_model
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.checkpoint.tensors import is_finite
from neuroal_jax.finetune import flax_params
from neuroal_jax.models.family import expand

ROOT = Path(__file__).parents[2]


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"shard": "20KB"}, {"attention_bias": True, "mlp_bias": True}])
def test_hugging_face_to_flax_and_back_is_bit_exact(make_llama, dtype, options):
    directory = make_llama(dtype=dtype, **options)
    checkpoint = open_checkpoint(str(directory))
    stored = {}
    for file in directory.glob("*.safetensors"):
        stored |= load_file(file)
    assert checkpoint.dtype == dtype
    assert set(stored) == set(checkpoint.source.infos)
    model = load_model(str(directory))
    params = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    for name, (rule, block) in expand(checkpoint.rules, checkpoint.num_blocks).items():
        np.testing.assert_array_equal(bits(checkpoint.read(name)), bits(stored[name]))
        back = np.asarray(params[rule.flax.format(block=block)])
        np.testing.assert_array_equal(bits(back.T if rule.transpose else back), bits(stored[name]))


def test_every_tensor_has_one_place_in_the_model(llama):
    checkpoint = open_checkpoint(str(llama))
    params = flax_params(checkpoint)
    assert len(params) == len(checkpoint.source.infos)
    state = nnx.state(load_model(str(llama)), nnx.Param)
    assert set(params) == {".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)}


def test_a_tied_head_is_the_embedding(make_llama):
    directory = make_llama(tie_word_embeddings=True)
    model = load_model(str(directory))
    assert model.head.embedding is model.stem.embedding
    assert "lm_head.weight" not in open_checkpoint(str(directory)).source.infos


def renamed(directory, rename, *, drop=()):
    """Renames the tensors of a checkpoint in place."""
    tensors = load_file(directory / "model.safetensors")
    kept = {rename(name): array for name, array in tensors.items() if name not in drop}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits_of_both(directory):
    """What transformers and this project compute."""
    from tests.models.test_families import torch_states

    ids = np.random.default_rng(1).integers(0, 96, (2, 20))
    return torch_states(directory, ids)[1], np.asarray(load_model(str(directory))(ids))


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(0.3)


def only_the_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def head_of_its_own_dtype(tensors):
    tensors["lm_head.weight"] = (tensors["model.embed_tokens.weight"] + 1).astype(np.float16)


@pytest.mark.parametrize("change", [other_head, only_the_head, head_of_its_own_dtype])
def test_a_tied_checkpoint_is_what_transformers_makes_of_its_tensors(make_llama, tmp_path, change):
    from convert.hf_to_flax import convert

    directory = make_llama(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    expected, found = logits_of_both(directory)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert open_checkpoint(str(directory)).config.tie_word_embeddings == (change is only_the_head)
    convert(str(directory), tmp_path / "flax")
    assert open_checkpoint(str(tmp_path / "flax")).hashes() == open_checkpoint(str(directory)).hashes()
    ids = np.arange(10)[None]
    np.testing.assert_array_equal(load_model(str(tmp_path / "flax"))(ids), load_model(str(directory))(ids))


@pytest.mark.parametrize("shape, dtype, message", [
    ((96, 31), np.float32, r"lm_head.weight has shape \[96, 31\], expected \[96, 32\]"),
    ((96, 32), np.int32, "lm_head.weight has dtype I32"),
])  # fmt: skip
def test_the_head_of_a_tied_checkpoint_is_checked_like_all_tensors(make_llama, shape, dtype, message):
    directory = make_llama(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": np.ones(shape, dtype)}, directory / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(directory))


def test_a_tied_checkpoint_may_carry_its_head(make_llama):
    directory = make_llama(tie_word_embeddings=True)
    before = open_checkpoint(str(directory)).hashes()
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(directory)).hashes() == before
    model = load_model(str(directory))
    assert model.head.embedding is model.stem.embedding


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi"])
def test_tables_of_rotary_positions_are_not_needed(make_llama, family):
    directory = make_llama(family=family)
    tensors = load_file(directory / "model.safetensors")
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.cos_cached"):
        tensors[name] = np.ones(4, np.float64)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    open_checkpoint(str(directory)).hashes()


WITHOUT_MODEL = {
    "llama": lambda name: name.removeprefix("model."),
    "llama twice": lambda name: f"model.{name}",
    "gemma": lambda name: name.removeprefix("model."),
    "opt": lambda name: name.removeprefix("model."),
    "phi": lambda name: name.removeprefix("model."),
    "gpt_neox": lambda name: name.removeprefix("gpt_neox."),
    "gpt_neox with its head's other name": lambda name: name.replace("embed_out.", "lm_head."),
}


@pytest.mark.parametrize(("family", "rename"), WITHOUT_MODEL.items(), ids=WITHOUT_MODEL)
def test_names_without_the_name_of_the_model_inside(make_llama, tmp_path, family, rename):
    family = family.split()[0]
    usual = make_llama(family=family)
    directory = renamed(shutil.copytree(usual, tmp_path / "model"), rename)
    expected, found = logits_of_both(directory)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.hashes() == open_checkpoint(str(usual)).hashes()
    # What is saved keeps the names of the file.
    (tmp_path / "saved").mkdir()
    checkpoint.save_edited(tmp_path / "saved", lambda name, weight: np.zeros_like(weight))
    saved, stored = load_file(tmp_path / "saved" / "model.safetensors"), load_file(directory / "model.safetensors")
    assert list(saved) == list(stored)
    pruned = {rename(name) for name in checkpoint.prunable()}
    assert {name for name, array in saved.items() if not array.any()} >= pruned
    assert all(np.array_equal(saved[name], stored[name]) for name in set(stored) - pruned)


def test_masks_have_the_names_of_parameters_and_fit_files_with_other_names(make_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    from convert.masks_to_torch import apply_masks, save_pruned, verify
    from neuroal_jax.checkpoint.tensors import combine, digests
    from neuroal_jax.masks.file import PackedMasks, load_masks, save_masks

    directory = renamed(make_llama(family="opt"), lambda name: name.removeprefix("model."))
    checkpoint = open_checkpoint(str(directory))
    kept = {name: checkpoint.read(name) > 0 for name in checkpoint.prunable()}
    assert all(name.startswith("model.decoder.") for name in kept)
    packed = {name: np.packbits(mask, axis=1) for name, mask in kept.items()}
    widths = {name: mask.shape[1] for name, mask in kept.items()}
    source = combine(digests(kept, checkpoint.source.infos, checkpoint.read))
    save_masks(tmp_path / "masks.safetensors", PackedMasks(packed, widths, {}, source, {}))
    save_pruned(str(directory), tmp_path / "masks.safetensors", tmp_path / "pruned")
    verify(str(tmp_path / "pruned"), tmp_path / "masks.safetensors")
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    assert saved.keys() == load_file(directory / "model.safetensors").keys()
    model = apply_masks(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "masks.safetensors")
    for name, mask in load_masks(tmp_path / "masks.safetensors").items():
        pruned = model.get_parameter(name).detach().numpy()
        np.testing.assert_array_equal(pruned != 0, mask)
        np.testing.assert_array_equal(saved[name.removeprefix("model.")], pruned)


def test_two_tensors_that_are_one_to_transformers_are_refused(llama, tmp_path):
    model = copied(llama, tmp_path)
    tensors = load_file(model / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match=r"norm.weight and model.norm.weight are one and the same to transformers"):
        open_checkpoint(str(model))


def test_unknown_attributes_that_are_switched_off_pass(make_llama):
    directory = make_llama()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "new_feature": None, "other_feature": False}))
    open_checkpoint(str(directory))


def test_hashes_do_not_depend_on_the_files_and_change_with_a_bit(make_llama):
    single, sharded = open_checkpoint(str(make_llama())), open_checkpoint(str(make_llama(shard="20KB")))
    assert single.hashes() == sharded.hashes()
    directory = make_llama()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, directory / "model.safetensors")
    changed = open_checkpoint(str(directory)).hashes()
    assert changed["prunable"] == single.hashes()["prunable"]
    assert changed["model"] != single.hashes()["model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("piece", [1, 7 * 32, 96 * 32])
def test_tensors_in_pieces_are_those_that_are_read_whole(make_llama, monkeypatch, dtype, piece):
    checkpoint = open_checkpoint(str(make_llama(dtype=dtype)))
    hashes, whole = checkpoint.hashes(), checkpoint.read("model.embed_tokens.weight")
    monkeypatch.setattr("neuroal_jax.checkpoint.tensors._PIECE_READ", piece)
    assert open_checkpoint(str(checkpoint.path)).hashes() == hashes
    for tokens in ([0], [3, 8, 9, 95, 95], range(96)):
        rows = checkpoint.read_part("stem", np.array(tokens))["embedding"]
        np.testing.assert_array_equal(bits(rows), bits(whole[list(tokens)]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("piece", [2, 9])
def test_is_finite(monkeypatch, dtype, value, piece):
    import ml_dtypes

    monkeypatch.setattr("neuroal_jax.checkpoint.tensors._PIECE", piece)
    array = np.full(9, 3e4).astype(getattr(ml_dtypes, dtype, dtype))
    assert is_finite(array)
    array[4] = value
    assert not is_finite(array)


BAD_INDEX = {
    "missing shard": (lambda shards: "gone.safetensors", r"names 'gone.safetensors', which is no file"),
    "outside": (lambda shards: f"../{shards[0]}", "which is no file of"),
    "absolute": (lambda shards: "/etc/passwd", "which is no file of"),
    "number": (lambda shards: 3, "is not a valid index"),
}


@pytest.mark.parametrize(("target", "message"), BAD_INDEX.values(), ids=BAD_INDEX.keys())
def test_bad_indices(make_llama, target, message):
    directory = make_llama(shard="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = target(sorted(set(index["weight_map"].values())))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(directory))


def test_a_tensor_in_two_shards_and_one_in_none(make_llama):
    directory = make_llama(shard="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match="lists tensor ghost, which no file holds"):
        open_checkpoint(str(directory))
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    save_file(load_file(second) | load_file(first), second)
    with pytest.raises(UserError, match="is in two files"):
        open_checkpoint(str(directory))


def test_a_hub_id_is_downloaded_with_the_hubs_own_client(llama, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, **options: asked.append(model) or str(llama)
    )
    assert open_checkpoint("owner/name").path == llama
    assert asked == ["owner/name"]


def copied(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def edit_config(model, **options):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **options}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_read(make_llama, dtype, value):
    directory = make_llama(dtype=dtype)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, directory / "model.safetensors")
    checkpoint = open_checkpoint(str(directory))
    checkpoint.read("model.layers.0.mlp.up_proj.weight")
    for read in (lambda: checkpoint.read_block(1), checkpoint.hashes, lambda: load_model(str(directory))):
        with pytest.raises(
            UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight of .* holds NaN or infinity"
        ):
            read()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_largest_numbers_are_finite(dtype):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert is_finite(np.array([ml_dtypes.finfo(kind).max, ml_dtypes.finfo(kind).min, 0], kind))


UNUSED = {
    "a head of one score": ({}, {"score.weight": (1, 32)}),
    "a head of values": (
        {"tie_word_embeddings": True},
        {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
    ),
    "a head's bias": ({"tie_word_embeddings": True}, {"lm_head.bias": (96,)}),
    "biases without the config's attribute": ({}, {"model.layers.0.self_attn.q_proj.bias": (32,), "norm.bias": (32,)}),
    "qwen's, of conversions": ({"family": "qwen2"}, {"model.layers.0.self_attn.o_proj.bias": (32,)}),
}


@pytest.mark.parametrize(("options", "shapes"), UNUSED.values(), ids=UNUSED)
def test_what_transformers_leaves_out_is_named_and_left_out(make_llama, caplog, options, shapes):
    directory = make_llama(**options)
    before = open_checkpoint(str(directory)).hashes()
    tensors = load_file(directory / "model.safetensors")
    more = {name: np.full(shape, 3, np.float32) for name, shape in shapes.items()}
    save_file(tensors | more, directory / "model.safetensors", metadata={"format": "pt"})
    assert open_checkpoint(str(directory)).hashes() == before
    for name in shapes:
        assert name in caplog.text
    assert caplog.text.count("not used, as in transformers") == 1
    expected, found = logits_of_both(directory)
    np.testing.assert_allclose(found, expected, atol=1e-4)


OLDER = {
    "opt": ({"ffn_dim": 56, "word_embed_proj_dim": 32}, "decoder.layers.0.self_attn.", "decoder.version"),
    "gpt_neox": ({}, "gpt_neox.layers.0.attention.", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
}


@pytest.mark.parametrize(("family", "found"), OLDER.items(), ids=OLDER)
def test_masks_and_versions_that_older_files_carry_are_not_needed(make_llama, caplog, family, found):
    options, attention, other = found
    directory = make_llama(family=family, **options)
    tensors = load_file(directory / "model.safetensors")
    masks = {f"{attention}bias": np.ones((1, 1, 4, 4), bool), f"{attention}masked_bias": np.array(-1e9, np.float32)}
    save_file(tensors | masks | {other: np.array([3.0], np.float32)}, directory / "model.safetensors")
    open_checkpoint(str(directory))
    assert not caplog.records


def test_a_tied_head_is_known_by_the_name_that_its_family_gives_it(make_llama):
    directory = make_llama(family="gpt_neox", tie_word_embeddings=True)
    expected = open_checkpoint(str(directory)).hashes()
    tensors = load_file(directory / "model.safetensors")
    for name in ("embed_out.weight", "lm_head.weight"):
        head = {name: tensors["gpt_neox.embed_in.weight"].copy()}
        save_file(tensors | head, directory / "model.safetensors", metadata={"format": "pt"})
        assert open_checkpoint(str(directory)).hashes() == expected


def test_without_tying_the_head_is_needed(llama, tmp_path):
    model = copied(llama, tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight is missing"):
        open_checkpoint(str(model))


def test_all_kinds_of_problems_are_reported_together(llama, tmp_path):
    model = copied(llama, tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["lm_head.weight"] = np.ones((96, 32), np.float64)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.ones((56, 32), np.float32)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(model))
    for problem in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.norm.weight has shape [31], expected [32]",
        "lm_head.weight has dtype F64, expected one of F32, F16, BF16",
        "model.layers.3.mlp.up_proj.weight is not a tensor of a llama model",
    ):
        assert problem in str(caught.value)


def with_header(text):
    return lambda content: struct.pack("<Q", len(text)) + text + content[8 + int.from_bytes(content[:8], "little") :]


DAMAGE = {
    "no bytes": lambda content: b"",
    "seven bytes": lambda content: content[:7],
    "a header longer than the file": lambda content: struct.pack("<Q", 2**62) + content[8:],
    "no header": lambda content: struct.pack("<Q", 0) + content[8:],
    "a header of zeros": with_header(b"\0" * 64),
    "a header that is a list": with_header(b"[]"),
    "a header that is null": with_header(b"null"),
    "an entry without a shape": with_header(b'{"a":{"dtype":"F32","data_offsets":[0,4]}}'),
    "an unknown dtype": with_header(b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'),
    "a negative size": with_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "offsets that do not fit the shape": with_header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'),
    "offsets beyond the file": with_header(b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}'),
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_damaged_safetensors_are_refused(llama, tmp_path, change):
    path = copied(llama, tmp_path) / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        open_checkpoint(str(path.parent))


def test_no_damaged_header_byte_raises_anything_but_a_user_error(llama, tmp_path):
    path = copied(llama, tmp_path) / "model.safetensors"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, 8 + int.from_bytes(content[:8], "little"), 60):
        path.write_bytes(content[:place] + bytes(rng.integers(0, 256, 1, np.uint8)) + content[place + 1 :])
        try:
            open_checkpoint(str(path.parent)).hashes()
        except UserError:
            refused += 1
    assert refused > 40


def test_no_value_of_a_config_raises_anything_but_a_user_error(llama, tmp_path):
    model = copied(llama, tmp_path)
    keys = json.loads((model / "config.json").read_text())
    values = [None, True, -1, 0, 7, 0.5, -(10**30), "", "x", "0", [], [1], ["x"], {}, {"x": 1}]
    escaped = []
    for key in keys:
        for value in values:
            shutil.copy(llama / "config.json", model / "config.json")
            edit_config(model, **{key: value})
            try:
                open_checkpoint(str(model))
            except UserError as error:
                assert "\n" not in str(error)
            except Exception as error:
                escaped.append((key, value, type(error).__name__))
    assert escaped == []


ESCAPES = [("architectures", [["x"]]), ("architectures", [{}]), ("rms_norm_eps", 10**400)]


@pytest.mark.parametrize("key, value", ESCAPES, ids=["lists", "objects", "beyond floats"])
def test_nested_and_huge_values_of_a_config_are_refused(llama, tmp_path, key, value):
    model = copied(llama, tmp_path)
    edit_config(model, **{key: value})
    with pytest.raises(UserError, match=key):
        open_checkpoint(str(model))


ROPES = [
    ({"rope_type": "longrope", "factor": 4.0}, "short_factor is missing"),
    ({"rope_type": "mrope", "factor": 4.0}, "'mrope' is not supported"),
    ({"rope_type": "linear", "factor": 0}, "factor is 0"),
    ({"rope_type": None}, "None is not supported"),
    ({"rope_type": ["yarn"]}, "is not supported"),
    ({"rope_type": "llama3"}, "factor is missing"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    ([1], r"rope_parameters is \[1\], expected an object"),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "high_freq_factor 4.0 must exceed low_freq_factor 4.0",
    ),
]


@pytest.mark.parametrize("rope, message", ROPES)
def test_rotary_positions_that_are_not_implemented_are_refused(llama, tmp_path, rope, message):
    model = copied(llama, tmp_path)
    edit_config(model, rope_parameters=rope)
    with pytest.raises(UserError, match=message):
        open_checkpoint(str(model))


def test_rotary_positions_read_the_same_from_both_spellings(llama, tmp_path):
    model = copied(llama, tmp_path)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    edit_config(model, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    new = open_checkpoint(str(model)).config
    for key in ("rope_type", "type"):
        edit_config(model, rope_parameters=None, rope_theta=5e5, rope_scaling={key: "llama3", **scaling})
        assert open_checkpoint(str(model)).config == new


def test_a_shard_with_a_name_too_long_is_refused(make_llama):
    directory = make_llama(shard="20KB")
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "a" * 300}}))
    with pytest.raises(UserError, match="which is no file of"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_none_is_refused(make_llama, content):
    directory = make_llama(shard="20KB")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is not a valid index"):
        open_checkpoint(str(directory))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_holds_the_same_bits(make_llama, tmp_path, dtype):
    from convert.hf_to_flax import convert

    source = open_checkpoint(str(make_llama(dtype=dtype)))
    convert(str(source.path), tmp_path / "flax")
    found = open_checkpoint(str(tmp_path / "flax"))
    assert found.hashes() == source.hashes()
    for name, info in source.source.infos.items():
        assert found.source.infos[name] == info
        np.testing.assert_array_equal(bits(found.read(name)), bits(source.read(name)))


def test_orbax_restores_a_tensor_once_that_is_read_in_parts(llama, tmp_path, monkeypatch):
    from convert.hf_to_flax import convert

    convert(str(llama), tmp_path / "flax")
    found, expected = (open_checkpoint(str(path)) for path in (tmp_path / "flax", llama))
    restored, restore = [], found.source._restore
    monkeypatch.setattr(found.source, "_restore", lambda name: restored.append(name) or restore(name))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"):
        restored.clear()
        for rows in (slice(0, 9), slice(9, 20), slice(20, None)):
            np.testing.assert_array_equal(found.read(name, rows), expected.read(name, rows))
        assert restored == [name]
    assert found.source._begun is None
    found.read(name, slice(0, 9))
    np.testing.assert_array_equal(found.read("lm_head.weight"), expected.read("lm_head.weight"))
    assert found.source._begun is None


def test_a_part_of_a_tensor_is_checked_once(llama, monkeypatch):
    checkpoint, checked = open_checkpoint(str(llama)), []
    monkeypatch.setattr("neuroal_jax.checkpoint.opened.is_finite", lambda array: checked.append(len(array)) or True)
    for rows in (slice(0, 9), slice(9, 20), slice(0, 9), slice(9, 20), slice(None), slice(3, 5), slice(None)):
        checkpoint.read("lm_head.weight", rows)
    assert checked == [9, 11, 96]


def test_a_damaged_array_of_orbax_is_refused(llama, tmp_path):
    from convert.hf_to_flax import convert

    convert(str(llama), tmp_path / "flax")
    largest = max((tmp_path / "flax" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(UserError, match="flax"):
        open_checkpoint(str(tmp_path / "flax")).hashes()


@pytest.mark.parametrize("family", ["llama", "opt", "phi", "phi3", "gpt_neox"])
def test_the_widths_of_a_blocks_inputs_are_those_of_its_forward_pass(make_llama, family):
    checkpoint = open_checkpoint(str(make_llama(family=family, pad_token_id=None)))
    model = load_model(str(checkpoint.path))
    _, inputs = model.blocks[0](model.stem(np.arange(5)[None]))
    assert checkpoint.input_widths() == {name: x.shape[-1] for name, x in inputs.items()}


def test_a_full_disk_under_orbax_is_one_line_and_leaves_nothing(llama, tmp_path):
    command = f"ulimit -f 16; exec {sys.executable} -m convert.hf_to_flax --model {llama} --out {tmp_path / 'flax'}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f"error: --out {tmp_path / 'flax'} cannot be written (File too large)\n"
    assert list(tmp_path.iterdir()) == []
