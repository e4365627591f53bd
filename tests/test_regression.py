"""Regression on pairs: against plain least squares, without an effect, with a planted one, and
where nothing is to test.
"""

import numpy as np
import pytest
from scipy.stats import kstest

from helpers.analysis.regression import excess, excess_of_wordings, same
from helpers.analysis.similarity import wording_matrix
from helpers.analysis.stats import length_strata, resample_weights
from helpers.record import NotTestable


def pairwise(values):
    return -np.abs(np.subtract.outer(values, values))


def world(seed, effect=0.0, per_category=12, words=0.6):
    """Instructions whose length and vocabulary go with their category; similarity follows both,
    plus `effect`.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(6), per_category)
    tokens = rng.poisson(18 + 3 * labels)
    topic = rng.random((len(labels), 60)) < 0.2 + words * (np.arange(60) % 6 == labels[:, None])
    shared = (topic.astype(float) @ topic.T) / 60
    noise, own = rng.normal(0, 0.01, (len(labels),) * 2), rng.normal(0, 0.02, len(labels))
    apart = np.abs(np.subtract.outer(tokens, tokens)).astype(float)
    similarity = (
        0.3
        + 0.5 * shared
        - 0.004 * apart
        + own[:, None]
        + own
        + noise
        + noise.T
        + effect * same(labels)
    )
    return similarity, labels, (shared, apart), length_strata(tokens, 4)


def by_hand(similarity, labels, covariates, weights, across=None):
    """Rows = pairs of drawn instructions, copies of one instruction left out; numpy's least
    squares.
    """
    drawn = np.repeat(np.arange(len(labels)), weights.astype(int))
    i, j = np.meshgrid(drawn, drawn, indexing="ij")
    keep = i != j if across is None else across[i] != across[j]
    design = np.stack(
        [np.ones(keep.sum()), same(labels)[i, j][keep], *(c[i, j][keep] for c in covariates)], 1
    )
    return np.linalg.lstsq(design, similarity[i, j][keep], rcond=None)[0][1]


def test_coefficient_and_resamples_are_those_of_plain_least_squares():
    similarity, labels, covariates, strata = world(0, 0.02)
    found = excess(similarity, labels, covariates, strata, resamples=40, seed=3)
    assert np.isclose(
        found.estimate, by_hand(similarity, labels, covariates, np.ones(len(labels))), atol=1e-5
    )
    weights = resample_weights(labels, 40, 3)
    again = [by_hand(similarity, labels, covariates, w) for w in weights]
    assert np.allclose([found.low, found.high], np.quantile(again, [0.025, 0.975]), atol=1e-5)


def test_only_the_pairs_asked_for_count():
    similarity, labels, covariates, strata = world(1, 0.02)
    half = np.arange(len(labels)) % 2
    spoilt = np.where(half[:, None] != half, similarity, 99.0)
    one, other = (
        excess(s, labels, covariates, strata, 20, across=half) for s in (similarity, spoilt)
    )
    assert np.allclose(one, other, atol=1e-6)
    weights = np.ones(len(labels))
    assert np.isclose(
        one.estimate, by_hand(similarity, labels, covariates, weights, half), atol=1e-5
    )


def test_a_stack_is_tested_as_its_parts_are():
    (first, labels, covariates, strata), (second, *_) = world(1, 0.02), world(2)
    both = excess(np.stack([first, second]), labels, covariates, strata, 30)
    alone = [excess(s, labels, covariates, strata, 30) for s in (first, second)]
    assert np.allclose(np.array(both).T, np.array(alone), atol=1e-5)


def test_without_an_effect_p_is_uniform_and_the_interval_covers_0():
    """Length and words go with the category and drive the similarity: the raw gap is large,
    nothing is left of it.
    """
    found = [
        excess(s, y, c, strata, resamples=99, seed=n)
        for n in range(120)
        for s, y, c, strata in [world(n)]
    ]
    assert kstest([f.p for f in found], "uniform").pvalue > 0.01
    assert 0.01 <= np.mean([f.p <= 0.05 for f in found]) <= 0.10
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.92
    raw = excess(world(0)[0], world(0)[1], (), world(0)[3], resamples=99)
    assert raw.p == 0.01
    assert raw.low > 0


def test_a_planted_effect_is_found_at_its_size_and_the_detectable_one_half_the_time_or_more():
    found = [
        excess(s, y, c, strata, resamples=99, seed=n)
        for n in range(40)
        for s, y, c, strata in [world(n, 0.02)]
    ]
    assert abs(np.mean([f.estimate for f in found]) - 0.02) < 0.002
    assert np.mean([f.p <= 0.05 and f.low > 0 for f in found]) > 0.9
    least = np.mean([f.detectable for f in found])
    weak = [
        excess(s, y, c, strata, 99, n) for n in range(40) for s, y, c, strata in [world(n, least)]
    ]
    assert 0.6 < np.mean([f.p <= 0.05 for f in weak]) <= 1.0


@pytest.mark.parametrize(
    "fault", ["one category", "constant", "explained", "one half", "four of a category"]
)
def test_what_cannot_be_tested_says_so(fault):
    similarity, labels, covariates, strata = world(0)
    across = None
    if fault == "one category":
        labels = np.zeros(len(labels), int)
    elif fault == "constant":
        similarity = np.ones_like(similarity)
    elif fault == "explained":
        similarity = 2 * covariates[0] - covariates[1]
    elif fault == "one half":
        across = np.zeros(len(labels), int)
    else:
        chosen = np.r_[0:4, 12 : len(labels)]
        similarity, labels, strata = (
            similarity[np.ix_(chosen, chosen)],
            labels[chosen],
            strata[chosen],
        )
        covariates = [c[np.ix_(chosen, chosen)] for c in covariates]
    with pytest.raises(NotTestable):
        excess(similarity, labels, covariates, strata, 20, across=across)


def test_a_constant_covariate_changes_nothing():
    similarity, labels, covariates, strata = world(2, 0.02)
    plain = excess(similarity, labels, covariates, strata, 50)
    more = excess(similarity, labels, (*covariates, np.full(similarity.shape, 7.0)), strata, 50)
    assert np.allclose(plain, more, atol=1e-4)


def worded(seed, effect=0.0):
    """Four categories in ten wordings of one to six rows: the wording makes rows alike."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(40), rng.integers(1, 7, 40))
    labels = np.arange(40)[clusters] // 10
    tokens = rng.poisson(18 + 3 * labels)
    own = rng.normal(size=(40, 8))[clusters] + 0.3 * rng.normal(size=(len(labels), 8))
    noise = rng.normal(0, 0.005, (len(labels),) * 2)
    apart = np.abs(np.subtract.outer(tokens, tokens)).astype(float)
    similarity = 0.3 + 0.02 * own @ own.T / 8 - 0.004 * apart + noise + noise.T
    return similarity + effect * same(labels), labels, clusters, [apart]


def test_wordings_are_the_units_of_the_regression():
    similarity, labels, clusters, covariates = worded(0, 0.01)
    found = excess_of_wordings(similarity, labels, clusters, covariates, resamples=40)
    of = np.arange(40) // 10
    means, apart = (wording_matrix(m, clusters) for m in (similarity, covariates[0]))
    assert np.isclose(found.estimate, by_hand(means, of, [apart], np.ones(40)), atol=1e-5)
    spoilt = np.where(clusters[:, None] == clusters, 9.0, similarity)  # never looked at
    again = excess_of_wordings(spoilt, labels, clusters, covariates, resamples=40)
    assert np.allclose(found, again, atol=1e-5)
    both = excess_of_wordings(
        np.stack([similarity, spoilt]), labels, clusters, covariates, None, 40
    )
    assert np.allclose(both.estimate, found.estimate, atol=1e-5)


def test_wording_alone_leaves_nothing_where_rows_would_find_it():
    p, inside, rows = [], [], []
    for seed in range(160):
        similarity, labels, clusters, covariates = worded(seed)
        found = excess_of_wordings(similarity, labels, clusters, covariates, None, 99, seed)
        p.append(found.p)
        inside.append(found.low <= 0 <= found.high)
        if seed < 8:
            rows.append(excess(similarity, labels, covariates, None, 99, seed).p)
    assert kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert np.mean(inside) >= 0.93
    assert np.mean(np.array(rows) <= 0.05) > 0.7
    assert excess_of_wordings(*worded(0, 0.02), None, 99).p == 0.01


def test_too_few_wordings_are_not_testable():
    similarity, labels, clusters, covariates = worded(0)
    few = np.flatnonzero(clusters % 10 < 4)
    with pytest.raises(NotTestable, match="4 clusters"):
        excess_of_wordings(similarity[np.ix_(few, few)], labels[few], clusters[few], resamples=9)
