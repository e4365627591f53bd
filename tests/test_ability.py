"""What a model can do: rankings and gains against losses taken token by token, summaries against
cases worked by hand, and pages that lack something.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.proportion import proportion_confint

from helpers.analysis.stats import clustered_share
from helpers.config import Pair, defaults
from helpers.study import ability
from helpers.study.study import Study
from tests.test_evaluate import TOKENIZER, by_hand
from tests.zoo import ZOO, build

PROFILE = SimpleNamespace(
    name="p",
    chat=False,
    template="say: {instruction}\n",
    max_new_tokens=4,
    batch_tokens=120,
    run_code=False,
    ablation_rows=3,
)
LABEL = {"name": "label", "labels": ["yes", "no", "two words"], "answer": "no", "aliases": ["yes"]}


def rows_of(references, checker=None):
    """Rows of one category A in one fold, and of one B beside it, which must not be mixed in."""
    rows = [
        {"id": f"{c}{i}", "half": "h", "fold": "h", "category": c, "instruction": f"do {c} {i}"}
        | {"input": "", "reference": reference, "tags": {"wording": f"w{i}"}}
        | {"checker": checker or {"name": "exact", "answer": reference}}
        for c in "AB"
        for i, reference in enumerate(references)
    ]
    return pd.DataFrame(rows)


def study_of(rows, profile=PROFILE):
    model = build(next(iter(ZOO)))
    pair = Pair("pair", "none", "none")
    return Study(profile, pair, rows, {"tuned": (model, TOKENIZER), "base": (model, TOKENIZER)})


@pytest.fixture
def found(monkeypatch):
    """ability() of rows, each answered by its reference, but for the first."""

    def answers(study, variant="tuned"):
        return ["?"] + study.rows["reference"].to_list()[1:]

    def answer_ids(study, variant="tuned"):
        return [[0] * (place % 6) for place in range(len(study.rows))]

    monkeypatch.setattr(Study, "answers", answers)
    monkeypatch.setattr(Study, "answer_ids", answer_ids)
    return lambda rows, profile=PROFILE: ability.ability(study_of(rows, profile))


def test_ranking_and_gain_are_those_of_losses_taken_one_by_one(found):
    rows = rows_of(["two", "x", "19", "not read"])
    table = found(rows)
    model = study_of(rows).model()[0]

    def loss(asked, reference):
        return by_hand(model, dict(rows.loc[asked]) | {"reference": reference}, eos=False)

    for i in (0, 1, 2):  # each has the other two of its three as neighbours
        others = [j for j in (0, 1, 2) if j != i]
        own = [loss(i, rows.loc[j, "reference"]) for j in (0, 1, 2)]
        gain = np.mean([loss(j, rows.loc[i, "reference"]) for j in others]) - own[i]
        assert table.loc[i, "own"] == pytest.approx(own[i], abs=1e-4)
        assert table.loc[i, "gain"] == pytest.approx(gain, abs=1e-4)
        assert table.loc[i, "first"] == (np.argmin(own) == i)
        assert table.loc[i, "chance"] == pytest.approx(1 / 3)
    assert table.loc[3, ["own", "gain", "first"]].isna().all()  # beyond ablation_rows
    assert table["score"].tolist() == [0] + [1] * 7
    assert table["gain_none"].isna().all()  # no word of this template stands behind


def test_none_is_the_template_around_nothing(found):
    rows = rows_of(["two", "x", "19"])
    profile = SimpleNamespace(**vars(PROFILE) | {"template": "say: {instruction}\nnow:\n"})
    table, model = found(rows, profile), study_of(rows).model()[0]
    around = {"instruction": "\nnow:", "input": "", "reference": "x"}
    assert table.loc[1, "none"] == pytest.approx(by_hand(model, around, eos=False), abs=1e-4)
    assert table.loc[1, "gain_none"] == table.loc[1, "none"] - table.loc[1, "own"]


def test_labels_are_ranked_where_a_row_has_them(found):
    rows = rows_of(["no", "no", "yes"], LABEL)
    table, model = found(rows), study_of(rows).model()[0]
    losses = [
        by_hand(model, dict(rows.loc[0]) | {"reference": name}, eos=False)
        for name in LABEL["labels"]
    ]
    assert table.loc[0, "first"] == (np.argmin(losses) < 2)  # an alias of the answer is right
    assert table.loc[0, "chance"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("instruction", "offered"),
    [
        ("Good or bad? A goodly meal.", {"good": True, "bad": False}),
        ("GOOD or poor", {"good": True, "poor": False}),
        ("Is it goodly or badly made?", {"good": True, "bad": False, "poor": False}),
        ("Bad or poor?", {"good": True, "bad": False, "poor": False}),  # the right one is not named
        ("Good?", {"good": True, "bad": False, "poor": False}),
    ],
)
def test_labels_that_the_row_does_not_name_are_no_rivals(instruction, offered):
    checker = {"name": "label", "labels": ["good", "bad", "poor"], "answer": "good"}
    row = {"instruction": instruction, "input": "", "reference": "good", "checker": checker}
    assert ability.candidates(row, []) == offered


def test_neighbours_have_another_reference_and_are_mutual():
    near = ability.neighbours(rows_of(["a", "b", "a", "c", "d", "e", "f"]))
    assert near[0] == [5, 6, 1]  # two behind in the circle, one before; row 2 says the same
    assert near[9] == [8, 10, 11]  # of B; row 7 says the same
    assert all(i in near[j] for i in near for j in near[i])
    assert all((i < 7) == (j < 7) for i in near for j in near[i])  # categories stay apart
    assert ability.neighbours(rows_of(["a", "A."])) == {0: [], 1: [], 2: [], 3: []}


def test_ranks_share_ties_and_need_a_wrong_candidate():
    assert ability.rank_first([(1, True), (1, False), (2, False)])["first"] == 0.5
    assert np.isnan(ability.rank_first([(1, True)])["first"])
    assert np.isnan(ability.rank_first([(1, False)])["chance"])


def test_share_is_wilsons_where_rows_are_alone_and_wider_where_they_are_not():
    values = np.array([1.0] * 9 + [0.0] * 11)
    assert clustered_share(values) == pytest.approx(proportion_confint(9, 20, method="wilson"))
    twins = np.repeat(values, 5)  # five copies of each row are no more evidence than one
    low, high = clustered_share(twins, np.repeat(np.arange(20), 5))
    assert low == pytest.approx(clustered_share(values)[0], abs=1e-2)
    assert high - low > 1.8 * np.subtract(*clustered_share(twins)[::-1])
    assert 0 == clustered_share(np.zeros(10))[0] < clustered_share(np.zeros(10))[1] < 0.3


def made(**columns):
    table = pd.DataFrame(
        {"pair": "p", "model": "tuned", "fold": ["a", "b"] * 6, "wording": list("uvwxyzuvwxyz")}
        | {"category": ["X"] * 6 + ["Y"] * 6, "score": 1.0, "first": 1.0, "chance": 0.25}
        | {"gain": 2.0, "gain_none": 1.0}
    )
    return table.assign(**columns)


CUT = pd.DataFrame(
    {"n": [8], "cut": [0.25], "right": [3], "right, cut": [1]},
    index=pd.MultiIndex.from_tuples([("p", "tuned")], names=["pair", "model"]),
)


def test_an_answer_is_cut_if_it_fills_what_it_may_have(found):
    rows = rows_of(["a", "b", "c", "d"])  # eight; answers of 0, 1, .. 5, 0, 1 tokens, four allowed
    table = found(rows)
    assert table["cut"].tolist() == [False] * 4 + [True] * 2 + [False] * 2
    summed = ability.cut_short(table.assign(score=[1, 1, 0, 1, 1, 0, np.nan, 0]))
    assert summed.loc[("pair", "tuned")].to_dict() == {
        "n": 8,
        "cut": 0.25,
        "right": 4,
        "right, cut": 1,
    }


def test_chat_and_bare_template_stand_side_by_side(monkeypatch):
    """Strict, first and gain of each template are those of a study that reads it alone."""
    monkeypatch.setattr(Study, "generate", lambda self: [self.template[:4]] * len(self.rows))
    monkeypatch.setattr("helpers.study.study.load_tokenizer", lambda *_: TOKENIZER)
    monkeypatch.setattr(
        "helpers.study.study.chat_template", lambda _: "user: {instruction}\nmodel:"
    )
    rows = rows_of(["say:", "two", "user", "x"])
    profile = defaults(
        chat=True, template=PROFILE.template, batch_tokens=120, ablation_rows=3, max_new_tokens=4
    )
    table = ability.by_template({"pair": study_of(rows, profile)}).reset_index()
    assert table["template"].tolist() == ["chat", "chat", "bare", "bare"]
    assert table["n"].tolist() == [3] * 4
    assert table["strict"].tolist() == pytest.approx([1 / 3] * 4)
    bare = study_of(rows, replace(profile, chat=False)).take(np.array([0, 1, 2]))
    alone = ability.likely(bare)
    row = table[(table["category"] == "A") & (table["template"] == "bare")].iloc[0]
    assert row["gain"] == pytest.approx(alone["gain"].mean(), abs=1e-6)
    assert row["first"] == alone["first"].mean()
    assert table["gain"].nunique() == 2  # A and B read alike, the templates do not
    assert ability.by_template({"pair": study_of(rows, replace(profile, chat=False))}).empty


def test_standings_say_value_interval_and_what_is_not_testable():
    gain = [1, 2, 3, 4, 5, 3] + [1, -1, 1, -1, 1, -1]
    summed = ability.standings(made(gain=gain, score=[1.0] * 6 + [np.nan] * 6), 500)
    of = summed.set_index(["half", "category", "measure"])
    assert of.loc[("all", "X", "gain"), "value"] == 3
    assert of.loc[("all", "X", "gain"), ["low", "high"]].between(1, 5).all()
    assert of.loc[("all", "X", "first"), "null"] == 0.25
    assert of.loc[("all", "Y", "strict"), "units"] == "not testable"
    assert of.loc[("a", "X", "gain"), "units"] == "not testable"  # three rows
    assert ability.without_gain(summed) == {("p", "tuned"): ["Y"]}
    said = "\n".join(ability.findings(summed, CUT))
    assert "25% of its answers fill all tokens they may have, so they are cut; 1 of its 3" in said
    assert "1 of 2 categories; among these the gain is smallest in X: 3.000" in said
    assert "No gain is seen in Y" in said
    numbers = ability.numbers(summed, CUT)["p"]
    assert numbers["answers.tuned.cut"] == 0.25
    assert numbers["answers.tuned.right_cut"] == 1
    assert numbers["ability.tuned.all.X.gain"] == 3
    assert "ability.tuned.a.X.gain_ci" not in numbers
    assert numbers["accuracy.tuned.X"] == 1
    assert ability.side_by_side(summed).loc[("p", "tuned", "all", "Y"), "strict"] == "not testable"


def test_nothing_scored_at_all_is_said():
    summed = ability.standings(made(score=np.nan, first=np.nan, gain=np.nan), 500)
    assert ability.without_gain(summed) == {("p", "tuned"): ["X", "Y"]}
    assert "not testable" in ability.findings(summed, CUT)[0]


def test_examples_are_the_first_of_each_kind():
    rows = rows_of(["two", "x", "19"])
    found = rows[["id", "category"]].assign(
        pair="p", model="tuned", answer=list("abcdef"), score=[1, 1, 0, 0.0, np.nan, 0]
    )
    shown = ability.examples(rows, found)
    assert shown["answer"].tolist() == ["a", "c", "d"]
    assert shown["verdict"].tolist() == ["right", "wrong", "wrong"]
    assert shown["instruction"].tolist()[1] == "do A 2"
