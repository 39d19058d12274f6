"""Pickled weights to safetensors: bit for bit, to the same logits; anything but tensors is refused."""

import json
import os
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

from convert import pickled
from convert.to_safetensors import convert, main
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.errors import UserError

INDEX = "pytorch_model.bin.index.json"


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def pickle_of(model, directory, shards=1, **options):
    """A copy of a checkpoint as older versions of transformers saved it: every name of a tensor, tied ones as well."""
    shutil.copytree(model, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = list(load(model).state_dict().items())
    names = [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(1, shards + 1)]
    if shards == 1:
        torch.save(OrderedDict(tensors), directory / "pytorch_model.bin", **options)
        return directory
    weight_map = {}
    for number, name in enumerate(names):
        part = dict(tensors[number::shards])
        torch.save(part, directory / name, **options)
        weight_map |= dict.fromkeys(part, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


MODELS = {
    "OPT, tied": {"family": "opt", "ffn_dim": 56, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "Llama": {"dtype": "bfloat16"},
    "Llama, tied": {"tie_word_embeddings": True, "dtype": "float16"},
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 2020"])
@pytest.mark.parametrize("name", MODELS)
def test_the_converted_model_is_the_same(make_llama, tmp_path, name, zipped, shards):
    model = make_llama(**MODELS[name])
    (model / "tokenizer.json").write_text("{}")
    (model / "training_args.bin").write_text("not read")
    source = pickle_of(model, tmp_path / "pickled", shards, _use_new_zipfile_serialization=zipped)
    convert(str(source), tmp_path / "out")
    shard_names = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)] + ["model.safetensors.index.json"]
    side_files = {"config.json", "generation_config.json", "tokenizer.json"}
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {*side_files, *(["model.safetensors"] if shards == 1 else shard_names)}
    before, after = load(model), load(tmp_path / "out")
    for (key, old), (other, new) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
        assert (key, old.dtype) == (other, new.dtype)
        assert torch.equal(old, new)
    ids = torch.arange(12)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert open_checkpoint(str(tmp_path / "out")).hashes() == open_checkpoint(str(model)).hashes()


def written(tmp_path, content):
    """What becomes of the content of a pickled file."""
    torch.save(content, tmp_path / "w.bin")
    pickled.save_tensors(pickled.read_tensors(tmp_path / "w.bin"), tmp_path / "w.safetensors")
    return load_file(tmp_path / "w.safetensors")


def test_tensors_of_every_dtype_and_layout_keep_their_numbers(tmp_path):
    whole = torch.arange(60.0).reshape(6, 10)
    content = {
        "transposed": whole.T,
        "every other": whole[:, ::2],
        "rows of one buffer": whole[:3],
        "its other rows": whole[3:],
        "the same": whole,
        "parameter": torch.nn.Parameter(whole + 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        **{str(dtype): torch.arange(8).to(dtype) for dtype in (torch.bool, torch.int8, torch.int64, torch.float64)},
        **{str(dtype): torch.arange(8).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn)},
    }
    found = written(tmp_path, content)
    assert found.keys() == content.keys()
    for name, tensor in content.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.detach().float()), name


class Runs:
    """Its pickle runs a command."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def flipped(path):
    content = path.read_bytes()
    place = len(content) // 2  # of a weight
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def repacked(change):
    """A file whose zip archive is written anew."""

    def edit(path):
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            change(archive, entries)

    return edit


def compressed(archive, entries):
    for name, content in entries.items():
        archive.writestr(name, content, zipfile.ZIP_DEFLATED)


def twice(archive, entries):
    for name, content in [*entries.items(), *entries.items()]:
        archive.writestr(name, content[:10] if name.endswith("pkl") else content)


def saved(content):
    return lambda path: torch.save(content, path)


ONE = torch.ones(3)
BAD_FILES = {
    "empty": (lambda path: path.write_bytes(b""), "no complete file of torch.save"),
    "garbage": (lambda path: path.write_bytes(b"\x80\x02" + b"\xff" * 99), r"torch.save \(Unsupported operand 255\)"),
    "text": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "no complete file of torch"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-999]), "no complete file of torch.save"),
    "one bit": (flipped, "no complete file of torch.save .*CRC-32"),
    "compressed": (repacked(compressed), "is compressed"),
    "names twice": (repacked(twice), "two files of one name"),
    "code": (saved({"a": Runs()}), r"refused \(it asks for \w+\.system, which a dict of tensors does not need"),
    "an own class": (saved({"a": UserError("x")}), "it asks for neuroal_jax.errors.UserError"),
    "a whole module": (saved(torch.nn.Linear(2, 2)), "it asks for torch.nn.modules.linear.Linear"),
    "a list": (saved([ONE]), "holds a list, expected a dict of tensors"),
    "a tensor": (saved(ONE), "holds a Tensor, expected a dict of tensors"),
    "nothing": (saved({}), "holds an empty dict, expected a dict of tensors"),
    "nested, state_dict": (saved({"state_dict": {"a": ONE}, "epoch": 3}), "'state_dict' is a dict of its own"),
    "nested, module": (saved({"module": {"a": ONE}}), "'module' is a dict of its own: .* save the state dict of the"),
    "a number": (saved({"a": ONE, "step": 5}), "'step' is a int, expected a tensor"),
    "a key that is no text": (saved({3: ONE}), "3 is no name of a tensor"),
    "the name of the header": (saved({"__metadata__": ONE}), "'__metadata__' is no name of a tensor"),
    "on meta": (saved({"a": torch.ones(3, device="meta")}), "'a' is on the device meta"),
    "sparse": (saved({"a": ONE.to_sparse()}), r"a tensor of another kind \(torch.sparse_coo"),
    "complex": (saved({"a": ONE.to(torch.complex64)}), "a tensor of another kind .*complex64"),
    "a bomb": (saved({"a": ONE[:1].expand(10**9)}), "'a' is larger than the numbers that are stored of it"),
    "many names": (saved(dict.fromkeys("abcdefghij", torch.ones(10**5))),
                   "names the same numbers again and again"),
}  # fmt: skip


def refused(capsys, tmp_path, model, message):
    import re

    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(("edit", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_damaged_or_holds_more_than_tensors_is_refused(
    llama, tmp_path, capsys, monkeypatch, edit, message
):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    model = pickle_of(llama, tmp_path / "model")
    edit(model / "pytorch_model.bin")
    refused(capsys, tmp_path, model, message)


def edited_index(change):
    def edit(model):
        index = json.loads((model / INDEX).read_text())
        change(index["weight_map"])
        (model / INDEX).write_text(json.dumps(index))

    return edit


NORM = "model.norm.weight"
FIRST = "pytorch_model-00001-of-00002.bin"
BAD_DIRECTORIES = {
    "a shard missing": (lambda model: (model / FIRST).unlink(), f"names '{FIRST}', which is no file of"),
    "an index to elsewhere": (edited_index(lambda index: index.update({NORM: "../x.bin"})), "names '../x.bin'"),
    "a tensor left out": (edited_index(lambda index: index.pop(NORM)), f"holds tensor {NORM}, which .* does not place"),
    "a tensor too many": (edited_index(lambda index: index.update(ghost=FIRST)), "places tensor ghost in .* lacks it"),
    "an index of lists": (lambda model: (model / INDEX).write_text('{"weight_map": [1]}'), "is not a valid index"),
    "no index": (lambda model: (model / INDEX).unlink(), "but not their index pytorch_model.bin.index.json"),
    "no config": (lambda model: (model / "config.json").unlink(), "has no config.json"),
    "a FIFO": (lambda model: ((model / FIRST).unlink(), os.mkfifo(model / FIRST)), "which is no file of"),
}


@pytest.mark.parametrize(("edit", "message"), BAD_DIRECTORIES.values(), ids=BAD_DIRECTORIES)
def test_an_index_that_the_files_do_not_bear_out_is_refused(llama, tmp_path, capsys, edit, message):
    model = pickle_of(llama, tmp_path / "model", shards=2)
    edit(model)
    refused(capsys, tmp_path, model, message)


def test_what_is_safetensors_already_or_another_form_is_refused(llama, tmp_path, capsys):
    refused(capsys, tmp_path, llama, r"holds safetensors already \(model.safetensors\): use it as it is")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "consolidated.00.pth").touch()
    refused(capsys, tmp_path, tmp_path / "meta", r"another form of weights \(consolidated.00.pth\): accepted are")
    refused(capsys, tmp_path, "owner/name", "the Hugging Face Hub says")


def test_the_source_is_never_the_target(llama, tmp_path, capsys):
    model = pickle_of(llama, tmp_path / "model")
    assert main(["--model", str(model), "--out", str(model), "--overwrite"]) == 2
    assert (model / "pytorch_model.bin").is_file()


@pytest.mark.parametrize(("version", "old"), [("2.5.1+cu121", True), ("1.13", True), ("2.6.0", False), ("3.0", False)])
def test_a_pytorch_that_unpickles_unsafely_is_refused(tmp_path, monkeypatch, version, old):
    torch.save({"a": ONE}, tmp_path / "w.bin")
    monkeypatch.setattr(torch, "__version__", version)
    if old:
        with pytest.raises(UserError, match=f"PyTorch {version.split('+')[0]}.*install 2.6 or later"):
            pickled.read_tensors(tmp_path / "w.bin")
    else:
        assert torch.equal(pickled.read_tensors(tmp_path / "w.bin")["a"], ONE)


def test_the_command_that_other_programs_name(llama, tmp_path, capsys):
    model = pickle_of(llama, tmp_path / "model")
    with pytest.raises(UserError) as refusal:
        open_checkpoint(str(model))
    assert f"python -m convert.to_safetensors --model {model} --out DIR" in str(refusal.value)
    assert main(["--model", str(model), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'out'}\n"
    open_checkpoint(str(tmp_path / "out"))
