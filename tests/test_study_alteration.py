"""What tuning changed: planted changes are found, none is found where there is none, and what
cannot be tested is a sentence.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import hypergeom

from helpers import plots
from helpers.analysis.sets import top_experts
from helpers.analysis.similarity import jaccard
from helpers.capture.count import passes
from helpers.capture.counts import Gathered
from helpers.config import Pair, Profile
from helpers.study import alteration, planted, tuning_tables
from helpers.study.study import Study
from tests import zoo

torch.set_num_threads(1)
MOVED = (2, range(20, 30))  # layer and neurons of the base that tuning switched on


def base_of_planted():
    """The planted model before it was tuned: ten neurons of layer 2 were off for every token, and
    the neurons that turn a category's first letter into its second wrote nothing.
    """
    model = planted.model()
    layer, neurons = MOVED
    with torch.no_grad():
        model.model.layers[layer].mlp.gate_proj.weight[neurons, -1] = -9.0
        for place in planted.CIRCUIT.values():
            model.model.layers[planted.LAYER].mlp.down_proj.weight[:, place % zoo.N] = 0
    return model


def tuned_of_planted():
    model = planted.model()
    layer, neurons = MOVED
    with torch.no_grad():
        model.model.layers[layer].mlp.gate_proj.weight[neurons, -1] = 3.0
    return model


def pair_of(base, tuned, rows=None, **settings):
    """A study of two models in memory, counted at all positions, at even and at odd ones."""
    rows = planted.rows(6) if rows is None else rows
    settings = {"resamples": 200, "controls": 3, "ablation_rows": 5, "batch_tokens": 512} | settings
    pair = Pair("pair", "none", "none")
    profile = Profile("planted", "none", (pair,), template=planted.TEMPLATE, **settings)
    models = {name: (model, zoo.tokenizer()) for name, model in (("base", base), ("tuned", tuned))}
    study = Study(profile, pair, rows, models)
    for name, loaded in models.items():
        gathered = Gathered(len(rows))
        for batch, counts in passes(loaded[0], study.reading(name), profile.batch_tokens):
            gathered(batch, counts)
        for where in ("prompt", *alteration.SPLIT):
            study.once(("counts", name, where), lambda g=gathered, w=where: g.counts[w])
    return study


@pytest.fixture(scope="module")
def changed():
    return {"pair": pair_of(base_of_planted(), tuned_of_planted(), epsilon=0.1)}


@pytest.fixture(scope="module")
def equal():
    return {"pair": pair_of(planted.model(), planted.model())}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def run_of(rows, name="pair-full-s0", neurons=(1.0, 0.4, 0.2), correct=None, experts=None):
    """A measured run of three checkpoints whose curves are the same for every row."""
    steps, n = np.array([0, 10, 20]), len(rows)

    def wide(values):
        return np.repeat(np.asarray(values, float)[:, None], n, 1)

    return SimpleNamespace(
        name=name,
        rows=np.asarray(rows),
        steps=steps,
        neurons=wide(neurons),
        experts=None if experts is None else wide(experts),
        to_final=wide((0.2, 0.3, 1.0)),
        correct=wide((0.0, 0.2, 0.8)) if correct is None else correct,
        record={"checkpoints": {"0010": "x", "0020": "y"}, "tuned": "y"},
        final=np.zeros((n, 3 * zoo.N), bool),
    )


def runs_of(study):
    every = np.arange(len(study.rows))
    trained = run_of(every, "pair-pretraining-s0", (1.0, 0.6, 0.5))
    return {"full-s0": run_of(every), "pretraining-s0": trained}


# what changed


def test_excess_churn_is_the_floor_minus_across_by_a_loop(changed):
    study = changed["pair"]
    tops = {
        (model, where): alteration.top_sets(study.counts(model, where).unit("neurons"), 0.1)[0]
        for model in ("base", "tuned")
        for where in alteration.SPLIT
    }
    even, odd = alteration.SPLIT
    excess = []
    for i in range(len(study.rows)):

        def alike(one, two, i=i):
            a, b = set(np.flatnonzero(tops[one][i])), set(np.flatnonzero(tops[two][i]))
            return len(a & b) / len(a | b)

        floor = [alike((model, even), (model, odd)) for model in ("base", "tuned")]
        across = [alike(("base", even), ("tuned", odd)), alike(("base", odd), ("tuned", even))]
        excess.append(np.mean(floor) - np.mean(across))
    found = alteration.measured(changed, alteration.churned).numbers["pair"]
    assert found["alteration.neurons.all.excess_churn"] == pytest.approx(np.mean(excess))
    assert found["alteration.neurons.all.p"] < 0.05
    assert found["alteration.neurons.A.n"] == found["alteration.neurons.B.n"] == 36


def test_the_layer_that_was_changed_is_the_one_marked(changed):
    table = alteration.layers(changed).set_index("layer")
    assert table["excess"].idxmax() == MOVED[0]
    assert table.loc[MOVED[0], "beyond"]


def test_fates_are_shares_of_the_union():
    found = {"kept": np.array([[1, 0]]), "gained": np.array([[1, 0]]), "lost": np.array([[2, 4]])}
    assert {f: v.tolist() for f, v in alteration.of_union(found, 1).items()} == {
        "kept": [1 / 8],
        "gained": [1 / 8],
        "lost": [6 / 8],
    }


def test_weights_that_moved_made_the_neurons_that_moved(changed):
    found = alteration.measured(changed, alteration.weights).numbers["pair"]
    assert found["alteration.weights.neurons.all.rho"] > 0
    assert found["alteration.weights.neurons.all.p"] < 0.05


# tuning or training; when


def test_beyond_training_is_the_difference_of_the_last_checkpoints(changed):
    study = changed["pair"]
    runs = runs_of(study)
    runs["pretraining-s0"].neurons[-1] += np.linspace(-0.01, 0.01, len(study.rows))
    found = alteration.measured(changed, alteration.training, {"pair": runs})
    row = found.table.set_index("half").loc["all"]
    assert row["beyond"] == pytest.approx(0.5 - 0.2)
    low, high = row["beyond_ci"]
    assert low < 0.3 < high
    here = (study.rows["fold"] == "A").to_numpy()
    own = runs["pretraining-s0"].neurons[-1][here].mean() - 0.2
    assert found.numbers["pair"]["alteration.training.neurons.A.beyond"] == pytest.approx(own)


def test_the_same_change_by_both_is_not_beyond_training(changed):
    study, rng = changed["pair"], np.random.default_rng(0)
    runs = runs_of(study)
    for run in runs.values():
        run.neurons[-1] = 0.3 + 0.1 * rng.random(len(study.rows))
    found = alteration.measured(changed, alteration.training, {"pair": runs}).numbers["pair"]
    assert found["alteration.training.neurons.all.p_beyond"] > 0.05


def test_wordings_are_drawn_as_wholes_where_the_corpus_names_them(changed, monkeypatch):
    """Rows of one wording that are all alike count once: the interval is that of the wordings."""
    study = changed["pair"]
    names = np.arange(len(study.rows)) // 4
    monkeypatch.setattr(alteration, "wordings", lambda rows: names[rows.index])
    runs = runs_of(study)
    runs["pretraining-s0"].neurons[-1] = (
        0.5 + 0.1 * np.random.default_rng(1).normal(size=names.max() + 1)[names]
    )
    row = alteration.measured(changed, alteration.training, {"pair": runs}).table.iloc[0]
    monkeypatch.setattr(alteration, "wordings", lambda rows: np.arange(len(rows)))
    apart = alteration.measured(changed, alteration.training, {"pair": runs}).table.iloc[0]
    assert row["wordings"] == names.max() + 1
    assert row["beyond"] == apart["beyond"]
    assert np.ptp(row["beyond_ci"]) > 1.5 * np.ptp(apart["beyond_ci"])


def test_runs_that_cannot_be_compared_say_so(changed):
    study = changed["pair"]
    full = runs_of(study)
    for runs in (
        {},
        {"full-s0": full["full-s0"]},
        full | {"pretraining-s0": run_of(np.arange(9), "shorter")},
    ):
        found = alteration.measured(changed, alteration.training, {"pair": runs})
        assert found.numbers["pair"] == {}
        assert found.table["note"].str.startswith("not testable").all()
        assert "not testable" in str(alteration.shown(found.table, ["beyond"]))


def test_the_smaller_lead_is_the_smaller_of_two_by_hand(changed):
    found = alteration.measured(changed, alteration.leads, {"pair": runs_of(changed["pair"])})
    numbers = found.numbers["pair"]
    left = ((1.0 - 0.4) / 0.8 - 0.2 / 0.8 + 1 - 1) / 2
    came = ((0.3 - 0.2) / 0.8 - 0.2 / 0.8 + 1 - 1) / 2
    assert numbers["alteration.trajectory.neurons.all.lead"] == pytest.approx(left)
    assert numbers["alteration.trajectory.settled.all.lead"] == pytest.approx(came)
    assert numbers["alteration.trajectory.neurons.all.smaller_lead"] == pytest.approx(came)
    assert came < 0 < left
    assert numbers["alteration.trajectory.neurons.all.p_smaller_lead"] == 1
    assert "alteration.trajectory.experts.all.lead" not in numbers


def test_both_metrics_ahead_of_the_ability_are_found(changed):
    runs = runs_of(changed["pair"])
    runs["full-s0"].to_final[1] = 0.9
    found = alteration.measured(changed, alteration.leads, {"pair": runs}).numbers["pair"]
    assert found["alteration.trajectory.neurons.A.smaller_lead"] == pytest.approx(0.25)
    assert found["alteration.trajectory.neurons.A.p_smaller_lead"] < 0.05


def test_an_ability_that_never_comes_has_no_lead(changed):
    study = changed["pair"]
    run = run_of(np.arange(len(study.rows)), correct=np.zeros((3, len(study.rows))))
    found = alteration.measured(changed, alteration.leads, {"pair": {"full-s0": run}})
    assert found.numbers["pair"] == {}
    assert found.table["note"].str.contains("ends where it began").all()
    assert alteration.curves(changed, {"pair": {"full-s0": run}}).empty


def test_an_ability_that_could_not_be_scored_leaves_the_components(changed):
    runs = runs_of(changed["pair"])
    runs["full-s0"].correct[:, 3] = np.nan
    found = alteration.measured(changed, alteration.leads, {"pair": runs})
    assert "alteration.trajectory.neurons.all.lead" not in found.numbers["pair"]
    assert found.table["note"].str.contains("NaN").any()
    table = alteration.curves(changed, {"pair": runs})
    assert set(table["line"]) == {
        "neurons: left the base's sets",
        "neurons: came to the final sets",
    }
    assert plots.alteration.trajectory(table)


def test_the_ability_without_instructions_is_in_units_of_what_tuning_gained(changed):
    runs = runs_of(changed["pair"])
    runs["pretraining-s0"].correct[:] = np.array([0.1, 0.2, 0.3])[:, None]
    table = alteration.curves(changed, {"pair": runs}).set_index("line")
    null = table[table["null"]]["value"]
    assert null.to_numpy() == pytest.approx([0, 0.1 / 0.8, 0.2 / 0.8])
    assert table.loc["accuracy", "value"].to_numpy() == pytest.approx([0, 0.25, 1])


def test_common_gain_beyond_chance(changed):
    study = changed["pair"]
    run = run_of(np.arange(len(study.rows)))
    run.final = alteration.sets(study, "tuned")
    runs = {"full-s0": run, "pretraining-s0": run}
    found = alteration.measured(changed, alteration.common, {"pair": runs})
    assert {what for (what,) in found.table[["what"]].to_numpy()} == {"replay", "training"}
    gains = [
        (a & ~b).any()
        for a, b in zip(
            alteration.sets(study, "tuned"), alteration.sets(study, "base"), strict=True
        )
    ]
    row = found.table.set_index(["what", "half"]).loc[("replay", "all")]
    assert row["n"] == sum(gains)
    assert row["jaccard"] == pytest.approx(jaccard(3, 3, 3))
    assert row["excess"] == pytest.approx(1 - row["by chance"])
    one, two = (alteration.sets(study, model) for model in alteration.MODELS)
    chance = []
    for base, tuned in zip(one.reshape(-1, 3, 80), two.reshape(-1, 3, 80), strict=True):
        gained, free = (tuned & ~base).sum(1), (~base).sum(1)[MOVED[0]]
        size = gained[MOVED[0]]
        assert gained.sum() == size  # in the changed layer alone
        shared = np.arange(size + 1)
        odds = hypergeom(free, size, size).pmf(shared)
        chance += [(odds * shared / (2 * size - shared)).sum()] if size else []
    assert row["by chance"] == pytest.approx(np.mean(chance))


# does it matter


def test_the_neurons_that_carry_the_ability_matter(changed):
    """The circuit is in both models' consensus sets: kept, and lost with a category's letters."""
    study = changed["pair"]
    found = alteration.measured(changed, alteration.matter)
    row = found.table.set_index(["what", "half"]).loc[("gained", "all")]
    sizes = study.once("matter", dict)
    for (fate, half), table in sizes.items():
        other = alteration.halves(study)[study.other(half)]
        one, two = (
            alteration.consensus(alteration.sets(study, m)[other], study.labels[other], 0.5)
            for m in alteration.MODELS
        )
        own = {"gained": two & ~one, "kept": one & two, "lost": one & ~two}[fate].sum(1)
        expected = {c: int(n) for c, n in zip(study.categories, own, strict=True) if n}
        assert table.groupby("category")["size"].first().to_dict() == expected
    assert row["n"] == len(sizes["gained", "A"]) + len(sizes["gained", "B"])
    assert set(sizes["gained", "A"]["category"]) == set(study.categories)


def test_a_transplant_of_all_neurons_is_the_other_model(changed):
    """The two planted models differ in their neurons alone."""
    curve = alteration.transplant_curve(changed)
    whole = curve[(curve["share"] == 1) & (curve["set"] == "most moved")]
    assert len(whole) == 2
    assert whole["loss"].to_numpy() == pytest.approx(whole["donor"].to_numpy(), abs=1e-5)
    assert (whole["host"] - whole["donor"]).abs().min() > 0.01
    assert all(line.endswith("100 % of the way") for line in alteration.ways(curve))
    assert curve.loc[curve["share"] == 0, "loss"].equals(curve.loc[curve["share"] == 0, "host"])


def test_the_most_moved_are_exchanged_first(changed, monkeypatch):
    study, seen = changed["pair"], []

    def watched(host, donor, mask):
        seen.append(next(iter(mask.values())))
        return nullcontext()

    monkeypatch.setattr(alteration, "transplant", watched)
    monkeypatch.setattr(alteration, "nll", lambda model, encoded, size: np.zeros(len(encoded)))
    alteration._transplants(study)
    layer, neurons = MOVED
    assert seen[0].sum() == round(0.05 * 240)
    assert seen[0][layer, neurons].all()
    assert [m.sum() for m in seen[1:3]] == [12, 12]
    assert not any(m[layer, neurons].all() for m in seen[1:3])


def test_a_transplant_effect_is_random_minus_moved(changed):
    found = alteration.measured(changed, alteration.transplanted).table
    losses = changed["pair"].once("transplants", dict)
    for way, sign in (("forward", 1), ("reverse", -1)):
        own, random = losses[way, "A"][alteration.TENTH]
        assert len(random) == 10
        by_hand = sign * np.mean([np.mean(draw) - np.mean(own) for draw in random])
        row = found[(found["what"] == way) & (found["half"] == "A")].iloc[0]
        assert row["effect"] == pytest.approx(by_hand)
        as_well = sum(sign * (np.mean(draw) - np.mean(own)) <= 0 for draw in random)
        assert row["p_sets"] == pytest.approx((1 + as_well) / 11)


def test_what_sets_cost_is_no_surer_for_copies_of_a_row(changed):
    """Rows of one wording that lose the same: the interval is that of the wordings."""
    study = pair_of(base_of_planted(), tuned_of_planted(), planted.rows(24))
    rng, places = np.random.default_rng(0), np.arange(len(study.rows))
    number = study.rows.groupby(["fold", "category"]).cumcount().to_numpy()
    fold = (study.rows["fold"] == "B").to_numpy()
    drawn = rng.normal(0, 1, (2, 6, 6))[fold.astype(int), study.labels, number // 4]
    lines = {"row": places, "category": study.rows["category"], "size": 3, "difference": drawn}
    widths = {}
    for copies in (1, 4):
        study.rows["tags"] = [{"wording": f"w{n // copies}"} for n in number]
        widths["matter", copies] = np.ptp(
            alteration._critical(study, [pd.DataFrame(lines)])["critical_ci"]
        )
        clusters = alteration.drawn_as_one(study)
        assert len(set(clusters)) == 2 * 6 * 24 // copies
        put = alteration._put(study, np.stack([drawn, drawn]), clusters)
        widths["transplant", copies] = np.ptp(put["effect_ci"])
    for what in ("matter", "transplant"):
        assert widths[what, 4] > 1.7 * widths[what, 1]


def test_halves_have_random_sets_of_their_own(changed, monkeypatch):
    """Of one seed, sets of equal sizes would be held against the same random ones in both."""
    study, started = changed["pair"], []
    real = Study.rng

    def heard(study, half):
        rng = real(study, half)
        started.append((half, rng.bit_generator.state["state"]["state"]))
        return rng

    monkeypatch.setattr(Study, "rng", heard)
    alteration._matter(study)
    alteration._transplants(study)
    assert {half for half, _ in started} == {"A", "B"}
    assert len(set(started)) == len({state for _, state in started}) == 2


# on the page


def test_a_page_never_prints_a_p_of_zero_and_names_what_is_missing():
    rows = [{"pair": "a", "what": "b", "half": "all", "p": 0.0004998, "v": 0.12345, "ci": [0, 1.5]}]
    rows += [{"pair": "a", "what": "b", "half": "A", "note": "not testable: few rows"}]
    table = pd.DataFrame(rows).assign(n=7).fillna({"note": ""})
    first, second = alteration.shown(table, ["p", "v", "ci", "n"]).to_dict("records")
    assert first == {"p": 0.0005, "v": 0.123, "ci": "[0.000, 1.500]", "n": 7, "note": ""}
    assert second["p"] == second["ci"] == "not testable"
    assert second["note"] == "not testable: few rows"


def test_sentences_say_what_the_numbers_say(changed):
    runs = {"pair": runs_of(changed["pair"])}
    found = [alteration.measured(changed, alteration.churned)]
    found += [
        alteration.measured(changed, m, runs) for m in (alteration.training, alteration.leads)
    ]
    said = "\n".join(alteration.sentences(changed, *found))
    assert "further pre-training by 0.300" in said
    assert "is seen by one metric at most; the smaller of the two leads is -0.062" in said
    runs["pair"]["full-s0"].to_final[1] = 0.9
    found[-1] = alteration.measured(changed, alteration.leads, runs)
    assert "is seen by both metrics" in "\n".join(alteration.sentences(changed, *found))


# nothing changed, nothing there

MEASURES = ("churned", "weights", "matter", "transplanted")
TABLES = ("layers", "categories", "routing", "transplant_curve")


def test_equal_models_have_not_changed(equal):
    found = {name: alteration.measured(equal, getattr(alteration, name)) for name in MEASURES}
    assert found["churned"].table["excess_churn"].eq(0).all()
    assert found["churned"].table["p"].eq(1).all()
    assert found["weights"].table["note"].str.startswith("not testable").all()
    assert "rho" not in found["weights"].table
    gained = found["matter"].table.query("what != 'kept'")
    assert gained["note"].str.contains("empty").all()
    assert found["transplanted"].table["effect"].eq(0).all()
    assert found["transplanted"].table["p"].eq(1).all()
    assert alteration.sentences(equal, *found.values()) == [
        "pair: nothing changed. Base and tuned count the same on every row."
    ]
    assert "no way to go" in alteration.ways(alteration.transplant_curve(equal))[0]


def test_a_single_model_is_one_sentence_and_an_empty_part():
    profile = Profile("planted", "none", (Pair("alone", None, "none"),))
    every = {"alone": Study(profile, profile.pairs[0], planted.rows(2))}
    pairs, said = alteration.with_base(every)
    assert pairs == {}
    assert "alone" in said
    found = [alteration.measured(pairs, getattr(alteration, name)) for name in MEASURES]
    found += [
        alteration.measured(pairs, getattr(alteration, name), {})
        for name in ("training", "leads", "common")
    ]
    assert alteration.joined(every, *found) == {"alone": {}}
    assert all("nothing" in alteration.shown(one.table, ["p"]) for one in found)
    tables = [getattr(alteration, name)(pairs) for name in TABLES]
    tables += [alteration.curves(pairs, {}), alteration.training_curves(pairs, {})]
    tables += [alteration.picture(found[0]), alteration.weight_bins(pairs, found[1])]
    assert all(isinstance(table, pd.DataFrame) and table.empty for table in tables)
    assert alteration.ways(tables[3]) == []
    assert "nothing was asked" in alteration.sentences(pairs, *found)[0]


@pytest.mark.parametrize(
    "name", ["layers", "training", "trajectory", "matter", "transplant", "weights"]
)
def test_an_empty_figure_says_why(name):
    fig = getattr(plots.alteration, name)(pd.DataFrame())
    assert "nothing to draw" in fig.axes[0].texts[0].get_text()


def test_one_half_only_leaves_what_needs_two_untested():
    rows = planted.rows(6).assign(half="A", fold="A")
    pairs = {"pair": pair_of(base_of_planted(), tuned_of_planted(), rows, epsilon=0.1)}
    for name in ("matter", "transplanted"):
        found = alteration.measured(pairs, getattr(alteration, name))
        assert found.numbers == {"pair": {}}
        assert "not testable" in found.table["note"].iloc[0]
    assert alteration.transplant_curve(pairs).empty
    assert alteration.picture(alteration.measured(pairs, alteration.matter)).empty
    assert alteration.measured(pairs, alteration.churned).table["excess_churn"].gt(0).all()
    assert alteration.sentences(pairs, alteration.measured(pairs, alteration.churned))


def stay(study, layer, one, there, two, here) -> float:
    """Of each row's K most used experts under one count, the share so used under the other."""
    k, seed, shares = study.counts().per_token(), study.profile.seed, []
    for first, second in zip(
        top_experts(study.counts(one, there).routed, k, seed),
        top_experts(study.counts(two, here).routed, k, seed + 1),
        strict=True,
    ):
        shares.append(len({*np.flatnonzero(first[layer])} & {*np.flatnonzero(second[layer])}) / k)
    return np.mean(shares)


def test_a_layer_is_its_number_in_the_model_where_the_first_are_dense():
    """DeepSeek-V3: layer 0 has no experts, so the layers of the tables are 1 and 2."""
    base, tuned, other = (zoo.build("deepseek_v3", seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        for weight, there in zip(tuned.parameters(), other.parameters(), strict=True):
            weight.lerp_(there, 0.2)
    pairs = {"pair": pair_of(base, tuned, epsilon=0.1)}
    study = pairs["pair"]
    assert study.counts("base").layers == {"dense": (0,), "shared": (1, 2), "expert": (1, 2)}
    similar, routed = alteration.layers(pairs), alteration.routing(pairs)
    bins = alteration.weight_bins(pairs, alteration.measured(pairs, alteration.weights))
    fates = alteration.layer_fates(study)
    for unit in ("neurons", "experts"):
        own = similar[similar["panel"] == f"pair: {unit}"].set_index("layer")["similarity"]
        values = alteration.similarities(study, unit).layers[1].mean(0)
        assert own.to_dict() == pytest.approx({1: values[0], 2: values[1]})
    assert routed["layer"].tolist() == fates["layer"].tolist() == [1, 2]
    for n, row in enumerate(routed.to_dict("records")):
        assert row["kept"] == pytest.approx(stay(study, n, "base", "prompt", "tuned", "prompt"))
        split = "prompt-even", "prompt-odd"
        floor = [stay(study, n, one, split[0], one, split[1]) for one in ("base", "tuned")]
        across = [
            stay(study, n, one, split[0], two, split[1])
            for one, two in (("base", "tuned"), ("tuned", "base"))
        ]
        assert (row["floor"], row["across"]) == pytest.approx((np.mean(floor), np.mean(across)))
        assert row["excess"] == pytest.approx(row["floor"] - row["across"])
        assert row["ci"][0] <= row["excess"] <= row["ci"][1]
    assert bins.groupby("panel")["layer"].unique().map(list).tolist() == [[1, 2]] * 3
    kept = alteration.of_union(alteration.similarities(study, "neurons").fates)["kept"]
    assert fates.set_index("layer")["kept"].to_dict() == pytest.approx(
        {1: kept[:, 0].mean(), 2: kept[:, 1].mean()}
    )


def test_where_a_tuning_changed_says_the_layers_of_its_table_of_fates():
    rows = pd.DataFrame({"category": list("AB") * 5, "wording": range(10)})
    change = np.array([[0.1, 0.2]] * 10, np.float16)
    part = {"layers": change}, {"fates": [{"layer": 1}, {"layer": 2}]}
    parts = {f"changed-{tuning_tables.MAIN}": part}
    found = tuning_tables.Measured(rows, {}, parts, {"resamples": 20, "seed": 0})
    table = tuning_tables.where(found)
    assert table.groupby("layer")["value"].mean().round(3).to_dict() == {1: 0.1, 2: 0.2}
