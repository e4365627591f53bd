"""Overlap of a study: by loops and by hand, with the keys that the ledger names, and where a base,
a half, or enough tokens are missing.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import planted_counts
import pytest
import zoo

from helpers.analysis.generality import share_test, shares
from helpers.analysis.regression import excess
from helpers.analysis.sets import nominal_size
from helpers.analysis.similarity import (
    category_matrix,
    gap,
    gap_across,
    within_between,
    wording_matrix,
)
from helpers.analysis.stats import bootstrap, length_strata
from helpers.analysis.wordings import (
    matrix_excess,
    within_excess,
    wording_levels,
    wording_overlap,
    wording_units,
)
from helpers.config import Pair, Profile
from helpers.hexainst.corpus import predict_category, wordings
from helpers.plots import overlap as figures
from helpers.record import NotTestable
from helpers.study import equal_length, ledger, overlap
from helpers.study import study as study_room
from helpers.study.study import Study

PAPER = ["generality", "uniqueness", "generality-diagonal", "uniqueness-other-wording"]
OURS = ["beyond-words", "halves-agree", "excess-generality", "tuning-gap", "readable"]
CLAIMS = [*PAPER, *OURS, "excess-smallest", "readable-beyond"]
UNEVEN = [[9, 1, 1, 2, 3, 5], [1, 1, 4, 2, 2, 1, 7], [3] * 5]
FEW = {"resamples": 60, "seed": 0}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def world():
    return planted_counts.counts(np.random.default_rng(0), UNEVEN, category=0.4, wording=0.4)


# ---- wordings of rows, and words


def rows_of(instructions, category="QA", tags=None):
    tags = [{}] * len(instructions) if tags is None else tags
    return pd.DataFrame({"category": category, "instruction": instructions, "tags": tags})


def test_rows_of_one_tag_are_one_wording_but_never_across_categories():
    rows = rows_of(["a", "b", "c"], ["QA", "QA", "SUM"], [{"wording": "plain"}] * 3)
    assert wordings(rows).tolist() == ["QA: plain", "QA: plain", "SUM: plain"]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is 2 + 13?", "what is 4.5 + 1?", True),
        ('Say "a cat" twice.', "Say “the dog” twice.", True),
        ("Shorten  this.", "shorten this.", True),
        ("Don't stop.", "Don't go.", False),
        ("Name a fish.", "Name a bird.", False),
    ],
)
def test_without_a_tag_a_wording_is_the_instruction_without_its_contents(first, second, same):
    one, two = wordings(rows_of([first, second]))
    assert (one == two) == same
    assert (wordings(rows_of([first, second]).drop(columns="tags")) == [one, two]).all()


def test_words_are_learned_from_the_other_half_alone():
    """Half B names its category by a word that half A never has, and A's words change sides."""
    rows = pd.DataFrame(
        {
            "category": ["A", "B"] * 4,
            "instruction": ["red", "blue"] * 2 + ["blue x", "red y"] * 2,
            "input": "",
        }
    )
    half = np.repeat([0, 1], 4)
    assert (predict_category(rows, half) != rows["category"]).all()
    assert (predict_category(rows, folds=2) == rows["category"]).any()


# ---- pure parts


def test_the_matrix_of_excesses_by_loop_and_its_diagonal(world):
    S, null = world.similarity(), np.random.default_rng(1).random((len(world.labels),) * 2)
    null = (null + null.T) / 2
    found = matrix_excess(S, null, world.labels, world.clusters, **FEW)
    K = wording_matrix(S - null, world.clusters)
    of = np.array([world.labels[world.clusters == k][0] for k in np.unique(world.clusters)])
    for a, b in np.ndindex(3, 3):
        cells = [
            K[i, j] for i in np.flatnonzero(of == a) for j in np.flatnonzero(of == b) if i != j
        ]
        assert np.isclose(found["excess"][a, b], np.mean(cells), atol=1e-6)
    own = within_excess(S, null, world.labels, world.clusters, **FEW)
    for name in ("excess", "low", "high"):
        assert np.allclose(np.diag(found[name]), own[name])
    assert np.allclose(found["observed"] - found["null"], found["excess"], atol=1e-6)
    assert (found["low"] < found["excess"]).all()
    assert (found["excess"] < found["high"]).all()


def test_the_levels_are_those_of_the_test_with_intervals(world):
    S = world.similarity()
    sizes = [[2] * 6, [3] * 5]
    world = planted_counts.counts(np.random.default_rng(0), sizes, category=0.4, wording=0.4)
    S = world.similarity()
    found = wording_levels(S, world.labels, world.clusters, **FEW)
    means = wording_overlap(S, world.labels, world.clusters, **FEW)
    for name, (value, low, high) in found.items():
        assert np.isclose(value, means[name], atol=1e-6)
        assert low < value < high


def test_no_interval_of_the_same_wording_where_few_wordings_repeat(world):
    assert (
        wording_levels(world.similarity(), world.labels, world.clusters, **FEW)["same_wording"]
        is None
    )


def test_shares_of_drawn_rows_are_those_of_repeated_rows():
    rng = np.random.default_rng(0)
    sets, labels = rng.random((24, 12)) < 0.4, np.repeat([0, 1, 2], 8)
    weights = rng.integers(0, 3, (5, 24))
    found = shares(sets, labels, 3, 0.5, weights)
    for row, drawn in zip(found, weights, strict=True):
        assert np.allclose(row, shares(sets.repeat(drawn, 0), labels.repeat(drawn), 3, 0.5)[0])


def test_layers_by_whole_wordings():
    """With one wording to a category nothing can be told from it: every shuffle is the data."""
    rng = np.random.default_rng(0)
    sets, labels = rng.random((24, 12)) < 0.4, np.repeat([0, 1, 2], 8)
    test = share_test(sets, labels, 3, 0.5, clusters=labels, resamples=19, seed=0)
    assert np.allclose(test.null, test.estimate)
    assert (test.p == 1).all()


# ---- a study


def study_of(folder, monkeypatch, base="qwen2_moe", halves=("A", "B"), short=False, names="abcdef"):
    """Two categories in six wordings, two rows of each wording and half."""
    path, other = folder / "tuned", folder / "base"
    for seed, place in enumerate((path, other)):
        zoo.build(base, seed=seed).save_pretrained(place)
        zoo.tokenizer().save_pretrained(place)
    monkeypatch.setattr(study_room, "counts_dir", lambda *names: folder.joinpath(*names))
    opening = {"SUM": "is it so, a b c", "QA": "name one fish of"}
    long = {w: w * (1 + k % 3) for k, w in enumerate("abcdef")}  # lengths go across categories
    rows = [
        {"instruction": f"{opening[c][: 4 if short else 15]} {long[w]} {n} {half.lower()}"}
        | {"input": "", "reference": "x", "category": c, "half": half, "checker": {"name": "x"}}
        | {"id": f"{c}{w}{n}{half}", "tags": {"wording": f"{half}{w}"}}
        for half in halves
        for c in opening
        for w in names
        for n in "123456"[: 12 // len(names)]
    ]
    pair = Pair("pair", None if base == "llama" else str(other), str(path))
    settings = {"resamples": 40, "twins": 2, "draws": 2, "epsilon": 0.2}
    profile = Profile("test", "none", (pair,), batch_tokens=256, **settings)
    return {"pair": overlap.Overlap(Study.of(profile, pair, pd.DataFrame(rows)))}


MEASURES = (
    overlap.level,
    overlap.wording_step,
    overlap.own_categories,
    overlap.first_left_over,
    overlap.left_over,
)


def everything(pairs):
    found = {m.__name__: overlap.measured(pairs, m) for m in MEASURES}
    others = (overlap.membership, overlap.layer_shares, overlap.readable, overlap.halves_agree)
    return found | {m.__name__: m(pairs) for m in others}


@pytest.fixture
def sparse(tmp_path, monkeypatch):
    return study_of(tmp_path, monkeypatch)


def test_every_number_that_a_claim_names_is_there(sparse):
    found = everything(sparse)
    numbers = overlap.joined(*found.values())
    claims = ledger.read_ledger()
    claims = claims[claims["id"].isin(CLAIMS)]
    assert len(claims) == len(CLAIMS)
    tests = ledger.judge(
        ledger.look_up(claims, numbers, ["all", "A", "B"], sparse["pair"].study.categories)
    )
    units = sparse["pair"].study.units
    for claim in claims.to_dict("records"):
        asked = [unit for unit in claim["components"].split() if unit in units]
        per = 3 if "{half}" in claim["effect"] else 1
        per *= 2 if "{category}" in claim["effect"] else 1
        assert (tests["id"] == claim["id"]).sum() == per * len(asked)
    assert {"membership.neurons.1", "unique.experts.share"} <= set(numbers["pair"])


def test_measures_are_what_they_say(sparse):
    one, unit = sparse["pair"], "neurons"
    S, y = one.similarity("tuned", unit), one.labels
    level = overlap.level(one, unit, "all")[""]
    assert np.isclose(level["gap"], gap(S, y), atol=1e-6)
    null = within_between(category_matrix(one.null("tuned", unit), y))
    assert np.isclose(level["null_within"], null["within"])
    steps = overlap.wording_step(one, unit, "A")
    assert np.isclose(
        steps["tuning"]["other_wording"],
        steps["tuned"]["other_wording"] - steps["base"]["other_wording"],
        atol=1e-6,
    )
    assert steps["tuned"]["n"] == 24
    assert steps["tuned"]["wordings"] == 12
    left = overlap.left_over(one, unit, "all")["tuned"]
    sizes = [abs(left[name]) for name in ("alone", "twins_off", "twins_given")]
    assert abs(left["smallest"]) == min(sizes)


def test_the_last_step_of_the_waterfall_is_of_sets_of_exactly_equal_size(sparse):
    """Against sets unpacked and compared one by one; their sizes are the nominal one, where those
    with ties are larger.
    """
    one, unit = sparse["pair"], "neurons"
    beyond = {}
    for variant in ("tuned", *one.twins):
        drawn = equal_length.draw(one.study, variant, overlap.DRAWN)
        null = equal_length.null_similarity(drawn, unit, one.profile.epsilon, "exact", 0)
        size, found = len(drawn.total[unit]), []
        nominal = nominal_size(size, one.profile.epsilon)
        for d in range(one.profile.draws):
            sets = np.unpackbits(drawn.sets[unit]["exact"][:, d], axis=-1, count=size).astype(bool)
            tied = np.unpackbits(drawn.sets[unit]["quantile"][:, d], axis=-1, count=size)
            assert (sets.sum(1) == nominal).all()
            assert tied.sum() > sets.sum()
            found.append([[(a & b).sum() / (a | b).sum() for b in sets] for a in sets])
        beyond[variant] = np.mean(found, axis=0) - null
    S = beyond.pop("tuned") - np.mean(list(beyond.values()), axis=0)
    matrix, of, _ = wording_units(S, one.labels[one.long], one.wordings[one.long])
    left = overlap.measured(sparse, overlap.left_over, ["all"])
    table = overlap.waterfall(sparse, left).set_index(["panel", "model", "step"])["left"]
    step = "minus twins, sizes equal"
    found = table[f"pair, {unit}", "tuned", step]
    np.testing.assert_allclose(found, gap(matrix, of), atol=1e-6)
    assert found != table[f"pair, {unit}", "tuned", "minus twins"]
    assert ("pair, experts", "tuned", step) not in table.index


def test_units_that_share_their_shuffles_get_what_each_gets_alone(sparse):
    one = sparse["pair"]
    which = one.long
    here = np.ix_(which, which)
    for unit in one.study.units:
        S = one.equal("tuned", unit) - one.equal("twins", unit)
        given = [one.words[here], one.apart[here]]
        alone = excess(
            S, y := one.labels[which], given, length_strata(one.lengths[which], 10), **one.how
        )
        found = overlap.first_left_over(one, unit, "all")[""]
        assert len(y) == found["n"]
        assert np.isclose(found["excess"], alone.estimate)
        assert found["p_remains"] == alone.p
        assert np.allclose(found["excess_ci"], [alone.low, alone.high])


def test_a_single_model_with_one_half_leaves_out_what_needs_two(tmp_path, monkeypatch):
    pairs = study_of(tmp_path, monkeypatch, "llama", halves=("ai",))
    found = everything(pairs)
    assert list(pairs["pair"].halves) == ["all", "even rows", "odd rows"]
    numbers = overlap.joined(*found.values())["pair"]
    assert not [key for key in numbers if "base" in key or "tuning" in key or "experts" in key]
    assert numbers["nearest.neurons.all.tuned"] <= 1
    assert set(found["readable"].table["yardstick"]) == {"words"}
    said = overlap.sentences(
        *(
            found[n]
            for n in ("wording_step", "own_categories", "left_over", "readable", "membership")
        )
    )
    assert said[0].startswith("pair: ")
    assert said[1] == "pair, neurons."
    assert len(said) == 6
    assert "base 0" not in " ".join(said)


def test_where_tuning_changed_nothing_the_rest_is_still_told(sparse, monkeypatch):
    one = sparse["pair"]
    monkeypatch.setattr(one, "similarity", lambda v, unit, seen=one.similarity: seen("base", unit))
    steps = overlap.measured(sparse, overlap.wording_step, ["all"])
    assert (steps.table["note"] != "").tolist() == [False, False, True] * 3
    assert steps.table["note"][2].startswith("not testable: base and tuned have the same sets")
    assert "overlap.neurons.all.other_wording" in steps.numbers["pair"]


def test_short_instructions_are_not_testable_at_equal_length(tmp_path, monkeypatch):
    pairs = study_of(tmp_path, monkeypatch, short=True)
    left = overlap.measured(pairs, overlap.left_over, ["all"])
    assert left.table["note"].str.startswith("not testable: pair: no instruction has 16").all()
    assert left.numbers == {"pair": {}}
    assert "not testable" in overlap.shown(left.table, ["smallest"]).to_string()
    assert overlap.waterfall(pairs, left).empty


def test_a_category_without_a_long_instruction_is_named_at_equal_length(tmp_path, monkeypatch):
    """What is left would be said of the other category alone; where only a half lacks it, of the
    other half and of both together it can be said.
    """
    [one] = (pairs := study_of(tmp_path, monkeypatch)).values()
    assert len(one.long) == len(one.labels)
    here = (one.labels == "SUM") & one.halves["A"]
    monkeypatch.setattr(one, "lengths", np.where(here, 15, one.lengths))
    with pytest.raises(NotTestable, match="pair: no instruction of SUM has 16 tokens"):
        one.longer(16, "A")
    assert len(one.longer(16, "B")) == one.halves["B"].sum()
    assert one.longer(16).tolist() == np.flatnonzero(~here).tolist()
    monkeypatch.setattr(one, "lengths", np.where(one.labels == "SUM", 15, one.lengths))
    for measure in (overlap.first_left_over, overlap.left_over):
        left = overlap.measured(pairs, measure)
        assert left.table["note"].str.contains("no instruction of SUM has 16 tokens").all()
        assert left.numbers == {"pair": {}}
    assert "no instruction of SUM has 16" in overlap.over_length(pairs, (16,))["note"][0]


def test_one_wording_to_a_category_is_a_note_and_an_empty_figure_not_an_error(
    tmp_path, monkeypatch
):
    pairs = study_of(tmp_path, monkeypatch, "llama", names="ab", halves=("A", "B"))
    pairs["pair"].wordings = pairs["pair"].labels
    found = everything(pairs)
    for name in ("wording_step", "own_categories", "left_over"):
        assert found[name].table["note"].str.startswith("not testable").all()
        assert found[name].numbers == {"pair": {}}
    assert np.isfinite(found["level"].table["gap"]).all()
    said = overlap.sentences(
        *(
            found[n]
            for n in ("wording_step", "own_categories", "left_over", "readable", "membership")
        )
    )
    assert sum("not testable" in line for line in said) >= 3
    gaps, tau = overlap.over_epsilon(pairs), overlap.over_tau(pairs, 3)
    assert gaps["gap"].isna().all()
    layers = found["layer_shares"].table
    for draw, table in (
        (figures.waterfall, overlap.waterfall(pairs, found["left_over"])),
        (figures.excess_matrices, overlap.six_by_six(pairs)),
        (figures.wordings, overlap.wording_picture(pairs)),
        (figures.layers, layers[layers["note"] == ""]),
    ):
        assert table.empty
        assert "not testable" in draw(table).texts[0].get_text()
    figures.sensitivity(gaps, tau[tau["kind"] == "unique"])


def test_figures_show_their_tables(sparse):
    left = overlap.measured(sparse, overlap.left_over, ["all"])
    table = overlap.waterfall(sparse, left)
    bars = [p.get_width() for ax in figures.waterfall(table).axes for p in ax.patches]
    assert set(np.round(table["left"], 9)) <= set(np.round(bars, 9))
    six = overlap.six_by_six(sparse)
    images = [ax.images[0].get_array() for ax in figures.excess_matrices(six).axes if ax.images]
    assert np.allclose(np.concatenate([m.ravel() for m in images]), six["excess"])
    words = overlap.wording_picture(sparse)
    assert set(words["model"]) == {"tuned", "base"}
    drawn = [ax for ax in figures.wordings(words).axes if ax.get_visible()]
    assert len(drawn) == len(sparse["pair"].study.units)
    read = overlap.readable_picture(overlap.readable(sparse))
    assert set(read["read off"]) == {"tuned", "base", "words", "twins"}
    figures.readable(read)
    figures.layers(overlap.layer_shares(sparse).table)


def test_a_page_never_prints_a_p_of_nothing():
    table = pd.DataFrame({"pair": ["a"], "p_null": [3e-9], "holm": [0.0005], "gap": [0.12345]})
    page = overlap.shown(table.assign(ci=[[0.1, 0.2]]), ["gap", "ci", "p_null", "holm"], ["pair"])
    assert page.loc["a"].tolist() == [0.123, "[0.100, 0.200]", "< 0.0001", "0.0005"]


def test_labels_are_dealt_over_whole_wordings_of_like_length(sparse):
    one = sparse["pair"]
    dealt, y = overlap._dealt(one, 30), np.unique(one.labels, return_inverse=True)[1]
    strata = length_strata(one.lengths, overlap.STRATA, one.wordings)
    assert dealt.shape == (30, len(y))
    assert any((draw != y).any() for draw in dealt)
    for draw in dealt:
        of = pd.DataFrame({"wording": one.wordings, "stratum": strata, "dealt": draw, "own": y})
        assert (of.groupby("wording")["dealt"].nunique() == 1).all()
        once = of.drop_duplicates("wording")
        for _, part in once.groupby("stratum"):
            assert sorted(part["dealt"]) == sorted(part["own"])


def test_halves_agree_over_wordings_not_rows(sparse):
    """Rows of one wording that are all the same say no more than one of them."""
    [row] = overlap.halves_agree(sparse).table.query("unit == 'neurons'").to_dict("records")
    one = sparse["pair"]
    assert row["wordings"] == len(set(zip(one.study.rows["fold"], one.wordings, strict=True)))
    S, y = one.similarity("tuned", "neurons"), np.unique(one.labels, return_inverse=True)[1]
    half = np.unique(one.study.rows["fold"], return_inverse=True)[1]
    rows = bootstrap(lambda w: gap_across(S, y, half, w), 2 * y + half, **one.how)
    low, high = row["agreement_ci"]
    assert row["agreement"] == pytest.approx(float(rows.estimate))
    assert high - low > 1.05 * float(rows.high - rows.low)


def test_sensitivity_takes_every_choice(sparse):
    gaps, tau = overlap.over_epsilon(sparse), overlap.over_tau(sparse, 3)
    profile = sparse["pair"].profile
    assert len(gaps) == 2 * len(profile.epsilons)
    assert len(tau) == 2 * len(profile.epsilons) * len(profile.taus)
    figures.sensitivity(gaps, tau[tau["kind"] == "unique"])
    long = overlap.over_length(sparse, (8, 200))
    assert np.isfinite(long["gap, neurons"][0])
    assert long["note"][1].startswith("not testable")
