"""What overlap to expect when nothing but rates and lengths is at work: matched nulls, and counts
at fewer tokens.

A null is `inclusion` [I, G], the probability that the set of instruction i holds a component of
group g, and `group` [M], each component's group. Given these, components enter independently:
co-firing beyond rates is what a null lacks.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, logit, ndtr
from scipy.stats import hypergeom

from ..record import NotTestable, UserError
from .checks import takes
from .sets import codes, consensus, membership
from .similarity import jaccard
from .stats import Permutation, plus_one

BINS = 512  # steps of log odds: components within one share their rate


class Null(NamedTuple):
    """inclusion [I, G] in [0, 1]; group, int [M]; dispersion [G], the token-level dependence kept
    (0 = none).
    """

    inclusion: np.ndarray
    group: np.ndarray
    dispersion: np.ndarray


def _check(counts, tokens):
    rows = counts.shape[0]
    if rows != len(tokens) or any(np.max(counts[i]) > tokens[i] for i in range(rows)):
        raise UserError(
            f"{rows} rows of counts with {len(tokens)} token numbers, or counts above them; "
            "expected one T "
            "per row and counts <= T. Take both from the same capture."
        )
    if (tokens < 1).any():
        raise NotTestable(
            f"{(tokens < 1).sum()} instructions have no token; expected none. Leave them out."
        )


def _rows(counts):
    for i in range(counts.shape[0]):
        yield np.asarray(counts[i]).reshape(-1).astype(float)  # [M]


@takes(counts="I ...", tokens="I")
def rate_null(counts, tokens, size, rule="quantile", dependence=False) -> Null:
    """The rate-matched null: every component keeps its mean rate, every instruction its T and its
    overall level.

    counts: integers [I, ...], read row by row; tokens: T [I]; size: k, the nominal set size; rule
    as in top_sets. Rates are q = expit(component + instruction), fitted so that both margins are
    kept; counts are redrawn independently and cut as top_sets cuts, in closed form. Components of
    like rate (BINS steps of log odds) share q. dependence=False redraws tokens independently
    (binomial): what instructions of identical behaviour would show. It does not keep that a
    component fires in bursts (a word twice, a topic), which makes real counts differ more and
    overlap less. dependence=True keeps that on average: beta-binomial counts with the intraclass
    correlation of each rate group, by moments; it also holds what categories really do, so this
    null has the realistic *level* of overlap, and neither has a *gap* but by length and level.
    Neither keeps which components fire together, nor that an expert's neurons fire only when it is
    chosen. Cost: under 1 s for 1,200 x 8,192 at T = 40, no draws needed.
    """
    tokens, total, level = np.asarray(tokens), 0, []
    _check(counts, tokens)
    for row, length in zip(_rows(counts), tokens, strict=True):
        total = total + row
        level.append(row.mean() / length)
    theta = (lambda *margins: _dispersion(counts, tokens, *margins)) if dependence else None
    return null_of(total, np.array(level), tokens, size, rule, theta)


@takes(total="M", level="I", tokens="I")
def null_of(total, level, tokens, size, rule="quantile", theta=None) -> Null:
    """rate_null from its margins alone: `total` [M], a component's counts over all instructions
    (any multiple of it), `level` [I], an instruction's mean p over components, `tokens` [I].
    theta(q, group, members): see _dispersion.
    """
    if (tokens < 1).any() or not np.sum(total) > 0:
        raise NotTestable("no token, or no count at all; expected some. Leave such rows out.")
    if (level <= 0).any() or (level >= 1).any():
        raise NotTestable(
            "an instruction's counts are all 0 or all T; expected some that fire and some that do "
            "not. "
            "Leave it out (see top_sets' report)."
        )
    total = np.asarray(total, float) * (level @ tokens) * len(total) / np.sum(total)
    edge = 0.5 / tokens.sum()
    rate = logit(np.clip(total / tokens.sum(), edge, 1 - edge))
    step = max(np.ptp(rate), 1e-9) / BINS
    group = np.unique(np.round((rate - rate.min()) / step).astype(int), return_inverse=True)[1]
    members = np.bincount(group).astype(float)  # [G]
    q, target = _fit(np.bincount(group, total) / members, members, tokens, level * len(total), edge)
    theta = theta(q, group, members) if theta else np.zeros(len(members))
    inclusion = np.stack(
        [
            _included(row, int(length), theta, members, size, rule)
            for row, length in zip(q, tokens, strict=True)
        ]
    )
    return Null(inclusion.astype(np.float32), group, theta)


def _fit(totals, members, tokens, level, edge):
    """q [I, G] with sum_i T q = the group's mean total and sum_g members q = the instruction's
    level (Newton steps).
    """
    share = np.clip(totals / tokens.sum(), edge, 1 - edge)
    component, shift = logit(share), np.zeros((len(tokens), 1))
    for _ in range(50):
        q = expit(component + shift)
        move = (level - q @ members) / ((q * (1 - q)) @ members)
        shift += np.clip(move, -1, 1)[:, None]
        q = expit(component + shift)
        change = (share * tokens.sum() - tokens @ q) / (tokens @ (q * (1 - q)))
        component += np.clip(change, -1, 1)
        if max(np.abs(move).max(), np.abs(change).max()) < 1e-6:
            break
    return expit(component + shift), share


def _dispersion(counts, tokens, q, group, members):
    """theta = rho / (1 - rho) [G], rho the correlation of a component's tokens within an
    instruction, by moments.
    """
    squares = np.zeros(len(members))
    for row, length, rates in zip(_rows(counts), tokens, q, strict=True):
        squares += np.bincount(group, (row - length * rates[group]) ** 2)
    variance = q * (1 - q) * members
    rho = (squares - tokens @ variance) / np.maximum((tokens * (tokens - 1)) @ variance, 1e-9)
    rho = np.clip(rho, 0, 0.95)
    return rho / (1 - rho)


def _included(q, length, theta, members, size, rule):
    """Probability [G] that a component reaches the cut (k-th largest count) of its instruction,
    from rates q [G].
    """
    t = np.arange(length)[:, None]
    ratio = np.log((length - t) / (t + 1)) + np.log(
        (q + t * theta) / (1 - q + (length - t - 1) * theta)
    )
    weight = np.vstack([np.zeros(len(q)), ratio.cumsum(0)])  # log P(count = t) - log P(count = 0)
    weight = np.exp(weight - weight.max(0))
    exactly = weight / weight.sum(0)  # [T + 1, G]
    tail = np.minimum(exactly[::-1].cumsum(0)[::-1], 1)  # P(count >= t)
    expected = tail @ members  # components with a count >= t
    if rule == "exact":
        cut = np.flatnonzero(expected >= size - 1e-9)[-1]
        above = expected[cut + 1] if cut < length else 0
        return tail[cut] - exactly[cut] * (expected[cut] - size) / max(expected[cut] - above, 1e-12)
    spread = np.sqrt((tail * (1 - tail)) @ members)
    reached = ndtr(
        (expected - size + 0.5) / np.maximum(spread, 1e-9)
    )  # P(cut >= t), normal approximation
    reached[0] = 1
    return (reached - np.append(reached[1:], 0)) @ tail


def expected_jaccard(null) -> np.ndarray:
    """Expected pairwise Jaccard under a null, float32 [I, I]: expected shared / expected union. No
    draws: the mean of infinitely many. The ratio, and rates fitted to the same counts, expect
    slightly too little, by about 0.2 / set size: .0008 at 230 members, .0035 at 67.

    Sets drawn by a null's rates, of sizes that vary. For uniform random sets of given sizes per
    layer, see `chance_jaccard`.
    """
    members = np.bincount(null.group).astype(np.float32)
    sizes = null.inclusion @ members
    if (sizes <= 0).any():
        raise NotTestable(
            "the null expects empty sets; expected one component at least. Not testable: raise "
            "epsilon."
        )
    shared = (null.inclusion * members) @ null.inclusion.T
    expected = jaccard(shared, sizes[:, None], sizes).astype(np.float32)
    np.fill_diagonal(expected, 1)
    return expected


@takes(first="L", second="L", pool="L")
def chance_jaccard(first, second, pool) -> float:
    """Expected Jaccard of two random sets of `first` [L] and `second` [L] members per layer, each
    drawn from the same `pool` [L] components of its layer: exact, by the distribution of their
    common members (sum of hypergeometrics).

    >>> round(chance_jaccard([1], [1], [4]), 3)
    0.25
    """
    first, second, pool = (np.asarray(x, int) for x in (first, second, pool))
    if min(first.min(), second.min()) < 0:
        raise UserError("a set of less than no member; expected sizes of 0 or more.")
    if (np.maximum(first, second) > pool).any() or not (first.sum() + second.sum()):
        raise UserError(
            f"sets of {first.tolist()} and {second.tolist()} from pools of {pool.tolist()}; "
            "expected sets "
            "that fit into their pools, and one member at least."
        )
    common = np.ones(1)  # distribution of the number in common
    for a, b, n in zip(first, second, pool, strict=True):
        common = np.convolve(common, hypergeom.pmf(np.arange(min(a, b) + 1), n, a, b))
    shared = np.arange(len(common))
    return float((common * shared / (first.sum() + second.sum() - shared)).sum())


@takes(sets="I M", labels="I")
def membership_test(sets, null, labels, tau=0.5, resamples=2000, seed=0) -> dict:
    """Membership of consensus sets (in how many of the C a component stands) against what a null
    expects: are there more unique components, and more general ones, than rates and lengths make?

    sets: bool [I, M] or PackedSets; null: of the same instructions, e.g. rate_null. Given the
    null, a component is in C_tau with the Poisson-binomial probability that enough of the
    category's instructions hold it, independently of other components and categories. Returns
    `observed`, `expected` [C] (components in exactly 1..C sets), `p` [C] (more than expected,
    one-sided), `unique` {observed, expected, p, detectable}, arrays [C]: components unique to each
    category; `detectable` [C].
    """
    labels = codes(labels)
    if (len(null.inclusion), len(null.group)) != tuple(sets.shape):
        raise UserError(
            f"sets {list(sets.shape)} beside a null of {len(null.inclusion)} instructions and "
            f"{len(null.group)} components; expected the same. Make the null of these rows."
        )
    member, size = consensus(sets, labels, tau), labels.max() + 1
    number = membership(member)
    chances = np.stack([_in_consensus(null.inclusion[labels == c], tau) for c in range(size)])
    members, rng = np.bincount(null.group), np.random.default_rng(seed)
    total = _number_in(chances)  # [C + 1, G]
    only = chances * np.stack(
        [np.prod(np.delete(1 - chances, c, 0), 0) for c in range(size)]
    )  # [C, G]: in this one alone
    outcomes = np.clip(np.vstack([total[:1], only, total[2:]]), 0, None)
    drawn = np.zeros((resamples, len(outcomes)), int)
    for many, chance in zip(members, (outcomes / outcomes.sum(0)).T, strict=True):
        drawn += rng.multinomial(many, chance, resamples)
    alone, several = drawn[:, 1 : size + 1], drawn[:, size + 1 :]
    redrawn = np.column_stack([alone.sum(1), several])
    observed = np.bincount(number, minlength=size + 1)[1:]
    unique = (member & (number == 1)).sum(1)
    whole, own = (
        Permutation(o, plus_one(o, d), d) for o, d in ((observed, redrawn), (unique, alone))
    )
    return {
        "observed": observed,
        "expected": total[1:] @ members,
        "p": whole.p,
        "detectable": whole.detectable,
        "unique": {
            "observed": unique,
            "expected": only @ members,
            "p": own.p,
            "detectable": own.detectable,
        },
    }


def _number_in(chances) -> np.ndarray:
    """P(exactly k of n independent events) [n + 1, G] from their probabilities [n, G]."""
    found = np.zeros((len(chances) + 1, chances.shape[1]))
    found[0] = 1
    for chance in np.asarray(chances, float):
        found[1:] = found[1:] * (1 - chance) + found[:-1] * chance
        found[0] *= 1 - chance
    return found


def _in_consensus(inclusion, tau) -> np.ndarray:
    """P(a component is in the consensus set) [G] from its inclusion [instructions, G]."""
    needed = int(np.ceil(tau * len(inclusion) - 1e-4))
    return np.clip(_number_in(inclusion)[needed:].sum(0), 0, 1)


@takes(routed="I L E!", tokens="I!")
def redraw_routing(routed, tokens, seed=0) -> np.ndarray:
    """Routing counts redrawn from mean rates: same shape [I, L, E] and dtype, still K experts per
    token.

    Every expert keeps its layer's mean frequency, every instruction its T; each token chooses K
    distinct experts, independently of all other tokens (systematic sampling with the mean
    frequencies as inclusion probabilities, in an order of experts shuffled for each layer). What
    goes with the instruction is lost. Ours.
    """
    routed, tokens, rng = np.asarray(routed), np.asarray(tokens), np.random.default_rng(seed)
    if (tokens < 1).any():
        raise NotTestable("an instruction has no token; expected one at least. Leave it out.")
    rate = routed.sum(0, dtype=float) / tokens.sum()  # [L, E], sums to K
    owner, result = np.repeat(np.arange(len(tokens)), tokens), np.zeros(routed.shape, routed.dtype)
    for layer, mean in enumerate(rate):
        order = rng.permutation(len(mean))
        edges = mean[order].cumsum()  # [E]
        picks = rng.random((len(owner), 1)) + np.arange(round(edges[-1]))  # [tokens, K]
        chosen = order[np.minimum(np.searchsorted(edges, picks), len(mean) - 1)]
        np.add.at(result, (owner[:, None], layer, chosen), 1)
    return result
