"""Which neurons are a category's? Scores [C, M] of the choosing half, and random sets like the ones chosen.

M neurons: the unit "neurons" of the counts (dense MLPs, in a sparse model the routed experts'), flattened.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from helpers.components import category_means, category_sets, contrast, frequency, lape, margin
from helpers.config import SCORES
from helpers.controls import layer_matched, rate_gap, rate_matched
from helpers.hexainst import CATEGORIES
from helpers.record import UserError
from helpers.scores import attribution, contribution

SEES_REFERENCE = ("attribution", "contribution-response")
KINDS = ("random", "rate", "magnitude")


@dataclass(frozen=True)
class Standing:
    """What one half says of a pair's neurons.

    scores     {score: float [C, M]}, higher is chosen first
    rate       [C, M], mean activation frequency in the category
    magnitude  [M], contribution to the residual stream, mean over all instructions
    """

    scores: dict[str, np.ndarray]
    rate: np.ndarray
    magnitude: np.ndarray


def standing(profile, rows, counts, loaded, half, scores) -> Standing:
    """Score a pair's neurons on one half; rows [I] with a column `fold`, counts of these rows at the prompts.

    frequency: the category's mean p. lape, contrast: see components. contribution: own mean minus the largest other's,
    at the prompt or (contribution-response) at the reference's tokens. attribution: the category's mean. Those in
    SEES_REFERENCE have read the references of the choosing half, the others its instructions only. (Ours.)
    """
    if unknown := set(scores) - set(SCORES):
        raise UserError(f"scores: {sorted(unknown)} unknown, expected some of {SCORES}. Correct the profile.")
    at = (rows["fold"] == half).to_numpy()
    here, labels = rows[at], rows["category"][at].to_numpy()
    family, unit = counts.family("neurons"), counts.unit("neurons")[at]
    p = frequency(unit, counts.tokens[at]).reshape(len(here), -1)                               # [I, M]
    rate = category_means(p, labels)

    def written(positions):
        return contribution(*loaded, profile, here, positions)[family].reshape(len(here), -1)

    def gradient():
        return attribution(*loaded, profile, here)[family].reshape(len(here), -1)
    prompt = written("prompt")
    made = {
        "frequency": lambda: rate, "lape": lambda: lape(rate), "contrast": lambda: contrast(p, labels),
        "attribution": lambda: category_means(gradient(), labels),
        "contribution": lambda: margin(category_means(prompt, labels)),
        "contribution-response": lambda: margin(category_means(written("response"), labels)),
    }
    return Standing({score: made[score]() for score in scores}, rate, category_means(prompt, labels).mean(0))


def sets_of(standing, score, size, seed=0) -> np.ndarray:
    """The share `size` of the neurons that the score ranks first for each category: bool [C, M], equal sizes."""
    scores = standing.scores[score]
    return category_sets(scores, max(1, round(size * scores.shape[1])), seed)


def draws_of(standing, counts, sets, number, seed, name) -> tuple[dict, dict]:
    """({kind: per category a list of masks}, {kind: mean gap}): random sets with the set's number in each layer.

    random: any neurons. rate, magnitude: not the set's own; each member, in random order, takes one at random of the
    ten free neurons of its layer that are nearest in the category's rate (in magnitude): so draws differ, though less
    than random ones do. Both are left out where a set holds more than half of a layer: too few are left to match. The
    gap is control minus set, as a share of the set's mean. `name` and `seed` decide the draws, not the order of calls.
    """
    most = max(part.sum() / part.size for members in sets for part in counts.mask("neurons", members).popitem()[1])
    kinds = KINDS if most <= 0.5 else KINDS[:1]
    masks, gaps = {kind: [] for kind in kinds}, {kind: [] for kind in kinds[1:]}
    for c, members in enumerate(sets):
        mask = counts.mask("neurons", members)
        values = {"rate": standing.rate[c], "magnitude": standing.magnitude}
        values = {kind: counts.mask("neurons", value) for kind, value in values.items()}
        for kind in kinds:
            rng = np.random.default_rng([seed, c, zlib.crc32(f"{name}/{kind}".encode())])
            masks[kind].append([layer_matched(mask, rng) if kind == "random" else rate_matched(mask, values[kind], rng)
                                for _ in range(number)])
        for kind in kinds[1:]:
            mean = np.mean([values[kind][family][part].mean() for family, part in mask.items()])
            gap = np.mean([rate_gap(mask, control, values[kind]) for control in masks[kind][c]])
            gaps[kind].append(gap / max(mean, 1e-12))
    return masks, {kind: float(np.mean(gap)) for kind, gap in gaps.items()}


def spared(counts, sets, number, rng) -> dict[str, dict[str, list]]:
    """What to ablate to see if a category's set [C, M] suffices: the union of all sets without those in every set ...

    "none spared": just so. "own spared": but for the category's own set. "random spared": `number` times, but for as
    many random ones of the same layers out of that union. {kind: {category: [masks]}}. (Ours.)
    """
    pool, out = sets.any(0) & ~sets.all(0), {"none spared": {}, "own spared": {}, "random spared": {}}
    outside = counts.mask("neurons", ~pool)
    for category, own in zip(CATEGORIES, sets & pool, strict=True):
        keep = counts.mask("neurons", own)
        drawn = [np.concatenate([part.ravel() for part in layer_matched(keep, rng, outside).values()])
                 for _ in range(number)]
        for kind, spare in zip(out, ([np.zeros_like(pool)], [own], drawn), strict=True):
            out[kind][category] = [counts.mask("neurons", pool & ~members) for members in spare]
    return out
