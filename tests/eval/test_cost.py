"""What a sweep will cost: against counts by hand, of models, texts and runs that share what they measure."""

from pathlib import Path

import pytest

from eval import cost, grid
from neuroal_jax import PruneConfig, UserError
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.data.tokenizer import load_tokenizer
from neuroal_jax.data.windows import reader_for


def test_the_estimate_counts_what_is_multiplied(llama, tokens):
    """By hand, for windows of 16 tokens of a model of 3 blocks, 4 heads of 8 and a vocabulary of 96."""
    sizes = cost.sizes_of(str(llama))
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 56)
    assert (sizes.weights, sizes.attention, sizes.head) == (weights, 3 * 32, 96 * 32)
    token = 2 * weights + 3 * (2 * 8 * 32 + 2 * 8 * 32)  # 8 others of 16, on average: their scores and their values
    dense = 5 * 16 * token + 5 * 15 * 2 * 96 * 32
    calibration, search = 6 * 16 * token, 2 * 16 * token

    def walks(**options):
        options = {"search_samples": 2, "block_lambdas": "0.1,0.2", "row_lambdas": "0,0.1,0.2", **options}
        config = PruneConfig(model=str(llama), sparsity=0.7, calib=str(tokens), eval=str(tokens), out="x", **options)
        lengths = cost.lengths_of(config.model, config.calib, (config.eval,), config.nsamples, None, None)
        assert lengths == cost.Lengths(16, 6, (5,))
        found = list(cost.walks_of(config, sizes, lengths))
        assert len({key for key, _ in found if key}) == len([key for key, _ in found if key])
        return [operations for _, operations in found]

    assert walks(allocation="uniform", pruner="magnitude") == [dense, dense]
    assert walks(allocation="uniform") == [dense, 2 * calibration, dense]
    assert walks(allocation="owl") == [dense, calibration, 2 * calibration, dense]
    block, row, base = 2 * 2 * search, 2 * 3 * search, 2 * search
    assert walks() == [dense, block, row, base, 2 * calibration, dense]
    assert walks(step="block") == [dense, block, 2 * calibration, dense]
    assert walks(step="row") == [dense, row, base, 2 * calibration, dense]
    assert walks(pruner="sparsegpt") == walks(step="block")
    # Inputs of 32, 32, 32 and 56 numbers, each behind the linears before it, in two blocks; three products of each, or,
    # where there are fewer outputs, of the 56 by way of these 32.
    behind = [64 * 32, 64 * 32 + 32 * 32, 64 * 32 + 32 * 32 + 112 * 32]
    refit = sum(2 * 2 * before for before in behind) + 2 * (3 * 3 * 32 * 32 + 56 * 56 + 2 * 56 * 32)
    refit += 3 * 2 * (2 * 8 * 32 + 2 * 8 * 32)  # attention, up to three inputs
    found = walks(allocation="uniform", pruner="magnitude", refine="refit")
    assert found == [dense, 2 * calibration, 6 * 16 * 3 * refit + calibration, dense]
    assert walks(allocation="dlp") == walks(allocation="owl")
    stages = [2 * size * search for size in (6, 3, 14, 5)]
    shape = {"allocation": "shape", "objective": "alignment"}
    assert walks(**shape) == [dense, calibration, *stages, base, 2 * calibration, dense]
    assert walks(**shape, shape_row_lambdas="none") == [
        dense,
        calibration,
        stages[0],
        *stages[2:],
        2 * calibration,
        dense,
    ]
    assert walks(**shape, pruner="sparsegpt", sparsegpt_group=8) == walks(**shape, shape_row_lambdas="none")
    head = 2 * 16 * 2 * 96 * 32
    by_loss = [dense, block + 2 * head, row + 3 * head, base, 2 * calibration, dense]
    assert walks(objective="loss") == by_loss
    assert walks(objective="kl") == [dense, search + 2 * head, *by_loss[1:]]
    assert walks(objective="loss", pruner="magnitude", step="block") == [dense, block // 2 + 2 * head, dense]
    assert cost.of_tasks(sizes, ["rte", "mine"], 10) == 2 * (weights + 96 * 32) * (10 * 2 * 80 + 10 * 4 * 100)


def test_the_estimate_counts_what_runs_share_once(llama, tokens):
    values = {
        "models": [str(llama)], "pruners": ["wanda", "magnitude"], "top_ups": ["owl", "owl+dsnot", "neuroal"],
        "steps": ["block", "both"], "objectives": ["auto"], "sparsities": [0.5, 0.6], "seeds": [0],
        "calib": str(tokens), "eval": str(tokens),
    }  # fmt: skip
    runs = {run.name: run.config for run in grid.plan(values, Path("out"))[0]}
    sizes = cost.sizes_of(str(llama))
    models = {str(llama): sizes}
    lengths = cost.Lengths(16, 6, (5,))
    apart = [sum(operations for _, operations in cost.walks_of(config, sizes, lengths)) for config in runs.values()]
    together = [found.operations for found in cost.costs_of([*runs.values()], [], models)]
    dense, outliers = sizes.losses(5, 16), sizes.through_blocks(6, 16)
    block = 2 * 13 * sizes.through_blocks(6, 16)
    saved = dict(zip(runs, (a - b for a, b in zip(apart, together, strict=True)), strict=True))
    for name, found in saved.items():
        first = name.endswith("wanda-owl-0.5-seed0")
        shares_block = "-neuroal-0" in name
        assert found == (0 if first else dense + outliers * ("owl" in name) + block * shares_block), name
    left = [found.operations for found in cost.costs_of([*runs.values()][1:], [*runs.values()][:1], models)]
    assert left == together[1:]  # what is finished was measured


def test_the_estimate_reads_texts_that_are_here(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog. " * 500)

    def windows(model, source, seqlen=100):
        return cost.lengths_of(model, "c4", (source,), 4, seqlen, None).windows[0]

    tokens = len(load_tokenizer(open_checkpoint("demo").path, without_bos=False).encode(text.read_text()))
    assert windows("demo", str(text)) == tokens // 100
    assert windows("demo", f"wikitext2={text}") > 0
    assert windows("demo", "demo", 128) == len(reader_for(open_checkpoint("demo"), "demo", 128).evaluation("demo").ids)
    assert windows("someone/something", str(text)) == text.stat().st_size / 4 / 100
    assert windows("demo", "c4") == 256  # on the Hub
    assert windows("demo", "wikitext2") == 340_000 / 100
    assert cost.sizes_of("someone/something") is None
    assert cost.sizes_of("meta-llama/Llama-2-7b-hf").weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    with pytest.raises(UserError, match=str(tmp_path / "empty")):
        (tmp_path / "empty.txt").touch()
        windows("demo", str(tmp_path / "empty.txt"))
