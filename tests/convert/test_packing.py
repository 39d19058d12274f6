"""Packed checkpoints: as small as computed, given back byte for byte or refused, and loaded by nothing."""

import json
import os
import random
import re
import shutil
import struct
import tracemalloc
from importlib import import_module

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import packed_file
from convert.masks_to_torch import main
from convert.packed_file import packed_bytes
from convert.packing import pack, unpack
from neuroal_jax.checkpoint.hugging_face import load_torch_model
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile

MARKER = "neuroal-packed.json"
LINEAR = re.compile(r".*layers\.\d+\..*(_proj|fc1|fc2)\.weight")


def contents(directory):
    """All files below a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def header_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def prune(directory, share=0.7):
    """Sets a share of every linear to zero, in files as transformers wrote them."""
    rng = np.random.default_rng(0)
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if LINEAR.fullmatch(name):
                tensor[rng.random(tensor.shape) < share] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    return directory


def checkpoint(directory, tensors):
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def half_empty(shape=(16, 24), dtype=np.float32, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < share, 0, rng.normal(size=shape)).astype(dtype)


@pytest.fixture
def pruned(tmp_path):
    tensors = {"a.weight": half_empty(), "b.weight": half_empty((7, 13), np.float16), "norm": np.ones(5, np.float32)}
    return checkpoint(tmp_path / "pruned", tensors)


@pytest.fixture
def packed(pruned, tmp_path):
    pack(str(pruned), tmp_path / "packed")
    return tmp_path / "packed"


def there_and_back(directory, tmp_path):
    """The sizes of a packed checkpoint and its files, once they gave back the directory."""
    sizes = pack(str(directory), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(directory)
    return sizes, contents(tmp_path / "packed")


def computed(content):
    """Bytes of a packed file, from the safetensors file."""
    header = header_of(content)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    size = 16 + len(content) - len(data)
    for name in header.keys() - {"__metadata__"}:
        begin, end = header[name]["data_offsets"]
        size += 8 + end - begin
        width = {"F32": 4, "F16": 2, "BF16": 2}.get(header[name]["dtype"])
        if len(header[name]["shape"]) == 2 and width:
            values = [data[at : at + width] for at in range(begin, end, width)]
            zeros = values.count(bytes(width))
            size -= max(0, zeros * width - (len(values) + 7) // 8)
    return size


MODELS = {
    "single": {},
    "sharded": {"shard": "20KB"},
    "tied": {"tie_word_embeddings": True},
    "OPT, sharded and tied": {"family": "opt", "ffn_dim": 56, "word_embed_proj_dim": 32, "shard": "20KB"},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_directory_is_given_back_byte_for_byte_from_as_few_bytes_as_computed(make_llama, tmp_path, name, dtype):
    model = prune(make_llama(**MODELS[name], dtype=dtype), share=0.7)
    (model / "tokenizer.json").write_text("{}")
    (model / "original").mkdir()
    (model / "original" / "model.safetensors").write_bytes(b"of another form, copied")
    before = contents(model)
    weights = {name for name in before if re.fullmatch(r"[^/]*\.safetensors", name)}
    assert len(weights) > 1 if "sharded" in name else weights == {"model.safetensors"}
    sizes, packed = there_and_back(model, tmp_path)
    names = {name: name.replace(".safetensors", ".neuroal-packed") if name in weights else name for name in before}
    assert packed.keys() == {*names.values(), MARKER}
    for name, stored in names.items():
        assert len(packed[stored]) == computed(before[name]) if name in weights else packed[stored] == before[name]
    assert sizes.before == sum(len(before[name]) for name in weights)
    assert sizes.after == sum(len(packed[names[name]]) for name in weights) < sizes.before


def test_what_was_never_a_number_is_kept(tmp_path):
    kinds = [0x0000, 0x8000, 0x0001, 0x8001, 0x7F81, 0xFFC5, 0x7C01, 0x7E55, 0x0080, 0x3F80]  # of either half precision
    rng = np.random.default_rng(0)
    halves = rng.choice(kinds, (31, 33), p=[0.55] + [0.05] * 9).astype(np.uint16)
    words = np.where(halves == 0, 0, rng.integers(0, 2**32, halves.shape)).astype(np.uint32)
    words[0, :6] = 0x80000000, 1, 0x80000001, 0x7F800001, 0xFFC00005, 0x00010000
    tensors = {"f16": halves.view(np.float16), "bf16": halves.view(ml_dtypes.bfloat16), "f32": words.view(np.float32)}
    _, files = there_and_back(checkpoint(tmp_path / "model", tensors), tmp_path)
    kept = 2 * 2 * np.count_nonzero(halves) + 4 * np.count_nonzero(words)
    whole = contents(tmp_path / "model")["model.safetensors"]
    start = 8 + int.from_bytes(whole[:8], "little")
    assert len(files["model.neuroal-packed"]) == 16 + start + 3 * (8 + -(-31 * 33 // 8)) + kept


SHAPES = [(), (0,), (5,), (0, 4), (4, 0), (1, 1), (1, 7), (3, 8), (9, 15), (2, 3, 4), (1, 1000)]


@pytest.mark.parametrize("share", [0, 0.1, 0.6, 1])
def test_tensors_of_every_shape_and_dtype(tmp_path, monkeypatch, share):
    monkeypatch.setattr(packed_file, "_PIECE", 16)  # so that a tensor has many
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.uint8, np.int64, np.bool_]
    tensors = {
        f"{np.dtype(dtype).name} {shape}.bits": np.array(half_empty(shape, dtype, seed, share))
        for seed, dtype in enumerate(dtypes)
        for shape in SHAPES
    }
    tensors["pruned"] = half_empty((7, 9), share=0.9)
    _, files = there_and_back(checkpoint(tmp_path / "model", tensors), tmp_path)
    assert len(files["model.neuroal-packed"]) == computed(contents(tmp_path / "model")["model.safetensors"])


def test_files_of_any_name(pruned, tmp_path):
    (pruned / "folder").mkdir()
    names = [".hidden", "a\nb", "\udcff", "\u00e9", "folder/x.neuroal-packed", f"folder/{MARKER}", "x.safetensors.json"]
    for name in names:
        (pruned / name).write_text("x")
    shutil.copy(pruned / "model.safetensors", pruned / ".safetensors")
    _, files = there_and_back(pruned, tmp_path)
    assert files.keys() == {*names, "config.json", "model.neuroal-packed", ".neuroal-packed", MARKER}


def test_a_header_as_another_program_writes_it(tmp_path):
    model = checkpoint(tmp_path / "model", {"x": half_empty()})
    a, b = half_empty((3, 5)).tobytes(), half_empty((8, 9), np.float16).tobytes()
    entries = (
        f'{{"z" : {{"shape":[8,9],"data_offsets":[{len(a)},{len(a) + len(b)}],"dtype":"F16"}},\n'
        f'"__metadata__":{{"b":"2","a":"1"}},"\\u0061":{{"dtype":"F32","shape":[3,5],"data_offsets":[0,{len(a)}]}}}}   '
    ).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(entries)) + entries + a + b)
    there_and_back(model, tmp_path)


def test_pieces_and_tensors_follow_on_each_other(tmp_path):
    # Larger than one piece, and than one chunk of what is copied.
    tensors = {"a": half_empty((1100, 1001), share=0.7), "b": np.ones((2100, 2001), np.float32), "c": half_empty()}
    there_and_back(checkpoint(tmp_path / "model", tensors), tmp_path)


def test_the_ratio_of_a_large_matrix_and_of_a_model(tmp_path):
    pruned = half_empty((1024, 2752), ml_dtypes.bfloat16, share=0.7)
    sizes, _ = there_and_back(checkpoint(tmp_path / "model", {"a": pruned}), tmp_path)
    assert sizes.after / sizes.before == pytest.approx(1 / 16 + 0.3, abs=1e-3)
    # Llama 2 7B: 32 blocks of linears, embedding and head of 32000 tokens, norms.
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    others = 2 * 32000 * 4096 + 65 * 4096
    after = packed_bytes(linears, round(0.7 * linears), 2) + 2 * others
    assert round(after / (2 * (linears + others)), 2) == 0.39


@pytest.mark.parametrize(
    ("elements", "zeros", "itemsize", "size"),
    [(8, 8, 4, 1), (9, 0, 2, 18), (9, 1, 2, 18), (9, 2, 2, 16), (9, 9, 2, 2), (0, 0, 4, 0), (1, 1, 2, 1)],
)
def test_a_size_by_hand(elements, zeros, itemsize, size):
    assert packed_bytes(elements, zeros, itemsize) == size


def test_memory_holds_pieces(tmp_path):
    tensors = {"a": half_empty((4096, 8192), np.float16, share=0.9), "b": np.ones((4096, 8192), np.float16)}
    file = SteadyFile.at(checkpoint(tmp_path / "model", tensors) / "model.safetensors")
    tracemalloc.start()
    try:
        layout, _ = packed_file.survey(file)
        with (tmp_path / "packed").open("wb") as packed:
            packed.writelines(packed_file.pack_file(file, layout))
        file = SteadyFile.at(tmp_path / "packed")
        with (tmp_path / "unpacked").open("wb") as unpacked:
            unpacked.writelines(packed_file.unpack_file(file, packed_file.read_layout(file)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < tensors["a"].nbytes * 5 / 8
    assert (tmp_path / "unpacked").read_bytes() == (tmp_path / "model" / "model.safetensors").read_bytes()


def test_commands_say_what_they_did(pruned, tmp_path, capsys):
    assert main(["pack", "--model", str(pruned), "--out", str(tmp_path / "packed")]) == 0
    before = (pruned / "model.safetensors").stat().st_size
    after = (tmp_path / "packed" / "model.neuroal-packed").stat().st_size
    line = f"weights of {before:,} bytes in {after:,} ({after / before:.2f}), written to {tmp_path / 'packed'}\n"
    assert capsys.readouterr().out == line
    assert main(["unpack", "--packed", str(tmp_path / "packed"), "--out", str(tmp_path / "new" / "out")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'new' / 'out'}\n"
    assert contents(tmp_path / "new" / "out") == contents(pruned)


def test_earlier_results_are_replaced_where_that_is_asked_for(pruned, tmp_path):
    for _ in range(2):
        pack(str(pruned), tmp_path / "packed", overwrite=True)
        unpack(tmp_path / "packed", tmp_path / "unpacked", overwrite=True)
    for work, source, out in ((pack, pruned, "packed"), (unpack, tmp_path / "packed", "unpacked")):
        with pytest.raises(UserError, match=r"already holds a result .* pass --overwrite"):
            work(source if work is unpack else str(source), tmp_path / out)
    assert contents(tmp_path / "unpacked") == contents(pruned)


def test_links_are_followed_as_in_the_hubs_cache_and_what_is_no_file_is_left_out(pruned, tmp_path, caplog):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "1"
    (snapshot / "more").mkdir(parents=True)
    (pruned / "more").mkdir()
    (pruned / "more" / "notes.txt").write_text("notes")
    blobs.mkdir()
    for number, (name, content) in enumerate(sorted(contents(pruned).items())):
        (blobs / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    (tmp_path / "secret").write_text("secret")
    (snapshot / "out.txt").symlink_to(tmp_path / "secret")
    (snapshot / "loop").symlink_to(snapshot)
    (snapshot / "nowhere").symlink_to("none")
    (snapshot / "empty").mkdir()
    os.mkfifo(snapshot / "more" / "fifo")
    pack(str(snapshot), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(pruned)
    assert not any(path.is_symlink() for path in (tmp_path / "packed").rglob("*"))
    told = {record.getMessage().removeprefix(f"{snapshot}/") for record in caplog.records}
    assert told == {
        "out.txt is not copied: it is a link out of the model's directory",
        "loop is not copied: it is a directory, expected a file",
        "nowhere is not copied: it is a link to nowhere, expected a file",
        "more/fifo is not copied: it is a FIFO, expected a file",
    }


def test_weights_are_followed_wherever_they_lie(pruned, packed, tmp_path):
    expected = contents(pruned)
    for directory, name in ((pruned, "model.safetensors"), (packed, "model.neuroal-packed")):
        (directory / name).rename(tmp_path / name)
        (directory / name).symlink_to(tmp_path / name)
    pack(str(pruned), tmp_path / "again")
    for number, source in enumerate((tmp_path / "again", packed)):
        unpack(source, tmp_path / str(number))
        assert contents(tmp_path / str(number)) == expected


def refused(capsys, root, arguments, message):
    before = {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")} == before


def dense(model):
    save_file({"a": half_empty(share=0)}, model / "model.safetensors")


def sharded(names, single=False):
    def edit(model):
        index = {"metadata": {}, "weight_map": dict.fromkeys(["a.weight"], names)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        if not single:
            (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")

    return edit


def truncated(model):
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])


def written(name, content=b"x"):
    return lambda model: (model / name).write_bytes(content)


def removed(name):
    return lambda model: (model / name).unlink()


def only_pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


CANNOT_BE_PACKED = {
    "packed, by its list": (written(MARKER), r"is packed already \(neuroal-packed.json\)"),
    "packed, by its weights": (written("a.neuroal-packed"), r"is packed already \(a.neuroal-packed\)"),
    "dense": (dense, "nothing to pack: no tensor would become smaller"),
    "no config": (removed("config.json"), "has no config.json"),
    "no weights": (removed("model.safetensors"), "holds no model.safetensors and no model.safetensors.index.json"),
    "pickled": (only_pickled, "holds only pickled weights"),
    "pickled too": (written("pytorch_model.bin"), r"no safetensors too \(pytorch_model.bin\), which would still be"),
    "a shard missing": (sharded("model-00002-of-00002.safetensors"), "names 'model-00002.*which is no file of"),
    "a shard elsewhere": (sharded("../x.safetensors"), r"names '../x.safetensors', which is no file of"),
    "a shard that is no safetensors": (sharded("config.json"), r"no safetensors too \(config.json\)"),
    "no index": (
        lambda model: (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors"),
        "but not their index",
    ),
    "truncated": (truncated, "is not a complete safetensors file"),
    "other weights that are none": (written("other.safetensors"), "other.safetensors is not a complete safetensors"),
    "a FIFO": (lambda model: (removed("config.json")(model), os.mkfifo(model / "config.json")), "is a FIFO, expected"),
}


@pytest.mark.parametrize(("edit", "message"), CANNOT_BE_PACKED.values(), ids=CANNOT_BE_PACKED)
def test_what_cannot_be_packed_is_refused(pruned, tmp_path, capsys, edit, message):
    edit(pruned)
    refused(capsys, tmp_path, ["pack", "--model", pruned, "--out", tmp_path / "out"], message)


def test_a_folder_that_cannot_be_read_is_not_left_out(pruned, tmp_path, capsys, monkeypatch):
    (pruned / "folder").mkdir()
    scandir = os.scandir

    def closed(path):
        if os.fspath(path) == str(pruned / "folder"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    arguments = ["pack", "--model", str(pruned), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {pruned / 'folder'} cannot be read (Permission denied)\n"
    assert not (tmp_path / "out").exists()


def test_weights_beside_an_index_of_others_are_packed_with_them(pruned, tmp_path):
    sharded("model-00001-of-00001.safetensors", single=True)(pruned)
    shutil.copy(pruned / "model.safetensors", pruned / "model-00001-of-00001.safetensors")
    _, files = there_and_back(pruned, tmp_path)
    assert not [name for name in files if name.endswith(".safetensors")]


def test_nothing_is_written_over_or_into_what_is_read(pruned, packed, tmp_path, capsys):
    (tmp_path / "link").symlink_to(packed)
    for command, flag, source in (("pack", "--model", pruned), ("unpack", "--packed", packed)):
        arguments = [command, flag, source, "--overwrite", "--out"]
        refused(capsys, tmp_path, [*arguments, source], f"{flag} and --out are the same directory")
        refused(capsys, tmp_path, [*arguments, source / "more" / "out"], f"lies in {flag} {source}: choose another")
        refused(capsys, tmp_path, [*arguments, tmp_path], "already holds files that no earlier run")
        refused(capsys, tmp_path, [*arguments, pruned / "config.json"], "--out .*config.json (is a file|lies in)")
    refused(capsys, tmp_path, ["unpack", "--packed", packed, "--out", tmp_path / "link"], "are the same directory")
    refused(capsys, tmp_path, ["pack", "--model", pruned, "--out", packed], "already holds a result")
    refused(capsys, tmp_path, ["unpack", "--packed", packed, "--out", pruned, "--overwrite"], "already holds files")


def test_what_is_not_packed_is_not_unpacked(pruned, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    refused(capsys, tmp_path, ["unpack", "--packed", pruned, *out], "is not packed: it has no neuroal-packed.json")
    refused(capsys, tmp_path, ["unpack", "--packed", tmp_path / "none", *out], "--packed .* is missing, expected a dir")
    refused(capsys, tmp_path, ["unpack", "--packed", pruned / "config.json", *out], "is a file, expected a directory")
    refused(capsys, tmp_path, ["unpack", "--packed", "a/b", *out], "is missing, expected a directory that pack wrote")


def edited_list(change):
    def edit(packed):
        content = json.loads((packed / MARKER).read_text())
        (packed / MARKER).write_text(json.dumps(change(content)))

    return edit


def listed(name, digest="0" * 64):
    return edited_list(lambda content: {**content, "files": {**content["files"], name: digest}})


def edited_header(change, lengthen=0):
    """A packed file with another header; its data stays."""

    def edit(packed):
        content = (packed / "model.neuroal-packed").read_bytes()
        header = header_of(content[16:])
        data = content[24 + int.from_bytes(content[16:24], "little") :]
        text = change(header)
        text = (text if isinstance(text, str) else json.dumps(header)).encode()
        size = struct.pack("<Q", len(text) + lengthen)
        (packed / "model.neuroal-packed").write_bytes(content[:16] + size + text + data)

    return edit


def entry(name, **values):
    return edited_header(lambda header: header[name].update(values))


def edited_bytes(change):
    def edit(packed):
        path = packed / "model.neuroal-packed"
        path.write_bytes(change(path.read_bytes()))

    return edit


def edited_data(change):
    """A packed file whose data is changed: the first tensor's, a.weight's, `[16, 24]` in F32, number of kept first."""

    def replaced(content):
        start = 24 + int.from_bytes(content[16:24], "little")
        data = bytearray(content[start:])
        change(data)
        return content[:start] + bytes(data)

    return edited_bytes(replaced)


def count(number):
    return edited_data(lambda data: data.__setitem__(slice(8), number.to_bytes(8, "little", signed=True)))


def bits(change):
    def flip(data):
        (place,) = [at for at in (8, 9, 10) if data[at] not in (0, 255)][:1]
        data[place] = change(data[place])

    return edited_data(flip)


def backwards(header):
    begin, _ = header["b.weight"]["data_offsets"]  # the last
    header["b.weight"]["data_offsets"] = [begin, begin - 4]


def twice(header):
    return json.dumps(header)[:-1] + ', "norm": ' + json.dumps(header["norm"]) + "}"


HUGE = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64]}
DAMAGED = {
    "the list is no JSON": (written(MARKER, b"{"), "neuroal-packed.json is damaged .*: copy it again"),
    "the list is a FIFO": (lambda d: ((d / MARKER).unlink(), os.mkfifo(d / MARKER)), "is damaged .*is a FIFO"),
    "a list of another format": (edited_list(lambda c: {**c, "format": "neuroal-packed-2"}), "its format is not"),
    "a list of names": (edited_list(lambda c: {**c, "files": list(c["files"])}), "'files' is no object of SHA-256"),
    "nothing": (edited_list(lambda c: {**c, "files": {}}), "'files' names no config.json, or no weights"),
    "no weights": (
        edited_list(lambda c: {**c, "files": {k: v for k, v in c["files"].items() if k == "config.json"}}),
        "'files' names no config.json, or no weights",
    ),
    "no SHA-256": (listed("config.json", "x" * 64), "'files' is no object of SHA-256"),
    "another SHA-256": (listed("model.safetensors"), "model.neuroal-packed is damaged: it does not give model.safet"),
    "a list that leads elsewhere": (listed("../config.json"), r"lacks ../config.json"),
    "an absolute path": (listed("/etc/passwd"), "lacks /etc/passwd"),
    "a file missing": (removed("model.neuroal-packed"), "lacks model.neuroal-packed, which pack wrote: copy it again"),
    "a file too many": (written("README.md"), "holds README.md, which pack did not write: move it away"),
    "unpacked beside packed": (written("model.safetensors"), "holds model.safetensors, which pack did not write"),
    "another config": (written("config.json"), "config.json is damaged: it does not give config.json as it was packed"),
    "empty": (edited_bytes(lambda content: b""), "is not packed: it does not begin with neuroal-packed-1"),
    "another format": (edited_bytes(lambda content: content.replace(b"packed-1", b"packed-2", 1)), "is not packed"),
    "truncated at once": (edited_bytes(lambda content: content[:20]), "is not packed"),
    "truncated in the header": (edited_bytes(lambda content: content[:30]), "a header of [0-9]+ bytes cannot be in"),
    "truncated in the data": (edited_bytes(lambda content: content[:-1]), "its tensors take [0-9]+ bytes, it has"),
    "truncated by a tensor": (edited_bytes(lambda content: content[:-200]), "it ends before tensor"),
    "longer": (edited_bytes(lambda content: content + b"\0"), "its tensors take [0-9]+ bytes, it has"),
    "a huge header": (edited_header(lambda header: None, 2**63), "a header of 92233[0-9]+ bytes cannot be in its"),
    "a header that is no text": (edited_bytes(lambda c: c[:30] + b"\xff" + c[31:]), "its header is no JSON"),
    "a header that is no object": (edited_header(lambda header: "[]"), "it is no object"),
    "a name twice": (edited_header(twice), "the key 'norm' appears twice"),
    "no offsets": (edited_header(lambda header: header["norm"].pop("data_offsets")), "does not say where tensor norm"),
    "no entry": (edited_header(lambda header: header.update(norm=3)), "does not say where tensor norm is"),
    "a negative size": (entry("norm", shape=[-5]), "does not say where tensor norm is"),
    "a size that is true": (entry("norm", shape=[True]), "does not say where tensor norm is"),
    "data upside down": (entry("a.weight", data_offsets=[0, 0]), "the data of tensor .* does not follow on"),
    "data that ends before it begins": (edited_header(backwards), "the data of tensor b.weight does not follow on"),
    "a gap": (edited_header(lambda header: header.pop("norm")), "the data of tensor .* does not follow on"),
    "a huge tensor": (edited_header(lambda header: header.update(z=HUGE)), "does not follow on"),
    "a huge tensor alone": (
        edited_header(lambda header: (header.clear(), header.update(z=HUGE))),
        "its tensors take 576460752303[0-9]+ bytes, it has",
    ),
    "a huge tensor as it was": (
        lambda d: (edited_header(lambda h: (h.clear(), h.update(z={**HUGE, "dtype": "I8"})))(d), count(-1)(d)),
        "its tensors take [0-9]+ bytes, it has",
    ),
    "a tensor that cannot be packed": (entry("a.weight", shape=[384]), "values of tensor a.weight cannot be kept"),
    "a shape of another size": (entry("a.weight", shape=[16, 23]), "values of tensor a.weight cannot be kept"),
    "another dtype": (entry("a.weight", dtype="F16"), "values of tensor a.weight cannot be kept"),
    "fewer than none": (count(-2), "-2 values of tensor a.weight cannot be kept"),
    "more than all": (count(385), "385 values of tensor a.weight cannot be kept"),
    "more than there are": (count(383), "is damaged: (its tensors take|it ends before|.* cannot be kept)"),
    "a bit more": (bits(lambda byte: byte | byte + 1), "tensor a.weight has more bits than values"),
    "a bit less": (bits(lambda byte: byte & byte - 1), "tensor a.weight has fewer bits than values"),
    "a bit elsewhere": (bits(lambda byte: byte >> 1 | (byte & 1) << 7), "is damaged: it does not give model.safetens"),
    "another value": (
        edited_data(lambda data: data.__setitem__(60, data[60] ^ 1)),
        "is damaged: it does not give model.safetensors as it was packed; copy it again",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused(packed, tmp_path, capsys, edit, message):
    edit(packed)
    refused(capsys, tmp_path, ["unpack", "--packed", packed, "--out", tmp_path / "out"], message)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_damaged_is_refused_or_given_back(pruned, packed, tmp_path, seed):
    rng, expected, refusals = random.Random(seed), contents(pruned), 0
    for number in range(60):
        path = packed / rng.choice([MARKER, "config.json", *["model.neuroal-packed"] * 4])
        content = path.read_bytes()
        edited = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 9])):
            place, length = rng.randrange(len(edited)), rng.choice([1, 1, 8, 50])
            edited[place : place + length] = rng.choice(
                [b"", bytes(length), rng.randbytes(length), bytes([edited[place] ^ 1 << rng.randrange(8)])]
            )
            edited = edited or bytearray(1)
        path.write_bytes(edited)
        try:
            unpack(packed, tmp_path / str(number))
            assert contents(tmp_path / str(number)) == expected
        except UserError:
            refusals += 1
            assert not (tmp_path / str(number)).exists()
        path.write_bytes(content)
    assert refusals > 50


def test_a_file_that_changes_meanwhile_is_refused(pruned, tmp_path, monkeypatch):
    from convert import packing

    def pack_file(file, layout):
        yield from packed_file.pack_file(file, layout)
        (pruned / "config.json").write_text("{}")

    monkeypatch.setattr(packing, "pack_file", pack_file)
    with pytest.raises(UserError, match=r"config.json changed while it was in use"):
        pack(str(pruned), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module", params=["5GB", "20KB"], ids=["single", "sharded"])
def packed_llama(request, make_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "llama"
    pack(str(prune(make_llama(shard=request.param))), out)
    return out


def test_transformers_does_not_load_it(packed_llama):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="safetensors"):
        AutoModelForCausalLM.from_pretrained(packed_llama)
    with pytest.raises(UserError, match=r"is packed .* unpack it first"):
        load_torch_model(packed_llama)


LOADERS = {
    "neuroal_jax.prune": ["--sparsity", "0.5", "--allocation", "uniform", "--pruner", "magnitude", "--eval", "none"],
    "convert.masks_to_torch": ["verify", "--masks", "MASKS"],
    "convert.masks_to_torch ": ["apply", "--masks", "MASKS"],
    "convert.hf_to_flax": [],
    "convert.to_safetensors": [],
    "eval.perplexity": ["--text", "TOKENS"],
    "eval.perplexity ": ["--text", "TOKENS", "--backend", "torch"],
}


@pytest.mark.parametrize("module", LOADERS)
def test_our_programs_say_how_to_unpack_it(packed_llama, tokens, tmp_path, capsys, module):
    from neuroal_jax.masks.file import save_masks
    from tests.masks.test_masks import packed_masks

    save_masks(tmp_path / "masks", packed_masks(20)[0])
    files = {"MASKS": str(tmp_path / "masks"), "TOKENS": str(tokens)}
    arguments = [files.get(argument, argument) for argument in [*LOADERS[module], "--model", str(packed_llama)]]
    arguments += ["--calib", str(tokens)] if module == "neuroal_jax.prune" else []
    arguments += [] if "verify" in arguments else ["--out", str(tmp_path / "out")]
    assert import_module(module.strip()).main(arguments) == 2
    error = capsys.readouterr().err
    unpacking = f"python -m convert.masks_to_torch unpack --packed {packed_llama} --out DIR"
    assert f"{packed_llama} is packed (neuroal-packed.json): unpack it first: {unpacking}" in error
    assert not (tmp_path / "out").exists()


def test_a_packed_file_under_the_name_of_weights_is_still_no_checkpoint(packed, tmp_path):
    from safetensors import SafetensorError, safe_open

    shutil.copy(packed / "model.neuroal-packed", tmp_path / "model.safetensors")
    with pytest.raises(SafetensorError), safe_open(tmp_path / "model.safetensors", framework="np"):
        pass
