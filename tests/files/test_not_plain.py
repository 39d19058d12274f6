"""FIFOs, sockets, devices, directories and links to nowhere in the place of files: named, and nobody waits for them."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from eval.accuracy import ZeroShot, measured
from neuroal_jax.checkpoint import open_checkpoint
from neuroal_jax.checkpoint.safetensors import read_header
from neuroal_jax.command.parser import read_yaml
from neuroal_jax.data.tokens import load_tokens
from neuroal_jax.errors import UserError
from neuroal_jax.files.reading import SteadyFile, read_json
from neuroal_jax.masks import load_masks
from neuroal_jax.prune import main as prune
from neuroal_jax.report import main as report


@pytest.fixture(autouse=True)
def no_waiting():
    """A reader that waits is interrupted."""

    def stop(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listen(path):
    current = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as open_socket:
            open_socket.bind(path.name)
    finally:
        os.chdir(current)


KINDS = {
    "a FIFO": os.mkfifo,
    "a socket": listen,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": os.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}
READERS = {
    "masks": load_masks,
    "tokens": lambda path: load_tokens(path, "calibration", "--calib"),
    "options": lambda path: read_yaml(path, ["model"]),
    "weights": read_header,
    "weights that stay": SteadyFile.at,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_no_reader_waits(tmp_path, kind, reader):
    KINDS[kind](tmp_path / "file.npy")
    with pytest.raises(UserError, match=r"file\.npy|--calib"):
        reader(tmp_path / "file.npy")


@pytest.mark.parametrize("kind", KINDS)
def test_json_names_what_is_there(tmp_path, kind):
    KINDS[kind](tmp_path / "file.json")
    with pytest.raises(OSError, match=f"is {kind}, expected a file"):
        read_json(tmp_path / "file.json", 100)
    assert measured(tmp_path / "file.json", ZeroShot()) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_models_file_that_is_none_is_named(llama, tmp_path, kind, name):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    with pytest.raises(UserError, match=f"{name} is {kind}, expected a file"):
        open_checkpoint(str(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_is_none_is_named(make_llama, tmp_path, kind):
    model = shutil.copytree(make_llama(shard="20KB"), tmp_path / "model")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.unlink()
    KINDS[kind](shard)
    with pytest.raises(UserError, match=shard.name):
        open_checkpoint(str(model))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"a directory"}))
def test_a_model_that_is_no_directory_is_named(tmp_path, kind):
    KINDS[kind](tmp_path / "model")
    with pytest.raises(UserError, match=f"model is {kind}, expected a checkpoint directory"):
        open_checkpoint(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_orbax_file_that_is_none_is_named(llama, tmp_path, kind):
    from convert.hf_to_flax import convert

    convert(str(llama), tmp_path / "flax")
    (tmp_path / "flax" / "params_sha256.json").unlink()  # as of an older version, whose files are all Orbax's
    files = [path for path in (tmp_path / "flax" / "params").rglob("*") if path.is_file()]
    most = max(path.stat().st_size for path in files)
    for file in [path for path in files if 2 * path.stat().st_size > most]:  # Orbax may leave what it merged
        file.unlink()
        KINDS[kind](file)
    with pytest.raises(UserError, match="flax"):
        open_checkpoint(str(tmp_path / "flax")).read_block(0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beside_the_models_files_does_no_harm(llama, tokens, tmp_path, kind):
    model = shutil.copytree(llama, tmp_path / "model")
    for name in ("generation_config.json", "notes.json", "tokenizer.old", "other.safetensors"):
        (model / name).unlink(missing_ok=True)
        KINDS[kind](model / name)
    options = ["--model", model, "--calib", tokens, "--eval", "none", "--sparsity", 0.6, "--allocation", "uniform"]
    places = ["--out", tmp_path / "out", "--save-model", tmp_path / "saved"]
    assert prune(list(map(str, [*options, "--seqlen", 16, *places]))) == 0
    assert not {"notes.json", "generation_config.json"} & set(os.listdir(tmp_path / "saved"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", ["--calib", "--eval", "--allocation", "--config", "--model"])
def test_every_option_that_names_a_file_refuses_it(capsys, llama, tokens, tmp_path, kind, flag):
    KINDS[kind](tmp_path / "input")
    given = {"--model": llama, "--calib": tokens, "--eval": "none", flag: tmp_path / "input"}
    options = [str(part) for item in given.items() for part in item]
    assert prune([*options, "--sparsity", "0.5", "--seqlen", "16", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert flag in error or str(tmp_path / "input") in error
    assert os.listdir(tmp_path) == ["input"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_none_is_named(capsys, tmp_path, kind):
    KINDS[kind](Path(tmp_path / "manifest.json"))
    assert report([str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
