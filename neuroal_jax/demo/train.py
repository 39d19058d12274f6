"""Trains the embedded demo model: `python -m neuroal_jax.demo.train [--out DIR]`.

Writes a complete Hugging Face checkpoint of a tiny Llama (`config.json`, `model.safetensors`, `tokenizer.json`,
`tokenizer_config.json`) and text that it was not trained on (`calibration.jsonl`, `evaluation.txt`). By default they
replace the files of this package.

The text is Python's own language reference as every CPython carries it, `pydoc_data.topics` (Copyright Python Software
Foundation, PSF License Version 2). It differs from one Python version to the next, which is why the held-out text is
stored next to the model. The committed files were made with CPython 3.11.7 on one core.

Every random choice is seeded and the number of steps is fixed: the same machine with the same versions of Python and
its packages writes the same bytes. Other machines may round differently and get a slightly different model.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from neuroal_jax.models.causal_lm import CausalLM
from neuroal_jax.models.family import expand
from neuroal_jax.models.llama import FAMILY

SEED = 0

# Text. A document is a run of paragraphs of one topic. Of every PERIOD long documents, one goes to each held-out set.
DOCUMENT_CHARS = 600
PERIOD = 9
EVALUATION_TURN = 2
CALIBRATION_TURN = 6

# Tokenizer and model.
BOS = "<s>"
VOCAB_SIZE = 768
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": None,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}

# Training. The text is small: dropout and a strong weight decay keep the model from learning it by heart. They were
# chosen by the loss on the calibration text.
WINDOW = 256
BATCH = 4
STEPS = 3000
WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1.0
CLIP_NORM = 1.0
DROPOUT = 0.1
REPORT_EVERY = 200


@dataclass(frozen=True)
class Split:
    """The text in three disjoint parts, each a list of documents."""

    training: list[str]
    calibration: list[str]
    evaluation: list[str]


def split_text(texts: dict[str, str]) -> Split:
    """Deals the documents of all topics out to training, calibration and evaluation.

    Args:
        texts: Text by topic.
    """
    split = Split([], [], [])
    dealt = 0
    for document in _documents(texts):
        turn = dealt % PERIOD
        if len(document) < DOCUMENT_CHARS:  # too short to fill a window
            split.training.append(document)
            continue
        dealt += 1
        if turn == EVALUATION_TURN:
            split.evaluation.append(document)
        elif turn == CALIBRATION_TURN:
            split.calibration.append(document)
        else:
            split.training.append(document)
    return split


def _documents(texts: dict[str, str]) -> Iterator[str]:
    """Runs of paragraphs of at least DOCUMENT_CHARS characters; only a short topic's single document is shorter.

    Many topics are excerpts of longer ones. A paragraph counts only where it first appears, so that no held-out text is
    seen in training; the longest topics come first, so that what remains of the text stays connected.
    """
    seen: set[str] = set()
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        documents: list[str] = [""]
        for paragraph in texts[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if not words or words in seen:
                continue
            seen.add(words)
            if len(documents[-1]) >= DOCUMENT_CHARS:
                documents.append("")
            documents[-1] += paragraph.strip("\n") + "\n\n"
        if len(documents) > 1 and len(documents[-1]) < DOCUMENT_CHARS:
            rest = documents.pop()
            documents[-1] += rest
        yield from filter(None, documents)


def train_tokenizer(documents: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens that puts BOS, id 0, in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> Int[np.ndarray, "n"]:
    """The tokens of all documents in a row, each after its BOS (int32)."""
    return np.concatenate([np.array(tokenizer.encode(document).ids, np.int32) for document in documents])


def windows_of(tokens: Int[np.ndarray, "n"], length: int) -> Int[np.ndarray, "w t"]:
    """Cuts tokens into windows one after the other; the rest is dropped."""
    count = len(tokens) // length
    return tokens[: count * length].reshape(count, length)


def initial_model() -> CausalLM:
    """The untrained model."""
    config = FAMILY.parse_config(CONFIG)
    model = CausalLM(FAMILY, config, rngs=nnx.Rngs(SEED))
    # Each block adds two terms to the hidden state: scaled like this, their sum starts no larger than one term.
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for block in model.blocks:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.kernel[...] *= scale
    return model


def _dropout_factors(key: PRNGKeyArray) -> Float[Array, "layer b t d"]:
    """Random factors, 0 or a little over 1, for the embeddings and for what each block adds."""
    shape = (CONFIG["num_hidden_layers"] + 1, BATCH, WINDOW, CONFIG["hidden_size"])
    return jax.random.bernoulli(key, 1 - DROPOUT, shape) / (1 - DROPOUT)


def _dropout_logits(
    model: CausalLM, tokens: Integer[Array, "b t"], factors: Float[Array, "layer b t d"]
) -> Float[Array, "b t v"]:
    """The model's logits under dropout: its blocks have none of their own."""
    hidden = model.stem(tokens) * factors[0]
    for block, factor in zip(model.blocks, factors[1:], strict=True):
        output, _ = block(hidden)
        hidden = hidden + (output - hidden) * factor
    return model.head(hidden)


def _loss(logits: Float[Array, "b t v"], tokens: Integer[Array, "b t"]) -> Float[Array, ""]:
    """Mean next-token loss, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def _optimizer() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, WARMUP_STEPS, STEPS)

    def is_matrix(params: nnx.State) -> nnx.State:
        return jax.tree.map(lambda param: param.ndim > 1, params)  # the norms' scales do not decay

    adamw = optax.adamw(schedule, b2=0.95, weight_decay=WEIGHT_DECAY, mask=is_matrix)
    return optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)


def train(model: CausalLM, tokens: Int[np.ndarray, "n"], held_out: Int[np.ndarray, "w t"]) -> CausalLM:
    """Trains on random windows of a text.

    Args:
        model: The untrained model.
        tokens: Tokens to train on.
        held_out: Windows whose perplexity is printed on the way; nothing depends on it.

    Returns:
        The trained model.
    """
    graph, params = nnx.split(model, nnx.Param)
    optimizer = _optimizer()

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, batch: Int[Array, "b t"], key: PRNGKeyArray) -> tuple:
        factors = _dropout_factors(key)  # outside the gradient, where XLA would draw the numbers again

        def objective(params: nnx.State) -> Float[Array, ""]:
            return _loss(_dropout_logits(nnx.merge(graph, params), batch, factors), batch)

        loss, gradient = jax.value_and_grad(objective)(params)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    @jax.jit
    def held_out_loss(params: nnx.State) -> Float[Array, ""]:
        windows = jnp.asarray(held_out)
        return _loss(nnx.merge(graph, params)(windows), windows)

    state = optimizer.init(params)
    starts = np.random.default_rng(SEED)
    keys = jax.random.split(jax.random.key(SEED), STEPS)
    for number in range(STEPS):
        start = starts.integers(0, len(tokens) - WINDOW, (BATCH, 1), endpoint=True)
        params, state, loss = step(params, state, tokens[start + np.arange(WINDOW)], keys[number])
        if (number + 1) % REPORT_EVERY == 0:
            perplexity = math.exp(float(held_out_loss(params)))
            print(f"step {number + 1}/{STEPS}: training loss {loss:.3f}, held-out perplexity {perplexity:.2f}")
    return nnx.merge(graph, params)


def hf_tensors(model: CausalLM) -> dict[str, Float[np.ndarray, "..."]]:
    """The model's parameters in float16, by Hugging Face's names and in its orientation."""
    config = FAMILY.parse_config(CONFIG)
    tensors = {}
    for name, (rule, block) in expand(FAMILY.rules(config), config.num_hidden_layers).items():
        array = np.asarray(_parameter(model, rule.flax.format(block=block)), np.float16)
        # safetensors writes a transposed view's memory in the wrong order.
        tensors[name] = np.ascontiguousarray(rule.across(array))
    return tensors


def _parameter(model: CausalLM, path: str) -> Array:
    """The parameter at a dotted path; numbers index lists."""
    found: Any = model
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found[...]


def write(directory: Path, model: CausalLM, tokenizer: Tokenizer, split: Split) -> None:
    """Writes the checkpoint and the held-out text."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(hf_tensors(model), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", CONFIG)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in split.calibration]
    (directory / "calibration.jsonl").write_text("".join(lines), encoding="utf-8")
    (directory / "evaluation.txt").write_text("".join(split.evaluation), encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Trains the demo model and writes its files."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where to write (default: %(default)s)")
    out = parser.parse_args().out
    print(f"Text of Python {sys.version.split()[0]}")
    split = split_text(topics)
    tokenizer = train_tokenizer(split.training)
    tokens = encode(tokenizer, split.training)
    print(f"{len(tokens)} training tokens, {len(split.calibration)} calibration documents")
    model = train(initial_model(), tokens, windows_of(encode(tokenizer, split.calibration), 128))
    write(out, model, tokenizer, split)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
