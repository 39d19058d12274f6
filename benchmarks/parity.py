"""The largest difference of logits between this project's modules and transformers', per family, in fp32.

python -m benchmarks.parity
"""

import tempfile
from pathlib import Path

import numpy as np

from neuroal_jax import load_model
from tests.conftest import save_random_model
from tests.models.test_families import VARIANTS, torch_states


def main() -> None:
    worst: dict[str, float] = {}
    tokens = np.random.default_rng(1).integers(0, 96, (3, 40))
    for name, options in VARIANTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            directory = save_random_model(Path(scratch), **options)
            _, expected = torch_states(directory, tokens)
            difference = float(np.abs(np.asarray(load_model(str(directory))(tokens)) - expected).max())
        family = name.split()[0]
        worst[family] = max(worst.get(family, 0.0), difference)
    for family, difference in worst.items():
        variants = sum(name.split()[0] == family for name in VARIANTS)
        print(f"{family}: {difference:.1e} over {variants} variants")


if __name__ == "__main__":
    main()
