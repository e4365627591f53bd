"""The interpreter of small expressions: agrees with Python inside its language, refuses everything
outside.
"""

import pytest

from helpers.hexainst.expressions import Refused, call, evaluate, same

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
    assert not same("a", 1.0)
