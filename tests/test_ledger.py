"""The ledger: rules worked by hand on made-up numbers."""

import json

import nbformat
import numpy as np
import pandas as pd
import pytest

import helpers.study.ledger
from helpers.paths import CLAIMS, ROOT
from helpers.record import UserError, read_json
from helpers.study.ledger import (
    first_example,
    forest_table,
    judge,
    look_up,
    read_ledger,
    verdicts,
)

ROW = {
    "needs": "",
    "effect": "e.{unit}.{half}",
    "ci": "e.{unit}.{half}_ci",
    "null": "0",
    "p": "p.{unit}.{half}",
    "detectable": "seen.{unit}.{half}",
}
EACH = {key: value.replace("{half}", "{half}.{category}") for key, value in ROW.items()}


def ledger(**rows):
    return pd.DataFrame([{"id": name} | row for name, row in rows.items()])


def numbers(low, p, name="e.neurons.all"):
    return {name: low + 1, f"{name}_ci": [low, low + 2], name.replace("e.", "p.", 1): p}


def test_an_interval_above_the_null_and_a_small_p_are_both_needed():
    for low, p, verdict in (
        (0.1, 0.01, "supported"),
        (-0.1, 0.01, "not supported"),
        (0.1, 0.06, "not supported"),
    ):
        rows = ledger(a=ROW | {"components": "neurons"})
        tests = judge(look_up(rows, {"m": numbers(low, p)}, ["all"], []))
        assert verdicts(rows, tests)["verdict"].tolist() == [verdict]


def test_holm_runs_over_a_claims_tests_and_halves_make_it_mixed():
    found = numbers(0.1, 0.03) | numbers(0.1, 0.03, "e.neurons.A")
    rows = ledger(a=ROW | {"components": "neurons"})
    tests = judge(look_up(rows, {"m": found}, ["all", "A"], []))
    assert tests["holm"].tolist() == [0.06, 0.06]
    found |= numbers(0.1, 0.001)
    tests = judge(look_up(rows, {"m": found}, ["all", "A"], []))
    assert tests["holm"].tolist() == [0.002, 0.03]
    found |= numbers(-0.1, 0.03, "e.neurons.A")
    tests = judge(look_up(rows, {"m": found}, ["all", "A"], []))
    assert verdicts(rows, tests)["verdict"].tolist() == ["mixed"]


def test_a_claim_about_each_category_says_in_how_many():
    found = {}
    for n, low in enumerate((0.1, 0.1, -0.1)):
        found |= numbers(low, 0.001, f"e.neurons.all.{n}") | numbers(-1, 1.0, f"e.neurons.A.{n}")
    rows = ledger(a=EACH | {"components": "neurons"})
    tests = judge(look_up(rows, {"m": found}, ["all", "A"], ["0", "1", "2"]))
    assert tests.loc[tests["half"] == "all", "holm"].tolist() == pytest.approx([0.003] * 3)
    said = verdicts(rows, tests).iloc[0]
    assert (said["verdict"], said["where"]) == ("mixed", "m: in 2 of 3 categories")
    assert (said["tests"], said["supported"]) == (3, 2)


def test_a_claim_that_holds_where_it_could_be_tested_is_not_supported_elsewhere():
    found = {"p": {}}
    for name in "012":
        found["p"] |= numbers(0.1, 0.001, f"e.neurons.all.{name}")
        if name != "2":
            found["p"] |= numbers(0.1, 0.001, f"e.shared.all.{name}")
    rows = ledger(a=EACH | {"components": "neurons shared"})
    tests = judge(look_up(rows, found, ["all"], ["0", "1", "2"]))
    said = verdicts(rows, tests).set_index("components")
    assert said["verdict"].to_dict() == {"neurons": "supported", "shared": "not testable"}
    assert said.loc["shared", "where"] == "p: in 2 of 3 categories (1 not testable)"
    drawn = forest_table(rows.assign(unit="x"), tests).set_index("components")["supported"]
    assert drawn.to_dict() == {"neurons": True, "shared": False}


def test_what_a_model_does_not_have_is_not_tested():
    rows = ledger(
        a=ROW | {"components": "experts"}, b=ROW | {"components": "experts", "needs": "pair"}
    )
    tests = judge(look_up(rows, {"m": {}}, ["all"], []))
    assert verdicts(rows, tests)["verdict"].tolist() == ["not testable", "not testable"]
    assert verdicts(rows, tests, single=["m"])["verdict"].tolist() == [
        "not testable",
        "needs a pair",
    ]


def test_a_verdict_names_the_claims_that_are_to_be_read_in_its_place():
    claim = ROW | {"components": "neurons", "replaces": ""}
    rows = ledger(a=claim, b=claim | {"replaces": "a"}, c=claim | {"replaces": "x a"})
    tests = judge(look_up(rows, {"m": numbers(0.1, 0.001)}, ["all"], []))
    assert verdicts(rows, tests)["replaced_by"].tolist() == ["b c", "", ""]


def test_a_null_may_be_a_number_of_the_summary():
    rows = ledger(a=ROW | {"components": "neurons", "null": "n.{unit}"})
    tests = judge(look_up(rows, {"m": numbers(0.1, 0.001) | {"n.neurons": 0.5}}, ["all"], []))
    assert tests["null"].tolist() == [0.5]
    assert not tests["supported"].any()


@pytest.mark.parametrize("tunings", [False, True])
def test_the_committed_ledger_is_complete(tunings):
    rows = read_ledger(tunings=tunings)
    assert rows["id"].is_unique
    assert (rows["needs"] == "tunings").all() if tunings else "tunings" not in set(rows["needs"])
    assert (
        rows.drop(columns=["needs", "detectable", "replaces", "headline", "amended"]) != ""
    ).all(axis=None)
    replaced = {name for names in rows["replaces"] for name in names.split()}
    assert replaced <= set(rows["id"])
    assert set(rows["source"]) <= {"paper", "ours"}


WHOLE = CLAIMS.read_text("utf-8")


def changed(**cells):
    """The committed claims, cells of the first one changed."""
    table = pd.read_csv(CLAIMS, keep_default_na=False, dtype=str)
    return table.assign(**{k: [v, *table[k][1:]] for k, v in cells.items()}).to_csv(index=False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (WHOLE.replace(",", ";"), "has not one column id, claim"),
        ("", "has not one column id, claim"),
        (WHOLE.splitlines()[0], "no claim stands there"),
        (WHOLE.encode("utf-16"), "is no table of claims .*UTF-8"),
        (None, "is no table of claims .*No such file"),
        (WHOLE + "one,too,few\n", "the row 'one' has 3 cells, expected 17"),
        (WHOLE.replace(",generality,", ",generality,,", 1), "cells, expected 17"),
        (WHOLE.rstrip()[:-300], "cells, expected 17|is no table of claims"),
        (WHOLE + WHOLE.splitlines()[1], "'generality' stands twice"),
        (changed(p=" "), "'generality' has no p"),
        (changed(rule=""), "'generality' has no rule"),
        (changed(needs="pairs"), "'generality' needs 'pairs', expected one of pair, tunings"),
        (changed(replaces="unknown"), "'generality' replaces 'unknown', no claim"),
        (changed(effect="e.{unti}"), "'generality' leaves more open in its effect"),
        (changed(p="p.{unit"), "'generality' leaves more open in its p"),
        (changed(id="other"), "replaces 'generality', no claim"),
    ],
)
def test_a_ledger_that_is_none_or_was_cut_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "claims.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said):
        read_ledger(path)


def test_a_ledger_reads_as_pandas_would_with_a_mark_and_blank_lines_too(tmp_path):
    path = tmp_path / "claims.csv"
    path.write_text("\ufeff" + WHOLE.replace("\n", "\r\n\r\n"), newline="")
    expected = pd.read_csv(CLAIMS, keep_default_na=False, dtype=str)
    for file in (CLAIMS, path):
        found = pd.concat([read_ledger(file), read_ledger(file, tunings=True)])
        whole = found.set_index("id").loc[expected["id"]].reset_index()
        pd.testing.assert_frame_equal(whole, expected)


def test_a_claim_finds_what_its_own_test_would_have_seen():
    """A key that no page writes would be passed over for the interval's number without a word."""
    numbers = read_json(ROOT / "data/published/tiny/summary.json")["pairs"]["tiny-moe"]
    rows = read_ledger()
    tests = look_up(rows, {"tiny-moe": numbers}, ["all"], ["CLS"])
    assert len(tests) > 40
    for test in tests.to_dict("records"):
        key = rows.set_index("id").loc[test["id"], "detectable"]
        names = {"unit": test["components"], "half": test["half"], "category": test["category"]}
        assert key == "" or numbers[key.format(**names)] == test["detectable"], test["id"]


def test_the_readme_shows_at_most_twelve_claims():
    assert (read_ledger()["headline"] == "yes").sum() <= 12


def test_beside_a_verdict_stands_what_would_have_been_seen():
    """Own numbers where the summary has them, else 2.8 standard errors of the interval."""
    rows = ledger(a=ROW | {"components": "neurons", "unit": "nats"})
    found = numbers(0.1, 0.9)
    tests = judge(look_up(rows, {"m": found}, ["all"], []))
    assert tests["detectable"].tolist() == pytest.approx([2.8 / 1.96])
    found |= {"seen.neurons.all": 0.3}
    tests = judge(look_up(rows, {"m": found, "n": numbers(0.1, 0.9)}, ["all"], []))
    assert tests["detectable"].tolist() == pytest.approx([0.3, 2.8 / 1.96])
    said = verdicts(rows, tests).iloc[0]
    assert (said["verdict"], said["unit"]) == ("not supported", "nats")
    assert said["detectable"] == pytest.approx(2.8 / 1.96, abs=1e-4)


def test_what_is_worked_by_hand_is_the_first_that_can_be_tested():
    rows = ledger(
        each=EACH | {"components": "neurons"},
        a=ROW | {"components": "shared", "null": "n.{unit}"},
        b=ROW | {"components": "experts neurons"},
    )
    found = numbers(0.1, 0.001) | numbers(0.1, 0.001, "e.neurons.all.SUM")
    claim, *where = first_example(rows, {"l": {}, "m": found})
    assert (claim["id"], *where) == ("b", "neurons", "m")
    found |= numbers(0.1, 0.001, "e.shared.all") | {"n.shared": 0.5}
    claim, *where = first_example(rows, {"l": {}, "m": found})
    assert (claim["id"], *where) == ("a", "shared", "m")
    assert first_example(rows, {"m": numbers(0.1, 0.001, "e.neurons.A")}) is None
    assert first_example(rows, {}) is None


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ("", "overlap.neurons.all.within of tiny-dense"),
        ("ablation.", "ablation.neurons.all.critical of tiny-dense"),
        ("ablation.gain.", "none is worked by hand"),
        ("none", "none is worked by hand"),
    ],
)
def test_the_page_works_by_hand_what_there_is(kept, said, capsys):
    """Its cells on the committed numbers, on those of one notebook, of each category, on none."""
    summary = json.loads((ROOT / "data" / "published" / "tiny" / "summary.json").read_text())
    found = {
        pair: {key: value for key, value in every.items() if key.startswith(kept)}
        for pair, every in summary["pairs"].items()
    }
    rows = read_ledger()
    tests = judge(look_up(rows, found, ["all", "A", "B"], ["SUM"]))
    page = {"ledger": helpers.study.ledger, "claims": rows, "numbers": found}
    page |= {"tests": tests, "np": np}
    cells = nbformat.read(ROOT / "notebooks" / "08_claims.ipynb", as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code" and "first[" in cell.source]
    for cell in cells:
        exec(cell.source, page)
    printed = capsys.readouterr().out
    assert said in printed
    if not kept:
        outputs = [output for cell in cells for output in cell.outputs]
        assert printed == "".join(o["text"] for o in outputs if o.output_type == "stream")
