"""Shares per layer, read-out of routing, scores of components: against brute force, without an
effect, and with one.
"""

import numpy as np
import pytest
from scipy.stats import kstest

from helpers.analysis import nulls
from helpers.analysis.generality import (
    category_scores,
    nearest_profile,
    own_gaps,
    share_test,
    shares,
)
from helpers.analysis.regression import excess
from helpers.analysis.sets import consensus
from helpers.analysis.similarity import (
    category_matrix,
    gap,
    jaccard_matrix,
    nearest_consensus,
    within_between,
)
from helpers.analysis.stats import attempt, bootstrap, permutation_test
from helpers.record import NotTestable, UserError

LABELS = np.repeat(np.arange(6), 8)
HALF = np.tile([0, 1], 24)


def some_sets(seed=0, width=120, special=0):
    """Random sets; `special` components of each category fire in nearly all of its instructions
    and in few others.
    """
    rng = np.random.default_rng(seed)
    sets = rng.random((len(LABELS), width)) < rng.beta(1, 2, width)
    for c in range(6):
        own = slice(c * special, (c + 1) * special)
        sets[:, own] = (
            rng.random((len(LABELS), special)) < np.where(c == LABELS, 0.95, 0.05)[:, None]
        )
    return sets


def test_own_gaps_by_hand_and_their_mean_is_the_gap():
    matrix = np.array([[0.9, 0.2, 0.4], [0.2, 0.5, 0.0], [0.4, 0.0, 0.7]])
    assert np.allclose(own_gaps(matrix), [0.6, 0.4, 0.5])
    drawn = category_matrix(np.random.default_rng(0).random((48, 48)), LABELS, np.ones((5, 48)))
    assert np.allclose(own_gaps(drawn).mean(-1), within_between(drawn)["gap"])


@pytest.mark.parametrize("tau", [0.25, 0.5, 1.0])
def test_shares_are_those_of_each_relabelling_alone(tau):
    sets, rng = some_sets(), np.random.default_rng(1)
    shuffled = np.stack([LABELS, *(rng.permutation(LABELS) for _ in range(4))])
    found = shares(sets, shuffled, 3, tau)
    for row, labels in zip(found, shuffled, strict=True):
        chosen = consensus(sets, labels, tau)
        number = chosen.sum(0)
        unique, general = ((number == n).reshape(3, -1).mean(1) for n in (1, len(chosen)))
        assert np.allclose(row[:3], unique)
        assert np.allclose(row[3:6], general)
        assert np.isclose(row[6], (number == 1).sum() / max((number > 0).sum(), 1))


def test_without_an_effect_p_of_unique_components_is_no_smaller_than_uniform():
    p = [
        share_test(some_sets(seed, 600), LABELS, 3, 0.5, resamples=99, seed=seed).p[-1]
        for seed in range(60)
    ]
    assert kstest(p, "uniform", alternative="greater").pvalue > 0.01
    assert np.mean(np.array(p) <= 0.05) <= 0.12


def test_planted_unique_components_are_found_and_layers_told_apart():
    test = share_test(some_sets(0, 120, special=4), LABELS, 3, 0.5, resamples=199)
    assert test.p[0] == test.p[6] == 1 / 200
    assert test.p[2] > 0.05
    assert test.estimate[0] > test.null[:, 0].mean() + 0.3


def test_a_true_zero_of_unique_and_general_components_is_an_answer():
    """Three categories, six components, each in the sets of exactly two: none is in one or three.
    Without an effect to find, p is 1; only where all sets are empty is there nothing to test.
    """
    labels = np.repeat([0, 1, 2], 6)
    sets = np.repeat([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]], 6, axis=0) > 0
    test = share_test(sets, labels, 2, 0.5, resamples=99)
    assert (test.estimate == 0).all()
    assert (test.p[[0, 1, 4]] == 1).all()  # unique ones: no arrangement has fewer
    found = shares(sets, np.stack([np.random.default_rng(0).permutation(labels)]), 2, 0.5)
    assert found.max() > 0  # shuffled labels do make some
    with pytest.raises(NotTestable, match="all consensus sets are empty at tau 1.0; lower it"):
        share_test(np.eye(18, dtype=bool), labels, 2, 1.0, resamples=9)


def test_nearest_profile_reads_planted_routing_and_not_chance():
    rng = np.random.default_rng(0)
    rates = np.full((6, 2, 8), 0.1) + 0.6 * np.eye(8)[None, :6].transpose(1, 0, 2)
    planted = np.stack([rng.multinomial(40, r / r.sum(-1, keepdims=True)) for r in rates[LABELS]])
    found = nearest_profile(planted, LABELS, HALF)
    assert found["accuracy"] > 0.95
    assert found["chance"] == 1 / 6
    noise = rng.multinomial(40, np.full(8, 1 / 8), (48, 2))
    assert nearest_profile(noise, LABELS, HALF)["accuracy"] < 0.4
    same = np.ones((48, 2, 8), int)
    assert np.allclose(
        nearest_profile(same, LABELS, HALF)["correct"], 1 / 6
    )  # all tie: credit is shared


@pytest.mark.parametrize(
    "fault",
    [
        lambda: nearest_profile(np.ones((48, 2, 8), int), LABELS, np.zeros(48)),
        lambda: nearest_profile(np.ones((48, 2, 8), int), LABELS, (LABELS > 0).astype(int)),
        lambda: share_test(np.zeros((48, 9), bool), LABELS, 3, 0.5, resamples=9),
        lambda: share_test(some_sets(), LABELS, 3, 0.5, strata=LABELS, resamples=9),
        lambda: excess(
            np.random.default_rng(0).random((48, 48)), LABELS, (), None, 9, across=np.zeros(48)
        ),
        lambda: bootstrap(lambda w: gap(np.eye(44), LABELS[4:], w), LABELS[4:], 9),
        lambda: nearest_consensus(some_sets(), LABELS, np.zeros(48, int)),
        lambda: jaccard_matrix(np.zeros((48, 9), bool)),
        lambda: gap(np.eye(8), ["CLS"] * 8),
        lambda: nulls.rate_null(np.full((48, 9), 7), np.full(48, 7), 2),
    ],
)
def test_what_cannot_be_tested_is_a_row_that_says_so(fault):
    with pytest.raises(NotTestable):
        fault()
    assert attempt(fault)["note"].startswith("not testable: ")
    assert attempt(lambda: {"p": 1}) == {"p": 1}


def test_constant_counts_give_a_gap_of_0_and_p_of_1_never_a_nan():
    alike = jaccard_matrix(np.ones((48, 9), bool))
    test = permutation_test(lambda y: gap(alike, y), LABELS, resamples=19)
    assert test.estimate == 0
    assert test.p == 1
    assert np.isfinite(test.null).all()


def test_attribution_is_the_categorys_mean_and_contribution_a_margin():
    values, labels = np.array([[1.0, 5.0], [3.0, 1.0], [2.0, 2.0]]), [0, 0, 1]
    assert category_scores("attribution", values, labels).tolist() == [[2, 3], [2, 2]]
    assert category_scores("contribution", values, labels).tolist() == [[0, 1], [0, -1]]
    with pytest.raises(UserError, match="score is 'luck'"):
        category_scores("luck", values, labels)
