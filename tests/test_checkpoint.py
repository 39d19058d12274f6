"""Reading checkpoints: every dtype and layout bit for bit, there and back."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from neuroal_jax import UserError, load_model
from neuroal_jax.checkpoint import open_checkpoint
from neuroal_jax.finetune import flax_params
from neuroal_jax.models.family import expand
from neuroal_jax.tensors import is_finite


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


def test_a_tied_checkpoint_may_carry_its_head_and_old_ones_their_frequencies(make_llama):
    directory = make_llama(tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(directory))
    assert set(checkpoint.hashes()) == {"model", "prunable"}


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_is_finite(dtype, value):
    import ml_dtypes

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
