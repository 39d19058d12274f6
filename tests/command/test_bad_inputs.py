"""Bad input at the command line: one line on stderr, exit code 2, nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neuroal_jax.prune import main

ROOT = Path(__file__).parents[2]


def edited_config(**options):
    def edit(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, **options}))

    return edit


def edited_tensors(change):
    def edit(model):
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return edit


def edited_bytes(change):
    def edit(model):
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def two_problems(tensors):
    tensors.pop("model.norm.weight")
    tensors["foo"] = np.ones(3, np.float32)


UP = "model.layers.2.mlp.up_proj.weight"
BAD_MODELS = {
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "holds a list"),
    "unknown architecture": (edited_config(model_type="llamas"), "'llamas' is not supported.*did you mean 'llama'"),
    "other head": (edited_config(architectures=["LlamaForTokenClassification"]), "architectures .* is not supported"),
    "no model_type": (edited_config(model_type=None), "model_type is None"),
    "MoE by name": (edited_config(model_type="mixtral"), "mixture of experts"),
    "MoE by attribute": (edited_config(num_local_experts=8), "mixture of experts .*num_local_experts"),
    "attribute that changes numbers": (edited_config(is_causal=False), "is_causal=False"),
    "quantised": (edited_config(quantization_config={"bits": 4}), "quantization_config"),
    "rope scaling": (edited_config(rope_parameters={"rope_type": "su", "factor": 2.0}), "rope scaling type 'su'"),
    "rope is text": (edited_config(rope_parameters="x"), "rope_parameters is 'x'"),
    "negative size": (edited_config(hidden_size=-4), "hidden_size is -4"),
    "size is text": (edited_config(hidden_size="32"), "hidden_size is '32'"),
    "size is true": (edited_config(vocab_size=True), "vocab_size is True"),
    "a billion blocks": (edited_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "heads do not divide": (edited_config(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    "odd head_dim": (edited_config(head_dim=7), "head_dim 7 is odd"),
    "unknown activation": (edited_config(hidden_act="snake"), "hidden_act 'snake'"),
    "epsilon is negative": (edited_config(rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    "tie is text": (edited_config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    "tensor missing": (edited_tensors(lambda t: t.pop(UP)), f"{UP} is missing"),
    "tensor extra": (edited_tensors(lambda t: t.update(foo=t[UP])), "foo is not a tensor of a llama model"),
    "tensor misshapen": (
        edited_tensors(lambda t: t.update({UP: t[UP][:-1].copy()})),
        r"up_proj.weight has shape \[55, 32\], expected \[56, 32\]",
    ),
    "two problems": (edited_tensors(two_problems), "norm.weight is missing; foo is not"),
    "integers": (edited_tensors(lambda t: t.update({UP: t[UP].astype(np.int64)})), "has dtype I64"),
    "NaN in a linear": (edited_tensors(lambda t: t[UP].fill(np.nan)), f"tensor {UP} .* NaN"),
    "NaN that nothing reads": (edited_tensors(lambda t: t["lm_head.weight"].fill(np.nan)), "lm_head.weight .* NaN"),
    "infinity": (edited_tensors(lambda t: t[UP].__setitem__((0, 0), np.inf)), f"tensor {UP} .* infinity"),
    "truncated": (edited_bytes(lambda b: b[: len(b) // 2]), "is not a complete safetensors file"),
    "empty file": (edited_bytes(lambda b: b""), "is not a complete safetensors file"),
    "garbage": (edited_bytes(lambda b: b"\xff" * 999), "is not a complete safetensors file"),
    "pickle only": (pickled, "only pickled weights .*pytorch_model.bin"),
}


def check(capsys, root, arguments, message):
    """Runs the command; checks exit code, the single line, and that no file appeared."""
    before = sorted(root.rglob("*"))
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    lines = [line for line in error.split("\n") if line.strip()]
    assert code == 2, error
    final = lines[-1].split("\r")[-1]
    assert final.startswith("error: ")
    assert re.search(message, final), final
    assert "Traceback" not in error
    assert sorted(root.rglob("*")) == before
    return lines


@pytest.mark.parametrize(("edit", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_bad_models(capsys, tmp_path, llama, tokens, edit, message):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    edit(model)
    arguments = ["--model", model, "--sparsity", 0.5, "--calib", tokens, "--eval", "none", "--pruner", "magnitude"]
    check(capsys, tmp_path, [*arguments, "--allocation", "uniform", "--out", tmp_path / "out"], message)


BAD_OPTIONS = {
    "missing directory": ({"model": "ROOT/nowhere"}, "no such directory"),
    "model is a file": ({"model": "ROOT/file"}, "is a file, expected a checkpoint directory"),
    "unknown id": ({"model": "some/model"}, "no such directory, and the Hugging Face Hub says"),
    **{
        f"sparsity {value!r}": ({"sparsity": value}, "--sparsity is")
        for value in ("0", "1", "-0.2", "1.5", "nan", "inf", "1e999", "9" * 5000, "half", "")
    },
    "pruner": ({"pruner": "wandaa"}, r"--pruner wandaa is unknown \(did you mean wanda\?\)"),
    "allocation": ({"allocation": "neural"}, "did you mean neuroal"),
    "step": ({"step": "rows"}, "--step rows is unknown"),
    "budget": ({"budget": "approximate"}, "--budget approximate is unknown"),
    "dtype": ({"dtype": "int8"}, "--dtype int8 is unknown"),
    "no lambdas": ({"block-lambdas": ""}, "--block-lambdas is empty"),
    "negative lambda": ({"block-lambdas": "0.1,-0.1"}, "--block-lambdas holds -0.1"),
    "lambda above the possible": ({"row-lambdas": "0.51"}, "--row-lambdas holds 0.51"),
    "lambda is not a number": ({"row-lambdas": "nan"}, "--row-lambdas holds nan"),
    "nsamples": ({"nsamples": "0"}, "--nsamples is 0"),
    "nsamples is a fraction": ({"nsamples": "1.5"}, "--nsamples is 1.5"),
    "candidate batch": ({"candidate-batch": "-1"}, "--candidate-batch is -1"),
    "seed": ({"seed": "x"}, "--seed is 'x'"),
    "huge seed": ({"seed": "99999999999999999999999"}, "--seed is 99999999999999999999999"),
    "seed of thousands of digits": ({"seed": "9" * 5000}, "--seed is 9"),
    "infinite lambda": ({"row-lambdas": "0.1,1e999"}, "--row-lambdas holds inf"),
    **{
        f"{name} is {value!r}": ({name: value}, f"--{name} is {re.escape(repr(value))}")
        for name, value in product(
            ("out", "save-model", "calib", "eval", "compilation-cache", "measured"), ("", "a\0b")
        )
    },
    "seqlen above the model's": ({"calib": "ROOT/long.txt", "seqlen": "65"}, "exceeds .*max_position_embeddings 64"),
    "width is not seqlen": ({"seqlen": "8"}, "rows have 16 tokens, expected 8"),
    "no calibration file": ({"calib": "ROOT/none.txt"}, "no such file"),
    "empty text": ({"calib": "ROOT/empty.txt", "seqlen": "16"}, "holds no text"),
    "not text": ({"calib": "ROOT/binary.txt", "seqlen": "16"}, "cannot be read as text"),
    "no tokenizer": ({"calib": "ROOT/long.txt", "seqlen": "16"}, "tokenizer in .* cannot be loaded"),
    "bad jsonl": ({"calib": "ROOT/bad.jsonl", "seqlen": "16"}, "line 2 is no JSON object with a string 'text'"),
    "no text column": ({"calib": "ROOT/other.parquet", "seqlen": "16"}, "expected one named 'text'"),
    "short tokens": ({"calib": "ROOT/short.npy", "seqlen": "16"}, "no document has more than 16 tokens"),
    "ids out of vocabulary": ({"calib": "ROOT/large.npy"}, "token id 96 is outside of the model's vocabulary of 96"),
    "negative ids": ({"calib": "ROOT/negative.npy"}, "token id -1"),
    "float ids": ({"calib": "ROOT/float.npy"}, "expected whole numbers"),
    "pickled ids": ({"calib": "ROOT/object.npy"}, "cannot be read as NumPy token ids"),
    "ambiguous npz": ({"calib": "ROOT/two.npz"}, "expected a single one or one named 'calibration'"),
    "damaged npz": ({"calib": "ROOT/damaged.npz"}, "--calib .*damaged.npz"),
    "short evaluation": ({"eval": "ROOT/short.npy"}, "fewer than one window of 16"),
    "no network": ({"calib": "c4", "seqlen": "16"}, "the Hugging Face Hub gave no data"),
    "out is a file": ({"out": "ROOT/file"}, "is a file, expected a directory"),
    "out cannot be made": ({"out": "ROOT/file/below"}, "cannot be written"),
    "out holds a run": ({"out": "ROOT/run"}, "already holds a result"),
    "model is out": ({"out": "MODEL"}, "same directory"),
    "save-model is out": ({"save-model": "ROOT/out"}, "same directory"),
    "save-model holds a model": ({"save-model": "ROOT/saved"}, "--save-model .* holds files"),
    "allocation is no JSON": ({"allocation": "ROOT/bad.jsonl"}, "cannot be read as JSON"),
    "allocation of no format": ({"allocation": "ROOT/empty.json"}, "format is None"),
    "unknown flag": ({"speed": "11"}, "unrecognized arguments: --speed"),
    "no yaml": ({"config": "ROOT/none.yaml"}, "cannot be read"),
    "yaml with objects": ({"config": "ROOT/evil.yaml"}, "cannot be read"),
    "yaml with a number of bits": ({"config": "ROOT/bits.yaml"}, "seed is a whole number of 64000 bits"),
    "yaml with infinity": ({"config": "ROOT/infinite.yaml"}, "block_lambdas is a number beyond a float's range"),
    "yaml list": ({"config": "ROOT/list.yaml"}, "holds a list"),
    "yaml unknown option": ({"config": "ROOT/unknown.yaml"}, r"pruned is unknown \(did you mean pruner\?\)"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    import pyarrow
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("x")
    (root / "empty.txt").write_text(" \n")
    (root / "long.txt").write_text("many words " * 500)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x80" * 99)
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (root / "empty.json").write_text("{}")
    (root / "evil.yaml").write_text("model: !!python/object/apply:os.system ['true']\n")
    (root / "bits.yaml").write_text("seed: 0x" + "f" * 16000)
    (root / "infinite.yaml").write_text("block_lambdas: [0.1, 1.0e+999]")
    (root / "list.yaml").write_text("- model\n")
    (root / "unknown.yaml").write_text("pruned: wanda\n")
    parquet.write_table(pyarrow.table({"content": ["a"]}), root / "other.parquet")
    np.save(root / "short.npy", np.arange(9))
    np.save(root / "large.npy", np.full((2, 16), 96))
    np.save(root / "negative.npy", np.full((2, 16), -1))
    np.save(root / "float.npy", np.ones((2, 16)))
    np.save(root / "object.npy", np.array([{}], dtype=object))
    np.savez(root / "two.npz", a=np.ones(3, int), b=np.ones(3, int))
    (root / "damaged.npz").write_bytes((root / "two.npz").read_bytes()[:-30])
    for name, file in (("run", "manifest.json"), ("saved", "config.json")):
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    return root


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(capsys, bad_files, llama, tokens, options, message):
    options = {
        name: value.replace("ROOT", str(bad_files)).replace("MODEL", str(llama)) for name, value in options.items()
    }
    base = {"model": llama, "sparsity": 0.5, "calib": tokens, "eval": "none", "out": bad_files / "out"}
    base |= {"allocation": "neuroal", **options}
    arguments = [item for name, value in base.items() for item in (f"--{name}", value)]
    assert len(check(capsys, bad_files, arguments, message)) == 1


@pytest.mark.parametrize("name", ["seed", "pruner", "sparsity", "row_lambdas", "out", "overwrite", "owl_m", "eval"])
def test_numbers_that_python_does_not_write_out_are_refused_in_one_line(name):
    from neuroal_jax import PruneConfig, UserError

    with pytest.raises(UserError, match="a number of thousands of digits"):
        PruneConfig(**{"model": "demo", "sparsity": 0.5, "out": "x", name: 10**5000})


EMPTY = {
    "convert.hf_to_flax": ["--model", "demo", "--out", "PATH"],
    "convert.masks_to_torch": ["apply", "--model", "demo", "--masks", "x", "--out", "PATH"],
    "convert.masks_to_torch ": ["verify", "--model", "demo", "--masks", "PATH"],
    "convert.masks_to_torch  ": ["pack", "--model", "demo", "--out", "PATH"],
    "convert.masks_to_torch   ": ["unpack", "--packed", "PATH", "--out", "x"],
    "convert.masks_to_torch    ": ["unpack", "--packed", "x", "--out", "PATH"],
    "convert.to_safetensors": ["--model", "demo", "--out", "PATH"],
    "eval.perplexity": ["--model", "demo", "--out", "PATH"],
    "eval.perplexity ": ["--model", "demo", "--masks", "PATH"],
    "eval.generation": ["--model", "demo", "--masks", "PATH"],
    "eval.generation ": ["--model", "demo", "--pruned", "PATH"],
    "eval.generation  ": ["--model", "demo", "--pruned", "demo", "--prompt-file", "PATH"],
    "eval.generation   ": ["--model", "demo", "--pruned", "demo", "--out", "PATH"],
    "eval.zero_shot": ["--model", "demo", "--task-data", "PATH"],
    "eval.zero_shot ": ["--model", "demo", "--out", "PATH"],
    "eval.zero_shot  ": ["--model", "demo", "--pruned", "PATH"],
    "eval.sweep": ["--models", "demo", "--sparsities", "0.5", "--out", "PATH"],
    "eval.sweep ": ["--config", "PATH"],
    "neuroal_jax.report.page": ["PATH"],
}


@pytest.mark.parametrize(("module", "arguments"), EMPTY.items())
@pytest.mark.parametrize("path", ["", "a\0b"])
def test_what_cannot_be_a_path_is_refused_by_every_program(capsys, tmp_path, monkeypatch, module, arguments, path):
    monkeypatch.chdir(tmp_path)
    assert import_module(module.strip()).main([path if item == "PATH" else item for item in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["convert.hf_to_flax", "convert.to_safetensors"])
@pytest.mark.parametrize("path", ["", "a\0b"])
def test_converters_look_at_out_before_the_model(capsys, module, path):
    assert import_module(module).main(["--model", "demo", "--out", path]) == 2
    assert capsys.readouterr().err == f"error: --out is {path!r}, expected a name or a path\n"


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        ("eval.generation", "--new-tokens"),
        ("eval.generation", "--repeats"),
        ("eval.generation", "--threads"),
        ("eval.generation", "--prompt-tokens"),
        ("eval.perplexity", "--seqlen"),
        ("eval.zero_shot", "--limit"),
        ("eval.zero_shot", "--batch-size"),
    ],
)
@pytest.mark.parametrize("number", ["0", "1.5", "99999999999999999999999", "9" * 5000, "1e999", "nan", ""])
def test_counts_that_are_none(capsys, module, flag, number):
    assert import_module(module).main(["--model", "demo", flag, number]) == 2
    error = capsys.readouterr().err
    assert f"{flag} is " in error
    assert error.count("\n") == 1


def test_what_is_missing_is_named(capsys, tmp_path, llama):
    check(capsys, tmp_path, ["--sparsity", 0.5], "--model is missing")
    check(capsys, tmp_path, ["--model", llama, "--out", tmp_path / "out"], "--sparsity is missing")
    check(capsys, tmp_path, ["--model"], "expected one argument")


@pytest.mark.parametrize(
    "arguments",
    [
        ["neuroal_jax.prune", "--model=--"],
        ["eval.perplexity", "--dtype=--"],
        ["convert.masks_to_torch", "apply", "--out=--"],
    ],
)
def test_a_value_that_argparse_makes_a_list_of_is_refused(capsys, arguments):
    assert import_module(arguments[0]).main(arguments[1:]) == 2
    assert f"argument {arguments[-1][:-3]}: expected one argument, found '--'" in capsys.readouterr().err


def test_flags_win_over_the_yaml_file(tmp_path, llama):
    from neuroal_jax.command.parser import parse_arguments

    file = tmp_path / "run.yaml"
    file.write_text(f"model: {llama}\nsparsity: 0.6\nblock-lambdas: [0.1, 0.2]\nsave_model: saved\ndry_run: true\n")
    config = parse_arguments(["--config", str(file), "--sparsity", "0.7"])
    assert (config.sparsity, config.block_lambdas, config.save_model, config.dry_run) == (
        0.7,
        (0.1, 0.2),
        "saved",
        True,
    )


def test_an_interrupted_run_leaves_nothing(capsys, tmp_path, llama, tokens, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("neuroal_jax.walk.final.prune", interrupt)
    arguments = ["--model", llama, "--sparsity", 0.5, "--calib", tokens, "--eval", "none", "--allocation", "uniform"]
    assert main([str(a) for a in [*arguments, "--out", tmp_path / "a" / "out"]]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick_because_it_imports_no_jax():
    before = os.times()
    command = [sys.executable, "-X", "importtime", "-m", "neuroal_jax.prune", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = os.times()
    assert "--sparsity" in done.stdout
    assert not {"jax", "flax", "numpy", "transformers"} & {
        line.split("|")[-1].strip() for line in done.stderr.split("\n")
    }
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
