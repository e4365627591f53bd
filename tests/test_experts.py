"""Experts ablated one at a time, against one context per expert and a line fitted by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import plots
from helpers.capture import budget
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
    return planted.study(made=zoo.build("qwen2_moe"), **EACH)


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
    return (layer, expert), np.column_stack(losses), f[~other & is_own].mean(0)[layer]


@pytest.mark.parametrize("category", ["CODE", "SUM"])
def test_each_expert_of_the_layer_is_rerouted_alone(study, found, category):
    for half in study.halves:
        (layer, expert), losses, f = by_hand(study, half, category)
        table = found[0]
        mine = table[(table["measured on"] == half) & (table["category"] == category)]
        assert mine.loc[mine["own"], "expert"].tolist() == [expert]
        assert set(mine["layer"]) == {study.counts().layers["expert"][layer]}
        np.testing.assert_allclose(mine["increase"], losses.mean(0), atol=2e-6)
        np.testing.assert_allclose(mine["f"], f)
        near = np.argsort(abs(f - f[expert]), kind="stable")[1:5]
        line = np.polyfit(f[near], losses.mean(0)[near], 1)
        row = mine[mine["own"]].iloc[0]
        assert row["expected"] == pytest.approx(np.polyval(line, f[expert]), abs=1e-5)
        assert mine.loc[~mine["own"], ["low", "high"]].isna().all(axis=None)
    assert np.abs(losses).max() > 1e-3


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


def test_an_expert_that_alone_does_something_stands_out():
    """Effects that are use alone, and one expert with .5 more: beyond is that .5."""
    f = np.linspace(0.1, 0.8, 8)
    rows = [np.c_[2 * f[e] + 0.5 * (e == 5) + np.zeros(6), np.full(6, 2 * f[e])] for e in range(8)]
    table = pd.DataFrame(
        {"own": [e == 5 for e in range(8)], "rows": rows, "n": 6, "category": "CODE"}
    ).assign(**{"measured on": "A", "increase": [r[:, 0].mean() for r in rows], "expected": 2 * f})
    row = experts._beyond(table[table["own"]], planted.study(**EACH).profile)
    assert row["beyond"] == pytest.approx(0.5)
    assert (row["low"], row["high"]) == (pytest.approx(0.5), pytest.approx(0.5))


def test_the_sentence_and_the_figure_say_what_the_tables_hold(found):
    [said] = experts.sentences(*found)
    row = found[1].iloc[0]
    assert f"The difference is {row['beyond']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in said
    own = found[0][found[0]["own"]]
    layers = found[0].groupby(["measured on", "category"])["increase"].max()
    most = sum(row.increase == layers[row[1], row.category] for row in own.itertuples())
    assert f"Of 12 layers, {most} lose most by the own expert" in said
    ax = plots.ablation.single_experts(found[0]).axes[0]
    assert len(ax.get_yticklabels()) == 12
    first = own.iloc[0]
    label = f"{first['category']}, half {first['measured on']}: layer {first['layer']}"
    assert ax.get_yticklabels()[0].get_text().startswith(label)


def test_where_there_are_no_experts_or_too_few_nothing_is_said(study, monkeypatch):
    monkeypatch.setattr(experts, "NEIGHBOURS", study.counts().routed.shape[2])
    with pytest.raises(NotTestable, match="experts in a layer"):
        experts.alone(study)
    for pairs in ({}, {"few": study}):
        singly, tests = experts.of_all(pairs)
        assert (len(singly), len(tests)) == (0, 0)
        assert experts.sentences(singly, tests) == [
            "No pair here has experts enough to be ablated one at a time."
        ]
        tests.set_index(["pair", "category"]).drop(columns="measured on").astype(float)


def test_the_most_own_expert_has_the_largest_share_beyond_the_mean(study):
    table = sets.routing(study, ("tuned",))
    for best in sets.most_own(study):
        part = table[table["category"] == best["category"]]
        top = part.loc[part["own"].idxmax()]
        assert (best["layer"], best["expert"]) == (top["layer"], top["expert"])
        assert study.counts().layers["expert"][best["place"]] == best["layer"]


def test_the_plan_counts_the_rows_that_are_read(study, tmp_path, monkeypatch):
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "tokens.jsonl"))
    again = planted.study(made=study.model()[0], **EACH)
    experts.alone(again)
    lines = [line for line in budget.lines_of(tmp_path / "tokens.jsonl") if line["altered"]]
    planned = ablations(again.profile, 6, again.counts().routed.shape[2])
    assert sum(len(line["lengths"]) for line in lines) == planned["single_experts"] > 0
