"""Dose and effect of an ablation: a curve with its interval, its falls and its change point; never
a slope alone.

n rows, D control draws, X doses in rising order (what `doses` counts: a share, its logarithm), R
resamples. A slope may be carried by one point: the curve says where it rises. (All ours.)
"""

import numpy as np

from ..record import NotTestable, UserError
from .checks import takes
from .effects import drawn_means, group_flips, group_mean
from .stats import SEEN_TWO_SIDED, cluster_sizes, interval, resample_weights

FLAT = 0.1  # what is at most this share of a curve's rise, up or down, is no movement


@takes(doses="X", values="R X")
def hinge(doses, values) -> dict:
    """Least squares of curves [R, X] by two straight lines that meet at one of the inner doses.

    Returns arrays [R]: `at` (the dose where they meet), `before` and `after` (slopes), `left`
    (sum of squares that stays), and `straight` (what one line leaves).

    >>> found = hinge([0, 1, 2, 3, 4], [[0, 0, 0, 1, 2]])
    >>> found["at"], found["after"].round(6)
    (array([2.]), array([1.]))
    """
    doses, values = np.asarray(doses, float), np.asarray(values, float)
    fits, left = [], []
    for knot in doses[1:-1]:
        design = np.stack([np.ones_like(doses), doses - knot, np.maximum(doses - knot, 0)], 1)
        fit = values @ np.linalg.pinv(design).T  # [R, 3]
        fits.append(fit)
        left.append(((values - fit @ design.T) ** 2).sum(1))
    best, row = np.argmin(left, 0), np.arange(len(values))
    fit = np.stack(fits)[best, row]
    line = np.stack([np.ones_like(doses), doses], 1)
    rest = values - values @ np.linalg.pinv(line).T @ line.T
    return {
        "at": doses[1:-1][best],
        "before": fit[:, 1],
        "after": fit[:, 1] + fit[:, 2],
        "left": np.stack(left)[best, row],
        "straight": (rest**2).sum(1),
    }


@takes(doses="X", groups="n", clusters="n")
def dose_curve(doses, parts, groups, resamples=2000, seed=0, clusters=None) -> dict:
    """The effect at each dose, and how it comes: gradually, or by a jump?

    doses: [X >= 4], rising; parts: for each dose (own [n], control [n, D]), the same rows; groups,
    clusters as in effects.critical. The same rows are drawn at all doses, control draws apart.
    Returns
      curve: a row per dose {dose, effect, low, high, p (see effects.group_flips), sees};
      change {at, low, high}: where two lines meet that fit best, with its bootstrap interval;
      bend: the share of what one straight line leaves that two take away;
      before, after {slope, low, high}: slopes of the two lines;
      falls: doses at which the curve is lower than at the dose before, interval below 0;
      monotone: whether there is none;
      largest_step {from, to, share}: the step with the largest rise, as a share of the whole rise;
      shape, in words: of a curve that rises, whether it is flat up to the change point, or falls
        first, by more than FLAT of the rise.
    """
    doses, groups = np.asarray(doses, float), np.asarray(groups)
    if len(doses) != len(parts) or len(doses) < 4 or (np.diff(doses) <= 0).any():
        raise UserError(
            f"{len(doses)} doses {doses.tolist()} with {len(parts)} effects; expected at least 4, "
            "rising, and one (own, control) for each."
        )
    weights = resample_weights(groups, resamples, seed, clusters)
    rng, sizes = np.random.default_rng([seed, 7]), cluster_sizes(clusters, groups)
    drawn, curve = [], []
    for dose, (own, control) in zip(doses, parts, strict=True):
        rows = np.asarray(own, float) - np.asarray(control, float).mean(1)
        mine = drawn_means(np.asarray(own, float)[:, None], groups, weights, rng)
        drawn.append(mine - drawn_means(np.asarray(control, float), groups, weights, rng))
        low, high = interval(drawn[-1], sizes=sizes)
        curve.append(
            {
                "dose": float(dose),
                "effect": group_mean(rows, groups),
                "low": float(low),
                "high": float(high),
                "p": group_flips(rows, groups, resamples, seed, clusters),
                "sees": SEEN_TWO_SIDED * float(np.std(drawn[-1])),
            }
        )
    return {"curve": curve} | _shape(doses, curve, np.stack(drawn, 1), sizes)


def _shape(doses, curve, drawn, sizes) -> dict:
    """What the curve looks like; drawn [R, X] are its bootstrap replicates."""
    effect = np.array([row["effect"] for row in curve])
    if not np.ptp(effect) > 0:
        raise NotTestable("the effect is the same at all doses: there is no curve. Not testable.")
    fit, again = hinge(doses, effect[None]), hinge(doses, drawn)
    at, steps = fit["at"][0], np.diff(effect)
    falls = doses[1:][interval(np.diff(drawn, axis=1), sizes=sizes)[1] < 0]
    rise, jump, low = effect[-1] - effect[0], int(np.argmax(steps)), int(np.argmin(effect))
    before = effect[doses == at][0] - effect[0]
    whole = interval(drawn[:, -1] - drawn[:, 0], sizes=sizes)
    jumps = jump >= low and steps[jump] >= (1 - FLAT) * rise
    then = f"a jump from {doses[jump]:g} to {doses[jump + 1]:g}" if jumps else "it rises"
    if whole[0] <= 0:
        shape = "falls" if whole[1] < 0 else "no rise seen"
    elif effect[low] - effect[0] < -FLAT * rise:
        shape = f"falls to its lowest at {doses[low]:g}, then {then}"
    elif before <= FLAT * rise:
        shape = f"flat, then {then}" if jumps else f"flat up to {at:g}, then {then}"
    else:
        shape = "rises"
    shape += f", with a fall at {', '.join(f'{x:g}' for x in falls)}" if len(falls) else ""
    return {
        "change": _with_interval("at", at, again["at"], None),
        "bend": float(1 - fit["left"][0] / max(fit["straight"][0], 1e-300)),
        "before": _with_interval("slope", fit["before"][0], again["before"], sizes),
        "after": _with_interval("slope", fit["after"][0], again["after"], sizes),
        "falls": falls.tolist(),
        "monotone": not len(falls),
        "largest_step": {
            "from": float(doses[jump]),
            "to": float(doses[jump + 1]),
            "share": float(steps[jump] / rise) if rise > 0 else None,
        },
        "shape": shape,
    }


def _with_interval(name, value, replicates, sizes) -> dict:
    low, high = interval(replicates, sizes=sizes)
    return {name: float(value), "low": float(low), "high": float(high)}
