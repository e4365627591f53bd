"""General or unique, layer by layer; whether a category can be read off a set.

I instructions, L layers, M components (L x per layer), C categories. Each number comes with what
shuffled labels give. Pure functions, ours.
"""

import numpy as np

from ..record import NotTestable, UserError
from .checks import takes
from .sets import category_means, codes, column_blocks, consensus, contrast, lape, margin
from .similarity import _profiles, jensen_shannon
from .stats import Permutation, permutation_test

CATEGORY_SCORES = ("frequency", "lape", "contrast", "attribution", "contribution")


@takes(matrices="... C C")
def own_gaps(matrices) -> np.ndarray:
    """Each category's mean similarity within itself minus that with the others, [..., C] of
    matrices [..., C, C]; their mean is `gap`.
    """
    matrices = np.asarray(matrices, float)
    inside, others = np.diagonal(matrices, axis1=-2, axis2=-1), matrices.shape[-1] - 1
    return inside - (matrices.sum(-1) + matrices.sum(-2) - 2 * inside) / (2 * others)


@takes(sets="I M?", labels="... I", weights="R I")
def shares(sets, labels, layers: int, tau: float, weights=None) -> np.ndarray:
    """Shares of each layer's components that are unique (in one consensus set) and general (in all
    C), and of all components in any set that are unique: [R, 2 L + 1] for labels [R, I]. sets:
    bool [I, M]. weights [R, I]: how often each instruction is drawn (bootstrap).
    """
    labels = np.atleast_2d(labels)
    weights = np.ones(labels.shape, np.float32) if weights is None else np.asarray(weights)
    versions, count = max(len(labels), len(weights)), labels.max() + 1
    found = np.zeros((versions, sets.shape[1]), np.uint8)
    groups = (labels[:, None] == np.arange(count)[:, None]) * weights[:, None]  # [R, C, I]
    groups = groups.astype(np.float32)
    needed = np.ceil(tau * groups.sum(2) - 1e-4)[:, :, None]
    for part, block in column_blocks(sets, 4096):
        found[:, part] = (
            (groups.reshape(-1, groups.shape[2]) @ block).reshape(*groups.shape[:2], -1) >= needed
        ).sum(1)
    unique, general = ((found == n).reshape(versions, layers, -1).mean(2) for n in (1, count))
    anywhere = (found > 0).mean(1)
    return np.column_stack(
        [unique, general, np.where(anywhere > 0, unique.mean(1) / np.maximum(anywhere, 1e-12), 0)]
    )


@takes(sets="I M?", labels="I", strata="I", clusters="I")
def share_test(
    sets, labels, layers: int, tau: float, strata=None, clusters=None, **how
) -> Permutation:
    """`shares` with labels shuffled within strata (whole clusters, where given): estimate
    [2 L + 1], p, null [R, 2 L + 1]. One-sided: more unique components than shuffled labels give,
    *fewer* general ones. how: resamples, seed. Raises NotTestable if all consensus sets are empty.
    """
    layer, labels = np.r_[np.ones(layers), -np.ones(layers), 1], codes(labels)
    if not consensus(sets, labels, tau).any():
        raise NotTestable(f"all consensus sets are empty at tau {tau}; lower it.")
    test = permutation_test(
        lambda y: shares(sets, y, layers, tau) * layer,
        labels,
        strata,
        clusters=clusters,
        **how,
    )
    return Permutation(test.estimate * layer, test.p, test.null * layer)


@takes(routing="I L E", labels="I", folds="I")
def nearest_profile(routing, labels, folds) -> dict:
    """similarity.nearest_consensus for uncut routing [I, L, E]: each instruction is given the
    category whose mean profile, over the other folds' instructions, is nearest (Jensen-Shannon,
    mean over layers). `correct` [I], `accuracy`.
    """
    labels, folds, routing = codes(labels), np.asarray(folds), np.asarray(routing)
    if len(np.unique(folds)) < 2:
        raise NotTestable(
            "one fold only; expected two: no instruction may be judged by a profile it helped to "
            "make."
        )
    f, correct = _profiles(routing), np.zeros(len(labels))
    for fold in np.unique(folds):
        held = folds == fold
        if set(labels[~held]) != set(labels):
            raise NotTestable(
                f"outside fold {fold} a category has no instruction; expected each in every fold."
            )
        centres = category_means(f[~held].reshape((~held).sum(), -1), labels[~held]).reshape(
            -1, *f.shape[1:]
        )
        near = np.stack(
            [jensen_shannon(f[held], centre).mean(1) for centre in centres], 1
        )  # [held, C]
        best = near >= near.max(1, keepdims=True)
        correct[held] = best[np.arange(held.sum()), labels[held]] / best.sum(1)
    return {"correct": correct, "accuracy": correct.mean(), "chance": 1 / (labels.max() + 1)}


@takes(values="I M", labels="I")
def category_scores(score: str, values, labels) -> np.ndarray:
    """How much each component stands for each category, [C, M], by one of METHOD's scores, from
    values [I, M]: p for frequency, lape and contrast; attribution (the category's mean, as in
    study.scores.standing) and contribution (own mean minus the largest other) per instruction.
    """
    if score not in CATEGORY_SCORES:
        raise UserError(f"score is {score!r}; expected one of {', '.join(CATEGORY_SCORES)}.")
    if score == "contrast":
        return contrast(values, labels)
    means = category_means(values, labels)
    return {"lape": lape, "contribution": margin}.get(score, lambda m: m)(means)
