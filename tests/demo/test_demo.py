"""The embedded model: readable by transformers, and trained well enough that pruning hurts."""

import json

import numpy as np
import pytest

import neuroal_jax
from neuroal_jax.checkpoint.locate import DEMO
from neuroal_jax.data.windows import Reader


@pytest.fixture(scope="module")
def windows():
    return Reader(DEMO, 768, 256, 128).evaluation("demo").ids


def test_transformers_gives_the_same_logits(windows):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(windows[:2]).long()).logits.numpy()
    np.testing.assert_allclose(neuroal_jax.load_model("demo", "float32")(windows[:2]), expected, atol=1e-3)


def test_pruning_hurts_visibly(tmp_path):
    config = {"model": "demo", "allocation": "uniform", "nsamples": 32}
    ppl = {
        s: neuroal_jax.prune(neuroal_jax.PruneConfig(**config, sparsity=s, out=str(tmp_path / str(s)))).manifest[
            "token_ppl"
        ]
        for s in (0.5, 0.7)
    }
    assert 15 < ppl[0.5]["dense"] < 17
    assert 1.05 < ppl[0.5]["pruned"] / ppl[0.5]["dense"] < 1.3
    assert ppl[0.7]["pruned"] > 2 * ppl[0.7]["dense"]


def test_held_out_text_is_long_enough_and_disjoint(windows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    documents = [json.loads(line)["text"] for line in (DEMO / "calibration.jsonl").read_text().splitlines()]
    assert all(len(tokenizer(document)["input_ids"]) > 128 for document in documents)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    evaluation = (DEMO / "evaluation.txt").read_text()
    assert not any(document[:200] in evaluation for document in documents)
    assert len(windows) > 100


def test_the_training_script_splits_this_text(tmp_path):
    from neuroal_jax.demo import train

    texts = {"topic": "\n\n".join(f"{number} " + "word " * 60 for number in range(200))}
    split = train.split_text(texts)
    parts = [split.training, split.calibration, split.evaluation]
    assert all(parts)
    everything = [document for part in parts for document in part]
    assert len(set(everything)) == len(everything)
    model = train.initial_model()
    tokenizer = train.train_tokenizer(split.training)
    train.write(tmp_path, model, tokenizer, split)
    restored = neuroal_jax.load_model(str(tmp_path), "float32")
    tokens = np.arange(20)[None]
    np.testing.assert_allclose(restored(tokens), model(tokens), atol=2e-2)
