"""The ledger's tests where nothing is at work: p is uniform at the paper's n, Holm's family-wise
error is kept, intervals cover the truth in 93 to 97 % of data sets.

A p of R resamples is a multiple of 1 / (1 + R): noise below that step makes it continuous.
"""

import numpy as np
import planted_counts
import pytest
from scipy.stats import kstest

from helpers.analysis.alteration import change_correlation
from helpers.analysis.effects import critical, critical_by_category, specificity
from helpers.analysis.stats import adjust, bootstrap, paired_effect
from helpers.analysis.wordings import wording_overlap

SETS, RESAMPLES, C = 300, 99, 6
LABELS, HALVES = np.tile(np.repeat(np.arange(C), 20), 2), np.repeat([0, 1], 20 * C)  # 240 rows
WORDINGS = np.arange(240) // 2  # two rows of each


def uniform(p, rng) -> float:
    """The Kolmogorov-Smirnov p of p-values that are multiples of 1 / (1 + RESAMPLES)."""
    return kstest(np.array(p) - rng.random(len(p)) / (1 + RESAMPLES), "uniform").pvalue


def gap_by_wordings(rng, seed):
    world = planted_counts.counts(rng, planted_counts.even(rows=2), width=80, wording=0.4)
    how = {"resamples": RESAMPLES, "seed": seed}
    return wording_overlap(world.similarity(), world.labels, world.clusters, **how)["p"]


def rows_of_one_category(rng, seed):
    own, drawn = rng.normal(0, 1, 40), {"random": rng.normal(0, 1, (40, 20))}
    return critical(own, drawn, HALVES[LABELS == 0], RESAMPLES, seed)["p_critical"]


def rows_in_wordings(rng, seed):
    own = (rng.normal(0, 1, 120)[WORDINGS] + rng.normal(0, 0.3, 240))[LABELS == 0]
    where = HALVES[LABELS == 0], RESAMPLES, seed, WORDINGS[LABELS == 0]
    return critical(own, {"random": np.zeros((40, 2))}, *where)["p_critical"]


def sets_of_all_categories(rng, seed):
    """Every set, own or drawn, does damage of its own; rows add noise."""
    group = LABELS + C * HALVES
    damage = rng.normal(0, 1, (2 * C, 21))[group] + rng.normal(0, 1, (240, 21))
    return critical(damage[:, 0], {"random": damage[:, 1:]}, group, RESAMPLES, seed)["p_sets"]


def specificity_of_rows(rng, seed):
    own, drawn = rng.normal(0, 1, (240, C)), rng.normal(0, 1, (240, 4, C))
    return specificity(own, drawn, LABELS, HALVES, RESAMPLES, seed)["p"]


def correlation_of_changes(rng, seed):
    moved = rng.random((20, 4, 40)) * rng.random((4, 40))
    return change_correlation(rng.normal(0, 1, (4, 40)), moved, RESAMPLES, seed)["p"]


NULLS = (
    gap_by_wordings,
    rows_of_one_category,
    rows_in_wordings,
    sets_of_all_categories,
    specificity_of_rows,
    correlation_of_changes,
)


@pytest.mark.parametrize("null", NULLS)
def test_p_is_uniform_where_nothing_is_at_work(null):
    rng = np.random.default_rng(11)
    p = [null(rng, seed) for seed in range(SETS)]
    assert uniform(p, rng) > 0.01
    assert np.mean(np.array(p) <= 0.05) <= 0.09


def test_holm_keeps_the_error_of_six_categories():
    rng, wrong, p = np.random.default_rng(12), [], []
    for seed in range(SETS):
        own, drawn = rng.normal(0, 1, 240), {"random": rng.normal(0, 1, (240, 20))}
        rows = critical_by_category(own, drawn, LABELS, HALVES, RESAMPLES, seed)
        found = [row["p_sets"] for row in rows]
        wrong.append(adjust(found, "holm").min() < 0.05)
        p += found
    assert np.mean(wrong) <= 0.08
    assert uniform(p, rng) > 0.01


def test_intervals_of_a_mean_cover_it_with_and_without_wordings():
    """A thousand data sets side by side, skewed rows of mean 1."""
    rng = np.random.default_rng(13)
    rows = rng.gamma(4, 0.25, (240, 1000))
    alone = paired_effect(rows, np.zeros(240)[:, None], 1000)
    units = rng.gamma(4, 0.25, (48, 1000))
    wording = np.arange(240) % 48
    shared = (units[wording] + rng.normal(0, 0.2, (240, 1000))).astype(np.float32)
    drawn = bootstrap(
        lambda w: w @ shared / w.sum(1, keepdims=True), np.zeros(240), 1000, clusters=wording
    )
    for low, high in (alone[1:3], drawn[1:3]):
        assert 0.93 <= np.mean((low <= 1) & (high >= 1)) <= 0.97


def test_intervals_of_critical_effects_cover_them():
    """Damage .5 to the own category beyond the controls; rows and sets vary."""
    rng, inside, group = np.random.default_rng(14), [], LABELS + C * HALVES
    for seed in range(500):
        drawn = rng.normal(0, 0.3, (2 * C, 20))[group] + rng.normal(0, 0.3, (240, 20))
        own = 0.5 + rng.normal(0, 0.6, 240)
        low, high = critical(own, {"random": drawn}, group, 300, seed)["critical_ci"]
        inside.append(low <= 0.5 <= high)
    assert 0.93 <= np.mean(inside) <= 0.97


def test_intervals_of_specific_effects_cover_them():
    """Damage .5 to the own category alone. Rows and draws are resampled apart, draws are few."""
    rng, inside = np.random.default_rng(15), []
    for seed in range(300):
        effect = rng.normal(0, 0.6, (240, C)) + 0.5 * (LABELS[:, None] == np.arange(C))
        drawn = rng.normal(0, 0.6, (240, 4, C))
        low, high = specificity(effect, drawn, LABELS, HALVES, 200, seed)["specificity_ci"]
        inside.append(low <= 0.5 <= high)
    assert 0.93 <= np.mean(inside) <= 0.97
