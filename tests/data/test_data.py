"""Token windows: which ones are drawn, how text is cut, and what is said about data that cannot be used."""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from neuroal_jax.data import Reader, Windows, default_seqlen, label, read_evaluations, texts, tokens
from neuroal_jax.data import windows as windows_module
from neuroal_jax.data.texts import TEXTS
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


def tokenised(monkeypatch, ids=None):
    """A list that fills with the texts that are tokenised from now on; to `ids`, where they are given."""
    seen = []
    load = windows_module.load_tokenizer

    def load_tokenizer(*arguments, **options):
        tokenizer = load(*arguments, **options)

        def encode(text):
            if text != "a":  # by which a tokenizer is asked whether it puts a BOS in front
                seen.append(text)
            return tokenizer.encode(text) if ids is None else ids

        return replace(tokenizer, encode=encode)

    monkeypatch.setattr(windows_module, "load_tokenizer", load_tokenizer)
    return seen


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
    seen = tokenised(monkeypatch)
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
        calls.append((*args, options))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_c4_calibration_draws_documents_of_the_first_training_file(reader, monkeypatch):
    documents = make_documents([5, 20, 30])
    calls = stand_in(monkeypatch, {"text": documents})
    assert reader.calibration("c4", 10, 0).ids.tolist() == drawn_from_documents(documents, 10, SEQLEN, 0)
    file = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert calls == [("allenai/c4", {"data_files": file, "split": "train"})]


def test_c4_evaluation_is_256_windows_of_the_first_1100_documents(reader, monkeypatch):
    documents = make_documents([2] * 1099 + [1, 30])
    calls = stand_in(monkeypatch, {"text": documents})
    windows = reader.evaluation("c4")
    assert windows.ids.reshape(-1).tolist() == ids_of(" ".join(documents))[: 256 * SEQLEN]
    assert calls[0][1]["split"] == "validation"
    longer = Reader(reader.model, reader.vocab_size, LIMIT, 9).evaluation("c4")
    assert longer.ids.shape == (2199 // 9, 9)  # the 1101st document is not read


def test_wikitext_joins_lines_by_a_space_to_calibrate_and_by_blank_lines_to_evaluate(model, monkeypatch):
    seen = tokenised(monkeypatch, np.arange(20))
    stand_in(monkeypatch, {"text": ["w1", "", "w2"]})
    reader = Reader(model, len(VOCABULARY), LIMIT, SEQLEN)
    reader.calibration("wikitext2", 1, 0)
    reader.evaluation("wikitext2")
    assert seen == ["w1  w2", "w1\n\n\n\nw2"]


def test_ptb_joins_sentences_by_a_space_and_runs_no_script(reader, monkeypatch):
    sentences = make_documents([4, 6])
    calls = stand_in(monkeypatch, {"sentence": sentences})
    assert reader.evaluation("ptb").ids.tolist() == [ids_of(" ".join(sentences))[:SEQLEN]]
    assert calls[0][1]["revision"] == "refs/convert/parquet"


def test_no_network_is_one_line_that_offers_local_files(reader, monkeypatch):
    import datasets

    def fail(*args, **options):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"--calib c4: the Hugging Face Hub gave no data .*no route.*local \.txt"):
        reader.calibration("c4", 1, 0)


# The same texts from local files.


@pytest.mark.parametrize(
    ("source", "column", "lines", "rows"),
    [
        ("wikitext2", "text", " = A = \n\n w1 \x85 w2 \n", [" = A = \n", "", " w1 \x85 w2 \n"]),
        ("ptb", "sentence", " w1 w2 \n w3 \n", ["w1 w2", "w3"]),
    ],
)
def test_a_local_file_gives_the_text_of_the_hub(model, tmp_path, monkeypatch, source, column, lines, rows):
    seen = tokenised(monkeypatch, np.arange(20))
    reader = Reader(model, len(VOCABULARY), LIMIT, SEQLEN)
    stand_in(monkeypatch, {column: rows})
    (tmp_path / "a.txt").write_text(lines)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    for text in (source, f"{source}={tmp_path}/a.txt", f"{source}={tmp_path}/a.jsonl"):
        evaluated = reader.evaluation(text)
        reader.calibration(text, 1, 0)
        assert evaluated.text_sha256 == hashlib.sha256(seen[0].encode()).hexdigest()
    assert seen[::2] == [seen[0]] * 3
    assert seen[1::2] == [seen[1]] * 3
    assert label(f"{source}={tmp_path}/a.txt") == source


def test_local_c4_is_cut_as_the_hub_s(reader, tmp_path):
    documents = make_documents([2] * 1099 + [1, 3])
    windows = reader.evaluation("c4=" + write(tmp_path / "a.jsonl", documents))
    assert windows.ids.reshape(-1).tolist() == ids_of(" ".join(documents))[: 256 * SEQLEN]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c4=a.txt", "w1 w2", "is one text, expected documents"),
        ("ptb=a.jsonl", '{"text": "w1"}', "string 'sentence'"),
        ("c4=a.npy", "", "name the token file alone"),
        ("c4=none", None, "no such file$"),
        ("c5=a.txt", "w1", "no such file, and not one of"),
        ("demo=a.txt", "w1", "no such file, and not one of"),
    ],
)
def test_local_texts_that_do_not_follow_their_name(reader, tmp_path, name, content, message):
    known, file = name.split("=")
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        reader.evaluation(f"{known}={tmp_path}/{file}")


def test_every_text_has_a_name_of_its_own(reader, tmp_path):
    first = write(tmp_path / "a.jsonl", make_documents([40]))
    assert set(read_evaluations(reader, [first, f"c4={first}"])) == {"a.jsonl", "c4"}
    with pytest.raises(UserError, match=r"--eval: two of .* are called a\.jsonl"):
        read_evaluations(reader, [first, first])


def test_windows_tell_their_tokenizer(reader, model, tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([40]))
    before = reader.evaluation(path)
    assert before.bos == "nowhere"
    assert set(before.tokenizer) == {"class", "sha256"}
    (model / "added_tokens.json").write_text("{}")
    try:
        assert reader.evaluation(path).tokenizer["sha256"] != before.tokenizer["sha256"]
    finally:
        (model / "added_tokens.json").unlink()


# The registry of texts.


def test_a_text_source_is_one_file_and_one_registry_line():
    assert list(TEXTS) == ["wikitext2", "c4", "ptb", "demo"]
    assert {path.stem for path in Path(texts.__file__).parent.glob("*.py")} == {"__init__", *TEXTS}
    for name, entry in TEXTS.items():
        assert {"rows", "text"} <= set(vars(TEXTS.module(name)))
        assert (entry.evaluation_tokens is None) != (entry.evaluation_windows is None)


NEW_SOURCE = '''"""WikiText-103, raw: lines of articles, joined to one text."""

from collections.abc import Sequence

from neuroal_jax.data.hub import hub_rows
from neuroal_jax.data.reading import Text


def rows(split: str, column: str) -> Sequence[str]:
    """The lines of `train` or `test`."""
    return hub_rows(column, "Salesforce/wikitext", "wikitext-103-raw-v1", split=split)


def text(rows: Sequence[str], split: str) -> Text:
    """One text, with a blank line between rows."""
    return Text(["\\n\\n".join(rows)], joined=True)


def row(line: str) -> str:
    """The Hub's rows end in a line break, empty ones have none."""
    return line if line.strip() else ""
'''
NEW_LINE = '"wikitext103": TextSource(help="many articles of Wikipedia", evaluation_tokens=340_000),'
USE_OF_IT = """
import datasets
from neuroal_jax.checkpoint.locate import DEMO
from neuroal_jax.command.parser import parse_arguments
from neuroal_jax.data import Reader, label

locations = []
rows = [" = A = \\n", ""] + [" The language reference says what a statement does. \\n"] * 20
datasets.load_dataset = lambda *location, **options: locations.append(location) or {"text": rows}
open("a.txt", "w").write("".join(row or "\\n" for row in rows))
reader = Reader(DEMO, 768, 256, 32)
hub, local = reader.evaluation("wikitext103"), reader.evaluation("wikitext103=a.txt")
assert locations == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
assert hub.sha256 == local.sha256 != reader.evaluation("a.txt").sha256
assert label("wikitext103=a.txt") == "wikitext103"
assert reader.calibration("wikitext103=a.txt", 3, 0).ids.shape == (3, 32)
parse_arguments(["--help"])
"""


def test_a_new_text_source_needs_nothing_else(tmp_path):
    package = tmp_path / "neuroal_jax"
    shutil.copytree(Path(texts.__file__).parents[2], package, ignore=shutil.ignore_patterns("__pycache__"))
    registry = package / "data/texts/__init__.py"
    (registry.parent / "wikitext103.py").write_text(NEW_SOURCE)
    before, demo, after = registry.read_text().partition('        "demo": ')
    registry.write_text(f"{before}        {NEW_LINE}\n{demo}{after}")
    ran = subprocess.run([sys.executable, "-c", USE_OF_IT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "wikitext2, c4, ptb, wikitext103, demo" in " ".join(ran.stdout.split())


# What cannot be used.


def saved(array, *, compressed=False, npz=False):
    file = io.BytesIO()
    if compressed or npz:
        (np.savez_compressed if compressed else np.savez)(file, calibration=array, evaluation=array)
    else:
        np.save(file, array, allow_pickle=True)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def in_directory(archive, offset, value):
    """An archive with one byte of every member's entry in the central directory changed."""
    changed = bytearray(archive)
    place = changed.find(b"PK\x01\x02")
    while place >= 0:
        changed[place + offset] = value
        place = changed.find(b"PK\x01\x02", place + 1)
    return bytes(changed)


def overwritten(content, start, length=16):
    return content[:start] + b"\xff" * length + content[start + length :]


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def parquet_of(**columns):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


LONG = " ".join(["w1"] * 100)
IDS = np.arange(40)
DAMAGED_GZIP = overwritten(gzip.compress(" ".join(make_documents([500])).encode()), 100)
HUGE_SHAPE = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({BIG},), }}"

BAD_TEXT = {
    "three tokens": ("a.txt", b"w1 w2 w3", r"(3 tokens|longest of 1 has 3).*lower --seqlen"),
    "no tokens": ("a.txt", b"", "holds no text"),
    "white space": ("a.txt", b" \n\t ", "holds no text"),
    "bytes": ("a.txt", b"w1 \xff\xfe", r"cannot be read as text \('utf-8' codec"),
    "no documents": ("a.jsonl", b"\n", "holds no text"),
    "empty documents": ("a.jsonl", b'{"text": ""}\n{"text": " "}\n', "holds no text"),
    "not JSON": ("a.jsonl", b'{"text": "w1"}\n\nw2\n', "line 3 is no JSON object with a string 'text'"),
    "no text in the line": ("a.jsonl", b'{"content": "w1"}', "line 1 is no JSON object with a string 'text'"),
    "a list": ("a.jsonl", b'["text"]', "item 1 is no JSON object with a string 'text'"),
    "a number": ("a.jsonl", b'{"text": 1}', "line 1 is no JSON object with a string 'text'"),
    "deep nesting": ("a.jsonl", b"[" * 100_000, "item 1 is no JSON object with a string 'text'"),
    "half a character": ("a.jsonl", json.dumps({"text": LONG + " \ud800"}).encode(), "--(calib|eval)"),
    "not gzip": ("a.txt.gz", b"w1 w2", "cannot be read as text .*gzip"),
    "half a gzip file": ("a.jsonl.gz", gzip.compress(LONG.encode())[:-9], "cannot be read as text"),
    "damaged gzip file": ("a.txt.gz", DAMAGED_GZIP, "--(calib|eval)"),
    "bytes in gzip": ("a.txt.gz", gzip.compress(b"\xff"), "cannot be read as text"),
    "no text column": ("a.parquet", parquet_of(body=["w1"]), r"has columns \['body'\], expected one named 'text'"),
    "column of numbers": ("a.parquet", parquet_of(text=[1, 2]), "column 'text' holds something other than strings"),
    "column with a null": ("a.parquet", parquet_of(text=[LONG, None]), "column 'text' holds something other"),
    "no rows": ("a.parquet", parquet_of(text=pyarrow.array([], pyarrow.string())), "holds no text"),
    "not parquet": ("a.parquet", b"PAR1 or so", "cannot be read as parquet"),
    "half a parquet file": ("a.parquet", parquet_of(text=[LONG])[:-20], "cannot be read as parquet"),
    "no such file": ("a.txt", None, "no such file, and not one of wikitext2, c4, ptb, demo"),
    "no such token file": ("a.npy", None, "no such file"),
}

BAD_TOKENS = {
    "too short": ("a.npy", saved(IDS[: SEQLEN - 1]), rf"({SEQLEN - 1} tokens|1 has {SEQLEN - 1}).*lower --seqlen"),
    "none": ("a.npy", saved(IDS[:0]), "holds no tokens"),
    "no rows": ("a.npy", saved(np.zeros((0, SEQLEN), int)), "holds no tokens"),
    "above the vocabulary": ("a.npy", saved(IDS + 53), "token id 92 is outside of the model's vocabulary of 92"),
    "above int64": ("a.npy", saved(IDS.astype(np.uint64) + 2**63), "is outside of the model's vocabulary"),
    "negative": ("a.npy", saved(IDS - 1), "token id -1 is outside of the model's vocabulary of 92"),
    "negative in 2-D": ("a.npy", saved(IDS.reshape(5, SEQLEN) - 1), "token id -1 is outside"),
    "floats": ("a.npy", saved(IDS / 1), "holds float64 of shape .*, expected whole numbers, 1-D or 2-D"),
    "booleans": ("a.npy", saved(IDS > 3), "holds bool of shape .*, expected whole numbers"),
    "time spans": ("a.npy", saved(IDS.astype("m8[s]")), "expected whole numbers"),
    "text": ("a.npy", saved(np.array(["w1"])), "expected whole numbers"),
    "3-D": ("a.npy", saved(IDS.reshape(5, 2, 4)), r"holds int64 of shape \[5, 2, 4\], expected whole numbers"),
    "0-D": ("a.npy", saved(np.array(5)), r"of shape \[\], expected whole numbers"),
    "objects": ("a.npy", saved(np.array([1, None], object)), "Object arrays cannot be loaded"),
    "objects in npz": ("a.npz", saved(np.array([1, None], object), npz=True), "Object arrays cannot be loaded"),
    "a pickle": ("a.npy", b"\x80\x04K\x01.", "cannot be read as NumPy token ids"),
    "no bytes": ("a.npy", b"", "cannot be read as NumPy token ids"),
    "half a file": ("a.npy", saved(IDS)[:-9], "cannot be read as NumPy token ids"),
    "an open bracket in the header": ("a.npy", npy_header("{'descr': ("), "cannot be read as NumPy token ids"),
    "keys of two kinds in the header": ("a.npy", npy_header("{1: 2, 'a': 3}"), "cannot be read as NumPy token ids"),
    "more than any memory": ("a.npy", npy_header(HUGE_SHAPE), "cannot be read as NumPy token ids"),
    "another width": ("a.npy", saved(IDS.reshape(4, 10)), "rows have 10 tokens, expected 8 as --seqlen"),
    "two arrays": ("a.npz", zipped(**{"x.npy": saved(IDS), "y.npy": saved(IDS)}), r"holds arrays \['x', 'y'\]"),
    "no arrays": ("a.npz", zipped(), r"holds arrays \[\], expected a single one or one named"),
    "a member that is no array": ("a.npz", zipped(**{"calibration.npy": b"w1"}), "--(calib|eval) .*a.npz: "),
    "half an archive": ("a.npz", saved(IDS, npz=True)[:-30], "cannot be read as NumPy token ids"),
    "wrong checksum": ("a.npz", in_directory(saved(IDS, npz=True), 16, 0), "cannot be read as NumPy token ids"),
    "encrypted": ("a.npz", in_directory(saved(IDS, npz=True), 8, 1), "--(calib|eval) .*a.npz: "),
    "unknown compression": ("a.npz", in_directory(saved(IDS, npz=True), 10, 99), "--(calib|eval) .*a.npz: "),
}


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("name", "content", "message"), [*BAD_TEXT.values(), *BAD_TOKENS.values()], ids=[*BAD_TEXT, *BAD_TOKENS]
)
def test_refuses(reader, tmp_path, name, content, message, use):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        reader.calibration(str(path), 3, 0) if use == "calibration" else reader.evaluation(str(path))
    flag = "--calib" if use == "calibration" else "--eval"
    assert str(caught.value).startswith(f"{flag} {path}: ")


def test_too_short_documents_name_the_longest(reader, tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([3, SEQLEN, 5]))
    with pytest.raises(UserError, match=r"no document has more than 8 tokens, the longest of 3 has 8: lower --seqlen"):
        reader.calibration(path, 3, 0)


def test_a_text_of_exactly_one_window_evaluates_but_does_not_calibrate(reader, tmp_path):
    path = write(tmp_path / "a.txt", make_documents([SEQLEN]))
    assert reader.evaluation(path).ids.shape == (1, SEQLEN)
    with pytest.raises(UserError, match="the longest of 1 has 8"):
        reader.calibration(path, 3, 0)


def test_a_hopeless_data_set_is_given_up(reader, monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "_HOPELESS", 5)
    path = write(tmp_path / "a.jsonl", make_documents([3] * 1000))
    with pytest.raises(UserError, match="the longest of 5 has 3"):
        reader.calibration(path, 3, 0)


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
@pytest.mark.parametrize("name", ["missing", "wikitext", "a" * 300, "a" * 300 + ".npy"])
def test_a_name_that_is_no_file_and_no_data_set_is_refused(reader, use, name):
    with pytest.raises(UserError, match=f"{name}: "):
        reader.calibration(name, 3, 0) if use == "calibration" else reader.evaluation(name)


@pytest.mark.parametrize(("inside", "advice"), [("a.jsonl", "name one of its files"), ("state.json", "")])
def test_a_directory_is_called_one(reader, tmp_path, inside, advice):
    (tmp_path / inside).write_text("{}")
    if inside == "state.json":  # as datasets.save_to_disk
        (tmp_path / "dataset_info.json").write_text("{}")
        advice = "to_parquet"
    for source in (str(tmp_path), f"c4={tmp_path}"):
        with pytest.raises(UserError, match=f"is a directory, .*{advice}"):
            reader.calibration(source, 3, 0)


def test_a_pipe_is_no_text(reader, tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is no regular file"):
        reader.calibration(str(tmp_path / "a.txt"), 3, 0)


@pytest.mark.parametrize("name", ["a.txt", "a.npy"])
def test_a_length_above_the_limit_of_the_model_is_refused(model, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(saved(np.arange(80)) if name == "a.npy" else LONG.encode())
    assert Reader(model, len(VOCABULARY), LIMIT, LIMIT).calibration(str(path), 1, 0).ids.shape == (1, LIMIT)
    for reader in (Reader(model, len(VOCABULARY), LIMIT, 65), Reader(model, len(VOCABULARY), LIMIT, None, 65)):
        for read in (lambda r=reader: r.calibration(str(path), 1, 0), lambda r=reader: r.evaluation(str(path))):
            with pytest.raises(UserError, match=r"--seqlen 65 exceeds .*max_position_embeddings 64: pass --seqlen 64"):
                read()


@pytest.mark.parametrize("width", [1, LIMIT + 1])
def test_rows_the_model_has_no_positions_for_are_refused(model, tmp_path, width):
    np.save(tmp_path / "a.npy", np.zeros((3, width), int))
    reader = Reader(model, len(VOCABULARY), LIMIT, None)
    for read in (
        lambda: reader.calibration(str(tmp_path / "a.npy"), 1, 0),
        lambda: reader.evaluation(str(tmp_path / "a.npy")),
    ):
        with pytest.raises(UserError, match=f"rows have {width} tokens, expected 2 to .*max_position_embeddings 64"):
            read()


def test_windows_of_one_token_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="--seqlen 1 leaves nothing to predict"):
        Reader(model, len(VOCABULARY), LIMIT, 1).calibration(write(tmp_path / "a.txt", [LONG]), 1, 0)


def test_a_tokenizer_of_another_model_is_noticed(model, tmp_path):
    reader = Reader(model, 50, LIMIT, SEQLEN)
    path = write(tmp_path / "a.txt", ["w80 " * 30])
    for read in (lambda: reader.calibration(path, 1, 0), lambda: reader.evaluation(path)):
        with pytest.raises(UserError, match="token id 82 is outside of the model's vocabulary of 50"):
            read()


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": {"type": "x"}}'])
def test_a_missing_or_damaged_tokenizer_is_refused_and_token_ids_offered(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    reader = Reader(tmp_path, len(VOCABULARY), LIMIT, SEQLEN)
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be loaded .*pass token ids \(\.npy\) instead"):
        reader.calibration(write(tmp_path / "a.txt", [LONG]), 1, 0)


@pytest.mark.parametrize("use", ["calibration", "evaluation"])
def test_a_family_may_want_bos_in_front_of_every_window(tmp_path, use):
    from neuroal_jax.checkpoint.locate import DEMO

    plain, always = Reader(DEMO, 768, 256, 32), Reader(DEMO, 768, 256, 32, bos_every_window=True)
    (tmp_path / "a.txt").write_text("The language reference says what an assignment statement does. " * 40)

    def read(reader):
        return (
            reader.calibration(str(tmp_path / "a.txt"), 4, 0)
            if use == "calibration"
            else reader.evaluation(str(tmp_path / "a.txt"))
        )

    windows = read(always).ids
    assert windows.shape[1] == 32
    assert (windows[:, 0] == 0).all()
    assert (windows[:, 1:] != 0).all()
    assert read(always).starts_with_bos
    assert (read(plain).ids[1:, 0] != 0).any()
