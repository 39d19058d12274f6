"""N of M: patterns, their budget, whole runs and the mask file, against NumPy one group at a time."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from convert.masks_to_torch import main as masks_main
from convert.masks_to_torch import semi_structured_use, verify
from neuroal_jax import PruneConfig, UserError, load_masks, prune
from neuroal_jax.allocation.allocation import Allocation, by_block, mean_sparsity
from neuroal_jax.masks.budget import Budget
from neuroal_jax.masks.file import group_problem, read_masks, save_masks, uneven_blocks
from neuroal_jax.masks.patterns import KeptOf, make_pattern, read_pattern
from neuroal_jax.numerics.selection import Quota
from neuroal_jax.numerics.statistics import measure
from neuroal_jax.walk.method import make_method
from tests.conftest import RUN
from tests.pruners import test_pruners as oracles

SHAPES = {"a": (6, 8), "b": (3, 24)}
CONFIG = {"budget": "exact", "pattern": "none"}


def lowest(scores, size, number):
    """Group by group: the `number` lowest, of equal ones the first."""
    pruned = np.zeros(scores.shape, bool)
    for row, of_row in enumerate(scores):
        for start in range(0, scores.shape[1], size):
            order = sorted(range(size), key=lambda j, s=of_row[start : start + size]: (s[j], j))
            pruned[row, [start + j for j in order[:number]]] = True
    return pruned


@pytest.mark.parametrize("size", [2, 4, 8, 12, 48])
def test_the_lowest_of_each_group_go(size):
    rng = np.random.default_rng(size)
    scores = rng.integers(0, 5, (7, 48)).astype(np.float32)  # many are equal
    scores[0, :5] = [np.inf, -0.0, 0.0, -np.inf, np.inf]
    pattern = make_pattern("n_of_m", size)
    for number in (0, 1, size // 2, size - 1, size):
        quota = Quota(np.array([number], np.int32))
        np.testing.assert_array_equal(jax.jit(pattern.select)(scores, quota), lowest(scores, size, number))


def test_candidates_have_numbers_of_their_own():
    scores = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    pattern = make_pattern("n_of_m", 4)
    found = jax.vmap(lambda s, n: pattern.select(s, Quota(n)))(scores, np.int32([[1], [2], [3]]))
    np.testing.assert_array_equal(found, [lowest(s, 4, n) for s, n in zip(scores, (1, 2, 3), strict=True)])


def test_zeros_of_the_checkpoint_go_first_and_stay_where_a_group_has_more():
    scores = np.float32([[5, 1, 2, 3, 9, 9, 9, 1]])
    zeros = np.packbits([[1, 0, 0, 0, 1, 1, 1, 0]], axis=1)
    found = make_pattern("n_of_m", 4).select(scores, Quota(np.int32([2]), zeros=zeros))
    np.testing.assert_array_equal(found, [[1, 1, 0, 0, 1, 1, 0, 0]])


@pytest.mark.parametrize("name", oracles.MODULES)
@pytest.mark.parametrize(("pattern", "size", "number"), [("2:4", 4, 2), ("4:8", 8, 4), ("1:4", 4, 3)])
def test_every_pruner_of_masks_equals_numpy(name, pattern, size, number):
    rng = np.random.default_rng(2)
    weight, inputs = rng.normal(size=(5, 24)).astype(np.float32), rng.normal(size=(3, 4, 24)).astype(np.float32)
    method = make_method(name, options={**CONFIG, "pattern": pattern})
    pruned, mask = method.prune(weight, method.prepare(measure(inputs, method.needs)), Quota(np.int32([number])))
    expected = lowest(getattr(oracles, f"oracle_{name}")(weight, inputs), size, number)
    np.testing.assert_array_equal(mask, ~expected)
    np.testing.assert_array_equal(pruned, np.where(expected, 0, weight))


def budget_of(sparsity, size, blocks):
    return Budget(SHAPES, blocks, sparsity, "exact", make_pattern("n_of_m", size))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.02, 0.98), min_size=1, max_size=9),
    st.sampled_from([2, 4, 8]),
    st.floats(0.05, 0.95),
    st.data(),
)
def test_blocks_get_whole_numbers_and_the_total_is_as_near_as_they_allow(sparsities, size, sparsity, data):
    sparsities, sparsity = [round(s, 3) for s in sparsities], min(sparsity, 1 - 1 / size)
    assume(round(sparsity * size * len(sparsities)) > 0)
    budget = budget_of(sparsity, size, len(sparsities))
    linears = data.draw(st.booleans())
    blocks = [{"a": s, "b": min(s + 0.01, 1.0) if linears else s} for s in sparsities]
    counts = budget.counts(Allocation("any", tuple(blocks)))
    numbers = []
    for block in counts:
        assert len({int(quota.pruned[0]) for quota in block.values()}) == 1
        numbers.append(int(block["a"].pruned[0]))
    assert max(numbers) < size
    assert sum(numbers) == round(sparsity * size * len(numbers))
    assert budget.total == sum(numbers) * (6 * 8 + 3 * 24) // size
    order = np.argsort(sparsities, kind="stable")
    assert (np.diff(np.array(numbers)[order]) >= 0).all() or len(set(sparsities)) < len(sparsities)


def test_blocks_by_hand():
    # Means 0.5, 0.6 and 0.7 are 4, 4.8 and 5.6 of 8, in all 14.4: 14, so one goes to the larger remainder.
    fitted = budget_of(0.6, 8, 3).fit(by_block("x", [0.5, 0.6, 0.7], ["a", "b"]))
    assert [block["a"] for block in fitted.blocks] == [4 / 8, 5 / 8, 5 / 8]
    assert mean_sparsity(fitted, SHAPES) == pytest.approx(14 / 24)


@pytest.mark.parametrize("text", ["2:4", "1:2", "4:8", "auto:8", "none"])
def test_patterns_are_read_as_they_are_written(text):
    assert str(read_pattern(text) or "none") == text


@pytest.mark.parametrize("text", ["4:4", "0:4", "auto:1", "auto", "2/4", "-1:4", "2:4:8", "2.0:4", "", "a:8", 4, None])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(UserError, match=r"--pattern is .*, expected N:M"):
        PruneConfig(model="demo", sparsity=0.5, pattern=text, out="x")


REFUSED = {
    "another sparsity": ({"sparsity": 0.6, "pattern": "2:4"}, "--sparsity 0.6 and --pattern 2:4, which is 0.5, differ"),
    "NeuroAL's rows": (
        {"sparsity": 0.5, "pattern": "auto:8", "step": "row"},
        "--step row does not go with rows that are all alike: --pattern auto:8",
    ),
    "an allocation": ({"pattern": "2:4", "allocation": "owl"}, "leaves --allocation owl nothing to decide"),
    "reference": ({"pattern": "2:4", "budget": "reference"}, "--pattern 2:4 does not go with --budget reference"),
    "no sparsity": ({"pattern": "auto:8"}, "--sparsity is missing"),
    "a width": ({"pattern": "2:16"}, "layers.0.mlp.down_proj.weight has 56 inputs, which is no multiple of 16"),
    "too little": (
        {"pattern": "auto:2", "sparsity": 0.04},
        "prunes nothing: the least .* 1 of every 2 weights, 0.1667",
    ),
    "too much": ({"pattern": "auto:4", "sparsity": 0.8}, "more than groups of 4 can lose, .* at most 0.75"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(llama, tokens, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prune(PruneConfig(model=str(llama), calib=str(tokens), eval="none", out=str(tmp_path / "out"), **options))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("3:4", 0.25), ("1:8", 0.875)])
def test_a_pattern_is_a_sparsity(pattern, sparsity):
    config = PruneConfig(model="demo", pattern=pattern, out="x")
    assert (config.sparsity, config.allocation) == (sparsity, "uniform")
    assert PruneConfig(model="demo", pattern=pattern, sparsity=sparsity, out="x") == config
    assert PruneConfig(model="demo", sparsity=0.5, out="x").allocation == "neuroal"


def run(model, tokens, out, **options):
    shared = {key: value for key, value in RUN.items() if key not in ("sparsity", "row_lambdas")}
    return prune(PruneConfig(model=str(model), calib=str(tokens), eval="none", out=str(out), **shared, **options))


def group_sizes(masks, size):
    return {name: {int(n) for n in mask.reshape(-1, size).sum(axis=1)} for name, mask in masks.items()}


METHODS = [
    ("magnitude", "none"), ("wanda", "none"), ("multiflow", "none"), ("sparsegpt", "none"), ("wanda", "dsnot"),
    ("magnitude", "dsnot+refit"), ("sparsegpt", "refit"),
]  # fmt: skip


@pytest.mark.parametrize(("pruner", "refine"), METHODS)
def test_every_group_keeps_two_of_four(llama, tokens, tmp_path, pruner, refine):
    result = run(llama, tokens, tmp_path / "out", pruner=pruner, refine=refine, pattern="2:4")
    assert set().union(*group_sizes(load_masks(tmp_path / "out" / "masks.safetensors"), 4).values()) == {2}
    assert result.manifest["sparsity"]["zeros"] * 2 == result.manifest["sparsity"]["prunable"]
    assert result.manifest["pattern"] == {"size": 4, "kept": [2, 2, 2]}
    if (tmp_path / "out" / "model").exists():
        found = verify(str(tmp_path / "out" / "model"), tmp_path / "out" / "masks.safetensors", exact=True)
        assert "every group is of the pattern 2:4" in str(found)


@pytest.mark.parametrize("options", [{}, {"pruner": "sparsegpt"}, {"allocation": "shape"}, {"allocation": "owl"}])
def test_every_block_keeps_its_own_number_of_eight(llama, tokens, tmp_path, caplog, options):
    with caplog.at_level("INFO", "neuroal_jax"):
        result = run(llama, tokens, tmp_path / "out", pattern="auto:8", sparsity=0.6, **options)
    kept = result.manifest["pattern"]["kept"]
    assert sum(8 - n for n in kept) == round(0.6 * 8 * 3)
    sizes = group_sizes(load_masks(tmp_path / "out" / "masks.safetensors"), 8)
    assert all(sizes[name] == {kept[int(name.split(".")[2])]} for name in sizes)
    assert "whole numbers of 8 come no closer to the sparsity" in caplog.text
    written = json.loads((tmp_path / "out" / "allocation.json").read_text())["sparsity"]
    assert all(value == 1 - kept[int(name.split(".")[2])] / 8 for name, value in written.items())


def test_masks_do_not_depend_on_how_many_candidates_run_together(llama, tokens, tmp_path):
    for number in (1, 2):
        out = tmp_path / str(number)
        run(llama, tokens, out, pattern="auto:4", sparsity=0.5, pruner="sparsegpt", candidate_batch=number)
    assert (tmp_path / "1" / "masks.safetensors").read_bytes() == (tmp_path / "2" / "masks.safetensors").read_bytes()


def test_an_allocation_of_its_own_gives_the_same_masks_again(llama, tokens, tmp_path):
    run(llama, tokens, tmp_path / "a", pattern="auto:8", sparsity=0.6)
    file = str(tmp_path / "a" / "allocation.json")
    run(llama, tokens, tmp_path / "b", pattern="auto:8", allocation=file)
    masks = [(tmp_path / name / "masks.safetensors") for name in "ab"]
    assert {n: m.tolist() for n, m in load_masks(masks[0]).items()} == {
        n: m.tolist() for n, m in load_masks(masks[1]).items()
    }


def test_rows_of_an_allocation_are_refused(llama, tokens, tmp_path):
    run(llama, tokens, tmp_path / "rows", sparsity=0.6, row_lambdas="0.2")
    with pytest.raises(UserError, match="lists rows, but --pattern auto:8 keeps as many in every row"):
        run(llama, tokens, tmp_path / "x", pattern="auto:8", allocation=str(tmp_path / "rows" / "allocation.json"))


@pytest.fixture(scope="module")
def two_of_four(llama, tokens, tmp_path_factory):
    root = tmp_path_factory.mktemp("two-of-four")
    run(llama, tokens, root / "out", pattern="2:4", pruner="magnitude", save_model=str(root / "model"))
    return root


def test_zeros_that_a_group_has_too_many_of_stay(two_of_four, tokens, tmp_path):
    result = run(two_of_four / "model", tokens, tmp_path / "out", pattern="3:4", pruner="wanda")
    sparsity = result.manifest["sparsity"]
    assert (sparsity["zeros"], sparsity["pruned"]) == (sparsity["prunable"] // 2, sparsity["prunable"] // 4)
    verify(str(two_of_four / "model"), tmp_path / "out" / "masks.safetensors", load=False, exact=True)


def test_masks_whose_groups_differ_are_refused(two_of_four, tmp_path):
    masks = read_masks(two_of_four / "out" / "masks.safetensors")
    name = next(iter(masks.packed))
    damaged = np.array(masks.packed[name])
    damaged[0, 0] = 0b11100100  # three of the first four
    save_masks(tmp_path / "masks.safetensors", replace(masks, packed={**masks.packed, name: damaged}))
    with pytest.raises(UserError, match=rf"{name} .*keeps 1 to 3 of 4 in its groups, not 2:4"):
        verify(str(two_of_four / "model"), tmp_path / "masks.safetensors", load=False)
    other = replace(masks, metadata={**masks.metadata, "pattern": "4:2"})
    save_masks(tmp_path / "other.safetensors", other)
    with pytest.raises(UserError, match="'pattern' of its metadata is damaged"):
        read_masks(tmp_path / "other.safetensors")


def test_blocks_of_auto_keep_one_number(two_of_four, tmp_path):
    masks = read_masks(two_of_four / "out" / "masks.safetensors")
    masks = replace(masks, metadata={**masks.metadata, "pattern": "auto:4"})
    save_masks(tmp_path / "even.safetensors", masks)
    verify(str(two_of_four / "model"), tmp_path / "even.safetensors", load=False)
    name = "model.layers.1.mlp.up_proj.weight"
    save_masks(
        tmp_path / "uneven.safetensors",
        replace(masks, packed={**masks.packed, name: np.full_like(masks.packed[name], 0b11101110)}),
    )
    assert uneven_blocks(read_masks(tmp_path / "even.safetensors"), KeptOf(None, 4)) == []
    (problem,) = uneven_blocks(read_masks(tmp_path / "uneven.safetensors"), KeptOf(None, 4))
    assert problem.startswith(f"{name} keeps 3 of 4, but model.layers.1.") and problem.endswith("in the same block, 2")


def test_a_pattern_stands_in_yaml_as_it_is(tmp_path):
    from neuroal_jax.command.parser import read_yaml

    (tmp_path / "a.yaml").write_text("model: demo\npattern: 2:4\nout: x\nowl-m: 3\nseed: 12\nsparsity: 0.5\n")
    found = read_yaml(tmp_path / "a.yaml", ["model", "pattern", "out", "owl_m", "seed", "sparsity"])
    assert found == {"model": "demo", "pattern": "2:4", "out": "x", "owl_m": 3, "seed": 12, "sparsity": 0.5}


def test_its_own_allocation_goes_back_to_a_fixed_pattern_and_no_other(two_of_four, llama, tokens, tmp_path):
    file = two_of_four / "out" / "allocation.json"
    run(llama, tokens, tmp_path / "again", pattern="2:4", pruner="magnitude", allocation=str(file))
    again, first = (load_masks(place / "masks.safetensors") for place in (tmp_path / "again", two_of_four / "out"))
    assert all((again[name] == first[name]).all() for name in first)
    content = json.loads(file.read_text())
    content["sparsity"] = {name: 0.25 if "layers.0" in name else 0.625 for name in content["sparsity"]}
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--pattern 2:4 prunes 0.5 of every linear, .* from 0.25 to 0.625"):
        run(llama, tokens, tmp_path / "other", pattern="2:4", allocation=str(tmp_path / "other.json"))


def test_another_pattern_s_measurements_are_not_taken(llama, tokens, tmp_path):
    shared = {"sparsity": 0.5, "pruner": "sparsegpt", "measured": str(tmp_path / "measured")}
    run(llama, tokens, tmp_path / "four", pattern="auto:4", **shared)
    eight = run(llama, tokens, tmp_path / "eight", pattern="auto:8", **shared)
    again = run(llama, tokens, tmp_path / "again", pattern="auto:8", **shared)
    reused = [[walk["walk"] for walk in result.manifest["reused"]] for result in (eight, again)]
    assert (reused[0], len(reused[1])) == ([], 1)
    assert eight.manifest["scores"] == again.manifest["scores"]


def test_candidates_are_refitted_under_a_pattern(llama, tokens, tmp_path):
    options = {"refine": "refit", "search_refine": True, "objective": "kl", "nsamples": 8, "search_samples": 4}
    found = run(llama, tokens, tmp_path / "out", pattern="auto:4", sparsity=0.5, allocation="neuroal", **options)
    assert sum(found.manifest["pattern"]["kept"]) == 6
    verify(str(tmp_path / "out" / "model"), tmp_path / "out" / "masks.safetensors", load=False)


def test_groups_of_a_mask_by_hand():
    assert group_problem(np.zeros((0, 8), bool), KeptOf(2, 4)) is None
    mask = np.array([[1, 1, 0, 0, 0, 1, 0, 1]], bool)
    assert group_problem(mask, KeptOf(2, 4)) is None
    assert group_problem(mask, KeptOf(None, 4)) is None
    assert group_problem(mask, KeptOf(1, 4)) == "keeps 2 of 4 in its groups, not 1:4"
    assert group_problem(mask, KeptOf(1, 2)) == "keeps 0 to 2 of 2 in its groups, not 1:2"
    assert group_problem(mask, KeptOf(1, 3)) == "has 8 inputs, which are no whole groups of 3"


def test_it_is_said_which_linears_semi_structured_kernels_take(two_of_four, llama, tmp_path, capsys):
    masks = two_of_four / "out" / "masks.safetensors"
    assert masks_main(["apply", "--model", str(llama), "--masks", str(masks), "--out", str(tmp_path / "model")]) == 0
    said = capsys.readouterr().out
    assert "to_sparse_semi_structured" not in said  # of 32 and 56: too narrow


@pytest.mark.parametrize(
    ("pattern", "bits", "rows", "width", "fits"),
    [
        ("2:4", 0b11001100, 96, 64, True),
        ("2:4", 0b11001100, 48, 64, False),
        ("2:4", 0b11001100, 32, 32, False),
        ("1:4", 0b10000001, 32, 128, True),
        ("4:8", 0b11100010, 32, 64, False),
        ("4:8", 0b11000011, 32, 64, True),  # as it happens
        ("2:4", 0b11111111, 32, 64, False),  # whatever it says of itself
        (None, 0b11001100, 32, 64, False),
    ],
)
def test_semi_structured_kernels_take_what_fits(two_of_four, pattern, bits, rows, width, fits):
    masks = read_masks(two_of_four / "out" / "masks.safetensors")
    name = next(iter(masks.packed))
    packed = {**masks.packed, name: np.full((rows, width // 8), bits, np.uint8)}
    metadata = {key: value for key, value in masks.metadata.items() if key != "pattern"}
    metadata |= {} if pattern is None else {"pattern": pattern}
    said = semi_structured_use(replace(masks, packed=packed, widths={**masks.widths, name: width}, metadata=metadata))
    assert said is None if not fits else "1 of 21 linears of fitting shapes" in said


def test_apply_masks_says_what_fits(make_llama, tokens, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    from convert.masks_to_torch import apply_masks

    model = make_llama(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    run(model, tokens, tmp_path / "out", pattern="2:4", pruner="magnitude")
    apply_masks(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out" / "masks.safetensors")
    assert "in 7 of 7 linears of fitting shapes" in caplog.text
