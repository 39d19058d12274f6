"""AlphaPruning (Lu et al., 2024): blocks whose weights' spectra have lighter tails are pruned more.

The tail of each spectrum is fitted with a power law; its exponent alpha is small where training left much structure.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from neuroal_jax.allocation.allocation import Allocation, by_block
from neuroal_jax.allocation.problem import Decision, Problem
from neuroal_jax.allocation.spread import HIGHEST, LOWEST
from neuroal_jax.numerics.statistics import Statistics

_BINS = 100


def allocate(problem: Problem) -> Decision:
    """Measures the weights of every block; no activations."""
    alphas = measure(problem)
    epsilon, guard = problem.options["alpha_epsilon"], not problem.reference
    found = allocation(problem.sparsity, epsilon, alphas, problem.linears, guard=guard)
    return Decision(found, measured={"alphas": recorded(alphas)})


def measure(problem: Problem) -> list[float]:
    """Mean exponent of each block; NaN where none could be fitted."""
    return problem.model.measure("spectra", (), block_alpha, {})


def recorded(alphas: list[float]) -> list[float | None]:
    """The exponents as they are recorded: None where there is none."""
    return [alpha if math.isfinite(alpha) else None for alpha in alphas]


def allocation(sparsity: float, epsilon: float, alphas: list[float], linears: list[str], *, guard: bool) -> Allocation:
    """Sparsities in proportion to ratios between `1 - epsilon` (smallest alpha) and `1 + epsilon` (largest).

    All blocks have the same size, so the mean over blocks is the mean over weights. A block without alpha gets the
    ratio 1.

    Args:
        sparsity: Mean of the result, before the guard.
        epsilon: Half the range of the ratios.
        alphas: Mean exponent of each block; NaN where none could be fitted.
        linears: Names of a block's linears.
        guard: Whether to clip to [0.01, 0.99]; the released code does not, and may exceed 1.
    """
    alpha = np.array(alphas, dtype=np.float64)
    low, high = (np.nanmin(alpha), np.nanmax(alpha)) if np.isfinite(alpha).any() else (0.0, 0.0)
    ratios = np.ones(len(alpha)) if low == high else 1 - epsilon + 2 * epsilon * (alpha - low) / (high - low)
    ratios = np.where(np.isnan(ratios), 1, ratios)
    values = sparsity * ratios / ratios.mean()
    return by_block("alpha", (np.clip(values, LOWEST, HIGHEST) if guard else values).tolist(), linears)


def block_alpha(linears: Mapping[str, Array], statistics: Mapping[str, Statistics]) -> float:
    """A block's mean exponent over those of its linears `W[out, in]` that have one; NaN where none has."""
    del statistics
    found = [tail_exponent(spectrum(np.asarray(weight.astype(jnp.float32)))) for weight in linears.values()]
    fitted = [alpha for alpha in found if math.isfinite(alpha)]
    return float(np.mean(fitted)) if fitted else math.nan


def spectrum(weight: np.ndarray) -> np.ndarray:
    """Eigenvalues of `W^T W`, ascending, without the zeros that the wider side adds: fp32 `[rank]`.

    Of the product itself, in float64: a quarter of the work of singular values in fp32, and no less precise.

    Args:
        weight: fp32 `[out, in]`.
    """
    wide = weight.astype(np.float64)
    product = wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide
    return np.maximum(np.linalg.eigvalsh(product), 0).astype(np.float32)


def tail_exponent(eigenvalues: np.ndarray) -> float:
    """The exponent of the power law that fits the tail of a spectrum best, by Kolmogorov-Smirnov distance.

    Tails start where the histogram of the logarithms peaks. With `n = N - i` eigenvalues from x_i on,
    `alpha = 1 + n / (sum ln x_k - n ln x_i)` and the distance is `max_k |1 - (x_k / x_i)^(1 - alpha) - (k - i) / n|`.

    Args:
        eigenvalues: fp32 `[N]`, ascending. Zeros, which have no logarithm, are left out.

    Returns:
        alpha; NaN if there is no tail to fit (a single eigenvalue, or all equal).
    """
    x = eigenvalues[eigenvalues > 0].astype(np.float32)
    if len(x) < 2 or x[0] == x[-1]:
        return math.nan
    decimal = np.log10(x)
    counts, _ = np.histogram(decimal, bins=_BINS, range=(decimal[0], decimal[-1]))
    peak = 10 ** np.linspace(decimal[0], decimal[-1], _BINS + 1, dtype=np.float32)[counts.argmax()]
    # The lower bound is a logarithm compared with a plain number: so in the released code.
    starts = np.flatnonzero((x[:-1] >= np.log10(np.float32(0.95) * peak)) & (x[:-1] <= np.float32(1.5) * peak))
    logs = np.log(x)
    best, alpha_of_best = math.inf, math.nan
    for i in starts:
        n = len(x) - i
        with np.errstate(divide="ignore"):  # all equal from here on: infinite
            alpha = 1 + n / (logs[i:].sum() - n * logs[i])
        distance = 1.0
        if alpha > 1:
            distance = float(np.abs(1 - (x[i:] / x[i]) ** (1 - alpha) - np.arange(n, dtype=np.float32) / n).max())
        if math.isfinite(alpha) and distance < best:
            best, alpha_of_best = distance, float(alpha)
    return alpha_of_best
