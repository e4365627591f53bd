"""How alike sets and routing profiles are: between instructions, between categories, between base
and tuned.

I instructions, L layers, E experts, C categories, M components. `sets`: bool [I, M] or
sets.PackedSets. Pairs are never a component's or an instruction's with itself. No overlap is
ever NaN: empty sets are an error.
"""

import numpy as np
from scipy.special import entr

from ..record import NotTestable, UserError
from .checks import alongside, takes
from .sets import codes, column_blocks, consensus, top_sets
from .stats import cluster_codes


def _no_empty(sizes, what):
    empty = np.flatnonzero(np.asarray(sizes) == 0)
    if len(empty):
        raise NotTestable(
            f"{len(empty)} empty {what}, first at row {empty[0]}; expected at least one component "
            "in "
            "each. Their overlap is not testable: drop these rows (see top_sets' report)."
        )


def jaccard(shared, first, second) -> np.ndarray:
    """Jaccard similarity |A & B| / |A | B| from |A & B|, |A| and |B|, arrays of any shapes that
    broadcast; 0 where both are empty. The one place where it is divided out.

    >>> float(jaccard(1, 2, 2))
    0.3333333333333333
    """
    alongside(shared, first=first, second=second)
    union = np.asarray(first + second - shared)
    if not np.isfinite(union).all():
        raise NotTestable("sizes of sets are NaN or infinite; expected whole numbers.")
    return shared / np.where(union > 0, union, 1)


@takes(sets="I M?", others="J M?")
def jaccard_matrix(sets, others=None) -> np.ndarray:
    """All pairwise Jaccard similarities |A & B| / |A | B|, exact, float32 [I, I] (or [I, I2]
    against `others`).

    Column blocks are unpacked and multiplied in float32; whole numbers, so the sums are exact.
    About 6 s and 200 MB for 1,200 x 352,256 on one core.

    >>> jaccard_matrix(np.array([[1, 1, 0], [0, 1, 1]], bool)).round(3)
    array([[1.   , 0.333],
           [0.333, 1.   ]], dtype=float32)
    """
    others = sets if others is None else others
    if sets.shape[1] != others.shape[1]:
        raise UserError(
            f"sets over {sets.shape[1]} and over {others.shape[1]} components; expected the same. "
            "Compare one family of one architecture."
        )
    shared = np.zeros((sets.shape[0], others.shape[0]))
    first, second = np.zeros(sets.shape[0]), np.zeros(others.shape[0])
    twice = column_blocks(others) if others is not sets else None
    for _, block in column_blocks(sets):
        against = next(twice)[1] if twice else block
        shared += block @ against.T
        first += block.sum(1)
        second += against.sum(1)
    _no_empty(first, "sets")
    _no_empty(second, "sets")
    return jaccard(shared, first[:, None], second).astype(np.float32)


@takes(similarity="I I", labels="... I", weights="R I")
def category_matrix(similarity, labels, weights=None) -> np.ndarray:
    """Mean similarity over the pairs of each two categories, self-pairs left out: [C, C], or [R,
    C, C] of R versions.

    similarity: [I, I]. weights: [R, I], how often each instruction is drawn (bootstrap); copies of
    one instruction are self-pairs. labels: [I], or [R, I] for R relabellings (permutation).
    """
    similarity = np.asarray(similarity, np.float32)
    if not np.isfinite(similarity).all():
        raise UserError(
            "similarity holds NaN or infinite values; expected finite ones. Leave the rows out."
        )
    similarity = similarity - np.diag(np.diag(similarity))
    labels = np.asarray(labels)
    single = labels.ndim == 1 and weights is None
    labels = codes(labels.ravel()).reshape(-1, similarity.shape[0])
    count = labels.max() + 1
    weights = (
        np.ones(labels.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    )
    matrices = np.empty((max(len(labels), len(weights)), count, count))
    for start in range(0, len(matrices), 64):  # bounds the memory
        chunk = weights[start : start + 64] if len(weights) > 1 else weights
        rows = labels[start : start + 64] if len(labels) > 1 else labels
        matrices[start : start + 64] = _mean_pairs(similarity, rows, chunk, count)
    return matrices[0] if single else matrices


def _mean_pairs(similarity, labels, weights, count) -> np.ndarray:
    """category_matrix of a few versions: labels and weights [r, I], or [1, I] for all alike."""
    groups = (labels[:, None] == np.arange(count)[:, None]) * weights[:, None]
    groups = groups.astype(np.float32)  # [r, C, I]
    if len(labels) > 1:
        sums = (groups.reshape(-1, groups.shape[2]) @ similarity).reshape(groups.shape)
    else:  # a group's rows are the same in all versions: only these are multiplied
        chosen = [labels[0] == c for c in range(count)]
        sums = np.stack([weights[:, rows] @ similarity[rows] for rows in chosen], axis=1)
    sums = sums @ groups.transpose(0, 2, 1)
    sizes = groups.sum(2, dtype=float)
    pairs = sizes[:, :, None] * sizes[:, None]
    pairs -= (groups.astype(float) ** 2).sum(2)[:, :, None] * np.eye(count)
    if (pairs <= 0).any():
        raise NotTestable(
            "a category has no pair of different instructions; expected at least 2 (better 10) in "
            "each. Add rows: within-category overlap is not testable here."
        )
    return sums / pairs


@takes(matrices="... C C")
def within_between(matrices) -> dict:
    """within (mean of the diagonal), between (of the rest) and gap of category matrices [..., C,
    C]; arrays [...].

    Categories weigh the same, whatever their numbers of instructions.
    """
    matrices = np.asarray(matrices, float)
    size = matrices.shape[-1]
    if size < 2:
        raise NotTestable(f"{size} category; expected at least 2 to compare within and between.")
    diagonal = np.trace(matrices, axis1=-2, axis2=-1)
    within, between = diagonal / size, (matrices.sum((-2, -1)) - diagonal) / (size * (size - 1))
    return {"within": within, "between": between, "gap": within - between}


@takes(similarity="I I", labels="... I", weights="R I")
def gap(similarity, labels, weights=None) -> np.ndarray:
    """Within minus between, a number or [R]: the statistic to hand to stats.bootstrap and
    stats.permutation_test.
    """
    return within_between(category_matrix(similarity, labels, weights))["gap"]


@takes(similarity="I I", clusters="I")
def wording_matrix(similarity, clusters) -> np.ndarray:
    """Mean similarity over the pairs of each two clusters (wordings), float [K, K], in the order
    of stats.cluster_codes; on the diagonal over pairs of two rows of one, 0 where it has one row.

    >>> wording_matrix([[1, 0.5, 0.2], [0.5, 1, 0.4], [0.2, 0.4, 1]], ["a", "a", "b"]).round(3)
    array([[0.5, 0.3],
           [0.3, 0. ]])
    """
    similarity, code = np.array(similarity, float), cluster_codes(clusters)[0]
    if similarity.shape != (len(code), len(code)) or not np.isfinite(similarity).all():
        raise UserError(
            f"similarity {similarity.shape} beside {len(code)} clusters, or not finite; expected "
            "one "
            "row and column an instruction."
        )
    np.fill_diagonal(similarity, 0)
    member = (code == np.arange(code.max() + 1)[:, None]).astype(float)  # [K, I]
    size = member.sum(1)
    pairs = np.outer(size, size) - np.diag(size)
    return member @ similarity @ member.T / np.maximum(pairs, 1)


@takes(similarity="I I", labels="... I", halves="I", weights="R I")
def gap_across(similarity, labels, halves, weights=None) -> np.ndarray:
    """Mean similarity of two instructions of one category minus of two categories, one of each
    half: [R]. (Ours.)

    similarity [I, I]; labels int [I] or [R, I]; halves [I], two kinds; weights [R, I] as in
    category_matrix. Every pair weighs the same.
    """
    first, labels = np.asarray(halves) == np.unique(halves)[0], np.atleast_2d(labels)
    weights = (
        np.ones(labels.shape, np.float32) if weights is None else np.asarray(weights, np.float32)
    )
    block = np.asarray(similarity, np.float32)[first][:, ~first]  # [A, B]

    def total(chosen):  # [R, I] -> sum over pairs, number of pairs
        a, b = chosen[:, first], chosen[:, ~first]
        return ((a @ block) * b).sum(1, dtype=float), a.sum(1, dtype=float) * b.sum(1, dtype=float)

    everyone, pairs = total(weights)
    own, alike = np.sum(
        [total(np.where(labels == c, weights, 0)) for c in np.unique(labels)], axis=0
    )
    if (alike <= 0).any() or (pairs <= alike).any():
        raise NotTestable(
            "no pair of one category, or of two, stands across the halves; expected both. Not "
            "testable."
        )
    return own / alike - (everyone - own) / (pairs - alike)


def _profiles(routing) -> np.ndarray:
    """Routing shares that sum to 1 over experts, float64."""
    routing = np.asarray(routing, float)
    total = routing.sum(-1, keepdims=True)
    if (total <= 0).any():
        raise NotTestable(
            f"{(total <= 0).sum()} routing profiles are empty; expected routed tokens in every "
            "layer. "
            "Drop instructions without a counted token."
        )
    return routing / total


@takes(first="... E", second="... E")
def jensen_shannon(first, second) -> np.ndarray:
    """Jensen-Shannon similarity of routing profiles, 1 - divergence in bits: [..., E] x [..., E]
    -> [...], 1 = equal.

    Frequencies or counts: each is normalised over experts, so profiles of different lengths
    compare.

    >>> float(jensen_shannon(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])))
    0.0
    """
    alongside(first, second=second)
    first, second = _profiles(first), _profiles(second)
    middle = entr((first + second) / 2).sum(-1) - (entr(first).sum(-1) + entr(second).sum(-1)) / 2
    return np.clip(1 - middle / np.log(2), 0, 1)


@takes(routing="I L E")
def routing_similarity(routing) -> np.ndarray:
    """Jensen-Shannon similarity of all pairs of instructions from f or counts [I, L, E], mean over
    layers: float32 [I, I]. About 20 s for 1,200 x 24 x 60.
    """
    profiles = _profiles(routing)
    size, entropy = len(profiles), entr(profiles).sum(-1)  # [I, L]
    similarity = np.empty((size, size), np.float32)
    for i in range(size):
        mixed = entr((profiles[i] + profiles[i:]) / 2).sum(-1)  # [I - i, L]
        row = np.clip(1 - (mixed - (entropy[i] + entropy[i:]) / 2) / np.log(2), 0, 1)
        similarity[i, i:] = similarity[i:, i] = row.mean(1)
    return similarity


@takes(sets="I M?", labels="I", folds="I")
def nearest_consensus(sets, labels, folds, tau=0.5) -> dict:
    """Guess each instruction's category as the consensus set it overlaps most (Jaccard),
    cross-fitted over folds.

    folds: int [I], e.g. the halves; a row is judged by consensus sets of the other folds only.
    Returns `correct` [I] (credit 1, or 1/k if k sets tie), `accuracy`, `per_category` [C], `guess`
    [I] (-1 where sets tie), `chance` = 1/C.
    """
    labels, folds = codes(labels), np.asarray(folds)
    if len(np.unique(folds)) < 2:
        raise NotTestable(
            "one fold only; expected at least two (e.g. both halves), so that no instruction is "
            "judged "
            "by a set it helped to define. One half is missing?"
        )
    correct, guess = np.zeros(len(labels)), np.full(len(labels), -1)
    for fold in np.unique(folds):
        held = folds == fold
        if set(labels[~held]) != set(labels):
            raise NotTestable(
                f"outside fold {fold} a category has no instruction; expected each in every fold."
            )
        centres = consensus(_rows(sets, ~held), labels[~held], tau)  # [C, M]
        if not centres.any():
            raise NotTestable(
                f"all consensus sets are empty at tau {tau}; expected one component at least. "
                "Lower tau."
            )
        shared, sizes = 0, 0
        for part, block in column_blocks(_rows(sets, held)):
            shared, sizes = (
                shared + block @ centres[:, part].T.astype(np.float32),
                sizes + block.sum(1),
            )
        overlap = jaccard(shared, sizes[:, None], centres.sum(1))  # [held, C]
        best = overlap >= overlap.max(1, keepdims=True)
        correct[held] = best[np.arange(held.sum()), labels[held]] / best.sum(1)
        guess[held] = np.where(best.sum(1) == 1, best.argmax(1), -1)
    size = labels.max() + 1
    return {
        "correct": correct,
        "accuracy": correct.mean(),
        "guess": guess,
        "chance": 1 / size,
        "per_category": np.array([correct[labels == c].mean() for c in range(size)]),
    }


def _rows(sets, chosen):
    """The chosen rows, packed sets staying packed."""
    return type(sets)(sets.bits[chosen], sets.width) if hasattr(sets, "bits") else sets[chosen]


@takes(base="I M?", tuned="I M?")
def churn(base, tuned, layers=1) -> dict:
    """What became of each instruction's set from base to tuned: `kept`, `gained`, `lost`, int [I,
    L] (components per layer, M = layers x N), and `jaccard` [I] over all layers. Also for two
    halves of one model (noise floor).
    """
    if base.shape != tuned.shape or base.shape[1] % layers:
        raise UserError(
            f"base sets {base.shape}, tuned sets {tuned.shape}, {layers} layers; expected the same "
            "instructions and components, and whole layers. Were they captured on the same rows?"
        )
    result = {name: np.zeros((base.shape[0], layers), int) for name in ("kept", "gained", "lost")}
    for i in range(base.shape[0]):
        old, new = base[i].reshape(layers, -1), tuned[i].reshape(layers, -1)
        for name, members in (("kept", old & new), ("gained", new & ~old), ("lost", old & ~new)):
            result[name][i] = np.count_nonzero(members, axis=1)
    kept, gained, lost = (result[name].sum(1) for name in ("kept", "gained", "lost"))
    _no_empty(kept + gained + lost, "unions of a base and a tuned set")
    return result | {"jaccard": jaccard(kept, kept + lost, kept + gained)}


def noise_floor(base_halves, tuned_halves, epsilon, layers=1, rule="quantile", seed=0) -> dict:
    """Churn that counting noise alone makes, and churn from base to tuned, at the same number of
    tokens.

    base_halves, tuned_halves: two count arrays [I, ...] each, of disjoint token positions of one
    model (from capture). `base` and `tuned`, half against half in one model, are the floor;
    `across` sums base-first/tuned-second and base-second/tuned-first. Full counts have more tokens
    and so less noise than this floor: compare `across` with `base` and `tuned`, never full-count
    churn. Each is a dict like churn's.
    """
    sets = [
        top_sets(half, epsilon, rule, seed + n)[0]
        for n, half in enumerate((*base_halves, *tuned_halves))
    ]
    one, other = churn(sets[0], sets[3], layers), churn(sets[1], sets[2], layers)
    across = {name: one[name] + other[name] for name in ("kept", "gained", "lost")}
    return {
        "base": churn(*sets[:2], layers),
        "tuned": churn(*sets[2:], layers),
        "across": across | {"jaccard": (one["jaccard"] + other["jaccard"]) / 2},
    }


@takes(base="I L E!", tuned="I L E!")
def agreement(base, tuned) -> np.ndarray:
    """Top-k agreement |A & B| / |A| per instruction and layer, [I, L], of expert sets [I, L, E] of
    equal size K.
    """
    size = base.sum(-1)
    if (size != tuned.sum(-1)).any() or (size == 0).any():
        raise UserError(
            "expert sets of base and tuned differ in size or are empty; expected K experts in "
            "each. "
            "Use top_experts with the same k for both."
        )
    return (base & tuned).sum(-1) / size
