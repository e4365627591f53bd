"""Statistics: hand-worked cases, oracles, and calibration on synthetic counts with and without an
effect.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from helpers.analysis import stats
from helpers.analysis.sets import top_sets
from helpers.analysis.similarity import gap, jaccard_matrix
from helpers.record import NotTestable, UserError

WIDTH = 250
BASE = np.random.default_rng(7).normal(-1, 1.5, WIDTH)
TASK = np.random.default_rng(8).normal(size=(6, WIDTH))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def world(rng, each, categories=3, effect=0.0, spread=0.8, longer=0):
    """Labels, tokens and Jaccard matrix of instructions whose log odds of firing differ by
    instruction (SD spread) and category (SD effect), and whose lengths may differ by category (up
    to `longer` tokens more per category).
    """
    labels = np.repeat(np.arange(categories), each)
    tokens = rng.integers(10, 30 + longer * labels)
    odds = BASE + effect * TASK[labels] + spread * rng.normal(size=(len(labels), WIDTH))
    sets, _ = top_sets(rng.binomial(tokens[:, None], 1 / (1 + np.exp(-odds))), 0.1)
    return labels, tokens, jaccard_matrix(sets)


def test_resamples_keep_group_sizes_and_hold_a_pair():
    groups = np.array([0] * 5 + [1] * 9)
    weights = stats.resample_weights(groups, 4000)
    assert (weights[:, :5].sum(1) == 5).all()
    assert (weights[:, 5:].sum(1) == 9).all()
    assert (
        weights[:, :5].max() == 4
    )  # a resample of one instruction five times has no pair: drawn again
    assert abs(weights[:, 5:].var(0) - 8 / 9).max() < 0.15  # multinomial


def test_bootstrap_of_a_mean_is_the_normal_interval(rng):
    values = rng.normal(3, 2, 400)
    result = stats.bootstrap(lambda w: w @ values / w.sum(1), np.zeros(400), 4000)
    half = 1.96 * values.std() / 20
    assert result.estimate == pytest.approx(values.mean(), rel=1e-6)
    assert result.low == pytest.approx(values.mean() - half, abs=0.03)
    assert result.high == pytest.approx(values.mean() + half, abs=0.03)
    again = stats.bootstrap(lambda w: w @ values / w.sum(1), np.zeros(400), 4000)
    assert (again.replicates == result.replicates).all()


def test_interval_of_the_gap_covers_the_truth():
    """95 % intervals from 30 instructions per category hold the population's gap in 93 to 97 % of
    500 worlds.
    """
    rng = np.random.default_rng(11)
    labels, _, similarity = world(rng, 1500, effect=0.6)
    truth, hits = gap(similarity, labels), 0
    for seed in range(500):
        labels, _, similarity = world(rng, 30, effect=0.6)
        interval = stats.bootstrap(
            lambda w, s=similarity, g=labels: gap(s, g, w), labels, 300, seed=seed
        )
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / 500 <= 0.97


def gap_p(rng, strata=None, **options):
    labels, tokens, similarity = world(rng, 20, **options)
    groups = None if strata is None else stats.length_strata(tokens, strata)
    return float(
        stats.permutation_test(
            lambda g: gap(similarity, g), labels, groups, 199, rng.integers(1 << 30)
        ).p
    )


def test_label_permutation_is_uniform_without_an_effect():
    rng = np.random.default_rng(12)
    p = np.array([gap_p(rng, strata=3) for _ in range(500)])
    assert (
        scipy_stats.kstest(p - rng.random(500) / 200, "uniform").pvalue > 0.01
    )  # p is a multiple of 1 / 200
    assert 0.03 < (p <= 0.05).mean() < 0.07


def test_strata_take_out_what_length_alone_makes():
    """Categories of different length and nothing else: found without strata, not within narrow
    ones.
    """
    rng = np.random.default_rng(13)
    raw, within = (
        np.mean([gap_p(rng, s, spread=0.1, longer=60) <= 0.05 for _ in range(60)])
        for s in (None, 12)
    )
    print(f"found: {raw:.2f} raw, {within:.2f} within strata")
    assert raw > 0.8
    assert within < 0.15


@pytest.mark.parametrize(("effect", "low", "high"), [(0.1, 0.06, 0.6), (0.25, 0.9, 1.0)])
def test_power_for_a_planted_effect(effect, low, high):
    """60 instructions: a shift of 0.25 SD in log odds is found nearly always, 0.1 sometimes (shown
    with -s).
    """
    rng = np.random.default_rng(14)
    power = np.mean([gap_p(rng, strata=3, effect=effect) <= 0.05 for _ in range(100)])
    print(f"effect {effect}: power {power:.2f}")
    assert low <= power <= high


def test_permutation_counts_the_observed_arrangement():
    labels, values = np.array([0, 0, 0, 1, 1, 1]), np.array([0.0, 0, 0, 1, 1, 1])
    result = stats.permutation_test(lambda g: (g * values).sum(-1), labels, resamples=999)
    assert result.estimate == 3
    assert result.p == (1 + (result.null == 3).sum()) / 1000
    assert abs((result.null == 3).mean() - 1 / 20) < 0.025  # 1 of C(6, 3) arrangements
    assert stats.plus_one(5.0, np.zeros(99)) == 0.01


def test_shuffling_stays_within_strata():
    labels, strata = np.array([0, 1, 2, 3, 4, 5]), np.array([7, 3, 7, 3, 3, 7])
    seen = []
    stats.permutation_test(lambda g: seen.extend(g) or np.zeros(len(g)), labels, strata, 300)
    seen = np.array(seen)
    for s in (3, 7):
        assert (np.sort(seen[:, strata == s], 1) == np.sort(labels[strata == s])).all()
    assert len(np.unique(seen, axis=0)) == 36
    assert (seen[0] == labels).all()


def test_length_strata_are_ordered_and_balanced(rng):
    tokens = rng.integers(5, 200, 1000)
    strata = stats.length_strata(tokens, 5)
    assert set(strata) == set(range(5))
    assert abs(np.bincount(strata) - 200).max() < 25
    assert all(tokens[strata == s].max() < tokens[strata == s + 1].min() for s in range(4))
    assert (stats.length_strata([7, 7, 7], 5) == 0).all()


def test_holm_and_bh_by_hand():
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    assert np.allclose(stats.adjust(p, "holm"), [[0.03, 0.06], [0.06, 0.02]])
    assert np.allclose(stats.adjust(p, "bh"), [[0.02, 0.04], [0.04, 0.02]])


@settings(max_examples=30)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_holm_and_bh_are_those_of_statsmodels(p):
    for name, method in (("holm", "holm"), ("bh", "fdr_bh")):
        assert stats.adjust(p, name) == pytest.approx(multipletests(p, method=method)[1])


def test_paired_effect_agrees_with_the_t_test(rng):
    first, second = rng.normal(0.4, 1, (60, 3)), rng.normal(0, 1, (60, 3))
    second[:, 2] = first[:, 2]
    result = stats.paired_effect(first, second, 4000)
    d = (first - second)[:, :2]
    assert np.allclose(result.difference[:2], d.mean(0))
    assert np.allclose(result.d[:2], d.mean(0) / d.std(0, ddof=1))
    expected = scipy_stats.ttest_rel(first[:, :2], second[:, :2])
    assert np.allclose(result.p[:2], expected.pvalue, atol=0.02)
    interval = expected.confidence_interval()
    assert np.allclose(result.low[:2], interval.low, atol=0.06)
    assert np.allclose(result.high[:2], interval.high, atol=0.06)
    assert (result.difference[2], result.d[2], result.p[2]) == (0, 0, 1)


def test_sign_flips_by_all_of_them(rng):
    """Two columns of ten rows: all 2 ** 10 signs; with clusters of two rows, all 2 ** 5."""
    rows = rng.normal(0.4, 1, (10, 2))
    for clusters, units in ((None, np.arange(10)), (list("aabbccddee"), np.arange(10) // 2)):
        signs = np.array(list(product([-1, 1], repeat=units.max() + 1)))[:, units]
        means = np.abs(signs @ rows / 10)
        exact = (means >= np.abs(rows.mean(0)) - 1e-9).mean(0)
        found = stats.sign_flips(rows, 20_000, 1, clusters)
        assert found == pytest.approx(exact, abs=0.015)
        effect = stats.paired_effect(rows, 0 * rows, 20_000, seed=1, clusters=clusters)
        assert (effect.p == found).all()


def test_a_share_of_0_or_1_rests_on_as_many_rows_as_there_are_clusters():
    """Nothing tells whether rows of a wording are copies: twenty ones in five wordings are Wilson's
    five of five, whatever the wordings' sizes; alone they are twenty of twenty.
    """
    for value in (0.0, 1.0):
        for names in (np.repeat(np.arange(5), 4), np.repeat(np.arange(5), [1, 1, 1, 1, 16])):
            found = stats.clustered_share(np.full(20, value), names)
            assert found == pytest.approx(proportion_confint(5 * value, 5, method="wilson"))
        alone = proportion_confint(20 * value, 20, method="wilson")
        for names in (None, np.arange(20)):
            assert stats.clustered_share(np.full(20, value), names) == pytest.approx(alone)


def test_p_of_effects_is_uniform_without_an_effect(rng):
    """300 data sets at once, along the trailing axis."""
    noise = rng.standard_t(4, (30, 300))
    result = stats.paired_effect(noise, 0 * noise, 999)
    assert scipy_stats.kstest(result.p, "uniform").pvalue > 0.01
    assert (
        0.88 < np.mean((result.low <= 0) & (result.high >= 0)) < 0.97
    )  # small samples: a little short of 95 %


def test_shared_profile_by_loop(rng):
    values, groups = rng.random((30, 6)) + np.arange(6) * 0.2, np.arange(30) % 3
    means = [values[groups == g].mean(0) for g in range(3)]
    expected = np.mean([np.corrcoef(means[a], means[b])[0, 1] for a in range(3) for b in range(a)])
    result = stats.shared_profile(values, groups, 500)
    assert np.isclose(result["stability"], expected)
    assert result["p"] < 0.01
    assert result["stability_ci"][0] <= result["stability_ci"][1] <= 1


def test_shared_profile_finds_nothing_in_unrelated_profiles():
    rng = np.random.default_rng(16)
    p = [
        stats.shared_profile(
            rng.normal(size=(3, 8))[np.arange(30) % 3] + rng.normal(size=(30, 8)),
            np.arange(30) % 3,
            199,
            seed,
        )["p"]
        for seed in range(300)
    ]
    assert scipy_stats.kstest(p - rng.random(300) / 200, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: stats.resample_weights([0, 0, 0, 0, 1], 10),
            "group 0 has 4 instructions; expected at least 5",
        ),
        (
            lambda: stats.bootstrap(lambda w: np.full(len(w), np.nan), np.zeros(9), 10),
            "replicates is empty or holds NaN",
        ),
        (
            lambda: stats.permutation_test(len, [1, 1, 2, 2], [0, 0, 1, 1]),
            "no stratum holds two different labels",
        ),
        (lambda: stats.permutation_test(lambda g: g * np.nan, [1, 2], resamples=9), "NaN"),
        (lambda: stats.length_strata([]), "tokens is empty"),
        (lambda: stats.adjust([0.1, np.nan], "bh"), "p is empty or holds NaN"),
        (lambda: stats.adjust([], "bh"), "p is empty"),
        (lambda: stats.adjust([0.1, 1.2], "bh"), "p from 0.1 to 1.2"),
        (lambda: stats.adjust([0.1], "bonferroni"), "bonferroni"),
        (lambda: stats.paired_effect([1.0, np.nan], [0, 0]), "first is empty or holds NaN"),
        (lambda: stats.paired_effect([1.0, 2], [0, 0]), "2 instructions"),
        (
            lambda: stats.shared_profile(np.ones((9, 3)), np.zeros(9)),
            "1 group; expected at least 2",
        ),
    ],
)
def test_bad_input_is_said_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_whole_clusters_are_drawn_and_shuffled():
    clusters = np.repeat(list("fabcdehgij"), [1, 2, 3, 4, 5, 1, 1, 2, 3, 7])
    labels = np.repeat([0, 1], [15, 14])
    weights = stats.resample_weights(labels, 500, clusters=clusters)
    for name in set(clusters):
        assert (np.ptp(weights[:, clusters == name], axis=1) == 0).all()
    first = [np.flatnonzero(clusters == name)[0] for name in sorted(set(clusters))]
    of = labels[first]
    assert (weights[:, first][:, of == 0].sum(1) == 5).all()
    seen = []
    stats.permutation_test(
        lambda y: seen.extend(y) or np.zeros(len(y)), labels, None, 200, clusters=clusters
    )
    seen = np.array(seen)
    assert all((np.ptp(seen[:, clusters == name], axis=1) == 0).all() for name in set(clusters))
    assert (seen[:, first].sum(1) == of.sum()).all()
    assert len(np.unique(seen, axis=0)) > 50


def test_clusters_of_one_row_change_nothing_but_the_width():
    x, groups = np.random.default_rng(0).normal(size=40), np.repeat([0, 1], 20)
    plain, alone = (
        stats.bootstrap(lambda w: w @ x / w.sum(1), groups, 400, clusters=c)
        for c in (None, np.arange(40))
    )
    assert (plain.replicates == alone.replicates).all()
    assert alone.low < plain.low < plain.high < alone.high
    one, other = (
        stats.permutation_test(lambda y: y @ x, groups, None, 300, clusters=c)
        for c in (None, np.arange(40))
    )
    assert one.p == other.p


def test_an_interval_of_few_clusters_is_students():
    """Of means of normal data: the t interval; and it covers with five clusters, where a
    percentile interval does not.
    """
    rng, inside = np.random.default_rng(0), []
    draws = rng.normal(3, np.sqrt(11 / 12), 400_000)
    expected = 3 + scipy_stats.t.ppf([0.025, 0.975], 11)
    assert np.allclose(stats.interval(draws, sizes=[12]), expected, atol=0.01)
    assert stats.interval(draws[:, None] + [0, 1], sizes=[12, 12]).shape == (2, 2)
    low, high = stats.interval(draws, sizes=[5, 40])  # as uncertain as its small group
    assert (high - low) / 2 == pytest.approx(2.5657 * 1.107 * np.sqrt(11 / 12), rel=0.01)
    assert np.allclose(stats.interval(draws), np.quantile(draws, [0.025, 0.975]))
    clusters = np.repeat(np.arange(5), 4)
    for seed in range(400):
        x = rng.normal(size=5)[clusters] + rng.normal(0, 0.3, 20)
        found = stats.bootstrap(
            lambda w, x=x: w @ x / w.sum(1), np.zeros(20), 400, seed=seed, clusters=clusters
        )
        plain = stats.interval(found.replicates)
        inside.append([plain[0] <= 0 <= plain[1], found.low <= 0 <= found.high])
    plain, students = np.mean(inside, 0)
    assert plain < 0.9
    assert 0.93 <= students <= 0.97


def test_paired_effects_of_clusters_are_level():
    rng, p, clusters = np.random.default_rng(3), [], np.repeat(np.arange(20), 4)
    for seed in range(200):
        x = rng.normal(size=20)[clusters] + rng.normal(0, 0.3, 80)
        found = (
            stats.paired_effect(x, 0 * x, 199, seed=seed, clusters=c) for c in (None, clusters)
        )
        p.append([f.p for f in found])
    rows, whole = np.mean(np.array(p) <= 0.05, 0)
    assert whole <= 0.08
    assert rows > 0.2


def test_detectable_effects_are_found_four_times_in_five():
    rng, found = np.random.default_rng(4), []
    noise = rng.normal(size=(40, 300))
    least = stats.paired_effect(noise, 0 * noise, 499).detectable.mean()
    found = stats.paired_effect(noise + least, 0 * noise, 499).p <= 0.05
    assert 0.72 <= found.mean() <= 0.88
    labels = np.repeat([0, 1], 30)
    p = []
    for seed in range(100):
        x = rng.normal(size=60)
        test = stats.permutation_test(lambda y, x=x: (2 * y - 1) @ x / 30, labels, None, 199, seed)
        x = x + test.detectable * labels
        p.append(stats.permutation_test(lambda y, x=x: (2 * y - 1) @ x / 30, labels, None, 199).p)
    assert 0.68 <= np.mean(np.array(p) <= 0.05) <= 0.92


def test_the_headline_is_the_smallest_in_size():
    found = stats.headline({"plain": 0.062, "alone": -0.041, "regressed": 0.047})
    assert (found.name, found.value, found.agree) == ("alone", -0.041, False)
    assert found.others == {"plain": 0.062, "regressed": 0.047}
    assert stats.headline({"a": 0.1, "b": 0.1}) == ("a", 0.1, {"b": 0.1}, True)
    for bad in ({}, {"a": np.nan}):
        with pytest.raises(NotTestable, match="estimates is empty or holds NaN"):
            stats.headline(bad)
