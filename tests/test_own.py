"""Labelled texts of one's own: the ablation table against loops, a planted circuit, bad input."""

import inspect
import io
import re
import tracemalloc

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

import helpers
from helpers.analysis.sets import contrast, frequency
from helpers.bars import seen
from helpers.capture import count as counting
from helpers.capture.counts import Counts
from helpers.capture.sites import find_sites
from helpers.capture.tokens import encode
from helpers.config import defaults
from helpers.paths import DATA, ROOT
from helpers.record import NotTestable, UserError
from helpers.study import own, planted, quick
from helpers.study.atlas import own_study
from helpers.study.evaluate import plain_text_nll
from tests import zoo

TOPICS = pd.read_csv(DATA / "own" / "topics.csv")
FEW = {"controls": 2, "controls_all_rows": 2, "resamples": 99}


@pytest.fixture(scope="module")
def tiny():
    return helpers.load_model("data/models/tiny-dense/tuned")


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "mixtral"])
def test_notebook_09_counts_by_hand_what_the_helper_counts_on_any_family(family):
    """Its own cells, on models with an MLP, with a shared expert, with routed experts alone."""
    book = nbformat.read(ROOT / "notebooks" / "09_your_own.ipynb", 4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    first = next(n for n, cell in enumerate(cells) if "sites, seen =" in cell)
    model, tokenizer = zoo.build(family), zoo.tokenizer()
    page = {"model": model, "mine": TOPICS, "torch": torch, "find_sites": find_sites}
    page["read"] = encode(tokenizer, [TOPICS["text"][0]])[0]
    for cell in cells[first : first + 2]:
        exec(cell, page)
    counts = helpers.count(model, tokenizer, TOPICS["text"][:2], template="{instruction}")
    assert len(page["by_hand"]) == (family != "mixtral")
    for site, found in zip(page["sites"], page["by_hand"], strict=True):
        assert (counts.neurons[site.family][0, 0] == found.numpy()).all()


def study_of(tiny, **settings):
    return own.Own.on(*tiny, TOPICS["text"], TOPICS["label"], **settings)


def loss(model, tokenizer, text):
    """Mean loss of a text's own tokens in the profile's template, one at a time."""
    before, after = defaults().template.split("{instruction}")
    ids = tokenizer(before + text + after)["input_ids"]
    first, last = len(tokenizer(before)["input_ids"]), len(tokenizer(before + text)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    chances = logits.log_softmax(-1)
    return float(np.mean([-chances[i - 1, ids[i]] for i in range(first, last)]))


def test_a_cell_is_what_a_loop_with_edited_weights_finds(tiny):
    """The set chosen by hand on one half, its columns zeroed by hand, texts of the other half read
    one by one; both ways; each half weighs the same.
    """
    model, tokenizer = tiny
    table = helpers.ablation_table(model, tokenizer, TOPICS["text"], TOPICS["label"], **FEW)
    study, found = study_of(tiny), []
    for half in study.halves:
        chosen = study.half(study.other(half)).rows
        counts = helpers.count(model, tokenizer, chosen["instruction"])
        p = frequency(counts.neurons["dense"], counts.tokens).reshape(len(chosen), -1)
        assert study.names == ("pets", "sums", "places")
        y = chosen["category"].to_numpy()
        best = np.argsort(-contrast(p, y)[1], kind="stable")[: round(0.05 * 2048)]
        measured = study.half(half).rows
        texts = measured["instruction"][measured["category"] == 0]
        intact = [loss(model, tokenizer, text) for text in texts]
        kept = [layer.mlp.down_proj.weight.detach().clone() for layer in model.model.layers]
        with torch.no_grad():
            for neuron in best:
                model.model.layers[neuron // 512].mlp.down_proj.weight[:, neuron % 512] = 0
            found.append(
                np.mean([loss(model, tokenizer, text) for text in texts] - np.array(intact))
            )
            for layer, weight in zip(model.model.layers, kept, strict=True):
                layer.mlp.down_proj.weight.copy_(weight)
    cell = table[(table["ablated"] == "sums") & (table["measured"] == "pets")].iloc[0]
    assert cell["increase"] == pytest.approx(np.mean(found), abs=2e-3)


def test_a_planted_circuit_is_found_and_what_it_is_not_needed_for():
    rows = planted.rows(16).drop_duplicates("instruction")
    found = helpers.ablation_table(
        planted.model(),
        zoo.tokenizer(),
        rows["instruction"],
        rows["category"],
        rows["reference"],
        epsilon=0.02,
        template=planted.TEMPLATE,
        controls=10,
        resamples=499,
    )
    own_set = found["ablated"] == found["measured"]
    assert (found.loc[own_set, "low"] > 0).all()
    assert (found.loc[own_set, "holm"] < 0.05).all()
    assert (found.loc[own_set, "specific_low"] > 0).all()
    assert found.loc[~own_set, "effect"].abs().max() < 0.2 * found.loc[own_set, "effect"].min()
    assert (found["note"] == "").all()
    assert len(own.sentences(found)) == 6
    assert all("needs its set" in line for line in own.sentences(found))


def test_a_label_needs_its_set_if_the_set_does_more_than_its_control_draws(tiny):
    """Holm by hand over p_sets of the own sets; too few draws could not pass, and that is said."""
    given = TOPICS["text"], TOPICS["label"]
    table = helpers.ablation_table(*tiny, *given, **FEW | {"controls": 9})
    on_own = table[table["ablated"] == table["measured"]]
    assert (on_own["p_sets"] >= 0.01).all()  # the least of 10 ** 2 exchanges
    order = on_own.sort_values("p_sets")
    by_hand = np.minimum(np.maximum.accumulate(order["p_sets"] * [3, 2, 1]), 1)
    assert order["holm"].tolist() == pytest.approx(by_hand.tolist())
    assert table.loc[table["ablated"] != table["measured"], "holm"].isna().all()  # two draws
    for row, line in zip(on_own.itertuples(), own.sentences(table), strict=True):
        needed = row.low > 0 and row.holm < 0.05
        assert f"{row.measured} {'needs' if needed else 'is not shown to need'} its set" in line
    few = helpers.ablation_table(*tiny, *given, **FEW | {"controls": 6})  # 3 / 49 > .05
    assert few["holm"].isna().all()
    assert few["p_sets"].notna().all()
    said = "could not be shown to need its set by so few control draws: "
    assert all(said in line for line in own.sentences(few))


def test_rows_that_are_hurt_by_any_set_do_not_make_a_set_needed(tiny):
    """The rows' own p is small for a set that is one of many; the sets' is not."""
    table = helpers.ablation_table(*tiny, BINARY["text"], BINARY["label"], **FEW)
    on_own = table["ablated"] == table["measured"]
    one_of_many = table.assign(low=0.1, p=0.001, p_sets=0.4, holm=np.where(on_own, 0.8, np.nan))
    assert all("is not shown to need" in line for line in own.sentences(one_of_many))


def test_halves_are_drawn_within_labels_and_copies_stay_together(tiny):
    texts = [*TOPICS["text"], *TOPICS["text"][:7]]
    labels = [*TOPICS["label"], *TOPICS["label"][:7]]
    rows = own.Own.on(*tiny, texts, labels).rows
    assert rows.groupby("instruction")["fold"].nunique().max() == 1
    once = rows.drop_duplicates("instruction")
    assert set(once.groupby(["category", "fold"]).size()) == {12}
    assert own.Own.on(*tiny, texts, labels, seed=1).rows["fold"].tolist() != rows["fold"].tolist()


def test_of_many_texts_as_many_are_drawn_as_hexainst_has(tiny):
    texts = [f"{n} plus {m} is {n + m} ." for n in range(15) for m in range(10)]
    texts += [f"{n} minus {m} is {n - m} ." for n in range(10, 25) for m in range(10)]
    rows = own.Own.on(*tiny, texts, ["plus"] * 150 + ["minus"] * 150, rows=30).rows
    assert set(rows.groupby(["category", "fold"]).size()) == {30}


def test_unbalanced_labels_and_ones_with_too_few_texts_keep_their_rows(tiny):
    some = TOPICS[(TOPICS["label"] != "places") | (TOPICS.index < 52)]  # four of places
    table = helpers.ablation_table(*tiny, some["text"], some["label"], **FEW)
    noted = table["note"].str.startswith("not testable")
    assert (noted == (table["measured"] == "places")).all()
    assert len(table) == 9
    own_set = table["ablated"] == table["measured"]
    assert table.loc[own_set & ~noted, "specific"].notna().all()
    assert table.loc[noted, ["effect", "low", "p"]].isna().all(axis=None)
    helpers.draw_ablation(table)
    assert any("places: not testable" in line for line in own.sentences(table))


def test_where_no_label_has_texts_enough_the_table_has_every_column(tiny):
    some = TOPICS.groupby("label", sort=False).head(3)
    table = helpers.ablation_table(*tiny, some["text"], some["label"], controls=1)
    assert list(table) == own.COLUMNS
    assert table["effect"].isna().all()
    helpers.draw_ablation(table)
    assert all("not testable" in line for line in own.sentences(table)[:3])


def test_a_table_says_the_same_when_it_is_read_back(tiny, tmp_path):
    some = TOPICS[(TOPICS["label"] != "places") | (TOPICS.index < 52)]
    made = helpers.ablation_table(*tiny, some["text"], some["label"], **FEW)
    made.to_csv(tmp_path / "t.csv", index=False)
    said = own.sentences(pd.read_csv(tmp_path / "t.csv"))
    assert said == own.sentences(made)
    assert not any("nan" in line for line in said)
    drawn = helpers.draw_ablation(pd.read_csv(ROOT / "figures" / "tiny" / "09_ablation.csv"))
    said = [text.get_text() for ax in drawn.axes for text in ax.get_yticklabels()]
    assert not any("not testable" in text for text in said)


BINARY = TOPICS[TOPICS["label"] != "places"].reset_index(drop=True)


@pytest.fixture(scope="module")
def ablated(tiny):
    """(name of sums, name of pets) -> the table of these two labels."""
    found = helpers.ablation_table(*tiny, BINARY["text"], BINARY["label"], **FEW)

    def of(sums, pets):
        new = {"sums": sums, "pets": pets}
        return found.assign(**{c: found[c].map(new) for c in ("ablated", "measured")})

    return of


def words_of(figure):
    """Of each axes the labels of its rows and the numbers in its cells."""
    return [
        ([t.get_text() for t in ax.get_yticklabels()], [t.get_text() for t in ax.texts])
        for ax in figure.axes
    ]


def test_labels_that_are_true_or_false_are_drawn_as_names_are(tiny, ablated):
    counts, names = helpers.count(*tiny, BINARY["text"]), BINARY["label"]
    by_name, by_truth = (
        helpers.draw_sets(helpers.find_sets(counts, labels))
        for labels in (names.map({"sums": "True", "pets": "False"}), names == "sums")
    )
    assert words_of(by_truth) == words_of(by_name)
    assert len(words_of(by_truth)[0][0]) == 2
    drawn = [helpers.draw_ablation(ablated(*pair)) for pair in (("True", "False"), (True, False))]
    assert words_of(drawn[0]) == words_of(drawn[1])
    assert len(words_of(drawn[1])[1][1]) == 4
    asked = helpers.ablation_table(*tiny, BINARY["text"], names == "sums", **FEW)
    assert asked["measured"].dtype == bool
    assert words_of(helpers.draw_ablation(asked)) == words_of(drawn[1])
    assert own.sentences(asked) == own.sentences(ablated(True, False))


@pytest.mark.parametrize("label", ["None", "NA", "null"])
def test_a_label_that_a_csv_file_loses_is_said(tiny, ablated, label, tmp_path):
    file = tmp_path / "t.csv"
    made = ablated(label, "pets")
    sets = helpers.find_sets(
        helpers.count(*tiny, BINARY["text"]), BINARY["label"].replace("sums", label)
    )
    for table, uses in (
        (made, (own.sentences, helpers.draw_ablation)),
        (sets, (helpers.draw_sets,)),
    ):
        table.to_csv(file, index=False)
        for use in uses:
            with pytest.raises(UserError, match="rows have no .*keep_default_na=False"):
                use(pd.read_csv(file))
            use(pd.read_csv(file, keep_default_na=False, na_values=[""]))
    made.to_csv(file, index=False)
    again = pd.read_csv(file, keep_default_na=False, na_values=[""])
    assert own.sentences(again) == own.sentences(made)


@pytest.mark.parametrize("table", [None, "sets.csv", [], pd.DataFrame(), TOPICS])
@pytest.mark.parametrize("draw", [helpers.draw_sets, helpers.draw_ablation, own.sentences])
def test_what_is_no_table_of_ours_is_refused(draw, table):
    with pytest.raises(UserError, match="expected the table that"):
        draw(table)


def test_rows_that_stand_twice_in_a_table_are_said(tiny, ablated):
    sets = helpers.find_sets(helpers.count(*tiny, BINARY["text"]), BINARY["label"])
    table = ablated("sums", "pets")
    for made, uses in (
        (table, (own.sentences, helpers.draw_ablation)),
        (sets, (helpers.draw_sets,)),
    ):
        for use in uses:
            with pytest.raises(UserError, match=f"{len(made)} rows have the same .* one by one"):
                use(pd.concat([made, made]))


def test_a_table_is_drawn_whatever_its_index(tiny, ablated):
    sets = helpers.find_sets(helpers.count(*tiny, BINARY["text"]), BINARY["label"])
    table = ablated("sums", "pets")
    for draw, made, name in (
        (helpers.draw_sets, sets, "label"),
        (helpers.draw_ablation, table, "measured"),
    ):
        by_name = made.set_index(name, drop=False)
        assert words_of(draw(by_name)) == words_of(draw(made))


def test_every_default_is_the_profiles():
    profile = defaults()
    signature = inspect.signature
    assert signature(helpers.find_sets).parameters["share"].default == profile.epsilon
    found = {k: v.default for k, v in signature(helpers.overlap).parameters.items()}
    assert [found[k] for k in ("epsilon", "resamples", "seed")] == [0.05, 2000, 0]
    assert found["resamples"] == profile.resamples
    assert own.settings_of(profile) == {name: getattr(profile, name) for name in own.SETTINGS}


def test_counts_are_those_that_the_chain_makes(tiny):
    study = study_of(tiny)
    mine = helpers.count(*tiny, (text for text in study.rows["instruction"]))
    chain = counting.count(*tiny, study.rows["instruction"], template=defaults().template)
    assert all((a == chain.arrays()[k]).all() for k, a in mine.arrays().items())
    assert {a.dtype for k, a in mine.arrays().items() if k != "tokens"} == {np.dtype("uint16")}


def test_a_series_with_an_odd_index_is_read_in_its_order(tiny):
    odd = TOPICS.sample(frac=1, random_state=0)
    odd.index = np.roll(odd.index, 5) * 3 + 1
    plain = odd.reset_index(drop=True)
    counts = helpers.count(*tiny, odd["text"])
    assert (counts.tokens == helpers.count(*tiny, list(plain["text"])).tokens).all()
    pd.testing.assert_frame_equal(
        helpers.find_sets(counts, odd["label"]), helpers.find_sets(counts, list(plain["label"]))
    )


@pytest.mark.parametrize("score", quick.SCORES)
def test_sets_are_the_same_however_many_neurons_are_looked_at_at_once(tiny, score, monkeypatch):
    counts = helpers.count(*tiny, TOPICS["text"])
    whole = helpers.find_sets(counts, TOPICS["label"], score)
    monkeypatch.setattr(quick, "CELLS", 100 * len(TOPICS))
    pd.testing.assert_frame_equal(helpers.find_sets(counts, TOPICS["label"], score), whole)


def test_sets_of_many_texts_take_little_memory_beside_the_counts(monkeypatch):
    """No table of all frequencies, let alone of int64."""
    monkeypatch.setattr(quick, "CELLS", 2**18)
    rng = np.random.default_rng(0)
    neurons = rng.integers(0, 9, (20_000, 1, 400), dtype=np.uint16)
    counts = Counts(np.full(20_000, 9, np.int32), {"dense": neurons}, None, {"dense": (0,)})
    tracemalloc.start()
    helpers.find_sets(counts, rng.integers(0, 3, 20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < neurons.nbytes  # their frequencies as float32 would be twice that


def test_of_many_texts_equally_many_of_each_label_are_compared(monkeypatch):
    monkeypatch.setattr(quick, "COMPARED", 60)
    rng = np.random.default_rng(0)
    neurons = rng.integers(0, 9, (500, 2, 50), dtype=np.uint16)
    counts = Counts(np.full(500, 9, np.int32), {"dense": neurons}, None, {"dense": (0, 1)})
    labels = np.repeat(["many", "few"], [480, 20])
    assert helpers.overlap(counts, labels, resamples=19)["n"][0] == 50


def test_fifty_labels_are_taken(tiny):
    texts = [f"{n % 25} plus {n // 25} is {n % 25 + n // 25} ." for n in range(100)]
    labels = [n % 50 for n in range(100)]
    sets = helpers.find_sets(helpers.count(*tiny, texts), labels)
    assert sets["label"].nunique() == 50
    helpers.draw_sets(sets)


GOOD = ["ada has a cat .", "boris has a dog .", "2 plus 3 is 5 .", "4 plus 3 is 7 ."]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("ada has a cat .", "texts: found str"),
        ([], "empty"),
        ([*GOOD, ""], "text 4 is ''"),
        ([*GOOD, "  "], "text 4 is '  '"),
        ([*GOOD, "\u200b"], r"text 4 is '\\u200b'"),
        ([*GOOD, None], "text 4 is None"),
        ([*GOOD, float("nan")], "text 4 is nan"),
        ([*GOOD, 7], "text 4 is 7"),
        ([*GOOD, "cat " * 300], r"1 of 5 texts are longer than the 256 tokens .* text 4 has 30\d"),
    ],
)
def test_bad_texts_are_one_clear_error(tiny, texts, said):
    with pytest.raises(UserError, match=said):
        helpers.count(*tiny, texts)
    if isinstance(texts, list) and texts:
        labels = ["a", "a", "b", "b", "b"]
        with pytest.raises(UserError, match=said):
            helpers.ablation_table(*tiny, texts, labels)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", "b"], "2 labels for 4 texts"),
        ("aabb", "labels: found str"),
        (["a", "a", "b", None], "label 3 is None"),
        (["a", "a", "b", float("nan")], "label 3 is nan"),
        (pd.Series(["a", "a", "b", pd.NA], dtype=object), "label 3 is <NA>"),
        (["a", "a", "b", ""], "label 3 is ''"),
        (["a", "a", "b", " "], "label 3 is ' '"),
        (["a", "a", "b", "\u200b"], "label 3 is "),
        (np.array(3), "labels: found ndarray"),
        (torch.tensor(3), "labels: found int"),
        (["a", "a", ["b"], ["b"]], r"label 2 is \['b'\]"),
        (["a", "a", "b", "c"], "one text only has the label 'b', 'c'"),
        (["a"] * 4, r"one label only \('a'\)"),
    ],
)
def test_bad_labels_are_one_clear_error(tiny, labels, said):
    counts = helpers.count(*tiny, GOOD)
    for refused in (
        lambda: helpers.find_sets(counts, labels),
        lambda: helpers.overlap(counts, labels),
        lambda: helpers.ablation_table(*tiny, GOOD, labels),
    ):
        with pytest.raises(UserError, match=said):
            refused()


def test_more_than_fifty_labels_are_refused():
    with pytest.raises(UserError, match="51 different labels, expected 2 to 50"):
        quick.labels_of([n % 51 for n in range(510)], 510)
    neurons = np.random.default_rng(0).integers(0, 4, (9, 1, 9), dtype=np.uint16)
    counts = Counts(np.full(9, 3, np.int32), {"dense": neurons}, None, {})
    with pytest.raises(NotTestable, match="label 'b' has 2 texts, expected 5 or more"):
        helpers.overlap(counts, ["a"] * 7 + ["b"] * 2)


def test_labels_of_two_kinds_stay_apart():
    assert quick.labels_of([1, "1", 1, "1"], 4)[1] == [1, "1"]


def test_a_text_under_two_labels_is_refused_by_name(tiny):
    texts = [*GOOD, GOOD[0], "a fox sleeps ."]
    with pytest.raises(UserError, match=re.escape(f"text 4 ({GOOD[0]!r}) has the label 'b'")):
        helpers.ablation_table(*tiny, texts, ["a", "a", "b", "b", "b", "b"])


COPIED = [f"{name} has a {pet} ." for name in ("ada", "boris", "eva") for pet in ("cat", "dog")] * 2
COPIED = [*COPIED[:6], *[f"{n} plus 3 is {n + 3} ." for n in range(6)]]


def test_copies_of_a_text_are_no_texts_of_their_own(tiny):
    """Labels dealt at random: five copies of each text say what the text alone says."""
    labels = [str(label) for label in np.random.default_rng(0).permutation([0, 1] * 6)]
    alone = helpers.overlap(helpers.count(*tiny, COPIED), labels, resamples=99)
    again = helpers.overlap(helpers.count(*tiny, COPIED * 5), labels * 5, resamples=99)
    pd.testing.assert_frame_equal(alone, again)
    wrong = [*labels * 4, *labels[1:], labels[0]]
    with pytest.raises(UserError, match="texts 0 and 48 have the same counts.* the labels"):
        helpers.overlap(helpers.count(*tiny, COPIED * 5), wrong)
    with pytest.raises(NotTestable, match="copies count once"):
        helpers.overlap(helpers.count(*tiny, GOOD * 5), list("aabb") * 5)


def test_copies_are_drawn_together_and_count_once_in_a_half(tiny, monkeypatch):
    labels = ["pets"] * 6 + ["sums"] * 6
    few = helpers.ablation_table(*tiny, COPIED * 5, labels * 5, **FEW)
    assert set(few["note"]) == {
        f"not testable: 3 different texts of {label!r} in a half, expected 5"
        for label in ("pets", "sums")
    }
    spaced = [text.replace(" ", "  ") for text in BINARY["text"]]
    texts, names = [*BINARY["text"], *spaced], [*BINARY["label"]] * 2
    settings = FEW | {"ablation_rows": 100, "resamples": 999}
    together = helpers.ablation_table(*tiny, texts, names, **settings)
    monkeypatch.setattr(own, "_clusters", lambda copies: None)
    apart = helpers.ablation_table(*tiny, texts, names, **settings)
    for low, high in (("low", "high"), ("specific_low", "specific_high")):
        wide = (together[high] - together[low]) / (apart[high] - apart[low])
        assert wide.dropna().between(1.2, 1.8).all()  # sqrt(2), and Student's for so few
    assert (together["p"] >= apart["p"]).all()
    assert (together["effect"] == apart["effect"]).all()
    pairs = own.Own.on(*tiny, texts, names).rows.groupby("copy_of")["fold"]
    assert (pairs.size() == 2).all()
    assert (pairs.nunique() == 1).all()


def test_a_text_that_reads_the_same_under_two_labels_is_refused(tiny):
    texts = [*GOOD, GOOD[0].replace(" ", "  "), "a fox sleeps ."]
    with pytest.raises(UserError, match="text 4 .* has the label 'b', text 0, of the same tokens"):
        helpers.ablation_table(*tiny, texts, ["a", "a", "b", "b", "b", "b"])


TIMES = pd.Timestamp("2026-01-01"), pd.Timestamp("2026-01-01", tz="UTC")


@pytest.mark.parametrize(
    "names",
    [
        (True, False, "unknown"),
        (*TIMES, "never"),
        (1j, 2j, 1 + 1j),
        (2**60, 2**60 + 1, 0.5),
        (2**63, -1, 3),
        (1, "1", 2.0),
    ],
)
def test_labels_of_mixed_kinds_are_what_their_names_are(tiny, names):
    plain = ["first", "second", "third"]
    codes = np.repeat([0, 1, 2], [24, 24, 4])
    mixed, said = ([given[code] for code in codes] for given in (names, plain))
    texts = TOPICS["text"][:52]
    counts = helpers.count(*tiny, texts)
    sets, expected = (helpers.find_sets(counts, labels) for labels in (mixed, said))
    tables, by_name = (
        helpers.ablation_table(*tiny, texts, labels, **FEW) for labels in (mixed, said)
    )
    back = dict(zip(names, plain, strict=True))
    assert [back[label] for label in sets["label"]] == expected["label"].tolist()
    for column in ("ablated", "measured"):
        assert [back[label] for label in tables[column]] == by_name[column].tolist()
    labels = ["ablated", "measured", "note"]
    pd.testing.assert_frame_equal(tables.drop(columns=labels), by_name.drop(columns=labels))
    drawn, named = helpers.draw_sets(sets), helpers.draw_sets(expected)
    assert words_of(drawn)[0][1] == words_of(named)[0][1]
    assert words_of(drawn)[0][0] == [
        f"{name} (n = {n})" for name, n in zip(names, expected["label"].value_counts(), strict=True)
    ]
    drawn, named = helpers.draw_ablation(tables), helpers.draw_ablation(by_name)
    assert words_of(drawn)[1][1] == words_of(named)[1][1]
    assert len(own.sentences(tables)) == 3


def test_a_text_that_has_no_loss_is_named_before_anything_is_counted(monkeypatch):
    monkeypatch.setattr(own, "count_encoded", None)
    pair, texts = (zoo.build("llama"), zoo.tokenizer()), [*GOOD, "a"]
    with pytest.raises(UserError, match="text 4 has no token whose loss could be counted"):
        helpers.ablation_table(*pair, texts, list("aabbb"), template="{instruction}")
    with pytest.raises(UserError, match="text 4 has no token whose loss"):
        plain_text_nll(*pair, texts)


def test_words_added_to_a_tokenizer_are_named_before_anything_is_counted(monkeypatch):
    monkeypatch.setattr(own, "count_encoded", None)
    references = ["one", "two", "three <new>", "four"]
    for add, told in (
        (lambda words: words.add_special_tokens({"eos_token": "<end>"}), "text [0-3] has the"),
        (lambda words: words.add_tokens(["<new>"]), "text 2 has the"),
    ):
        model, tokenizer = helpers.load_model("data/models/tiny-dense/tuned")
        add(tokenizer)
        with pytest.raises(UserError, match=rf"{told} token id \d+, .* embeddings\. Use"):
            helpers.ablation_table(model, tokenizer, GOOD, list("aabb"), references)


def test_a_label_of_copies_is_refused(tiny):
    with pytest.raises(UserError, match="all texts of 'b' are the same"):
        helpers.ablation_table(*tiny, [*GOOD[:2], GOOD[2], GOOD[2]], ["a", "a", "b", "b"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"control": 3}, "unknown key 'control', did you mean 'controls'"),
        ({"epsilon": 2}, "epsilon is 2"),
        ({"references": ["x"]}, "1 references for 4 texts"),
        ({"references": ["x", "y", "", "z"]}, "reference 2 is ''"),
        ({"score": "best"}, "score is 'best', expected one of frequency"),
        ({"score": "Contrst"}, "did you mean 'contrast'"),
        ({"score": "atribution", "references": GOOD}, "did you mean 'attribution'"),
        ({"scores": ("lape",)}, "unknown key 'scores'"),
        ({"subset": "matched"}, "unknown key 'subset'"),
        ({"tau": 0.7}, "unknown key 'tau'"),
        ({"score": "attribution"}, "with references attribution"),
    ],
)
def test_bad_settings_are_one_clear_error(tiny, settings, said):
    with pytest.raises(UserError, match=said):
        helpers.ablation_table(*tiny, GOOD, ["a", "a", "b", "b"], **settings)


def test_settings_that_counting_does_not_read_are_refused(tiny):
    for given in ({"dataset": "tiny"}, {"name": "x"}, {"epsilon": 0.1}):
        with pytest.raises(UserError, match="unknown key"):
            helpers.count(*tiny, GOOD, **given)


@pytest.mark.parametrize("share", ["0.05", True, None, [0.1], 0, 2, float("nan")])
def test_a_share_that_is_none_is_refused(tiny, share):
    counts = helpers.count(*tiny, GOOD)
    with pytest.raises(UserError, match="share"):
        helpers.find_sets(counts, ["a", "a", "b", "b"], share=share)
    with pytest.raises(UserError, match="epsilon is"):
        helpers.overlap(counts, ["a", "a", "b", "b"], share)


@pytest.mark.parametrize("given", [{"seed": -1}, {"seed": "0"}, {"resamples": True}])
def test_seeds_and_resamples_are_checked_as_in_a_profile(tiny, given):
    with pytest.raises(UserError, match=f"settings: {next(iter(given))} is"):
        helpers.overlap(helpers.count(*tiny, GOOD), ["a", "a", "b", "b"], **given)


def test_numbers_and_labels_of_numpy_and_torch_are_taken(tiny):
    counts = helpers.count(*tiny, GOOD, batch_tokens=np.int64(64))
    by_list = helpers.find_sets(counts, [0, 0, 1, 1], share=np.float64(0.05))
    for labels in (np.array([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1])):
        pd.testing.assert_frame_equal(helpers.find_sets(counts, labels), by_list)


@pytest.mark.parametrize("counts", [None, GOOD, {}, np.zeros(4)])
def test_what_are_no_counts_is_refused(counts):
    for use in (helpers.find_sets, helpers.overlap):
        with pytest.raises(UserError, match="counts: found .*, expected what count"):
            use(counts, ["a", "a", "b", "b"])


@pytest.mark.parametrize("missing", [None, float("nan"), 7, [-1], [0.5], np.array(3)])
def test_a_missing_response_is_named(tiny, missing):
    with pytest.raises(UserError, match="response 3"):
        helpers.count(*tiny, GOOD, responses=["a", "b", "c", missing])


def test_bars_are_seen_in_a_terminal_and_a_notebook_alone():
    stream = io.StringIO()
    assert not seen(stream)
    stream.isatty = lambda: True
    assert seen(stream)
    page = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    assert seen(page())


@pytest.mark.parametrize("label", ["\ud800x", "\ud800", "x\udfff"])
def test_half_a_character_in_a_label_is_refused_everywhere(tiny, label):
    counts, labels = helpers.count(*tiny, GOOD), ["a", "a", label, label]
    for use in (
        lambda: helpers.find_sets(counts, labels),
        lambda: helpers.overlap(counts, labels),
        lambda: helpers.ablation_table(*tiny, GOOD, labels),
        lambda: own_study(*tiny, GOOD, labels, counts),
    ):
        with pytest.raises(UserError, match="label 2 is .*: expected a name or a number"):
            use()


@pytest.mark.parametrize("labels", [[1, 1, True, True], [False, 0, 1, 1], [2, 2, 0, np.False_]])
def test_true_beside_one_is_no_label(labels):
    with pytest.raises(UserError, match="the same to Python"):
        quick.labels_of(labels, 4)
    assert quick.labels_of([True, np.True_, 0, 0.0], 4)[0].tolist() == [0, 0, 1, 1]


def test_a_tokenizer_without_an_end_says_what_a_user_can_do():
    """Doing it is enough."""
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    end, tokenizer.eos_token = tokenizer.eos_token, None
    given = model, tokenizer, GOOD, list("aabb"), GOOD
    with pytest.raises(UserError, match=r"eos_token.*tokenizer\.eos_token = ") as error:
        own.Own.on(*given)
    assert "eos=" not in str(error.value)
    tokenizer.eos_token = end
    assert own.Own.on(*given).referenced
