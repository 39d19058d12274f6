"""Token windows: which ones are drawn, how text is cut, and what is said about data that cannot be used."""

import gzip
import hashlib
import io
import json
import random
import struct
import zipfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from neuroal_jax import data as data_module
from neuroal_jax.data import Reader, Windows, default_seqlen
from neuroal_jax.errors import UserError

WORDS = 90
VOCABULARY = {"<unk>": 0, "<s>": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
LIMIT = 64
SEQLEN = 8
BIG = 10**15


def save_tokenizer(directory, *, bos: bool):
    """A tokenizer that maps whole words to ids, with or without a BOS in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=False)


@pytest.fixture
def reader(model):
    return Reader(model, len(VOCABULARY), LIMIT, SEQLEN)


def make_documents(lengths, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(WORDS)}" for _ in range(length)) for length in lengths]


def ids_of(text):
    return [VOCABULARY[word] for word in text.split()]


def write(path, documents):
    """Writes documents in the format that the name asks for; `.txt` joins them to one text."""
    lines = "".join(json.dumps({"text": document, "url": "x"}) + "\n\n" for document in documents)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"url": ["x"] * len(documents), "text": documents}), path)
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.name.endswith(".txt.gz"):
        path.write_bytes(gzip.compress(" ".join(documents).encode()))
    else:
        path.write_text(" ".join(documents))
    return str(path)


def drawn_from_documents(documents, samples, seqlen, seed):
    """The procedure of the published pruning codes, restated with Python's global generator."""
    random.seed(seed)
    windows = []
    for _ in range(samples):
        while True:
            ids = ids_of(documents[random.randint(0, len(documents) - 1)])
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


def drawn_from_one_text(ids, samples, seqlen, seed):
    random.seed(seed)
    windows = []
    for _ in range(samples):
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(list(ids[start : start + seqlen]))
    return windows


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_calibration_draws_a_document_and_then_a_start(reader, tmp_path, name, seed):
    documents = make_documents([3, SEQLEN, SEQLEN + 1, 30, 12, 0, 50, SEQLEN - 1])
    windows = reader.calibration(write(tmp_path / name, documents), 25, seed)
    assert windows.ids.tolist() == drawn_from_documents(documents, 25, SEQLEN, seed)
    assert windows.ids.dtype == np.int32


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "no_suffix"])
def test_of_one_text_only_starts_are_drawn(reader, tmp_path, name):
    documents = make_documents([20, 30])
    windows = reader.calibration(write(tmp_path / name, documents), 25, 3)
    assert windows.ids.tolist() == drawn_from_one_text(ids_of(" ".join(documents)), 25, SEQLEN, 3)


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "u2"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_1d_token_file_is_sampled_as_one_text(reader, tmp_path, suffix, dtype):
    ids = np.random.default_rng(0).integers(0, len(VOCABULARY), 40)
    path = tmp_path / f"a.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, ids.astype(dtype))
    windows = reader.calibration(str(path), 25, 3)
    assert windows.ids.tolist() == drawn_from_one_text(ids, 25, SEQLEN, 3)
    assert windows.ids.dtype == np.int32


def test_a_text_one_token_longer_than_a_window_has_one_start(reader, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(SEQLEN + 1))
    assert reader.calibration(str(tmp_path / "a.npy"), 3, 0).ids.tolist() == [list(range(SEQLEN))] * 3


def test_the_seed_changes_the_windows_and_nothing_else_does(reader, tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([40, 50, 60]))
    random.seed(123)
    first = reader.calibration(path, 10, 0)
    assert first.sha256 == reader.calibration(path, 10, 0).sha256
    assert first.sha256 != reader.calibration(path, 10, 1).sha256
    assert reader.calibration(path, 4, 0).ids.tolist() == first.ids[:4].tolist()


def test_sampling_leaves_the_global_generator_alone(reader, tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([40, 50, 60]))
    random.seed(5)
    expected = random.random()
    random.seed(5)
    reader.calibration(path, 3, 0)
    assert random.random() == expected


def test_each_document_is_tokenised_at_most_once(reader, tmp_path, monkeypatch):
    seen = []
    tokenise = data_module._tokenise
    monkeypatch.setattr(data_module, "_tokenise", lambda encode, text: (seen.append(text), tokenise(encode, text))[1])
    reader.calibration(write(tmp_path / "a.jsonl", make_documents([40, 50, 3])), 50, 0)
    assert len(seen) == len(set(seen)) == 3


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_2d_token_file_is_used_row_by_row(model, tmp_path, suffix):
    ids = np.random.default_rng(0).integers(0, len(VOCABULARY), (6, 12))
    path = tmp_path / f"a.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, ids)
    reader = Reader(model, len(VOCABULARY), LIMIT, None)
    assert reader.calibration(str(path), 4, 0).ids.tolist() == ids[:4].tolist()
    assert reader.calibration(str(path), 100, 0).ids.tolist() == ids.tolist()
    assert reader.evaluation(str(path)).ids.tolist() == ids.tolist()


def test_an_npz_holds_calibration_and_evaluation_by_name(reader, tmp_path):
    calibration, evaluation = np.full((2, SEQLEN), 1), np.full((3, SEQLEN), 2)
    np.savez(tmp_path / "a.npz", calibration=calibration, evaluation=evaluation)
    assert reader.calibration(str(tmp_path / "a.npz"), 9, 0).ids.tolist() == calibration.tolist()
    assert reader.evaluation(str(tmp_path / "a.npz")).ids.tolist() == evaluation.tolist()


@pytest.mark.parametrize("tail", [0, 1, SEQLEN - 1])
def test_evaluation_cuts_windows_and_drops_the_tail(reader, tmp_path, tail):
    documents = make_documents([5 * SEQLEN + tail])
    windows = reader.evaluation(write(tmp_path / "a.txt", documents))
    assert windows.ids.reshape(-1).tolist() == ids_of(documents[0])[: 5 * SEQLEN]
    assert windows.ids.shape == (5, SEQLEN)


def test_evaluation_joins_documents_by_a_space(reader, tmp_path):
    documents = make_documents([5, 9, 7])
    windows = reader.evaluation(write(tmp_path / "a.jsonl", documents))
    assert windows.ids.reshape(-1).tolist() == [i for document in documents for i in ids_of(document)][: 2 * SEQLEN]


def test_evaluation_cuts_a_1d_token_file(reader, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(20))
    assert reader.evaluation(str(tmp_path / "a.npy")).ids.tolist() == np.arange(16).reshape(2, 8).tolist()


def test_a_bos_goes_before_the_text_once_and_is_reported(tmp_path):
    reader = Reader(save_tokenizer(tmp_path, bos=True), len(VOCABULARY), LIMIT, SEQLEN)
    windows = reader.evaluation(write(tmp_path / "a.txt", ["w0 " * 20]))
    assert windows.ids.reshape(-1).tolist() == [1] + [2] * 15
    assert windows.starts_with_bos
    assert reader.calibration(str(tmp_path / "a.txt"), 2, 0).starts_with_bos


def test_without_a_bos_none_is_reported(reader, tmp_path):
    path = write(tmp_path / "a.txt", make_documents([20]))
    assert not reader.evaluation(path).starts_with_bos
    assert not reader.calibration(path, 2, 0).starts_with_bos


def test_windows_keep_their_origin(reader, tmp_path):
    path = write(tmp_path / "a.txt", make_documents([20]))
    assert reader.calibration(path, 2, 0).origin == reader.evaluation(path).origin == path


def test_the_default_length_counts_only_where_none_is_given(model, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40))
    without = Reader(model, len(VOCABULARY), LIMIT, None, default_seqlen=10)
    assert without.evaluation(str(tmp_path / "a.npy")).ids.shape == (4, 10)
    assert Reader(model, len(VOCABULARY), LIMIT, 5, 10).evaluation(str(tmp_path / "a.npy")).ids.shape == (8, 5)
    assert (default_seqlen("demo"), default_seqlen("other")) == (128, 2048)


def test_the_hash_is_over_shape_and_little_endian_ids():
    ids = np.arange(6).reshape(2, 3)
    expected = hashlib.sha256(b"[2, 3]\0" + struct.pack("<6i", *range(6))).hexdigest()
    assert Windows(ids.astype(np.int32), "a").sha256 == expected
    assert Windows(np.asfortranarray(ids), "b").sha256 == expected
    assert Windows(ids.reshape(3, 2), "a").sha256 != expected
    assert Windows(ids + 1, "a").sha256 != expected


# Data sets of the Hub, by stand-ins for the download.


def stand_in(monkeypatch, rows):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_c4_calibration_draws_from_the_first_training_file(reader, monkeypatch):
    documents = make_documents([5, 20, 30])
    ((args, options),) = calls = stand_in(monkeypatch, {"text": documents}) or [((), {})]
    windows = reader.calibration("c4", 10, 0)
    del args, options
    assert windows.ids.tolist() == drawn_from_documents(documents, 10, SEQLEN, 0)
    assert calls
