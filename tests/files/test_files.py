"""Reading files that someone else wrote: strict, bounded, and never while they change."""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import neuroal_jax
from neuroal_jax import UserError
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.command import program
from neuroal_jax.data.reading import read_text
from neuroal_jax.data.tokens import load_tokens
from neuroal_jax.files import reading as files
from neuroal_jax.files.reading import number, read_json
from neuroal_jax.files.writing import write_json
from neuroal_jax.machine import memory
from neuroal_jax.prune import main
from tests.conftest import save_random_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "'a' appears twice"),
        ('{"b": {"a": 1, "\\u0061": 2}}', "'a' appears twice"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[" * 65 + "]" * 65, "deeper than 64"),
        ("[" * 10**6, "deeper than 64"),
        ("9" * 5000, "4300"),
        ('{"a": [1e999]}', "a is a number beyond a float's range"),
        ("-1e999", "it is a number beyond"),
        ('{"a": {"b": 1' + "0" * 400 + "}}", "b is a whole number of 1329 bits"),
        ('\\"' * 300_000, "Expecting value"),  # these take no time: nothing is looked at again and again
        ('["' + '\\"' * 300_000, "Unterminated string"),
        ('{"a": "' + '\\"' * 300_000 + "\\", "Unterminated string"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_is_strict(text, message):
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


def test_brackets_in_strings_are_no_nesting():
    value = {"a\\": "[" * 99, 'b"': ["{" * 99]}
    assert files.parse_json(json.dumps(value)) == value


def test_what_is_larger_than_its_limit_is_not_read(tmp_path):
    (tmp_path / "a").write_text("[1]")
    assert files.read_json(tmp_path / "a", 3) == [1]
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        files.read_json(tmp_path / "a", 2)


CHANGES = {
    "longer": lambda path: path.write_bytes(b"0123456789"),
    "shorter": lambda path: path.write_bytes(b"012"),
    "the same size": lambda path: path.write_bytes(b"87654321"),
    "replaced": lambda path: (path.with_name("b").write_bytes(b"01234567"), path.with_name("b").replace(path)),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changed_is_not_read_on(tmp_path, change):
    path = tmp_path / "a"
    path.write_bytes(b"01234567")
    os.utime(path, ns=(0, 0))
    file = files.SteadyFile.at(path)
    assert file.read(2, 3) == b"234"
    file.check()
    change(path)
    if path.exists():
        os.utime(path, ns=(0, 0))  # the time of change cannot be set back
    for use in (lambda: file.read(0, 8), file.check):
        with pytest.raises(UserError, match=r"changed while it was in use|cannot be read any more"):
            use()


@pytest.mark.parametrize("change", [CHANGES["shorter"], CHANGES["the same size"], CHANGES["gone"]])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("save", [True, False])
def test_a_model_that_changes_during_a_run_is_one_line(tmp_path, tokens, capsys, monkeypatch, change, name, save):
    from neuroal_jax.walk import final

    model = save_random_model(tmp_path / "model")
    prune = final.prune

    def changing(*arguments):
        result = prune(*arguments)
        change(model / name)
        return result

    monkeypatch.setattr(final, "prune", changing)
    arguments = ["--model", model, "--sparsity", 0.5, "--allocation", "uniform", "--pruner", "magnitude"]
    arguments += ["--calib", tokens, "--eval", "none", "--out", tmp_path / "out"]
    arguments += ["--save-model", tmp_path / "saved"] if save else []
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"{name} changed while" in error or f"{name} cannot be read" in error or "not a complete" in error
    assert "--out" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_directory_that_vanishes_is_one_line(tmp_path, llama, tokens, capsys, monkeypatch):
    import shutil

    from neuroal_jax.walk import final

    prune = final.prune
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(final, "prune", lambda *arguments: (prune(*arguments), shutil.rmtree(out))[0])
    arguments = ["--model", llama, "--sparsity", 0.5, "--allocation", "uniform", "--pruner", "magnitude"]
    assert main(list(map(str, [*arguments, "--calib", tokens, "--eval", "none", "--out", out]))) == 2
    assert f"--out {out} cannot be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


EXHAUSTED = [
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", EXHAUSTED, ids=repr)
def test_running_out_of_memory_is_one_line_that_names_what_to_lower(
    tmp_path, llama, tokens, capsys, monkeypatch, error
):
    def exhausted(*arguments):
        raise error

    monkeypatch.setattr("neuroal_jax.walk.final.prune", exhausted)
    arguments = ["--model", llama, "--sparsity", 0.5, "--calib", tokens, "--eval", "none", "--allocation", "uniform"]
    assert main(list(map(str, [*arguments, "--out", tmp_path / "out"]))) == 2
    assert "out of memory" in (line := capsys.readouterr().err.strip().split("\n")[-1])
    assert "lower --nsamples" in line
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_memory():
    for error in (RuntimeError("INVALID_ARGUMENT"), OSError(28, "No space left on device"), ImportError("no module")):
        assert not memory.is_exhausted(error)
        with pytest.raises(type(error)), memory.exhaustion_explained(""):
            raise error


def test_a_run_that_cannot_fit_is_refused_before_it_starts(tmp_path, llama, tokens, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: (10_000, "free here"))
    arguments = ["--model", llama, "--sparsity", 0.5, "--calib", tokens, "--eval", "none", "--allocation", "uniform"]
    assert main(list(map(str, [*arguments, "--out", tmp_path / "out"]))) == 2
    assert "GiB are free here: lower --nsamples" in capsys.readouterr().err


def test_the_limits_of_this_process_and_of_its_control_groups_count(tmp_path, monkeypatch):
    import resource

    free = memory.available_memory()[0]
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda which: (2**20, 2**20))
        assert memory.available_memory() == (0, "left under ulimit -v")
    for name, content in (("max", "5000"), ("current", "3000"), ("stat", "anon 9\ninactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "is_relative_to", lambda path, other: True)
    if "::" in Path("/proc/self/cgroup").read_text():
        assert memory.available_memory() == (3000, "left to this control group")


def test_freed_memory_is_kept_for_the_next_and_given_back_at_the_end():
    script = """
from pathlib import Path
from neuroal_jax.machine import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

before = resident()
with memory.freed_memory_kept():
    b"x" * 2**26
    kept = resident()
print(kept - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    kept, left = (int(pages) * os.sysconf("SC_PAGE_SIZE") for pages in done.stdout.split())
    assert kept > 2**25
    assert left < 2**24


def test_the_plan_is_certain_of_less_than_it_expects(llama):
    config = neuroal_jax.PruneConfig(model=str(llama), sparsity=0.5, calib="demo", eval="none", seqlen=16, dry_run=True)
    plan = neuroal_jax.prune(config).plan
    assert 0 < plan.certain_host < plan.host_peak


def test_a_closed_pipe_ends_quietly(tmp_path, llama, tokens):
    command = [sys.executable, "-m", "neuroal_jax.prune", "--model", llama, "--sparsity", 0.5, "--pruner", "magnitude"]
    command += ["--allocation", "uniform", "--calib", tokens, "--eval", "none", "--out", tmp_path / "out"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as closed:
        done = subprocess.run(
            list(map(str, command)), cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.returncode == program.CLOSED_PIPE
    assert "error" not in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_a_message_can_neither_command_the_terminal_nor_flood_it():
    assert str(UserError("a\x1b[2J\0b\ud800\u202e")) == "a\\x1b[2J\\x00b\\ud800\\u202e"
    assert len(str(UserError("x" * 10**6))) < 2100


def test_a_dry_run_knows_whether_the_texts_exist(llama):
    options = {"model": str(llama), "sparsity": 0.5, "seqlen": 16, "dry_run": True}
    for missing in ({"calib": "none.txt", "eval": "none"}, {"calib": "demo", "eval": "none.txt"}):
        with pytest.raises(UserError, match=r"none\.txt: no such file"):
            neuroal_jax.prune(neuroal_jax.PruneConfig(**options, **missing))


def test_activations_that_overflow_in_perplexity_are_named_by_block_and_linear(tmp_path, capsys, tokens):
    from safetensors.numpy import load_file, save_file

    model = save_random_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 1e30
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = 1e30
    save_file(tensors, model / "model.safetensors")
    arguments = ["--model", model, "--sparsity", 0.5, "--allocation", "uniform", "--pruner", "magnitude"]
    arguments += ["--calib", tokens, "--eval", tokens, "--out", tmp_path / "out"]
    assert main(list(map(str, arguments))) == 2
    assert "block 1: the activations of mlp.down_proj are not finite" in capsys.readouterr().err


def test_an_index_that_places_a_tensor_in_another_shard_is_refused(tmp_path):
    model = save_random_model(tmp_path / "model", shard="20KB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    here = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(s for s in index["weight_map"].values() if s != here)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"places tensor model.norm.weight in .* but it is in {here}"):
        open_checkpoint(str(model))


def test_a_flipped_bit_in_an_orbax_checkpoint_is_found(tmp_path, llama):
    from convert.hf_to_flax import convert

    convert(str(llama), tmp_path / "flax")
    largest = max((tmp_path / "flax" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="is not what the conversion wrote"):
        open_checkpoint(str(tmp_path / "flax")).hashes()


def repeated(text, count, kind=None):
    """A column of one text, many times."""
    indices = pyarrow.array(np.zeros(count, np.int32))
    column = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))
    return column if kind is None else column.cast(kind)


def parquet_of(column, **options):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(column), file, compression="zstd", **options)
    return file.getvalue()


def messages(rows, each):
    """Conversations of `each` messages in every row."""
    columns = [repeated(text, rows * each, pyarrow.string()) for text in ("user", "x" * 100)]
    offsets = pyarrow.array(range(0, rows * each + 1, each), pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.StructArray.from_arrays(columns, ["role", "content"]))


PREFIXES = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
ROWS = b'{"text": "a"}\n' * 10**5
BOMBS = {
    "bomb.txt.gz": lambda: gzip.compress(ROWS),
    "bomb.jsonl.gz": lambda: gzip.compress(ROWS),
    "bomb.jsonl.bz2": lambda: bz2.compress(ROWS),
    "bomb.jsonl.xz": lambda: lzma.compress(ROWS),
    "bomb.jsonl.zst": lambda: pyarrow.compress(ROWS, codec="zstd", asbytes=True),
    "field.csv.gz": lambda: gzip.compress(b'text\n"' + b"a" * 10**6),
    "rows.csv.gz": lambda: gzip.compress(b"text\n" + b"a\n" * 4000),
    "rows.jsonl.gz": lambda: gzip.compress(ROWS[:9000]),  # fewer bytes than allowed, but not as objects
    "values.json": lambda: b'[{"text": "a", "x": [' + b"[]," * 9000 + b"0]}]",
    "values.jsonl": lambda: b'{"text": "a", "x": [' + b"{}," * 9000 + b"0]}",
    "text.parquet": lambda: parquet_of({"text": repeated("x" * 10**5, 1000)}),
    "rows.parquet": lambda: parquet_of({"text": repeated("a", 10**5)}),
    "no-text.parquet": lambda: parquet_of({"text": repeated("", 500)}),
    "page.parquet": lambda: parquet_of({"text": repeated("x" * 10**6, 1)}),
    "prefixes.parquet": lambda: parquet_of({"text": repeated("x" * 1000, 100, pyarrow.string())}, **PREFIXES),
    "messages.parquet": lambda: parquet_of({"messages": messages(100, 3)}),
    "row.parquet": lambda: parquet_of({"messages": messages(1, 200)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_texts_that_expand_without_measure_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 10_000)
    (tmp_path / name).write_bytes(BOMBS[name]())
    with pytest.raises(UserError, match=r"cannot be read .*far more"):
        read_text(tmp_path / name)


def test_token_files_of_several_arrays_without_names_are_refused(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.save(file, np.arange(9))
        np.save(file, np.arange(9))
    with pytest.raises(UserError, match="--calib: more than one array"):
        load_tokens(tmp_path / "a.npy", "calibration", "--calib")


def test_token_files_that_expand_without_measure_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ALWAYS_ALLOWED", 10_000)
    np.savez_compressed(tmp_path / "a.npz", np.zeros(10**6, int))
    with pytest.raises(UserError, match=r"cannot be read .*may hold"):
        load_tokens(tmp_path / "a.npz", "calibration", "--calib")


@pytest.mark.parametrize("names", [("a.npy", "a.npy"), ("calibration", "calibration.npy")])
def test_token_files_with_two_arrays_of_one_name_are_refused(tmp_path, names):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for number, name in enumerate(names):
            array = io.BytesIO()
            np.save(array, np.full(9, number))
            archive.writestr(name, array.getvalue())
    with pytest.raises(UserError, match=r"two members are called '\w+'"):
        load_tokens(tmp_path / "a.npz", "calibration", "--calib")


def test_texts_decode_within_their_measure(tmp_path):
    """5 million rows in a few kilobytes: most of what they would take is never made."""
    (tmp_path / "a.parquet").write_bytes(parquet_of({"text": repeated("once upon a time", 5_000_000)}))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="far more"):
            read_text(tmp_path / "a.parquet")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_an_index_that_leaves_out_a_tensor_of_its_shard_is_refused(tmp_path):
    model = save_random_model(tmp_path / "model", shard="20KB")
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"does not list tensor model.norm.weight, which {shard} holds"):
        open_checkpoint(str(model))


@pytest.mark.parametrize(
    "text", ["a: &a [x]\nb: *a", "model: m\nmodel: n", "a: !!bool x", "a: !!int ''", "a: " + "[" * 5000]
)
def test_yaml_is_plain(tmp_path, text):
    from neuroal_jax.command.parser import read_yaml

    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "a.yaml", ["a", "b", "model"])


def test_masks_of_sparsegpt_are_not_applied_to_a_dense_model_by_mistake(tmp_path):
    import torch

    from convert.masks_to_torch import apply_masks
    from neuroal_jax.masks.file import PackedMasks, save_masks

    packed = np.packbits(np.zeros((2, 3), bool), axis=1)
    masks = PackedMasks({"0.weight": packed}, {"0.weight": 3}, {}, "", {"weights": "updated"})
    save_masks(tmp_path / "m", masks)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(UserError, match="saved_by_run=True"):
        apply_masks(model, tmp_path / "m")
    assert (model[0].weight != 0).all()
    apply_masks(model, tmp_path / "m", saved_by_run=True)
    assert (model[0].weight == 0).all()


def test_infinity_is_text_in_json(tmp_path):
    value = {"a": [math.inf, -math.inf, 1e308], "b": {"c": np.float64(math.inf)}, "d": ("x", None, True, 10**300)}
    write_json(tmp_path / "x.json", value)
    read = read_json(tmp_path / "x.json", 10**4)
    assert read == {"a": ["inf", "-inf", 1e308], "b": {"c": "inf"}, "d": ["x", None, True, 10**300]}
    assert (number(read["b"]["c"]), number(5)) == (math.inf, 5.0)
    for none in (True, "5", "-inf", None, []):
        with pytest.raises(TypeError):
            number(none)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"a": math.nan})
