"""What README says was found: every number from its own key, every verdict by the ledger's rule."""

import numpy as np
import pandas as pd
import pytest

from helpers.record import sealed, write_json
from helpers.run import findings
from helpers.study import ledger

BY_CATEGORY = "critical-by-category", "specific-by-category"


def cells(table: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def table_of(*rows) -> pd.DataFrame:
    """Tests (id, components, half, category, effect, supported); the interval is half a unit."""
    columns = ["id", "components", "half", "category", "effect", "supported"]
    table = pd.DataFrame(rows, columns=columns).assign(pair="one", null=0.0)
    return table.assign(low=table["effect"] - 0.5, high=table["effect"] + 0.5)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([("all", True), ("A", True), ("B", True)], "**yes**"),
        ([("all", True), ("A", False), ("B", True)], "**in part**"),
        ([("all", False), ("A", False), ("B", False)], "**no**"),
    ],
)
def test_a_claim_holds_if_it_does_on_both_halves_together_and_on_each(held, said):
    tests = table_of(*(("c", "neurons", half, None, 1.0, ok) for half, ok in held))
    assert findings.answer(tests) == said


def test_a_claim_about_categories_is_asked_of_both_halves_together():
    tests = table_of(
        ("c", "neurons", "all", "QA", 0.5, True),
        ("c", "neurons", "all", "SUM", 0.1, False),
        ("c", "neurons", "ai", "QA", 0.5, True),
        ("c", "neurons", "ai", "SUM", 0.5, True),
    )
    assert findings.answer(tests) == "**in 1 of 2 categories**"


def test_of_several_categories_a_cell_says_how_many_hold_and_how_they_spread():
    tests = pd.DataFrame({"supported": [True, False, True], "effect": [0.5, -0.1, 0.25]})
    assert findings.effect_cell(tests) == "2 of 3: -0.100 to 0.500"
    one = pd.DataFrame({"effect": [0.5], "low": [0.4], "high": [0.6], "null": [0.1]})
    assert findings.effect_cell(one) == "0.500 [0.400, 0.600] / 0.100"
    assert findings.effect_cell(one, null=False) == "0.500 [0.400, 0.600]"


def test_each_answer_takes_its_numbers_from_their_own_keys(tmp_path):
    numbers, at = {"membership.neurons.1": 1234, "membership.neurons.2": 7}, "ablation.equal"
    numbers["answers.tuned.cut"] = 0.625
    tests = [
        ("excess-smallest", "neurons", "all", None, 2.0, True),
        ("excess-smallest", "neurons", "A", None, 9.0, True),
        ("excess-smallest", "shared", "all", None, 8.0, False),
        ("readable-beyond", "neurons", "all", None, 9.0, False),
    ]
    for n, (category, gain) in enumerate((("QA", [0.1, 2.0]), ("SUM", [-0.1, 2.0]))):
        able = f"ability.tuned.all.{category}"
        numbers |= {f"{able}.strict": 0.11 + n, f"{able}.first": 0.22 + n, f"{able}.gain_ci": gain}
        for m, score in enumerate(("frequency", "contribution")):
            numbers[f"{at}.{score}.all.{category}.specific"] = 0.44 + n + 10 * m
            held = zip(BY_CATEGORY, (n < 1 + m, m > n), strict=True)
            tests += [(name, score, "all", category, 0.0, ok) for name, ok in held]
    for m, score in enumerate(("frequency", "contribution")):
        key = f"{at}.{score}"
        numbers |= {f"{key}.all.critical": 3.0 + m, f"{key}.all.critical_ci": [2.5, 3.5]}
        numbers |= {f"{key}.all.specificity": 5.0 + m, f"{key}.all.specificity_ci": [4.5, 5.5]}
        numbers |= {f"{key}.all.p": 0.017 + m / 100, f"{key}.plain_text": 7.0 + m}
    for n, name in enumerate(("tuned", "words")):
        key = f"nearest.neurons.all.{name}"
        numbers |= {key: 0.6 + n / 10, f"{key}_ci": [0.5 + n / 10, 0.7 + n / 10]}
    for n, (part, share) in enumerate((("general", 0.7), ("no_massive", 0.98))):
        key = f"{at.replace('equal', 'parts')}.frequency.{part}"
        numbers |= {f"{key}.share": share, f"{key}.critical": 8.12 + n}
    numbers |= {"unique.neurons.share": 0.18, "unique.neurons.wordings_null": 0.05}
    write_json(tmp_path / "summary.json", sealed({"pairs": {"one": numbers}}))
    other = table_of(("excess-smallest", "neurons", "all", None, 77.0, False)).assign(pair="two")
    pd.concat([table_of(*tests), other]).to_csv(tmp_path / "tests.csv")
    table = findings.answers([tmp_path])
    assert table.startswith("|  | `one` |\n")
    assert [said for _, said in cells(table)] == [
        "**in 1 of 2 categories**; passes 0.11 to 1.11 (62% of the answers cut), ranked first 0.22 "
        "to 1.22",
        "**yes**: 2.000 [1.500, 2.500]",
        "**no**: neurons 0.60 [0.50, 0.70], words 0.70 [0.60, 0.80]",
        "1,234: 18%, dealt 5%; 7 in all",
        "-",  # the layers were not asked for
        "**in 1 of 2 categories**: 3.00 [2.50, 3.50]; plain text 7.00",
        "general (70%) 8.12; no massive (98%) 9.12",
        "**in 0 of 2 categories**: 5.00 [4.50, 5.50], p 0.017; each 0.44 to 1.44",
        "**in 2 of 2 categories**: 4.00 [2.50, 3.50]; plain text 8.00",
        "**in 1 of 2 categories**: 6.00 [4.50, 5.50], p 0.027; each 10.44 to 11.44",
    ]


def test_in_brief_says_where_a_claim_is_shown_and_asks_most_categories(tmp_path):
    claims = list(findings.SAID)
    shown = {  # of each claim: in which pairs
        claims[0]: {"one", "two"},
        claims[1]: {"one"},
        claims[2]: {"two"},
        claims[3]: set(),
        claims[4]: {"one", "two"},
        claims[5]: set(),
        claims[6]: {"one"},
    }
    assert set(shown) == set(claims)
    rows = []
    for (name, component), where in shown.items():
        for pair in ("one", "two"):
            most = 2 if pair in where else 1  # of three categories
            if name.endswith("by-category"):
                held = [("all", c, n < most) for n, c in enumerate(("A", "B", "C"))]
                held += [("ai", c, pair not in where) for c in ("A", "B", "C")]
            else:
                held = [("all", None, True), ("ai", None, pair in where)]
            rows += [(name, component, *of, 0.0, ok, pair) for *of, ok in held]
            rows.append((name, "another component", "all", None, 0.0, pair not in where, pair))
    table = table_of(*(row[:-1] for row in rows)).assign(pair=[row[-1] for row in rows])
    for folder, pair in (("first", "one"), ("second", "two")):
        (tmp_path / folder).mkdir()
        asked = (table["pair"] == pair) & ((pair == "one") | (table["id"] != claims[6][0]))
        table[asked].to_csv(tmp_path / folder / "tests.csv")  # the second was not asked the last
    said = findings.in_brief([tmp_path / "first", tmp_path / "second"])
    texts = list(findings.SAID.values())
    assert said.splitlines() == [
        f"- **Shown in all of them:** {texts[0]}; {texts[4]}.",
        f"- **Shown in `one` alone:** {texts[1]}; {texts[6]}.",
        f"- **Shown in `two` alone:** {texts[2]}.",
        f"- **Shown in none of them:** {texts[3]}; {texts[5]}.",
    ]


def test_every_verdict_of_the_tiny_models_stands_in_one_row_of_each_other_column(tmp_path):
    claims = ledger.read_ledger()
    names = claims.loc[claims["headline"] == "yes", "id"].tolist()[:6]
    said = {  # (verdict of tiny, verdict of the other)
        names[0]: ("supported", "supported"),
        names[1]: ("mixed", "supported"),
        names[2]: ("supported", "not supported"),
        names[3]: ("mixed", "mixed"),
        names[4]: ("supported", "needs a pair"),
    }
    for n, folder in enumerate(("tiny", "other")):
        (tmp_path / folder).mkdir()
        rows = [(name, of, both[n]) for name, both in said.items() for of in ("neurons", "experts")]
        rows += [(names[5], "neurons", "supported")] * (folder == "tiny")  # the other lacks it
        rows += [("halves-agree", "neurons", "supported")]  # no headline
        verdicts = pd.DataFrame(rows, columns=["id", "components", "verdict"])
        verdicts.to_csv(tmp_path / folder / "verdicts.csv")
    table = findings.compared([tmp_path / "other", tmp_path / "tiny"])
    assert table.startswith("|  | `other` beside `tiny` |\n")
    both = [f"`{name}` (neurons, experts)" for name in names[:5]]
    both[4] += f", `{names[5]}` (neurons)"
    assert [found for _, found in cells(table)] == both


def test_each_change_by_tuning_takes_its_effect_from_its_own_test(tmp_path):
    """Every claim, component and tuning has an effect of its own; one half alone is left out."""
    claims = ledger.read_ledger(tunings=True)
    named = [
        (row["id"], component)
        for row in claims.to_dict("records")
        for component in row["components"].split()
    ]
    places = [
        (*name, tuning) for name in named for tuning in ("full", "continued", "dealt", "alone")
    ]
    tests = pd.DataFrame(places, columns=["id", "components", "pair"])
    tests = tests.assign(half="all", category=None, null=0.0)
    tests["effect"] = np.arange(len(places), dtype=float)
    tests = tests.assign(low=tests["effect"] - 0.5, high=tests["effect"] + 0.5, supported=True)
    half = tests.assign(half="ai", effect=-1.0)
    without = tests[(tests["id"] != "tuning-matter") | (tests["pair"] != "continued")]
    pd.concat([without, half]).to_csv(tmp_path / "tuning_tests.csv")
    verdicts = pd.DataFrame(named, columns=["id", "components"])
    verdicts["verdict"] = [f"verdict {n}" for n in range(len(named))]
    verdicts.to_csv(tmp_path / "tuning_verdicts.csv")
    table_of(("alteration-beyond-training", "neurons", "all", None, 1.0, True)).to_csv(
        tmp_path / "tests.csv"
    )

    def cell(*place):
        value = float(places.index(place))
        return f"{value:.3f} [{value - 0.5:.3f}, {value + 0.5:.3f}]"

    said, _, table = findings.tunings(tmp_path).partition("\n\n")
    assert said == findings.in_short(tmp_path)
    found = {row[0]: row[1:] for row in cells(table)}
    assert list(found) == list(findings.CHANGES)
    for said, (ending, component, pair) in findings.CHANGES.items():
        name = f"tuning-{ending}"
        mere = "-" if ending == "matter" else cell(name, component, "continued")
        verdict = f"`{name}` ({component}): verdict {named.index((name, component))}"
        dealt = cell(name, component, "dealt")
        assert found[said] == [cell(name, component, pair), mere, dealt, verdict]
    assert findings.CHANGES["sets moved beyond the noise floor"][0] == "beyond-noise"


def test_in_short_says_which_way_it_went_and_counts_the_categories(tmp_path):
    def row(name, pair, effect, category=None, supported=True, components="neurons", half="all"):
        return (name, components, half, category, effect, supported), pair

    def written(beyond, other):
        rows = [
            row("tuning-improves", "full", 1.0, "QA", components="likelier"),
            row("tuning-improves", "full", 1.0, "SUM", components="likelier"),
            row("tuning-improves", "full", 9.0, "SUM", components="likelier", half="ai"),
            row("tuning-improves", "continued", 1.0, "QA", components="likelier"),
            row("tuning-improves", "continued", 1.0, "SUM", False, components="likelier"),
            row("tuning-improves", "dealt", 1.0, "QA", False, components="likelier"),
            row("tuning-beyond-continued", "full", beyond),
            row("tuning-beyond-continued", "lora", 77.0),
            row("tuning-beyond-dealt", "full", 5.0),
            row("tuning-beyond-seed", "full", 3.0),
            row("tuning-pairing", "full", 6.0),
        ]
        table = table_of(*(one for one, _ in rows)).assign(pair=[pair for _, pair in rows])
        table.to_csv(tmp_path / "tuning_tests.csv")
        one = table_of(("alteration-beyond-training", "neurons", "all", None, other, True))
        one.to_csv(tmp_path / "tests.csv")
        return findings.in_short(tmp_path)

    said = written(-2.0, 4.0)
    assert "likelier in 2 of 2 categories, by mere training in 1, by dealt answers in 0." in said
    assert "moved less far than by mere training, by 2.000 [1.500, 2.500] (`one`: further" in said
    assert "further than by mere training, by 4.000 [3.500, 4.500])," in said
    assert "and further than by dealt answers, by 5.000 [4.500, 5.500]." in said
    assert "tuning and mere training do: 3.000 [2.500, 3.500];" in said
    assert said.endswith("tuning and dealt answers do: 6.000 [5.500, 6.500].")
    said = written(-0.1, 4.0)
    assert "neither further nor less far than by mere training: -0.100 [-0.600, 0.400]" in said
    assert "neither further nor less far than by mere training: 0.100 [-0.400, 0.600]" in written(
        0.1, 4.0
    )


def test_misses_that_are_no_headline_are_named_below_the_table(tmp_path):
    claims = ledger.read_ledger()
    headline = claims.loc[claims["headline"] == "yes", "id"].iloc[0]
    rows = [
        (headline, "neurons", "not supported"),
        ("halves-agree", "neurons", "supported"),
        ("halves-agree", "experts", "mixed"),
        ("experts-single", "experts", "not supported"),
        ("critical", "experts", "not supported"),  # replaced: another claim speaks for it
        ("transplant", "forward", "needs a pair"),
    ]
    pd.DataFrame(rows, columns=["id", "components", "verdict"]).to_csv(tmp_path / "verdicts.csv")
    table_of((headline, "neurons", "all", None, 1.0, True)).to_csv(tmp_path / "tests.csv")
    said = findings.claims_table([tmp_path]).split("\n\n")[1]
    assert said.endswith(
        "mixed: `halves-agree` (experts); not supported: `experts-single` (experts)."
    )
