"""A whole run on a Llama of a given shape with random weights: seconds per phase, memory, traces.

python -m benchmarks.search [--preset tiny|88m] [--json]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

import neuroal_jax
from neuroal_jax.models import family_of
from neuroal_jax.models.causal_lm import abstract_params
from neuroal_jax.models.family import expand

PRESETS = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
    "88m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def write_random_llama(directory: Path, preset: str) -> None:
    """A checkpoint of random fp32 weights, vocabulary 2048."""
    config = {"model_type": "llama", "vocab_size": 2048, "max_position_embeddings": 2048, **PRESETS[preset]}
    (directory / "config.json").write_text(json.dumps(config))
    family = family_of(config)
    parsed = family.parse_config(config)
    shapes, rng = abstract_params(family, parsed), np.random.default_rng(0)
    tensors = {}
    for name, (rule, _) in expand(family.rules(parsed), parsed.num_hidden_layers).items():
        shape = shapes[rule.flax].shape[::-1] if rule.transpose else shapes[rule.flax].shape
        spread = 1.0 if len(shape) == 1 else 0.02
        tensors[name] = rng.normal(len(shape) == 1, 0.1 * spread if len(shape) == 1 else spread, shape).astype(
            np.float32
        )
    save_file(tensors, directory / "model.safetensors")


def measure(preset: str, samples: int, seqlen: int) -> dict[str, Any]:
    """Runs both steps with Wanda at 70%; 8 search sequences."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_random_llama(root, preset)
        np.save(root / "ids.npy", np.random.default_rng(1).integers(0, 2048, (samples, seqlen)))
        config = neuroal_jax.PruneConfig(
            model=str(root),
            sparsity=0.7,
            calib=str(root / "ids.npy"),
            eval="none",
            nsamples=samples,
            out=str(root / "out"),
        )
        return dict(neuroal_jax.prune(config).manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description="A run on random weights: seconds per phase, memory, traces.")
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    manifest = measure(options.preset, options.samples, options.seqlen)
    result = {key: manifest[key] for key in ("seconds", "memory_bytes", "traces", "candidate_batch")}
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.preset} on {jax.local_devices()[0].device_kind}, {options.samples} sequences of {options.seqlen}")
    for phase, value in result["seconds"].items():
        print(f"{phase:>12}: {value:8.2f} s")
    for name, value in result["memory_bytes"].items():
        print(f"{name}: {value / 2**30:.2f} GiB")
    print(f"traces: {result['traces']}; candidates per batch: {result['candidate_batch']}")


if __name__ == "__main__":
    main()
