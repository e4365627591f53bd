"""An ablation experiment: sets of a half's neurons, controls like them, losses measured on the
other half.
"""

import zlib

import numpy as np

from ..analysis.controls import layer_matched, rate_gap, rate_matched
from ..analysis.effects import critical, specificity
from .evaluate import ablation_matrix


def measure(
    study,
    own: dict,
    controls: dict,
    operator: str = "zero",
    everywhere: int = 0,
    variant: str = "tuned",
    **options,
) -> dict:
    """Increases of loss, nats per reference token, on a study's rows, and these rows' codes:
    {"own": [n, sets], kind: [n, draws], "everywhere": [n, everywhere, C], "labels": [n]}.

    own: {name: mask}, on all rows. controls: {kind: {category: [masks]}}, each on its own
    category's rows alone; the first `everywhere` draws of the first kind (all, if there are
    fewer) also on all rows.
    `options` go to `ablate`.
    """

    def run(part, masks):
        return ablation_matrix(
            part, masks, operator, variant, allow_inert=True, **options
        ).to_numpy()

    rows, first = study.rows, next(iter(controls.values()))
    everywhere = min(everywhere, *map(len, first.values()))
    found = {"own": run(study, own)} if own else {}
    for category in first:
        at = (rows["category"] == category).to_numpy()
        masks = {(kind, d): m for kind in controls for d, m in enumerate(controls[kind][category])}
        table, start = run(study.take(at), masks), 0
        for kind in controls:
            width = len(controls[kind][category])
            filled = found.setdefault(kind, np.zeros((len(rows), width)))
            filled[at] = table[:, start : start + width]
            start += width
    if everywhere:
        masks = {(d, category): first[category][d] for d in range(everywhere) for category in first}
        found["everywhere"] = run(study, masks).reshape(len(rows), everywhere, -1)
    return found | {"labels": study.labels.astype(np.int32)}


def pooled(parts: list[dict]) -> tuple[dict, np.ndarray]:
    """(arrays that all parts have, their rows together; the part [n] that a row comes from)."""
    names = [
        name
        for name in parts[0]
        if all(name in part for part in parts) and name not in ("layers", "sets")
    ]
    from_part = np.concatenate([np.full(len(part["labels"]), i) for i, part in enumerate(parts)])
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, from_part


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


def spared(counts, sets, number, rng) -> dict[str, list[list]]:
    """What to ablate to see if a category's set [C, M] suffices: the union of all sets without
    those in every set ...

    "none spared": just so. "own spared": but for the category's own set. "random spared": `number`
    times, but for as many random ones of the same layers out of that union. {kind: per category a
    list of masks}. (Ours.)
    """
    pool, out = (
        sets.any(0) & ~sets.all(0),
        {"none spared": [], "own spared": [], "random spared": []},
    )
    outside = counts.mask("neurons", ~pool)
    for own in sets & pool:
        keep = counts.mask("neurons", own)
        drawn = [
            np.concatenate([part.ravel() for part in layer_matched(keep, rng, outside).values()])
            for _ in range(number)
        ]
        for kind, spare in zip(out, ([np.zeros_like(pool)], [own], drawn), strict=True):
            out[kind].append([counts.mask("neurons", pool & ~members) for members in spare])
    return out


def own_effect(arrays: dict, half, resamples: int, seed: int, kinds=("random",)) -> dict:
    """`critical` and `specificity` (see effects) of what `measure` returned, pooled; half [n] as
    `pooled` gives it.
    """
    labels = arrays["labels"]
    own = arrays["own"][np.arange(len(labels)), labels]
    controls, groups = (
        {kind: arrays[kind] for kind in kinds},
        labels + arrays["own"].shape[1] * half,
    )
    found = critical(own, controls, groups, resamples, seed)
    return found | specificity(arrays["own"], arrays["everywhere"], labels, half, resamples, seed)
