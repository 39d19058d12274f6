"""The perplexity command: both backends, dense and pruned, and what it records."""

import json

import numpy as np
import pytest

from eval.perplexity import jax_perplexity, load_in_torch, main, next_token_losses, torch_perplexity
from neuroal_jax.errors import UserError
from tests.conftest import save_random_model
from tests.run.test_pipeline import run


@pytest.fixture(scope="module")
def pruned(llama, tokens, tmp_path_factory):
    root = tmp_path_factory.mktemp("pruned")
    result = run(llama, tokens, root / "out", allocation="uniform", save_model=str(root / "model"))
    return result.manifest["token_ppl"], root


def by_hand(model, windows):
    """One window at a time, straight from the definition, with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    losses = []
    for window in torch.from_numpy(windows):
        with torch.no_grad():
            log_probabilities = loaded(window[None]).logits[0].log_softmax(-1)
        losses.append(-np.mean([log_probabilities[i, window[i + 1]].item() for i in range(len(window) - 1)]))
    return np.exp(np.mean(losses))


def test_jax_torch_and_transformers_by_hand_agree(llama, tokens, pruned):
    token_ppl, root = pruned
    windows, masks = np.load(tokens)["evaluation"], root / "out" / "masks.safetensors"
    dense, after = by_hand(llama, windows), by_hand(root / "model", windows)
    assert after != pytest.approx(dense, rel=1e-3)
    for measure in (jax_perplexity, torch_perplexity):
        assert measure(str(llama), windows, "float32") == pytest.approx(dense, rel=1e-5)
        assert measure(str(llama), windows, "float32", masks) == pytest.approx(after, rel=1e-5)
        assert measure(str(root / "model"), windows, "float32") == pytest.approx(after, rel=1e-5)
    assert (token_ppl["dense"], token_ppl["pruned"]) == pytest.approx((dense, after), rel=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "bfloat16"])
@pytest.mark.parametrize("spread", [0.02, 1.0, 5.0])
def test_the_loss_of_a_large_vocabulary_is_exact(spread, layout):
    import torch

    torch.manual_seed(0)
    logits, ids = spread * torch.randn(2, 5, 262_144), torch.randint(0, 262_144, (2, 5))
    if layout == "transposed":  # the same numbers, the vocabulary not last in memory
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "bfloat16":
        logits = logits.bfloat16()
    expected = -logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    np.testing.assert_allclose(next_token_losses(logits, ids).numpy(), expected.numpy(), rtol=0, atol=5e-6)


def test_both_backends_agree_on_a_large_vocabulary(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    model = save_random_model(tmp_path / "model", vocab_size=262_144, **sizes, **heads)
    windows = np.random.default_rng(0).integers(0, 262_144, (2, 4))
    losses = [np.log(measure(str(model), windows, "float32")) for measure in (jax_perplexity, torch_perplexity)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5, rel=0)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_command_writes_what_it_prints(llama, tokens, pruned, tmp_path, capsys, backend):
    token_ppl, root = pruned
    np.save(tmp_path / "other.npy", np.load(tokens)["calibration"])
    arguments = ["--model", str(llama), "--masks", str(root / "out" / "masks.safetensors"), "--backend", backend]
    arguments += ["--text", f"{tokens}, {tmp_path}/other.npy", "--out", str(tmp_path / "ppl.json")]
    assert main(arguments) == 0
    written = json.loads((tmp_path / "ppl.json").read_text())
    first, second = written["texts"].values()
    assert first["token_ppl@16"] == pytest.approx(token_ppl["pruned"], rel=1e-5)
    assert (first["windows"], second["windows"]) == (5, 6)
    assert list(written["texts"]) == ["tokens.npz", "other.npy"]
    assert written["versions"]["neuroal_jax"]
    assert f"token_ppl@16 ({tokens}, 5 windows, {backend}): {first['token_ppl@16']:.4f}" in capsys.readouterr().out
    assert main(arguments) == 2  # not replaced unasked
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_demo_measures_its_own_text(capsys):
    assert main(["--model", "demo"]) == 0
    assert "token_ppl@128 (demo, 116 windows, jax): 16.0" in capsys.readouterr().out


def test_masks_that_do_not_hold_the_result(make_llama, llama, tokens, pruned, tmp_path):
    masks = pruned[1] / "out" / "masks.safetensors"
    other, windows = str(make_llama(seed=5)), np.load(tokens)["evaluation"]
    updated = run(llama, tokens, tmp_path / "out", pruner="sparsegpt", allocation="uniform", eval="none").out
    for measure in (jax_perplexity, torch_perplexity):
        with pytest.raises(UserError, match="other weights than the masks"):
            measure(other, windows, "float32", masks)
        with pytest.raises(UserError, match="its pruner changed the kept weights"):
            measure(str(llama), windows, "float32", updated / "masks.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--model", "demo", "--text", "demo,demo"], "name every text once"),
        (["--model", "demo", "--masks", "nowhere"], "nowhere is not a readable mask file"),
        (["--model", "demo", "--out", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--model", "demo", "--out", "/tmp"], "is a directory"),
        (["--model", "demo", "--backend", "flax"], "invalid choice"),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_model_in_torch_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="transformers cannot load"):
        load_in_torch(str(tmp_path), "float32")
