"""Tables of sets, routing and single neurons: hand cases, planted patterns, what a hook sees, and
what is not testable.
"""

import json
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from helpers import plots
from helpers.analysis.stats import shared_profile, shared_profile_beyond
from helpers.capture.counts import Counts
from helpers.capture.sites import find_sites
from helpers.config import Pair
from helpers.record import DamagedFile
from helpers.study import dataset, sets
from helpers.study.study import Study
from tests.test_evaluate import TOKENIZER
from tests.zoo import build

PROFILE = SimpleNamespace(
    name="p", chat=False, template="say: {instruction}\n", batch_tokens=120, resamples=200, seed=0
)
PROFILE.epsilon, PROFILE.epsilons, PROFILE.tau, PROFILE.taus = 0.4, (0.2, 0.4), 0.5, (0.5, 1.0)
TALLY = {"reading": "first", "category": "CLS", "read": 9, "changed": 3, "replaced": 1}
TALLY |= {"by_point": {"right": 3}}
EACH = 6  # rows of a category and half


def rows_of(each=EACH):
    return pd.DataFrame(
        [
            {"id": f"{fold}{c}{i}", "half": fold, "fold": fold, "category": c, "input": ""}
            | {"instruction": f"go {c} {i}", "reference": "x", "tags": {"wording": f"{fold}{i}"}}
            | {"checker": {"name": "exact", "answer": "x"}}
            for fold in "ab"
            for c in "XY"
            for i in range(each)
        ]
    )


def study_of(monkeypatch, counts, rows=None, base=None):
    """A Study whose counts are given: {model: Counts}, each sliced to the Study's rows."""

    def found(study, variant="tuned", positions="prompt"):
        arrays = {k: a[study.places] for k, a in counts[variant].arrays().items()}
        return Counts.of(arrays, counts[variant].layers)

    monkeypatch.setattr(Study, "counts", found)
    return Study(PROFILE, Pair("pair", base, "none"), rows_of() if rows is None else rows, {})


def dense(values, tokens=10):
    values = np.asarray(values, np.uint16)  # [I, L, N]
    layers = {"dense": tuple(range(values.shape[1]))}
    return Counts(np.full(len(values), tokens, np.int32), {"dense": values}, None, layers)


def noise(shape, seed=0, high=10):
    return np.random.default_rng(seed).integers(0, high, shape)


@pytest.fixture
def plain(monkeypatch):
    shape = (4 * EACH, 3, 5)
    return study_of(monkeypatch, {"tuned": dense(noise(shape)), "twin": dense(noise(shape, 1))})


def test_frequencies_and_their_null(monkeypatch):
    counts = np.zeros((4 * EACH, 1, 4))
    counts[:, 0, 0] = 1  # one token, one of four neurons on
    made = dense(counts, tokens=1)
    table = sets.frequencies(study_of(monkeypatch, {"tuned": made, "twin": made}))
    for _, line in table.groupby("model"):
        assert line["share"].tolist() == pytest.approx([0.75, *[0] * 18, 0.25])
    assert set(table["n"]) == {counts.size}


def test_sizes_are_those_of_the_hand_case(monkeypatch):
    made = dense(np.tile([[4, 1, 3, 3, 0]], (4 * EACH, 1, 1)), tokens=4)
    row = sets.sizes(study_of(monkeypatch, {"tuned": made})).set_index("epsilon").loc[0.4]
    assert row[["nominal", "realised", "tie mass", "untestable"]].tolist() == [2, 3, 0.4, 0]
    assert row["kept by exact"] == pytest.approx(2 / 3)


def test_agreement_counts_consensus(plain):
    table = sets.agreement(plain)
    chosen = sets.layer_profile(plain, "neurons")  # shares, so that sizes add up
    assert len(table) == 2 * 2
    assert (table["in all"] <= table[["X", "Y"]].min(1)).all()
    assert chosen.shape == (4 * EACH, 3)


def test_layer_shares_are_means_with_intervals(plain):
    table = sets.layer_shares(plain)
    own = sets.layer_profile(plain, "neurons")
    x = table[table["category"] == "X"]
    assert x["share"].to_numpy() == pytest.approx(own[plain.labels == 0].mean(0))
    assert ((x["low"] <= x["share"]) & (x["share"] <= x["high"])).all()
    assert x["n"].unique() == [2 * EACH]
    assert table.loc[table["other"], "category"].unique().tolist() == ["random twin (mean)"]
    assert table["null"].unique() == pytest.approx([own.mean()])


def test_pattern_is_beyond_the_twins_where_it_was_planted(monkeypatch):
    tuned, twin = (noise((4 * EACH, 4, 8), seed, 6) for seed in (0, 1))
    tuned[:, 1] += 3  # every category's sets stand in layer 1
    for i in range(4 * EACH):
        twin[i, 2 if i // EACH % 2 else 0] += 3  # the twin's Y in layer 2, its X in layer 0
    table = sets.layer_pattern(
        study_of(monkeypatch, {"tuned": dense(tuned), "twin": dense(twin)})
    ).set_index("half")
    assert (table["beyond"] > 0).all()
    assert table.loc["all", "p_beyond"] < 0.05
    assert table.loc["all", "beyond"] == pytest.approx(
        table.loc["all", "stability"] - table.loc["all", "twin"]
    )
    assert set(table["units"]) == {"wordings"}
    keys = sets.pattern_numbers(table.reset_index(), "neurons")
    assert keys["layers.neurons.a.beyond_twin"] == table.loc["a", "beyond"]
    assert len(keys["layers.neurons.all.beyond_twin_ci"]) == 2
    said = sets.pattern_findings(table.reset_index().assign(pair="p"))
    assert "learnt is supported" in said[0]


def test_too_few_rows_are_not_testable_and_no_error(monkeypatch):
    made = {name: dense(noise((8, 3, 5))) for name in ("tuned", "twin")}
    study = study_of(monkeypatch, made, rows_of(2))
    table = sets.layer_pattern(study)
    assert table["note"].str.contains("not testable").all()
    assert sets.pattern_numbers(table, "neurons") == {}
    assert "not testable" in sets.pattern_findings(table.assign(pair="p"))[0]
    shares = sets.layer_shares(study)
    assert shares.loc[shares["category"] == "X", "low"].isna().all()


def test_beyond_is_the_difference_of_two_stabilities():
    rng, groups = np.random.default_rng(0), np.repeat([0, 1, 2], 20)
    shared = rng.random((60, 6)) + 2 * np.arange(6)
    apart = rng.random((60, 6))
    found = shared_profile_beyond(shared, apart, groups, 300)
    each = [shared_profile(x, groups, 50)["stability"] for x in (shared, apart)]
    assert found["beyond"] == pytest.approx(each[0] - each[1])
    assert found["p"] < 0.02
    assert shared_profile_beyond(apart, shared, groups, 300)["p"] > 0.98
    same = shared_profile_beyond(shared, shared, groups, 300)
    assert same["beyond"] == 0
    assert same["p"] == 1  # nothing is no evidence
    with_clusters = shared_profile_beyond(apart, shared, groups, 300, clusters=np.arange(60) // 4)
    assert np.ptp(with_clusters["beyond_ci"]) > 0


def sparse(routed, p_given=0.5, tokens=20):
    """Counts of a sparse model with 4 neurons an expert, each on in `p_given` of its tokens."""
    active = np.repeat((routed * p_given)[..., None], 4, -1)
    arrays = {"expert": active.astype(np.uint16)}
    made = np.full(len(routed), tokens, np.int32)
    layers = {"expert": tuple(range(5, 5 + routed.shape[1]))}
    return Counts(made, arrays, routed.astype(np.uint16), layers)


def routed_rows():
    """Two layers, four experts, K = 2; X sends more tokens to expert 3 of the second layer."""
    routed = np.tile([10, 10, 10, 10], (4 * EACH, 2, 1))
    x = [i for i in range(4 * EACH) if i // EACH % 2 == 0]
    routed[x, 1] = [10, 10, 4, 16]
    return routed


def test_routing_is_relative_to_the_categories_mean(monkeypatch):
    made = {"tuned": sparse(routed_rows()), "twin": sparse(np.full((4 * EACH, 2, 4), 10))}
    study = study_of(monkeypatch, made)
    table = sets.routing(study)
    cells = table.set_index(["model", "category", "layer", "expert"])
    assert cells.loc[("tuned", "X", 6, 3), "own"] == pytest.approx(0.15)  # (0.8 - 0.5) / 2
    assert table.groupby(["model", "layer", "expert"])["own"].sum().abs().max() < 1e-6
    assert set(table["uniform"]) == {0.5}
    own = sets.own_experts(study).set_index(["model", "category"])
    assert own.loc[("tuned", "X"), ["layer", "expert"]].tolist() == [6, 3]
    assert own.loc[("tuned", "X"), "own"] == pytest.approx(0.15)
    assert own.loc[("tuned", "X"), "n"] == EACH
    assert own.loc[("twin", "X"), "own"] == 0
    share = sets.routing_share(study).assign(pair="p")
    assert share.loc[0, "corr(p, f)"] == pytest.approx(1)  # the gate is the same everywhere
    assert share.loc[0, "reached"] == 1
    assert np.isnan(share.loc[0, "corr(p, p given routed)"])  # the gate does not vary
    assert share.loc[0, "chance"] == 2 / 4
    assert "100%" in sets.routing_findings(share, own.reset_index().assign(pair="p"))[0]
    read = sets.positions(study).set_index(["model", "positions"])
    assert read.loc[("tuned", "prompt"), "mean p"] == pytest.approx(0.25, abs=0.01)  # K / E halved
    assert read.loc[("tuned", "prompt"), "where read"] == pytest.approx(0.5, abs=0.01)
    assert sets.expert_sizes(study)["model"].tolist() == ["tuned", "twin"]
    sizes = sets.expert_sizes(study).iloc[0]
    assert sizes["K"] == 2
    assert sizes["carry_half"] == pytest.approx((2 + 1.5) / 2, abs=0.3)
    fig = plots.sets.routing(table)
    assert [ax.get_title() for ax in fig.axes[:2]] == ["layer 5: tuned", "layer 5: twin"]
    plt.close("all")


def test_a_profile_without_experts_is_said():
    nothing = sets.of_all({}, sets.routing_share)
    assert nothing.empty
    assert "No model" in sets.routing_findings(nothing, nothing)[0]
    assert sets.pattern_findings(nothing) == []


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_single_neurons_are_shown_as_a_hook_sees_them(monkeypatch, family):
    model = build(family)
    site = find_sites(model)[0]
    study = Study(PROFILE, Pair("pair", None, "none"), rows_of(), {"tuned": (model, TOKENIZER)})
    counts = study.take([0, 1]).encoded()
    made = SimpleNamespace(
        family=lambda unit: "dense" if family == "llama" else "expert",
        unit=lambda unit: np.zeros((2, *shape)),
        layers={"dense": range(9), "expert": range(9)},
    )
    kinds = [s for s in find_sites(model) if s.family == made.family("")]
    shape = (len(kinds), *([kinds[0].experts] if family != "llama" else []), kinds[0].width)
    monkeypatch.setattr(Study, "counts", lambda *args: made)
    largest, times = sets.largest_outputs(study, [0, 1])
    assert largest.size == np.prod(shape)
    best = int(largest.argmax())
    table = sets.strongest_tokens(study, {"role": best}, [0, 1], most=3)
    assert table["output"].abs().max() == pytest.approx(largest[best])
    assert table["output"].abs().is_monotonic_decreasing
    assert table["text"].str.contains(r"\[.*\]").all()
    if family != "llama":
        return
    seen, ids = [], torch.tensor([counts[0].ids])
    hook = site.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    hook.remove()
    one = sets.largest_outputs(study, [0])[0].reshape(shape)[0]
    assert one == pytest.approx(
        seen[0].detach().abs().reshape(-1, shape[-1]).amax(0).numpy(), rel=1e-4
    )
    layers = sets.largest_outputs(study, [0])[1].reshape(shape)
    assert np.median(layers, 1) == pytest.approx(np.ones(shape[0]), rel=0.1)


def test_words_tell_planted_categories_and_not_shuffled_ones():
    rows = pd.concat([rows_of(10)] * 2, ignore_index=True)
    told = dataset.lexical({"planted": rows}).set_index("category")
    assert told.loc["all", "right"] == 1
    assert told.loc["X", "chance"] == 0.5
    assert told.loc["all", "n"] == len(rows)
    silent = rows.assign(instruction="the same", category=list("XY") * (len(rows) // 2))
    told = dataset.lexical({"silent": silent})
    row = told[told["category"] == "all"].iloc[0]
    assert row["low"] < 0.5 + 0.3
    assert dataset.confusions(rows).to_numpy() == pytest.approx(np.eye(2))
    fig = plots.data.lexical(told[told["category"] != "all"])
    assert "null: chance, 0.50" in [text.get_text() for text in fig.legends[0].get_texts()]
    plt.close("all")


def test_checkers_and_readers_are_counted():
    table = dataset.checked(rows_of(2))
    assert table["references pass"].tolist() == [4, 4]
    assert table["wrong answers pass"].tolist() == [0, 0]
    rate = dataset.fault_rate(dataset.readings())
    assert rate["faulty"] <= rate["drawn"]
    assert rate["low"] < rate["share"] < rate["high"]


@pytest.mark.parametrize(
    "odd",
    [
        [],
        {},
        [{}],
        [[]],
        [TALLY],
        [TALLY | {"sample": []}],
        [TALLY | {"sample": {"drawn": ["a"]}}],
        [TALLY | {"sample": {"drawn": [], "faulty": []}}],
        [TALLY | {"read": "many", "sample": {"drawn": ["a"], "faulty": []}}],
    ],
)
def test_a_file_of_something_else_is_no_list_of_readings(odd, tmp_path):
    path = tmp_path / "review.json"
    path.write_text(json.dumps(odd))
    for read in (dataset.tallies, dataset.readings):
        with pytest.raises(DamagedFile, match="is no list of readings"):
            read(path)
    path.write_text(json.dumps([TALLY, TALLY | {"sample": {"drawn": ["a"], "faulty": []}}]))
    assert dataset.readings(path)["drawn"].tolist() == [0, 1]


def test_the_drawing_has_every_box_and_arrow():
    table = plots.diagram.parts()
    fig = plots.diagram.blocks(table)
    for ax, (name, part) in zip(fig.axes, table.groupby("panel", sort=False), strict=True):
        labels = [text.get_text() for text in ax.texts]
        assert ax.get_title() == name
        assert set(part["label"]) <= set(labels)
        assert labels.count("") == part["to"].str.split().str.len().sum()
    fig.canvas.draw()
    plt.close("all")


def test_a_figure_of_ability_has_a_point_for_each_mean():
    one = {"pair": "p", "model": "tuned", "half": "A", "n": 5, "null": 0.0, "units": "rows"}
    table = pd.DataFrame(
        [
            one | {"category": c, "measure": m, "value": v, "low": v - 0.1, "high": v + 0.1}
            for c, v in (("X", 0.5), ("Y", np.nan))
            for m in ("strict", "first", "gain")
        ]
    )
    fig = plots.data.ability(table)
    assert len(fig.axes) == 3
    assert all(0.5 in line.get_ydata() for ax in fig.axes for line in ax.get_lines()[:1])
    fig.canvas.draw()
    plt.close("all")
