"""Random sets to hold an ablated set against: as many components in the same layers, at will with
matched rates.

Masks: {family: bool [L, ...]}, layers first; what follows the layer (neurons,
experts, or neurons of experts) is one pool. A seeded numpy Generator makes every draw repeatable.
"""

import numpy as np

from ..record import UserError
from .checks import takes


def layer_matched(mask, rng, exclude=None) -> dict[str, np.ndarray]:
    """A random mask with the same count per family and layer.

    exclude: a mask of components not to draw (e.g. the set itself, or all sets); None draws from
    all components, so a control may share members with the set by chance. Raises UserError if a
    layer has too few left. (Ours.)

    >>> drawn = layer_matched({"dense": np.eye(3, 8, dtype=bool)}, np.random.default_rng(0))
    >>> drawn["dense"].sum(1).tolist()
    [1, 1, 1]
    """

    def draw(members, barred, _, where):
        pool = np.flatnonzero(~barred)
        return rng.choice(pool, _enough(len(members), len(pool), where), replace=False)

    return _per_layer(mask, exclude or {}, {}, draw)


def rate_matched(mask, rate, rng, exclude=None, nearest: int = 10) -> dict[str, np.ndarray]:
    """A random mask with the same count per layer, of components about as active as the set's
    members.

    rate: {family: float, of the mask's shape}, e.g. the mean activation frequency p; any score
    serves. Within a layer the members, in random order, each take one at random of the `nearest`
    components whose rate is closest to their own among those that are not members, not in
    `exclude` and not yet taken. A layer's last choices are the poorest; `rate_gap` tells how well
    the whole set is matched. Raises UserError if a layer has too few left. (Ours.)

    >>> rate = {"dense": np.array([[0.9, 0.1, 0.85, 0.2, 0.15, 0.88]])}
    >>> mask = {"dense": np.array([[True, False, False, False, False, False]])}
    >>> drawn = rate_matched(mask, rate, np.random.default_rng(0), nearest=2)["dense"]
    >>> np.flatnonzero(drawn).tolist()[0] in (2, 5)
    True
    """

    def draw(members, barred, p, where):
        barred = barred.copy()
        barred[members] = True
        pool = np.flatnonzero(~barred)
        _enough(len(members), len(pool), where)
        if not np.isfinite(p[pool]).all() or not np.isfinite(p[members]).all():
            raise UserError(
                f"rate_matched: the rate of {where} holds NaN or infinity. Give a finite rate."
            )
        pool = pool[
            np.lexsort((rng.random(len(pool)), p[pool]))
        ]  # by rate, equal rates in random order
        values, free, taken = p[pool], np.ones(len(pool), bool), []
        for member in rng.permutation(members):
            at, width, settled = np.searchsorted(values, p[member]), nearest, False
            while not settled:  # widen until both sides hold enough free ones
                width *= 4
                low, high = max(0, at - width), min(len(pool), at + width)
                near = low + np.flatnonzero(free[low:high])
                settled = ((near < at).sum() >= nearest or low == 0) and (
                    (near >= at).sum() >= nearest or high == len(pool)
                )
            near = near[np.argsort(np.abs(values[near] - p[member]), kind="stable")[:nearest]]
            chosen = rng.choice(near)
            free[chosen] = False
            taken.append(pool[chosen])
        return np.array(taken, int)

    return _per_layer(mask, exclude or {}, rate, draw)


def usage_matched(mask, usage, rng, exclude=None) -> dict[str, np.ndarray]:
    """rate_matched for few and large components, above all experts: against the most used third of
    them, a random third proves nothing.

    mask, usage: {family: [L, E]}, usage = routing frequency f. A layer's experts are few, so a
    member's control is one of its two nearest free ones, not of ten. The most used experts have no
    equal: say `rate_gap` beside the result, and hold single experts against `expected_at_usage`.

    >>> usage = {"experts": np.array([[0.9, 0.8, 0.7, 0.1]])}
    >>> mask = {"experts": np.array([[False, True, False, False]])}
    >>> usage_matched(mask, usage, np.random.default_rng(0))["experts"][0, [1, 3]].tolist()
    [False, False]
    """
    return rate_matched(mask, usage, rng, exclude, nearest=2)


def singles(shape, family: str = "experts"):
    """Yield (index, mask) for each single component of a family of the shape [L, ...]: the sets of
    an ablation of one expert at a time.

    >>> [index for index, _ in singles((1, 2))]
    [(0, 0), (0, 1)]
    """
    for index in np.ndindex(*shape):
        mask = np.zeros(shape, bool)
        mask[index] = True
        yield index, {family: mask}


@takes(effects="L E", usage="L E")
def expected_at_usage(effects, usage, neighbours: int = 4) -> np.ndarray:
    """What an ablation of each component costs others of like usage: [L, E], from the effects and
    usage [L, E] of single ablations. The component's effect minus this is what it does beyond
    being used.

    Within a layer, the mean over the `neighbours` others of nearest usage, moved to the
    component's own usage along their least-squares line (so the most used ones are not held
    against less used ones alone).

    >>> expected_at_usage([[1.0, 2.0, 3.0, 9.0]], [[0.1, 0.2, 0.3, 0.4]], 3)[0, 3].round(6)
    np.float64(4.0)
    """
    effects, usage = np.asarray(effects, float), np.asarray(usage, float)
    if effects.shape != usage.shape or effects.ndim != 2 or effects.shape[1] <= neighbours:
        raise UserError(
            f"effects {effects.shape}, usage {usage.shape}, {neighbours} neighbours; expected two "
            "arrays [L, E] with more components in a layer than neighbours."
        )
    found = np.empty(effects.shape)
    for layer, own in np.ndindex(*effects.shape):
        apart = np.abs(usage[layer] - usage[layer, own])
        apart[own] = np.inf
        near = np.argsort(apart, kind="stable")[:neighbours]
        x, y = usage[layer, near] - usage[layer, near].mean(), effects[layer, near]
        spread = (x**2).sum()
        slope = x @ y / spread if spread > 0 else 0.0
        found[layer, own] = y.mean() + slope * (usage[layer, own] - usage[layer, near].mean())
    return found


def rate_gap(mask, control, rate) -> float:
    """Mean rate of a control minus that of the set, over all families: 0 = matched, < 0 = the
    control is less active.

    >>> mask = {"dense": np.array([[True, False]])}
    >>> rate_gap(mask, {"dense": ~mask["dense"]}, {"dense": [[0.5, 0.25]]})
    -0.25
    """
    of = [
        np.concatenate([np.asarray(rate[f])[np.asarray(m)] for f, m in masks.items()])
        for masks in (control, mask)
    ]
    return float(of[0].mean() - of[1].mean())


def _enough(needed: int, left: int, where: str) -> int:
    if left < needed:
        raise UserError(
            f"random control: {where} has {left} components to draw from, {needed} are needed. "
            "Use a smaller set or exclude less."
        )
    return needed


def _per_layer(mask, exclude, rate, draw) -> dict[str, np.ndarray]:
    out = {}
    for family, values in mask.items():
        values = np.asarray(values)
        extra = [np.asarray(given[family]) for given in (exclude, rate) if family in given]
        if (
            values.dtype != bool
            or any(e.shape != values.shape for e in extra)
            or rate
            and family not in rate
        ):
            raise UserError(
                f"random control, family {family!r}: mask {values.dtype} {values.shape}, beside it "
                f"{[e.shape for e in extra]}. Expected bool, and `exclude` and `rate` of the same "
                "shape."
            )
        flat = values.reshape(len(values), -1)  # [L, M]
        barred = np.asarray(exclude.get(family, np.zeros_like(values)), bool).reshape(flat.shape)
        p = np.asarray(rate.get(family, np.zeros(values.shape)), float).reshape(flat.shape)
        new = np.zeros_like(flat)
        for layer, row in enumerate(flat):
            if row.any():
                new[
                    layer,
                    draw(np.flatnonzero(row), barred[layer], p[layer], f"{family} layer {layer}"),
                ] = True
        out[family] = new.reshape(values.shape)
    return out
