"""Alteration by oracle: Monte Carlo, hand-worked cases, scipy, calibration."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from helpers.analysis.alteration import (
    change_correlation,
    changes,
    common_gain,
    cross_correlation,
    crossing,
    crossings,
    layer_rank_correlation,
    lead,
    shares,
)
from helpers.analysis.nulls import chance_jaccard
from helpers.record import UserError


def test_changes_split_the_union():
    rng = np.random.default_rng(0)
    base, tuned = rng.random((2, 5, 40)) < 0.3
    found = changes(base, tuned)
    assert (sum(v.astype(int) for v in found.values()) == (base | tuned)).all()
    assert (found["kept"] | found["lost"] == base).all()
    assert (found["kept"] | found["gained"] == tuned).all()
    with pytest.raises(UserError, match="expected one shape"):
        changes(base, tuned[:, :10])


@pytest.mark.parametrize("sizes", [([3, 0, 9], [5, 2, 4], [12, 20, 10]), ([1, 1], [1, 0], [2, 2])])
def test_chance_jaccard_agrees_with_monte_carlo(sizes):
    rng, draws = np.random.default_rng(0), 20_000
    shared = np.zeros(draws)
    for a, b, n in zip(*sizes, strict=True):
        one, two = (np.argsort(rng.random((draws, n)), 1).argsort(1) < size for size in (a, b))
        shared += (one & two).sum(1)
    total = sum(sizes[0]) + sum(sizes[1])
    simulated = shared / (total - shared)
    assert chance_jaccard(*sizes) == pytest.approx(
        simulated.mean(), abs=4 * simulated.std() / draws**0.5
    )
    with pytest.raises(UserError, match="fit into their pools"):
        chance_jaccard([3], [1], [2])


def test_common_gain_by_hand_and_its_expectation_is_calibrated():
    base = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], bool)  # two layers of four
    one, two = (
        np.array([[1, 0, 1, 0, 1, 0, 0, 0]], bool),
        np.array([[0, 0, 1, 1, 0, 0, 0, 0]], bool),
    )
    # gained {2, 4} and {2, 3}: 1 of 3 in common. Chance: layer 0 has 2 free, one is drawn
    # against both: always common.
    assert common_gain(base, one, two, 2).tolist() == [[pytest.approx(1 / 3), pytest.approx(1 / 3)]]
    assert common_gain(base, base, base, 2).shape == (0, 2)
    rng = np.random.default_rng(0)
    base = rng.random((400, 60)) < 0.2
    found = common_gain(base, *(base | (rng.random((2, 400, 60)) < 0.2)), 3)
    assert (found[:, 0] - found[:, 1]).mean() == pytest.approx(0, abs=0.01)


def test_ranks_are_taken_within_layers():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1, 50))
    assert layer_rank_correlation(a, b) == pytest.approx(spearmanr(a[0], b[0]).statistic)
    shift = np.array([[0.0], [100.0]])  # layers differ in level: must not correlate
    x, y = rng.normal(size=(2, 2, 2000))
    assert abs(layer_rank_correlation(x + shift, y + shift)) < 0.05
    stretched = np.exp(x * [[0.1], [3.0]])  # each layer's own monotone scale: no matter
    assert layer_rank_correlation(stretched, y) == pytest.approx(
        layer_rank_correlation(x, y), abs=1e-12
    )
    many = layer_rank_correlation(a, np.stack([b, -b]))
    assert many[0] == pytest.approx(-many[1])
    with pytest.raises(UserError, match="not testable|Not testable"):
        layer_rank_correlation(np.ones((2, 3)), x[:, :3])


def test_change_correlation_finds_a_planted_one_and_no_other():
    rng = np.random.default_rng(0)
    weights = rng.random((3, 40))
    moved = np.abs(weights + rng.normal(0, 1, (60, 3, 40)))
    found = change_correlation(weights, moved, 300)
    low, high = found["rho_ci"]
    assert 0 < low < high
    assert found["p"] < 0.01
    assert found["rho"] > 0.2
    hits = [
        change_correlation(rng.random((3, 40)), moved, 99, seed)["p"] <= 0.1 for seed in range(60)
    ]
    assert np.mean(hits) < 0.25


def test_a_change_seen_in_copies_of_an_instruction_is_no_surer():
    rng = np.random.default_rng(0)
    weights, some = rng.random((3, 40)), rng.random((15, 3, 40))
    copies, of = np.repeat(some, 4, axis=0), np.repeat(np.arange(15), 4)
    rows, whole, apart = (
        np.ptp(change_correlation(weights, moved, 499, clusters=clusters)["rho_ci"])
        for moved, clusters in ((some, np.arange(15)), (copies, of), (copies, None))
    )
    assert whole == pytest.approx(rows, rel=0.01)
    assert apart < 0.6 * whole


def test_lead_by_hand():
    """Components 0, .8, 1 of the way, ability 0, .2, 1: mean of .6 and 0; back: minus."""
    components = np.array([[1.0] * 10, [0.6] * 10, [0.5] * 10])  # similarity falls from 1 to .5
    ability = np.array([[0.0] * 10, [0.2] * 10, [1.0] * 10])
    assert shares(components)[0].tolist() == pytest.approx([0, 0.8, 1])
    found = lead(components, ability, np.zeros(10), 50)
    assert found["lead"] == pytest.approx(0.3)
    assert found["p"] == pytest.approx(1 / 51)
    back = lead(ability, components, np.zeros(10), 50)
    assert back["lead"] == pytest.approx(-0.3)
    assert back["p"] == 1
    with pytest.raises(UserError, match="ends where it began"):
        lead(components, np.zeros((3, 10)), np.zeros(10), 50)


def test_crossings_are_those_of_the_curves():
    steps, curve = [0, 10, 30], np.array([[0, 0.25, 1.0], [0, 1.0, 1.0]])
    assert crossing(steps, curve).tolist() == pytest.approx([10 + 20 / 3, 5])
    with pytest.raises(UserError, match="does not start below"):
        crossing(steps, curve[:, ::-1])
    one, two = np.repeat(curve.T[:, :1], 8, 1), np.repeat(curve.T[:, 1:], 8, 1)
    found = crossings(steps, [one, two], np.zeros(8), 20)
    assert found.estimate.tolist() == pytest.approx([50 / 3, 5, 5 - 50 / 3])
    assert (found.low == found.high).all()


def test_cross_correlation_peaks_at_the_planted_delay():
    steps = np.arange(0, 2001, 100)
    step_at = np.array([500, 550, 1100])
    curve = np.stack([(1 / (1 + np.exp(-(steps[:, None] - step_at) / 40))).mean(1)] * 6, 1)
    later = np.vstack([np.repeat(curve[:1], 2, 0), curve[:-2]])  # two grid steps later
    found = cross_correlation(steps, curve, later, np.zeros(6), resamples=10)
    assert found.estimate.argmax() - 4 == 2
    assert found.estimate.max() > 0.95
    with pytest.raises(UserError, match="finer grid"):
        cross_correlation(steps[:6], curve[:6], later[:6], np.zeros(6), resamples=10)
