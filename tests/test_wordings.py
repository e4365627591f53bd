"""Instructions that share wordings: by loops, by hand, and calibrated on counts whose truth is
known.
"""

import numpy as np
import planted_counts
import pytest
from scipy.stats import kstest

from helpers.analysis import nulls
from helpers.analysis.sets import nominal_size, top_sets
from helpers.analysis.similarity import (
    gap,
    jaccard_matrix,
    wording_matrix,
)
from helpers.analysis.stats import length_strata, permutation_test
from helpers.analysis.wordings import within_excess, wording_overlap
from helpers.record import NotTestable, UserError

UNEVEN = [[9, 1, 1, 2, 3, 5], [1, 1, 4, 2, 2, 1, 7], [3] * 5]


@pytest.fixture
def world():
    return planted_counts.counts(np.random.default_rng(0), UNEVEN, category=0.4, wording=0.4)


def loop(S, labels, clusters):
    """(same wording, other wording, other category): means over wordings, then over categories."""
    names = list(dict.fromkeys(clusters))
    rows = {k: np.flatnonzero(clusters == k) for k in names}
    of = {k: labels[rows[k][0]] for k in names}
    same, pairs = {}, {}
    for k in names:
        for m in names:
            cell = [S[i, j] for i in rows[k] for j in rows[m] if i != j]
            if k == m and cell:
                same.setdefault(of[k], []).append(np.mean(cell))
            if k != m:
                pairs.setdefault((of[k], of[m]), []).append(np.mean(cell))
    inside = [np.mean(v) for (a, b), v in pairs.items() if a == b]
    across = [np.mean(v) for (a, b), v in pairs.items() if a != b]
    return np.mean([np.mean(v) for v in same.values()]), np.mean(inside), np.mean(across)


def test_the_three_overlaps_by_loop(world):
    S = world.similarity()
    found = wording_overlap(S, world.labels, world.clusters, resamples=50)
    same, other, between = loop(S, world.labels, world.clusters)
    assert np.isclose(found["same_wording"], same, atol=1e-6)
    assert np.isclose(found["other_wording"], other, atol=1e-6)
    assert np.isclose(found["other_category"], between, atol=1e-6)
    assert np.isclose(found["gap"], other - between, atol=1e-6)
    assert np.isclose(found["step"], same - other, atol=1e-6)
    assert np.isclose(found["category_gap"].mean(), found["gap"])
    assert found["wordings"].tolist() == [6, 7, 5]


def test_a_wording_matrix_by_hand():
    S = np.array([[9, 0.1, 0.2, 0.3], [0.1, 9, 0.4, 0.5], [0.2, 0.4, 9, 0.6], [0.3, 0.5, 0.6, 9]])
    assert np.allclose(wording_matrix(S, [7, 7, 3, 3]), [[0.6, 0.35], [0.35, 0.1]])
    assert np.allclose(wording_matrix(S, list("abcd")), S * (1 - np.eye(4)))


def test_names_and_order_of_rows_do_not_matter(world):
    S, order = world.similarity(), np.random.default_rng(1).permutation(len(world.labels))
    plain = wording_overlap(S, world.labels, world.clusters, resamples=99)
    names = np.array(["x", "y", "z"])[world.labels]
    same = wording_overlap(S, names, world.clusters.astype(str), resamples=99)
    moved = wording_overlap(
        S[np.ix_(order, order)], world.labels[order], world.clusters[order], resamples=99
    )
    for key in ("same_wording", "other_wording", "other_category", "gap"):
        assert np.isclose(plain[key], same[key])
        assert np.isclose(plain[key], moved[key])
    assert np.allclose(plain["gap_ci"], moved["gap_ci"], atol=1e-6)
    assert plain["p"] == moved["p"]


def test_rows_without_a_shared_wording_give_the_plain_gap():
    world = planted_counts.counts(
        np.random.default_rng(2), planted_counts.even(3, 8, 1), category=0.4
    )
    S = world.similarity()
    found = wording_overlap(S, world.labels, world.clusters, resamples=99)
    assert found["same_wording"] is None
    assert found["step"] is None
    assert np.isclose(found["gap"], gap(S, world.labels), atol=1e-6)


def test_wording_alone_is_no_category():
    """12 wordings a category, rates that depend on the wording alone: p is uniform, and the test
    that shuffles rows is fooled nearly always.
    """
    rng, p, by_rows = np.random.default_rng(5), [], []
    for seed in range(200):
        world = planted_counts.counts(rng, planted_counts.even(rows=2), width=150, wording=0.5)
        S = world.similarity()
        found = wording_overlap(S, world.labels, world.clusters, resamples=199, seed=seed)
        p.append([found["p"], found["category_p"][seed % 6]])
        if seed < 20:
            test = permutation_test(lambda y, S=S: gap(S, y), world.labels, resamples=99)
            by_rows.append(test.p <= 0.05)
    p = np.array(p)
    spread = p - rng.random(p.shape) / 200  # p is a multiple of 1 / 200
    assert (p <= 0.05).mean(0).max() <= 0.07
    assert min(kstest(column, "uniform").pvalue for column in spread.T) > 0.01
    assert np.mean(by_rows) > 0.7


@pytest.mark.parametrize("sizes", [[[1] * 5, [4] * 40], [[6] * 12, [1] * 8]])
def test_wordings_of_unlike_size_and_number_are_no_category(sizes):
    """A few noisy wordings against many quiet ones: without studentising, p <= .05 in 20 %."""
    rng, p = np.random.default_rng(7), []
    for seed in range(150):
        world = planted_counts.counts(rng, sizes, width=150, wording=0.3)
        found = wording_overlap(
            world.similarity(), world.labels, world.clusters, resamples=99, seed=seed
        )
        p.append(found["p"])
    assert np.mean(np.array(p) <= 0.05) <= 0.09


@pytest.mark.parametrize("sizes", [planted_counts.even(rows=2), [[12, 1, 1, 2, 3, 5, 2]] * 3])
def test_intervals_of_a_planted_gap_cover_it(sizes):
    """The truth: the mean of an estimator without bias (means over pairs of wordings)."""
    rng, found = np.random.default_rng(6), []
    for seed in range(200):
        world = planted_counts.counts(rng, sizes, width=150, category=0.5, wording=0.4)
        found.append(
            wording_overlap(
                world.similarity(), world.labels, world.clusters, resamples=200, seed=seed
            )
        )

    def covered(estimate, interval):
        estimates = np.array([f[estimate] for f in found])
        low, high = np.moveaxis(np.array([f[interval] for f in found]), -1, 0)
        return np.mean((low <= estimates.mean(0)) & (estimates.mean(0) <= high))

    assert 0.93 <= covered("gap", "gap_ci") <= 0.975
    assert 0.93 <= covered("category_gap", "category_ci") <= 0.985


def test_strata_keep_to_whole_wordings(world):
    strata = length_strata(world.tokens, 2, world.clusters)
    assert all(len(set(strata[world.clusters == k])) == 1 for k in set(world.clusters))
    found = wording_overlap(world.similarity(), world.labels, world.clusters, strata, 99)
    assert 0 < found["p"] <= 1
    with pytest.raises(UserError, match="for a whole cluster"):
        wording_overlap(world.similarity(), world.labels, world.clusters, world.tokens, 9)


@pytest.mark.parametrize("sizes", [planted_counts.even(2, 5, 3), planted_counts.even(50, 5, 1)])
def test_two_or_fifty_categories(sizes):
    world = planted_counts.counts(np.random.default_rng(3), sizes, category=1.0, wording=0.2)
    found = wording_overlap(world.similarity(), world.labels, world.clusters, resamples=99)
    assert found["p"] == 0.01
    assert found["gap_ci"][0] > 0 < found["detectable"]
    assert found["category_ci"].shape == (len(sizes), 2)


def test_constant_similarity_is_no_effect():
    world = planted_counts.counts(np.random.default_rng(3), UNEVEN)
    found = wording_overlap(
        np.ones((len(world.labels),) * 2), world.labels, world.clusters, None, 49
    )
    assert abs(found["gap"]) < 1e-6
    assert found["p"] == 1


@pytest.mark.parametrize(
    ("labels", "clusters", "error", "message"),
    [
        ([0] * 4 + [1] * 4, [0] * 4 + [1] * 4, NotTestable, "not told from its words"),
        ([0] * 8, range(8), NotTestable, "two categories"),
        ([0] * 7 + [1], range(8), NotTestable, "two wordings"),
        ([0] * 4 + [1] * 4, range(8), NotTestable, "group 0 has 4 clusters"),
        ([0] * 4 + [1] * 4, [0, 1, 2, 3] * 2, UserError, "holds both 0 and 1"),
        ([0, 2] * 4, range(8), NotTestable, r"category \[1\]"),
        ([0] * 4 + [1] * 4, range(7), UserError, r"clusters has the shape \[7\]"),
    ],
)
def test_what_cannot_be_tested_says_so(labels, clusters, error, message):
    S = np.random.default_rng(0).random((8, 8))
    with pytest.raises(error, match=message):
        wording_overlap(S, labels, list(clusters), resamples=9)


def test_within_excess_by_loop_and_its_level_under_rates_alone():
    """Instructions drawn from one vector of rates: nothing is left of the within overlap."""
    rng, p, inside = np.random.default_rng(1), [], []
    for seed in range(30):
        world = planted_counts.counts(rng, planted_counts.even(3, 12, 1), width=1500, row=0.0)
        S = jaccard_matrix(top_sets(world.counts, 0.1)[0])
        null = nulls.rate_null(world.counts, world.tokens, nominal_size(1500, 0.1))
        found = within_excess(S, nulls.expected_jaccard(null), world.labels, None, 199, seed)
        p.extend(found["p"])
        inside.extend((found["low"] <= 0) & (found["high"] >= 0))
    assert 0.9 <= np.mean(inside) <= 0.99
    assert np.mean(np.array(p) <= 0.05) <= 0.1
    rows = np.flatnonzero(world.labels == 1)
    by_hand = np.mean([S[i, j] for i in rows for j in rows if i != j])
    assert np.isclose(found["within"][1], by_hand, atol=1e-6)
    assert np.allclose(found["excess"], found["within"] - found["null"], atol=1e-6)


def test_within_excess_finds_a_level_and_what_one_category_alone_lacks():
    rng = np.random.default_rng(0)
    labels, clusters = np.repeat([0, 1], 40), np.repeat(np.arange(20), 4)
    noise = rng.normal(0, 0.02, (80, 80))
    S = 0.3 + (noise + noise.T) / 2 + 0.1 * ((labels == 0)[:, None] & (labels == 0))
    found = within_excess(S, np.full((80, 80), 0.3), labels, clusters, 300)
    assert found["p"][0] < 0.001 < 0.05 < found["p"][1]
    assert found["low"][0] > 0.08
    assert found["low"][1] < 0 < found["high"][1]


def test_the_league_of_scores():
    """Nothing planted: chance (10 of 250). Planted on top of wordings: contrast finds nearly all,
    frequency, which ranks what is always on, next to nothing.
    """
    rows = planted_counts.league(np.random.default_rng(1), (0.0, 0.5, 2.0), worlds=3)
    table = {(row["effect"], row["score"]): row for row in rows}
    for score in planted_counts.SCORES:
        recall = [table[effect, score]["recall"] for effect in (0.0, 0.5, 2.0)]
        assert recall[0] < 0.12
        assert recall[0] < recall[2] + 0.02
        assert table[2.0, score]["precision"] == pytest.approx(recall[2])
    assert table[0.5, "contrast"]["recall"] > 0.7 > 0.3 > table[0.5, "lape"]["recall"]
    assert table[2.0, "contrast"]["recall"] > 0.95
    assert table[2.0, "contribution"]["recall"] > 0.9
    assert table[2.0, "frequency"]["recall"] < 0.3
    assert table[2.0, "consensus"]["precision"] < 0.3
