"""What options accept, where they come from, and how a bad one ends."""

import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from neuroal_jax.command.config import PruneConfig
from neuroal_jax.command.parser import parse_arguments
from neuroal_jax.errors import UserError, shorten
from neuroal_jax.files.records import Earlier
from neuroal_jax.files.staging import Shared, staged
from neuroal_jax.prune import main

ROOT = Path(__file__).parents[2]


def config(**options):
    return PruneConfig(**{"model": "m", "sparsity": 0.5, "out": "o", **options})


# One option at a time.

DATE = datetime.date(2020, 1, 1)
WHOLE = ("x", "", "1.5", 1.5, "-1", -1, "nan", "inf", float("inf"), 2**31, True, None, [1], {}, b"x")
ACCEPTED = [
    ("sparsity", "0.7", 0.7),
    ("sparsity", "1e-9", 1e-9),
    ("nsamples", "1e3", 1000),
    ("nsamples", 2.0, 2),
    ("seed", "0", 0),
    ("seed", 2**31 - 1, 2**31 - 1),
    ("seqlen", "16", 16),
    ("seqlen", None, None),
    ("candidate_batch", "4", 4),
    ("block_lambdas", "paper", "paper"),
    ("block_lambdas", "reference", "reference"),
    ("block_lambdas", "0.1,0.2", (0.1, 0.2)),
    ("block_lambdas", " 0.1, 0.2  0 ", (0.1, 0.2, 0.0)),
    ("row_lambdas", [0, "0.5"], (0.0, 0.5)),
    ("row_lambdas", 0.25, (0.25,)),
    ("calib", Path("a.txt"), "a.txt"),
    ("eval", "none", "none"),
    ("out", Path("x"), "x"),
    ("dtype", "bfloat16", "bfloat16"),
]


@pytest.mark.parametrize("name, value, expected", ACCEPTED)
def test_accepts(name, value, expected):
    found = getattr(config(**{name: value}), name)
    assert found == expected
    assert type(found) is type(expected)


REFUSED = [
    *[("sparsity", value) for value in (0, 1, "0", "1", -0.1, 1.5, "nan", float("nan"), "inf", "half")],
    *[("sparsity", value) for value in ("", True, [0.5], {})],
    *[(name, value) for name in ("nsamples", "search_samples", "seed") for value in WHOLE],
    *[(name, value) for name in ("seqlen", "candidate_batch") for value in (*WHOLE, 0) if value is not None],
    *[(name, 0) for name in ("nsamples", "search_samples")],
    *[
        (name, value)
        for name in ("block_lambdas", "row_lambdas")
        for value in ("", " , ", [], (), -0.1, "0.1,-0.1", 0.51, "0.1 0.51", "nan", ["x"], "0.1;0.2", None, True, {})
    ],
    *[(name, value) for name in ("owl_m", "dsnot_threshold") for value in (-1, "nan", "inf", None, "x", True)],
    *[(name, value) for name in ("owl_lambda",) for value in (-0.1, 0.51, "nan", None)],
    *[(name, value) for name in ("alpha_epsilon",) for value in (-0.1, 1.1, "nan", None)],
    *[(name, value) for name in ("dsnot_cycles", "sparsegpt_group") for value in (*WHOLE, 0)],
    *[("refine", value) for value in ("dsnots", "", None)],
    *[(name, value) for name in ("dry_run", "overwrite") for value in ("true", 1, 0, None, [])],
    *[(name, value) for name in ("model", "calib", "eval", "allocation") for value in ("", None, 5, ["x"], "a\0b")],
    *[(name, value) for name in ("out", "save_model") for value in ("", 5, ["x"], True, "a\0b", DATE)],
    *[(name, value) for name in ("pruner", "step", "budget", "dtype") for value in ("x", "", None, True, 5, ["x"], {})],
]  # fmt: skip


@pytest.mark.parametrize("name, value", REFUSED)
def test_refuses(name, value):
    with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} ") as caught:
        config(**{name: value})
    assert "\n" not in str(caught.value)
    assert str(caught.value) != f"--{name.replace('_', '-')} "


@pytest.mark.parametrize("name", ["nsamples", "sparsity"])
def test_refuses_a_whole_number_beyond_any_float(name):
    with pytest.raises(UserError, match=f"--{name} is"):
        config(**{name: 10**400})


@pytest.mark.parametrize(
    "name, typo, meant",
    [
        ("pruner", "wandaa", "wanda"),
        ("pruner", "multi-flow", "multiflow"),
        ("allocation", "neural", "neuroal"),
        ("allocation", "unifrom", "uniform"),
        ("step", "rows", "row"),
        ("budget", "exactly", "exact"),
        ("dtype", "bfloat", "bfloat16"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(name, typo, meant):
    with pytest.raises(UserError, match=rf"--{name} {typo} is unknown \(did you mean {meant}\?\): expected one of "):
        config(**{name: typo})


def test_no_guess_is_made_far_from_every_name():
    with pytest.raises(UserError, match=r"--pruner qqq is unknown: expected one of magnitude, wanda, multiflow"):
        config(pruner="qqq")


def test_lambda_sets_follow_the_budget_unless_given():
    assert (config().block_lambdas, config().row_lambdas) == ("paper", "paper")
    reference = config(budget="reference", row_lambdas="0.1")
    assert (reference.block_lambdas, reference.row_lambdas) == ("reference", (0.1,))


def test_data_follow_the_model_unless_given():
    assert (config().calib, config().eval) == ("c4", "wikitext2")
    assert (config(model="demo").calib, config(model="demo").eval) == ("demo", "demo")
    assert config(model="demo", calib="a.txt").calib == "a.txt"


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"model": "owner/Model-7b", "sparsity": 0.7}, "runs/Model-7b-0.7-wanda-neuroal"),
        (
            {"model": "a/b/", "sparsity": "0.65", "pruner": "magnitude", "refine": "refit"},
            "runs/b-0.65-magnitude-neuroal-refit",
        ),
        ({"pattern": "2:4"}, "runs/m-0.5-2of4-wanda-uniform"),
        ({"pattern": "auto:8", "sparsity": 0.6}, "runs/m-0.6-auto8-wanda-neuroal"),
        ({"out": "elsewhere"}, "elsewhere"),
    ],
)
def test_results_go_to_a_place_that_is_named_after_what_was_asked_for(options, place):
    found = config(**{"out": None, **options})
    assert found.directory == place
    assert found.model_directory == (f"{place}/model" if found.updates_weights else None)
    other = dataclasses.replace(found, pruner="multiflow")
    assert (other.directory == place) == ("out" in options)


def test_only_an_allocation_file_makes_sparsity_optional(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    assert config(sparsity=None, allocation=str(tmp_path / "a.json")).sparsity is None
    for allocation in ("uniform", "neuroal"):
        with pytest.raises(UserError, match="--sparsity is missing"):
            config(sparsity=None, allocation=allocation)
    with pytest.raises(UserError, match=r"is unknown: .* or an allocation\.json that exists"):
        config(sparsity=None, allocation=str(tmp_path))


@pytest.mark.parametrize("first, second", [("model", "out"), ("model", "save_model"), ("out", "save_model")])
def test_two_options_for_one_directory_are_refused(tmp_path, first, second):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for other in ("real", "real/", "link", "real/../real", "./real"):
        with pytest.raises(
            UserError, match=f"--{first.replace('_', '-')} and --{second.replace('_', '-')} are the same"
        ):
            config(**{first: f"{tmp_path}/real", second: f"{tmp_path}/{other}"})


def test_the_home_directory_is_the_same_for_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="are the same directory"):
        config(model="~/m", save_model=str(tmp_path / "m"))


def test_shorten_counts_what_it_leaves_out():
    assert shorten(["a", "b"]) == "a; b"
    assert shorten(list("abcdefg")) == "a; b; c; d; e; and 2 more"


def test_an_error_is_one_line_whatever_was_given():
    assert str(UserError("a\n  b\r\n\u2028c\x0bd")) == "a b c d"


# The command line and its YAML file.

BASE = {"model": "m", "sparsity": 0.5, "out": "o"}


def read(path, text, *flags):
    path.write_text(text)
    return parse_arguments(["--config", str(path), *flags])


METHODS = [
    {
        "allocation": "owl",
        "owl_m": 4.0,
        "owl_lambda": 0.1,
        "refine": "dsnot+refit",
        "dsnot_cycles": 9,
        "dsnot_threshold": 0.5,
        "refit_damping": 0.3,
        "refit_iterations": 4,
        "refit_dense_share": 0.25,
    },
    {"allocation": "alpha", "alpha_epsilon": 0.2, "pruner": "sparsegpt", "sparsegpt_group": 64},
    {"allocation": "dlp", "dlp_lambda": 0.2},
    {
        "allocation": "shape",
        "pattern": "auto:8",
        "shape_ramps": (0.3,),
        "shape_depth": 2,
        "shape_width": 0.1,
        "shape_step": 0.2,
        "shape_etas": (0.5, 1.0),
        "shape_row_lambdas": (0.1,),
        "shape_guard": 2.0,
        "budget": "exact",
        "objective": "loss",
        "refine": "refit",
        "search_refine": True,
        "refit_search_iterations": 2,
    },
    {
        "allocation": "neuroal",
        "step": "block",
        "block_lambdas": (0.1, 0.2),
        "row_lambdas": (0.3,),
        "candidate_batch": 3,
    },
]


@pytest.mark.parametrize("method", METHODS, ids=["owl, dsnot", "alpha, sparsegpt", "dlp", "shape", "neuroal"])
def test_every_option_is_a_flag_and_a_yaml_key(tmp_path, method):
    options = {
        "model": "a", "sparsity": 0.25, "pruner": "magnitude", "budget": "reference", "objective": "alignment",
        "calib": "c.txt", "text_column": "t", "nsamples": 5, "search_samples": 2, "seqlen": 7, "seed": 9,
        "eval": "none", "dtype": "float16", "compilation_cache": "z", "measured": "y", "out": "b", "save_model": "c",
        "devices": 3, "distributed": "node1:4000,2,1", "device_memory": 2**30, "dry_run": True, "overwrite": True,
        "resume": True,
        **method,
    }  # fmt: skip
    assert set(options) | set().union(*METHODS) == set(PruneConfig.__dataclass_fields__)
    expected = PruneConfig(**options)
    flags = []
    for name, value in options.items():
        flags.append(f"--{name.replace('_', '-')}")
        if value is not True:
            flags.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    assert parse_arguments(flags) == expected
    yaml = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    assert read(tmp_path / "a.yaml", json.dumps(yaml)) == expected  # JSON is YAML
    dashes = {name.replace("_", "-"): value for name, value in yaml.items()}
    assert read(tmp_path / "a.yaml", json.dumps(dashes)) == expected


# What affects only a search, and what affects no result: of all other options the result depends on each.
OF_A_SEARCH = {"objective", "search_refine", "step", "block_lambdas", "row_lambdas", "search_samples"}
OF_NO_RESULT = {
    "candidate_batch",
    "compilation_cache",
    "devices",
    "distributed",
    "device_memory",
    "measured",
    "out",
    "save_model",
    "dry_run",
    "overwrite",
    "resume",
}


def test_every_option_says_once_what_it_affects(tmp_path):
    affects = {option.name: option.metadata["affects"] for option in dataclasses.fields(PruneConfig)}
    assert set(affects.values()) == {"result", "search", "nothing"}
    assert {name for name, what in affects.items() if what == "search"} == OF_A_SEARCH
    assert {name for name, what in affects.items() if what == "nothing"} == OF_NO_RESULT


def test_the_material_options_are_those_that_the_result_depends_on(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    for allocation in ("uniform", "owl", "alpha", str(tmp_path / "a.json")):
        found = config(allocation=allocation)
        assert found.plain().keys() - found.material().keys() == OF_NO_RESULT | OF_A_SEARCH, allocation
    found = config(allocation="neuroal", seed=3)
    assert found.plain().keys() - found.material().keys() == OF_NO_RESULT
    assert found.material() == {name: found.plain()[name] for name in found.material()}
    assert found.material()["seed"] == 3


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    found = read(tmp_path / "a.yaml", "model: m\nout: o\nsparsity: 0.6\nseed: 4\n", "--sparsity", "0.7")
    assert (found.sparsity, found.seed, found.nsamples) == (0.7, 4, 128)


BAD_YAML = {
    "nothing": ("", "holds a NoneType, expected options as 'name: value' lines"),
    "a list": ("- model\n", "holds a list"),
    "a word": ("model", "holds a str"),
    "an unknown key": ("modle: m\n", r"modle is unknown \(did you mean model\?\): expected one of model, dtype"),
    "the file's own flag": ("config: b.yaml\n", "config is unknown"),
    "a number as key": ("1: 2\n", "1 is unknown"),
    "two documents": ("model: m\n---\nmodel: n\n", "cannot be read"),
    "an unclosed list": ("model: [", "cannot be read"),
    "a NUL": ("model: \0", "cannot be read"),
    "deep nesting": ("[" * 5000, "cannot be read"),
    "a bad value": ("model: m\nout: o\nsparsity: 2\n", "--sparsity is 2"),
    "a date": ("model: m\nout: 2020-01-01\nsparsity: 0.5\n", "--out is datetime.date"),
    "itself": ("model: m\nout: o\nsparsity: 0.5\nblock_lambdas: &a [*a]\n", "anchors are not supported"),
}


@pytest.mark.parametrize("text, message", BAD_YAML.values(), ids=BAD_YAML)
def test_a_yaml_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.yaml", text)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os"])
def test_a_yaml_file_makes_no_python_objects(tmp_path, tag):
    with pytest.raises(UserError, match=r"cannot be read .*could not determine a constructor"):
        read(tmp_path / "a.yaml", f"model: {tag} [{tmp_path}/made]\n")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\0b", "a" * 300, ""])
def test_a_yaml_file_that_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--config"):
        parse_arguments(["--config", name, "--model", "m", "--sparsity", "0.5", "--out", "o"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--spars", "0.5"], "unrecognized arguments: --spars 0.5"),
        (["0.5"], "unrecognized arguments: 0.5"),
        (["--seed"], "--seed: expected one argument"),
        (["--dry-run=yes"], "--dry-run: ignored explicit argument 'yes'"),
        (["--sparsity=-1"], "--sparsity is -1, expected a number between 0 and 1"),
        (["--sparsity", "-1"], "--sparsity is -1, expected a number between 0 and 1"),
        (["--config", "none.yaml", "--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_a_command_line_that_is_none_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--model", "m", "--out", "o", *arguments])


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom neuroal_jax.prune import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "loaded = {'jax', 'flax', 'numpy', 'torch', 'transformers', 'yaml'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in PruneConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in done.stdout


# Whole runs that end early.


@pytest.fixture
def model(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "model")


def edit(model, **options):
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**content, **options}))


def fails(capsys, root, tokens, message, **options):
    """Runs the command; checks exit code 2, one line on stderr, and that nothing appeared anywhere below `root`."""
    base = {"model": root / "model", "sparsity": 0.5, "allocation": "uniform", "calib": tokens, "eval": "none"}
    values = {**base, "out": root / "out", **options}
    before = sorted(root.rglob("*"))
    code = main([str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(root.rglob("*")) == before


LONG = "a" * 300
BAD_RUNS = {
    "a long model": ({"model": LONG}, "no such directory"),
    "a long text": ({"calib": LONG}, "no such file"),
    "a long allocation": ({"allocation": LONG}, "is unknown"),
    "a long output": ({"out": f"ROOT/{LONG}"}, "--out"),
    "a long saved model": ({"save_model": f"ROOT/{LONG}"}, "--save-model"),
    "sparsegpt and dsnot": ({"pruner": "sparsegpt", "refine": "dsnot"}, "would count twice"),
    "two refinements of masks": ({"refine": "dsnot+dsnot"}, "--refine dsnot+dsnot is unknown"),
    "the refit before the masks": ({"refine": "refit+dsnot"}, "(did you mean "),
    "sparsegpt and dsnot and a refit": ({"pruner": "sparsegpt", "refine": "dsnot+refit"}, "would count twice"),
    "an option of half a chain": ({"refine": "refit", "dsnot_cycles": "3"}, "has no effect without --refine dsnot"),
    "a refit in place of the model": ({"refine": "refit", "out": "ROOT"}, "are the same directory"),
    "sparsegpt and rows": (
        {"pruner": "sparsegpt", "step": "row", "allocation": "neuroal"},
        "--step row does not go with",
    ),
    "an option of another allocation": ({"owl_m": "3"}, "--owl-m 3.0 has no effect without --allocation owl"),
    "numbers of another allocation": ({"shape_etas": "0.5,1"}, "--shape-etas 0.5,1.0 has no effect without"),
    "so much damping that nothing changes": ({"refine": "refit", "refit_damping": "1e38"}, "--refit-damping is 1e38"),
    "an option of no refinement": ({"dsnot_cycles": "3"}, "has no effect without --refine dsnot"),
    "an option of another pruner": ({"sparsegpt_group": "64"}, "has no effect without --pruner sparsegpt"),
    "an implied saved model in place of the model": ({"pruner": "sparsegpt", "out": "ROOT"}, "are the same directory"),
    "the home of nobody": ({"model": "~nobody-at-all/m"}, "--model"),
    "a model with a line break": ({"model": "a\nb\u2028c"}, "--model a b c: no such directory"),
    "a model that is a URL": ({"model": "https://huggingface.co/a/b"}, "not a Hugging Face model id"),
    "a model id with two dots": ({"model": "a..b/c"}, "--model a..b/c"),
    "a text below a file": ({"calib": "ROOT/model/config.json/x"}, "no such file"),
    "an output below a file": ({"out": "ROOT/model/config.json/x/y"}, "--out"),
    "a saved model below a file": ({"save_model": "ROOT/model/config.json/x"}, "--save-model"),
    "an output that is a file": ({"out": "ROOT/model/config.json"}, "is a file, expected a directory"),
    "a saved model that is a file": ({"save_model": "ROOT/model/config.json"}, "is a file, expected a directory"),
    "deep new outputs, no text": ({"out": "ROOT/a/b/c", "save_model": "ROOT/a/d", "calib": "x"}, "--calib x"),
    "the model as output": ({"out": "ROOT/model"}, "--model and --out are the same directory"),
    "the model as saved model": ({"save_model": "ROOT/model/"}, "--model and --save-model are the same"),
    "an evaluation of another width": ({"eval": "ROOT/wide.npy"}, "rows have 17 tokens, expected 16"),
}


@pytest.mark.parametrize("options, message", [pytest.param(*case, id=name) for name, case in BAD_RUNS.items()])
def test_a_bad_run_is_one_line_and_leaves_nothing(capsys, tmp_path, model, tokens, options, message):
    np.save(tmp_path / "wide.npy", np.zeros((2, 17), int))
    options = {name: value.replace("ROOT", str(tmp_path)) for name, value in options.items()}
    fails(capsys, tmp_path, tokens, message, **options)


BAD_CONFIGS = {
    "architectures of lists": ({"architectures": [["x"]]}, "architectures"),
    "architectures of objects": ({"architectures": [{}]}, "architectures"),
    "architectures of null": ({"architectures": [None]}, "architectures"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "an activation that is an object": ({"hidden_act": {}}, "hidden_act"),
    "an epsilon beyond any float": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "an epsilon that is NaN": ({"rms_norm_eps": float("nan")}, "NaN is no JSON number"),
    "yarn beside a plain rope": ({"rope_scaling": {"type": "yarn"}}, "yarn"),
    "an attribute named as a method of transformers": ({"to_dict": 5}, "to_dict=5"),
    "a rope per layer type": ({"rope_parameters": {"full_attention": {}, "x": {"y": 1}}}, "full_attention="),
    "a size that is a float": ({"hidden_size": 32.0}, "hidden_size is 32.0"),
    "more heads than memory": ({"num_attention_heads": 2**30}, "does not match its config.json"),
}


@pytest.mark.parametrize("options, message", [pytest.param(*case, id=name) for name, case in BAD_CONFIGS.items()])
def test_a_bad_config_is_one_line_and_leaves_nothing(capsys, tmp_path, model, tokens, options, message):
    edit(model, **options)
    fails(capsys, tmp_path, tokens, message)


# Output directories.


def result(directory, **options):
    """A directory of results that holds one file."""
    shared = Shared(("done",), lambda place: Earlier(frozenset({"done"} if (place / "done").exists() else ())))
    return staged(directory, marker="done", flag="--out", shared=shared, **{"overwrite": False, **options})


def test_a_result_appears_at_once_and_only_on_success(tmp_path):
    with result(tmp_path / "a" / "b") as staging:
        (staging / "done").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "done").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError("x")])
def test_on_a_failure_the_directories_made_for_it_go_too(tmp_path, error):
    with pytest.raises((ValueError, KeyboardInterrupt, UserError)), result(tmp_path / "a" / "b") as staging:
        (staging / "done").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_results_have_the_modes_of_the_users_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with result(tmp_path / "a") as staging:
            (staging / "done").write_text("1")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "a" / "done").stat().st_mode & 0o777 == 0o640


def test_other_files_stay_and_a_finished_result_needs_overwrite(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with result(tmp_path) as staging:
        (staging / "done").write_text("1")
    with pytest.raises(UserError, match="already holds a result"), result(tmp_path):
        pass
    with result(tmp_path, overwrite=True) as staging:
        (staging / "done").write_text("2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"notes": "mine", "done": "2"}


def test_the_directory_may_lie_on_another_file_system(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "out").symlink_to(elsewhere)
        with result(tmp_path / "out") as staging:
            (staging / "done").write_text("1")
        assert (Path(elsewhere) / "done").read_text() == "1"


def test_a_dangling_link_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "none")
    entered = []
    with pytest.raises(UserError), result(tmp_path / "out") as staging:
        (staging / "done").write_text("1")
        entered.append(staging)
    assert not entered


def run_program(tmp_path, llama, tokens, program):
    arguments = ["--model", llama, "--sparsity", 0.5, "--allocation", "uniform", "--pruner", "magnitude"]
    arguments += ["--calib", tokens, "--eval", "none", "--out", tmp_path / "out"]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_full_disk_is_one_line(tmp_path, llama, tokens):
    program = (
        "import os, resource, sys\nfrom neuroal_jax.prune import main\n"
        "os.environ['JAX_ENABLE_COMPILATION_CACHE'] = 'false'\n"  # nothing cut off in what other tests read
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nsys.exit(main())"
    )
    done = run_program(tmp_path, llama, tokens, program)
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in done.stderr
    assert done.returncode == 2


def test_a_terminated_run_leaves_nothing(tmp_path, llama, tokens):
    program = (
        "import os, signal, sys\nfrom neuroal_jax.prune import main\nfrom neuroal_jax.walk import final\n"
        f"final.prune = lambda *a: os.kill(os.getpid(), {int(signal.SIGTERM)})\nsys.exit(main())"
    )
    done = run_program(tmp_path, llama, tokens, program)
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []
