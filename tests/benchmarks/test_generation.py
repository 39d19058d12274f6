"""The benchmark of token generation on a model of a few weights: its rows, its cache, what it refuses."""

import pytest

from benchmarks import generation
from tests.eval.test_sweep import in_this_process


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Arguments for a tiny shape, and what was started so far."""
    started = []
    monkeypatch.setattr(generation, "SHAPES", {"32": 56})

    def process(module, log):
        started.append(module)
        return in_this_process(module, log)

    monkeypatch.setattr(generation, "process", process)
    given = ["--shapes", "32", "--blocks", "2", "--vocabulary", "96", "--new-tokens", "3", "--repeats", "1"]
    return [*given, "--cache", str(tmp_path / "bench")], started


def test_it_prunes_once_and_measures_each_time(tiny, capsys):
    given, started = tiny
    assert generation.main([*given, "--sparsities", "0.7", "--allocations", "uniform"]) == 0
    assert len(started) == 1
    capsys.readouterr()
    assert generation.main([*given, "--sparsities", "0.6,0.7", "--allocations", "uniform"]) == 0
    assert len(started) == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| shape | allocation | sparsity |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in cells[2:]] == [["32/56", "uniform", "0.6"], ["32/56", "uniform", "0.7"]]
    assert {len(row) for row in cells} == {len(cells[0])}
    for row in cells[2:]:
        fp32, bf16, _, csr, to_fp32, _, to_bf16 = map(float, row[3:10])
        assert csr / fp32 == pytest.approx(to_fp32, abs=0.01)
        assert csr / bf16 == pytest.approx(to_bf16, abs=0.01)
        assert row[13] == "yes"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--shapes", "7"], "--shapes 7 is unknown: expected one of 2048, 4096"),
        (["--sparsities", "0.5,1.5"], "--sparsities is 1.5"),
        (["--new-tokens", "1"], "--new-tokens is 1"),
        (["--allocations", "owll"], "pruning failed (exit code 2: error: --allocation owll is unknown"),
    ],
)
def test_bad_options_are_one_line(tiny, capsys, monkeypatch, given, message):
    arguments, _ = tiny
    if "--shapes" in given:
        monkeypatch.setattr(generation, "SHAPES", {"2048": 5632, "4096": 11008})
    assert generation.main([*arguments, *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
