"""Text as people have it: names, encodings, compressions, columns, conversations; and what is refused by name."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
from pyarrow import feather, parquet

from neuroal_jax.command.config import PruneConfig
from neuroal_jax.data.reading import read_text
from neuroal_jax.data.sources import check_sources
from neuroal_jax.data.windows import Reader
from neuroal_jax.errors import UserError
from tests.data.test_data import LIMIT, SEQLEN, VOCABULARY, make_documents, parquet_of, save_tokenizer

DOCUMENTS = ["once upon a time", 'a "quoted, tale"', "of\ntwo lines", "", "na\u00efve \u2028 caf\u00e9"]
LINES = "".join(json.dumps({"id": 1, "text": document}, ensure_ascii=False) + "\n" for document in DOCUMENTS)


def table(delimiter=",", documents=DOCUMENTS):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *([1, document] for document in documents)])
    return file.getvalue()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


ARRAY = [{"id": 1, "text": document} for document in DOCUMENTS]
TABLES = {
    **dict.fromkeys(
        ("a.jsonl", "a.json", "A.JSONL", "a.ndjson", "a.jsonlines", "a.jl", "a", "a.jsonl.txt", "a.json.1"),
        LINES.encode(),
    ),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "bom.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "u16.jsonl": LINES.encode("utf-16"),
    "array.json": json.dumps(ARRAY).encode(),
    "indented.json": json.dumps(ARRAY, indent=1).encode(),
    "array.txt": json.dumps(ARRAY, indent=2).encode(),
    "array.jsonl": b"\n" + json.dumps(ARRAY).encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode()),
    "A.JSONL.GZ": gzip.compress(LINES[:40].encode()) + gzip.compress(LINES[40:].encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.xz": lzma.compress(LINES.encode()),
    "a.jsonl.zst": zstd(LINES[:40].encode()) + zstd(LINES[40:].encode()),
    "unnamed.jsonl": gzip.compress(LINES.encode()),
    "wrong.jsonl.gz": bz2.compress(LINES.encode()),
    "a.csv": table().encode(),
    "b.CSV": codecs.BOM_UTF8 + table(";").encode(),
    "a.tsv": table("\t").encode(),
    "tab.csv": table("\t").encode(),
    "a.csv.gz": gzip.compress(table().encode()),
    "csv.txt": table().encode(),
    "csv": table("|").encode(),
    "a.parquet": parquet_of(text=DOCUMENTS),
    "a.PARQUET": parquet_of(text=pyarrow.array(DOCUMENTS, pyarrow.large_string())),
    "dictionary.pq": parquet_of(text=pyarrow.array(DOCUMENTS).dictionary_encode()),
    "parquet.txt": parquet_of(text=DOCUMENTS),
    "parquet": parquet_of(text=pyarrow.array(DOCUMENTS, pyarrow.string_view())),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_by_what_it_holds(tmp_path, name):
    (tmp_path / name).write_bytes(TABLES[name])
    text = read_text(tmp_path / name)
    assert text.documents == DOCUMENTS
    assert not text.joined


def test_parquet_in_which_texts_repeat_their_beginnings(tmp_path):
    parquet.write_table(
        pyarrow.table({"text": DOCUMENTS}),
        tmp_path / "a.parquet",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    assert read_text(tmp_path / "a.parquet").documents == DOCUMENTS


PROSE = "[Music] Once upon a time,\n\u201cshe said\u201d, yes, no;\n{and} so on.\n"
PROSES = {
    **dict.fromkeys(("a.txt", "a", "A.TXT", "a.md", "wiki.train.raw", "enwik8", "a.py"), PROSE.encode()),
    "crlf.txt": PROSE.replace("\n", "\r\n").encode(),
    **{f"{encoding}.txt": PROSE.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "utf-32")},
    "utf-16-be.txt": codecs.BOM_UTF16_BE + PROSE.encode("utf-16-be"),
    "utf-32-be.txt": codecs.BOM_UTF32_BE + PROSE.encode("utf-32-be"),
    "padded.bz2": bz2.compress(PROSE[:9].encode()) + bytes(9000) + bz2.compress(PROSE[9:].encode()) + b"\0",
    "two.xz": lzma.compress(PROSE[:9].encode()) + lzma.compress(PROSE[9:].encode()),
    "a.txt.xz": lzma.compress(PROSE.encode()),
    "a.txt.zst": zstd(PROSE.encode("utf-16")),
}


@pytest.mark.parametrize("name", PROSES)
def test_other_text_is_one(tmp_path, name):
    (tmp_path / name).write_bytes(PROSES[name])
    text = read_text(tmp_path / name)
    assert text.documents == [PROSE]
    assert text.joined


@pytest.mark.parametrize(
    "prose",
    [
        "<unk> was a bank\n",
        '"Hello," he said.\n',
        "Yes, no\nmaybe\n",
        "[1] See there.\n",
        "{a} b\n",
        "| a bar\n",
        "BZh\n",
    ],
)
def test_prose_with_signs_in_front_is_prose(tmp_path, prose):
    (tmp_path / "a.txt").write_text(prose)
    assert read_text(tmp_path / "a.txt").documents == [prose]


def archived():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", PROSE)
    return file.getvalue()


def fed(write):
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def streamed(file):
    with pyarrow.ipc.new_stream(file, pyarrow.schema([("text", pyarrow.string())])) as writer:
        writer.write_table(pyarrow.table({"text": DOCUMENTS}))


REFUSED = {
    "zip": ("a.zip", zipped(), "holds a ZIP archive, expected one of .txt; .jsonl"),
    "zip named text": ("a.txt", zipped(), "holds a ZIP archive"),
    "Word": ("a.docx", zipped(), "holds a ZIP archive"),
    "tar": ("a.tar", archived(), "holds a tar archive"),
    "tar.gz": ("a.tar.gz", gzip.compress(archived()), "holds a tar archive"),
    "twice compressed": ("a.txt.gz", gzip.compress(gzip.compress(b"a")), "holds gzip"),
    "compressed parquet": ("a.parquet.gz", gzip.compress(parquet_of(text=["a"])), "is compressed as a whole"),
    "7-Zip": ("a.7z", b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    "PDF": ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", "holds a PDF"),
    "RTF": ("a.txt", b"{\\rtf1 Hello}", "holds RTF"),
    "Arrow": ("a.arrow", fed(lambda file: feather.write_feather(pyarrow.table({"text": ["a"]}), file)), "Arrow table"),
    "Arrow stream": ("a.arrow", fed(streamed), "holds an Arrow stream"),
    "NumPy": ("a.txt", fed(lambda file: np.save(file, np.arange(9))), "holds a NumPy array.*\\.npy or \\.npz of token"),
    "compressed NumPy": ("a.npy.gz", gzip.compress(fed(lambda file: np.save(file, [1]))), "holds a NumPy array"),
    "pickle": ("a.pkl", b"\x80\x04K\x01.", "cannot be read as text"),
    "LZ4": ("a.txt.lz4", b"\x04\x22\x4d\x18abc", "holds LZ4"),
    "Brotli": ("a.txt.br", b"abc", r"\.br files are not read as text, expected one of"),
    "HTML by name": ("a.html", PROSE.encode(), r"\.html files are not read"),
    "JSON with comments": ("a.json5", b"{text: 'a'} // b", r"\.json5 files are not read"),
    "YAML": ("a.YAML", b"text: a\n", r"\.yaml files are not read"),
    "HTML": ("a.txt", b"\n<!DOCTYPE html><p>Hello", "holds HTML or XML"),
    "XML": ("a", b"<?xml version='1.0'?><doc/>", "holds HTML or XML"),
    "a table of Markdown": ("a.md", b"| text | label |\n|:---|---:|\n| a | b |\n", "a table of Markdown"),
    "UTF-16 without a mark": ("a.txt", PROSE.encode("utf-16-le"), "NUL bytes.*UTF-16 without a byte order mark"),
    "Windows-1252": ("a.txt", "caf\u00e9".encode("cp1252"), "'utf-8' codec can't decode.*: save it as UTF-8"),
    "half a UTF-16 character": ("a.txt", PROSE.encode("utf-16")[:-1], "cannot be read as text .*utf-16"),
    **{
        f"not {name}": (f"a.jsonl.{suffix}", LINES.encode(), f"it is not {name}, which its name says")
        for suffix, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz"), ("zst", "Zstandard"))
    },
    **{
        f"half a {name} file": (f"a.{name}", pack(PROSE.encode() * 9)[:-9], "cannot be read as text")
        for name, pack in (("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd))
    },
    **{
        f"{more[:4]!r} after {name}": (f"a.{name}", pack(b"abc") + more, "cannot be read as text")
        for name, pack in (("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd), ("gz", gzip.compress))
        for more in (b"more", b"\0" + pack(PROSE.encode())[1:])
    },
    "damaged xz": ("a.xz", lzma.compress(b"a" * 99)[:30] + b"\xff" * 40, "cannot be read as text"),
    "parquet that is text": ("a.parquet", PROSE.encode(), "cannot be read as parquet"),
    "Python's dicts": ("a.txt", b"{'text': 'a'}\n", "line 1 is no JSON object"),
    "a double key": ("a.jsonl", LINES.encode() + b'{"text": "a", "text": "b"}', "line 6 is no .*'text' appears twice"),
    "a double key elsewhere": ("a.jsonl", b'{"text": "a", "m": {"b": 1, "b": 2}}', "line 1 is no .*'b' appears twice"),
    "a double key in an array": ("a.json", b'[{"text": "a"}, {"text": "a", "text": "b"}]', "item 2 .*'text' appears"),
    "NaN": ("a.jsonl", b'{"text": "a", "score": NaN}', "NaN is no JSON number"),
    "null": ("a.jsonl", LINES.encode() + b'{"text": null}', "line 6 is no JSON object .*NoneType"),
    "true": ("a.json", b'[{"text": true}]', "item 1 is no JSON object .*bool"),
    "an object of several lines": ("a.json", json.dumps({"text": "a"}, indent=2).encode(), "line 1 .*several lines"),
    "half an array": ("a.json", b'[{"text": "a"}', "item 1 .*neither another item nor the end"),
    "a comma after the last item": ("a.json", b'[{"text": "a"},]', "item 2 is no JSON"),
    "text after the array": ("a.json", b'[{"text": "a"}]\n[]', "item 1 .*neither another item nor the end"),
    "arrays without names": ("a.jsonl", b'["a"]\n["b"]', "item 1 is no JSON object"),
    "columns as pandas writes them": ("a.json", b'{"text": {"0": "a"}}', "line 1 is no JSON object .*dict"),
    "another column": ("a.jsonl", b'{"content": "a", "id": 1}', r"its columns: 'content', 'id'; --text-column names"),
    "another column in CSV": ("a.csv", b"content,id\na,1\n", r"has columns \['content', 'id'\], expected .*'text'"),
    "CSV without names": ("a.csv", b"a b,1\nc d,2\n", r"has columns \['a b', '1'\], expected one named 'text'"),
    "CSV that names no text": ("a", b"content,id\na,1\n", r"has columns \['content', 'id'\]"),
    "a double column": ("a.csv", b"text,id,text\na,1,b\n", "line 1: names column 'text' twice"),
    "a short row": ("a.csv", b'text,id\na,1\n"b"\n', "line 3: has 1 fields, expected 2"),
    "an open quote": ("a.csv", b'text,id\n"a,1\nb,2\n', "cannot be read as CSV"),
    "text and messages": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": [{"role": "a", "content": "b"}]}',
        "line 2 .*in one column",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / name)


# Columns.


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_column_can_be_named(tmp_path, name):
    rows = [{"text": "no", "a.b": document, "id": 1} for document in DOCUMENTS]
    if name == "a.csv":
        content = table().replace("text", "a.b").encode()
    elif name == "a.parquet":
        content = parquet_of(**{key: [row[key] for row in rows] for key in rows[0]})
    else:
        content = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / name).write_bytes(content)
    assert read_text(tmp_path / name, "a.b").documents == DOCUMENTS
    with pytest.raises(UserError, match=r"'none'.*'a\.b'|'a\.b'.*'none'"):
        read_text(tmp_path / name, "none")


def test_a_named_column_holds_for_known_texts_too(tmp_path):
    reader = Reader(save_tokenizer(tmp_path, bos=False), len(VOCABULARY), LIMIT, SEQLEN, text_column="body")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "", "sentence": "", "body": make_documents([40])[0]}))
    for source in ("a.jsonl", "ptb=a.jsonl", "c4=a.jsonl"):
        assert reader.evaluation(source.replace("a.jsonl", str(tmp_path / "a.jsonl"))).ids.shape == (5, SEQLEN)


def test_a_column_without_a_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    np.save(tmp_path / "a.npy", [1])
    check_sources("demo", [f"c4={tmp_path}/a.jsonl"], "body")
    for calibration in ("demo", f"{tmp_path}/a.npy"):
        with pytest.raises(UserError, match="--text-column body has no effect"):
            check_sources(calibration, ["wikitext2"], "body")
    for bad in ("", 3, True):
        with pytest.raises(UserError, match=r"--text-column is .*, expected a name"):
            PruneConfig(model="m", sparsity=0.5, out="o", text_column=bad)


# Conversations.

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}"
    "{{ bos_token if loop.first }} {{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
)
CHATS = [[("user", "w5 w6"), ("assistant", "w7")], [("user", " ".join(["w8"] * 30))], [("user", "w9")]]
RENDERED = [[1, 3, 7, 8, 4, 9], [1, 3, *[10] * 30], [1, 3, 11]]  # <s> is 1, w0 is 2


def messages(chat, role="role", content="content", names=()):
    return [{role: dict(names).get(who, who), content: said} for who, said in chat]


def chat_files():
    rows = [{"prompt": "p", "messages": messages(chat)} for chat in CHATS]
    shared = [("user", "human"), ("assistant", "gpt")]
    sharegpt = [{"conversations": messages(chat, "from", "value", shared)} for chat in CHATS]
    return {
        "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "sharegpt.json": json.dumps(sharegpt).encode(),
        "a.parquet": parquet_of(**{key: [row[key] for row in rows] for key in rows[0]}),
    }


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    model = save_tokenizer(tmp_path_factory.mktemp("chat"), bos=True)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


@pytest.mark.parametrize("name", chat_files())
def test_conversations_go_through_the_chat_template(chat_model, tmp_path, name):
    (tmp_path / name).write_bytes(chat_files()[name])
    reader = Reader(chat_model, len(VOCABULARY), LIMIT, 5)
    windows = reader.evaluation(str(tmp_path / name))
    assert (
        windows.ids.reshape(-1).tolist() == [id for ids in RENDERED for id in ids][:40]
    )  # with no BOS of the tokenizer's own
    assert windows.bos == "every document"
    assert "chat_template_sha256" in windows.tokenizer
    drawn = reader.calibration(str(tmp_path / name), 20, 0).ids.tolist()
    assert {tuple(window) for window in drawn} >= {(1, 3, 7, 8, 4)}
    assert all(str(window)[1:-1] in str(RENDERED) for window in drawn)


def test_bos_in_front_of_every_window_is_not_doubled_by_the_template(chat_model, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(chat_files()["a.jsonl"])
    reader = Reader(chat_model, len(VOCABULARY), LIMIT, 5, bos_every_window=True)
    windows = reader.evaluation(str(tmp_path / "a.jsonl"))
    assert windows.ids[0].tolist() == [1, 3, 7, 8, 4]
    assert (windows.ids[:, 0] == 1).all()


def test_the_date_in_a_template_stays(tmp_path):
    model = save_tokenizer(tmp_path, bos=False)
    (model / "chat_template.jinja").write_text(
        "{% set date = 'none' %}{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ 'w1 ' * 20 if date == '26 Jul 2024' else date }}"
    )
    (tmp_path / "a.jsonl").write_bytes(chat_files()["a.jsonl"])
    assert (Reader(model, len(VOCABULARY), LIMIT, SEQLEN).evaluation(str(tmp_path / "a.jsonl")).ids == 3).all()


BAD_CHATS = {
    "another role": (
        [{"role": "tool", "content": "a"}],
        r"a\.jsonl: line 1 does not fit the chat template in .*no tool",
    ),
    "no messages": ([], r"holds no text"),
    "no role": ([{"content": "a"}], r"line 1 .*message 1 has no texts 'role' and 'content'"),
    "parts": ([{"role": "user", "content": [{"type": "image"}]}], r"line 1 .*message 1 has no texts"),
    "texts": (["a"], r"line 1 .*message 1 has no texts"),
    "blank": ([{"role": "user", "content": " "}], r"holds no text"),
}


@pytest.mark.parametrize(("chat", "message"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_conversations_that_do_not_fit_are_refused(chat_model, tmp_path, chat, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    with pytest.raises(UserError, match=message):
        Reader(chat_model, len(VOCABULARY), LIMIT, SEQLEN).evaluation(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("template", [None, "{{", "{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}", "{{ 1 / 0 }}"])
def test_templates_that_are_missing_or_damaged_or_reach_out_are_refused(tmp_path, template):
    model = save_tokenizer(tmp_path, bos=False)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    (tmp_path / "a.jsonl").write_bytes(chat_files()["a.jsonl"])
    message = "has no chat template.*--text-column" if template is None else "does not fit the chat template"
    with pytest.raises(UserError, match=message):
        Reader(model, len(VOCABULARY), LIMIT, SEQLEN).calibration(str(tmp_path / "a.jsonl"), 2, 0)


def test_known_texts_take_no_conversations(chat_model, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(chat_files()["a.jsonl"])
    with pytest.raises(UserError, match="holds conversations: c4= is for text"):
        Reader(chat_model, len(VOCABULARY), LIMIT, SEQLEN).evaluation(f"c4={tmp_path}/a.jsonl")
