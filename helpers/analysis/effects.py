"""Is an ablated set worse to lose than its controls are? Effects with intervals that know both
noises, and tests.

n rows (instructions), C categories, D control draws, R resamples. A value is an increase of loss,
nats per token. A row has draws of its own category's set; `groups` [n] says which rows share a set
(category, within the half measured on). An interval draws rows within groups with replacement and,
independently, the group's control draws. Rows that share a wording are not independent: with
`clusters` [n], wordings are drawn, and their signs flipped, as wholes. (All ours.)
"""

from functools import partial
from itertools import product

import numpy as np

from ..record import NotTestable, UserError
from .checks import each_category, takes
from .similarity import within_between
from .stats import (
    SEEN_TWO_SIDED,
    bootstrap,
    cluster_sizes,
    interval,
    permutation_test,
    plus_one,
    resample_weights,
    sign_flips,
)


@takes(values="n D", groups="n", weights="R n")
def drawn_means(values, groups, weights, rng) -> np.ndarray:
    """Mean over groups of the mean over rows and draws, resampled: [R] from values [n, D], weights
    [R, n].
    """
    parts = []
    for group in np.unique(groups):
        at = groups == group
        total = weights[:, at].sum(1, keepdims=True)
        if not (total > 0).all():
            raise NotTestable(f"no row of group {group} is drawn; expected one at least.")
        rows = weights[:, at] @ values[at] / total  # [R, D]
        draws = rng.multinomial(
            values.shape[1], np.full(values.shape[1], 1 / values.shape[1]), len(rows)
        )
        parts.append((rows * draws).sum(1) / values.shape[1])
    return np.mean(parts, 0)


@takes(values="n ...", groups="n")
def group_mean(values, groups) -> float:
    """Mean over groups of each group's mean."""
    return float(np.mean([np.mean(values[groups == group]) for group in np.unique(groups)]))


@takes(rows="n", groups="n", clusters="n")
def group_flips(rows, groups, resamples=2000, seed=0, clusters=None) -> float:
    """Two-sided p of `group_mean` of rows [n]: signs of rows (of whole clusters) flipped, each row
    weighing as much as it does in that mean.
    """
    _, code, size = np.unique(groups, return_inverse=True, return_counts=True)
    weight = len(rows) / (len(size) * size[code])
    return float(sign_flips(weight * rows, resamples, seed, clusters))


@takes(own="n", groups="n", clusters="n")
def critical(own, controls, groups, resamples=2000, seed=0, clusters=None) -> dict:
    """Own effect [n] minus the largest of the controls' means; controls: {kind: [n, D]}; clusters
    [n], within groups.

    Returns own, own_ci, each kind's mean, `hardest` (the kind with the largest), critical,
    critical_ci (the largest is chosen anew in each resample), p_critical (`group_flips` of own
    minus mean of the hardest control: are these rows hurt more?), p_sets (own set and the hardest
    control's draws exchanged within groups, one-sided: is this set worse than such draws are?
    these rows being given, clusters do not matter) and critical_sees, the smallest effect found
    with power 0.8.

    >>> noise = np.random.default_rng(0).normal(0, 0.1, (40, 21))
    >>> found = critical(noise[:, 0] + 1, {"random": noise[:, 1:]}, np.repeat([0, 1], 20))
    >>> bool(found["critical_ci"][0] > 0.9), found["hardest"]
    (True, 'random')
    """
    own, groups = np.asarray(own, float), np.asarray(groups)
    _beside(own, controls)
    rng = np.random.default_rng([seed, 7])
    weights = resample_weights(groups, resamples, seed, clusters)
    sizes = cluster_sizes(clusters, groups)
    means = {kind: group_mean(values, groups) for kind, values in controls.items()}
    hardest = max(means, key=means.get)
    mine = drawn_means(own[:, None], groups, weights, rng)
    worst = np.max([drawn_means(values, groups, weights, rng) for values in controls.values()], 0)
    estimate = group_mean(own, groups)
    beyond = own - controls[hardest].mean(1)
    return {
        "own": estimate,
        "own_ci": interval(mine, sizes=sizes).tolist(),
        **means,
        "hardest": hardest,
        "critical": estimate - means[hardest],
        "critical_ci": interval(mine - worst, sizes=sizes).tolist(),
        "p_critical": group_flips(beyond, groups, resamples, seed, clusters),
        "p_sets": exchange(own, controls[hardest], groups, resamples, seed),
        "critical_sees": SEEN_TWO_SIDED * float(np.std(mine - worst)),
    }


def _beside(own, controls) -> None:
    shapes = {kind: np.shape(values) for kind, values in controls.items()}
    if not shapes or any(len(s) != 2 or s[0] != len(own) or not s[1] for s in shapes.values()):
        raise UserError(
            f"controls {shapes} beside {len(own)} rows of the effect. Give one at least, [n, D], "
            "with the same rows."
        )
    for kind, values in controls.items():
        if not np.isfinite(values).all():
            raise NotTestable(f"control {kind} holds NaN or infinite values. Leave them out.")


@takes(own="n", labels="n", halves="n", clusters="n")
def critical_by_category(
    own, controls, labels, halves=None, resamples=2000, seed=0, clusters=None
) -> list[dict]:
    """`critical` for each category alone: is *its* set critical? A mean would hide a sign.

    labels [n]: each row's category; halves [n]: rows of one category and half share a set.
    Returns a row {category, own, hardest, control, effect, low, high, p_sets, sees} for each, or
    {category, note} where one is not testable.
    """
    own, labels = np.asarray(own, float), np.asarray(labels)
    _beside(own, controls)
    halves = np.zeros(len(labels), int) if halves is None else np.asarray(halves)
    rows = []
    for category in dict.fromkeys(labels.tolist()):
        at = labels == category
        part = {kind: np.asarray(values)[at] for kind, values in controls.items()}
        inside = None if clusters is None else np.asarray(clusters)[at]
        try:
            found = critical(own[at], part, halves[at], resamples, seed, inside)
        except NotTestable as reason:
            rows.append({"category": category, "note": f"not testable: {reason}"})
            continue
        rows.append(
            {
                "category": category,
                "own": found["own"],
                "hardest": found["hardest"],
                "control": found[found["hardest"]],
                "effect": found["critical"],
                "low": found["critical_ci"][0],
                "high": found["critical_ci"][1],
                "p_sets": found["p_sets"],
                "sees": found["critical_sees"],
            }
        )
    if all("note" in row for row in rows):
        raise NotTestable(f"no category has rows enough: {rows[0]['note'] if rows else 'no rows'}.")
    return rows


@takes(own="n C", everywhere="n e C", labels="n!", halves="n", clusters="n")
def specific_by_category(
    own, everywhere, labels, halves, resamples=2000, seed=0, clusters=None
) -> list[dict]:
    """What each category's set does to its own category beyond the others: a row per category
    {category, specific, low, high, p, sees}, or {category, note} where it is not testable.

    own [n, C]: every set's effect on every row; everywhere [n, e, C]: that of e random draws of
    each set; labels, halves int [n]. specific: effect minus mean of the draws, mean over the
    category's rows minus the mean of the other categories' means, halves weighing the same.
    Interval: rows (clusters) drawn within category and half; the draws are taken as they are. p:
    labels shuffled within halves: are these rows told apart by this set?
    """
    beyond = np.asarray(own, float) - np.asarray(everywhere, float).mean(1)  # [n, C]
    labels, halves = np.asarray(labels), np.asarray(halves)
    count, rows = beyond.shape[1], []
    each_category(labels, count, halves)
    for category in range(count):
        apart = partial(_apart, beyond[:, category], category, count, halves)
        try:
            found = bootstrap(
                lambda w, apart=apart: apart(labels[None], w),
                labels + count * halves,
                resamples,
                seed=seed,
                clusters=clusters,
            )
            test = permutation_test(apart, labels, halves, resamples, seed, clusters)
        except NotTestable as reason:
            rows.append({"category": category, "note": f"not testable: {reason}"})
            continue
        numbers = {"specific": found.estimate, "low": found.low, "high": found.high, "p": test.p}
        numbers |= {"sees": found.detectable}
        rows.append({"category": category} | {k: float(v) for k, v in numbers.items()})
    return rows


def _apart(effect, category, count, halves, labels, weights=None) -> np.ndarray:
    """Mean of `effect` [n] in the category minus the mean of the other categories' means, [R], of
    labels [R, n] (or [1, n]) and weights [R, n], halves weighing the same.
    """
    weights = np.ones(labels.shape) if weights is None else weights
    means = []
    for half in np.unique(halves):
        here = halves == half
        member = labels[:, None] == np.arange(count)[:, None]  # [R, C, n]
        drawn = (member * weights[:, None])[..., here]
        means.append((drawn @ effect[here]) / drawn.sum(-1))  # [R, C]
    mean = np.mean(means, 0)
    return mean[:, category] - np.delete(mean, category, axis=1).mean(1)


@takes(own="n", control="n D", groups="n")
def exchange(own, control, groups, resamples=2000, seed=0) -> float:
    """p that a set is this harmful when, within each group, own and draws change places: exact
    where there are at most `resamples` exchanges, the smallest then (D + 1) ** -G; else by drawing.
    """
    values = np.stack(
        [np.r_[own[groups == g].mean(), control[groups == g].mean(0)] for g in np.unique(groups)]
    )
    groups, sets = np.arange(len(values)), values.shape[1]  # values [G, D + 1]
    if sets ** len(values) <= resamples:
        pick = np.array(list(product(range(sets), repeat=len(values)))[1:])  # the first is none
    else:
        pick = np.random.default_rng([seed, 3]).integers(sets, size=(resamples, len(values)))
    return float(plus_one(values[:, 0].mean(), values[groups, pick].mean(1)))


@takes(groups="n", coefficients="P", clusters="n")
def slope_of(parts, groups, coefficients, resamples=2000, seed=0, clusters=None) -> dict:
    """Sum over parts (own, control) of coefficient x (own - mean control), per row, then the mean
    over groups.

    With coefficients (1,) a plain effect; with `slopes(x)` a slope on x. Returns estimate, ci, p
    (signs flipped over rows, see `group_flips`), sees.
    """
    groups, rng = np.asarray(groups), np.random.default_rng([seed, 7])
    if len(parts) != len(coefficients):
        raise UserError(
            f"{len(parts)} parts with {len(coefficients)} coefficients; expected one for each."
        )
    for own, control in parts:
        _beside(own, {"control": control})
    weights = resample_weights(groups, resamples, seed, clusters)
    rows = sum(
        a * (own - control.mean(1)) for a, (own, control) in zip(coefficients, parts, strict=True)
    )
    drawn = sum(
        a
        * (
            drawn_means(own[:, None], groups, weights, rng)
            - drawn_means(control, groups, weights, rng)
        )
        for a, (own, control) in zip(coefficients, parts, strict=True)
    )
    return {
        "estimate": group_mean(rows, groups),
        "ci": interval(drawn, sizes=cluster_sizes(clusters, groups)).tolist(),
        "p": group_flips(rows, groups, resamples, seed, clusters),
        "sees": SEEN_TWO_SIDED * float(np.std(drawn)),
    }


@takes(x="X")
def slopes(x) -> np.ndarray:
    """What each value of y weighs in the least-squares slope of y on x.

    >>> slopes([0.0, 1.0, 2.0]) @ [5.0, 7.0, 9.0]
    np.float64(2.0)
    """
    centred = np.asarray(x, float) - np.mean(x)
    if not centred.any():
        raise NotTestable("x does not vary; expected two different values for a slope.")
    return centred / (centred**2).sum()


@takes(own="n C", everywhere="n e C", labels="n!", halves="n", clusters="n")
def specificity(own, everywhere, labels, halves, resamples=2000, seed=0, clusters=None) -> dict:
    """Diagonal minus off-diagonal mean of (effect - control): own [n, C] of all sets, everywhere
    [n, e, C] of e draws.

    labels, halves [n]: codes of the category and of the half measured on, whose sets and draws are
    its own; clusters [n], within categories. Returns specificity, specificity_ci (rows, or
    clusters, and draws resampled), p (labels of the rows, or clusters, permuted: are these rows
    told apart?), p_sets_specificity (the sets permuted over the categories, half by half: is it
    these sets?), specificity_sees.
    """
    labels, halves = np.asarray(labels), np.asarray(halves)
    each_category(labels, own.shape[1])
    groups = labels + own.shape[1] * halves if clusters is None else labels
    weights = resample_weights(groups, resamples, seed, clusters)
    difference = own - everywhere.mean(1)
    replicates = within_between(_drawn_matrices(own, everywhere, labels, halves, weights, seed))
    test = permutation_test(
        lambda shuffled: label_statistic(difference, shuffled),
        labels,
        None,
        resamples,
        seed,
        clusters,
    )
    sizes = cluster_sizes(clusters, labels)
    return {
        "specificity": float(label_statistic(difference, labels[None])[0]),
        "specificity_ci": interval(replicates["gap"], sizes=sizes).tolist(),
        "p": float(test.p),
        "p_sets_specificity": swapped(difference, labels, halves, resamples, seed),
        "specificity_sees": SEEN_TWO_SIDED * float(np.std(replicates["gap"])),
    }


def _drawn_matrices(own, everywhere, labels, halves, weights, seed) -> np.ndarray:
    """Matrices of (effect - control), rows as in `weights` [R, n], draws resampled apart for each
    half and set: [R, C ablated, C measured].
    """
    size, draws, rng = own.shape[1], everywhere.shape[1], np.random.default_rng([seed, 7])
    member = (labels == np.arange(size)[:, None]).astype(float)  # [C, n]
    total = weights @ member.T  # [R, C measured]
    means = np.stack([weights * row @ own for row in member], 1)  # [R, C, C ablated]
    for half in np.unique(halves):
        picked = (
            rng.multinomial(draws, np.full(draws, 1 / draws), (len(weights), size)) / draws
        )  # [R, C ablated, e]
        for c, row in enumerate(member * (halves == half)):
            x = np.einsum("rn,nes->rse", weights * row, everywhere, optimize=True)
            means[:, c] -= (x * picked).sum(-1)
    return means / total[..., None]


@takes(difference="n C", labels="n!", halves="n")
def swapped(difference, labels, halves, resamples=2000, seed=0) -> float:
    """p that the sets fit their categories this well when, within each half, they are dealt out
    anew.
    """
    each_category(labels, difference.shape[1], halves)
    rng, observed, null = np.random.default_rng([seed, 5]), [], []
    for half in np.unique(halves):
        at = halves == half
        means = np.stack(
            [difference[at & (labels == c)].mean(0) for c in range(difference.shape[1])]
        )
        dealt = rng.permuted(np.tile(np.arange(len(means)), (resamples, 1)), axis=1)  # [R, C]
        observed.append(np.trace(means))
        null.append(means[np.arange(len(means)), dealt].sum(1))
    return float(plus_one(np.mean(observed), np.mean(null, 0)))


@takes(difference="n C", labels="R n!")
def label_statistic(difference, labels) -> np.ndarray:
    """Diagonal minus off-diagonal mean of difference [n, C], its rows labelled [R, n]: [R]."""
    each_category(labels, difference.shape[1])
    member = (np.asarray(labels)[:, None] == np.arange(difference.shape[1])[:, None]).astype(float)
    return within_between(member @ difference / member.sum(-1, keepdims=True))["gap"]
