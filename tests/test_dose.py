"""Dose curves: by hand, by brute force, without an effect, and with each shape planted."""

import numpy as np
import pytest

from helpers.analysis.dose import dose_curve, hinge
from helpers.record import NotTestable, UserError

DOSES = np.log2([0.5, 1, 2, 5, 10, 20])
GROUPS = np.repeat(np.arange(6), 10)


def parts(curve, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    return [(level + rng.normal(0, noise, 60), rng.normal(0, noise, (60, 4))) for level in curve]


def test_a_hinge_is_the_best_of_all_by_brute_force():
    rng = np.random.default_rng(0)
    for y in rng.normal(size=(5, 6)):
        found = hinge(DOSES, y[None])
        tried = {}
        for knot in DOSES[1:-1]:
            design = np.stack([np.ones(6), DOSES, np.clip(DOSES - knot, 0, None)], 1)
            fit = np.linalg.lstsq(design, y, rcond=None)[0]
            tried[knot] = ((y - design @ fit) ** 2).sum(), fit
        knot = min(tried, key=lambda k: tried[k][0])
        assert found["at"][0] == knot
        assert np.isclose(found["left"][0], tried[knot][0])
        assert np.isclose(found["before"][0], tried[knot][1][1])
        assert np.isclose(found["after"][0], tried[knot][1][1:].sum())
        straight = np.polyfit(DOSES, y, 1, full=True)[1][0]
        assert np.isclose(found["straight"][0], straight)


def test_a_curve_carried_by_one_point_is_said_to_be_a_jump():
    """The referee's case: flat to 10 %, then .411 at 20 %: a slope would have been significant."""
    found = dose_curve(DOSES, parts([0, 0, 0.002, 0.005, 0.009, 0.411]), GROUPS, 300)
    assert found["shape"] == f"flat, then a jump from {DOSES[4]:g} to {DOSES[5]:g}"
    assert found["change"]["at"] == found["change"]["low"] == DOSES[4]
    assert found["largest_step"]["share"] > 0.9
    assert found["monotone"]
    assert found["before"]["low"] < 0.02
    assert found["after"]["low"] > 0.3
    assert found["bend"] > 0.95


def test_a_gradual_rise_a_bend_and_a_fall_are_told_apart():
    straight = dose_curve(DOSES, parts(0.1 * (DOSES + 1)), GROUPS, 300)
    assert straight["shape"] == "rises"
    assert straight["largest_step"]["share"] < 0.4
    assert np.isclose(straight["before"]["slope"], 0.1, atol=0.03)
    bent = dose_curve(DOSES, parts([0, 0, 0, 0.3, 0.6, 0.9]), GROUPS, 300)
    assert bent["shape"] == f"flat up to {DOSES[2]:g}, then it rises"
    fall = dose_curve(DOSES, parts([0, 0.2, 0.4, 0.1, 0.5, 0.7]), GROUPS, 300)
    assert fall["falls"] == [DOSES[3]]
    assert not fall["monotone"]
    assert "with a fall at" in fall["shape"]
    down = dose_curve(DOSES, parts([0, -0.2, -0.3, -0.4, -0.5, -0.7]), GROUPS, 300)
    assert down["shape"].startswith("falls")
    assert down["largest_step"]["share"] is None


@pytest.mark.parametrize(
    ("curve", "shape"),
    [
        (
            [0, -0.1, -0.2, -0.1, 0.4, 0.9],
            "falls to its lowest at 1, then it rises, with a fall at 0, 1",
        ),
        (
            [0, -0.05, -0.1, -0.15, -0.2, 1],
            f"falls to its lowest at {DOSES[4]:g}, then a jump from {DOSES[4]:g} to",
        ),
        ([0, 1.2, -0.2, 0.2, 0.5, 0.9], "falls to its lowest at 1, then it rises"),
        ([0, -0.01, -0.02, 0.3, 0.6, 0.9], "flat up to 1, then it rises"),
        ([0, 0.1, 0.2, 0.5, 0.9, 1.3], "rises"),
    ],
)
def test_what_comes_before_a_rise_is_said_with_its_sign(curve, shape):
    """Down by more than a tenth of the rise, by less, or up."""
    assert dose_curve(DOSES, parts(curve, noise=0.02), GROUPS, 300)["shape"].startswith(shape)


def test_p_is_of_the_effect_that_the_curve_prints():
    """Groups of 5 and 20 rows: the mean over groups is above 0, that over rows is 0."""
    groups = np.repeat([0, 1], [5, 20])
    own, rng = np.where(groups == 0, 1.0, -0.25), np.random.default_rng(0)
    given = [(k * own + rng.normal(0, 0.02, 25), np.zeros((25, 2))) for k in (1, 2, 3, 4)]
    for k, row in enumerate(dose_curve([1, 2, 3, 4], given, groups, 999)["curve"], 1):
        assert row["effect"] == pytest.approx(0.375 * k, abs=0.02)
        assert row["p"] < 0.1


def test_the_curve_is_own_minus_control_with_an_interval_that_covers():
    given = parts([0, 0, 0.1, 0.2, 0.2, 0.3], 3)
    found = dose_curve(DOSES, given, GROUPS, 300)
    for row, (own, control) in zip(found["curve"], given, strict=True):
        assert np.isclose(row["effect"], own.mean() - control.mean())
        assert row["low"] < row["effect"] < row["high"]
        assert row["sees"] > 0
    rows = [
        row
        for seed in range(40)
        for row in dose_curve(DOSES, parts(np.zeros(6), seed), GROUPS, 199, seed)["curve"]
    ]
    assert 0.92 <= np.mean([row["low"] <= 0 <= row["high"] for row in rows]) <= 0.99
    assert 0.02 <= np.mean([row["p"] <= 0.05 for row in rows]) <= 0.09


def test_no_effect_is_no_rise():
    shapes = [
        dose_curve(DOSES, parts(np.zeros(6), seed), GROUPS, 199, seed)["shape"]
        for seed in range(40)
    ]
    assert np.mean([shape.startswith("no rise seen") for shape in shapes]) >= 0.85


def test_wordings_are_drawn_as_wholes():
    rng, clusters = np.random.default_rng(0), np.repeat(np.arange(30), 2)
    shared = rng.normal(0, 0.3, 30)[clusters]
    given = [(level + shared, np.zeros((60, 3))) for level in (0, 0.1, 0.2, 0.3)]
    rows, whole = (
        dose_curve([1, 2, 3, 4], given, GROUPS, 500, clusters=c)["curve"][0]
        for c in (None, clusters)
    )
    assert whole["high"] - whole["low"] > 1.2 * (rows["high"] - rows["low"])
    assert whole["sees"] > 1.2 * rows["sees"]


@pytest.mark.parametrize(
    ("doses", "levels", "error", "message"),
    [
        ([1, 2, 3], [0, 1, 2], UserError, "at least 4"),
        ([1, 2, 2, 3], [0, 1, 2, 3], UserError, "rising"),
        ([1, 2, 3, 4, 5], [0, 1, 2, 3], UserError, "with 4 effects"),
        ([1, 2, 3, 4], [0, 0, 0, 0], NotTestable, "no curve"),
    ],
)
def test_what_is_no_curve_says_so(doses, levels, error, message):
    with pytest.raises(error, match=message):
        dose_curve(doses, parts(levels, noise=0.0), GROUPS, 20)
