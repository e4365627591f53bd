"""Ablations of a study, on a model whose critical neurons are known (see helpers.study.planted)."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import bars
from helpers.analysis.dose import hinge
from helpers.capture import budget
from helpers.capture.interventions import Places, ablate
from helpers.capture.tokens import Encoded, encode
from helpers.hexainst.schema import CATEGORIES
from helpers.record import NotTestable, UserError
from helpers.study import grid, planted
from helpers.study import needed as needed_room
from helpers.study.evaluate import ablation_matrix, damage_split, gain_lost, nll
from helpers.study.needed import (
    TESTED,
    Needed,
    _said_of_places,
    ablations,
    groups_of,
    partners,
    same_experts,
    sentences,
    together,
)
from tests import zoo

SHARED = ("by_consensus", "grid", "places", "pseudo", "sufficient")  # sets or draws may be the same
SHARED = dict.fromkeys(SHARED, 0.85) | {"parts": 0.25, "pseudo": 0.7}  # no part, or grouping
SETTINGS = {
    "epsilon": 0.01,
    "sizes": (0.01, 0.02, 0.05, 0.1),
    "ablation_rows": 6,
    "controls": 12,
    "controls_elsewhere": 4,
    "controls_all_rows": 2,
    "resamples": 199,
    "scores": ("frequency", "contribution"),
}


@pytest.fixture(scope="module")
def needed():
    return Needed(planted.study(**SETTINGS))


def test_sentences_say_of_which_categories_a_test_was_made():
    one = SimpleNamespace(profile=SimpleNamespace(epsilon=0.05), study=SimpleNamespace())
    one.units = lambda: {"wordings"}
    one.study.categories = ("a", "b", "c")
    key = "ablation.equal.frequency.all"
    one.numbers = {f"{key}.critical": 1.0, f"{key}.critical_ci": [0.5, 1.5]}
    one.numbers |= {"ablation.positive": 2.0, "ablation.negative": 0.0}
    one.numbers["ablation.negative_ci"] = [-0.1, 0.1]
    said = " ".join(sentences({"p": one}))
    assert said.count("no category: none can be tested") == 2
    one.numbers |= {f"{key}.a.p_sets": 0.02, f"{key}.a.critical_ci": [0.1, 2.0]}
    one.numbers |= {f"{key}.b.p_sets": 0.04, f"{key}.b.critical_ci": [0.1, 2.0]}
    assert "supported in 2 of 2 categories tested (a, b)" in " ".join(sentences({"p": one}))
    one.numbers[f"{key}.a.p_sets"] = 0.03  # Holm: twice that
    assert "0 of 2 categories tested (none)" in " ".join(sentences({"p": one}))
    one.numbers |= {f"{key}.a.p_sets": 0.01, f"{key}.b.critical_ci": [-0.1, 2.0]}
    assert "1 of 2 categories tested (a)" in " ".join(sentences({"p": one}))
    too_sure = "p: a category has fewer than five wordings in a half"
    assert too_sure not in " ".join(sentences({"p": one}))
    one.units = lambda: {"wordings", "rows"}
    assert too_sure in " ".join(sentences({"p": one}))


def worded_study(**settings):
    """The planted study with a word behind the instruction."""
    study = planted.study(**SETTINGS | settings)
    study.profile = replace(study.profile, template="say: {instruction}\nso: ")
    return study


def read_by(experiment, ledger, **settings) -> int:
    """Rows read under an ablation by one experiment of a study that remembers nothing."""
    one = Needed(worded_study(**settings))
    if experiment == "grid":
        one.study.once(("checkpoint", "tuned"), lambda: {"weights": None})
        for cell in product(one.profile.scores, one.profile.sizes, one.halves):
            grid.compute(one.study, grid.expected(one.study, *cell))
    elif experiment == "damage":
        one.damage(("frequency", "contribution"))
    else:
        getattr(one, experiment)()
    lines = [line for line in budget.lines_of(ledger) if line["altered"]] if ledger.exists() else []
    ledger.unlink(missing_ok=True)
    return sum(len(line["lengths"]) for line in lines if line["purpose"] == "losses")


@pytest.mark.parametrize(
    "few", [{}, {"controls": 3, "controls_all_rows": 4, "controls_elsewhere": 1}]
)
def test_the_plan_counts_the_rows_that_each_experiment_reads(tmp_path, monkeypatch, few):
    ledger = tmp_path / "tokens.jsonl"
    monkeypatch.setenv(budget.LEDGER, str(ledger))
    planned = ablations(planted.study(**SETTINGS | few).profile, len(CATEGORIES))
    del planned["checks"]  # needs a twin's checkpoint
    assert planned.pop("single_experts") == 0  # see test_experts
    for name, count in planned.items():
        found = read_by(name, ledger, **few)
        assert SHARED.get(name, 1) * count <= found <= count, name


def circuit(study):
    """{category: mask of its one critical neuron}"""
    masks = {}
    for category, place in planted.CIRCUIT.items():
        members = np.zeros(3 * zoo.N, bool)
        members[place] = True
        masks[category] = study.counts().mask("neurons", members)
    return masks


def test_contribution_finds_the_planted_sets_and_frequency_does_not(needed):
    for category, place in planted.CIRCUIT.items():
        c = CATEGORIES.index(category)
        assert needed.sets("contribution", "A")[c, place]
        assert not needed.sets("frequency", "A")[c, place]


def test_doses_hurt_at_once_and_no_step_after_it_counts(needed):
    curve, fits = needed.doses()
    at = fits.set_index(["score", "measured on"])
    assert at.loc[("contribution", "all"), "slope"] < 0.05  # all of it is there at 1 %
    first = curve[(curve["line"] == "contribution") & (curve["share"] == 0.01)]["increase"].item()
    assert first > 0.1
    assert needed.numbers["ablation.dose.contribution.all.second_least"] < 0.05
    nulls = curve[curve["line"].str.startswith("null")]
    assert nulls["increase"].max() < first / 2
    row = at.loc[("contribution", "all")]
    assert row["bends at"] in (2.0, 5.0)
    assert 2.0 <= row["from"] <= row["to"] <= 5.0
    mine = curve.pivot(index="share", columns="line", values="increase")
    beyond = mine["contribution"] - mine["null: random, layers of contribution"]
    assert row["bends at"] == hinge(100 * beyond.index, [beyond])["at"][0]
    assert needed.numbers["ablation.dose.contribution.all.change"] == row["bends at"]


def test_of_fewer_than_three_steps_no_second_least_is_told():
    one = Needed(planted.study(**SETTINGS | {"sizes": (0.01, 0.02, 0.05)}))
    fits = one.doses()[1]
    assert fits[["second least step", "bends at"]].isna().all(axis=None)
    assert set(fits["shape"]) == {"too few sizes to tell"}
    assert fits["slope"].notna().all()
    assert not any("second_least" in key for key in one.numbers)


def test_groups_that_are_no_categories_have_less_specific_sets(needed):
    table = needed.pseudo().set_index("measured on")
    assert table.loc["all", "category"] > 0.1
    assert table.loc["all", "beyond"] > 0
    key = "ablation.pseudo.contribution.all"
    low, high = needed.numbers[f"{key}.beyond_ci"]
    assert low < needed.numbers[f"{key}.beyond"] < high


def test_groups_are_of_like_size_and_in_both_halves():
    rows = planted.rows(12)
    one, two = rows[rows["half"] == "A"], rows[rows["half"] == "B"]
    for name in ("length", "random"):
        first, second = groups_of(name, one, two, 6)
        assert set(first) == set(second) == set(range(6))
        assert max(np.ptp(np.bincount(codes)) for codes in (first, second)) <= 1
    size = (two["instruction"] + two["input"]).str.len().to_numpy()
    longest = groups_of("length", one, two, 6)[1]
    assert all(size[longest == n].max() <= size[longest > n].min() for n in range(5))
    with pytest.raises(NotTestable, match="no row in a half"):
        groups_of("random", one.head(2), two.head(2), 6)


def test_a_category_of_too_few_rows_stands_in_the_table_with_a_note(needed):
    labels, rng = np.repeat(np.arange(6), [6, 6, 6, 6, 6, 3]), np.random.default_rng(0)
    part = {"own": rng.random((33, 1)), "random": rng.random((33, 4)), "labels": labels}
    one = Needed(needed.study)
    one.clusters = lambda halves: np.arange(33 * len(halves))
    table = one.by_category("made.up", {"A": part, "B": part}, "lost")
    few = table["category"] == needed.study.categories[5]
    assert len(table) == 3 * 6
    assert table.loc[few, "critical"].isna().all()
    assert table.loc[few, "note"].str.contains("has 3 ").all()
    assert table.loc[~few, "critical"].notna().all()


def test_a_page_says_how_many_rows_were_measured_not_how_many_were_asked_for(needed):
    one = Needed(planted.study(**SETTINGS | {"ablation_rows": 1000}))
    counted = one.study.rows["category"].value_counts()
    assert one.study.measured_sizes().to_dict() == counted.to_dict()
    assert list(one.study.measured_sizes().index) == list(one.study.categories)
    six = np.zeros((6, 6))
    one.numbers = {f"ablation.neurons.{name}": six for name in ("matrix", "control_matrix")}
    table = one.matrix("neurons")
    assert table["panel"][0].endswith(", n = 16")
    assert table["n"].tolist() == [16] * 36
    here = [needed.here(half).rows["category"] for half in needed.halves]
    assert needed.study.measured_sizes().to_dict() == pd.concat(here).value_counts().to_dict()
    assert ablations(replace(one.profile, rows=3), 6) == ablations(
        replace(one.profile, ablation_rows=3), 6
    )


def test_sets_are_there_for_the_headline_whatever_scores_a_profile_names(needed):
    lone = Needed(needed.study)
    lone.profile = replace(needed.profile, scores=("lape",))
    for score in TESTED:
        assert (lone.sets(score, "A") == needed.sets(score, "A")).all()


def test_a_grouping_that_the_rows_do_not_allow_is_left_out_with_a_note(needed, monkeypatch):
    def refusing(*names):
        def some(name, *rows):
            if name in names:
                raise NotTestable(f"no groups by {name}.")
            return groups_of(name, *rows)

        return some

    monkeypatch.setattr(needed_room, "groups_of", refusing("opening"))
    one = Needed(needed.study)
    table = one.pseudo()
    assert set(table["note"]) == {"no groups by opening."}
    assert "opening" not in table
    assert "ablation.pseudo.contribution.all.beyond" in one.numbers
    monkeypatch.setattr(needed_room, "groups_of", refusing("opening", "length", "random"))
    none = Needed(needed.study)
    [note] = none.pseudo()["note"]
    assert note == "no groups by opening. no groups by length. no groups by random."
    assert not none.numbers


@pytest.mark.parametrize(
    ("experts", "k", "members", "can"),
    [(6, 2, 3, True), (6, 2, 4, False), (7, 5, 2, True), (7, 5, 3, False), (6, 2, 0, True)],
)
def test_experts_are_rerouted_where_enough_others_are_left(monkeypatch, experts, k, members, can):
    one = Needed(SimpleNamespace(profile=None, halves=("A", "B")))
    monkeypatch.setattr(one, "experts", lambda: experts)
    one.study.counts = lambda: SimpleNamespace(per_token=lambda: k)
    none, some = np.zeros((2, 6, 2, experts), bool)
    some[3, 1, :members] = True
    assert one._reroutable([none.reshape(6, -1), some.reshape(6, -1)]) == can
    assert one._reroutable([none.reshape(6, -1)])
    assert one._reroutable([]), "a dense model has none"


def test_a_curve_that_cannot_be_shaped_says_why(needed, monkeypatch):
    def refused(*_):
        raise NotTestable("the effect is the same at all doses.")

    monkeypatch.setattr(needed_room, "dose_curve", refused)
    rng, one = np.random.default_rng(0), Needed(needed.study)
    parts = [
        {"own": rng.random((12, 1)), "random": rng.random((12, 3)), "clusters": np.arange(12)}
        for _ in range(4)
    ]
    row = one._fit("frequency", "all", parts, np.repeat([0, 1], 6))
    assert row["shape"] == "the effect is the same at all doses."
    assert np.isnan(row["bends at"])
    assert "ablation.dose.frequency.all.second_least" in one.numbers
    assert "ablation.dose.frequency.all.change" not in one.numbers


def test_by_category_says_of_each_what_random_sets_do(needed):
    table = needed.following()
    mine = table[(table["score"] == "contribution") & (table["measured on"] == "all")]
    assert set(mine["category"]) == set(CATEGORIES)
    row = mine.iloc[0]
    key = f"ablation.gain.contribution.all.{row['category']}"
    assert needed.numbers[f"{key}.lost"] == row["critical"] == row["own"] - row["random"]
    assert 1 / 13**2 <= row["p_sets"] <= 1


def test_gain_lost_is_what_two_losses_say(needed):
    """In this model the instruction's last letters do not matter: both losses rise alike."""
    here = needed.here("A").category("CODE")
    masks = {"own": circuit(needed.study)["CODE"]}
    own = ablation_matrix(here, masks, "zero").to_numpy()
    lost = gain_lost(here, masks)
    after = here.rows.assign(instruction=np.roll(here.rows["instruction"], -1))
    other = planted.study(after, **SETTINGS)
    crossed = ablation_matrix(other, masks, "zero").to_numpy()
    assert np.allclose(lost, own - crossed, atol=1e-5)
    assert own.min() > 0.1


@pytest.fixture(scope="module")
def worded():
    return Needed(worded_study())


def test_damage_is_split_by_what_is_left_without_an_instruction(worded):
    """Whole and language are the rises of two losses, each by `nll` with the set ablated by hand;
    following is the rest.
    """
    here = worded.here("A").category("CODE")
    mask = circuit(worded.study)["CODE"]
    model, tokenizer = here.model()
    bare = [f"say: \nso: {reference}" for reference in here.rows["reference"]]
    lone = encode(tokenizer, bare)
    end = tokenizer.eos_token_id
    read = []
    for one, reference in zip(lone, here.rows["reference"], strict=True):
        size = len(tokenizer(reference, add_special_tokens=False)["input_ids"])
        counted = (False,) * (len(one.ids) - size) + (True,) * (size + 1)
        read.append(Encoded((*one.ids, end), counted))
    risen = []
    for encoded in (here.encoded("reference"), read):
        before = nll(model, encoded)
        with ablate(model, mask, "zero"):
            risen.append(nll(model, encoded) - before)
    found = damage_split(here, {"own": mask})
    assert np.allclose(found["whole"][:, 0], risen[0], atol=1e-5)
    assert np.allclose(found["language"][:, 0], risen[1], atol=1e-5)
    assert np.allclose(found["following"][:, 0], risen[0] - risen[1], atol=1e-5)
    assert np.abs(risen[0]).max() > 0.1


def test_a_split_is_beyond_random_sets_and_its_parts_add_up(worded):
    table = worded.split()
    whole = table[table["measured on"] == "all"].set_index(["score", "damage"])["critical"]
    for score in TESTED:
        parts = whole[score]
        beyond = table[table["score"] == score]
        assert (beyond["own"] - beyond["random"]).tolist() == pytest.approx(
            beyond["critical"].tolist()
        )
        assert parts["whole"] == pytest.approx(parts["language"] + parts["following"])
        key = f"ablation.split.{score}.all.following"
        assert worded.numbers[f"{key}.critical"] == parts["following"]
        assert worded.numbers[f"{key}.critical_ci"][0] <= parts["following"]
    assert set(table["measured on"]) == {"all", "A", "B"}


def test_a_template_that_says_nothing_behind_the_instruction_leaves_no_split(needed):
    assert needed.split().empty


def test_an_ablation_at_the_response_alone_is_that_of_a_hook_there(needed):
    here, mask = needed.here("A").category("QA"), {"own": circuit(needed.study)["QA"]}
    everywhere = ablation_matrix(here, mask, "zero").to_numpy()
    found = {
        where: ablation_matrix(here, mask, "zero", where=where, allow_inert=True).to_numpy()
        for where in ("response", "prompt", "all but the first")
    }
    assert np.allclose(found["response"], everywhere, atol=1e-5)  # a_c stands in the response
    assert np.allclose(found["prompt"], 0, atol=1e-6)
    assert np.allclose(found["all but the first"], everywhere, atol=1e-5)
    with pytest.raises(UserError, match="where is 'nowhere'"):
        ablation_matrix(here, mask, "zero", where="nowhere")


def test_places_are_where_neurons_are_zero_and_nowhere_else():
    model = planted.model()
    ids, seen = torch.arange(4, 12)[None], []
    at = torch.zeros(1, 8, dtype=torch.bool)
    at[0, 2:4] = True
    mask = np.zeros((3, zoo.N), bool)
    mask[0, :5] = True
    down = model.model.layers[0].mlp.down_proj
    with ablate(model, {"dense": mask}, "zero", where=Places(at)):
        hook = down.register_forward_hook(lambda module, args, out: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        hook.remove()
    zero = (seen[0][0, :, :5] == 0).all(1)
    assert zero.tolist() == at[0].tolist()


def test_each_row_is_measured_under_its_own_set_and_one_other(needed):
    half, found = needed.halves[0], needed.places().set_index(["score", "where", "operator"])
    here, own = needed.here(half), needed._masks("contribution", needed.halves[0])
    drawn = {("random", c): masks[0] for c, masks in needed.controls(own, 1, half).items()}
    table = ablation_matrix(here, own | drawn, "zero").to_numpy()
    own_set, drawn_set, labels = table[:, :6], table[:, 6:], here.labels
    other = partners(labels, 6)
    assert (np.bincount(6 * labels + other, minlength=36).reshape(6, 6) + np.eye(6) > 0).all()
    assert not (other == labels).any()
    row_of = np.arange(len(labels))
    row = found.loc[("contribution", "everywhere", "zero")]
    expected = {"own": own_set[row_of, labels], "random": drawn_set[row_of, labels]}
    expected["others"] = own_set[row_of, other]
    for name, values in expected.items():
        np.testing.assert_allclose(row[name], values.mean(), rtol=1e-4, atol=1e-6)
    assert row["n"] == len(labels)
    assert row["own"] > 0.1
    assert row["low"] <= row["own"] <= row["high"]
    kept = needed.numbers["ablation.places.contribution.everywhere.zero.own_ci"]
    assert kept == [row["low"], row["high"]]


def test_what_places_cost_is_said_in_their_order():
    numbers = {}
    for cost, where in enumerate(("everywhere", "all_but_the_first", "prompt", "response"), 1):
        key = f"ablation.places.frequency.{where}.zero"
        numbers |= {f"{key}.own": float(cost), f"{key}.own_ci": [cost - 0.5, cost + 0.5]}
        numbers |= {f"{key}.random": 0.1 * cost}
    [said] = _said_of_places(numbers)
    places = [said.index(words) for words in ("every token", "but the first", "prompt", "response")]
    costs = [said.index(f"{cost}.00 nats per token [") for cost in (1, 2, 3, 4)]
    assert sorted(places + costs) == [x for pair in zip(costs, places, strict=True) for x in pair]
    assert said.endswith("One random set a category, zero at every token: 0.10.")
    assert list(_said_of_places({})) == []


def test_the_tables_of_a_page_stand_side_by_side(needed):
    table = needed.places()
    assert set(table["where"]) == {"everywhere", "all but the first", "prompt", "response"}
    strong = table[(table["score"] == "contribution") & (table["operator"] == "zero")]
    at = strong.set_index("where")["own"]
    assert at["response"] == pytest.approx(at["everywhere"], abs=1e-4)
    assert needed.usage().empty
    assert isinstance(needed.own_part(), pd.DataFrame)


def test_parts_of_sets_are_measured_as_sets_of_their_members(needed, monkeypatch):
    """Each part's effect is that of its mask on the own rows; a massive neuron is in no part of
    `no massive`.
    """
    width = needed.sets("contribution", "A").shape[1]
    planted_here = np.isin(np.arange(width), list(planted.CIRCUIT.values()))
    monkeypatch.setattr(needed_room, "largest_outputs", lambda *_: (None, 101.0 * planted_here))
    table = needed.parts().set_index(["score", "part"])
    whole = {half: needed.sets("contribution", half) for half in needed.halves}
    members = {
        "whole": whole,
        "general": {half: sets & sets.all(0) for half, sets in whole.items()},
        "own": {half: sets & (sets.sum(0) <= 3) for half, sets in whole.items()},
        "no massive": {half: sets & ~planted_here for half, sets in whole.items()},
    }
    for part, sets in members.items():
        lost, size = [], 0
        for half in needed.halves:
            here = needed.here(half)
            for code, mask in enumerate(needed.study.masks(sets[half]).values()):
                mine = here.take(here.labels == code)
                lost += ablation_matrix(mine, {"s": mask}, "zero", allow_inert=True)["s"].tolist()
            size += (sets[half].sum(1) / whole[half].sum(1)).mean() / 2
        row = table.loc["contribution", part]
        assert row["share"] == pytest.approx(size)
        if size:
            assert row["own"] == pytest.approx(np.mean(lost), abs=1e-6)
        else:
            assert np.isnan(row["own"])
    assert table.loc[("contribution", "whole"), "own"] > 0.1  # the planted neurons are in it
    assert table.loc[("contribution", "no massive"), "own"] < 0.05
    key = "ablation.parts.contribution.no_massive.critical"
    assert needed.numbers[key] == table.loc[("contribution", "no massive"), "critical"]


def test_what_no_answer_can_lose_is_left_out(needed, monkeypatch):
    """Of six categories one has no right answer, one is not scored; every set takes .2 from its own
    category, .1 from others, a random set .05.
    """
    intact = np.array([0.5, 0.0, np.nan, 1.0, 0.5, 0.5])
    asked = []

    def accuracy(here, mask=None, operator="zero"):
        if mask is None:
            return intact.copy()
        asked.append(here.labels)
        own = next(i for i, c in enumerate(CATEGORIES) if mask["name"].endswith(c))
        lost = np.where(np.arange(6) == own, 0.2, 0.1) if mask["name"][0] == "o" else 0.05
        return intact - lost

    monkeypatch.setattr(needed, "_accuracy", accuracy)
    monkeypatch.setattr(
        needed.study, "masks", lambda *_: {c: {"name": f"o{c}"} for c in CATEGORIES}
    )
    drawn = {c: [{"name": f"r{c}"}] for c in CATEGORIES}
    monkeypatch.setattr(needed, "controls", lambda *_: drawn)
    table = needed.accuracy_lost()
    assert table[["own", "others", "random"]].to_numpy() == pytest.approx(
        np.tile([0.2, 0.1, 0.05], (len(table), 1))
    )
    assert set(table["left out"]) == {f"{CATEGORIES[1]}, {CATEGORIES[2]}"}
    assert not any(np.isin([1, 2], labels).any() for labels in asked)
    assert needed.numbers["ablation.neurons.accuracy_lost_own"] == pytest.approx(0.2)
    intact[:] = 0
    silent = needed.accuracy_lost()
    assert silent["own"].isna().all()
    assert set(silent["left out"]) == {", ".join(CATEGORIES)}


def test_a_stage_moves_one_bar_by_the_rows_that_a_method_reads(needed, monkeypatch):
    told = SimpleNamespace(total=None, moved=0)

    @contextmanager
    def bar(steps, label, total, **settings):
        told.total = total
        yield SimpleNamespace(update=lambda by: setattr(told, "moved", told.moved + by))

    monkeypatch.setattr(bars, "bar", bar)
    together({"one": Needed(needed.study)}, "following")
    assert told.total == told.moved == 2 * 2 * 6 * 6 * (1 + 12) * 2  # scores, halves, rows ...


def test_equal_sets_of_experts_are_said_to_be_one():
    study = SimpleNamespace(categories=["CODE", "MATH", "SUM"])
    rows = {"ablation.experts.matrix": [[1.5, 0.1, 0.2], [1.5, 0.1, 0.2], [0.3, 0.4, 0.5]]}
    said = same_experts(SimpleNamespace(study=study, numbers=rows))
    assert len(said) == 1
    assert said[0].startswith("CODE and MATH have one and the same set")
    assert same_experts(SimpleNamespace(study=study, numbers={})) == []


def test_controls_of_the_halves_are_drawn_apart(needed):
    """Else what is pooled over halves would know of half as much chance as there is."""
    own = needed._masks("contribution", "A")
    one, two = (needed.controls(own, 3, half) for half in needed.halves)
    for category, mask in own.items():
        for drawn in (*one[category], *two[category]):
            assert (drawn["dense"].sum(1) == mask["dense"].sum(1)).all()
        pairs = zip(one[category], two[category], strict=True)
        assert any((a["dense"] != b["dense"]).any() for a, b in pairs)


def test_a_group_is_never_left_out_of_a_resample(needed):
    """Sets that cost their own group 1 and no other: the specificity of every resample is 1."""
    groups = np.repeat(np.arange(6), [5, 5, 6, 7, 9, 40])
    drawn = needed._drawn([(np.eye(6)[groups], groups, np.arange(72))])
    assert len(drawn) == 1 + needed.profile.resamples
    assert drawn == pytest.approx(1)
    rng = np.random.default_rng(0)
    part = rng.random((72, 6)), groups, np.arange(72)
    both, one = needed._drawn([part, part]), needed._drawn([part])
    assert both[0] == pytest.approx(one[0])
    assert np.std(both) < 0.85 * np.std(one)  # halves are drawn apart: about .71 of it


def worded_rows(each: int, wordings: int = 6) -> pd.DataFrame:
    """Rows of the planted study, `each` of every wording."""
    rows = planted.rows(each * wordings)
    number = rows.groupby(["fold", "category"]).cumcount() // each
    return rows.assign(tags=[{"wording": f"w{n}"} for n in number])


def test_rows_of_one_wording_are_drawn_together():
    """Four copies of a row are no four rows: the interval is that of the wordings, not half as
    wide, and rows of a wording in the other half, which lost another set, stand apart.
    """
    widths, rng = [], np.random.default_rng(0)
    values = rng.normal(0, 1, (2, 6, 6))  # of half, category and wording
    for each in (1, 4):
        settings = SETTINGS | {"ablation_rows": 6 * each, "resamples": 999}
        one = Needed(planted.study(worded_rows(each), **settings))
        parts = {}
        for half, found in zip(one.halves, values, strict=True):
            rows = one.here(half).rows
            wording = [int(tags["wording"][1:]) for tags in rows["tags"]]
            own = found[one.here(half).labels, wording][:, None]
            labels = one.here(half).labels.astype(np.int32)
            parts[half] = {"own": own, "random": np.zeros((len(rows), 3)), "labels": labels}
        _, arrays, groups, _ = next(one.levels(parts))
        assert len(set(arrays["clusters"])) == 2 * 6 * 6
        assert len(arrays["clusters"]) == 2 * 6 * 6 * each
        low, high = one._critical(arrays, groups)["critical_ci"]
        widths.append(high - low)
        assert one.units() == {"wordings"}
        table = one.by_category("made.up", parts, "lost").set_index(["measured on", "category"])
        widths.append(np.ptp(table.loc[("A", "CODE"), "critical_ci"]))
    assert widths[2] == pytest.approx(widths[0], rel=0.1)
    assert widths[3] == pytest.approx(widths[1], rel=0.1)


def test_of_few_wordings_each_row_is_drawn_by_itself():
    one = Needed(planted.study(worded_rows(3, wordings=4), **SETTINGS | {"ablation_rows": 12}))
    assert len(set(one.clusters(one.halves))) == 2 * 6 * 12
    assert one.units() == {"rows"}


def test_groups_that_are_no_categories_draw_the_rows_of_a_wording_together():
    one = Needed(planted.study(worded_rows(2, 10), **SETTINGS | {"ablation_rows": 20}))
    written_by = needed_room.written(one.study.half("B"))
    _, groups, clusters = one._specific("category", "A", written_by)
    assert len(set(clusters)) == 60
    assert len(groups) == 120
    _, groups, clusters = one._specific("random", "A", written_by)
    here = one.here("A").rows
    told = [
        f"{g} {c} {t['wording']}"
        for g, c, t in zip(groups, here["category"], here["tags"], strict=True)
    ]
    assert len(set(clusters)) == len(set(told)) < 120
    copies = np.repeat(np.random.default_rng(0).normal(0, 1, (60, 6)), 2, axis=0)
    labels = np.repeat(np.arange(6), 20)
    apart = one._drawn([(copies, labels, np.arange(120))])
    whole = one._drawn([(copies, labels, np.repeat(np.arange(60), 2))])
    assert np.std(whole) == pytest.approx(2**0.5 * np.std(apart), rel=0.15)


def test_what_is_spared_at_random_is_drawn_apart_for_each_half(needed, monkeypatch):
    drawn, real = [], needed_room.spared

    def heard(counts, sets, number, rng):
        drawn.append(rng.bit_generator.state["state"]["state"])
        return real(counts, sets, number, rng)

    monkeypatch.setattr(needed_room, "spared", heard)
    Needed(needed.study).sufficient()
    assert len(set(drawn)) == len(needed.halves)
