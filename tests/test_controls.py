"""Random control sets: counts, membership, matching, repeatability."""

import numpy as np
import pytest

from helpers.analysis.controls import (
    expected_at_usage,
    layer_matched,
    rate_gap,
    rate_matched,
    singles,
    usage_matched,
)
from helpers.record import UserError

RNG = np.random.default_rng(7)
RATE = {
    "dense": RNG.beta(0.6, 1.2, (4, 200)),
    "expert": RNG.beta(0.4, 2, (3, 6, 40)),
    "experts": RNG.random((3, 16)),
}
MASK = {name: rate > np.quantile(rate, 0.85) for name, rate in RATE.items()}


def per_layer(mask):
    return {name: part.reshape(len(part), -1).sum(1).tolist() for name, part in mask.items()}


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: layer_matched(MASK, np.random.default_rng(seed)),
        lambda seed: layer_matched(MASK, np.random.default_rng(seed), exclude=MASK),
        lambda seed: rate_matched(MASK, RATE, np.random.default_rng(seed)),
    ],
)
def test_controls_have_the_sets_shape_and_its_count_in_every_layer(draw):
    first, again, other = draw(0), draw(0), draw(1)
    assert per_layer(first) == per_layer(MASK)
    assert {n: p.shape for n, p in first.items()} == {n: p.shape for n, p in MASK.items()}
    assert all(
        (first[name] == again[name]).all() and (first[name] != other[name]).any() for name in MASK
    )
    assert all(part.dtype == bool for part in first.values())


def test_excluded_components_are_never_drawn_and_members_never_match_themselves():
    barred = {
        name: np.random.default_rng(1).random(part.shape) < 0.3 for name, part in MASK.items()
    }
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert not any(
            (layer_matched(MASK, rng, exclude=barred)[name] & barred[name]).any() for name in MASK
        )
        drawn = rate_matched(MASK, RATE, rng, exclude=barred)
        assert not any((drawn[name] & (barred[name] | MASK[name])).any() for name in MASK)


def test_layer_matched_draws_every_component_equally_often():
    mask, rng = {"dense": np.arange(20)[None] < 5}, np.random.default_rng(0)
    often = sum(
        layer_matched(mask, rng)["dense"][0].astype(int) for _ in range(4000)
    )  # expected 1,000 each
    assert abs(often - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_rate_matched_has_the_sets_rates_where_random_sets_have_not():
    rng = np.random.default_rng(0)
    mask = {"dense": np.zeros((4, 200), bool)}
    for layer in range(4):  # busy neurons, but not the very busiest: partners exist
        busy = np.argsort(RATE["dense"][layer])[120:190]
        mask["dense"][layer, rng.choice(busy, 12, replace=False)] = True
    plain, matched = layer_matched(mask, rng), rate_matched(mask, RATE, rng, nearest=5)
    assert abs(rate_gap(mask, plain, RATE)) > 0.15
    assert abs(rate_gap(mask, matched, RATE)) < 0.03
    assert rate_gap(mask, mask, RATE) == 0


def test_with_one_candidate_matching_takes_the_nearest_free_one_as_a_brute_force_search_does():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        p, mask = rng.permutation(30)[None] / 30 + 0.0, np.zeros((1, 30), bool)
        mask[0, rng.choice(30, 1)] = True
        member = np.flatnonzero(mask[0])[0]
        gap = np.where(mask[0], np.inf, np.abs(p[0] - p[0, member]))
        taken = np.flatnonzero(
            rate_matched({"dense": mask}, {"dense": p}, rng, nearest=1)["dense"][0]
        )
        assert len(taken) == 1
        assert np.isclose(gap[taken[0]], gap.min())


def test_top_sets_exhaust_their_neighbours_but_stay_the_closest_there_are():
    p = np.sort(np.random.default_rng(0).random((1, 1000)))
    mask = p > p[0, 899]  # the 100 busiest: only less busy ones are left
    drawn = rate_matched({"dense": mask}, {"dense": p}, np.random.default_rng(0), nearest=10)[
        "dense"
    ]
    assert np.flatnonzero(drawn[0]).min() >= 1000 - 100 - 110
    assert rate_gap({"dense": mask}, {"dense": drawn}, {"dense": p}) < 0


def test_ties_are_broken_at_random():
    p, mask = {"dense": np.zeros((1, 50))}, {"dense": np.arange(50)[None] == 3}
    draws = [
        rate_matched(mask, p, np.random.default_rng(seed), nearest=1)["dense"][0]
        for seed in range(60)
    ]
    assert len({int(np.flatnonzero(drawn)[0]) for drawn in draws}) > 20


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda: layer_matched(
                {"dense": np.ones((2, 4), bool)}, RNG, {"dense": np.eye(2, 4, dtype=bool)}
            ),
            "3 components",
        ),
        (
            lambda: rate_matched({"dense": np.ones((2, 4), bool)}, {"dense": np.ones((2, 4))}, RNG),
            "dense layer 0 has 0",
        ),
        (
            lambda: rate_matched(
                {"dense": np.eye(2, 4, dtype=bool)}, {"dense": np.ones((2, 5))}, RNG
            ),
            "same shape",
        ),
        (
            lambda: rate_matched(
                {"dense": np.eye(2, 4, dtype=bool)}, {"shared": np.ones((2, 4))}, RNG
            ),
            "family 'dense'",
        ),
        (
            lambda: rate_matched(
                {"dense": np.eye(2, 4, dtype=bool)}, {"dense": np.full((2, 4), np.nan)}, RNG
            ),
            "NaN",
        ),
        (lambda: layer_matched({"dense": np.ones((2, 4))}, RNG), "float64"),
    ],
)
def test_impossible_controls_are_refused(call, told):
    with pytest.raises(UserError, match=told):
        call()


def test_experts_are_matched_in_usage_where_random_ones_are_not():
    rng = np.random.default_rng(0)
    usage = {"experts": np.sort(rng.dirichlet(np.full(32, 0.5), 4) * 4)}
    mask = {"experts": np.zeros((4, 32), bool)}
    mask["experts"][:, [20, 24, 28]] = True  # much used, and not the very most
    draws = [usage_matched(mask, usage, np.random.default_rng(seed)) for seed in range(20)]
    plain = [layer_matched(mask, np.random.default_rng(seed)) for seed in range(20)]
    assert all((d["experts"].sum(1) == 3).all() for d in draws)
    assert not any((d["experts"] & mask["experts"]).any() for d in draws)
    gaps = [np.mean([abs(rate_gap(mask, d, usage)) for d in kind]) for kind in (draws, plain)]
    assert gaps[0] < 0.35 * gaps[1]
    assert len({d["experts"].tobytes() for d in draws}) > 5


def test_singles_are_each_component_once():
    found = list(singles((2, 3)))
    assert [index for index, _ in found] == list(np.ndindex(2, 3))
    assert (sum(mask["experts"].astype(int) for _, mask in found) == 1).all()
    assert all(mask["experts"][index] for index, mask in found)


def test_what_usage_explains_is_taken_off_a_single_experts_effect():
    rng = np.random.default_rng(0)
    usage = rng.random((6, 16))
    effects = 3 * usage + rng.normal(0, 0.01, usage.shape)
    rest = effects - expected_at_usage(effects, usage)
    assert abs(rest).max() < 0.1
    effects[2, 5] += 1
    rest = effects - expected_at_usage(effects, usage)
    assert rest[2, 5] > 0.9
    assert rest[2, 5] == rest.max()
    assert np.allclose(expected_at_usage(np.ones((1, 6)), np.ones((1, 6))), 1)
    with pytest.raises(UserError, match="more components in a layer"):
        expected_at_usage(effects[:, :4], usage[:, :4])
