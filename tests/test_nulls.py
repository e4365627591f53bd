"""Matched nulls and thinned counts, against brute-force redraws and hand-worked cases."""

import numpy as np
import planted_counts
import pytest
from scipy.stats import betabinom

from helpers.analysis import nulls
from helpers.analysis.sets import consensus, nominal_size, pack, top_sets
from helpers.analysis.similarity import gap, jaccard_matrix
from helpers.record import NotTestable, UserError

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
    assert np.allclose(
        tokens @ q, np.clip(total, 0.5, tokens.sum() - 0.5), rtol=1e-3
    )  # the component's mean rate


@pytest.mark.parametrize("rule", ["quantile", "exact"])
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_closed_form_is_the_mean_of_brute_force_redraws(counts, rng, rule, epsilon):
    counts, tokens = counts
    null = nulls.rate_null(counts, tokens, nominal_size(WIDTH, epsilon), rule)
    q, _ = nulls._fit(
        counts.sum(0), np.ones(WIDTH), tokens, counts.sum(1) / tokens, 0.5 / tokens.sum()
    )
    sets = [
        top_sets(rng.binomial(tokens[:, None], q), epsilon, rule, seed)[0] for seed in range(60)
    ]
    drawn = np.mean([jaccard_matrix(s) for s in sets], 0)
    expected = nulls.expected_jaccard(null)
    assert abs(off_diagonal(drawn).mean() - off_diagonal(expected).mean()) < 0.004
    assert abs(drawn - expected).max() < 0.03
    sizes = null.inclusion @ np.bincount(null.group)
    assert abs(sizes / np.mean([s.sum(1) for s in sets], 0) - 1).max() < 0.06
    redrawn = np.mean(
        [
            jaccard_matrix(
                rng.random((len(sets[0]), len(null.group))) < null.inclusion[:, null.group]
            )
            for _ in range(20)
        ],
        0,
    )
    assert abs(off_diagonal(redrawn).mean() - off_diagonal(expected).mean()) < 0.004


def test_margins_alone_make_the_same_null(counts):
    counts, tokens = counts
    whole, level = nulls.rate_null(counts, tokens, 150), (counts / tokens[:, None]).mean(1)
    margins = nulls.null_of(7.0 * counts.sum(0), level, tokens, 150)  # any multiple of the totals
    assert np.allclose(whole.inclusion, margins.inclusion, atol=1e-6)
    assert (whole.group == margins.group).all()
    with pytest.raises(NotTestable, match="all 0 or all T"):
        nulls.null_of(counts.sum(0), level * (np.arange(30) > 0), tokens, 150)


def test_inclusion_is_the_beta_binomial_tail():
    """One instruction, one far cut: P(count >= cut) from scipy."""
    q, theta, length = np.array([0.2, 0.5]), np.array([0.25, 0.0]), 12
    members = np.array([1e6, 1e6])
    alpha, beta = 0.2 / 0.25, 0.8 / 0.25
    tail = np.array(
        [betabinom.sf(6, length, alpha, beta), betabinom.sf(6, length, 2e9, 2e9)]
    )  # P(count >= 7)
    got = nulls._included(q, length, theta, members, tail @ members * 0.99, "quantile")
    assert np.allclose(got, tail, atol=1e-4)


def test_bursts_lower_the_overlap_and_the_second_null_keeps_them(rng):
    """Counts of correlated tokens (rho 0.2): independent redraws expect too much overlap,
    dependent ones the right.
    """
    tokens, rate = rng.integers(15, 40, 40), rng.beta(1, 2, WIDTH) * 0.98 + 0.01
    bursts = rng.binomial(
        tokens[:, None], rng.beta(4 * rate, 4 * (1 - rate), (40, WIDTH))
    )  # rho = 1 / (1 + 4)
    observed = off_diagonal(jaccard_matrix(top_sets(bursts, 0.05)[0])).mean()
    size, level = nominal_size(WIDTH, 0.05), {}
    for dependence in (False, True):
        null = nulls.rate_null(bursts, tokens, size, dependence=dependence)
        level[dependence] = off_diagonal(nulls.expected_jaccard(null)).mean()
    assert level[False] > observed + 0.1
    assert abs(level[True] - observed) < 0.02
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
        gaps.append(
            [
                gap(jaccard_matrix(top_sets(drawn, 0.05)[0]), labels),
                gap(nulls.expected_jaccard(null), labels),
            ]
        )
    (length, explained), (category, nothing) = gaps
    assert length > 0.03
    assert abs(explained - length) < 0.01
    assert category > 0.1
    assert abs(nothing) < 0.005


def test_redrawn_routing_keeps_rates_lengths_and_k(rng):
    tokens, rate = rng.integers(20, 60, 50), np.array([0.9, 0.5, 0.3, 0.2, 0.1, 0.0])  # K = 2
    routed = np.stack(
        [np.stack([rng.multinomial(2 * t, rate / 2) for _ in range(3)]) for t in tokens]
    )
    routed = np.minimum(routed, tokens[:, None, None])
    routed[..., 1] += 2 * tokens[:, None] - routed.sum(-1)
    drawn = np.stack([nulls.redraw_routing(routed, tokens, seed) for seed in range(40)])
    assert (drawn.sum(-1) == 2 * tokens[:, None]).all()
    assert (drawn <= tokens[:, None, None]).all()
    assert np.allclose(
        drawn.sum((0, 1)) / (40 * tokens.sum()), routed.sum(0) / tokens.sum(), atol=0.005
    )
    spread = drawn[:, 3, 0, 2].var() / (tokens[3] * 0.3 * 0.7)  # tokens independent: binomial
    assert 0.4 < spread < 1.9
    assert (nulls.redraw_routing(routed, tokens, 1) == drawn[1]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nulls.rate_null(np.array([[0, 0], [1, 2]]), [4, 4], 1), "all 0 or all T"),
        (lambda: nulls.rate_null(np.array([[4, 4], [1, 2]]), [4, 4], 1), "all 0 or all T"),
        (lambda: nulls.rate_null(np.full((2, 3), 6), [5, 6], 1), "counts <= T"),
        (
            lambda: nulls.rate_null(np.ones((2, 3), int), [5], 1),
            r"tokens has the shape \[1\]",
        ),
    ],
)
def test_bad_input_is_said_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_membership_of_the_null_is_that_of_brute_force_redraws(rng):
    """Inclusion given: consensus sets of sets drawn from it, counted."""
    inclusion, group = rng.random((30, 6)).astype(np.float32), np.repeat(np.arange(6), 20)
    null, labels = nulls.Null(inclusion, group, np.zeros(6)), np.repeat([0, 1, 2], [8, 10, 12])
    found = nulls.membership_test(np.ones((30, 120), bool), null, labels, 0.6, 500)
    numbers, unique = np.zeros(4), np.zeros(3)
    for _ in range(400):
        member = consensus(rng.random((30, 120)) < inclusion[:, group], labels, 0.6)
        numbers += np.bincount(member.sum(0), minlength=4) / 400
        unique += (member & (member.sum(0) == 1)).sum(1) / 400
    assert np.allclose(found["expected"], numbers[1:], atol=1.0)
    assert np.allclose(found["unique"]["expected"], unique, atol=1.0)
    assert found["observed"].tolist() == [0, 0, 120]
    assert found["p"].tolist() == [1, 1, pytest.approx(1 / 501)]


def test_membership_is_level_under_rates_and_finds_unique_components():
    rng, p = np.random.default_rng(5), []
    for seed in range(40):
        world = planted_counts.counts(rng, planted_counts.even(3, 12, 1), 400, row=0.0)
        sets, _ = top_sets(world.counts, 0.1)
        null = nulls.rate_null(world.counts, world.tokens, nominal_size(400, 0.1))
        found = nulls.membership_test(sets, null, world.labels, 0.5, 99, seed)
        p.append([*found["p"], *found["unique"]["p"]])
    assert np.mean(np.array(p) <= 0.05) <= 0.08
    world = planted_counts.counts(rng, planted_counts.even(3, 12, 1), 400, serving=(6, 3.0))
    sets, _ = top_sets(world.counts, 0.1)
    null = nulls.rate_null(world.counts, world.tokens, nominal_size(400, 0.1))
    unique = nulls.membership_test(pack(sets), null, world.labels, 0.5, 99)["unique"]
    assert (unique["p"] <= 0.03).all()
    assert (unique["observed"] >= unique["expected"] + 2).all()
