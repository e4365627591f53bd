"""Regression on pairs of instructions: what still goes with one category once other causes are out.

Pairs of I instructions stand in symmetric matrices [I, I], self-pairs left out. Intervals resample
instructions (or wordings), never pairs; p-values shuffle labels. General-purpose, ours; least
squares as in MRQAP (Krackhardt 1988; Dekker 2007).
"""

from typing import NamedTuple

import numpy as np

from ..record import NotTestable
from .checks import same_shape, takes
from .similarity import wording_matrix
from .stats import SEEN_ONE_SIDED, bootstrap, cluster_codes, permutation_test


class Excess(NamedTuple):
    """Per similarity: the coefficient of `same category`, bootstrap interval (percentiles; of
    wordings Student's, see stats.interval), one-sided p; `detectable`, the smallest coefficient
    that the test would find: SEEN_ONE_SIDED SDs of the shuffled ones, above their mean or above 0.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    detectable: np.ndarray


@takes(labels="I")
def same(labels) -> np.ndarray:
    """Which pairs are of one category: float32 [I, I]."""
    return (np.asarray(labels)[:, None] == np.asarray(labels)).astype(np.float32)


@takes(similarity="... I I", labels="I", strata="I", across="I")
def excess(
    similarity, labels, covariates=(), strata=None, resamples=2000, seed=0, across=None
) -> Excess:
    """Coefficient of `same category` in least squares of pairwise similarity on it and the
    covariates.

    similarity: [I, I], or [U, I, I] of U kinds to be tested on the same resamples; covariates:
    matrices [I, I], e.g. token overlap, difference in length; across: int [I], e.g. halves: only
    pairs of two different ones count. Interval: bootstrap over instructions within categories,
    copies of one instruction being no pair. p: categories are shuffled over instructions within
    strata (and halves), and with a category goes what it has to do with the covariates: residuals
    are shuffled, not bare labels, because shuffled labels are free of the covariates and vary less
    than real ones (double semi-partialing); compared in standard errors. About 3 ms per shuffle at
    I = 1,000. Raises NotTestable if nothing varies or the covariates explain it wholly.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    counted = ~np.eye(len(labels), dtype=bool)
    strata = np.zeros(len(labels), int) if strata is None else strata
    if across is not None:
        halves = np.unique(across, return_inverse=True)[1]
        counted &= halves[:, None] != halves
        strata = strata * (halves.max() + 1) + halves
    how = {"resamples": resamples, "seed": seed}
    return _excess(similarity, labels, covariates, (counted, strata), how)


@takes(similarity="... I I", labels="I", clusters="I", strata="I")
def excess_of_wordings(
    similarity, labels, clusters, covariates=(), strata=None, resamples=2000, seed=0
) -> Excess:
    """`excess` where instructions share wordings, clusters [I]: a wording is the unit, so rows of
    one wording never count as two, and only pairs of two different wordings are compared.

    Similarities and covariates are averaged over the pairs of each two wordings; wordings are
    drawn, and change their category, as wholes. strata [I]: one for a whole wording. (Ours.)
    """
    labels = np.unique(labels, return_inverse=True)[1]
    strata = np.zeros(len(labels), int) if strata is None else strata
    _, labels, strata = cluster_codes(clusters, labels, strata)
    values = np.asarray(similarity, float)
    means = [wording_matrix(s, clusters) for s in values.reshape(-1, *values.shape[-2:])]
    covariates = [wording_matrix(c, clusters) for c in covariates]
    how = {"resamples": resamples, "seed": seed, "clusters": np.arange(len(labels))}
    units = (~np.eye(len(labels), dtype=bool), strata)
    means = np.reshape(means, (*values.shape[:-2], len(labels), len(labels)))
    return _excess(means, labels, covariates, units, how)


def _excess(similarity, labels, covariates, units, how) -> Excess:
    """The test itself; units: (pairs that count [I, I], strata [I]); how: what bootstrap and
    permutation_test take.
    """
    values, (counted, strata) = np.asarray(similarity, float), units
    stack = values.reshape(-1, *values.shape[-2:])
    left, right, basis = _left_over(stack, labels, covariates, counted)
    spread = np.sqrt((left**2).sum((1, 2)))
    correlations = _correlations(left, right, basis)
    test = permutation_test(
        correlations, np.arange(len(labels)), strata, how["resamples"], how["seed"]
    )
    fit = _weighted(stack, same(labels), covariates, counted)
    found = bootstrap(fit, labels, **how)
    scale = spread / np.sqrt((right.astype(float) ** 2).sum())
    expected = test.null.mean(0) * scale  # scale: from correlation to coefficient
    parts = (
        test.estimate * scale,
        found.low,
        found.high,
        test.p,
        np.maximum(expected, 0) + SEEN_ONE_SIDED * test.null.std(0) * scale,
    )
    return Excess(*(np.reshape(part, values.shape[:-2])[()] for part in parts))


def _left_over(stack, labels, covariates, counted):
    """What the covariates leave of each similarity [U, I, I] and of `same category` [I, I], and an
    orthonormal basis of the covariates. Raises NotTestable where nothing is left.
    """
    if counted.sum() < 2 * (3 + len(covariates)) or labels.max() < 1:
        raise NotTestable(
            f"{counted.sum() // 2} pairs of instructions, {labels.max() + 1} categories; expected "
            "two "
            "categories (and two halves, if across), with more pairs than covariates."
        )
    same_shape(counted, covariates, "a covariate")
    basis = _orthonormal(counted, covariates)
    left = np.stack([_residual(np.where(counted, s, 0), basis) for s in stack])  # [U, I, I]
    right = _residual(np.where(counted, same(labels), 0), basis).astype(np.float32)
    spread = np.sqrt((left**2).sum((1, 2)))
    if (spread <= 1e-6 * np.sqrt((np.where(counted, stack, 0) ** 2).sum((1, 2)))).any():
        raise NotTestable(
            "a similarity does not vary, or the covariates explain it; expected pairs that differ."
        )
    if (right**2).sum() <= 1e-6 * counted.sum():
        raise NotTestable(
            "`same category` follows from the covariates; expected categories not told by them."
        )
    return left, right, basis


def _correlations(left, right, basis):
    """orders [R, I] -> partial correlations [R, U] of `left` with `right`, its rows and columns
    reordered.
    """
    kinds, spread = len(left), np.sqrt((left**2).sum((1, 2)))
    fixed = np.concatenate([left, basis]).reshape(kinds + len(basis), -1).astype(np.float32).T

    def correlations(orders):
        found = []
        for start in range(0, len(orders), 16):  # read `fixed` [I * I, U + K] once for many
            shuffled = np.stack(
                [right.take(o, 0).take(o, 1).ravel() for o in orders[start : start + 16]]
            )
            products, squares = shuffled @ fixed, np.einsum("ri,ri->r", shuffled, shuffled)
            varies = squares - (products[:, kinds:] ** 2).sum(1)
            found.append(products[:, :kinds] / np.sqrt(varies)[:, None] / spread)
        return np.concatenate(found)

    return correlations


def _orthonormal(counted, covariates):
    """Orthonormal matrices that span 1 and the covariates over the counted pairs; redundant
    covariates drop out.
    """
    basis = []
    for m in (np.ones(counted.shape), *covariates):
        m = np.where(counted, np.asarray(m, float), 0)
        rest = _residual(_residual(m, basis), basis)
        size = np.sqrt((rest**2).sum())
        if size > 1e-6 * np.sqrt((m**2).sum()) > 0:
            basis.append(rest / size)
    return basis


def _residual(m, basis):
    return m - sum((np.vdot(b, m) * b for b in basis), np.zeros(m.shape))


def _weighted(stack, alike, covariates, counted):
    """weights [R, I] -> the coefficients of `alike` [R, U] in least squares with pair weights w_i
    w_j.
    """
    columns = [np.ones(alike.shape), alike, *(np.asarray(c, float) for c in covariates)]
    columns = [
        *columns[:2],
        *((c - c[counted].mean()) / (c[counted].std() + 1e-12) for c in columns[2:]),
    ]
    columns += [s - s[counted].mean() for s in stack]
    k = len(covariates) + 2
    products = {
        (a, b): np.where(counted, columns[a] * columns[b], 0).astype(np.float32)
        for a in range(k)
        for b in range(a, len(columns))
    }

    def fit(weights):
        normal = np.zeros((len(weights), k, len(columns)))
        for (a, b), m in products.items():
            normal[:, a, b] = np.einsum("ri,ri->r", weights @ m, weights, dtype=float)
            if b < k:
                normal[:, b, a] = normal[:, a, b]
        ridge = 1e-9 * normal[:, :1, :1] * np.eye(k)  # a constant covariate gets 0
        return np.linalg.solve(normal[..., :k] + ridge, normal[..., k:])[:, 1]

    return fit
