"""The benchmark on a pretrained model: its packages, its files, its table. No network, no pretrained model."""

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks import gemma, real_model
from eval import sweep
from neuroal_jax import UserError
from tests.eval.test_sweep import in_this_process

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages that carry `ab` and `cd`, and the SHA-256 of both together."""
    for number, content in ((1, b"ab"), (2, b"cd")):
        folder = tmp_path / "site" / f"carrier_part{number}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise AssertionError('nothing of it runs')")
        (folder / f"model.gguf.part{number}").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(gemma, "PARTS", ["carrier_part1", "carrier_part2"])
    monkeypatch.setattr(gemma, "SHA256", hashlib.sha256(b"abcd").hexdigest())
    return tmp_path / "site"


def write_model(gguf, directory):
    (directory / "model.safetensors").write_bytes(gguf.read_bytes())
    (directory / gemma.MARKER).write_text("{}")


def test_the_model_is_made_of_the_packages_parts_in_order(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(gemma, "dequantise", write_model)
    target = tmp_path / "deep" / "gemma"
    assert not gemma.is_made(target)
    assert gemma.main([str(target)]) == 0
    assert gemma.is_made(target) and (target / "model.safetensors").read_bytes() == b"abcd"
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]


def interrupted(gguf, directory):
    write_model(gguf, directory)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda site: (site / "carrier_part2/data/model.gguf.part2").write_bytes(b"ce"), "SHA-256"),
        (lambda site: (site / "carrier_part2/data/model.gguf.part2").unlink(), "holds 0 parts"),
        (lambda site: (site / "carrier_part2").rename(site / "other"), "carrier-part2 is not installed: pip install"),
        (None, "interrupted"),
    ],
)
def test_what_cannot_be_made_leaves_nothing(packages, tmp_path, monkeypatch, capsys, broken, message):
    monkeypatch.setattr(gemma, "dequantise", write_model if broken else interrupted)
    if broken:
        broken(packages)
    assert gemma.main([str(tmp_path / "deep" / "gemma")]) == (2 if broken else 130)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


def test_packages_are_the_same_in_the_group_and_in_the_file_of_hashes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "benchmarks/gemma.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line.split(" ")[0] for line in lines] == project["optional-dependencies"]["real-model"]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    carried = [line.split("==")[0].replace("-", "_") for line in lines]
    assert carried == [*gemma.PARTS, "gguf"]


def test_rows_are_selected_by_their_first_words():
    names = [real_model.name_of(row) for row in real_model.select([])]
    assert len(names) == len(set(names)) == len(real_model.ROWS)
    assert set(real_model.TASK_ROWS) <= set(names)
    selected = real_model.select(["sparsegpt", "wanda neuroal", "wanda uniform"])
    assert [real_model.name_of(row) for row in selected] == [
        name for name in names if name == "wanda uniform" or name.startswith(("wanda neuroal ", "sparsegpt "))
    ]
    (selected,) = real_model.select(["wanda neuroal both"])  # a row's name, with which another one begins
    assert "objectives" not in selected
    with pytest.raises(UserError, match=r"no row 'wanda neu', expected words of: wanda uniform, "):
        real_model.select(["wanda uniform", "wanda neu"])


def manifest(sparsity, pruned, seed=0, **seconds):
    texts = {
        "wikitext2.npy": {"dense": 26.041, "pruned": pruned},
        "c4.npy": {"dense": 31.5, "pruned": None if pruned is None else 2 * pruned},
    }
    windows = {"windows": 24, "seqlen": 512}
    return {
        "token_ppl": {"texts": texts},
        "seconds": seconds,
        "sparsity": {"requested": sparsity},
        "memory_bytes": {"host_peak": 3 * 2**30},
        "options": {"model": "/models/gemma3-270m", "dtype": "float32", "search_samples": 8, "seed": seed},
        "data": {"calib": {**windows, "windows": 16}, "eval": windows},
        "candidates": {"block": [1, 2, 3]} if "search" in seconds else {},
    }


def test_a_row_with_a_pattern_is_of_its_own_sparsity(tmp_path):
    shared = {"models": "demo", "sparsities": "0.6,0.7", "seeds": "0"}
    (row,) = real_model.select(["wanda uniform 2:4"])
    (run,) = real_model.runs_of(row, shared, tmp_path)
    assert (run.config.sparsity, run.config.pattern, run.config.pruner) == (0.5, "2:4", "wanda")
    assert len(real_model.runs_of(real_model.select(["wanda uniform"])[0], shared, tmp_path)) == 2


def test_the_table_is_what_the_manifests_tell():
    searched = manifest(0.6, 3e5, search=60.5, prune=10)
    searched["reused"] = [{"walk": "search", "seconds": 39.0}, {"walk": "dense-perplexity", "seconds": 70.0}]
    runs = [("wanda uniform", manifest(0.5, 40.0, prune=9.6)), ("wanda neuroal both", searched)]
    assert real_model.table(runs[0][1], runs) == [
        "| pruner | method | sparsity | wikitext2 | c4 | search s | pruning s | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| dense |  | 0 | 26.04 | 31.50 |  |  |  |",
        "| wanda | uniform | 0.5 | 40.00 | 80.00 | 0 | 10 | 3072 |",
        "| wanda | neuroal both | 0.6 | 300000.00 | 600000.00 | 100 | 10 | 3072 |",
    ]
    said = real_model.conditions([run for _, run in runs], "a machine, 2 cores")
    assert said.startswith(
        "gemma3-270m, float32, token_ppl@512 on 24 windows of each text; 16 calibration sequences of 512 tokens of C4, "
        "the search with 8 of them and 3 candidates of the block step; measured on a machine, 2 cores;"
    )


def test_runs_of_several_seeds_are_one_line_with_mean_and_spread():
    runs = [("wanda uniform", manifest(0.5, 40.0, prune=9)), ("wanda uniform", manifest(0.5, 46.0, seed=1, prune=11))]
    assert real_model.table(runs[0][1], [*runs, ("wanda owl", runs[0][1])])[3:] == [
        "| wanda | uniform | 0.5 | 43.00 ± 4.24 | 86.00 ± 8.49 | 0 | 10 | 3072 |",
        "| wanda | owl | 0.5 | 40.00 | 80.00 | 0 | 9 | 3072 |",
    ]
    said = real_model.conditions([run for _, run in runs], "a machine")
    assert "of C4; mean ± standard deviation over the seeds 0, 1; measured on a machine" in said


def test_accuracies_come_with_their_standard_errors():
    def task(accuracy, state="pruned"):
        return {state: {"acc": accuracy, "acc_stderr": 0.03}}

    found = {
        "dense": {"rte": task(0.6, "dense"), "boolq": task(0.5, "dense")},
        "wanda uniform 0.5": {"rte": task(0.55), "boolq": task(0.0)},
    }
    assert real_model.task_table(found) == [
        "| task | dense | wanda uniform 0.5 |",
        "| --- | --- | --- |",
        "| rte | 60.0 ± 3.0 | 55.0 ± 3.0 |",
        "| boolq | 50.0 ± 3.0 | 0.0 ± 3.0 |",
        "| mean | 55.0 ± 2.1 | 27.5 ± 2.1 |",
    ]


def test_the_machine_is_named_by_its_processor(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor @ 2 GHz\nmodel name\t: another\n")
    assert re.fullmatch(r"A Processor @ 2 GHz, \d+ cores", real_model.machine_name(tmp_path / "cpuinfo"))
    assert re.fullmatch(r".+, \d+ cores", real_model.machine_name(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_small_selection_on_the_demo_model_goes_on_where_it_stood(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(sweep, "process", lambda module, log: started.append(module) or in_this_process(module, log))
    story = "Once upon a time there was a little girl who had a red ball. She went to play with her friend. "
    (tmp_path / "wikitext2.txt").write_text(story * 9)
    for name in ("c4", "train"):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'text': story * 4})}\n" * 3)
    given = [
        *("--model", "demo", "--out", tmp_path / "out", "--wikitext2", tmp_path / "wikitext2.txt"),
        *("--c4", tmp_path / "c4.jsonl", "--calibration", tmp_path / "train.jsonl", "--sparsities", "0.7"),
        *("--windows", 3, "--nsamples", 2, "--seqlen", 32, "--rows"),
    ]
    for rows in ("wanda uniform", "wanda uniform,wanda alpha"):
        started.clear()
        assert real_model.main([*map(str, given), rows]) == 0, capsys.readouterr().err
        assert sum("neuroal_jax.prune" in module for module in started) == 1
    printed = capsys.readouterr().out
    lines = (tmp_path / "out" / "real-model.md").read_text().splitlines()
    assert "\n".join(lines) in printed
    assert [line.split(" | ")[:3] for line in lines[2:5]] == [
        ["| dense", "", "0"],
        ["| wanda", "uniform", "0.7"],
        ["| wanda", "alpha", "0.7"],
    ]
    assert "token_ppl@32 on 3 windows of each text; 2 calibration sequences of 32 tokens" in lines[-1]
    assert real_model.main([*map(str, given), "wanda uniform", "--windows", "2"]) == 2  # other windows, same runs
    assert "holds a run with --eval" in capsys.readouterr().err
    assert real_model.main([*map(str, given), "wanda uniform", "--windows", "99"]) == 2
    assert "windows of 32 tokens, not 99" in capsys.readouterr().err
