"""Token generation: CSR against dense products, tokens against transformers' own, figures that add up."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from convert.masks_to_torch import save_pruned
from eval import decoding, generation, prompts, rates, sparse_linear, speeds, sweep, variants
from eval.generation import main, measure, table
from eval.rates import Seconds
from neuroal_jax import UserError, report
from neuroal_jax.masks.file import kept_sha256
from tests.eval.test_sweep import arguments as sweep_arguments
from tests.eval.test_sweep import in_this_process, run_sweep
from tests.eval.test_sweep import table as sweep_table
from tests.eval.test_zero_shot import make_masks
from tests.models.test_families import GRANITE, SMALL

QUICK = {"prompt_tokens": 6, "new_tokens": 5, "repeats": 2}


@pytest.fixture(scope="module")
def masks(llama, tmp_path_factory):
    """Random masks of 70% for the random Llama."""
    return make_masks(llama, tmp_path_factory.mktemp("masks") / "masks.safetensors", {})


@pytest.fixture(scope="module")
def measured(llama, masks):
    """The figures of the random Llama."""
    return measure(str(llama), masks=masks, **QUICK)


# The CSR linear.


def make_linear(outputs, inputs, *, bias, seed=0):
    """A linear with zeros, among them a whole row and a whole column."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.7] = 0
    weight[1], weight[:, 2] = 0, 0
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(weight))
        if bias:
            linear.bias.copy_(torch.from_numpy(rng.standard_normal(outputs).astype(np.float32)))
    return linear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24), (7, 24), (1, 7, 24), (2, 3, 24)], ids=str)
def test_a_csr_linear_is_the_dense_one(bias, shape):
    linear = make_linear(40, 24, bias=bias)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sparse = sparse_linear.SparseLinear(linear)
    with torch.inference_mode():
        found = sparse(torch.from_numpy(x))
        dense = nn.functional.linear(torch.from_numpy(x), linear.weight, linear.bias)
    weight, added = (part.detach().numpy().astype(np.float64) for part in (linear.weight, dense.new_zeros(40)))
    if bias:
        added = linear.bias.detach().numpy().astype(np.float64)
    expected = np.einsum("oi,...i->...o", weight, x.astype(np.float64)) + added
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(found, dense, atol=1e-5)
    assert found.shape == (*shape[:-1], 40)


def test_a_csr_linear_stores_no_zeros_and_narrow_indices():
    linear = make_linear(40, 24, bias=True)
    weight = sparse_linear.SparseLinear(linear).weight
    kept = int((linear.weight != 0).sum())
    assert weight.layout == torch.sparse_csr
    assert weight.values().shape == (kept,)
    assert (weight.crow_indices().dtype, weight.col_indices().dtype) == (torch.int32, torch.int32)
    expected = 4 * kept + 4 * kept + 4 * 41 + 4 * 40  # values, columns, ends of rows, bias
    assert sparse_linear.stored_bytes(sparse_linear.SparseLinear(linear)) == expected


def test_a_linear_without_any_weight_gives_its_bias():
    linear = make_linear(8, 6, bias=True)
    nn.init.zeros_(linear.weight)
    sparse = sparse_linear.SparseLinear(linear)
    for shape in ((1, 6), (3, 6)):
        torch.testing.assert_close(sparse(torch.ones(shape)), linear.bias.expand(*shape[:-1], 8))


# Generation.

FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama tied": {"family": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "opt": {"ffn_dim": 56},
    "phi": {},
    "phi3": SMALL,
    "gpt_neox": {},
    "gemma": {"head_dim": 12, **SMALL},
    "gemma2": {"head_dim": 12, "sliding_window": 5, **SMALL},
    "gemma3_text": {
        "head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4, **SMALL,
    },
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "olmo2": SMALL,
    "granite": {**GRANITE, **SMALL},
    "smollm3": {"no_rope_layer_interval": 2, **SMALL},
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_transformers_for_every_family(make_llama, tmp_path, name):
    directory = make_llama(**{"family": name, **FAMILIES[name]})
    mask = make_masks_of(directory, tmp_path / "masks.safetensors")
    found = variants.on_cpu(directory, "it", variants.Pruned("it", masks=mask))
    ids = torch.tensor([prompts.make_prompt(directory, "it", 9, text=None, file=None, tokens=8).ids])
    for state in ("dense_fp32", "control"):
        model = found.models[state]
        model.generation_config.eos_token_id = None
        expected = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 8:].tolist()
        assert list(decoding.generate(model, ids, 9).tokens) == expected
    dense, control, csr = (decoding.generate(found.models[state], ids, 9) for state in ("dense_fp32", "control", "csr"))
    assert csr.tokens == control.tokens
    torch.testing.assert_close(csr.logits, control.logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dense.logits, control.logits, atol=1e-2)


def make_masks_of(directory, path):
    """Random masks for the linears of all blocks, whatever a family calls them."""
    from neuroal_jax.checkpoint.safetensors import SafetensorsSource
    from neuroal_jax.checkpoint.tensors import combine, digests
    from neuroal_jax.masks.file import PackedMasks, in_block, save_masks

    source = SafetensorsSource(directory)
    shapes = {name: info.shape for name, info in source.infos.items() if in_block(name) and len(info.shape) == 2}
    rng = np.random.default_rng(0)
    packed = {name: np.packbits(rng.random(shape) < 0.3, axis=1) for name, shape in shapes.items()}
    widths = {name: shape[1] for name, shape in shapes.items()}
    save_masks(path, PackedMasks(packed, widths, {}, combine(digests(shapes, source.infos, source.read)), {}))
    return path


def test_the_variants_are_one_model_as_far_as_they_agree(llama, masks):
    found = variants.on_cpu(llama, "it", variants.Pruned("it", masks=masks))
    dense, control, csr = (found.models[name] for name in ("dense_fp32", "control", "csr"))
    shared = [name for name, parameter in dense.named_parameters() if parameter is control.get_parameter(name)]
    assert "lm_head.weight" in shared and "model.embed_tokens.weight" in shared and "model.norm.weight" in shared
    assert not any("proj" in name for name in shared)
    assert all(csr.get_parameter(name) is parameter for name, parameter in control.named_parameters() if name in shared)
    assert (control.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.6
    assert (dense.model.layers[0].mlp.up_proj.weight == 0).sum() == 0
    assert {type(module) for name, module in csr.named_modules() if name.endswith("_proj")} == {
        sparse_linear.SparseLinear
    }


def test_a_saved_model_is_measured_as_its_masks_are(llama, masks, measured, tmp_path):
    save_pruned(str(llama), masks, tmp_path / "pruned")
    saved = measure(str(llama), pruned=str(tmp_path / "pruned"), **QUICK)
    assert saved["sparsity"] == measured["sparsity"]
    for name, variant in measured["variants"].items():
        assert saved["variants"][name]["tokens"] == variant["tokens"]
        assert saved["variants"][name]["bytes"] == variant["bytes"]
    assert (saved["pruned"], saved["masks"]) == (str(tmp_path / "pruned"), None)


# Figures.


def test_the_figures_add_up(measured, llama, masks):
    found = measured["variants"]
    assert list(found) == ["dense_fp32", "dense_bf16", "control", "csr"]
    for variant in found.values():
        assert (variant["prefill"]["tokens"], variant["decode"]["tokens"]) == (6, 4)
        assert len(variant["tokens"]) == 5
        for phase in ("prefill", "decode"):
            figures = variant[phase]
            for clock in ("wall", "cpu"):
                seconds = figures[clock]["seconds"]
                assert len(seconds) == 2 and min(seconds) > 0
                assert figures[clock]["median"] == pytest.approx(np.median(seconds))
                assert figures[clock]["spread"] == pytest.approx(np.ptp(seconds) / np.median(seconds))
            rate = figures["tokens_per_second"]
            assert rate == pytest.approx(figures["tokens"] / figures["wall"]["median"])
            for baseline in ("dense_fp32", "dense_bf16"):
                quotient = rate / found[baseline][phase]["tokens_per_second"]
                assert variant["ratios"][baseline][phase] == pytest.approx(quotient)
        for baseline in ("dense_fp32", "dense_bf16"):
            quotient = found[baseline]["decode"]["cpu"]["median"] / variant["decode"]["cpu"]["median"]
            assert variant["ratios"][baseline]["decode_cpu"] == pytest.approx(quotient)
    weights = load_file(llama / "model.safetensors")
    linears = [name for name, weight in weights.items() if ".layers." in name and weight.ndim == 2]
    total = sum(weight.size for weight in weights.values())
    prunable = sum(weights[name].size for name in linears)
    zeros = measured["sparsity"]["zeros"]
    rows = sum(len(weights[name]) + 1 for name in linears)
    assert measured["sparsity"] == {"zeros": zeros, "weights": prunable, "achieved": zeros / prunable}
    assert 0.69 < zeros / prunable < 0.71
    sizes = {"dense_fp32": 4 * total, "dense_bf16": 2 * total, "control": 4 * total}
    sizes["csr"] = 4 * (total - prunable) + 8 * (prunable - zeros) + 4 * rows
    assert {name: variant["bytes"] for name, variant in found.items()} == sizes
    assert measured["same_tokens"]["equal"] and found["csr"]["tokens"] == found["control"]["tokens"]
    assert measured["machine"]["threads"] == torch.get_num_threads()
    assert "PyTorch built with" in measured["machine"]["torch_config"]


def test_every_repeat_takes_its_turn(monkeypatch):
    order = []

    def generate(model, *_):
        order.append(model)
        return decoding.Generated((len(order),), Seconds(0, 0), Seconds(0, 0), torch.zeros(1))

    monkeypatch.setattr(decoding, "generate", generate)
    found = decoding.in_turns({"a": "A", "b": "B"}, torch.zeros(1, 1), 2, 3)
    assert order == ["A", "B"] * 4  # the first of which are not counted
    numbers = {name: [each.tokens for each in generations] for name, generations in found.items()}
    assert numbers == {"a": [(3,), (5,), (7,)], "b": [(4,), (6,), (8,)]}


def test_threads_are_as_asked_and_given_back(llama, masks):
    before = torch.get_num_threads()
    found = measure(str(llama), masks=masks, threads=before + 1, **QUICK)
    assert found["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_a_first_difference_is_told_with_its_logits(llama, masks, monkeypatch):
    real = sparse_linear.with_csr

    def disturbed(model):
        made = real(model)
        made.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=True)
        with torch.no_grad():
            made.lm_head.weight.copy_(model.lm_head.weight)
            made.lm_head.bias.zero_()[17] = 1e4
        return made

    monkeypatch.setattr(variants, "with_csr", disturbed)
    found = measure(str(llama), masks=masks, **QUICK)
    difference = found["same_tokens"]["first_difference"]
    ours = found["variants"]["control"]["tokens"]
    place = next(index for index, token in enumerate(ours) if token != 17)
    assert not found["same_tokens"]["equal"]
    assert difference["position"] == place
    assert (difference["control"]["token"], difference["csr"]["token"]) == (ours[place], 17)
    logits = difference["csr"]["logits"]
    assert set(logits) == {str(ours[place]), "17"}
    assert logits["17"] > 9000 > logits[str(ours[place])]
    control = variants.on_cpu(llama, "it", variants.Pruned("it", masks=masks)).models["control"]
    ids = prompts.make_prompt(llama, "it", 5, text=None, file=None, tokens=6).ids
    expected = control(torch.tensor([[*ids, *ours[:place]]])).logits[0, -1].detach()
    for token in (ours[place], 17):
        assert difference["control"]["logits"][str(token)] == pytest.approx(float(expected[token]), abs=1e-4)
    assert f"control and csr differ from new token {place} on (control: {ours[place]}, logits" in table(found)


def test_logits_that_are_no_numbers_are_refused(llama, masks, monkeypatch):
    real = sparse_linear.with_csr

    def broken(model):
        made = real(model)
        made.model.norm.weight = nn.Parameter(torch.full_like(model.model.norm.weight, float("nan")))
        return made

    monkeypatch.setattr(variants, "with_csr", broken)
    with pytest.raises(UserError, match="csr gives logits that are NaN or infinite"):
        measure(str(llama), masks=masks, **QUICK)


# What speaks against the figures.


def decodes(**seconds):
    """Figures of decodes from their (wall, CPU) seconds."""
    return {name: {"decode": rates.phase(10, [Seconds(*each) for each in pairs])} for name, pairs in seconds.items()}


UNRELIABLE = {
    "quiet": (decodes(a=[(1, 2), (1.1, 2.1)]), 1.0, []),
    "no load average": (decodes(a=[(1, 2)]), None, []),
    "a load that may be its own": (decodes(a=[(1, 2)]), 9.0, []),
    "other programs before, too": (
        decodes(a=[(1, 1)]),
        2.6,
        ["no decode used more than 1.00", "the load average was 2.60 at the start, beyond 2.5"],
    ),
    "threads that wait": (decodes(a=[(1, 1.5)], b=[(1, 1.2)]), 0.0, ["no decode used more than 1.50 of 2 threads"]),
    "a variant that uses all": (decodes(a=[(1, 1.7)], b=[(1, 1.2)]), 0.0, []),
    "a repeat that waits": (decodes(a=[(1, 2), (1.5, 2.1), (1, 2)]), 0.0, ["a: wall seconds differ by 50%, CPU"]),
    "a repeat that is slow": (decodes(a=[(1, 2)], b=[(1, 2), (2, 4)]), 0.0, ["b: CPU seconds differ by 67%"]),
}


@pytest.mark.parametrize(("figures", "load", "expected"), UNRELIABLE.values(), ids=UNRELIABLE)
def test_a_shared_machine_is_told(figures, load, expected):
    found = rates.unreliable(figures, 2, 2, load)
    assert len(found) == len(expected)
    assert all(reason.startswith(start) for reason, start in zip(found, expected, strict=True))


def test_idle_cores_beside_the_threads_may_have_work():
    figures = decodes(a=[(1, 0.5)])
    assert len(rates.unreliable(figures, 1, 8, 7.4)) == 1
    assert len(rates.unreliable(figures, 1, 8, 7.6)) == 2


def speeds_of(csr, bf16):
    return {"csr": {"decode": {"tokens_per_second": csr}}, "dense_bf16": {"decode": {"tokens_per_second": bf16}}}


WARNINGS = {
    "none": (([1024, 2048], 0.6, 127, speeds_of(2.0, 2.0)), []),
    "narrow": (([1023, 2048, 64], 0.7, 1, speeds_of(2, 1)), ["2 of 3 linears have fewer than 1024", "narrowest 64"]),
    "few zeros": (([2048], 0.599, 1, speeds_of(2, 1)), ["sparsity is 0.599"]),
    "a long prompt": (([2048], 0.7, 128, speeds_of(2, 1)), ["the prompt has 128 rows"]),
    "bf16 wins": (([2048], 0.7, 1, speeds_of(2, 3)), ["in bf16 decodes faster", "3.00 tokens a second, not 2.00"]),
}


@pytest.mark.parametrize(("given", "parts"), WARNINGS.values(), ids=WARNINGS)
def test_warnings_are_given_where_they_are_due(given, parts):
    found = rates.warnings_of(*given)
    assert len(found) == (1 if parts else 0)
    assert all(part in found[0] for part in parts)


# The command.


def test_the_command(llama, masks, tmp_path, capsys):
    out = tmp_path / "generation.json"
    command = ["--model", str(llama), "--masks", str(masks), "--prompt-tokens", "6", "--new-tokens", "3"]
    command += ["--repeats", "1", "--threads", "1", "--out", str(out)]
    assert main(command) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [line.split()[0] for line in shown.splitlines()[:5]] == ["variant", *result["variants"]]
    assert f"{result['variants']['csr']['decode']['tokens_per_second']:.2f}" in shown
    assert "control and csr generate the same tokens" in shown
    assert "always 3 new ones" in shown
    assert f"linears have fewer than 1024 inputs (the narrowest {min(32, 56)})" in shown
    assert result["machine"]["threads"] == 1
    assert result["prompt"]["origin"] == "prompt-tokens"
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that loads a model."""
    monkeypatch.setattr(variants, "load_checked", lambda *_: pytest.fail("a model was loaded"))


BAD = {
    "no pruned model": ([], "the pruned model is missing"),
    "two": (["--masks", "MASKS", "--pruned", "MODEL"], "--masks and --pruned both name the pruned model"),
    "two prompts": (["--masks", "MASKS", "--prompt", "a", "--prompt-tokens", "3"], "--prompt and --prompt-tokens both"),
    "no text": (["--masks", "MASKS", "--prompt", "\udcff\udcfe"], "the prompt is no text in UTF-8"),
    "no prompt file": (["--masks", "MASKS", "--prompt-file", "nowhere"], "--prompt-file nowhere cannot be read"),
    "an odd prompt file": (["--masks", "MASKS", "--prompt-file", "MASKS"], "cannot be read ('utf-8' codec"),
    "no masks": (["--masks", "nowhere"], "nowhere is not a readable mask file"),
    "no such pruned": (["--pruned", "nowhere"], "--pruned nowhere: no such directory"),
    "no tokenizer": (["--masks", "MASKS"], "pass --prompt-tokens N"),
    "a long prompt": (["--masks", "MASKS", "--prompt-tokens", "33"], "more than the context of"),
    "many new tokens": (["--masks", "MASKS", "--prompt-tokens", "4", "--new-tokens", "61"], "which is 64"),
    "one new token": (["--masks", "MASKS", "--new-tokens", "1"], "--new-tokens is 1, expected a whole number of"),
    "no new tokens": (["--masks", "MASKS", "--new-tokens", "0"], "--new-tokens is 0"),
    "no threads": (["--masks", "MASKS", "--threads", "0"], "--threads is 0"),
    "no repeats": (["--masks", "MASKS", "--repeats", "x"], "--repeats is 'x'"),
    "another backend": (["--masks", "MASKS", "--backend", "tpu"], "invalid choice"),
    "an abbreviation": (["--mask", "MASKS"], "unrecognized arguments"),
    "no directory": (["--masks", "MASKS", "--prompt-tokens", "3", "--out", "no/x.json"], "there is no directory no"),
    "over its masks": (["--masks", "MASKS", "--out", "MASKS", "--overwrite"], "an input of this very program"),
    "over any file": (["--masks", "MASKS", "--out", "OTHER", "--overwrite"], "is no earlier result of this program"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(llama, masks, tmp_path, monkeypatch, capsys, no_model, given, message):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.json"
    other.write_text('{"format": "of an app"}')
    places = {"MASKS": str(masks), "MODEL": str(llama), "OTHER": str(other)}
    before = masks.read_bytes()
    assert main(["--model", str(llama), *(places.get(part, part) for part in given)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert masks.read_bytes() == before
    assert list(tmp_path.iterdir()) == [other]


def test_models_that_do_not_belong_together_are_refused(llama, masks, make_llama, tmp_path, capsys):
    other, wide = make_llama(seed=1), make_llama(intermediate_size=48)
    quick = ["--prompt-tokens", "3"]
    updated = make_masks(llama, tmp_path / "updated.safetensors", {"weights": "updated"})
    for model, given, message in (
        (other, ["--masks", str(masks)], "has other weights than the masks were computed from"),
        (wide, ["--masks", str(masks)], "the masks are of another model than"),
        (llama, ["--pruned", str(wide)], "model.layers.0.mlp.gate_proj.weight is [48, 32], expected [56, 32]"),
        (llama, ["--pruned", str(make_llama(family="phi"))], "is no pruned form of --model"),
        (llama, ["--masks", str(updated)], "use the model that the run saved"),
    ):
        assert main(["--model", str(model), *given, *quick]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "origin"),
    [({}, "the default prompt"), ({"text": "to be"}, "prompt"), ({"file": "FILE"}, "prompt-file")],
)
def test_prompts_are_tokenized_as_transformers_does(tmp_path, options, origin):
    from neuroal_jax.checkpoint.hugging_face import load_tokenizer
    from neuroal_jax.checkpoint.locate import locate

    file = tmp_path / "prompt.txt"
    file.write_text("or not")
    given = {"text": None, "file": None, "tokens": None, **options} | ({"file": file} if "file" in options else {})
    found = prompts.make_prompt(locate("demo"), "demo", 5, **given)
    text = {"the default prompt": prompts.TEXT, "prompt": "to be", "prompt-file": "or not"}[origin]
    assert list(found.ids) == load_tokenizer(locate("demo"))(text)["input_ids"]
    assert found.origin == origin


def test_one_new_token_is_no_decoding(llama, masks):
    with pytest.raises(UserError, match="--new-tokens is 1, expected at least 2"):
        measure(str(llama), masks=masks, new_tokens=1)


def test_a_config_without_a_vocabulary_is_named(monkeypatch, llama):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    monkeypatch.setattr(prompts, "load_config", lambda _: config)
    with pytest.raises(UserError, match="the config of it has no vocab_size"):
        prompts.make_prompt(llama, "it", 2, text=None, file=None, tokens=20)


def test_random_prompts_are_the_same_every_time(llama):
    given = {"text": None, "file": None, "tokens": 20}
    first, second = (prompts.make_prompt(llama, "it", 2, **given) for _ in range(2))
    assert first == second
    assert len(set(first.ids)) > 5 and max(first.ids) < 96


def test_a_token_beyond_the_vocabulary_is_named(monkeypatch, llama):
    monkeypatch.setattr(prompts, "load_tokenizer", lambda _: lambda text: {"input_ids": [3, 96]})
    with pytest.raises(UserError, match="gives token 96, beyond its vocabulary of 96"):
        prompts.make_prompt(llama, "it", 2, text="a", file=None, tokens=None)


# 2:4 on a GPU.


@pytest.mark.parametrize(
    ("shape", "kept", "problem"),
    [
        ((64, 128), [1, 0, 0, 1], ""),
        ((64, 128), [0, 0, 0, 0], ""),
        ((64, 128), [1, 1, 0, 1], "keeps more than 2 weights in 2048 of 2048 groups of 4"),
        ((96, 64), [1, 0, 0, 1], ""),
        ((64, 96), [1, 0, 0, 1], "has shape [64, 96], expected multiples of 32 and 64"),
        ((48, 64), [1, 0, 0, 1], "has shape [48, 64], expected multiples of 32 and 64"),
    ],
)
def test_what_is_no_2_of_4_is_named(shape, kept, problem):
    linear = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(kept * (shape[1] // 4)).expand(shape))
    assert sparse_linear.two_of_four_problem(linear.weight) == problem
    if problem:
        with pytest.raises(UserError, match=r"--backend cuda measures 2:4 models, but layers\.0\.up "):
            sparse_linear.check_semi_structured({"layers.0.up": linear})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_that_is_not_there_is_named(llama, masks, capsys):
    command = ["--model", str(llama), "--masks", str(masks), "--backend", "cuda", "--prompt-tokens", "3"]
    assert main(command) == 2
    assert "--backend cuda needs a GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_2_of_4_on_a_gpu(make_llama, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    dense = make_llama(dtype="float16", **sizes)
    shutil.copytree(dense, tmp_path / "pruned")
    from safetensors.torch import load_file as load_tensors
    from safetensors.torch import save_file as save_tensors

    weights = load_tensors(dense / "model.safetensors")
    for name, weight in weights.items():
        if ".layers." in name and weight.ndim == 2:
            weight.view(len(weight), -1, 4)[..., 1:3] = 0
    save_tensors(weights, tmp_path / "pruned" / "model.safetensors", metadata={"format": "pt"})
    found = measure(str(dense), pruned=str(tmp_path / "pruned"), backend="cuda", **QUICK)
    assert list(found["variants"]) == ["dense_fp16", "dense_bf16", "control", "semi_structured"]
    assert found["variants"]["semi_structured"]["bytes"] < found["variants"]["control"]["bytes"]
    assert found["machine"]["gpu"]
    with pytest.raises(UserError, match="keeps more than 2 weights"):
        measure(str(dense), pruned=str(dense), backend="cuda", **QUICK)
    models = variants.on_cuda(dense, "dense", variants.Pruned("pruned", tmp_path / "pruned")).models
    for length in (1, 9):
        prompt = torch.arange(3, 3 + length, device="cuda")[None]
        with torch.inference_mode():
            control, sparse = (models[name](prompt).logits for name in ("control", "semi_structured"))
        torch.testing.assert_close(sparse, control, rtol=2e-2, atol=2e-2)


# Beside a run, and in a sweep.


@pytest.fixture(scope="module")
def swept(llama, tokens, tmp_path_factory):
    """One finished sweep of two runs with their generation, one of which has weights of its own."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    given = {"top-ups": "uniform,refit", "eval": "none"}
    command = [*sweep_arguments(llama, tokens, out, **given), "--generation"]
    assert run_sweep(command) == 0
    return out, command


def test_a_sweep_has_its_columns_and_measures_once(swept, llama, capsys):
    out, command = swept
    files = {path: path.stat().st_mtime_ns for path in out.rglob("generation.json")}
    rows = sweep_table(out)
    assert len(files) == len(rows) == 2
    for row, masked in zip(rows, (True, False), strict=True):
        found = json.loads((out / llama.name / f"magnitude-{row['top_up']}-0.6-seed0/generation.json").read_text())
        csr = found["variants"]["csr"]
        assert float(row["decode_tokens_per_second"]) == round(csr["decode"]["tokens_per_second"], 2)
        assert float(row["decode_vs_dense_fp32"]) == round(csr["ratios"]["dense_fp32"]["decode"], 3)
        assert (found["masks"] is not None, found["pruned"] is None) == (masked, masked)
        assert found["prompt"]["tokens"] == 32 and found["prompt"]["origin"] == "prompt-tokens"
    assert "decode_vs_dense_fp32" in (out / "report.html").read_text()
    assert run_sweep(command) == 0
    assert "decode_tokens_per_second" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert sweep_table(out) == rows


def test_a_sweep_takes_generation_from_its_file_and_tells_what_it_will_do(llama, tokens, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text("generation: true")
    command = [*sweep_arguments(llama, tokens, tmp_path / "out", **{"eval": "none"}), "--config", str(file)]
    assert speeds.take_generation(sweep.parse_arguments(command)) is True
    assert run_sweep([*command, "--dry-run"]) == 0
    assert "its tokens per second are measured" in capsys.readouterr().out
    file.write_text("generation: 3")
    for more in ([], ["--dry-run"]):
        assert run_sweep([*command, *more]) == 2
        assert "--generation is 3, expected true or false" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"new_tokens": 31}, {"repeats": 1}, {"model": "other"}, {"backend": "cuda"}, {"format": "x"},
        {"prompt": {"origin": "prompt", "tokens": 32}}, {"prompt": {"origin": "prompt-tokens", "tokens": 31}},
        {"kept_sha256": "x"}, {"variants": {}}, {"variants": {"csr": {"decode": {"tokens_per_second": "x"}}}},
    ],
    ids=str,
)  # fmt: skip
def test_generation_of_something_else_is_not_taken(swept, llama, tmp_path, change):
    out, _ = swept
    found = json.loads((out / llama.name / "magnitude-uniform-0.6-seed0/generation.json").read_text())
    run = SimpleNamespace(config=SimpleNamespace(model=str(llama)))
    path = tmp_path / "generation.json"
    shutil.copy(out / llama.name / "magnitude-uniform-0.6-seed0/masks.safetensors", tmp_path)
    assert speeds.measured(path, run) is None
    path.write_text(json.dumps(found))
    assert set(speeds.measured(path, run)) == {
        "decode_tokens_per_second",
        "decode_vs_dense_fp32",
        "decode_reliable",
    }
    path.write_text(json.dumps({**found, **change}))
    assert speeds.measured(path, run) is None


def test_generation_that_cannot_be_had_is_an_error_of_the_row(llama, tokens, tmp_path, capsys):
    def start(module, log):
        if module[0].endswith("generation"):
            return "exit code 2: error: no memory"
        return in_this_process(module, log)

    given = sweep_arguments(llama, tokens, tmp_path / "out", **{"top-ups": "uniform", "eval": "none"})
    assert sweep.main([*given, "--generation"], start=start) == 2
    assert "1 of 1 runs failed" in capsys.readouterr().err
    (row,) = sweep_table(tmp_path / "out")
    assert row["error"] == "generation: exit code 2: error: no memory"


def test_the_report_of_a_run_shows_what_lies_beside_it(swept, llama, tmp_path, capsys):
    run = swept[0] / llama.name / "magnitude-uniform-0.6-seed0"
    page = (run / "report.html").read_text()
    assert "<h2>Token generation</h2>" in page
    found = json.loads((run / "generation.json").read_text())
    section = page[page.index('<section id="generation">') :]
    section = section[: section.index("</section>")]
    for name, title in (("dense_bf16", "dense, bf16"), ("csr", "pruned, CSR")):
        variant = found["variants"][name]
        cells = [variant["prefill"]["tokens_per_second"], variant["decode"]["tokens_per_second"]]
        cells += [variant["ratios"][baseline]["decode"] for baseline in ("dense_fp32", "dense_bf16")]
        row = [title, *(f"{cell:.2f}" for cell in cells), f"{variant['bytes'] / 2**20:.1f}"]
        assert "".join(f"<td>{cell}</td>\n" for cell in row) in section
    assert all(f"<p class=bad>{text.replace('&', '&amp;')}</p>" in section for text in found["warnings"])
    copied = shutil.copytree(run, tmp_path / "run")
    assert report.main([str(copied)]) == 0
    assert (copied / "report.html").read_text() == page
    (copied / "generation.json").unlink()
    assert report.main([str(copied)]) == 0
    assert "Token generation" not in (copied / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "{", "measure it again, or remove it"),
        (lambda text: "[]", "generation.json is damaged"),
        (lambda text: text.replace("neuroal-generation-1", "x"), "its format is not"),
        (lambda text: text.replace('"kept_sha256"', '"kept"'), "generation.json is damaged (KeyError('kept_sha256'))"),
        (lambda text: text.replace('"ratios"', '"rations"'), "measure it again, or remove it"),
        (lambda text: text.replace('"bytes": ', '"bytes": "a", "b": '), "generation.json is damaged"),
    ],
)
def test_a_damaged_file_beside_a_run_is_one_line(swept, llama, tmp_path, capsys, change, message):
    run = shutil.copytree(swept[0] / llama.name / "magnitude-uniform-0.6-seed0", tmp_path / "run")
    before = (run / "report.html").read_bytes()
    (run / "generation.json").write_text(change((run / "generation.json").read_text()))
    capsys.readouterr()
    assert report.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (run / "report.html").read_bytes() == before


def test_the_report_shows_no_figures_of_another_model(swept, llama, tmp_path):
    run = shutil.copytree(swept[0] / llama.name / "magnitude-uniform-0.6-seed0", tmp_path / "run")
    found = json.loads((run / "generation.json").read_text())
    found["kept_sha256"] = kept_sha256({"other": np.zeros((2, 2), np.uint8)})
    (run / "generation.json").write_text(json.dumps(found))
    assert report.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "generation.json was measured on another model" in page
    assert "pruned, CSR" not in page
    assert generation.GENERATION == "generation.json"
