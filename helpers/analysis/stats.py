"""Intervals, permutation tests, effects. General-purpose: nothing here knows what a neuron is.

A `statistic` is a function of resampling weights [R, I] (bootstrap) or of shuffled labels [R, I]
(permutation) that returns one value, or one array, per resample: [R, ...]. `clusters` [I] says
which instructions are not independent of one another (those of one wording): whole clusters are
drawn, or change their label; each has one label. Results are never NaN: what cannot be tested is
an error. Intervals are percentile intervals, and Student's where clusters, which are few, are
drawn; all p-values count the observed arrangement itself, (1 + hits) / (1 + R).
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control, t
from statsmodels.stats.proportion import proportion_confint

from ..record import NotTestable, UserError
from .checks import takes

BLOCK = 256  # resamples worked on at a time
SMALLEST = 5  # instructions (or clusters) of a group that a bootstrap may rest on
# How many standard errors an effect must have for a 5 % test to find it in 4 of 5 experiments:
SEEN_ONE_SIDED = 1.645 + 0.842
SEEN_TWO_SIDED = 2.8


class Interval(NamedTuple):
    """A bootstrap interval, percentiles or Student's (see `interval`); `replicates` [R, ...]."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    replicates: np.ndarray

    @property
    def detectable(self):
        """The smallest true value that a two-sided 5 % test would tell from 0, with power 0.8."""
        return SEEN_TWO_SIDED * self.replicates.std(0)


class Permutation(NamedTuple):
    """A permutation test; `null` [R, ...] holds the statistic of the shuffled data, `p` lies in [1
    / (1 + R), 1].
    """

    estimate: np.ndarray
    p: np.ndarray
    null: np.ndarray

    @property
    def detectable(self):
        """The smallest statistic that this one-sided 5 % test would find, with power 0.8."""
        return self.null.mean(0) + SEEN_ONE_SIDED * self.null.std(0)


class Effect(NamedTuple):
    """A mean difference with bootstrap interval (see `interval`), standardised effect `d` (0 where
    nothing varies), p, and `detectable`: the smallest difference that would be found, with power
    0.8.
    """

    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    d: np.ndarray
    p: np.ndarray
    detectable: np.ndarray


class Headline(NamedTuple):
    """The estimate to quote: its name and value; `others` {name: value} stand beside it; `agree`
    says whether all have one sign.
    """

    name: str
    value: float
    others: dict
    agree: bool


def headline(estimates) -> Headline:
    """Of several estimates {name: number} of one quantity, the smallest in size (the first, if
    two are equal).

    >>> headline({"plain": 0.062, "alone": 0.041, "regressed": 0.047}).name
    'alone'
    """
    values = {name: float(value) for name, value in estimates.items()}
    _finite(estimates=list(values.values()))
    name = min(values, key=lambda n: abs(values[n]))
    signs = {np.sign(value) for value in values.values()}
    others = {n: value for n, value in values.items() if n != name}
    return Headline(name, values[name], others, len(signs) == 1)


def _finite(**arrays):
    for name, values in arrays.items():
        if np.size(values) == 0 or not np.isfinite(np.asarray(values, float)).all():
            raise NotTestable(
                f"{name} is empty or holds NaN; expected finite numbers. Leave out what cannot be."
            )


def attempt(compute) -> dict:
    """What compute() returns, a dict; or {"note": "not testable: why"}, without a number, if it
    raises NotTestable.
    """
    try:
        return compute()
    except NotTestable as reason:
        return {"note": f"not testable: {reason}"}


@takes(clusters="I")
def cluster_codes(clusters, *values) -> tuple:
    """Codes of the clusters, int [I], and, of values [I] that are the same throughout a cluster
    (its label, its stratum), one array [K] each. Raises UserError where they are not.
    """
    _, first, code = np.unique(clusters, return_index=True, return_inverse=True)
    for given in map(np.asarray, values):
        if given.shape != code.shape:
            raise UserError(f"{len(code)} clusters beside {given.size} rows; expected one a row.")
        differs = given[first][code] != given
        if differs.any():
            row = np.flatnonzero(differs)[0]
            raise UserError(
                f"cluster {np.asarray(clusters)[row]} holds both {given[first][code][row]} and "
                f"{given[row]}; expected one label, group and stratum for a whole cluster."
            )
    return code, *(np.asarray(given)[first] for given in values)


@takes(groups="I", clusters="I")
def resample_weights(groups, resamples, seed=0, clusters=None) -> np.ndarray:
    """How often each instruction is drawn in each bootstrap resample, group sizes kept: float32
    [R, I]. With clusters, how often its cluster is: their number is kept in each group.

    A resample of a group that is one instruction throughout (1 in 625 at 5) has no pair in it and
    is drawn again.
    """
    groups, rng = np.asarray(groups), np.random.default_rng(seed)
    code, what = slice(None), "instructions"
    if clusters is not None:
        (code, groups), what = cluster_codes(clusters, groups), "clusters"
    weights = np.empty((resamples, len(groups)), np.float32)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        size = len(members)
        if size < SMALLEST:
            raise NotTestable(
                f"group {group} has {size} {what}; expected at least {SMALLEST} (better 20) for an "
                "interval. Not testable: add rows."
            )
        drawn = rng.multinomial(size, np.full(size, 1 / size), resamples)
        while (single := drawn.max(1) == size).any():
            drawn[single] = rng.multinomial(size, np.full(size, 1 / size), single.sum())
        weights[:, members] = drawn
    return weights[:, code]


@takes(replicates="R ...", sizes="G")
def interval(replicates, tails=(0.025, 0.975), sizes=None) -> np.ndarray:
    """Interval [2, ...] from bootstrap replicates [R, ...]: percentiles.

    sizes [G]: how many clusters each group had. Percentiles of few units are too narrow; then it
    is Student's t interval about the replicates' mean, with their SD as standard error, both
    corrected for so few (degrees of freedom by Welch and Satterthwaite, groups weighing the same).
    """
    if sizes is None:
        return np.quantile(replicates, tails, axis=0)
    sizes = np.asarray(sizes, float)
    part = 1 / sizes  # a group's share of the variance, up to a factor
    freedom = part.sum() ** 2 / (part**2 / (sizes - 1)).sum()
    error = np.std(replicates, 0) * np.sqrt((part * sizes / (sizes - 1)).sum() / part.sum())
    return np.mean(replicates, 0) + np.multiply.outer(t.ppf(tails, freedom), error)


@takes(groups="I", clusters="I")
def bootstrap(statistic, groups, resamples=2000, level=0.95, seed=0, clusters=None) -> Interval:
    """Percentile interval of statistic(weights), instructions (never pairs) drawn with replacement
    within groups; with clusters, whole clusters, and Student's interval (see `interval`).

    groups: [I], e.g. the categories; all the same for one sample. The same seed draws the same
    resamples, so differences of two statistics stay paired.

    >>> x = np.arange(10.0)
    >>> bootstrap(lambda w: w @ x / w.sum(1), np.zeros(10)).estimate
    np.float64(4.5)
    """
    weights = resample_weights(groups, resamples, seed, clusters)
    estimate = np.asarray(statistic(np.ones((1, weights.shape[1]), np.float32)))[0]
    replicates = np.concatenate(
        [
            np.asarray(statistic(weights[start : start + BLOCK]))
            for start in range(0, resamples, BLOCK)
        ]
    )
    _finite(replicates=replicates)
    low, high = interval(
        replicates, [(1 - level) / 2, (1 + level) / 2], cluster_sizes(clusters, groups)
    )
    return Interval(estimate, low, high, replicates)


def cluster_sizes(clusters, groups):
    """How many clusters each group has, int [G]; None without clusters."""
    if clusters is None:
        return None
    return np.unique(cluster_codes(clusters, groups)[1], return_counts=True)[1]


@takes(tokens="I", clusters="I")
def length_strata(tokens, count=5, clusters=None) -> np.ndarray:
    """Stratum of each instruction by its tokens, int [I]: `count` quantile bins; equal lengths
    stay together. With clusters, by the mean length of its cluster, which stays in one stratum.
    """
    tokens = np.asarray(tokens)
    _finite(tokens=tokens)
    if clusters is not None:
        code = cluster_codes(clusters, np.zeros(len(tokens)))[0]
        means = np.bincount(code, tokens) / np.bincount(code)
        return length_strata(means, count)[code]
    return np.searchsorted(
        np.unique(np.quantile(tokens, np.arange(1, count) / count)), tokens, side="left"
    )


@takes(labels="I", strata="I", clusters="I")
def permutation_test(
    statistic, labels, strata=None, resamples=2000, seed=0, clusters=None
) -> Permutation:
    """One-sided p that statistic(labels) is this large when labels are shuffled over instructions,
    within strata; with clusters, when they are shuffled over whole clusters.

    statistic: labels [R, I] -> [R, ...]. strata: int [I], e.g. length_strata; where no stratum
    holds two labels there is nothing to shuffle, an error. Strata control length only down to
    their width. What is the same in a cluster (its wording) makes rows alike without any label:
    shuffled row by row, that alone would be found. Where categories differ in the size of their
    clusters, hand over a studentised statistic, or use wordings.wording_overlap.
    """
    labels = np.asarray(labels)
    strata = (
        np.zeros(len(labels), int) if strata is None else np.unique(strata, return_inverse=True)[1]
    )
    code, units = slice(None), labels
    if clusters is not None:
        code, units, strata = cluster_codes(clusters, labels, strata)
    if all(len(np.unique(units[strata == s])) < 2 for s in range(strata.max() + 1)):
        raise NotTestable(
            "no stratum holds two different labels; expected labels that can be shuffled. Not "
            "testable: "
            "use fewer strata, or add rows."
        )
    observed = np.asarray(statistic(labels[None]))[0]
    rng, null = np.random.default_rng(seed), []
    for start in range(0, resamples, BLOCK):
        noise = rng.random((min(BLOCK, resamples - start), len(units)))
        null.append(np.asarray(statistic(shuffled(units, strata, noise)[:, code])))
    null = np.concatenate(null)
    _finite(null=null, observed=observed)
    return Permutation(observed, plus_one(observed, null), null)


def shuffled(labels, strata, noise) -> np.ndarray:
    """Labels [K] shuffled within strata (int [K]), once for each row of noise [R, K], uniform in
    [0, 1): [R, K].

    >>> shuffled(np.array(list("abc")), np.array([0, 1, 0]), np.array([[0.9, 0.5, 0.1]])).tolist()
    [['c', 'b', 'a']]
    """
    found = np.empty(noise.shape, labels.dtype)
    in_order = np.argsort(strata, kind="stable")
    found[:, in_order] = labels[np.argsort(strata + noise, axis=1)]
    return found


@takes(observed="...", null="R ...")
def plus_one(observed, null) -> np.ndarray:
    """(1 + number of null values >= observed) / (1 + R) over the first axis; a rounding error
    below counts as equal.
    """
    slack = 1e-12 + 1e-6 * np.abs(observed)
    return (1 + (np.asarray(null) >= observed - slack).sum(0)) / (1 + len(null))


@takes(p="...")
def adjust(p, method) -> np.ndarray:
    """Adjusted p-values of one family: `holm` (family-wise, over categories) or `bh` (false
    discovery, over layers).
    """
    _finite(p=p)
    if method not in ("holm", "bh") or np.min(p) < 0 or np.max(p) > 1:
        raise UserError(
            f"method {method!r}, p from {np.min(p)} to {np.max(p)}; expected 'holm' or 'bh', 0 <= "
            "p <= 1."
        )
    flat = np.ravel(p)
    if method == "bh":
        return false_discovery_control(flat).reshape(np.shape(p))
    # by hand: statsmodels' collects garbage at each call, half a second in a large process
    order, left = np.argsort(flat), np.arange(flat.size, 0, -1)
    out = np.empty(flat.size)
    out[order] = np.minimum(np.maximum.accumulate(flat[order] * left), 1)
    return out.reshape(np.shape(p))


@takes(first="n ...", second="n ...", clusters="n")
def paired_effect(first, second, resamples=2000, level=0.95, seed=0, clusters=None) -> Effect:
    """Mean of first - second over rows [n, ...], bootstrap interval, d = mean / SD, two-sided
    sign-flip p (signs of whole clusters, where given). Vectorised over trailing axes, e.g. layers;
    all R x trailing values stand in memory.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    _finite(difference=difference)
    n = len(difference)

    def mean(w):
        return np.tensordot(w, difference, 1) / w.sum(1).reshape(-1, *[1] * (difference.ndim - 1))

    found = bootstrap(mean, np.zeros(n), resamples, level, seed, clusters)
    return Effect(
        *found[:3],
        _standardised(found.estimate, difference.var(0, ddof=1)),
        sign_flips(difference, resamples, seed, clusters),
        found.detectable,
    )


@takes(difference="n ...", clusters="n")
def sign_flips(difference, resamples=2000, seed=0, clusters=None) -> np.ndarray:
    """Two-sided p [...] that the mean of a difference [n, ...] lies this far from 0: the signs of
    rows (of whole clusters, where given) flipped.

    >>> float(sign_flips([1.0, 1.0, -1.0]))
    1.0
    """
    difference = np.asarray(difference, float)
    n = len(difference)
    code = np.arange(n) if clusters is None else cluster_codes(clusters)[0]
    shape = resamples, code.max() + 1
    signs = np.random.default_rng([seed, 1]).choice([-1.0, 1.0], shape)[:, code]
    null = np.abs(np.tensordot(signs, difference, 1)) / n
    return plus_one(np.abs(difference.mean(0)), null)


def _standardised(difference, variance):
    return np.where(variance > 0, difference / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


@takes(values="n", clusters="n")
def clustered_share(values, clusters=None, level=0.95) -> tuple[float, float]:
    """Interval (low, high) of a share, the mean of values in [0, 1]: Wilson's, with as many
    independent rows as their clusters leave. It has a width where all values are equal, too.

    n rows count as n / D: D is the variance of the mean with whole clusters as units over that of
    independent rows, at least 1 (Korn and Graubard 1998, with Wilson's interval). Where all values
    are 0, or all 1, nothing tells D, and rows of a cluster may be one and the same: the clusters
    count. (Ours.)

    >>> [round(x, 2) for x in clustered_share([0.0] * 20)]
    [0.0, 0.16]
    >>> [round(x, 2) for x in clustered_share([0.0] * 20, [*range(5)] * 4)]
    [0.0, 0.43]
    """
    values = np.asarray(values, float)
    _finite(values=values)
    n, share = len(values), float(values.mean())
    code = np.arange(n) if clusters is None else cluster_codes(clusters)[0]
    totals, plain = np.bincount(code, values - share), share * (1 - share) / max(n - 1, 1)
    units = len(totals)
    spread = units / max(units - 1, 1) * (totals**2).sum() / n**2
    independent = n / max(1.0, spread / plain) if plain > 0 else units
    low, high = proportion_confint(share * independent, independent, 1 - level, "wilson")
    return float(low), float(high)


@takes(values="I L", groups="I")
def shared_profile(values, groups, resamples=2000, seed=0) -> dict:
    """Do groups share one profile over columns? Mean correlation of two groups' mean profiles,
    with interval and p.

    values: [I, L], e.g. each instruction's share per layer; groups: [I]. Interval: bootstrap over
    rows within groups. Null: each group's columns shuffled. Returns stability in [-1, 1],
    stability_ci, p. A flat profile correlates 0 with any. With few columns the test has little
    power. Ours.
    """
    values, member = np.asarray(values, float), _members(groups)
    found = bootstrap(
        lambda weights: _stability(_profiles(weights, values, member)),
        groups,
        resamples,
        seed=seed,
    )
    profiles = np.repeat(_profiles(np.ones((1, len(values))), values, member), resamples, axis=0)
    null = _stability(np.random.default_rng(seed).permuted(profiles, axis=-1))
    return {
        "stability": found.estimate,
        "stability_ci": [found.low, found.high],
        "p": plus_one(found.estimate, null),
    }


@takes(values="I L", others="I L", groups="I", clusters="I")
def shared_profile_beyond(values, others, groups, resamples=2000, seed=0, clusters=None) -> dict:
    """Do groups share one profile more than they do in another network? `shared_profile`'s
    stability of values [I, L] minus that of others [I, L], the same instructions in both.

    Instructions (with clusters: whole clusters) are drawn for both together. Returns beyond,
    beyond_ci, p (one-sided: share of resamples with no more in the first), detectable. Ours.
    """
    member, both = _members(groups), [np.asarray(x, float) for x in (values, others)]

    def beyond(weights):
        first, second = (_stability(_profiles(weights, x, member)) for x in both)
        return first - second

    found = bootstrap(beyond, groups, resamples, seed=seed, clusters=clusters)
    return {
        "beyond": found.estimate,
        "beyond_ci": [found.low, found.high],
        "p": plus_one(0.0, -found.replicates),
        "detectable": found.detectable,
    }


def _members(groups):
    names = np.unique(groups)
    if len(names) < 2:
        raise NotTestable(
            f"{len(names)} group; expected at least 2 profiles to compare. Not testable."
        )
    return (np.asarray(groups) == names[:, None]).astype(float)  # [C, I]


def _profiles(weights, values, member):
    """Mean profile of each group, [R, C, L], of weights [R, I]."""
    drawn = weights[:, None] * member
    return drawn @ values / drawn.sum(-1, keepdims=True)


def _stability(profiles):
    """Mean correlation of two groups' profiles: [..., C, L] -> [...]."""
    count = profiles.shape[-2]
    z = profiles - profiles.mean(-1, keepdims=True)
    z /= np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
    total = (z.sum(-2) ** 2).sum(-1) - (z**2).sum((-2, -1))
    return total / (count * (count - 1))
