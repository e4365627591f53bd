"""Statistics of ablations: intervals that cover, tests that are level without an effect and find a
planted one.
"""

from itertools import permutations, product

import numpy as np
import pytest

from helpers.analysis.effects import (
    critical,
    critical_by_category,
    drawn_means,
    exchange,
    group_flips,
    group_mean,
    label_statistic,
    slope_of,
    slopes,
    specific_by_category,
    specificity,
    swapped,
)
from helpers.analysis.stats import paired_effect, resample_weights
from helpers.record import NotTestable, UserError

GROUPS = np.repeat(np.arange(6), 10)


def values(seed, effect=0.0, sets=0.05):
    """Own [60] and three controls [60, 8]: a level per (category, set) noise per row and set."""
    rng = np.random.default_rng(seed)

    def of(draws):
        return rng.normal(0, sets, (6, draws))[GROUPS] + rng.normal(0, 0.2, (60, draws))

    return of(1)[:, 0] + effect, {kind: of(8) for kind in ("random", "rate", "magnitude")}


def test_estimate_is_own_minus_the_largest_control_mean():
    own, controls = values(0, 1.0)
    controls["rate"] = controls["rate"] + 0.4
    found = critical(own, controls, GROUPS, 200)
    assert found["hardest"] == "rate"
    assert np.isclose(found["critical"], own.mean() - controls["rate"].mean())
    assert np.isclose(found["rate"], controls["rate"].mean())
    assert np.isclose(found["own"], own.mean())
    assert found["critical_ci"][0] < found["critical"] < found["critical_ci"][1]


def test_a_planted_effect_is_found_and_none_gives_level_p_and_honest_intervals():
    planted = [critical(*values(seed, 0.5), GROUPS, 199, seed) for seed in range(10)]
    assert all(
        found["critical_ci"][0] > 0 and max(found["p_critical"], found["p_sets"]) < 0.02
        for found in planted
    )

    def one(values):
        return values[0], {"random": values[1]["random"]}

    nothing = [critical(*one(values(seed, sets=0.0)), GROUPS, 199, seed) for seed in range(200)]
    for name in ("p_critical", "p_sets"):
        p = np.array([found[name] for found in nothing])
        assert abs(p.mean() - 0.5) < 0.07, name
        assert 0.01 < (p < 0.05).mean() + 0.005 < 0.11, name
    covered = np.mean(
        [found["critical_ci"][0] <= 0 <= found["critical_ci"][1] for found in nothing]
    )
    assert 0.88 < covered < 0.99


def test_only_the_exchange_of_sets_stays_level_where_sets_differ_by_chance():
    """Sets of one kind that differ in harm: p of the rows answers another question and may be
    small; p_sets may not.
    """
    found = [
        critical(own, {"random": c["random"]}, GROUPS, 199, seed)
        for seed in range(100)
        for own, c in [values(seed, sets=0.3)]
    ]
    small = {name: np.mean([f[name] < 0.05 for f in found]) for name in ("p_critical", "p_sets")}
    assert small["p_sets"] < 0.12 < 0.2 < small["p_critical"]


def test_the_hardest_of_several_controls_makes_the_claim_harder():
    three = [critical(*values(seed), GROUPS, 99, seed) for seed in range(60)]
    assert np.mean([found["critical"] for found in three]) < 0
    assert np.mean([f["critical_ci"][0] > 0 for f in three]) < 0.05


def test_draws_are_resampled_with_the_rows():
    """All rows alike, draws different: an interval over rows alone would have no width."""
    control = np.tile(np.random.default_rng(0).normal(0, 1, 8), (60, 1))
    means = drawn_means(control, GROUPS, resample_weights(GROUPS, 4000), np.random.default_rng(1))
    assert np.isclose(means.std(), control[0].std() / np.sqrt(8 * 6), rtol=0.05)
    assert np.isclose(means.mean(), control.mean(), atol=0.02)


def test_power_is_what_it_says():
    """An effect of the size `critical_sees` is found about four times in five."""
    sees = np.mean(
        [
            critical(o, {"r": c["random"]}, GROUPS, 199, s)["critical_sees"]
            for s in range(30)
            for o, c in [values(s, sets=0.0)]
        ]
    )
    hits = [
        critical(o, {"r": c["random"]}, GROUPS, 199, s)["p_critical"] < 0.05
        for s in range(150)
        for o, c in [values(1000 + s, sees, sets=0.0)]
    ]
    assert 0.68 < np.mean(hits) < 0.92


def test_specificity_by_brute_force_and_under_the_null():
    rng = np.random.default_rng(0)
    own, spread = rng.normal(0, 0.2, (60, 6)), rng.normal(0, 0.2, (60, 3, 6))
    own[np.arange(60), GROUPS] += 0.5
    found = specificity(own, spread, GROUPS, np.zeros(60, int), 300)
    d = own - spread.mean(1)
    by_hand = np.mean(
        [
            np.mean(d[c == GROUPS, c]) - np.mean([d[c == GROUPS, s] for s in range(6) if s != c])
            for c in range(6)
        ]
    )
    assert np.isclose(found["specificity"], by_hand)
    assert found["p"] < 0.01
    assert found["specificity_ci"][0] < by_hand < found["specificity_ci"][1]
    null = [
        specificity(
            *(rng.normal(0, 0.2, (60, *s, 6)) for s in ((), (3,))), GROUPS, np.zeros(60, int), 99
        )["p"]
        for _ in range(100)
    ]
    assert abs(np.mean(null) - 0.5) < 0.1


def test_sets_dealt_anew_is_level_for_sets_that_fit_no_category_and_finds_those_that_do():
    """Harmful sets are no specific ones; p is that of all 720 ways to deal six sets."""
    rng, labels, halves = np.random.default_rng(2), np.repeat(np.arange(6), 5), np.zeros(30, int)
    means = rng.normal(0, 0.3, (200, 6, 6)) + rng.normal(0, 1, (200, 1, 6))
    p = np.array([swapped(m[labels], labels, halves, 299, seed) for seed, m in enumerate(means)])
    assert abs(p.mean() - 0.5) < 0.07
    assert 0.02 < (p <= 0.05).mean() < 0.1
    exact = np.mean(
        [
            np.trace(means[0][:, list(order)]) >= np.trace(means[0]) - 1e-9
            for order in permutations(range(6))
        ]
    )
    assert abs(swapped(means[0][labels], labels, halves, 4000) - exact) < 0.03
    both = np.concatenate([means[0] + 2 * np.eye(6), means[1] + 2 * np.eye(6)])[
        np.r_[labels, labels + 6]
    ]
    assert swapped(both, np.r_[labels, labels], np.r_[halves, halves + 1], 999) == 0.001


def test_halves_with_draws_of_their_own_are_resampled_apart():
    """A draw's harm is the same in all rows of a category, so draws alone vary. Picked apart for
    two halves, their mean has half the variance; both by hand.
    """
    y, half = np.tile(GROUPS, 2), np.repeat([0, 1], 60)
    harm = np.random.default_rng(0).normal(0, 1, (6, 3, 6))  # [C measured, draws, C ablated]
    apart, one = (
        specificity(np.zeros((120, 6)), harm[y], y, halves, 4000)["specificity_sees"]
        for halves in (half, 0 * half)
    )
    weigh = np.eye(6) / 6 - (1 - np.eye(6)) / 30  # the gap of a matrix [C measured, C ablated]
    gaps = np.einsum("cds,cs->ds", harm, weigh)  # what each draw of each set adds to the gap
    by_hand = 2.8 * np.sqrt((gaps.var(0) / 3).sum())
    assert one == pytest.approx(by_hand, rel=0.05)
    assert apart == pytest.approx(by_hand / np.sqrt(2), rel=0.05)


def test_slope_of_a_straight_line_and_a_plain_difference():
    x, noise = (
        np.log2([0.01, 0.02, 0.05, 0.1, 0.2]),
        np.random.default_rng(0).normal(0, 0.05, (5, 60, 9)),
    )
    parts = [(0.3 * level + noise[i, :, 0], noise[i, :, 1:]) for i, level in enumerate(x)]
    found = slope_of(parts, GROUPS, slopes(x), 300)
    assert abs(found["estimate"] - 0.3) < 0.01
    assert found["p"] < 0.01
    assert found["ci"][0] < 0.3 < found["ci"][1]
    own, control = values(3, 1.0)[0], values(3)[1]["random"]
    assert np.isclose(
        slope_of([(own, control)], GROUPS, [-1.0], 99)["estimate"],
        group_mean(control.mean(1) - own, GROUPS),
    )


def test_exchange_and_beyond_on_cases_by_hand():
    own, control = np.ones(60), np.zeros((60, 4))
    assert exchange(own, control, GROUPS, 999) <= 0.01  # 5 ** -6 places give as much
    assert exchange(np.zeros(60), control, GROUPS, 99) == 1.0
    halves = np.repeat([0, 1], 10)  # few exchanges: all of them, each once
    assert exchange(np.ones(20), np.zeros((20, 10)), halves) == pytest.approx(1 / 121)
    assert exchange(np.ones(20), np.eye(1, 3).repeat(20, 0), halves) == pytest.approx(4 / 16)
    assert label_statistic(np.eye(3) * 2, np.arange(3)[None]) == 2
    assert label_statistic(np.ones((3, 3)), np.arange(3)[None]) == 0


UNEVEN = np.repeat([0, 1], [4, 9])


def test_p_of_rows_is_of_the_mean_over_groups_by_all_flips():
    """Groups of unlike sizes: every one of the 2 ** 13 ways to flip signs, group means by hand."""
    for seed in range(3):
        rows = np.random.default_rng(seed).normal(0, 1, 13) + np.where(UNEVEN == 0, 0.6, -0.2)
        signs = np.array(list(product([-1, 1], repeat=13)))
        means = (signs * rows)[:, UNEVEN == 0].mean(1), (signs * rows)[:, UNEVEN == 1].mean(1)
        exact = np.mean(np.abs(np.mean(means, 0)) >= abs(group_mean(rows, UNEVEN)) - 1e-9)
        assert group_flips(rows, UNEVEN, 20_000, seed) == pytest.approx(exact, abs=0.015)
        signs = np.array(list(product([-1, 1], repeat=5)))[
            :, [0, 0, 1, 1, *[2] * 3, *[3] * 3, *[4] * 3]
        ]
        means = (signs * rows)[:, UNEVEN == 0].mean(1), (signs * rows)[:, UNEVEN == 1].mean(1)
        exact = np.mean(np.abs(np.mean(means, 0)) >= abs(group_mean(rows, UNEVEN)) - 1e-9)
        wordings = list("aabbcccdddeee")
        found = group_flips(rows, UNEVEN, 20_000, seed, wordings)
        assert found == pytest.approx(exact, abs=0.015)


def test_p_of_rows_and_interval_speak_of_one_number():
    """Five rows of effect 1 and twenty of -.25: the mean over groups is .375, that over rows 0."""
    groups, noise = np.repeat([0, 1], [5, 20]), np.random.default_rng(0).normal(0, 0.02, 25)
    own, control = np.where(groups == 0, 1.0, -0.25) + noise, np.zeros((25, 4))
    found = critical(own, {"random": control}, groups)
    slope = slope_of([(own, control)], groups, [1.0])
    assert abs(own.mean()) < 0.01
    assert found["critical_ci"][0] > 0.3
    assert found["p_critical"] == slope["p"] < 0.1  # five signs alike come up in 1 of 16 flips
    assert paired_effect(own, 0 * own).p > 0.9


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(30), 2)])
def test_p_of_rows_of_equal_groups_is_that_of_their_plain_mean(clusters):
    own, controls = values(5, 0.1)
    rows = own - controls["random"].mean(1)
    plain = float(paired_effect(rows, 0 * rows, 499, seed=3, clusters=clusters).p)
    part = {"random": controls["random"]}
    assert critical(own, part, GROUPS, 499, 3, clusters)["p_critical"] == plain
    slope = slope_of([(own, controls["random"])], GROUPS, [1.0], 499, 3, clusters)
    assert slope["p"] == plain


def test_controls_of_other_rows_are_refused():
    with pytest.raises(UserError, match="beside 60 rows"):
        critical(np.zeros(60), {"random": np.zeros((59, 3))}, GROUPS)


CLUSTERS = np.repeat(np.arange(30), 2)  # two rows of each wording, five wordings a category


def test_rows_of_one_wording_are_no_independent_rows():
    """What a wording costs is the same in both its rows: tests over rows are too sure of it."""
    rng, found = np.random.default_rng(1), {"rows": [], "wordings": []}
    for seed in range(150):
        own = rng.normal(0, 0.3, 30)[CLUSTERS] + rng.normal(0, 0.05, 60)
        controls = {"random": rng.normal(0, 0.05, (60, 8))}
        for name, clusters in (("rows", None), ("wordings", CLUSTERS)):
            f = critical(own, controls, GROUPS, 199, seed, clusters)
            low, high = f["critical_ci"]
            found[name].append([f["p_critical"] <= 0.05, low <= 0 <= high])
    rows, wordings = (np.mean(found[name], 0) for name in ("rows", "wordings"))
    assert wordings[0] <= 0.08
    assert 0.9 <= wordings[1] <= 0.99
    assert rows[0] > 0.1
    assert rows[1] < 0.87


def test_specificity_of_wordings_is_level():
    rng, p = np.random.default_rng(2), {"rows": [], "wordings": []}
    for seed in range(120):
        own = rng.normal(0, 0.3, (30, 6))[CLUSTERS] + rng.normal(0, 0.05, (60, 6))
        spread = rng.normal(0, 0.05, (60, 3, 6))
        for name, clusters in (("rows", None), ("wordings", CLUSTERS)):
            one = specificity(own, spread, GROUPS, np.zeros(60, int), 99, seed, clusters)
            p[name].append(one["p"] <= 0.05)
    assert np.mean(p["wordings"]) <= 0.09
    assert np.mean(p["rows"]) > 0.1


def test_each_category_stands_alone_and_a_mean_hides_no_sign():
    rng = np.random.default_rng(0)
    labels = np.repeat(["up", "down", "none", "few"], [30, 30, 30, 4])
    own = rng.normal(0, 0.1, 94) + np.select([labels == "up", labels == "down"], [0.8, -0.8], 0)
    controls = {k: rng.normal(0, 0.1, (94, 6)) for k in ("random", "rate")}
    controls["rate"] = controls["rate"] + 0.1
    found = critical_by_category(own, controls, labels, resamples=300)
    rows = {row["category"]: row for row in found}
    assert rows["up"]["low"] > 0 < rows["up"]["sees"]
    assert rows["down"]["high"] < 0
    assert rows["few"]["note"].startswith("not testable: group")
    alone = critical(
        own[labels == "up"],
        {k: v[labels == "up"] for k, v in controls.items()},
        np.zeros(30),
        300,
    )
    for key, name in (("effect", "critical"), ("p_sets", "p_sets"), ("own", "own")):
        assert rows["up"][key] == alone[name]
    assert rows["up"]["control"] == alone["rate"]
    with pytest.raises(NotTestable, match="no category"):
        critical_by_category(own[-4:], {"r": controls["rate"][-4:]}, labels[-4:])


def test_specific_by_category_finds_the_set_that_hurts_its_own_rows_alone():
    rng, labels = np.random.default_rng(0), np.tile(np.repeat([0, 1, 2], 8), 2)
    halves = np.repeat([0, 1], 24)
    own = rng.normal(0, 0.1, (48, 3))
    own[labels == 0, 0] += 1.0  # specific
    own[:, 1] += 1.0  # hurts everyone
    everywhere = rng.normal(0, 0.1, (48, 4, 3))
    first, second, third = specific_by_category(own, everywhere, labels, halves, 499)
    by_hand = own[:, 0] - everywhere[:, :, 0].mean(1)
    parts = [
        by_hand[(labels == 0) & (halves == h)].mean()
        - np.mean([by_hand[(labels == c) & (halves == h)].mean() for c in (1, 2)])
        for h in (0, 1)
    ]
    assert first["specific"] == pytest.approx(np.mean(parts))
    assert first["low"] > 0.8
    assert first["p"] < 0.01
    assert second["low"] < 0 < second["high"]
    assert min(second["p"], third["p"]) > 0.01


def test_specific_by_category_without_rows_enough_says_so():
    found = specific_by_category(np.ones((6, 2)), np.zeros((6, 2, 2)), [0, 1] * 3, [0] * 6, 99)
    assert all("not testable" in row["note"] for row in found)
