import json

import pytest

import neuroal_jax


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short run of the demo model with both steps: its directory, manifest and allocation."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = {"nsamples": 4, "search_samples": 2, "block_lambdas": "0.1,0.05", "row_lambdas": "0.0,0.1,0.2"}
    neuroal_jax.prune(neuroal_jax.PruneConfig(model="demo", sparsity=0.7, out=str(out), **options))
    return out, *(json.loads((out / name).read_text()) for name in ("manifest.json", "allocation.json"))
