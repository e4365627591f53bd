"""HexaInst's schema, validator, loader and statistics; and, row by row, the data sets that are
shipped.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.hexainst import corpus
from helpers.hexainst import schema as hexainst
from helpers.hexainst.checkers import ARGUMENTS, CHECKERS, check, faults
from helpers.hexainst.schema import CATEGORIES, HEXAINST, TAGS, load, load_hexainst, validate
from helpers.paths import ROOT
from helpers.record import UserError
from helpers.run.__main__ import command_line, main


def row(number=1, **changes):
    made = {
        "id": f"r{number}",
        "half": "A",
        "category": CATEGORIES[number % 6],
        "source": "made up",
        "instruction": f"Say w{number} .",
        "input": "",
        "reference": f"w{number}",
        "checker": {"name": "exact", "answer": f"w{number}"},
        "tags": {},
    }
    return made | changes


def without(key):
    return {name: value for name, value in row().items() if name != key}


def write(path, rows):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows)
    )
    return path


def numeric(answer):
    """A numeric row as its line of JSON, `answer` written as it is given."""
    line = json.dumps(row(reference="7", checker={"name": "numeric", "answer": 0.125}))
    return line.replace("0.125", answer)


HOLLOW = (
    "",
    " \n\t",
    "\u200b",
    "\ufeff\u200d \u2060",
    "\u3164",
    "\u2800\u115f",
    "\0\x1b",
    "\u0301",
)
NUMBERS = [
    ("NaN", "NaN is not a finite number"),
    ("-Infinity", "-Infinity is not a finite number"),
    ("1e999", "1e999 is not a finite number"),
    ("1" + "0" * 400, "a whole number of more than 40 digits"),
    ("9" * 6_000, "a whole number of more than 40 digits"),
    ("true", "'answer' is bad"),
    ("null", "'answer' is bad"),
    ('"10 ** 400"', "more than 256 bits"),
    ('"1 / 0"', "division by zero"),
    ('"[[0]*9999]*9999"', "above size 10000"),
    ("\"float('inf')\"", "a finite number was expected"),
    ('"' + "1+" * 900 + '1"', "inside one another"),
]
FAULTS = [
    ("{not json", "bad JSON"),
    ("", "bad JSON"),
    ("[1]", "a row must be an object, found list"),
    (without("input"), "missing field 'input'"),
    (row(colour="red"), "unknown field 'colour'"),
    (row(id=7), "id must be str, found int"),
    (row(checker="exact"), "checker must be dict, found str"),
    (row(category="POEM"), "unknown category 'POEM'"),
    (row(half="C"), "unknown half 'C'"),
    (row(instruction="  "), "empty instruction"),
    (row(half="ai"), "tags: missing 'subtask'"),
    (row(checker={"name": "magic"}), "unknown checker 'magic'"),
    (row(checker={"name": "exact"}), "checker exact: argument 'answer' is missing"),
    (row(checker={"name": "exact", "answer": "other"}), "rejects the row's own reference"),
    (
        row(checker={"name": "constraints", "max_words": 9}),
        "accepts a wrong answer: 'I do not know.'",
    ),
    (row(checker={"name": "numeric", "answer": "f(x)"}, reference="1"), "'answer' is bad"),
    (row(checker={"name": "constraints", "pattern": "("}), "'pattern' is bad"),
    (row(checker={"name": "label", "labels": 3, "answer": "w1"}), "'labels' is bad"),
    (row(checker={"name": ["exact"]}), "unknown checker ['exact']"),
    (row(checker={"name": None}), "unknown checker None"),
    (row(tags={"wording": 1}), "tags: 'wording' must be str, found int"),
    (row(tags={"wording": {"a": [1]}}), "tags: 'wording' must be str, found dict"),
    (row(id=[1]), "id must be str, found list"),
    (row(half=["A"]), "half must be str, found list"),
    (row(reference="w1" + " w" * 10_000), "more than 20000 characters"),
    (
        row(checker={"name": "constraints", "pattern": r"(?=.*a)(a+)+\1+b"}, reference="a" * 5000),
        "rejects the row's own reference",
    ),
    *((row(instruction=hollow), "empty instruction") for hollow in HOLLOW),
    *((row(source=hollow), "empty source") for hollow in HOLLOW),
    (json.dumps(row())[:-1] + ', "id": "r9"}', "the key 'id' stands twice"),
    (json.dumps(row(tags={"a": "b"})).replace('"a"', '"b": "c", "b"'), "the key 'b' stands twice"),
    (json.dumps(row()) + json.dumps(row()), "bad JSON: Extra data"),
    (json.dumps(row(instruction="\ud800 say w1")), "half a surrogate pair"),
    (json.dumps(row(tags={"\udfff": "b"})), "half a surrogate pair"),
    ("[" * 100_000, "inside one another"),
    ('{"a":' * 100_000, "inside one another"),
    (json.dumps(row()).replace("{}", "[" * 5_000 + "]" * 5_000), "inside one another"),
    (json.dumps(row()).replace("{}", "[" * 400 + "]" * 400), "tags must be dict, found list"),
    (json.dumps(row(instruction="w" * 1_000_000)), "more than 1000000 bytes"),
    *((numeric(number), said) for number, said in NUMBERS),
    (
        row(
            half="ai",
            tags=dict.fromkeys(TAGS, "x"),
            checker={"name": "constraints", "contains": ["w1"]},
        ),
        "accepts a wrong answer: 'Say w1 .'",
    ),
]


@pytest.mark.parametrize(("bad", "said"), FAULTS)
def test_every_fault_is_found_with_its_line(tmp_path, bad, said):
    path = write(tmp_path / "x.jsonl", [row(2), row(3), bad, row(4)])
    found = validate(path, part=True)[1]
    assert [number for number, _ in found] == [3] * len(found)
    assert any(said in fault for _, fault in found), found


def test_faults_between_rows(tmp_path):
    path = write(
        tmp_path / "x.jsonl", [row(1), row(2), row(1), row(8, instruction="say  W2 .", id="other")]
    )
    assert validate(path, part=True)[1] == [
        (3, "duplicate id: the same as in line 1"),
        (3, "duplicate text: the same as in line 1"),
        (4, "duplicate text: the same as in line 2"),
    ]


def test_halves_and_categories_must_balance(tmp_path):
    rows = [row(i) for i in range(6)]
    assert validate(write(tmp_path / "x.jsonl", rows))[1] == []
    ((line, fault),) = validate(write(tmp_path / "x.jsonl", rows + [row(6)]))[1]
    assert line == 0
    assert "A/CLS 2" in fault
    ((line, fault),) = validate(write(tmp_path / "x.jsonl", rows + [row(7, half="B")]))[1]
    assert "unbalanced" in fault
    assert "B/CLS 0" in fault
    assert validate(write(tmp_path / "x.jsonl", []))[1] == [(0, "no rows")]


def test_one_fault_is_one_and_what_no_line_has_names_none(tmp_path):
    rows = [row(i) for i in range(6)]
    with pytest.raises(UserError, match=r"x\.jsonl has 1 fault: unbalanced"):
        load(write(tmp_path / "x.jsonl", [*rows, row(6)]))
    with pytest.raises(UserError, match=r"x\.jsonl has 2 faults: line 7: duplicate id"):
        load(write(tmp_path / "x.jsonl", [*rows, row(5)]))


def test_bad_bytes_are_a_fault_not_a_crash(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n\xff\xfe\n")
    assert validate(path, part=True)[1][0][0] == 2


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"\xef\xbb\xbf", "begins with a byte order mark"),
        (b"\xff\xfe", "begins with UTF-16"),
        (b"\xfe\xff", "begins with UTF-16"),
    ],
)
def test_a_file_in_another_encoding_is_one_fault(tmp_path, start, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(start + json.dumps(row()).encode() * 3)
    ((line, fault),) = validate(path)[1]
    assert line == 1
    assert said in fault
    path.write_bytes(json.dumps(row()).encode("utf-16-le") + b"\n\0")
    assert {line for line, _ in validate(path)[1]} == {1, 2}


def test_line_ends_of_any_system_count_the_same(tmp_path):
    path = tmp_path / "x.jsonl"
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(end.join([json.dumps(row()), "{", json.dumps(row(2))]).encode())
        assert [line for line, _ in validate(path, part=True)[1]] == [2]


@pytest.mark.parametrize("blank", ["", "  \t"])
def test_a_blank_line_is_called_one(tmp_path, blank):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([json.dumps(row()), blank, json.dumps(row(2)), blank, ""]))
    faults = validate(path, part=True)[1]
    assert [line for line, _ in faults] == [2, 4]
    assert all("the line is blank" in fault and "Take it out" in fault for _, fault in faults)


def test_characters_that_mean_something_elsewhere_are_harmless(tmp_path):
    """A template's place, format fields, separators of lines that JSON allows, emoji, NUL."""
    texts = ["{instruction} {0} %s ${x}", "say \u2028 w2 \x85", "say \U0001f600", "say \0 w", "{}"]
    rows = [row(i, instruction=given) for i, given in enumerate(texts)]
    path = write(tmp_path / "x.jsonl", rows)
    assert validate(path, part=True) == (rows, [])
    assert load(write(path, [*rows, row(5)]))["instruction"].tolist()[:5] == texts


def test_paths_start_at_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame = load_hexainst(dataset="data/hexainst/tiny.jsonl")
    assert frame.equals(load_hexainst(dataset="tiny"))
    assert validate("data/hexainst/tiny.jsonl")[1] == []
    (tmp_path / "here.jsonl").touch()
    for absent in ("here.jsonl", "data/hexainst", "x" * 5000, "a\0b", tmp_path):
        with pytest.raises(UserError, match="no file"):
            load_hexainst(dataset=absent)
    with pytest.raises(UserError, match="unknown half '../hexainst/tiny'"):
        load_hexainst("../hexainst/tiny")


def test_what_a_sound_data_set_lacks_is_said(tmp_path):
    def program(number):
        checker = {"name": "unit_tests", "tests": ["assert f(1) == 2"]}
        return row(number, category="CODE", checker=checker, reference="def f(x): return 2")

    path = write(tmp_path / "x.jsonl", [row(0), program(1), row(2), row(6), program(7), row(8)])
    assert validate(path)[1] == []
    with pytest.warns(UserWarning, match="data set .*x.jsonl") as said:
        assert len(load_hexainst(dataset=path)) == 6
    assert [str(warning.message).split(": ", 1)[1] for warning in said] == [
        "no row of GEN, MATH, SUM: all results leave it out.",
        "CODE: every checker executes the answer, so no score without `run_code`.",
    ]
    assert hexainst.remarks([row(i) for i in range(6)]) == []
    ((line, fault),) = validate(write(path, [row(0), row(6)]))[1]
    assert line == 0
    assert "only one category, CLS" in fault


# A fuzz test: rows that are nearly right, and values of JSON that are not rows at all.
WORDS = st.sampled_from(["", "w1", "cat", "7", "\u200b", "(", "[a-", "1/0", "json", "Say w1 ."])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
NAMES = [*CHECKERS, "magic"]
FIELDS = sorted({key for model in ARGUMENTS.values() for key in model.model_fields})
MADE = st.fixed_dictionaries({"name": st.sampled_from(NAMES)}).flatmap(
    lambda made: st.dictionaries(st.sampled_from(FIELDS), JSON | WORDS, max_size=3).map(
        lambda arguments: made | arguments
    )
)
RIGHT = st.sampled_from([row["checker"] for row in load_hexainst("ai").to_dict("records")[::7]])
BENT = st.tuples(RIGHT, st.sampled_from(FIELDS), JSON).map(lambda x: x[0] | {x[1]: x[2]})
NEARLY = st.dictionaries(st.sampled_from([*hexainst.SCHEMA, "x"]), JSON, max_size=2).map(
    lambda changes: row() | changes
)
ROWS = st.one_of(
    JSON, NEARLY, st.builds(lambda c: row(checker=c), MADE | RIGHT | BENT), st.text(), st.binary()
)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(ROWS, st.text(max_size=30) | WORDS)
def test_whatever_a_line_holds_there_are_faults_or_a_score(made, answer):
    line = made if isinstance(made, bytes) else json.dumps(made).encode()
    try:
        read = hexainst.read_row(line)
    except ValueError:
        return
    found = hexainst.row_faults(read)
    assert all(isinstance(fault, str) and fault and len(fault) < 1000 for fault in found)
    if not found:
        assert check(read, answer) in (0.0, 1.0, None)
    if isinstance(read, dict) and not faults(read.get("checker")):
        assert check(read, answer) in (0.0, 1.0, None)


def test_code_references_run_only_when_asked(tmp_path):
    good, bad = "def f(x): return x + 1", "def f(x): return x"
    rows = [
        row(
            1,
            category="CODE",
            reference=code,
            id=code,
            instruction=code,
            checker={"name": "unit_tests", "tests": ["assert f(1) == 2"]},
        )
        for code in (good, bad)
    ]
    path = write(tmp_path / "x.jsonl", rows)
    assert validate(path, part=True)[1] == []
    ((line, fault),) = validate(path, part=True, run_code=True)[1]
    assert line == 2
    assert "rejects" in fault


def test_the_loader_gives_a_frame_or_one_clear_error(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(i) for i in range(12)])
    frame = load_hexainst(dataset=path, half="A")
    assert list(frame.columns) == list(hexainst.SCHEMA)
    assert len(frame) == 12
    with pytest.raises(UserError, match="unknown half 'B' of .*expected one of A"):
        load_hexainst(dataset=path, half="B")
    with pytest.raises(UserError, match="unknown subset 'small'"):
        load_hexainst(dataset=path, subset="small")
    with pytest.raises(UserError, match="no file .*absent.jsonl"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="has 1 fault: line 2: unknown category 'X'"):
        load(write(path, [row(1), row(2, category="X")]))


def test_a_file_called_human_holds_the_human_half_and_nothing_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(hexainst, "HEXAINST", tmp_path)
    ai = load(HEXAINST / "ai.jsonl").to_dict("records")
    write(tmp_path / "ai.jsonl", ai)
    for name, said in (("ai", "rows of half ai, expected human"), ("tiny", "rows of half A, B,")):
        (tmp_path / "human.jsonl").write_bytes((HEXAINST / f"{name}.jsonl").read_bytes())
        for half in (None, "human"):
            with pytest.raises(UserError, match=f"human.jsonl holds {said}"):
                load_hexainst(half)
    human = [row | {"half": "human"} for row in ai]
    write(tmp_path / "human.jsonl", human)
    with pytest.raises(UserError, match="line 1, duplicate id: the same as in line 1 of ai.jsonl"):
        load_hexainst()
    write(tmp_path / "human.jsonl", [row | {"id": f"h-{row['id']}"} for row in human])
    with pytest.raises(UserError, match="line 1, duplicate text: the same as in line 1 of ai"):
        load_hexainst()
    assert len(load_hexainst("human")) == len(load_hexainst("ai")) == 600


def test_the_command_prints_every_fault_and_fails(tmp_path):
    path = write(tmp_path / "x.jsonl", [row(1), row(2, half="Z"), "{"])
    command = [sys.executable, "-m", "helpers.run", "validate", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{path}:2: unknown half 'Z'" in done.stdout
    assert f"{path}:3: bad JSON" in done.stdout
    assert "2 rows read, 2 faults" in done.stdout
    done = subprocess.run(command[:-1] + ["absent.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no file {ROOT / 'absent.jsonl'}")
    assert "Traceback" not in done.stderr


def test_a_path_of_the_command_line_is_from_the_current_folder(tmp_path, monkeypatch, capsys):
    """Every option that is a path, of every command; a profile's are from the repository."""
    write(tmp_path / "mine.jsonl", [row(1), row(2)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["validate", "mine.jsonl", "--part"]) == 0
    assert main(["validate", "none.jsonl"]) == 1
    assert f"no file {tmp_path / 'none.jsonl'}:" in capsys.readouterr().err
    lines = ["site --to", "train --out", "tune --out", "tune --local", "human --local", "export"]
    lines += ["export --to", "count --job", "validate"]
    for line in lines:
        for path, meant in (("x", tmp_path / "x"), ("~/x", tmp_path / "home" / "x")):
            said = command_line().parse_args([*line.split(), path])
            assert meant in vars(said).values(), line
    with pytest.raises(SystemExit):
        command_line().parse_args(["site", "--to", ""])


def frame_of(texts, categories=None):
    return pd.DataFrame(
        [
            {"id": str(i), "half": "A", "category": c, "instruction": t, "input": ""}
            for i, (t, c) in enumerate(zip(texts, categories or ["X"] * len(texts), strict=True))
        ]
    )


def test_matched_categories_have_the_same_lengths():
    draw = np.random.default_rng(0)
    sizes = {
        "X": draw.integers(5, 60, 200),
        "Y": draw.integers(20, 90, 200),
        "Z": draw.integers(30, 50, 200),
    }
    rows = frame_of(
        ["w " * n for c in sizes for n in sizes[c]], [c for c in sizes for _ in sizes[c]]
    )
    subset = corpus.matched(rows, 60, seed=1)
    long = corpus.lengths(subset).groupby(subset["category"]).agg(sorted)
    assert subset["category"].value_counts().tolist() == [60, 60, 60]
    ratios = np.array([np.divide(long.max(), long[c]) for c in "XYZ"])
    assert subset.attrs["ratio"]["A"] <= 1.1
    assert ratios.max() <= 1.15
    assert subset.equals(corpus.matched(rows, 60, seed=1))
    assert not subset.equals(corpus.matched(rows, 60, seed=2))
    # A half's subset is the same whether the other half is there or not.
    halves = pd.concat(
        [rows.assign(half="B", id="B" + rows["id"]), rows.iloc[::-1]], ignore_index=True
    )
    both = corpus.matched(halves, 60, seed=1)
    alone = corpus.matched(halves[halves["half"] == "A"].reset_index(drop=True), 60, seed=1)
    assert both.loc[both["half"] == "A", "id"].tolist() == alone["id"].tolist()
    with pytest.raises(UserError, match="lengths differ too much"):
        corpus.matched(frame_of(["w"] * 9 + ["w " * 9] * 9, ["X"] * 9 + ["Y"] * 9), 5)


def test_the_greedy_walk_finds_the_most_groups():
    draw = np.random.default_rng(3)
    for _ in range(30):
        a, b = (sorted(draw.integers(4, 12, 5)) for _ in range(2))
        found = corpus._groups([list(enumerate(a)), list(enumerate(b))], 1.2)
        near = np.array([[max(x, y) <= 1.2 * min(x, y) for y in b] for x in a])
        assert len(found) == most_pairs(near)


def most_pairs(near):
    """Size of the largest matching of a small 0-1 table, by trying everything."""
    if not len(near):
        return 0
    best = most_pairs(near[1:])
    for j in np.flatnonzero(near[0]):
        best = max(best, 1 + most_pairs(np.delete(near[1:], j, axis=1)))
    return best


@given(
    rows=st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from("XY"), st.sampled_from("stuv"))),
    number=st.integers(1, 5),
)
def test_few_rows_stand_in_as_many_wordings_as_there_are(rows, number):
    half, category, wording = zip(*rows, strict=True) if rows else ((), (), ())
    table = pd.DataFrame({"half": half, "category": category, "instruction": wording})
    table["tags"] = [{"wording": word} for word in wording]
    found = corpus.few_of_many(
        table.set_axis(range(5, 5 + len(table))), ["half", "category"], number
    )
    wanted = set()
    for group in {row[:2] for row in rows}:
        places = [i for i, row in enumerate(rows) if row[:2] == group]
        nth = {i: sum(rows[j] == rows[i] for j in places if j < i) for i in places}
        wanted |= set(sorted(places, key=lambda i: (nth[i], i))[:number])
    assert set(np.flatnonzero(found)) == wanted


def test_near_duplicates_agree_with_a_loop():
    draw = np.random.default_rng(1)
    texts = [" ".join(draw.choice(list("abc"), draw.integers(1, 9))) for _ in range(40)] + [
        "add 3 to 5 now please",
        "add 4 to 91 now please",
    ]
    rows, expected = frame_of(texts), {}
    grams = [corpus.shingles(corpus.tokens(t)) for t in texts]
    for i in range(len(texts)):
        for j in range(i):
            jaccard = len(grams[i] & grams[j]) / len(grams[i] | grams[j])
            if jaccard > 0.4:
                expected[str(j), str(i)] = jaccard
    found = corpus.near_duplicates(rows, 0.4)
    assert {(a, b): s for a, b, s in found.itertuples(index=False)} == pytest.approx(expected)
    assert expected["40", "41"] == 1.0  # a swapped number does not hide a twin
    assert corpus.near_duplicates(frame_of(["one two three", "four five six"])).empty


def test_words_that_say_nothing_predict_nothing():
    draw = np.random.default_rng(2)
    noise = [" ".join(draw.choice(list("abcdefgh"), 12)) for _ in range(600)]
    labels = ["X", "Y", "Z"] * 200
    assert (corpus.predict_category(frame_of(noise, labels)) == labels).mean() == pytest.approx(
        1 / 3, abs=0.08
    )
    own = [
        f"u{i}" for i in range(600)
    ]  # a word of its own: known only to one who trains on the tested row
    assert (corpus.predict_category(frame_of(own, labels)) == labels).mean() < 0.4
    telling = [f"{text} {label}" for text, label in zip(noise, labels, strict=True)]
    assert (corpus.predict_category(frame_of(telling, labels)) == labels).mean() > 0.9


def test_naive_bayes_by_hand():
    rows = frame_of(["a a b", "b c", "a", "c c"], ["X", "Y", "X", "Y"])
    # fold of row i is tested on the other three; "a" is 3 or 1 times in X and never in Y,
    # with one added to each count
    assert corpus.predict_category(rows, folds=2).tolist() == ["X", "Y", "X", "Y"]


SHIPPED = [name for name in ("tiny", "ai", "human") if (HEXAINST / f"{name}.jsonl").exists()]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_row_is_sound(name):
    """The validator: schema, uniqueness, balance; the reference passes its checker, and wrong
    answers fail.
    """
    assert validate(HEXAINST / f"{name}.jsonl")[1] == []


def test_the_ai_half_is_varied():
    rows = load_hexainst("ai")
    tags = pd.DataFrame(rows["tags"].tolist()).assign(category=rows["category"])
    assert rows["category"].value_counts().to_dict() == dict.fromkeys(CATEGORIES, 100)
    spread = tags.groupby("category").nunique()
    assert (spread["subtask"] >= 15).all()
    assert (spread["wording"] >= 40).all()
    assert (spread["domain"] >= 20).all()
    opening = rows["instruction"].map(
        lambda given: tuple(corpus.tokens(given)[:3])
    )  # the text itself, not its tag
    assert (opening.groupby(rows["category"]).nunique() >= 90).all()
    assert set(tags["difficulty"]) == {"easy", "medium", "hard"}
    assert tags.groupby("category")["difficulty"].value_counts().min() >= 15


def test_the_ai_half_has_no_near_duplicates_and_a_matched_subset():
    rows = load_hexainst()
    assert corpus.near_duplicates(rows, 0.6).empty
    subset = load_hexainst("ai", "matched")
    assert subset["category"].value_counts().to_dict() == dict.fromkeys(CATEGORIES, 60)
    long = corpus.lengths(subset).groupby(subset["category"])
    assert long.mean().max() / long.mean().min() <= subset.attrs["ratio"]["ai"] + 1e-9


def test_other_rows_answers_fail():
    """A reference of another category never passes (beyond the validator's WRONG answers and the
    echo).
    """
    rows = load_hexainst("ai").to_dict("records")
    passed = [
        (a["id"], b["id"])
        for a, b in zip(rows, rows[100:] + rows[:100], strict=True)
        if check(a, b["reference"])
    ]
    assert passed == []


def test_every_row_fails_an_obviously_wrong_answer():
    """None of them is exempt: a shrug, noise, the row's own words, its input; for programs, one
    that does nothing.
    """
    for row in load_hexainst("ai").to_dict("records"):
        if row["checker"]["name"] == "unit_tests":
            assert check(row, f"{row['checker']['entry_point']} = None", run_code=True) == 0, row[
                "id"
            ]
        else:
            for answer in (*hexainst.WRONG, corpus.text(row), row["input"]):
                assert check(row, answer) == 0, row["id"]


PROBES = json.loads((ROOT / "tests" / "hexainst_probes.json").read_text("utf-8"))


@pytest.mark.parametrize("category", CATEGORIES)
def test_right_answers_in_other_words_pass_and_plausible_wrong_ones_fail(category):
    """Answers written by the second reader for the random sample and the replaced rows
    (data/hexainst/review.json).
    """
    rows = {
        row["id"]: row
        for row in load_hexainst("ai").to_dict("records")
        if row["category"] == category
    }
    tried = {name: answers for name, answers in PROBES.items() if name in rows}
    assert len(tried) >= 10
    for name, answers in tried.items():
        assert [check(rows[name], answer, True) for answer in answers["right"]] == [1.0] * len(
            answers["right"]
        ), name
        assert [check(rows[name], answer, True) for answer in answers["wrong"]] == [0.0] * len(
            answers["wrong"]
        ), name


def masked(row):
    """A row's text with every number, and every word with a capital letter inside a sentence, made
    the same.
    """
    return re.sub(
        r"\d+(?:[.,]\d+)*", "0", re.sub(r"(?<=[\w,;:] )[A-Z]\w+", "Name", corpus.text(row))
    ).lower()


def test_masks_hide_numbers_and_names():
    one, two = (
        {"instruction": f"How much do {n} and {a} owe {b}?", "input": ""}
        for n, a, b in ((3, "Ann", "Bo"), (1.5, "Cy", "Di"))
    )
    assert masked(one) == masked(two) == "how much do 0 and name owe name?"


@pytest.mark.parametrize("half", sorted({"ai", "human"} & set(SHIPPED)))
def test_no_row_is_another_with_a_number_or_a_name_swapped(half):
    """Masked texts all differ, and no two are nearly alike."""
    rows = load_hexainst(half)
    texts = pd.Series([masked(row) for row in rows.to_dict("records")])
    assert texts.is_unique
    assert corpus.near_duplicates(rows.assign(instruction=texts, input=""), 0.6).empty


def test_export_to_parquet(tmp_path):
    full, subset, card = hexainst.export(tmp_path)
    rows = pd.read_parquet(full)
    assert len(rows) == 600
    assert json.loads(rows["checker"][0])["name"]
    assert len(pd.read_parquet(subset)) == 360
    front = yaml.safe_load(card.read_text("utf-8").split("---\n")[1])
    assert {part["config_name"]: part["data_files"] for part in front["configs"]} == {
        "full": full.name,
        "matched": subset.name,
    }
    assert front["license"] == "cc-by-4.0"
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["default"]


@pytest.mark.parametrize("name", ["README.md", "ai-full.parquet", "ai-matched.parquet"])
def test_export_writes_over_nothing_and_follows_no_link(name, tmp_path):
    (tmp_path / "project").mkdir()
    mine, elsewhere = tmp_path / "project" / name, tmp_path / "elsewhere"
    mine.write_text("mine")
    with pytest.raises(UserError, match=f"{name} stands there already"):
        hexainst.export(tmp_path / "project")
    assert [path.read_text() for path in mine.parent.iterdir()] == ["mine"]
    mine.unlink()
    mine.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{name} stands there already"):
        hexainst.export(tmp_path / "project")
    assert list(mine.parent.iterdir()) == [mine]
    assert not elsewhere.exists()


def test_an_export_that_ends_early_leaves_no_half_card(tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_text("half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hexainst.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"cannot write .*README\.md: No space left"):
        hexainst.export(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_export_without_pyarrow_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(hexainst, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        hexainst.export(tmp_path)
