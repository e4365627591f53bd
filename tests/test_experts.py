"""Experts ablated one at a time, against one context per expert and a line fitted by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import plots
from helpers.capture import budget
from helpers.capture.count import count_groups
from helpers.capture.interventions import ablate
from helpers.record import NotTestable
from helpers.study import experts, planted, sets
from helpers.study.evaluate import nll
from helpers.study.needed import ablations
from tests import zoo

torch.set_num_threads(1)
EACH = {"ablation_rows": 6, "resamples": 199}


@pytest.fixture(scope="module")
def study():
    return sparse()


def sparse(model=None):
    """A model of the zoo, its prompts and references counted; its halves read other letters."""
    rows = planted.rows()
    other = rows["instruction"].str.translate(str.maketrans("0123456789", "zyxwvutsrq"))
    rows["instruction"] = rows["instruction"].where(rows["fold"] == "A", other)
    made = planted.study(rows, made=model or zoo.build("qwen2_moe"), **EACH)
    counts = count_groups(made.model()[0], made.reading("tuned", "response"))["response"]
    made.once(("counts", "tuned", "response"), lambda: counts)
    return made


@pytest.fixture(scope="module")
def found(study):
    return experts.of_all({"sparse": study})


def by_hand(study, half, category):
    """(most own place, losses beyond intact [n, E] of the layer's experts, f [E])."""
    f = study.counts().routed / study.counts().tokens[:, None, None]  # [I, L, E]
    other = (study.rows["fold"] != half).to_numpy()
    is_own = (study.rows["category"] == category).to_numpy()
    means = [f[other & (study.rows["category"] == c)].mean(0) for c in study.categories]
    beyond = f[other & is_own].mean(0) - np.mean(means, axis=0)
    layer, expert = np.unravel_index(beyond.argmax(), beyond.shape)
    part = study.half(half).measured().category(category)
    encoded, model = part.encoded("reference"), study.model()[0]
    intact, losses = nll(model, encoded, 64), []
    for one in range(f.shape[2]):
        mask = np.zeros(f.shape[1:], bool)
        mask[layer, one] = True
        with ablate(model, {"experts": mask}, "reroute"):
            losses.append(nll(model, encoded, 64) - intact)
    routed, tokens = study.counts().routed.copy().astype(int), study.counts().tokens.copy()
    routed += study.counts("tuned", "response").routed
    used = routed / (tokens + study.counts("tuned", "response").tokens)[:, None, None]
    return (layer, expert), np.column_stack(losses), used[~other & is_own].mean(0)[layer]


@pytest.mark.parametrize("category", ["CODE", "SUM"])
def test_each_expert_of_the_layer_is_rerouted_alone(study, found, category):
    for half in study.halves:
        (layer, expert), losses, f = by_hand(study, half, category)
        table = found[0]
        mine = table[(table["measured on"] == half) & (table["category"] == category)]
        assert mine.loc[mine["own"], "expert"].tolist() == [expert]
        assert set(mine["layer"]) == {study.counts().layers["expert"][layer]}
        np.testing.assert_allclose(mine["increase"], losses.mean(0), atol=2e-6)
        np.testing.assert_allclose(mine["f"], f, rtol=1e-6)
        near = np.argsort(abs(f - f[expert]), kind="stable")[1:5]
        line = np.polyfit(f[near], losses.mean(0)[near], 1)
        row = mine[mine["own"]].iloc[0]
        assert row["expected"] == pytest.approx(max(np.polyval(line, f[expert]), 0), abs=1e-5)
        assert mine.loc[~mine["own"], ["low", "high"]].isna().all(axis=None)
    assert np.abs(losses).max() > 1e-3


def test_what_nothing_uses_costs_nothing(study, monkeypatch):
    """The line through the four others of nearest use runs below 0 at a use of .01."""
    rows = study.measured().category("CODE")
    used = np.tile(np.array([0.01, 0.5, 0.6, 0.7, 0.8, 0.9]), (len(study.rows), 1, 1))
    costs = np.tile([0.2, 0.0, 1.0, 2.0, 3.0, 4.0], (len(rows.rows), 1))
    monkeypatch.setattr(experts, "ablation_matrix", lambda *_, **__: pd.DataFrame(costs))
    place = {"category": "CODE", "layer": 0, "place": 0, "expert": 0}
    first, *others = experts._layer_of(study, "A", used, **place)
    assert first["expected"] == 0
    assert not first["rows"][:, 1].any()
    assert others[-1]["expected"] == pytest.approx(4)


def test_beyond_is_the_mean_over_categories_and_halves(study, found):
    singly, tests = found
    own = singly[singly["own"]].assign(beyond=lambda t: t["increase"] - t["expected"])
    at = tests.set_index(["measured on", "category"])
    assert at.loc[("all", "all"), "beyond"] == pytest.approx(own["beyond"].mean(), abs=1e-9)
    assert at.loc[("all", "all"), "n"] == 2 * 6 * EACH["ablation_rows"]
    for (half, category), part in own.groupby(["measured on", "category"]):
        row = at.loc[(half, category)]
        assert row["beyond"] == pytest.approx(part["beyond"].item(), abs=1e-9)
        assert row["low"] <= row["beyond"] <= row["high"]
    numbers = experts.numbers_of(tests)
    assert numbers["ablation.single.experts.A.beyond"] == at.loc[("A", "all"), "beyond"]
    assert {key.split(".")[3] for key in numbers} == {"all", *study.halves}


def layers_of(costs, size=6, copies=1):
    """Lines as `alone` gives them: {(half, category): (own expert, its cost beyond, of E)}; rows of
    one wording: `copies`.
    """
    lines, f = [], np.linspace(0.1, 0.8, 8)
    for (half, category), (own, beyond) in costs.items():
        for e in range(8):
            cost = 2 * f[e] + beyond * (e == own) + np.zeros(size)
            rows = np.c_[cost, np.full(size, 2 * f[e])]
            head = {"measured on": half, "category": category, "own": e == own, "n": size}
            head["clusters"] = [f"{half}: {category}: {row // copies}" for row in range(size)]
            lines.append(head | {"rows": rows, "increase": cost.mean(), "expected": 2 * f[e]})
    return pd.DataFrame(lines)


def test_an_expert_that_alone_does_something_stands_out():
    """Costs that are use alone, and one expert with .5 more: beyond is that .5. Exchanged with the
    other seven of its layer it is the first of eight; of two layers, of 64.
    """
    study = planted.study(**EACH)
    one = layers_of({("A", "CODE"): (5, 0.5)})
    row = experts._beyond(one, study.profile)
    assert row["beyond"] == pytest.approx(0.5)
    assert (row["low"], row["high"]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert row["p_sets"] == pytest.approx(1 / 8)
    two = layers_of({("A", "CODE"): (5, 0.5), ("B", "CODE"): (2, 0.5)})
    assert experts._beyond(two, study.profile)["p_sets"] == pytest.approx(1 / 64)


def test_an_expert_that_costs_its_use_stands_nowhere():
    rng = np.random.default_rng(0)
    table = layers_of({(half, "CODE"): (3, 0.0) for half in "AB"})
    table["rows"] = [rows + np.c_[rng.normal(0, 0.1, 6), np.zeros(6)] for rows in table["rows"]]
    assert experts._beyond(table, planted.study(**EACH).profile)["p_sets"] > 0.05


def test_copies_of_a_row_make_no_effect_surer():
    noise, widths = np.random.default_rng(0).normal(0, 0.1, 6), []
    for copies in (1, 4):
        table = layers_of({("A", "CODE"): (5, 0.5)}, 6 * copies, copies)
        added = np.c_[np.repeat(noise, copies), np.zeros(6 * copies)]
        table["rows"] = [rows + added for rows in table["rows"]]
        row = experts._beyond(table, planted.study(**EACH).profile)
        widths.append(row["high"] - row["low"])
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def test_halves_choose_their_experts_apart(study):
    """Else a choice on the measured half would look like one on the other."""
    one, two = (sets.most_own(study.half(half)) for half in study.halves)
    assert one != two


def figure_of(found):
    return plots.ablation.single_experts(found[0]).axes[0]


def test_the_sentence_and_the_figure_say_what_the_tables_hold(found):
    [said] = experts.sentences(*found)
    row = found[1].iloc[0]
    assert f"The difference is {row['beyond']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in said
    own = found[0][found[0]["own"]]
    layers = found[0].groupby(["measured on", "category"])["increase"].max()
    most = sum(row.increase == layers[row[1], row.category] for row in own.itertuples())
    assert f"In {most} of 12 cases (a category on one half) the own expert is" in said
    drawn = [line.get_segments()[0][:, 0] for line in figure_of(found).collections]
    for row, (low, high) in zip(own.itertuples(), drawn, strict=True):
        assert low == pytest.approx(min(row.expected + row.low, row.increase))
        assert high == pytest.approx(max(row.expected + row.high, row.increase))
    assert f"(by chance: {12 / found[0]['expert'].nunique():.1f})" in said
    ax = figure_of(found)
    assert len(ax.get_yticklabels()) == 12
    first = own.iloc[0]
    label = f"{first['category']}, half {first['measured on']}: layer {first['layer']}"
    assert ax.get_yticklabels()[0].get_text().startswith(label)


def test_where_there_are_no_experts_or_too_few_a_note_says_so(study, monkeypatch):
    assert experts.sentences(*experts.of_all({})) == [
        "No pair here has routed experts to be ablated one at a time."
    ]
    pairs = {"dense": planted.study(**EACH), "few": study}
    monkeypatch.setattr(experts, "NEIGHBOURS", study.counts().routed.shape[2])
    with pytest.raises(NotTestable, match="6 experts in a layer, and 6 others"):
        experts.alone(study)
    singly, tests = experts.of_all(pairs)
    assert (len(singly), len(tests), experts.numbers_of(tests)) == (0, 2, {})
    said = experts.sentences(singly, tests)
    assert said[0].startswith("dense: not testable one expert at a time: 0 experts in a layer")
    assert said[1].startswith("few: not testable")
    for table in (tests, experts.of_all({})[1]):
        shown = table.set_index(["pair", "category"])
        shown.drop(columns=["measured on", "note"]).astype(float)


def test_the_most_own_expert_has_the_largest_share_beyond_the_mean(study):
    table = sets.routing(study, ("tuned",))
    for best in sets.most_own(study):
        part = table[table["category"] == best["category"]]
        top = part.loc[part["own"].idxmax()]
        assert (best["layer"], best["expert"]) == (top["layer"], top["expert"])
        assert study.counts().layers["expert"][best["place"]] == best["layer"]


def test_the_plan_counts_the_rows_that_are_read(study, tmp_path, monkeypatch):
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "tokens.jsonl"))
    again = sparse(study.model()[0])
    experts.alone(again)
    lines = [line for line in budget.lines_of(tmp_path / "tokens.jsonl") if line["altered"]]
    planned = ablations(again.profile, 6, again.counts().routed.shape[2])
    assert sum(len(line["lengths"]) for line in lines) == planned["single_experts"] > 0
