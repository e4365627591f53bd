"""Checkers: what passes, what does not, and what is refused as a checker."""

import random
from functools import cache

import pytest

from helpers.hexainst.checkers import check, code_of, faults, normalise, numbers, rouge_l, words
from helpers.record import UserError


def score(given, name, arguments):
    return check({"id": "test", "checker": {"name": name, **arguments}}, given)


MOOD = {"labels": ["good", "bad"], "answer": "good", "aliases": ["fine"]}
PASS = [
    ("Good .", "label", MOOD),
    ("**fine**", "label", MOOD),
    ("the Paris", "short_answer", {"answers": ["Paris"]}),
    ("\u201cCO2\u201d.", "short_answer", {"answers": ["carbon dioxide", "CO2"]}),
    ("It is Paris, I think.", "short_answer", {"answers": ["Paris"], "within": 8}),
    ("A , b !", "exact", {"answer": "a, b!"}),
    ("3 + 4 = 7", "numeric", {"answer": 7}),
    ("- 3", "numeric", {"answer": -3}),
    ("1,200.5", "numeric", {"answer": 1200.5}),
    ("3 / 4", "numeric", {"answer": 0.75}),
    ("0.75", "numeric", {"answer": "3/4"}),
    ("about 3.15", "numeric", {"answer": 3.14, "tolerance": 0.02}),
    ("12 km away", "numeric", {"answer": 12, "unit": ["km", "kilometres"]}),
    ("it costs $ 12 now", "numeric", {"answer": 12, "unit": "$"}),
    ("12 .", "numeric", {"answer": 12, "unit": "km"}),
    (
        "The cat sat at night .",
        "constraints",
        {"contains": ["cat", ["sat", "lay"]], "ends_with": "night", "max_words": 5, "sentences": 1},
    ),
    ("the cat sat .", "constraints", {"pattern": r"the \w+ sat\."}),
    ("- one\n- two", "constraints", {"format": "list", "lines": 2}),
    ("1. a\n2) b", "constraints", {"format": "numbered", "lines": [1, 2]}),
    ('```json\n{"a": 1}\n```', "constraints", {"format": "json"}),
    ("LOUD!", "constraints", {"format": "uppercase"}),
    ("Pi is 3.14. Good", "constraints", {"sentences": 2, "starts_with": ["pi", "tau"]}),
    (
        "Bob found Ann's key",
        "rouge_facts",
        {"reference": "Ann lost a key and Bob found it", "facts": ["key", ["Bob", "Robert"]]},
    ),
    ("def f ( x ) : return x * * 2", "function_io", {"cases": [[[3], 9], [[-1], 1]]}),
    ("```python\ndef f(x):\n    return x[::-1]\n```", "function_io", {"cases": [[["ab"], "ba"]]}),
]
FAIL = [
    ("good bad", "label", MOOD),
    ("not good", "label", MOOD),
    ("bad", "label", MOOD),
    ("Lyon", "short_answer", {"answers": ["Paris", "city of Paris"]}),
    ("It is Paris.", "short_answer", {"answers": ["Paris"]}),
    ("It is in Paris, I do think.", "short_answer", {"answers": ["Paris"], "within": 4}),
    ("Parisian", "short_answer", {"answers": ["Paris"], "within": 4}),
    ("", "short_answer", {"answers": ["Paris"]}),
    ("ab", "exact", {"answer": "a b"}),
    ("7 then 8", "numeric", {"answer": 7}),
    ("", "numeric", {"answer": 0}),
    ("3", "numeric", {"answer": -3}),
    ("5 - 3", "numeric", {"answer": -3}),
    ("12 miles", "numeric", {"answer": 12, "unit": "km"}),
    ("12 kmh", "numeric", {"answer": 12, "unit": "km"}),
    ("x7", "numeric", {"answer": 7}),
    ("the cat", "constraints", {"contains": ["cats"]}),
    ("the tomcat", "constraints", {"contains": ["cat"]}),
    ("the old cat", "constraints", {"forbidden": ["old"]}),
    ("a b c", "constraints", {"max_words": 2}),
    ("a", "constraints", {"min_words": 2}),
    ("", "constraints", {"forbidden": ["x"]}),
    ("one. two.", "constraints", {"sentences": 1}),
    ("cat here", "constraints", {"ends_with": "cat"}),
    ("a cat", "constraints", {"starts_with": "cat"}),
    ("a\nb", "constraints", {"lines": 1}),
    ("- a\nb", "constraints", {"format": "list"}),
    ("{a: 1}", "constraints", {"format": "json"}),
    ("the cat sat and sat .", "constraints", {"pattern": r"the \w+ sat\."}),
    ("Ann's key", "rouge_facts", {"reference": "Ann lost a key", "facts": ["lost"]}),
    (
        "key Bob",
        "rouge_facts",
        {
            "reference": "Ann lost a key and Bob found it today",
            "facts": ["key", "Bob"],
            "min_rouge": 0.5,
        },
    ),
    ("Ann lost a key", "rouge_facts", {"reference": "Ann lost a key", "facts": [], "max_words": 3}),
    (
        "Ann lost no key",
        "rouge_facts",
        {"reference": "Ann lost a key", "facts": ["key"], "forbidden": ["no key"]},
    ),
    ("def f(x): return x + 2", "function_io", {"cases": [[[1], 3], [[2], 5]]}),
    ("x + 3", "function_io", {"cases": [[[1], 4]]}),
    ("def f(x): return x == 1", "function_io", {"cases": [[[1], 1]]}),
]


@pytest.mark.parametrize(("answer", "name", "arguments"), PASS)
def test_right_answers_pass(answer, name, arguments):
    assert score(answer, name, arguments) == 1.0


@pytest.mark.parametrize(("answer", "name", "arguments"), FAIL)
def test_wrong_answers_fail(answer, name, arguments):
    assert score(answer, name, arguments) == 0.0


def test_rouge_agrees_with_the_recursive_definition():
    def slow(a, b):
        @cache
        def common(i, j):
            if not (i and j):
                return 0
            return (
                common(i - 1, j - 1) + 1
                if a[i - 1] == b[j - 1]
                else max(common(i - 1, j), common(i, j - 1))
            )

        return 2 * common(len(a), len(b)) / (len(a) + len(b))

    draw = random.Random(0)
    for _ in range(50):
        a, b = (draw.choices("uvwxyz", k=draw.randint(1, 9)) for _ in range(2))
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(slow(tuple(a), tuple(b)))
    assert rouge_l("", "a") == rouge_l("a", "") == 0.0


def test_text_and_numbers_are_read_as_documented():
    assert normalise(" “Well ,\n yes” ") == '"well,yes"'
    assert words("Don't drop well-known words - ever.") == [
        "don't",
        "drop",
        "well-known",
        "words",
        "ever",
    ]
    assert [value for value, _, _ in numbers("5 - 3, (2) - 1, is -4, .5, 1e3, 10-12, 3/4")] == [
        5,
        3,
        2,
        1,
        -4,
        0.5,
        1000,
        10,
        12,
        0.75,
    ]
    # A minus subtracts only within a line; at the start of a line it is a sign, or, before a
    # blank, a list's mark.
    lines = "3 x 4 = 12\n-7\n(2)\n -8\nso:\n- 9\n- 10 - 1"
    assert [value for value, _, _ in numbers(lines)] == [3, 4, 12, -7, 2, -8, 9, 10, 1]
    assert code_of("Here:\n```python\nx = 1\n```\nand more") == "x = 1"


def test_code_is_executed_only_after_an_opt_in():
    row = {
        "id": "c",
        "checker": {"name": "unit_tests", "tests": ["assert f(2) == 3"], "entry_point": "f"},
    }
    assert check(row, "def f(x): return x + 1") is None
    assert check(row, "def f(x): return x + 1", run_code=True) == 1.0
    assert check(row, "def f(x): return x", run_code=True) == 0.0
    assert check(row, "def g(x): return x + 1", run_code=True) == 0.0
    row["checker"] |= {"setup": "import math", "tests": ["assert math.floor(f(2)) == 3"]}
    assert check(row, "def f(x): return x + 1.5", run_code=True) == 1.0


@pytest.mark.parametrize(
    ("checker", "said"),
    [
        ({"name": "magic"}, "unknown checker 'magic'"),
        ("label", "unknown checker 'label'"),
        ({}, "unknown checker None"),
        ({"name": "exact"}, "missing a required"),
        ({"name": "exact", "answer": "a", "colour": 1}, "unexpected keyword"),
        ({"name": "label", "labels": ["a"], "answer": "b"}, "not one of labels"),
        ({"name": "numeric", "answer": 6, "expression": "2 + 3"}, "2 + 3 = 5, but answer is 6"),
    ],
)
def test_a_bad_checker_is_a_clear_error(checker, said):
    assert said in faults(checker)[0]
    with pytest.raises(UserError, match="row 7: "):
        check({"id": "7", "checker": checker}, "a")
