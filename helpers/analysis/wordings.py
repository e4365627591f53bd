"""Instructions that share wordings: overlap of the same wording, other wordings and other
categories, told apart.

Rows of one wording are alike because of their words, whatever their category: they are no
independent instructions. Here a wording is the unit. All wordings of a category weigh the same,
all categories weigh the same; wordings are drawn (interval) and change category (p) as wholes.
Where categories do nothing, intervals of a mean over pairs are too wide (the test decides there).
Ours.
"""

import numpy as np
from scipy.stats import t

from ..record import NotTestable
from .checks import each_category, takes
from .generality import own_gaps
from .sets import codes
from .similarity import category_matrix, within_between, wording_matrix
from .stats import SMALLEST, bootstrap, cluster_codes, interval, permutation_test


@takes(similarity="I I", labels="I", clusters="I")
def wording_units(similarity, labels, clusters):
    """(similarity of wordings [K, K], their categories' codes [K], rows of each [K]). Raises
    NotTestable where a category has one wording: nothing tells it from its words.
    """
    labels = codes(labels)
    code, of = cluster_codes(clusters, labels)
    if len(np.unique(of)) < 2 or np.bincount(of).min() < 2:
        raise NotTestable(
            f"{np.bincount(of).tolist()} wordings in the categories; expected two categories, with "
            "two "
            "wordings (better ten) in each. A category in one wording is not told from its words."
        )
    return wording_matrix(similarity, clusters), of, np.bincount(code)


@takes(matrix="K K", labels="... K", weights="R K")
def gaps_of(matrix, labels, weights=None) -> np.ndarray:
    """[R, 1 + C]: within minus between over all categories, then each category's own gap."""
    labels = np.atleast_2d(labels) if weights is None else labels
    matrices = category_matrix(matrix, labels, weights)
    return np.column_stack([within_between(matrices)["gap"], own_gaps(matrices)])


@takes(matrix="K K", labels="R K!")
def standard_errors(matrix, labels) -> np.ndarray:
    """Standard errors of `gaps_of` if categories did nothing, [R, 1 + C], for labels [R, K].

    A similarity is a mean, plus what is typical of either unit, plus a rest of the pair, each
    with a size of its own (a wording of one row is noisier than one of twenty). A gap that is
    divided by this can be compared between labellings although categories differ in number and
    noise of their wordings (studentised permutation, Janssen 1997). Typical parts cancel in the
    gap over all categories, not in one category's.
    """
    each_category(labels, labels.max() + 1)
    if np.bincount(labels[0]).min() < 2:
        raise NotTestable("a category has one wording; expected two at least (better ten).")
    units, off = len(matrix), ~np.eye(len(matrix), dtype=bool)
    mean = matrix[off].mean()
    typical = ((matrix * off).sum(1) / (units - 1) - mean) * (units - 1) / (units - 2)  # [K]
    rest = (matrix - mean - typical[:, None] - typical) ** 2 * off
    size = np.bincount(labels[0])
    count, pairs = len(size), np.outer(size, size) - np.diag((size**2 + size) / 2)
    noise = category_matrix(rest, labels) / pairs  # [R, C, C], of each cell's mean
    inside = np.diagonal(noise, axis1=1, axis2=2)
    across = noise.sum(2) - inside
    member = labels[:, None] == np.arange(count)[:, None]  # [R, C, K]
    own = (member @ typical**2 - (member @ typical) ** 2 / size) / (size - 1) / size
    others = (own.sum(1, keepdims=True) - own + across) / (count - 1) ** 2
    cells = (count * (count - 1) / 2) ** 2
    whole = inside.sum(1) / count**2 + across.sum(1) / 2 / cells
    floor = max(1e-6 * np.abs(matrix).max(), 1e-12) ** 2  # of a similarity that does not vary
    return np.sqrt(np.column_stack([whole, own + inside + others]) + floor)


@takes(similarity="I I", labels="I", clusters="I", strata="I")
def wording_overlap(
    similarity, labels, clusters, strata=None, resamples=2000, seed=0, level=0.95
) -> dict:
    """How alike are instructions of the same wording, of other wordings of their category, and of
    other categories? The headline is `gap`: other wording, same category, minus other category.

    similarity [I, I]; labels, clusters [I], a cluster in one category; strata [I], one for a whole
    cluster (stats.length_strata with clusters). Returns
      same_wording (None if no wording has two rows), other_wording, other_category: means;
      step: same_wording minus other_wording, what a wording adds;
      gap, gap_ci (bootstrap of wordings), p (labels permuted over wordings, one-sided,
      gaps in `standard_errors`), detectable (a gap found with power 0.8);
      category_gap, category_ci [C, 2], category_p: the same for each category alone;
      wordings [C]: how many each category has.
    """
    matrix, of, rows = wording_units(similarity, labels, clusters)
    found = bootstrap(
        lambda w: gaps_of(matrix, of, w), of, resamples, level, seed, np.arange(len(of))
    )
    test = permutation_test(
        lambda y: gaps_of(matrix, y) / standard_errors(matrix, y),
        of,
        _strata_of(strata, clusters),
        resamples,
        seed,
    )
    means, repeated = within_between(category_matrix(matrix, of)), rows > 1
    inside = [np.diag(matrix)[repeated & (of == c)].mean() for c in np.unique(of[repeated])]
    alike = float(np.mean(inside)) if inside else None
    tails, sizes = [(1 - level) / 2, (1 + level) / 2], np.bincount(of)
    return {
        "same_wording": alike,
        "other_wording": float(means["within"]),
        "other_category": float(means["between"]),
        "step": None if alike is None else alike - float(means["within"]),
        "gap": float(found.estimate[0]),
        "gap_ci": [float(found.low[0]), float(found.high[0])],
        "p": float(test.p[0]),
        "detectable": float(test.detectable[0] * standard_errors(matrix, of[None])[0, 0]),
        "category_gap": found.estimate[1:],
        "category_ci": np.stack(
            [interval(found.replicates[:, 1 + c], tails, [m]) for c, m in enumerate(sizes)]
        ),
        "category_p": test.p[1:],
        "wordings": sizes,
    }


def _strata_of(strata, clusters):
    return None if strata is None else cluster_codes(clusters, strata)[1]


@takes(similarity="I I", expected="I I", labels="I", clusters="I")
def within_excess(
    similarity, expected, labels, clusters=None, resamples=2000, seed=0, level=0.95
) -> dict:
    """Are instructions of one category more alike than a null expects of them? For each category
    alone: mean similarity within it minus the mean that was expected.

    similarity, expected: [I, I], e.g. Jaccard and nulls.expected_jaccard. The null must have the
    rows' own spread: instructions that fire in bursts or differ for any reason overlap *less* than
    independent redraws of mean rates, category or not; so rate_null with dependence=True asks about
    categories, without it about everything that makes instructions differ. With clusters a wording
    is the unit, and pairs of one wording do not count. Returns arrays [C]: within, null, excess,
    low, high (bootstrap over rows or wordings), p (one-sided, Student's t of the
    excess over its bootstrap standard error), detectable (by the one-sided test, power 0.8).
    """
    clusters = np.arange(len(codes(labels))) if clusters is None else clusters
    observed, of, _ = wording_units(similarity, labels, clusters)
    null, sizes = wording_matrix(expected, clusters), np.bincount(of)

    def inside(matrix, weights=None):
        return np.diagonal(category_matrix(matrix, of, weights), axis1=-2, axis2=-1)

    found = bootstrap(
        lambda w: inside(observed - null, w), of, resamples, level, seed, np.arange(len(of))
    )
    error = found.replicates.std(0) * np.sqrt(sizes / (sizes - 1))
    tails = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.stack(
        [interval(found.replicates[:, c], tails, [m]) for c, m in enumerate(sizes)], 1
    )
    return {
        "within": inside(observed),
        "null": inside(null),
        "excess": found.estimate,
        "low": low,
        "high": high,
        "p": t.sf(found.estimate / np.maximum(error, 1e-12), sizes - 1),
        "detectable": (t.isf(0.05, sizes - 1) + t.isf(0.2, sizes - 1)) * error,
    }


@takes(similarity="I I", expected="I I", labels="I", clusters="I")
def matrix_excess(
    similarity, expected, labels, clusters, resamples=2000, seed=0, level=0.95
) -> dict:
    """`within_excess` for every two categories: how much more alike than a null expects, arrays
    [C, C] observed, null, excess, low, high, in pairs of two different wordings.
    """
    observed, of, _ = wording_units(similarity, labels, clusters)
    null, sizes = wording_matrix(expected, clusters), np.bincount(of)
    found = bootstrap(
        lambda w: category_matrix(observed - null, of, w),
        of,
        resamples,
        level,
        seed,
        np.arange(len(of)),
    )
    tails, low, high = [(1 - level) / 2, (1 + level) / 2], *np.zeros((2, *found.estimate.shape))
    for a, b in np.ndindex(low.shape):
        units = [sizes[a]] if a == b else [sizes[a], sizes[b]]
        low[a, b], high[a, b] = interval(found.replicates[:, a, b], tails, units)
    means = [category_matrix(matrix, of) for matrix in (observed, null)]
    return {
        "observed": means[0],
        "null": means[1],
        "excess": found.estimate,
        "low": low,
        "high": high,
    }


@takes(similarity="I I", labels="I", clusters="I")
def wording_levels(similarity, labels, clusters, resamples=2000, seed=0) -> dict:
    """The three means of `wording_overlap`, each [value, low, high], bootstrap over wordings: of
    the same wording (None where fewer than 5 wordings of a category have two rows), of another
    wording of the category, of another category.
    """
    matrix, of, rows = wording_units(similarity, labels, clusters)

    def apart(weights):
        found = within_between(category_matrix(matrix, of, weights))
        return np.stack([found["within"], found["between"]], -1)

    found = bootstrap(apart, of, resamples, seed=seed, clusters=np.arange(len(of)))
    other = np.stack([found.estimate, found.low, found.high], 1)
    named = dict(zip(("other_wording", "other_category"), other.tolist(), strict=True))
    return {"same_wording": _alike(matrix, of, rows > 1, resamples, seed), **named}


def _alike(matrix, of, repeated, resamples, seed):
    """[value, low, high] of the same wording, all categories weighing the same; or None."""
    values, of = np.diag(matrix)[repeated], of[repeated]
    if not len(of) or np.unique(of, return_counts=True)[1].min() < SMALLEST:
        return None
    member = (of == np.unique(of)[:, None]).astype(float)  # [C, K]

    def mean(weights):
        return ((weights * values) @ member.T / (weights @ member.T)).mean(1)

    found = bootstrap(mean, of, resamples, seed=seed, clusters=np.arange(len(of)))
    return [float(found.estimate), float(found.low), float(found.high)]
