"""How far two sets of feature vectors lie apart: Fréchet's distance and the kernel distance, as FID and KID use them.

Owns the mathematics alone; whose features they are, the caller says beside the number. float64. Fréchet's distance is
biased upwards for few pictures, so that numbers of unequal counts cannot be compared; the kernel distance is not.
"""

import numpy as np
from jaxtyping import Float

__all__ = ["Features", "frechet_distance", "frechet_of_moments", "kernel_distance"]

Features = Float[np.ndarray, "n d"]
Others = Float[np.ndarray, "m d"]


def frechet_distance(first: Features, second: Others) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of the sets' means and covariances (n − 1). 2 rows or more each.

    Source: Heusel et al. 1706.08500, eq. 6 ("FID" when the features are Inception's).
    """
    moments = [
        (rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False))) for rows in (_double(first), _double(second))
    ]
    return frechet_of_moments(*moments[0], *moments[1])


def frechet_of_moments(
    mean: Float[np.ndarray, " d"],
    covariance: Float[np.ndarray, "d d"],
    other_mean: Float[np.ndarray, " d"],
    other_covariance: Float[np.ndarray, "d d"],
) -> float:
    """The distance of two Gaussians.

    tr (Σ₁Σ₂)^½ = tr (A Σ₂ A)^½ with A = Σ₁^½: symmetric, so that real eigenvalues do, and singular ones do no harm.
    """
    root = _symmetric_root(covariance)
    cross = np.linalg.eigvalsh(root @ other_covariance @ root)
    shared = 2 * float(np.sqrt(np.clip(cross, 0, None)).sum())
    distance = float(np.square(mean - other_mean).sum() + np.trace(covariance) + np.trace(other_covariance)) - shared
    return max(distance, 0.0)


def kernel_distance(first: Features, second: Others) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel (x·y/d + 1)³; about 0, and below it, for equal sets.

    Source: Bińkowski et al. 1801.01401, §4 ("KID" when the features are Inception's). 2 rows or more each.
    """
    a, b = _double(first), _double(second)

    def within(rows: Features) -> float:
        kernel = _kernel(rows, rows)
        return float((kernel.sum() - np.trace(kernel)) / (len(rows) * (len(rows) - 1)))

    return within(a) + within(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: Features, b: Others) -> Float[np.ndarray, "n m"]:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def _symmetric_root(matrix: Float[np.ndarray, "d d"]) -> Float[np.ndarray, "d d"]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


def _double(rows: Features) -> Features:
    if len(rows) < 2:
        raise ValueError(f"a set of {len(rows)} rows has no covariance")
    return rows.astype(np.float64)
