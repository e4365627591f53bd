"""What changed, where and when: sets gained and lost, chance overlap, ranks within layers, curves
of a tuning. (Ours.)

Arrays in, arrays out. I instructions, L layers, S checkpoints (the first is the base), R resamples.
"""

import numpy as np
from scipy.stats import rankdata

from ..record import NotTestable, UserError
from .checks import takes
from .nulls import chance_jaccard
from .similarity import jaccard
from .stats import Interval, bootstrap, plus_one


@takes(base="...!", tuned="...!")
def changes(base, tuned) -> dict[str, np.ndarray]:
    """gained (tuned only), kept (both) and lost (base only) of two bool arrays of one shape.

    >>> found = changes(np.array([True, True, False]), np.array([False, True, True]))
    >>> {k: v.astype(int).tolist() for k, v in found.items()}
    {'gained': [0, 0, 1], 'kept': [0, 1, 0], 'lost': [1, 0, 0]}
    """
    if base.shape != tuned.shape:
        raise UserError(f"base sets {base.shape}, tuned sets {tuned.shape}; expected one shape.")
    return {"gained": tuned & ~base, "kept": base & tuned, "lost": base & ~tuned}


@takes(base="I M!", one="I M!", two="I M!")
def common_gain(base, one, two, layers: int) -> np.ndarray:
    """(Jaccard of the gained sets of two tunings, its expectation by chance) per instruction:
    float [I, 2].

    base, one, two: bool [I, M = layers x N]. Chance: as many per layer, drawn from the components
    outside the base's set. Instructions where neither gains anything are left out.
    """
    found = []
    for old, a, b in zip(base, one & ~base, two & ~base, strict=True):
        if (a | b).any():
            sizes = [x.reshape(layers, -1).sum(1) for x in (a, b, ~old)]
            overlap = jaccard((a & b).sum(), a.sum(), b.sum())
            found.append([overlap, chance_jaccard(*sizes)])
    return np.array(found).reshape(-1, 2)


def _centred_ranks(values) -> np.ndarray:
    """Ranks along the last axis (ties share their mean), centred and scaled so that layers of any
    width weigh alike.
    """
    ranks = rankdata(values, axis=-1)
    return (ranks - ranks.mean(-1, keepdims=True)) / values.shape[-1]


@takes(first="L M", second="... L M")
def layer_rank_correlation(first, second) -> np.ndarray:
    """Spearman correlation with ranks taken within layers: first [L, M], second [..., L, M] ->
    [...].

    >>> first, second = np.array([[1, 2, 3], [7, 8, 9]]), np.array([[4, 5, 6], [1, 2, 3]])
    >>> float(layer_rank_correlation(first, second))
    1.0
    """
    a, b = _centred_ranks(np.asarray(first)), _centred_ranks(np.asarray(second))
    scale = np.sqrt((a**2).sum((-2, -1)) * (b**2).sum((-2, -1)))
    if not np.all(scale > 0):
        raise NotTestable(
            "one of the two does not vary within any layer; expected values that differ. Not "
            "testable."
        )
    return (a * b).sum((-2, -1)) / scale


@takes(weights="L M", moved="I ...", clusters="I")
def change_correlation(weights, moved, resamples=2000, seed=0, clusters=None) -> dict:
    """Does what moved more in weights [L, M] move more in frequency? moved: |change of p|, [I, L,
    M].

    rho: layer_rank_correlation of weights with the mean of `moved`; rho_ci: bootstrap over
    instructions (whole clusters, where given); p: weights permuted within layers, one-sided.
    """
    if moved[0].size != np.size(weights):
        raise UserError(
            f"moved {list(np.shape(moved))} beside weights {list(np.shape(weights))}; expected "
            "[I, L, M] and [L, M]."
        )
    moved = np.asarray(moved, np.float32).reshape(len(moved), *np.shape(weights))
    flat = moved.reshape(len(moved), -1)

    def statistic(drawn):  # [R, I]
        return layer_rank_correlation(
            weights, (drawn.astype(np.float32) @ flat).reshape(-1, *np.shape(weights))
        )

    found = bootstrap(statistic, np.zeros(len(moved)), resamples, seed=seed, clusters=clusters)
    rng, null = np.random.default_rng(seed), np.empty(resamples)
    a, b = _centred_ranks(np.asarray(weights)), _centred_ranks(moved.mean(0))
    scale = np.sqrt((a**2).sum() * (b**2).sum())
    for r in range(resamples):
        null[r] = (rng.permuted(a, axis=-1) * b).sum() / scale
    return {
        "rho": found.estimate,
        "rho_ci": [found.low, found.high],
        "p": plus_one(found.estimate, null),
    }


@takes(values="S I", weights="R I")
def shares(values, weights=None) -> np.ndarray:
    """How much of its final change a curve has made: (v_s - v_0) / (v_end - v_0), [S, I] -> [R,
    S]; weights [R, I].
    """
    values = np.asarray(values, float)
    weights = np.ones((1, values.shape[1])) if weights is None else weights
    means = weights @ values.T / weights.sum(1, keepdims=True)  # [R, S]
    change = means - means[:, :1]
    if not change[:, -1].all():
        raise NotTestable(
            "a curve ends where it began: the share of its final change is not defined. Not "
            "testable."
        )
    return change / change[:, -1:]


@takes(components="S I", ability="S I", groups="I")
def lead(components, ability, groups, resamples=2000, seed=0) -> dict:
    """Do components change before the ability comes? Mean over the checkpoints after the base of
    (share of the final change of `components` reached minus that of `ability`), [S, I] each; above
    0: components first.

    CI: bootstrap over instructions within groups; p: share of resamples no higher than 0.
    """

    def statistic(weights):
        return (shares(components, weights) - shares(ability, weights))[:, 1:].mean(1)

    found = bootstrap(statistic, groups, resamples, seed=seed)
    return {
        "lead": found.estimate,
        "lead_ci": [found.low, found.high],
        "p": plus_one(0.0, -found.replicates),
    }


@takes(steps="S", curve="R S")
def crossing(steps, curve, level: float = 0.5) -> np.ndarray:
    """The step at which curves [R, S] first reach `level`, linearly between checkpoints: float [R].

    >>> crossing([0, 10, 20], np.array([[0.0, 0.2, 1.0]])).tolist()
    [13.75]
    """
    steps, curve = np.asarray(steps, float), np.asarray(curve, float)
    if not (curve.max(1) >= level).all() or not (curve[:, 0] < level).all():
        raise NotTestable(
            f"a curve does not start below {level} and reach it; expected shares from 0 to 1."
        )
    after = (curve >= level).argmax(1)
    row = np.arange(len(curve))
    low, high = curve[row, after - 1], curve[row, after]
    return steps[after - 1] + (level - low) / (high - low) * (steps[after] - steps[after - 1])


@takes(steps="S", groups="I")
def crossings(steps, values, groups, resamples=2000, seed=0) -> Interval:
    """`crossing` of half the final change for several [S, I] arrays and their differences to the
    first, with CI.

    Returns an Interval over [curves + curves - 1]: the steps, then (other - first).
    """

    def statistic(weights):
        at = np.stack([crossing(steps, shares(v, weights)) for v in values], -1)
        return np.concatenate([at, at[:, 1:] - at[:, :1]], -1)

    return bootstrap(statistic, groups, resamples, seed=seed)


@takes(steps="S", components="S I", ability="S I", groups="I")
def cross_correlation(steps, components, ability, groups, lags=(100, 4), resamples=500, seed=0):
    """Correlation of the two curves' rates of change, an Interval over [2 most + 1] lags; lags =
    (grid, most): -most..most times `grid` steps.

    Curves are read off at equal steps (linear in between) and differenced. At a positive lag,
    components are compared with the ability that much *later*: a peak there says that components
    move first.
    """
    grid, most = lags
    at = np.arange(steps[0], steps[-1] + 1, grid)
    if len(at) < 2 * most + 4:
        raise UserError(
            f"{len(at)} grid points for lags up to {most}; expected {2 * most + 4}. Use a finer "
            "grid."
        )

    def rates(values, weights):
        curves = [np.interp(at, steps, row) for row in shares(values, weights)]
        return np.diff(curves, axis=-1)  # [R, G]

    def statistic(weights):
        x, y = rates(components, weights), rates(ability, weights)
        return np.stack([_lagged(x, y, lag) for lag in range(-most, most + 1)], -1)

    return bootstrap(statistic, groups, resamples, seed=seed)


def _lagged(x, y, lag):
    """Correlation [R] of x [R, G] with y that many grid points later; 0 where one does not move."""
    a, b = (x[:, : x.shape[1] - lag], y[:, lag:]) if lag >= 0 else (x[:, -lag:], y[:, :lag])
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norm = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(norm > 0, (a * b).sum(1) / np.where(norm > 0, norm, 1), 0.0)
