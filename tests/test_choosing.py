"""Scores against a model whose critical neurons are known; controls against what they promise."""

import numpy as np
import pytest
import torch

from helpers.capture.counts import Counts
from helpers.hexainst.schema import CATEGORIES
from helpers.record import NotTestable, UserError
from helpers.study import planted
from helpers.study.ablation import draws_of, measure, spared
from helpers.study.scores import SCORES, Standing, sets_of, standing
from tests import zoo

torch.set_num_threads(1)
CAUSAL = ("attribution", "contribution", "contribution-response")


@pytest.fixture(scope="module")
def world():
    study = planted.study()
    return study, standing(study.half("A"), SCORES)


@pytest.mark.parametrize("score", CAUSAL)
def test_scores_of_what_a_neuron_does_rank_the_planted_one_first(world, score):
    for c, category in enumerate(CATEGORIES):
        assert world[1].scores[score][c].argmax() == planted.CIRCUIT[category]


def test_frequency_misses_the_planted_neurons_for_those_that_are_always_on(world):
    sets = sets_of(world[1], "frequency", 0.05)
    silent = {layer * zoo.N + n for layer in range(zoo.LAYERS) for n in planted.ALWAYS_ON}
    for members in sets:
        assert set(np.flatnonzero(members)) <= silent
        assert members.sum() == 12
    assert (world[1].rate[:, sorted(silent)] == 1).all()


def test_losing_the_planted_set_hurts_its_category_alone_and_losing_the_frequent_one_hurts_none(
    world,
):
    study, ranked = world
    here = study.half("B")
    for score in ("contribution", "frequency"):
        own = here.masks(sets_of(ranked, score, 1 / 240))
        found = measure(here, own, {"random": {c: [m] for c, m in own.items()}}, everywhere=1)
        means = np.stack([found["own"][found["labels"] == c].mean(0) for c in range(6)])
        if score == "contribution":
            assert means.diagonal().min() > 1
            assert abs(means[~np.eye(6, dtype=bool)]).max() < 0.1
        else:
            assert abs(means).max() < 1e-6
        assert np.allclose(
            found["random"][:, 0],
            found["own"][np.arange(len(here.rows)), found["labels"]],
            atol=1e-6,
        )
        assert np.allclose(found["everywhere"][:, 0], found["own"], atol=1e-6)


def fake(layers=4, width=60, seed=0):
    rng = np.random.default_rng(seed)
    counts = Counts(
        np.ones(3, np.int32),
        {"dense": np.ones((3, layers, width), np.uint16)},
        None,
        {"dense": (0, 1, 2, 3)},
    )
    total = layers * width
    return counts, Standing(
        {"frequency": rng.random((6, total))}, rng.random((6, total)), rng.random(total)
    )


def test_controls_have_the_sets_count_per_layer_and_matched_ones_are_not_its_own():
    counts, ranked = fake()
    sets = sets_of(ranked, "frequency", 0.1)
    masks, gaps = draws_of(ranked, counts, sets, 5, 0, "name")
    assert set(masks) == {"random", "rate", "magnitude"}
    assert set(gaps) == {"rate", "magnitude"}
    for kind, drawn in masks.items():
        for members, ones in zip(sets, drawn, strict=True):
            assert len(ones) == 5
            for one in ones:
                assert (one["dense"].sum(1) == members.reshape(4, 60).sum(1)).all()
                assert kind == "random" or not (one["dense"].ravel() & members).any()
            assert len({one["dense"].tobytes() for one in ones}) > 1


def test_magnitude_controls_come_from_the_ten_nearest_by_brute_force():
    counts, ranked = fake()
    sets = np.zeros((6, 240), bool)
    sets[np.arange(6), np.arange(6) * 31] = True
    masks, _ = draws_of(ranked, counts, sets, 20, 0, "name")
    for members, ones in zip(sets, masks["magnitude"], strict=True):
        own = int(np.flatnonzero(members)[0])
        layer = np.arange(own // 60 * 60, own // 60 * 60 + 60)
        others = layer[layer != own]
        nearest = others[np.argsort(abs(ranked.magnitude[others] - ranked.magnitude[own]))[:10]]
        assert {int(np.flatnonzero(one["dense"].ravel())[0]) for one in ones} <= set(
            nearest.tolist()
        )


def test_draws_depend_on_the_name_not_on_what_was_drawn_before():
    counts, ranked = fake()
    sets = sets_of(ranked, "frequency", 0.1)
    first, other, again = (
        draws_of(ranked, counts, sets, 2, 0, name)[0] for name in ("a", "b", "a")
    )
    assert all(
        (x["dense"] == y["dense"]).all()
        for kind in first
        for a, b in zip(first[kind], again[kind], strict=True)
        for x, y in zip(a, b, strict=True)
    )
    assert (first["random"][0][0]["dense"] != other["random"][0][0]["dense"]).any()


def test_a_set_of_more_than_half_a_layer_has_no_matched_controls():
    counts, ranked = fake()
    sets = np.zeros((6, 240), bool)
    sets[:, :31] = True
    assert set(draws_of(ranked, counts, sets, 2, 0, "name")[0]) == {"random"}


def test_sparing_takes_the_union_without_the_general_ones_and_leaves_the_set_or_as_many():
    counts, ranked = fake()
    sets = sets_of(ranked, "frequency", 0.2)
    sets[:, 7] = True
    pool = sets.any(0) & ~sets.all(0)
    masks = spared(counts, sets, 4, np.random.default_rng(0))
    for c in range(len(CATEGORIES)):
        flat = {kind: [mask["dense"].ravel() for mask in masks[kind][c]] for kind in masks}
        assert (flat["none spared"][0] == pool).all()
        assert (flat["own spared"][0] == pool & ~sets[c]).all()
        assert len(flat["random spared"]) == 4
        for ablated in flat["random spared"]:
            saved = pool & ~ablated
            assert not (ablated & ~pool).any()
            assert (saved.reshape(4, 60).sum(1) == (sets[c] & pool).reshape(4, 60).sum(1)).all()


def test_an_unknown_score_is_refused(world):
    with pytest.raises(UserError, match="luck"):
        standing(world[0].half("A"), ("luck",))


def test_a_score_is_computed_once_for_each_half(world, monkeypatch):
    study, ranked = world
    monkeypatch.setattr("helpers.study.scores.contribution", None)
    again = standing(study.half("A"), SCORES)
    assert all((again.scores[score] == ranked.scores[score]).all() for score in SCORES)


def test_nothing_is_chosen_on_the_rows_it_is_measured_on(world):
    """Oracle: the study of the half's rows alone, which never saw the others."""
    alone = planted.study(world[0].half("A").rows)
    found = standing(alone, SCORES)
    for score in SCORES:
        np.testing.assert_allclose(found.scores[score], world[1].scores[score], atol=1e-6)


def test_one_fold_or_a_category_that_one_lacks_is_not_testable(world):
    rows = world[0].rows
    one = planted.study(rows[rows["fold"] == "A"])
    with pytest.raises(NotTestable, match="none beside 'A'"):
        one.other("A")
    uneven = planted.study(rows[(rows["fold"] == "A") | (rows["category"] != "SUM")])
    assert uneven.half("A").labels.max() == 5
    with pytest.raises(NotTestable, match=r"no row of \['SUM'\]"):
        uneven.half("B")
