"""The interpreter of small expressions: agrees with Python inside its language, refuses everything
outside.
"""

import math
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.hexainst import expressions
from helpers.hexainst.expressions import Refused, call, evaluate, number, same, size_of
from tests.limited import outcomes

SOUND = [
    "1 + 2 * 3 - 4 / 8",
    "7 // 2 + 7 % 4 - -3 ** 2",
    "2 ** 10",
    "1 < 2 < 3",
    "not 0 and (3 or 4)",
    "[1, 2, 3][::-1][0]",
    "5 if 'a' in 'cat' else 6",
    "sum([k * k for k in range(1, 11) if k % 2])",
    "max(3, len('four'), abs(-2))",
    "sum(k == 3 or k != 2 for k in [1, 2, 3])",
    "round(2.567, 1)",
    "str(12)[0] + 'x' * 3",
    "sorted([3, 1, 2])[-1]",
    "(1, 2)[1]",
    "all([1, 0]) + any([1, 0])",
    "sum([a * b for a in range(9) for b in range(a)])",
    "sum([sum([1 for b in range(a)]) for a in range(60)])",
    "[x for x in [[1, 2], [3]]][1][0]",
    " + ".join(map(str, range(100))),
    "min([n for n in range(1, 2000) if n % 7 == 3 and n % 9 == 4])",
]
HOSTILE = [
    "__import__('os')",
    "().__class__",
    "open('/etc/passwd')",
    "9 ** 9 ** 9",
    "'a' * 10 ** 9",
    "[0] * 10 ** 9",
    "'%1000000000d' % 1",
    "range(10 ** 9)",
    "round(5, -10 ** 9)",
    "factorial(10 ** 6)",
    "comb(10 ** 6, 5 * 10 ** 5)",
    "lambda: 1",
    "[x for x in x]",
    "1 / 0",
    "'a' + 1",
    "[1][5]",
    "print(1)",
    "len(len)",
    "b'x'",
    "f'{1}'",
    "{1: 2}",
    "1j",
    "sum([0 for a in range(9999) for b in range(9999)])",
    "sum([sum([1 for b in range(999)]) for a in range(999)])",
    "-" * 1500 + "1",
    "(" * 1500 + "1",
    "1;2",
    "",
    "x = 1",
    "1" * 3000,
    "len.x",
    "[[[1]]]",
    "max(1, key=2)",
    "int('9' * 100)",
    "2 ** -10 ** 20",
    "1 << 10",
    "1 is 1",
    "[1 for x.y in [1]]",
    "[1 for x[0] in [1]]",
    "[1 for *x in [[1]]]",
    "[1 for x, y in [1]]",
    "max(*[1])",
    "{1}",
    "{1: 2 for x in [1]}",
    "set([1])",
    "dict([[1, 2]])",
    "(x := 1)",
    "len",
    "'\ud800'.x",
    "1 if",
    "...",
    "await x",
    "10 ** 400",
    "int(float('inf'))",
    "x",
    "rand()",
]


@pytest.mark.parametrize("expression", SOUND)
def test_agrees_with_python(expression):
    assert evaluate(expression) == eval(expression)


@pytest.mark.parametrize("expression", HOSTILE)
def test_refuses(expression):
    with pytest.raises(Refused):
        evaluate(expression)
    with pytest.raises(Refused):
        call(f"lambda: {expression}", [])


# What could stall the interpreter or fill the memory: each ends in little time, whatever its value.
ATTACKS = {
    "shared lists": "[[0]*9999]*9999",
    "shared lists in a loop": "[1 for i in range(1500) if [[0]*9999]*9999]",
    "many lists": "[range(9999) for i in range(9990)]",
    "many lists that are dropped": "[1 for i in range(9999) if range(9999)]",
    "many displays": "[" + "range(9999)," * 160 + "]",
    "lists added": "+".join(["range(9999)"] * 160),
    "lists sorted": "[sorted(range(9999)) for i in range(9999)]",
    "lists of lists sorted": "[sorted([[0]*99]*99) for i in range(9999)]",
    "lists written": "[str(range(9999)) for i in range(9999)]",
    "lists compared": "[x for x in range(9999) if [[0]*99]*99 == [[0]*99]*99]",
    "lists searched": "[x for x in range(9999) if 1 in [0]*9999]",
    "lists cut": "[range(9999)[1:] for i in range(9999)]",
    "sums of lists": "sum([sum([sum(range(999)) for a in range(999)]) for b in range(999)])",
    "deep lists": "[" * 90 + "]" * 90,
    "loops inside loops": "[1 for i in " * 40 + "[1]" + "]" * 40,
    "many loops": "[1 for a in range(99) for b in range(99) for c in range(99) for d in range(99)]",
    "floats": "[i * 1.5 for j in range(9999) for i in range(9999)]",
    "long text": "'a' * 9999 * 9999",
    "text by a number below zero": "'a' * -(10 ** 60)",
    "texts": "['x' * 9999 for i in range(9999)]",
    "texts doubled": "+".join(["'" + "x" * 9 + "'"] * 150) + "*999",
    "texts searched": "[1 for i in range(9999) if 'b' * 4999 in 'a' * 9999]",
    "wide characters": "[list('\u4e00' * 4900) for i in range(9999)]",
    "power": "10 ** 400",
    "tower of powers": "9 ** 9 ** 9 ** 9",
    "powers multiplied": "*".join(["2**120"] * 200),
    "powers of floats": "(2.0 ** 1000) ** 1000",
    "shift": "1 << 10 ** 9",
    "factorials": "factorial(50) ** 50",
    "factorials of factorials": "factorial(factorial(factorial(50)))",
    "combinations": "[comb(200, 100) * comb(200, 99) for i in range(9999)]",
    "common multiples": "lcm(" + ",".join(f"2**250-{i}" for i in range(150)) + ")",
    "endless loop by infinity": "[1 for i in range(float('inf'))]",
    "infinity": "int(float('inf'))",
    "digits": "int('9' * 9999)",
    "digits to a float": "[float('9' * 9999) for i in range(9999)]",
    "rounding": "round(1.5, 10 ** 9)",
    "parentheses": "(" * 900 + "1" + ")" * 900,
    "signs": "-" * 1900 + "1",
    "nots": "not " * 450 + "1",
    "a long chain": "1" + "<2" * 950,
    "a long sum": "1" + "+1" * 950,
    "a long choice": "1 if 0 else " * 150 + "1",
    "lambdas": "lambda: " * 240 + "1",
    "f-strings": "f'{1:{9}{9}{9}{9}{9}{9}{9}{9}{9}}'",
    "formats": "'%999999999d' % 1",
    "huge source": "1 + " * 500_000 + "1",
    "huge number": "9" * 1900,
    "null byte": "1\0",
}


@cache
def results():
    module = "helpers.hexainst.expressions"
    calls = [(module, "call", ["lambda x: " + attack, [1]]) for attack in ATTACKS.values()]
    return dict(zip(ATTACKS, outcomes(calls), strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_takes_a_second_or_fifty_megabytes(name):
    """In a process of 1 s of CPU time and 50 MB: refused, or a value; no signal, no MemoryError."""
    assert not re.fullmatch(r"SIG\w+|\w+Error", results()[name])


def test_every_step_is_paid_for(monkeypatch):
    """The charge of `[x, x]` by hand: the list and two names, each a step, and their sizes."""
    spent = 3 * expressions.STEP + 2 * 3 + (2 + 2 * 3)
    monkeypatch.setattr(expressions, "BUDGET", spent)
    assert call("lambda x: [x, x]", [[1, 2, 3]]) == [[1, 2, 3], [1, 2, 3]]
    monkeypatch.setattr(expressions, "BUDGET", spent - 1)
    with pytest.raises(Refused, match="too many or too large steps"):
        call("lambda x: [x, x]", [[1, 2, 3]])


def test_sizes_count_what_is_inside():
    assert [size_of(x) for x in (7, None, "abc", [], [1, 2], ["ab", [3]])] == [0, 0, 3, 0, 2, 5]
    for large in (2**256, "a" * 10_001, [0] * 10_001, [[0] * 99] * 101, [[[]]], {}, 1j, len):
        with pytest.raises(Refused):
            size_of(large)


def test_too_little_memory_or_stack_is_a_refusal(monkeypatch):
    for error in (MemoryError, RecursionError):

        def fail(*_, error=error):
            raise error

        monkeypatch.setitem(expressions.FUNCTIONS, "len", fail)
        with pytest.raises(Refused, match=error.__name__):
            call("lambda x: len(x)", ["a"])


def test_numbers_are_finite():
    assert number(3) == number("2 + 1") == 3
    assert number("3/4") == 0.75
    for bad in (math.nan, math.inf, 10**400, True, None, [1], "'a'", "[1]", "1 < 2", "1e999", "x"):
        with pytest.raises(Refused):
            number(bad)


def test_the_callers_depth_does_not_matter():
    """A tree is refused for its own depth, so the same answer fails everywhere or nowhere."""

    def deep(levels, source):
        return deep(levels - 1, source) if levels else call(source, [1])

    fits, too_deep = ("lambda x: " + "+".join(["x"] * n) for n in (120, 200))
    assert call(fits, [1]) == deep(300, fits) == 120
    for levels in (0, 300):
        with pytest.raises(Refused, match="inside one another"):
            deep(levels, too_deep)


def test_functions_tolerate_a_word_tokenizer():
    assert call(
        "def f ( a , b ) : return a * * 2 if a > = b else [ a / / 2 , a ! = b ]", [3, 4]
    ) == [1, True]
    assert call("double = lambda x: x * 2", ["ab"]) == "abab"
    assert call("def f(x):\n    return x + 1", [1]) == 2


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): x += 1; return x",
        "def f(x): return",
        "def f(x, y): return x",
        "def f(*x): return x",
        "x + 1",
        "@print\ndef f(x): return x",
        "def f(x): return f(x)",
        "def f(x, *, y=1): return x",
        "import os",
        "def f(len): return len(1)",
    ],
)
def test_functions_outside_the_language_are_refused(source):
    with pytest.raises(Refused):
        call(source, [1])


def test_sameness():
    assert same(0.1 + 0.2, 0.3)
    assert same(2.0, 2)
    assert same([1, 2], [1, 2])
    assert not same(True, 1)
    assert not same(1, 2)
    assert same([0.1 + 0.2, "a"], [0.3, "a"])
    assert same(True, True)
    for one, two in ((1.0, True), ([True], [1]), ([1], [1, 2]), ("ab", ["a", "b"])):
        assert not same(one, two)
        assert not same(two, one)
    for other in ("a", "", None, [], [1.5], [[1.5]]):
        assert not same(1.5, other)
        assert not same(other, 1.5)


PIECES = [*"xy1[](),+-*/%<.:", "9999", "0.5", "'ab'", "**", "//", "==", "in", "not", "and", "or"]
PIECES += ["if", "else", "for", ":=", "range(", "sum(", "str(", "sorted(", "comb(", "list("]
PIECES += ["x[", "[x for x in", "for y in range(", "lambda x:", "'\\u4e00'", "1e308", "-1"]


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join) | st.text(max_size=20))
def test_any_source_gives_a_small_value_or_is_refused(source):
    for run in (evaluate, lambda text: call(f"lambda x: {text}", [[3, "a"]])):
        try:
            value = run(source)
        except Refused:
            continue
        assert size_of(value) <= expressions.SIZE
