"""Random sets to hold an ablated set against: as many components in the same layers, at will with
matched rates.

Masks as in ablation.py: {family: bool [L, ...]}, layers first; what follows the layer (neurons,
experts, or neurons of experts) is one pool. A seeded numpy Generator makes every draw repeatable.
"""

import numpy as np

from ..record import UserError


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
    >>> np.flatnonzero(rate_matched(mask, rate, np.random.default_rng(0), nearest=2)["dense"]).tolist()[0] in (2, 5)
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


def rate_gap(mask, control, rate) -> float:
    """Mean rate of a control minus that of the set, over all families: 0 = matched, < 0 = the
    control is less active.

    >>> rate_gap({"dense": np.array([[True, False]])}, {"dense": np.array([[False, True]])}, {"dense": [[0.5, 0.25]]})
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
                f"{[e.shape for e in extra]}. Expected bool, and `exclude` and `rate` of the same shape."
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
