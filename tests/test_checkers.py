"""Checkers: what passes, what does not, and what is refused as a checker."""

import random
import re
from functools import cache

import pytest

from helpers.hexainst import sandbox
from helpers.hexainst.checkers import (
    ANSWER,
    CONSTRAINTS,
    UNSAFE,
    check,
    code_of,
    faults,
    normalise,
    numbers,
    plain,
    rouge_l,
    words,
)
from helpers.record import UserError
from tests.limited import outcomes


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
    *(("lambda s: 1.5", "function_io", {"cases": [[["ab"], end]]}) for end in ("ba", None, [1.5])),
    ("lambda s: True", "function_io", {"cases": [[["ab"], 1.0]]}),
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


@pytest.mark.parametrize("answer", [float("nan"), None, 7, b"good", ["good"]])
@pytest.mark.parametrize("name", ["label", "unit_tests"])
def test_an_answer_that_is_no_text_is_one_clear_error(answer, name):
    arguments = MOOD if name == "label" else {"tests": ["assert f(1)"]}
    with pytest.raises(UserError, match="row test: the answer is .*, expected a string"):
        score(answer, name, arguments)


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


def test_sentences_agree_with_the_definition():
    """A sentence: text without . ! ?, and then marks before white space, a quote, a bracket or the
    end; or the text's end.
    """
    defined = re.compile(r"[^.!?\s][^.!?]*(?:[.!?]+(?=\s|[\"')]|$)|$)")
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices('ab1.!?" )\n', k=draw.randint(1, 12)))
        found = len(defined.findall(re.sub(r"(?<=\d)\.(?=\d)", "", plain(text))))
        assert CONSTRAINTS["sentences"](text, found), text
        assert not CONSTRAINTS["sentences"](text, found + 1), text


CHECKERS = "helpers.hexainst.checkers"
COMBINING = "a" + "\u0300\u0323" * (ANSWER // 2)
LONG_TEXTS = {  # readers of text on six times the longest answer; what is quadratic, on the longest
    "numbers": ("numbers", ["1," * 60_000]),
    "signed numbers": ("numbers", ["-1 " * 40_000]),
    "minus signs": ("numbers", ["- " * 60_000]),
    "a minus and blanks": ("numbers", ["-" + " " * 120_000]),
    "digits": ("numbers", ["9" * 120_000]),
    "fractions": ("numbers", ["1 / " * 30_000]),
    "thousands": ("numbers", ["1" + ",111" * 30_000]),
    "blanks": ("normalise", [" " * 120_000]),
    "blanks and marks": ("normalise", [" ." * 60_000]),
    "combining marks": ("normalise", [COMBINING]),
    "hyphens": ("words", ["a-" * 60_000]),
    "fences": ("code_of", ["```\n" * 40_001]),
    "a long fence": ("code_of", ["```" + "a" * 120_000]),
    "backticks": ("code_of", ["`" * 120_000]),
    "ROUGE-L of 10,000 words": ("rouge_l", ["a b " * 5_000, "b c a " * 3_333]),
}
LONG_ANSWERS = {  # (answer, checker, arguments): each fails, in little time
    "no sentence end": ("a" * 9_999 + ".b", "constraints", {"sentences": 9}),
    "marks": ("." * 9_999 + "b", "constraints", {"sentences": 9}),
    "a pattern that doubles": ("a" * 9_999, "constraints", {"pattern": "(a|a)*b"}),
    "a pattern in a pattern": ("a" * 9_999, "constraints", {"pattern": "(a*)*[bc]"}),
    "a reference back": ("a" * 9_999, "constraints", {"pattern": r"(?=.*a)(a+)+\1+b"}),
    "a cubic pattern": ("a=" * 9_999, "constraints", {"pattern": ".*=.*=.*=.*x.*=.*=y"}),
    "long literals": ("ab" * 9_999, "constraints", {"pattern": "(?:" + "ab" * 200 + "){9}[bc]"}),
    "written out": ("a" * 9_999, "constraints", {"pattern": "(a{300}){300}b"}),
    "optional": ("a" * 9_999, "constraints", {"pattern": "(?:(?:a?){300}){300}[bc]"}),
    "groups": ("a" * 9_999, "constraints", {"pattern": "(" * 90 + "a*" + ")*" * 90 + "[bc]"}),
    "repeats": ("a" * 9_999, "constraints", {"pattern": "(((a{1,99}){1,99}){1,99}){1,99}[bc]"}),
    "deep JSON": ("[" * 19_999, "constraints", {"format": "json"}),
    "deep objects": ('{"a":' * 3_999, "constraints", {"format": "json"}),
    "digits in JSON": ("[" + "9" * 19_998, "constraints", {"format": "json"}),
    "a list": ("- a\n" * 4_999 + "b", "constraints", {"format": "list"}),
    "a numbered line": ("1" * 9_999 + "\nb", "constraints", {"format": "numbered"}),
    "growing characters": ("\ufdfa" * 19_999, "short_answer", {"answers": ["x"], "within": 9**6}),
    "growing characters, signs": ("\ufdfa -1 " * 3_999, "numeric", {"answer": 7}),
    "a program": ("lambda x: [[0]*9999]*9999", "function_io", {"cases": [[[1], 2]]}),
    "too long": ("7 " * 60_000, "numeric", {"answer": 7}),
}


@cache
def results():
    texts = [(CHECKERS, name, arguments) for name, arguments in LONG_TEXTS.values()]
    rows = [
        (CHECKERS, "check", [{"id": "x", "checker": {"name": name} | arguments}, answer])
        for answer, name, arguments in LONG_ANSWERS.values()
    ]
    return dict(zip([*LONG_TEXTS, *LONG_ANSWERS], outcomes(texts + rows), strict=True))


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_long_texts_are_read_within_a_second_and_fifty_megabytes(name):
    assert not re.fullmatch(r"SIG\w+|\w+Error", results()[name])


@pytest.mark.parametrize("name", LONG_ANSWERS)
def test_answers_made_to_stall_a_check_fail_within_a_second_and_fifty_megabytes(name):
    assert results()[name] == "0.0"


def test_an_answer_above_the_cap_fails_though_it_is_right():
    assert score("a " * (ANSWER // 2 - 2) + "7", "numeric", {"answer": 7}) == 1.0
    assert score("a " * (ANSWER // 2) + "7", "numeric", {"answer": 7}) == 0.0
    row = {"id": "c", "checker": {"name": "unit_tests", "tests": []}}
    assert check(row, "#" * (ANSWER + 1)) is None
    assert check(row, "#" * (ANSWER + 1), run_code=True) == 0.0


def test_programs_run_without_the_kernel_layer_only_if_told_so(monkeypatch):
    asked = []

    def run(program, without_seccomp):
        asked.append(without_seccomp)
        if not without_seccomp:
            raise sandbox.Unavailable("model-written code is not executed without seccomp")
        return sandbox.Outcome(True, "finished")

    monkeypatch.setattr(sandbox, "run", run)
    row = {"id": "c", "checker": {"name": "unit_tests", "tests": ["assert f(2) == 3"]}}
    with pytest.raises(UserError, match="without seccomp. Set `run_code: false`"):
        check(row, "def f(x): return 3", run_code=True)
    assert check(row, "def f(x): return 3", run_code=UNSAFE) == 1.0
    assert asked == [False, True]


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
    assert [(a, b) for _, a, b in numbers("so -7, 1,200 / 3")] == [(3, 5), (7, 16)]
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
        ({"name": ["exact"]}, "unknown checker ['exact']"),
        ({"name": "exact"}, "argument 'answer' is missing"),
        ({"name": "exact", "answer": "a", "colour": 1}, "argument 'colour' is unknown"),
        ({"name": "exact", "answer": 1}, "argument 'answer' is bad: Input should be a valid str"),
        ({"name": "constraints", "colour": 1}, "argument 'colour' is unknown"),
        ({"name": "constraints", "labels": ["a"]}, "argument 'labels' is unknown"),
        ({"name": "constraints", "contains": "cat"}, "argument 'contains' is bad"),
        ({"name": "constraints", "contains": [["cat", 1]]}, "argument 'contains' is bad"),
        ({"name": "constraints", "pattern": "("}, "not a regular expression"),
        ({"name": "constraints", "pattern": "a{2,1}"}, "not a regular expression"),
        ({"name": "constraints", "pattern": "a" * 501}, "at most 500 characters"),
        ({"name": "constraints", "pattern": "(a{999}){999}b"}, "multiply to more than 100000"),
        ({"name": "constraints", "pattern": "(a{9}" * 9 + ")" * 9}, "multiply to more than"),
        ({"name": "constraints", "pattern": "a{" + "9" * 400 + "}"}, "multiply to more than"),
        ({"name": "constraints", "pattern": "(a|(?R))*b"}, "not a regular expression"),
        ({"name": "constraints", "pattern": "(" * 120 + ")" * 119}, "not a regular expression"),
        ({"name": "constraints", "pattern": "\ud800\\"}, "'pattern' is bad"),
        ({"name": "constraints", "lines": [1]}, "argument 'lines' is bad"),
        ({"name": "constraints", "max_words": True}, "argument 'max_words' is bad"),
        ({"name": "constraints", "min_words": -1}, "argument 'min_words' is bad"),
        ({"name": "constraints", "format": "yaml"}, "'json', 'list'"),
        ({"name": "label", "labels": 3, "answer": "b"}, "argument 'labels' is bad"),
        ({"name": "function_io", "cases": [[1]]}, "not [arguments, result]"),
        ({"name": "function_io", "cases": [[1, 2]]}, "not [arguments, result]"),
        ({"name": "function_io", "cases": [[[10**400], 2]]}, "more than 256 bits"),
        ({"name": "function_io", "cases": [[[{}], 2]]}, "a dict is not allowed"),
        ({"name": "numeric", "answer": 10**400}, "more than 256 bits"),
        ({"name": "numeric", "answer": float("nan")}, "a finite number was expected"),
        ({"name": "numeric", "answer": "1e999"}, "a finite number was expected"),
        ({"name": "numeric", "answer": "f(x)"}, "unction 'f' not defined, for expression 'f(x)'"),
        ({"name": "numeric", "answer": True}, "argument 'answer' is bad"),
        ({"name": "numeric", "answer": 1, "tolerance": float("inf")}, "'tolerance' is bad"),
        ({"name": "label", "labels": ["a"], "answer": "b"}, "not one of labels"),
        ({"name": "numeric", "answer": 6, "expression": "2 + 3"}, "2 + 3 = 5, but answer is 6"),
    ],
)
def test_a_bad_checker_is_a_clear_error(checker, said):
    assert said in faults(checker)[0]
    with pytest.raises(UserError, match="row 7: "):
        check({"id": "7", "checker": checker}, "a")
