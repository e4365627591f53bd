"""Matched nulls and thinned counts, against brute-force redraws and hand-worked cases."""

import numpy as np
import pytest
from scipy.stats import betabinom

from helpers import nulls
from helpers.components import frequency, nominal_size, pack, top_sets
from helpers.overlap import gap, jaccard_matrix
from helpers.record import UserError
from helpers.stats import length_strata

WIDTH = 3000


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def counts(rng):
    """Instructions of different length and level, no categories: tokens independent."""
    tokens = rng.integers(8, 60, 30)
    odds = rng.normal(-1, 1.5, WIDTH) + rng.normal(0, 0.4, (30, 1))
    return rng.binomial(tokens[:, None], 1 / (1 + np.exp(-odds))), tokens


def off_diagonal(matrix):
    return matrix[~np.eye(len(matrix), dtype=bool)]


def test_fitted_rates_keep_both_margins(counts):
    counts, tokens = counts
    total, members = counts.sum(0), np.ones(WIDTH)
    q, share = nulls._fit(total, members, tokens, counts.sum(1) / tokens, 0.5 / tokens.sum())
    assert np.allclose(q.sum(1), counts.sum(1) / tokens, rtol=1e-3)  # the instruction's level
    assert np.allclose(tokens @ q, np.clip(total, 0.5, tokens.sum() - 0.5), rtol=1e-3)  # the component's mean rate


@pytest.mark.parametrize("rule", ["quantile", "exact"])
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_closed_form_is_the_mean_of_brute_force_redraws(counts, rng, rule, epsilon):
    counts, tokens = counts
    null = nulls.rate_null(counts, tokens, nominal_size(WIDTH, epsilon), rule)
    q, _ = nulls._fit(counts.sum(0), np.ones(WIDTH), tokens, counts.sum(1) / tokens, 0.5 / tokens.sum())
    sets = [top_sets(rng.binomial(tokens[:, None], q), epsilon, rule, seed)[0] for seed in range(60)]
    drawn = np.mean([jaccard_matrix(s) for s in sets], 0)
    expected = nulls.expected_jaccard(null)
    assert abs(off_diagonal(drawn).mean() - off_diagonal(expected).mean()) < 0.004
    assert abs(drawn - expected).max() < 0.03
    sizes = null.inclusion @ np.bincount(null.group)
    assert abs(sizes / np.mean([s.sum(1) for s in sets], 0) - 1).max() < 0.06
    redrawn = np.mean([jaccard_matrix(nulls.draw_sets(null, seed)) for seed in range(20)], 0)
    assert abs(off_diagonal(redrawn).mean() - off_diagonal(expected).mean()) < 0.004


def test_inclusion_is_the_beta_binomial_tail():
    """One instruction, one far cut: P(count >= cut) from scipy."""
    q, theta, length = np.array([0.2, 0.5]), np.array([0.25, 0.0]), 12
    members = np.array([1e6, 1e6])
    alpha, beta = 0.2 / 0.25, 0.8 / 0.25
    tail = np.array([betabinom.sf(6, length, alpha, beta), betabinom.sf(6, length, 2e9, 2e9)])  # P(count >= 7)
    got = nulls._included(q, length, theta, members, tail @ members * 0.99, "quantile")
    assert np.allclose(got, tail, atol=1e-4)


def test_bursts_lower_the_overlap_and_the_second_null_keeps_them(rng):
    """Counts of correlated tokens (rho 0.2): independent redraws expect too much overlap, dependent ones the right."""
    tokens, rate = rng.integers(15, 40, 40), rng.beta(1, 2, WIDTH) * 0.98 + 0.01
    bursts = rng.binomial(tokens[:, None], rng.beta(4 * rate, 4 * (1 - rate), (40, WIDTH)))  # rho = 1 / (1 + 4)
    observed = off_diagonal(jaccard_matrix(top_sets(bursts, 0.05)[0])).mean()
    size, level = nominal_size(WIDTH, 0.05), {}
    for dependence in (False, True):
        null = nulls.rate_null(bursts, tokens, size, dependence=dependence)
        level[dependence] = off_diagonal(nulls.expected_jaccard(null)).mean()
    assert level[False] > observed + 0.1 and abs(level[True] - observed) < 0.02
    rho = null.dispersion / (1 + null.dispersion)
    assert abs(np.average(rho, weights=np.bincount(null.group)) - 0.2) < 0.02


def test_independent_tokens_have_no_dispersion(counts):
    null = nulls.rate_null(*counts, 150, dependence=True)
    assert np.average(null.dispersion, weights=np.bincount(null.group)) < 0.02


def test_the_null_explains_a_gap_made_of_length_and_keeps_none_of_a_category(rng):
    labels, odds = np.repeat([0, 1], 40), rng.normal(-1, 1.5, WIDTH)
    rate = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    lengths = np.where(labels == 0, 8, 120) + rng.integers(0, 4, 80)
    planted = odds + 0.7 * rng.normal(size=(2, WIDTH))[labels]
    gaps = []
    for tokens, z in ((lengths, odds), (np.full(80, 40), planted)):
        drawn = rng.binomial(tokens[:, None], rate(np.broadcast_to(z, (80, WIDTH))))
        null = nulls.rate_null(drawn, tokens, nominal_size(WIDTH, 0.05))
        gaps.append([gap(jaccard_matrix(top_sets(drawn, 0.05)[0]), labels), gap(nulls.expected_jaccard(null), labels)])
    (length, explained), (category, nothing) = gaps
    assert length > 0.03 and abs(explained - length) < 0.01
    assert category > 0.1 and abs(nothing) < 0.005


def test_inclusion_null_is_the_mean_of_shuffles_within_strata(rng):
    tokens = rng.integers(5, 50, 24)
    strata, sets = length_strata(tokens, 2), rng.random((24, 800)) < rng.beta(0.3, 2, 800)
    sets[strata == 0] |= rng.random((np.sum(strata == 0), 800)) < 0.1  # short ones: larger sets
    total = np.zeros((24, 24))
    for _ in range(300):
        shuffled = sets.copy()
        for s in (0, 1):
            shuffled[strata == s] = rng.permuted(shuffled[strata == s], axis=0)
        total += jaccard_matrix(shuffled)
    for given in (sets, pack(sets)):
        difference = off_diagonal(total / 300 - nulls.inclusion_null(given, strata))
        assert abs(difference).max() < 0.01 and abs(difference.mean()) < 0.002


def test_thinning_is_hypergeometric():
    counts, tokens = np.full((3, 20_000), 6, np.uint16), np.array([15, 9, 5 + 1])
    thinned = nulls.thin(counts, tokens, 6)
    assert thinned.dtype == np.uint16 and (thinned[2] == 6).all()  # all positions: nothing changes
    for row, length in zip(thinned[:2].astype(float), (15, 9), strict=True):
        mean, variance = 36 / length, 36 / length * (1 - 6 / length) * (length - 6) / (length - 1)
        assert abs(row.mean() - mean) < 5 * np.sqrt(variance / 20_000)
        assert abs(row.var() / variance - 1) < 0.06
    assert thinned[1].min() >= 3  # 6 of 9 drawn, 6 of 9 active
    assert (nulls.thin(counts, tokens, 6, seed=1) != thinned).any() and (nulls.thin(counts, tokens, 6) == thinned).all()


def test_thinning_keeps_the_overlap_of_real_positions_but_not_their_togetherness(rng):
    """Tokens that fire whole groups of neurons at once: drawing positions against thinning neuron by neuron."""
    lengths, kinds, size = rng.integers(20, 50, 24), rng.beta(1, 2, (12, 600)), 16
    fired = [rng.random((t, 600)) < kinds[rng.integers(0, 12, t)] for t in lengths]  # [T, M] of 12 kinds of token
    counts, exact, thinned = np.stack([f.sum(0) for f in fired]), [], []
    for seed in range(12):
        positions = np.stack([f[rng.choice(len(f), size, replace=False)].sum(0) for f in fired])
        exact.append(off_diagonal(jaccard_matrix(top_sets(positions, 0.05)[0])).mean())
        thinned.append(off_diagonal(jaccard_matrix(top_sets(nulls.thin(counts, lengths, size, seed), 0.05)[0])).mean())
    assert abs(np.mean(exact) - np.mean(thinned)) < 0.02
    assert np.std(exact) > 1.2 * np.std(thinned)  # the documented limit


def test_halves_are_disjoint_and_add_up(rng):
    tokens = np.array([10, 11, 2, 37])
    counts = rng.binomial(tokens[:, None, None], 0.4, (4, 3, 50)).astype(np.uint16)
    one, rest = nulls.split(counts, tokens)
    left = counts - one - rest
    assert (left[[0, 2]] == 0).all() and left.min() == 0 and left.max() == 1  # an odd length leaves one position over
    assert one.max() <= 18 and (frequency(one, tokens // 2) <= 1).all() and (frequency(rest, tokens // 2) <= 1).all()
    assert abs(one[3].mean() - rest[3].mean()) < 1
    assert (nulls.split(counts, tokens, 1)[0] != one).any()


def test_halves_scatter_like_real_halves(rng):
    """The noise floor from totals is that of actual odd and even positions, for independent tokens."""
    tokens, rate = np.full(40, 24), rng.beta(1, 2, 800)
    fired = rng.random((40, 24, 800)) < rate
    real = [top_sets(fired[:, n::2].sum(1), 0.05)[0] for n in (0, 1)]
    made = [top_sets(half, 0.05)[0] for half in nulls.split(fired.sum(1), tokens)]
    overlap = [np.diag(jaccard_matrix(*pair)).mean() for pair in (real, made)]
    assert abs(overlap[0] - overlap[1]) < 0.02


def test_redrawn_routing_keeps_rates_lengths_and_k(rng):
    tokens, rate = rng.integers(20, 60, 50), np.array([0.9, 0.5, 0.3, 0.2, 0.1, 0.0])  # K = 2
    routed = np.stack([np.stack([rng.multinomial(2 * t, rate / 2) for _ in range(3)]) for t in tokens])
    routed = np.minimum(routed, tokens[:, None, None])
    routed[..., 1] += 2 * tokens[:, None] - routed.sum(-1)
    drawn = np.stack([nulls.redraw_routing(routed, tokens, seed) for seed in range(40)])
    assert (drawn.sum(-1) == 2 * tokens[:, None]).all() and (drawn <= tokens[:, None, None]).all()
    assert np.allclose(drawn.sum((0, 1)) / (40 * tokens.sum()), routed.sum(0) / tokens.sum(), atol=0.005)
    spread = drawn[:, 3, 0, 2].var() / (tokens[3] * 0.3 * 0.7)  # tokens independent: binomial
    assert 0.4 < spread < 1.9 and (nulls.redraw_routing(routed, tokens, 1) == drawn[1]).all()


@pytest.mark.parametrize("call, message", [
    (lambda: nulls.rate_null(np.array([[0, 0], [1, 2]]), [4, 4], 1), "all 0 or all T"),
    (lambda: nulls.rate_null(np.array([[4, 4], [1, 2]]), [4, 4], 1), "all 0 or all T"),
    (lambda: nulls.inclusion_null(np.zeros((4, 3), bool), [0, 0, 1, 1]), "empty sets"),
    (lambda: nulls.thin(np.ones((2, 3), int), [5, 3], 4), "1 instructions have fewer than 4 tokens"),
    (lambda: nulls.thin(np.ones((2, 3), int), [5, 3], 0), "at least 1 position"),
    (lambda: nulls.thin(np.full((2, 3), 6), [5, 6], 4), "counts <= T"),
    (lambda: nulls.rate_null(np.ones((2, 3), int), [5], 1), "2 rows of counts with 1 token numbers"),
    (lambda: nulls.split(np.ones((2, 3), int), [5, 1]), "1 instructions have fewer than 2 tokens"),
])
def test_bad_input_is_said_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()
