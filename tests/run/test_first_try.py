"""A first try: what is chosen without options, what is said of it, and where the results go."""

import logging
from pathlib import Path

import pytest

import neuroal_jax
from neuroal_jax.prune import main
from tests.conftest import RUN

DEFAULT = Path("runs") / "model-0.6-wanda-neuroal"


@pytest.fixture
def here(llama, tmp_path, monkeypatch):
    """An empty current directory, with a link to a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(llama)
    return tmp_path


def test_what_is_chosen_is_said_in_a_few_lines_before_anything_is_computed(here, tokens, caplog):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    command = ["--model", "model", "--calib", str(tokens), "--eval", str(tokens), *options]
    with caplog.at_level(logging.INFO, "neuroal_jax"):
        assert main(command) == 0
    lines = [record.getMessage() for record in caplog.records]
    said = lines[: next(number for number, line in enumerate(lines) if line.startswith("dense token_ppl"))]
    assert len(said) <= 10
    text = "\n".join(said)
    for part in (
        "model (llama, 3 blocks, 25,344 prunable weights), of which 15,206 go (--sparsity 0.6)",
        "computing in float32, ",
        "by wanda; how many where, by neuroal, 2 + 3 candidates tried (--pruner",
        f"texts: {tokens} for calibration, {tokens} for perplexity (--calib, --eval)",
        f"results: {DEFAULT} (--out)",
        "6 sequences of 16 tokens, 6 of them to search with (--nsamples, --seqlen, --search-samples)",
        "memory: host peak ",
        " candidates at a time, as its cache takes (--candidate-batch)",
        "--help",
    ):
        assert part in text
    assert lines[-1] == f"to look at it, open {DEFAULT / 'report.html'} in a browser"
    assert (here / DEFAULT / "masks.safetensors").is_file()
    assert main(command) == 2  # as with --out


def test_python_takes_the_same_place(here, tokens):
    options = {**RUN, "model": "model", "calib": str(tokens), "eval": "none", "allocation": "uniform"}
    config = neuroal_jax.PruneConfig(**options)
    result = neuroal_jax.prune(config)
    assert result.out == Path("runs/model-0.6-wanda-uniform")
    assert result.manifest["options"]["out"] == str(result.out)
    assert result.report().is_file()
    with pytest.raises(neuroal_jax.UserError, match=f"--out {result.out} already holds a result"):
        neuroal_jax.prune(config)


def test_what_was_interrupted_in_that_place_is_not_thrown_away(here, tokens, monkeypatch):
    monkeypatch.setattr("neuroal_jax.resume.state._SHARE", 0)  # a state after every block
    options = {**RUN, "model": "model", "calib": str(tokens), "eval": "none", "allocation": "uniform"}

    def stop(now):
        if now.stage == "write":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        neuroal_jax.prune(neuroal_jax.PruneConfig(**options), progress=stop)
    with pytest.raises(neuroal_jax.UserError, match="add --resume to do that, --overwrite to start over, or --out"):
        neuroal_jax.prune(neuroal_jax.PruneConfig(**{**options, "seed": 1}))
    assert neuroal_jax.prune(neuroal_jax.PruneConfig(**options, resume=True)).report().is_file()


def test_a_run_that_fails_leaves_no_place_behind(here, tokens):
    with pytest.raises(neuroal_jax.UserError, match=r"--calib nothing\.npy: no such file"):
        neuroal_jax.prune(neuroal_jax.PruneConfig(model="model", sparsity=0.5, calib="nothing.npy"))
    with pytest.raises(neuroal_jax.UserError, match=r"the Hugging Face Hub gave no data .*NAME=FILE"):
        neuroal_jax.prune(neuroal_jax.PruneConfig(model="model", sparsity=0.5, calib=str(tokens)))
    assert [path.name for path in here.iterdir()] == ["model"]


def test_a_model_of_fewer_positions_gets_sequences_as_long_as_it_takes(llama):
    """The random Llama has 64."""
    options = {"model": str(llama), "sparsity": 0.6, "dry_run": True}
    chosen = neuroal_jax.prune(neuroal_jax.PruneConfig(**options)).plan
    asked = neuroal_jax.prune(neuroal_jax.PruneConfig(**options, seqlen=64)).plan
    assert chosen.state_bytes == asked.state_bytes
    assert chosen.state_bytes > neuroal_jax.prune(neuroal_jax.PruneConfig(**options, seqlen=32)).plan.state_bytes
