"""Small Python expressions that are not ours, interpreted, never executed: MATH rows' sums,
one-line functions of CODE.

The language: numbers, texts, lists, arithmetic, comparison, `and or not`, `a if b else c`,
indexing, comprehensions, and the calls of FUNCTIONS. No attributes, no imports, no statements.
The library simpleeval walks the tree; alone it is not bounded (`[[0]*9999]*9999` ran into a limit
of 5 s). So here every node is charged STEP and the size of its value before the next one is
reached, all from one BUDGET, and every value is small; hostile input ends in `Refused` within
some 0.3 s and 50 MB. Programs that need more run in sandbox.py.
"""

import ast
import math
import operator
import re
import warnings

import simpleeval

# Of a source: characters, and nodes of its tree inside one another. Of a value: bits of an integer,
# characters and items together, lists inside one another. Of a run: what it may cost in all.
SOURCE, NESTED = 2_000, 150
BITS, SIZE, DEEP = 256, 10_000, 2
STEP, BUDGET = 20, 500_000


class Refused(Exception):
    """Code outside the small language, too large, or failing while it is interpreted."""


def size_of(value, deep: int = DEEP) -> int:
    """Characters and items of a value, those of inner lists included; Refused unless it is one of
    this language's, and small.

    >>> size_of(["ab", [1, 2]])
    6
    """
    if isinstance(value, str):
        size = len(value)
    elif isinstance(value, list):
        if not deep:
            raise Refused("a list too deep")
        size = len(value) + sum(size_of(item, deep - 1) for item in value)
    elif isinstance(value, int | float | slice | None):
        size = 0
        if isinstance(value, int) and value.bit_length() > BITS:
            raise Refused(f"a number of more than {BITS} bits")
    else:
        raise Refused(f"a {type(value).__name__} is not allowed")
    if size > SIZE:
        raise Refused(f"a text or list above size {SIZE}")
    return size


def _number(function):
    def apply(a, b):
        if not all(isinstance(x, int | float) for x in (a, b)):
            raise Refused(f"{function.__name__} of {type(a).__name__} and {type(b).__name__}")
        return function(a, b)

    return apply


def _times(a, b):
    for thing, number in ((a, b), (b, a)):
        if (
            isinstance(thing, str | list)
            and isinstance(number, int)
            and size_of(thing) * number > SIZE
        ):
            raise Refused(f"a text or list above size {SIZE}")
    return a * b


def _power(a, b):
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * abs(b) > BITS:
        raise Refused(f"a number of more than {BITS} bits")
    return _number(pow)(a, b)


def _small(function, limit):
    def apply(*args):
        if any(abs(x) > limit for x in args):
            raise Refused(f"{function.__name__} of a number above {limit}")
        return function(*args)

    return apply


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: _number(operator.sub),
    ast.Mult: _times,
    ast.Pow: _power,
    ast.Div: _number(operator.truediv),
    ast.FloorDiv: _number(operator.floordiv),
    ast.Mod: _number(operator.mod),
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


FUNCTIONS = {
    "len": len,
    "min": min,
    "max": max,
    "abs": abs,
    "sum": lambda x: sum(x),
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "sorted": lambda x: sorted(x),
    "list": list,
    "all": all,
    "any": any,
    "range": lambda *args: list(_small(range, SIZE)(*args)),
    "round": lambda x, n=None: round(x, None if n is None else _small(int, 20)(n)),
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "gcd": math.gcd,
    "lcm": math.lcm,
    "floor": math.floor,
    "ceil": math.ceil,
    "factorial": _small(math.factorial, 50),
    "comb": _small(math.comb, 200),
}


CONSTANTS = {"True": True, "False": False, "None": None, "pi": math.pi, "e": math.e}
NODES = (
    ast.Constant,
    ast.Name,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.Call,
    ast.Subscript,
    ast.Slice,
    ast.List,
    ast.ListComp,
    ast.GeneratorExp,
)


class _Evaluator(simpleeval.EvalWithCompoundTypes):
    """simpleeval with our operators, functions and nodes only, and a BUDGET."""

    def __init__(self, names, source):
        super().__init__(OPERATORS, dict(FUNCTIONS), names)
        self.expr = source[:60]  # for the library's messages
        self.functions, self.left = FUNCTIONS, BUDGET  # the library has added dict, set, tuple
        self.nodes = {kind: self.nodes[kind] for kind in NODES} | {ast.Tuple: self._eval_list}

    def _eval(self, node):
        if type(node) not in self.nodes:
            raise Refused(f"{type(node).__name__} is not allowed")
        value = self.nodes[type(node)](node)
        self.left -= STEP + size_of(value)
        if self.left < 0:
            raise Refused("too many or too large steps")
        return value


def _depth(tree) -> int:
    level, depth = [tree], 0
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth


def _parse(source) -> ast.Module:
    if len(source) > SOURCE:
        raise Refused(f"more than {SOURCE} characters")
    joined = re.sub(
        r"(?<=[*/=<>!])[ \t]+(?=[*/=])", "", source
    )  # a word tokenizer writes "* *", "= =", "> ="
    for text in (source, joined):
        try:
            with warnings.catch_warnings(action="ignore"):  # "\d", "1if": Python's own remarks
                tree = ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            last = error
        else:
            if _depth(tree) > NESTED:
                raise Refused(f"more than {NESTED} parts inside one another")
            return tree
    raise Refused(f"does not parse: {last}")


def _run(tree, names, source):
    try:
        return _Evaluator(names, source)._eval(tree)
    except (
        simpleeval.InvalidExpression,
        ArithmeticError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def evaluate(expression: str):
    """Value of an expression; `pi`, `sqrt`, `gcd`, `comb`, `sum(... for ...)` are known.

    >>> evaluate("sum(k*k for k in range(1, 4)) + sqrt(4)")
    16.0
    """
    statements = _parse(expression).body
    if len(statements) != 1 or not isinstance(statements[0], ast.Expr):
        raise Refused("one expression was expected")
    return _run(statements[0].value, CONSTANTS, expression)


def number(value) -> float:
    """A finite number: `value` itself, or what the expression `value` gives; Refused for others.

    >>> number("3/4")
    0.75
    """
    found = evaluate(value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise Refused(f"a finite number was expected, found {type(found).__name__}")
    size_of(found)
    if not math.isfinite(found):
        raise Refused(f"a finite number was expected, found {found}")
    return found


def call(source: str, args: list):
    """Result of the one-line function or lambda in `source` for `args`, interpreted; Refused for
    anything else.

    >>> call("def f ( x , y ) : return x * * 2 + y if x >= y else [ y ]", [3, 1])
    10
    """
    match _parse(source).body:
        case [
            ast.FunctionDef(
                args=signature, body=[ast.Return(value=ast.expr() as body)], decorator_list=[]
            )
        ]:
            pass
        case [ast.Assign(value=ast.Lambda() as found) | ast.Expr(value=ast.Lambda() as found)]:
            signature, body = found.args, found.body
        case _:
            raise Refused("one function of one `return`, or a lambda, was expected")
    names = [part.arg for part in signature.args]
    if len(names) != len(args) or any(
        (signature.vararg, signature.kwarg, signature.kwonlyargs, signature.posonlyargs)
    ):
        raise Refused(f"{len(args)} plain arguments were expected, the function has {names}")
    return _run(body, CONSTANTS | dict(zip(names, args, strict=True)), source)


def same(found, expected) -> bool:
    """Equal, with floats compared to 1e-9, in lists too, and True never equal to 1."""
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    kinds = {type(found), type(expected)}
    if float in kinds and kinds <= {int, float}:
        return math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9)
    return found == expected
