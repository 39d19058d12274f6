"""Zero-shot accuracy: lm-eval over local files, against a plain run of lm-eval over the same rows."""

import gzip
import json
import lzma
import shutil
from pathlib import Path

import datasets
import lm_eval.models.huggingface
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from convert.masks_to_torch import save_pruned
from eval import harness, task_data
from eval.zero_shot import TASKS, evaluate, main
from neuroal_jax import UserError
from neuroal_jax.checkpoint.safetensors import SafetensorsSource
from neuroal_jax.checkpoint.tensors import combine, digests
from neuroal_jax.masks.file import PackedMasks, save_masks

WORDS = ("the", "cat", "sat", "on", "a", "warm", "mat", "two", "small", "dogs", "ran", "over", "hills", "water")


def sentence(rng, length=5):
    return " ".join(rng.choice(WORDS, length))


def choices(rng, texts=None):
    return {"text": texts or [sentence(rng, 3) for _ in range(4)], "label": list("ABCD")}


def hub_rows(task, seed=0, count=6):
    """Rows as the task's data set on the Hub has them."""
    rng = np.random.default_rng(seed)
    one = {
        "rte": lambda i: {"sentence1": sentence(rng), "sentence2": sentence(rng), "label": i % 2, "idx": i},
        "winogrande": lambda i: {
            "sentence": f"{sentence(rng)} _ {sentence(rng)}",
            "option1": sentence(rng, 1),
            "option2": sentence(rng, 2),
            "answer": str(1 + i % 2),
        },
        "boolq": lambda i: {"question": sentence(rng), "passage": sentence(rng, 9), "label": i % 2},
        "hellaswag": lambda i: {
            "activity_label": sentence(rng, 2),
            "ctx_a": sentence(rng),
            "ctx_b": sentence(rng, 2),
            "endings": [f"{sentence(rng, 3)} [title] {sentence(rng, 2)}" for _ in range(4)],
            "label": str(i % 4),
        },
        "arc_easy": lambda i: {"question": sentence(rng), "choices": choices(rng), "answerKey": "ABCD"[i % 4]},
        "arc_challenge": lambda i: {"question": sentence(rng, 8), "choices": choices(rng), "answerKey": "ABCD"[i % 4]},
        "openbookqa": lambda i: {"question_stem": sentence(rng), "choices": choices(rng), "answerKey": "ABCD"[i % 4]},
    }[task]
    return [one(number) for number in range(count)]


def other_layout(task, rows):
    """The same rows in the layout that is converted, if the task has one."""
    if task == "boolq":
        return [{"answer": bool(row["label"]), **{k: row[k] for k in ("question", "passage")}} for row in rows]
    if task == "hellaswag":
        from lm_eval.tasks.hellaswag.utils import process_docs

        made = process_docs(datasets.Dataset.from_list(rows))
        return [{key: row[key] for key in ("query", "choices", "gold")} for row in made]
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_lm_eval(model, files, limit=None, **changes):
    """lm-eval's own loader of JSON files, its own loader of models, its own evaluator."""
    from lm_eval import simple_evaluate

    tasks = []
    for name, file in files.items():
        splits = dict.fromkeys(("train", "validation", "test"), str(file))
        rows = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
        tasks.append({"task": name, **rows, **changes.get(name, {})})
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        tasks=[{"group": "plain", "task": tasks}],
        task_manager=task_data._manager(),
        batch_size=8,
        device="cpu",
        limit=limit,
    )
    return found["results"], found["samples"]


def requests_of(task, folder):
    """All pairs of prompt and choice of a task."""
    loaded = task_data.load_tasks([task], folder)[task].task
    return [request for doc in loaded.eval_docs for request in task_data._render(loaded, doc)[0]]


def assert_equal_items(ours, plain):
    results, samples = plain
    for name, row in ours["tasks"].items():
        items = row["items"]["dense"]
        for metric in ("acc", "acc_norm"):
            if metric in row["dense"]:
                assert items[metric] == [sample[metric] for sample in samples[name]]
                assert row["dense"][metric] == results[name][f"{metric},none"]
                assert row["dense"][f"{metric}_stderr"] == results[name][f"{metric}_stderr,none"]
        best = [int(np.argmax([score for score, _ in sample["filtered_resps"]])) for sample in samples[name]]
        assert items["predicted"] == best
        assert row["n"] == len(samples[name])


@pytest.fixture(scope="module")
def model(make_llama):
    """A random Llama that reads bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = make_llama(vocab_size=258, max_position_embeddings=512)
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of all seven tasks, BoolQ and HellaSwag in the other layouts."""
    path = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        write(path / f"{task}.validation.jsonl", other_layout(task, hub_rows(task)))
    return path


@pytest.fixture(scope="module")
def masks(model, tmp_path_factory):
    """Random masks of 70% for the model's linears."""
    return make_masks(model, tmp_path_factory.mktemp("masks") / "masks.safetensors", {})


def make_masks(model, path, metadata):
    source = SafetensorsSource(model)
    names = [name for name, info in source.infos.items() if ".layers." in name and len(info.shape) == 2]
    rng = np.random.default_rng(0)
    packed = {name: np.packbits(rng.random(source.infos[name].shape) < 0.3, axis=1) for name in names}
    widths = {name: source.infos[name].shape[1] for name in names}
    save_masks(path, PackedMasks(packed, widths, {}, combine(digests(names, source.infos, source.read)), metadata))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that loads a model."""
    monkeypatch.setattr(harness, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))


def test_every_item_is_scored_as_lm_eval_scores_it(model, folder, tmp_path):
    ours = evaluate(str(model), task_data=folder, log_samples=True)
    files = {task: write(tmp_path / f"{task}.jsonl", hub_rows(task)) for task in TASKS}
    assert_equal_items(ours, plain_lm_eval(model, files))
    accuracies = [row["dense"]["acc"] for row in ours["tasks"].values()]
    assert ours["mean"]["dense"] == pytest.approx(np.mean(accuracies))
    assert ours["mean"]["of"] == list(TASKS)


@pytest.mark.parametrize(("batch_size", "most"), [(1, 2), (3, 9)])
def test_the_head_computes_no_logits_before_the_choices(model, batch_size, most):
    lm = harness.load_model(model, "it", "float32", "cpu", batch_size)
    positions = []
    lm.model.lm_head.register_forward_hook(lambda module, args, output: positions.append(args[0].shape[1]))
    # Prompts and choices; zero is what lm-eval fills up with. The first two are one prompt with choices of a token, and
    # the third what these read, cut elsewhere.
    pairs = [
        ([5, 6, 7], [8]),
        ([5, 6, 7], [9]),
        ([5, 6], [7, 4]),
        ([5, 0, 0, 7, 3, 0], [0]),
        ([3] * 9, [0, 4]),
        ([2], [0, 0]),
    ]
    requests = [((str(prompt), str(choice)), prompt, choice) for prompt, choice in pairs]
    found = lm._loglikelihood_tokens(requests)
    assert max(positions) == most
    positions.clear()
    plain = lm_eval.models.huggingface.HFLM(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)
    expected = plain._loglikelihood_tokens(requests)
    assert max(positions) == 10
    assert [same for _, same in found] == [same for _, same in expected]
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-6)


def test_the_hubs_layout_and_the_other_are_the_same_rows(folder, tmp_path):
    for task in task_data.LAYOUTS:
        write(tmp_path / f"{task}.x.jsonl", hub_rows(task))
        prompts = [
            [task_data._render(loaded.task, doc) for doc in loaded.task.eval_docs]
            for loaded in (task_data.load_tasks([task], place)[task] for place in (folder, tmp_path))
        ]
        assert prompts[0] == prompts[1]


def test_masks_in_memory_are_the_saved_model(model, folder, masks, tmp_path):
    save_pruned(str(model), masks, tmp_path / "pruned")
    options = {"tasks": ["winogrande", "arc_easy"], "task_data": folder, "log_samples": True}
    in_memory = evaluate(str(model), masks=masks, **options)
    alone = evaluate(str(model), masks=masks, dense=False, **options)
    assert [set(row) & {"dense", "pruned"} for row in alone["tasks"].values()] == [{"pruned"}] * len(alone["tasks"])
    assert alone["mean"]["pruned"] == in_memory["mean"]["pruned"]
    saved = evaluate(str(model), pruned=str(tmp_path / "pruned"), **options)
    assert in_memory["tasks"] == saved["tasks"]
    assert in_memory["mean"] == saved["mean"]
    assert any(row["items"]["dense"] != row["items"]["pruned"] for row in saved["tasks"].values())


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".NDJSON.xz", ".parquet"])
def test_formats_of_files(tmp_path, ending):
    rows = hub_rows("arc_easy")
    file = tmp_path / f"arc_easy.test{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif ending == ".json":
        file.write_text(json.dumps(rows))
    else:
        compress = lzma.compress if ending.endswith(".xz") else gzip.compress
        file.write_bytes(compress("\n\n".join(map(json.dumps, rows)).encode()))
    task = task_data.load_tasks(["arc_easy"], tmp_path)["arc_easy"].task
    assert list(task.eval_docs) == rows


def test_the_command(model, folder, masks, tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    arguments = ["--model", str(model), "--masks", str(masks), "--task-data", str(folder), "--out", str(out)]
    arguments += ["--tasks", "rte,arc_easy", "--limit", "3", "--batch-size", "2"]
    assert main(arguments) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [line.split()[0] for line in shown.splitlines()] == [
        "task",
        "rte",
        "arc_easy",
        "acc_norm",
        "mean",
        "written",
    ]
    assert f"{result['tasks']['rte']['pruned']['acc']:.4f} +- " in shown
    assert result["tasks"]["arc_easy"]["n"] == 3
    assert result["tasks"]["rte"]["version"] == 1.0
    assert result["versions"]["lm_eval"] and result["masks"]["source"]
    assert "items" not in result["tasks"]["rte"]
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [out]


def test_long_prompts_are_cut_and_counted(make_llama, model, folder):
    lengths = [len(prompt + choice) for prompt, choice in requests_of("rte", folder)]
    fits = sorted(lengths)[len(lengths) // 2]  # the last token is only predicted, so the context may be shorter by one
    short = make_llama(vocab_size=258, max_position_embeddings=fits - 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, short)
    result = evaluate(str(short), ["rte"], task_data=folder)
    expected = {"dtype": "float32", "context": fits - 1, "starts_with_bos": False}
    assert result["models"]["dense"] == {**expected, "truncated": sum(length > fits for length in lengths)}


def test_a_choice_that_is_longer_than_the_context_is_refused(make_llama, model, folder):
    short = make_llama(vocab_size=258, max_position_embeddings=16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, short)
    with pytest.raises(UserError, match="tokens, more than the model's context of 16"):
        evaluate(str(short), ["hellaswag"], task_data=folder)


def changed(number, **columns):
    """Changes values of a row."""
    return lambda rows: rows[number].update(columns)


def without(number, column):
    """Removes a column from a row."""
    return lambda rows: rows[number].pop(column)


def answers(value):
    """BoolQ's own layout with an answer in every row."""

    def change(rows):
        everywhere("label")(rows)
        everywhere("answer", value)(rows)

    return change


def everywhere(column, *value):
    """Removes a column from all rows, or sets its value."""

    def change(rows):
        for row in rows:
            row.pop(column, None)
            row.update(zip([column], value, strict=False))

    return change


NUMBER = {"text": ["a", "b", 3, "d"], "label": list("ABCD")}
NULL = {"text": ["a", "b", None, "d"], "label": list("ABCD")}
BAD_ROWS = {
    "a column in a template": ("rte", everywhere("sentence2"), ["line 1 lacks column 'sentence2'", "sentence1, label"]),
    "a bare name as prompt": ("openbookqa", everywhere("question_stem"), ["line 1 lacks column 'question_stem'"]),
    "a bare name as target": ("boolq", everywhere("label"), ["line 1 lacks column 'label'", "question, passage)"]),
    "read by a function": ("winogrande", everywhere("option2"), ["line 1 lacks column 'option2'"]),
    "read by process_docs": ("hellaswag", everywhere("ctx_b"), ["line 1 lacks column 'ctx_b'", "_label, ctx_a"]),
    "in the first row only": ("rte", without(0, "label"), ["line 1 lacks column 'label'"]),
    "in a later row": ("arc_easy", without(3, "answerKey"), ["line 4 lacks column 'answerKey'"]),
    "null in a later row": ("hellaswag", changed(4, ctx_b=None), ["line 5 holds null in column 'ctx_b'"]),
    "null in a list": ("openbookqa", changed(2, choices=NULL), ["line 3 holds null in column 'choices'"]),
    "a label of a hidden test set": ("rte", changed(1, label=-1), ["line 2 does not fit", "the target -1 is none of"]),
    "a letter that is no choice": ("arc_easy", changed(5, answerKey="E"), ["line 6 does not fit", "'E' is not in"]),
    "a number for a text": ("winogrande", everywhere("answer", 3), ["line 1 does not fit", "KeyError: 3"]),
    "no blank": ("winogrande", changed(2, sentence="no blank"), ["line 3 does not fit", "substring not found"]),
    "a value of another type": ("rte", changed(2, label="x"), ["line 3 holds a str in column 'label', the others int"]),
    "true for a number": ("rte", changed(4, label=True), ["line 5 holds a bool in column 'label', the others int"]),
    "1.0 for a number": ("rte", changed(0, label=1.0), ["line 1 holds a float in column 'label', the others int"]),
    "a number for a text among others": ("winogrande", changed(1, answer=1), ["line 2 holds a int in column 'answer'"]),
    "a number in a list": ("openbookqa", changed(3, choices=NUMBER), ["line 4 holds a int in column 'choices.text[]'"]),
    "true in every row": ("rte", everywhere("label", True), ["line 1 holds True in column 'label'", "whole numbers"]),
    "1.0 in every row": ("boolq", everywhere("label", 1.0), ["line 1 holds 1.0 in column 'label'", "whole numbers"]),
    "true in a template": ("hellaswag", everywhere("label", True), ["line 1 does not fit", "'True' is none of"]),
    "an answer that is no bool": ("boolq", answers(1), ["line 1: 'answer' is 1"]),
    "null for an answer": ("boolq", answers(None), ["line 1 holds null in column 'answer'"]),
}


@pytest.mark.parametrize(("task", "change", "messages"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_do_not_fit_are_refused(model, no_model, tmp_path, capsys, task, change, messages):
    rows = hub_rows(task)
    change(rows)
    file = write(tmp_path / f"{task}.x.jsonl", rows)
    assert main(["--model", str(model), "--tasks", task, "--task-data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ('{"sentence1": "a"}\n{"sen', "line 2 is no JSON"),
        ("[1]", "item 1 is a int"),
        ("\xff", "line 1 is no JSON"),
    ],
)
def test_files_that_hold_no_rows_are_refused(model, no_model, tmp_path, capsys, content, message):
    (tmp_path / "rte.jsonl").write_text(content)
    assert main(["--model", str(model), "--tasks", "rte", "--task-data", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_damaged_files_are_refused(model, no_model, tmp_path, capsys, ending):
    (tmp_path / f"rte.x{ending}").write_bytes(b"\x1f\x8b damaged")
    assert main(["--model", str(model), "--tasks", "rte", "--task-data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"rte.x{ending} cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_files_that_expand_without_bounds_are_refused(model, no_model, tmp_path, capsys, monkeypatch, ending):
    monkeypatch.setattr("neuroal_jax.files.reading._ALWAYS_ALLOWED", 1000)
    file, rows = tmp_path / f"rte.x{ending}", [{"sentence1": "a" * 10_000}] * 100
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert main(["--model", str(model), "--tasks", "rte", "--task-data", str(tmp_path)]) == 2
    assert f"{file} cannot be read (ValueError: it expands to far more than text does)" in capsys.readouterr().err


BAD_OPTIONS = {
    "a typing error": (["--tasks", "winogrand"], "no task 'winogrand': did you mean winogrande"),
    "a group": (["--tasks", "glue"], "glue is a group"),
    "twice": (["--tasks", "rte,rte"], "names rte twice"),
    "no task": (["--tasks", ","], "names no task"),
    "no file": (["--tasks", "piqa"], "holds no piqa.*.jsonl"),
    "few-shot": (["--tasks", "gsm8k"], "shows 5 examples of another split"),
    "a program": (["--tasks", "squadv2"], "squadv2 is a program of its own"),
    "no folder": (["--task-data", "/nowhere"], "--task-data /nowhere: no such directory"),
    "no model": (["--pruned", "nowhere"], "--pruned nowhere: no such directory"),
    "both": (["--pruned", "x", "--masks", "y"], "pass one of them"),
    "nothing": (["--no-dense"], "--no-dense leaves nothing to measure"),
    "no masks": (["--masks", "nowhere"], "nowhere is not a readable mask file"),
    "no directory": (["--out", "/nowhere/x.json"], "there is no directory /nowhere"),
    "limit": (["--limit", "0"], "--limit"),
    "batch size": (["--batch-size", "many"], "--batch-size"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_refused(model, folder, no_model, tmp_path, capsys, options, message):
    files = shutil.copytree(folder, tmp_path / "tasks")
    write(files / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "so\n#### 2"}])
    write(files / "squadv2.jsonl", [{}])
    assert main(["--model", str(model), "--task-data", str(files), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_two_files_of_a_task_are_refused(model, folder, no_model, tmp_path, capsys):
    files = shutil.copytree(folder, tmp_path / "tasks")
    write(files / "rte.test.jsonl", hub_rows("rte"))
    assert main(["--model", str(model), "--task-data", str(files)]) == 2
    assert "rte.test.jsonl, rte.validation.jsonl" in capsys.readouterr().err


def test_masks_of_sparsegpt_and_of_other_weights_are_refused(model, make_llama, masks, folder, no_model, tmp_path):
    updated = make_masks(model, tmp_path / "updated.safetensors", {"weights": "updated"})
    with pytest.raises(UserError, match="its pruner changed the kept weights too: use the model that the run saved"):
        evaluate(str(model), task_data=folder, masks=updated)
    with pytest.raises(UserError, match="has other weights than the masks were computed from"):
        evaluate(str(make_llama(vocab_size=258, seed=9)), task_data=folder, masks=masks)


def test_a_model_that_computes_nan_is_refused(model, folder, tmp_path, capsys):
    broken = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out.json"
    arguments = ["--model", str(broken), "--tasks", "rte", "--task-data", str(folder), "--out", str(out)]
    assert main(arguments) == 2
    assert "12 of 12 choices a log-likelihood that is NaN" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [broken]


def test_a_model_with_a_missing_weight_is_refused(model, folder, tmp_path):
    broken = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights.*: model.layers.1.mlp.up_proj.weight"):
        evaluate(str(broken), ["rte"], task_data=folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_model_that_transformers_cannot_load_is_one_line(model, folder, tmp_path, file):
    broken = shutil.copytree(model, tmp_path / "model")
    (broken / file).write_text("{")
    with pytest.raises(UserError, match=r"transformers cannot load|is not valid JSON"):
        evaluate(str(broken), ["rte"], task_data=folder)


def test_the_real_files_are_scored_as_lm_eval_scores_them(data, tmp_path):
    model, folder = data / "models" / "tiny-opt", data / "tasks"
    ours = evaluate(str(model), task_data=folder, limit=5, log_samples=True)
    files = {}
    for task in TASKS:
        (file,) = Path(folder).glob(f"{task}.*")
        rows = [json.loads(line) for line in file.read_text().splitlines()[:5]]
        renamed = {"boolq": ("answer", int), "hellaswag": ("gold", str)}.get(task)
        for row in rows if renamed else []:
            row["label"] = renamed[1](row[renamed[0]])
        files[task] = write(tmp_path / f"{task}.jsonl", rows)
    assert_equal_items(ours, plain_lm_eval(model, files, hellaswag={"process_docs": None}))
