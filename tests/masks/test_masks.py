"""The mask file and its PyTorch side."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.masks_to_torch import apply_masks, main, save_pruned, verify
from neuroal_jax import PruneConfig, UserError, prune
from neuroal_jax.masks.file import PackedMasks, load_masks, pruned_problem, read_masks, save_masks


def packed_masks(width, seed=0):
    mask = np.random.default_rng(seed).random((3, width)) < 0.5
    return PackedMasks({"a": np.packbits(mask, axis=1)}, {"a": width}, {"a": 2}, "hash", {"method": "m"}), mask


@pytest.mark.parametrize("width", [*range(1, 18), 257])
def test_round_trip(tmp_path, width):
    masks, mask = packed_masks(width)
    save_masks(tmp_path / "m", masks)
    read = read_masks(tmp_path / "m")
    np.testing.assert_array_equal(load_masks(tmp_path / "m")["a"], mask)
    assert (read.widths, read.kept_zeros, read.source, read.metadata) == (
        {"a": width},
        {"a": 2},
        "hash",
        {"method": "m"},
    )
    assert read.zeros() == (~mask).sum()


def test_equal_masks_are_equal_files(tmp_path):
    for name in "xy":
        save_masks(tmp_path / name, packed_masks(20)[0])
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pruning_keeps_the_dtype_and_the_source(dtype):
    import ml_dtypes

    masks, mask = packed_masks(9)
    weight = np.ones((3, 9), getattr(ml_dtypes, dtype, dtype))
    pruned = masks.prune("a", weight)
    assert pruned.dtype == weight.dtype
    np.testing.assert_array_equal(pruned != 0, mask)
    assert (weight == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_zeros": {"a": 25}}, "a keeps 24 weights, of which 25 cannot be zero"),
        ({"kept_zeros": {"b": 1}}, "of different names"),
        ({"kept_zeros": {"a": True}}, "'kept_zeros'"),
        ({"run": {"weights": 5}}, "'run'"),
    ],
)
def test_forged_counts(tmp_path, changes, message):
    packed = {"a": np.packbits(np.arange(36).reshape(3, 12) % 3 > 0, axis=1)}
    metadata = {"neuroal": json.dumps(header(**changes))}
    save_file(packed, tmp_path / "m", metadata=metadata)
    with pytest.raises(UserError, match=message):
        read_masks(tmp_path / "m")


def header(**changes):
    return {"format": "neuroal-masks-1", "source": "s", "widths": {"a": 12}, "kept_zeros": {}, "run": {}, **changes}


DAMAGED = {
    "no metadata": (None, np.uint8, "format is None"),
    "not JSON": ("{", np.uint8, "its metadata is damaged"),
    "other format": (header(format="x"), np.uint8, "format is 'x'"),
    "no widths": (header(widths=None), np.uint8, "'widths' of its metadata is missing or damaged"),
    "negative width": (header(widths={"a": -1}), np.uint8, "'widths'"),
    "width of another size": (header(widths={"a": 99}), np.uint8, r"expected uint8 \[out, 13\]"),
    "other names": (header(widths={"b": 12}), np.uint8, "of different names"),
    "other dtype": (header(), np.int16, r"a is int16 \[3, 2\], expected uint8"),
}


@pytest.mark.parametrize(("metadata", "dtype", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files(tmp_path, metadata, dtype, message):
    text = metadata if isinstance(metadata, str) or metadata is None else json.dumps(metadata)
    save_file({"a": np.zeros((3, 2), dtype)}, tmp_path / "m", metadata=text and {"neuroal": text})
    with pytest.raises(UserError, match=message):
        read_masks(tmp_path / "m")


def test_truncated_and_absent_files(tmp_path):
    save_masks(tmp_path / "m", packed_masks(20)[0])
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-3])
    for name in ("m", "none"):
        with pytest.raises(UserError, match="is not a readable mask file"):
            read_masks(tmp_path / name)


def test_pruned_problem():
    mask = np.array([[True, False, True]])
    assert pruned_problem(mask, np.array([[False, True, False]]), 0) is None
    assert pruned_problem(mask, np.array([[True, True, False]]), 1) is None
    assert pruned_problem(mask, np.array([[False, False, False]]), 0) == "has 1 nonzero weights that the mask prunes"
    assert pruned_problem(mask, np.array([[True, True, False]]), 0) == "has 1 zeros that the mask keeps, expected 0"


@pytest.fixture(scope="module")
def run(llama, tokens, tmp_path_factory):
    """A run without a saved model: its masks."""
    out = tmp_path_factory.mktemp("masks") / "out"
    options = {"allocation": "uniform", "pruner": "magnitude", "calib": str(tokens), "eval": "none"}
    prune(PruneConfig(model=str(llama), sparsity=0.6, out=str(out), **options))
    return out / "masks.safetensors"


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto")


def test_apply_masks_zeros_exactly_what_the_masks_prune(run, llama):
    model, masks = load(llama), load_masks(run)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert apply_masks(model, run) is model
    for name, parameter in model.named_parameters():
        expected = before[name].numpy()
        if name in masks:
            expected = np.where(masks[name], expected, 0)
        np.testing.assert_array_equal(parameter.detach().numpy(), expected)


@pytest.mark.parametrize("options", [{"intermediate_size": 40}, {"num_hidden_layers": 2}])
def test_masks_of_another_model_change_nothing(run, make_llama, options):
    other = make_llama(**options)
    model = load(other)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(UserError, match="the masks are of another model"):
        apply_masks(model, run)
    assert all((old == new).all() for old, new in zip(before, model.parameters(), strict=True))
    with pytest.raises(UserError, match="the masks are of another model"):
        verify(str(other), run)


def test_masks_of_other_weights_are_refused(run, make_llama, tmp_path):
    with pytest.raises(UserError, match="has other weights than the masks were computed from"):
        save_pruned(str(make_llama(seed=99)), run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_pruned_changes_the_masked_tensors_only(run, make_llama, llama, tmp_path):
    save_pruned(str(llama), run, tmp_path / "out")
    masks, old = load_masks(run), load_file(llama / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        np.testing.assert_array_equal(new[name], np.where(masks[name], tensor, 0) if name in masks else tensor)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()
    verify(str(tmp_path / "out"), run)
    with pytest.raises(UserError, match="already holds"):
        save_pruned(str(llama), run, tmp_path / "out")


LACKED, EXTRA = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        ({LACKED: None}, f"{LACKED} has no mask"),
        ({EXTRA: (96, 32)}, f"{EXTRA} is no linear of a block"),
        ({LACKED: (56, 24)}, rf"{LACKED} has shape \[56, 32\], the mask \[56, 24\]"),
    ],
    ids=["partial", "one too many", "other shape"],
)
def test_forged_masks_are_refused_wherever_masks_are_read(run, llama, tokens, tmp_path, forge, message):
    from flax import nnx

    from eval.perplexity import jax_perplexity, torch_perplexity
    from eval.zero_shot import evaluate
    from neuroal_jax import load_model, mask_tree
    from neuroal_jax.checkpoint.opened import open_checkpoint
    from neuroal_jax.checkpoint.tensors import combine, digests

    model, masks = str(llama), read_masks(run)
    packed, widths = dict(masks.packed), dict(masks.widths)
    for name, shape in forge.items():
        packed.pop(name, None), widths.pop(name, None)
        if shape is not None:
            packed[name], widths[name] = np.packbits(np.ones(shape, bool), axis=1), shape[1]
    source = open_checkpoint(model).source
    source = combine(digests(packed, source.infos, source.read))  # as if they had been computed so
    forged = tmp_path / "masks.safetensors"
    save_masks(forged, PackedMasks(packed, widths, {}, source, masks.metadata))
    windows = np.load(tokens)["evaluation"]
    for read in (
        lambda: save_pruned(model, forged, tmp_path / "out"),
        lambda: verify(model, forged, load=False),
        lambda: apply_masks(load(llama), forged),
        lambda: jax_perplexity(model, windows, "float32", forged),
        lambda: torch_perplexity(model, windows, "float32", forged),
        lambda: evaluate(model, ["rte"], masks=forged),
    ):
        with pytest.raises(UserError, match=message):
            read()
    with pytest.raises(UserError, match=rf"{LACKED}|{EXTRA}|shape"):
        mask_tree(load_masks(forged), open_checkpoint(model), nnx.state(load_model(model), nnx.Param))
    assert sorted(tmp_path.iterdir()) == [forged]


def test_what_was_added_to_a_masked_linear_needs_no_mask(run, llama):
    from neuroal_jax.masks.file import uncovered

    shapes = {name: parameter.shape for name, parameter in load(llama).named_parameters()}
    added = {"model.layers.1.mlp.up_proj.lora_A.default.weight": (4, 32)}
    places = {name: name for name in load_masks(run)}
    assert uncovered(places, {**shapes, **added, "heads.0.weight": (4, 4)}) == []
    assert uncovered(places, {**shapes, "model.layers.1.mlp.up.weight": (4, 4)}) == [
        "model.layers.1.mlp.up.weight has no mask"
    ]


def edited(source, target, name, place, value):
    """A copy of a checkpoint with one weight changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name][place] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize("load", [False, True])
def test_verify_finds_a_single_weight_that_is_not_pruned(run, llama, tmp_path, load):
    save_pruned(str(llama), run, tmp_path / "out")
    place = tuple(np.argwhere(~load_masks(run)[K_PROJ])[0])
    for value in (1, 1e-40, np.nan):
        model = edited(tmp_path / "out", tmp_path / f"{value}", K_PROJ, place, value)
        with pytest.raises(UserError, match=r"k_proj.weight has 1 nonzero weights that the mask prunes"):
            verify(str(model), run, load=load)
    model = edited(tmp_path / "out", tmp_path / "negative", K_PROJ, place, -0.0)
    assert str(verify(str(model), run, load=load, exact=True)) == "its zeros are exactly the masks"


@pytest.mark.parametrize("load", [False, True])
def test_kept_weights_may_be_anything_after_fine_tuning(run, llama, tmp_path, load):
    save_pruned(str(llama), run, tmp_path / "out")
    first, second = (tuple(place) for place in np.argwhere(load_masks(run)[K_PROJ])[:2])
    other = edited(tmp_path / "out", tmp_path / "other", K_PROJ, first, 7.0)
    assert str(verify(str(other), run, load=load, exact=True)) == "its zeros are exactly the masks"
    zero = edited(other, tmp_path / "zero", K_PROJ, second, 0.0)
    assert verify(str(zero), run, load=load).now == {K_PROJ: 1}
    with pytest.raises(UserError, match=r"k_proj.weight has 1 zeros that the mask keeps, expected 0"):
        verify(str(zero), run, load=load, exact=True)


def test_zeros_that_the_run_left_may_become_weights(run, llama, tmp_path):
    save_pruned(str(llama), run, tmp_path / "out")
    masks = read_masks(run)
    save_masks(tmp_path / "m", dataclasses.replace(masks, kept_zeros={K_PROJ: 3}))
    found = verify(str(tmp_path / "out"), tmp_path / "m", load=False)
    assert str(found) == "all that the masks prune is zero; 0 kept weights are zero too, 3 when the run ended"


@pytest.fixture
def wrappers():
    """What wraps a model in PyTorch: made by PyTorch where it can be, else modules of the same names."""
    import torch

    def hold(**modules):
        return torch.nn.ModuleDict(modules)

    def adapt(model):
        for layer in model.model.layers:
            down = layer.mlp.down_proj
            layer.mlp.down_proj = hold(base_layer=down, lora_A=hold(default=torch.nn.Linear(4, 4)))
        return hold(base_model=hold(model=model))

    def with_copy(model):
        model.average = copy.deepcopy(model)
        return model

    def compile_layers(model):
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer)
        return model

    return {
        "compile": torch.compile,
        "compiled layers": compile_layers,
        "DataParallel": torch.nn.DataParallel,
        "both": lambda model: torch.compile(torch.nn.DataParallel(model)),
        "FSDP": lambda model: hold(_fsdp_wrapped_module=model),
        "PEFT": adapt,
        "a trainer": lambda model: hold(model=model, head=torch.nn.Linear(4, 4)),
        "with a copy of itself": with_copy,
        "the inner model": lambda model: model.model,
    }


WRAPPERS = ["compile", "compiled layers", "DataParallel", "both", "FSDP", "PEFT", "a trainer"]
WRAPPERS += ["with a copy of itself", "the inner model"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_are_pruned_and_verified(run, llama, wrappers, name):
    masks, model = load_masks(run), load(llama)
    weights = {name: parameter for name, parameter in model.named_parameters()}
    wrapped = wrappers[name](model)
    with pytest.raises(UserError, match="merge them first" if name == "PEFT" else "nonzero weights that the mask"):
        verify(wrapped, run)
    assert apply_masks(wrapped, run) is wrapped
    assert all(not weights[name].detach().numpy()[~mask].any() for name, mask in masks.items())
    assert all(weights[name].detach().numpy()[mask].all() for name, mask in masks.items())
    if name != "PEFT":
        assert not verify(wrapped, run, exact=True).now


def flat(model, torch):
    return torch.nn.ParameterDict({"_fsdp_wrapped_module": torch.nn.ParameterDict({"_flat_param": torch.ones(9)})})


def pruned_by_torch(model, torch):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    return model


def parametrized(model, torch):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def quantized(model, torch):
    up = model.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight.detach().to(torch.int8), requires_grad=False)
    return model


UNREADABLE = {
    "FSDP, flat": (flat, "apply the masks before wrapping"),
    "on meta": (lambda model, torch: model.to("meta"), "on the meta device"),
    "pruned by PyTorch": (pruned_by_torch, "torch.nn.utils.prune.remove"),
    "parametrized": (parametrized, "remove_parametrizations"),
    "quantized": (quantized, "apply the masks before quantization"),
    "two models": (lambda model, torch: torch.nn.ModuleDict({"teacher": model, "student": load(model.name_or_path)}),
                   r"several models in this one \(student, teacher\)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_weights_that_are_not_there_as_numbers_are_refused_with_what_to_do(run, llama, change, message):
    import torch

    model = change(load(llama), torch)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for use in (apply_masks, verify):
        with pytest.raises(UserError, match=message):
            use(model, run)
    assert all(old.is_meta or (old == new).all() for old, new in zip(before, model.parameters(), strict=True))


def test_a_checkpoint_that_was_saved_inside_a_wrapper_is_named_as_such(run, llama, tmp_path):
    save_pruned(str(llama), run, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=r"saved inside a wrapper, see _orig_mod\.model.*: save the model itself"):
        verify(str(tmp_path / "out"), run, load=False)


def test_sharded_checkpoints_stay_sharded(make_llama, tokens, tmp_path):
    model = make_llama(shard="40KB")
    assert len(list(model.glob("model-*.safetensors"))) > 1
    options = {"allocation": "uniform", "pruner": "magnitude", "calib": str(tokens), "eval": "none"}
    saved = tmp_path / "model"
    prune(PruneConfig(model=str(model), sparsity=0.6, out=str(tmp_path / "out"), save_model=str(saved), **options))
    assert {p.name for p in saved.iterdir()} == {p.name for p in model.iterdir()}
    verify(str(saved), tmp_path / "out" / "masks.safetensors")


def test_the_commands(run, llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["apply", "--model", str(llama), "--masks", str(run), "--out", out]) == 0
    assert main(["verify", "--model", out, "--masks", str(run)]) == 0
    assert "its zeros are exactly the masks" in capsys.readouterr().out
    assert main(["verify", "--model", str(llama), "--masks", str(run), "--files-only"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(["verify", "--model", str(tmp_path / "none"), "--masks", str(run)]) == 2


def test_padding_bits_are_zero_and_a_width_counts_them_out(tmp_path):
    masks = PackedMasks({"a": np.packbits(np.ones((3, 9), bool), axis=1)}, {"a": 9}, {}, "s", {})
    assert masks.packed["a"].tolist() == [[255, 128]] * 3
    assert masks.zeros() == 0
    assert masks.mask("a").shape == (3, 9)


def test_set_padding_bits_are_damage(tmp_path):
    save_masks(tmp_path / "m", PackedMasks({"a": np.full((3, 2), 255, np.uint8)}, {"a": 9}, {}, "s", {}))
    with pytest.raises(UserError, match="m: a "):
        read_masks(tmp_path / "m")


@pytest.mark.parametrize("run_entry", [[1], "abc", 5])
def test_a_run_entry_that_is_no_object_is_damage(tmp_path, run_entry):
    metadata = {"neuroal": json.dumps(header(run=run_entry))}
    save_file({"a": np.zeros((3, 2), np.uint8)}, tmp_path / "m", metadata=metadata)
    with pytest.raises(UserError, match="metadata"):
        read_masks(tmp_path / "m")


def test_masks_of_a_dtype_that_numpy_lacks_are_damage(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    tensors = {"a": torch.zeros((3, 2), dtype=torch.float8_e4m3fn)}
    save_torch(tensors, tmp_path / "m", metadata={"neuroal": json.dumps(header())})
    with pytest.raises(UserError, match="m"):
        read_masks(tmp_path / "m")


def test_a_file_without_masks_is_refused(tmp_path):
    save_file({}, tmp_path / "m", metadata={"neuroal": json.dumps(header(widths={}))})
    with pytest.raises(UserError, match="m"):
        read_masks(tmp_path / "m")


@pytest.mark.parametrize("command", ["apply", "verify"])
def test_a_model_in_float64_is_refused(run, llama, tmp_path, capsys, command):
    model = shutil.copytree(llama, tmp_path / "model")
    tensors = {name: tensor.astype(np.float64) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")
    out = ["--out", str(tmp_path / "out")] if command == "apply" else ["--files-only"]
    assert main([command, "--model", str(model), "--masks", str(run), *out]) == 2
    assert "F64" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "nothing-like-it"}'])
def test_a_pruned_model_that_transformers_cannot_load_is_one_line(run, llama, tmp_path, capsys, content):
    save_pruned(str(llama), run, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    if content is not None:
        (tmp_path / "out" / "config.json").write_text(content)
    assert main(["verify", "--model", str(tmp_path / "out"), "--masks", str(run)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_applying_into_the_directory_of_the_masks_keeps_the_masks(run, llama, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    masks = Path(shutil.copy(run, tmp_path / "run" / "masks.safetensors"))
    main(["apply", "--model", str(llama), "--masks", str(masks), "--out", str(tmp_path / "run")])
    assert masks.read_bytes() == run.read_bytes()


def test_a_model_is_not_replaced_by_its_own_pruned_copy(run, llama, tmp_path, capsys):
    model = shutil.copytree(llama, tmp_path / "model")
    arguments = ["apply", "--model", str(model), "--masks", str(run), "--out", str(model), "--overwrite"]
    assert main(arguments) == 2
    assert (model / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert "same directory" in capsys.readouterr().err


def test_save_pruned_copies_what_belongs_to_the_model(run, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    for name in ("tokenizer.json", "notes.txt", "modeling_x.py", "pytorch_model.bin", "old.pt"):
        (model / name).write_bytes(b"\x00\xff" + name.encode())
    save_pruned(str(model), run, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    for name in found - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert "spars" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_every_byte_outside_of_the_pruned_tensors_stays(make_llama, tokens, tmp_path, shard):
    model = make_llama(dtype="bfloat16", shard=shard)
    options = {"allocation": "uniform", "pruner": "magnitude", "calib": str(tokens), "eval": "none"}
    prune(PruneConfig(model=str(model), sparsity=0.6, out=str(tmp_path / "run"), **options))
    save_pruned(str(model), tmp_path / "run" / "masks.safetensors", tmp_path / "out")
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    for old in model.glob("*.safetensors"):
        before, after = bytearray(old.read_bytes()), bytearray((tmp_path / "out" / old.name).read_bytes())
        size = int.from_bytes(before[:8], "little")
        for name, entry in json.loads(before[8 : 8 + size]).items():
            if name in masks:
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                expected = np.frombuffer(before[begin:end], "<u2") * masks[name].reshape(-1)
                assert np.frombuffer(after[begin:end], "<u2").tolist() == expected.tolist()
                before[begin:end] = after[begin:end] = bytes(end - begin)
        assert after == before
