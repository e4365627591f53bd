"""An ablation experiment: sets of a half's neurons, controls like them, losses measured on the
other half.
"""

import zlib

import numpy as np
import pandas as pd

from ..analysis.controls import layer_matched, rate_gap, rate_matched
from ..analysis.effects import critical, specificity
from ..analysis.sets import codes
from ..hexainst.schema import CATEGORIES
from .evaluate import ablation_matrix


def measure(
    loaded,
    profile,
    rows,
    own: dict,
    controls: dict,
    operator: str = "zero",
    everywhere: int = 0,
    **options,
):
    """Increases of loss, nats per reference token, and the rows' category codes: {"own": [n,
    sets], kind: [n, draws], "everywhere": [n, everywhere, C], "labels": [n]}.

    own: {name: mask}, on all rows. controls: {kind: {category: [masks]}}, each on its own
    category's rows alone; the first `everywhere` draws of the first kind also on all rows.
    `options` go to `ablate`.

    """

    def run(at, masks):
        return ablation_matrix(
            *loaded, profile, at, masks, operator, allow_inert=True, **options
        ).to_numpy()

    labels, first = rows["category"].to_numpy(), next(iter(controls.values()))
    found = {"own": run(rows, own)} if own else {}
    for category in first:
        at = labels == category
        table = run(
            rows[at],
            {(kind, d): m for kind in controls for d, m in enumerate(controls[kind][category])},
        )
        start = 0
        for kind in controls:
            width = len(controls[kind][category])
            found.setdefault(kind, np.zeros((len(rows), width)))[at] = table[
                :, start : start + width
            ]
            start += width
    if everywhere:
        masks = {(d, category): first[category][d] for d in range(everywhere) for category in first}
        found["everywhere"] = run(rows, masks).reshape(len(rows), everywhere, -1)
    return found | {"labels": codes(labels).astype(np.int32)}


def pooled(parts: list[dict]) -> tuple[dict, np.ndarray]:
    """(arrays that all parts have, their rows together; the part [n] that a row comes from)."""
    names = [
        name
        for name in parts[0]
        if all(name in part for part in parts) and name not in ("layers", "sets")
    ]
    from_part = np.concatenate([np.full(len(part["labels"]), i) for i, part in enumerate(parts)])
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, from_part


def measured_rows(profile, rows, half) -> pd.DataFrame:
    """The first `ablation_rows` rows of each category of a half."""
    return (
        rows[rows["fold"] == half]
        .groupby("category", sort=False)
        .head(profile.ablation_rows)
        .reset_index(drop=True)
    )


KINDS = ("random", "rate", "magnitude")


def draws_of(standing, counts, sets, number, seed, name) -> tuple[dict, dict]:
    """({kind: per category a list of masks}, {kind: mean gap}): random sets with the set's number
    in each layer.

    random: any neurons. rate, magnitude: not the set's own; each member, in random order, takes
    one at random of the ten free neurons of its layer that are nearest in the category's rate (in
    magnitude): so draws differ, though less than random ones do. Both are left out where a set
    holds more than half of a layer: too few are left to match. The gap is control minus set, as a
    share of the set's mean. `name` and `seed` decide the draws, not the order of calls.
    """
    most = max(
        part.sum() / part.size
        for members in sets
        for part in counts.mask("neurons", members).popitem()[1]
    )
    kinds = KINDS if most <= 0.5 else KINDS[:1]
    masks, gaps = {kind: [] for kind in kinds}, {kind: [] for kind in kinds[1:]}
    for c, members in enumerate(sets):
        mask = counts.mask("neurons", members)
        values = {"rate": standing.rate[c], "magnitude": standing.magnitude}
        values = {kind: counts.mask("neurons", value) for kind, value in values.items()}
        for kind in kinds:
            rng = np.random.default_rng([seed, c, zlib.crc32(f"{name}/{kind}".encode())])
            masks[kind].append(
                [
                    layer_matched(mask, rng)
                    if kind == "random"
                    else rate_matched(mask, values[kind], rng)
                    for _ in range(number)
                ]
            )
        for kind in kinds[1:]:
            mean = np.mean([values[kind][family][part].mean() for family, part in mask.items()])
            gap = np.mean([rate_gap(mask, control, values[kind]) for control in masks[kind][c]])
            gaps[kind].append(gap / max(mean, 1e-12))
    return masks, {kind: float(np.mean(gap)) for kind, gap in gaps.items()}


def spared(counts, sets, number, rng) -> dict[str, dict[str, list]]:
    """What to ablate to see if a category's set [C, M] suffices: the union of all sets without
    those in every set ...

    "none spared": just so. "own spared": but for the category's own set. "random spared": `number`
    times, but for as many random ones of the same layers out of that union. {kind: {category:
    [masks]}}. (Ours.)
    """
    pool, out = (
        sets.any(0) & ~sets.all(0),
        {"none spared": {}, "own spared": {}, "random spared": {}},
    )
    outside = counts.mask("neurons", ~pool)
    for category, own in zip(CATEGORIES, sets & pool, strict=True):
        keep = counts.mask("neurons", own)
        drawn = [
            np.concatenate([part.ravel() for part in layer_matched(keep, rng, outside).values()])
            for _ in range(number)
        ]
        for kind, spare in zip(out, ([np.zeros_like(pool)], [own], drawn), strict=True):
            out[kind][category] = [counts.mask("neurons", pool & ~members) for members in spare]
    return out


def own_effect(profile, arrays: dict, half, kinds=("random",)) -> dict:
    """`critical` and `specificity` (see causal) of what `measure` returned, pooled; half [n] as
    `pooled` gives it.
    """
    labels, settings = arrays["labels"], (profile.resamples, profile.seed)
    own = arrays["own"][np.arange(len(labels)), labels]
    found = critical(
        own, {kind: arrays[kind] for kind in kinds}, labels + len(CATEGORIES) * half, *settings
    )
    return found | specificity(arrays["own"], arrays["everywhere"], labels, half, *settings)
