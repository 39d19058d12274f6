"""Damaged files, thousands of them: every reader gives a valid object or raises UserError, and nothing else.

NEUROAL_FUZZ is the number of examples over all readers, 500 where it is not set; `make fuzz` sets it to many more.
"""

import bz2
import copy
import gzip
import io
import json
import lzma
import math
import os
import struct

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from convert.packed_file import MAGIC, pack_file, read_layout, survey, unpack_file
from convert.pickled import read_tensors, save_tensors
from neuroal_jax import UserError
from neuroal_jax.allocation.file import FORMAT, load_allocation
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.command.parser import parse_arguments
from neuroal_jax.data import Reader
from neuroal_jax.data import windows as windows_module
from neuroal_jax.data.tokenizer import Tokenizer
from neuroal_jax.files.reading import SteadyFile
from neuroal_jax.masks.file import PackedMasks, read_masks, save_masks

READERS = 8
EXAMPLES = math.ceil(int(os.environ.get("NEUROAL_FUZZ", "500")) / READERS)
# Without the variable the examples are always the same: continuous integration fails for a change, never by chance.
fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="NEUROAL_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

HOSTILE = [
    None, True, -1, 0, 1, 0.5, 1.5, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, float("nan"),
    float("inf"), "", "0.5", "../../x", "/etc/passwd", "\0", "\ud800", "\u202e", "x" * 5000,
    [], {}, [[]], [0, 2**63], {"a": {}},
]  # fmt: skip


@st.composite
def damaged_bytes(draw, content):
    """A file with some of its bytes changed, cut out, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = int(draw(st.floats(0, 1)) * len(content))
        length = draw(st.sampled_from([1, 1, 2, 8, 64, len(content)]))
        kind = draw(st.sampled_from(["change", "cut", "repeat", "put in"]))
        if kind == "change":
            content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del content[place : place + length]
        elif kind == "repeat":
            content[place:place] = content[place : place + length]
        else:
            content[place:place] = draw(st.binary(min_size=1, max_size=9))
    return bytes(content)


@st.composite
def damaged_json(draw, value):
    """A JSON text in which some values are replaced, removed, renamed or named twice."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parent = value
        while True:
            inner = [child for child in _children(parent) if isinstance(child, dict | list) and child]
            if not inner or draw(st.booleans()):
                break
            parent = draw(st.sampled_from(inner))
        if not parent:
            break
        key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else list(range(len(parent)))))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from([str(name) for name in HOSTILE]))] = parent.pop(key)
    text = json.dumps(value)
    if draw(st.integers(0, 9)) == 0 and text.startswith("{") and len(value) > 0:
        key = next(iter(value))
        text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(draw(st.sampled_from(HOSTILE)))}}}"
    return text


def _children(value):
    return list(value.values()) if isinstance(value, dict) else list(value)


def with_header(content, text):
    """A safetensors file with another header."""
    header = text.encode()
    return struct.pack("<Q", len(header)) + header + content[8 + int.from_bytes(content[:8], "little") :]


def header_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def refused_or(use):
    """What `use` gives, or None where it raises UserError with a single printable line."""
    try:
        return use()
    except UserError as error:
        assert str(error).isprintable()
        return None


@pytest.fixture(scope="module")
def model(make_llama):
    directory = make_llama(hidden_size=16, intermediate_size=24, num_hidden_layers=1, vocab_size=20)
    return (
        directory,
        (directory / "model.safetensors").read_bytes(),
        json.loads((directory / "config.json").read_text()),
    )


@fuzzed
@given(data=st.data())
def test_checkpoint_files(model, data):
    directory, content, config = model
    if data.draw(st.booleans()):
        damaged = data.draw(damaged_bytes(content))
    else:
        damaged = with_header(content, data.draw(damaged_json(header_of(content))))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes(damaged)
    opened = refused_or(lambda: open_checkpoint(str(directory)))
    if opened is not None:
        refused_or(opened.hashes)
        for name, tensor in load_file(directory / "model.safetensors").items():
            found = refused_or(lambda name=name: opened.read(name)) if name in opened.source.infos else None
            assert found is None or found.tobytes() == tensor.tobytes()


@fuzzed
@given(data=st.data())
def test_pickled_weights(tmp_path_factory, data):
    import torch

    path = tmp_path_factory.getbasetemp() / "pytorch_model.bin"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}
    torch.save(tensors, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    found = refused_or(lambda: read_tensors(path))
    if found is not None:
        save_tensors(found, path.with_suffix(".safetensors"))


@fuzzed
@given(data=st.data())
def test_configs(model, data):
    directory, content, config = model
    (directory / "model.safetensors").write_bytes(content)
    text = data.draw(damaged_json(config))
    (directory / "config.json").write_bytes(data.draw(st.sampled_from([text.encode(), text[:-3].encode()])))
    opened = refused_or(lambda: open_checkpoint(str(directory)))
    assert opened is None or opened.config.hidden_size == 16


@fuzzed
@given(data=st.data())
def test_masks(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "masks.safetensors"
    bits = np.packbits(np.arange(5 * 12).reshape(5, 12) % 3 > 0, axis=1)
    save_masks(path, PackedMasks({"a.weight": bits, "b.weight": bits}, {"a.weight": 12, "b.weight": 12}, {}, "x", {}))
    content = path.read_bytes()
    assert (read_masks(path).packed["a.weight"] == bits).all()
    header = header_of(content)
    if data.draw(st.booleans()):
        damaged = data.draw(damaged_bytes(content))
    elif data.draw(st.booleans()):
        damaged = with_header(content, data.draw(damaged_json(header)))
    else:
        entry = data.draw(damaged_json(json.loads(header["__metadata__"]["neuroal"])))
        damaged = with_header(content, json.dumps({**header, "__metadata__": {"neuroal": entry}}))
    path.write_bytes(damaged)
    masks = refused_or(lambda: read_masks(path))
    if masks is not None:
        assert all(masks.mask(name).shape[1] == masks.widths[name] for name in masks.packed)
        assert masks.zeros() >= 0


@fuzzed
@given(data=st.data())
def test_packed_weights(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "model.packed"
    weight = np.arange(5 * 12, dtype=np.float32).reshape(5, 12) % 3
    save_file({"a": weight, "b": weight.astype(np.float16), "c": weight[0]}, path)
    plain, file = path.read_bytes(), SteadyFile.at(path)
    content = b"".join(pack_file(file, survey(file)[0]))
    if data.draw(st.booleans()):
        damaged = data.draw(damaged_bytes(content))
    else:
        damaged = MAGIC + with_header(content[len(MAGIC) :], data.draw(damaged_json(header_of(plain))))
    for packed, expected in ((content, plain), (damaged, None)):
        path.write_bytes(packed)
        file = SteadyFile.at(path)
        layout = refused_or(lambda file=file: read_layout(file))
        if layout is not None:
            assert layout.packed_bytes == len(packed)
            found = refused_or(lambda file=file, layout=layout: b"".join(unpack_file(file, layout)))
            assert found is None or len(found) == layout.num_bytes
            assert expected is None or found == expected
        else:
            assert expected is None


@fuzzed
@given(data=st.data())
def test_allocations(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "allocation.json"
    names = {f"model.layers.{block}.{linear}": (block, linear) for block in range(2) for linear in ("q", "up")}
    shapes = {"q": (4, 4), "up": (3, 4)}
    sparsity = {"model": 0.5, "model.layers.0.q": [0.1, 0.2, 0.3, 1], "model.layers.1": 0.25}
    valid = {"format": FORMAT, "method": "neuroal", "requested": 0.4, "sparsity": sparsity}
    text = data.draw(damaged_json(valid))
    path.write_bytes(data.draw(st.one_of(st.just(text.encode()), damaged_bytes(json.dumps(valid).encode()))))
    loaded = refused_or(lambda: load_allocation(path, names, shapes, 2))
    if loaded is not None:
        limit = 1000 if loaded[0].method == "alpha" else 1
        for block in loaded[0].blocks:
            assert set(block) == {"q", "up"}
            assert all((np.asarray(s) >= 0).all() and (np.asarray(s) <= limit).all() for s in block.values())


def _valid_texts():
    words = "once upon a time " * 20
    column = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [words] * 3}), column)
    lines = "".join(json.dumps({"text": words}) + "\n" for _ in range(3)).encode()
    array, archive = io.BytesIO(), io.BytesIO()
    np.save(array, np.arange(40).reshape(5, 8))
    np.savez_compressed(archive, np.arange(40))
    return {
        "a.txt": words.encode(),
        "a.jsonl": lines,
        "a.json": json.dumps([{"text": words}] * 3).encode(),
        "a.csv": f'id,text\n1,"{words}"\n2,{words}\n'.encode(),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.jsonl.bz2": bz2.compress(lines),
        "a.jsonl.xz": lzma.compress(lines),
        "a.jsonl.zst": pyarrow.compress(lines, codec="zstd", asbytes=True),
        "a.parquet": column.getvalue(),
        "a.npy": array.getvalue(),
        "a.npz": archive.getvalue(),
    }


TEXTS = _valid_texts()


@fuzzed
@given(data=st.data())
def test_texts_and_tokens(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(TEXTS)))
    path = tmp_path_factory.getbasetemp() / name
    with pytest.MonkeyPatch.context() as patch:
        plain = Tokenizer(lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32), None, {})
        patch.setattr(windows_module, "load_tokenizer", lambda model, without_bos: plain)
        reader = Reader(path.parent, 256, 64, 8)
        for read in (lambda: reader.calibration(str(path), 3, 0), lambda: reader.evaluation(str(path))):
            path.write_bytes(TEXTS[name])
            assert read().ids.shape[1] == 8
            path.write_bytes(data.draw(damaged_bytes(TEXTS[name])))
            windows = refused_or(read)
            assert windows is None or (windows.ids.shape[1] == 8 and 0 <= windows.ids.min() <= windows.ids.max() < 256)


@fuzzed
@given(data=st.data())
def test_yaml(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    valid = {"model": "m", "sparsity": 0.5, "out": "o", "block_lambdas": [0.1, 0.2], "overwrite": True, "seed": 3}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in valid.items()).encode()
    scalar = data.draw(
        st.sampled_from(["!!bool x", "!!int ''", "!!timestamp x", "&a [*a]", "*b", "!!python/name:os", "9" * 5000])
    )
    key = data.draw(st.sampled_from(sorted(valid)))
    path.write_bytes(
        data.draw(
            st.one_of(
                damaged_bytes(lines),
                damaged_json(valid).map(str.encode),
                st.just(lines + f"{key}: {scalar}\n".encode()),
                st.just(f"{key}: {scalar}\n".encode()),
            )
        )
    )
    config = refused_or(lambda: parse_arguments(["--config", str(path)]))
    assert config is None or 0 < config.sparsity < 1


def test_what_is_not_damaged_comes_back(model, tmp_path):
    """The texts above are checked as they go; here is the checkpoint."""
    directory, content, config = model
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config))
    opened = open_checkpoint(str(directory))
    tensors = {name: opened.read(name) for name in opened.source.infos}
    save_file(tensors, tmp_path / "again.safetensors")
    for name, tensor in load_file(tmp_path / "again.safetensors").items():
        np.testing.assert_array_equal(tensor, tensors[name])
