"""Small Python expressions that are not ours, interpreted, never executed: MATH rows' sums,
one-line functions of CODE.

The language: numbers, texts, lists, arithmetic, comparison, `and or not`, `a if b else c`,
indexing, one-loop comprehensions, and the calls of FUNCTIONS. No attributes, no imports, no
statements; every value and the number of steps are bounded, so hostile input ends in `Refused`.
Programs that need more run in sandbox.py.
"""

import ast
import math
import operator
import re

BITS, LENGTH, STEPS, SOURCE = 256, 10_000, 20_000, 2_000


class Refused(Exception):
    """Code outside the small language, too large, or failing while it is interpreted."""


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
            and len(thing) * number > LENGTH
        ):
            raise Refused("a text or list too long")
    return a * b


def _power(a, b):
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * abs(b) > BITS:
        raise Refused("a number too large")
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
    "range": lambda *args: list(_small(range, LENGTH)(*args)),
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


class _Interpreter:
    """Value of an expression tree: a step budget, bounded values, no attributes, no calls but
    FUNCTIONS.
    """

    def __init__(self):
        self.steps = 0

    def value(self, node, names):
        self.steps += 1
        method = getattr(self, type(node).__name__.lower(), None)
        if self.steps > STEPS or method is None:
            raise Refused("too many steps" if method else f"{type(node).__name__} is not allowed")
        return _bounded(method(node, names))

    def constant(self, node, names):
        return node.value

    def name(self, node, names):
        if node.id not in names:
            raise Refused(f"unknown name {node.id!r}")
        return names[node.id]

    def binop(self, node, names):
        return self.apply(node.op, self.value(node.left, names), self.value(node.right, names))

    def unaryop(self, node, names):
        return self.apply(node.op, self.value(node.operand, names))

    def apply(self, op, *values):
        if type(op) not in OPERATORS:
            raise Refused(f"{type(op).__name__} is not allowed")
        return OPERATORS[type(op)](*values)

    def boolop(self, node, names):
        for part in node.values:
            value = self.value(part, names)
            if bool(value) != isinstance(node.op, ast.And):
                break
        return value

    def compare(self, node, names):
        left = self.value(node.left, names)
        for op, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part, names)
            if not self.apply(op, left, right):
                return False
            left = right
        return True

    def ifexp(self, node, names):
        return self.value(node.body if self.value(node.test, names) else node.orelse, names)

    def list(self, node, names):
        return [self.value(part, names) for part in node.elts]

    tuple = list

    def subscript(self, node, names):
        return self.value(node.value, names)[self.value(node.slice, names)]

    def slice(self, node, names):
        return slice(
            *(part and self.value(part, names) for part in (node.lower, node.upper, node.step))
        )

    def call(self, node, names):
        known = (
            isinstance(node.func, ast.Name)
            and node.func.id in FUNCTIONS
            and node.func.id not in names
        )
        if node.keywords or not known:
            raise Refused("a call of anything but " + ", ".join(FUNCTIONS))
        return FUNCTIONS[node.func.id](*(self.value(part, names) for part in node.args))

    def listcomp(self, node, names):
        if len(node.generators) != 1 or not isinstance(node.generators[0].target, ast.Name):
            raise Refused("only `for name in ...` is allowed in a comprehension")
        loop, found = node.generators[0], []
        for item in self.value(loop.iter, names):
            inner = names | {loop.target.id: item}
            if all(self.value(test, inner) for test in loop.ifs):
                found.append(self.value(node.elt, inner))
        return found

    generatorexp = listcomp


def _bounded(value):
    if (
        isinstance(value, int)
        and value.bit_length() > BITS
        or isinstance(value, str)
        and len(value) > LENGTH
    ):
        raise Refused("a value too large")
    if isinstance(value, list) and (
        len(value) > LENGTH
        or any(isinstance(x, list) and any(isinstance(y, list) for y in x) for x in value)
    ):
        raise Refused("a list too long or too deep")
    if not isinstance(value, int | float | str | list | slice | None):
        raise Refused(f"a {type(value).__name__} is not allowed")
    return value


def _parse(source):
    if len(source) > SOURCE:
        raise Refused(f"more than {SOURCE} characters")
    joined = re.sub(
        r"(?<=[*/=<>!])[ \t]+(?=[*/=])", "", source
    )  # a word tokenizer writes "* *", "= =", "> ="
    for text in (source, joined):
        try:
            return ast.parse(text.strip())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            last = error
    raise Refused(f"does not parse: {last}")


def _guard(tree, names):
    try:
        return _Interpreter().value(tree, names)
    except (ArithmeticError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error


def evaluate(expression) -> float:
    """Value of an arithmetic expression (or of a number); `pi`, `sqrt`, `gcd`, `comb`, `sum(...
    for ...)` are known.

    >>> evaluate("sum(k*k for k in range(1, 4)) + sqrt(4)")
    16.0
    """
    if isinstance(expression, int | float):
        return expression
    statements = _parse(expression).body
    if len(statements) != 1 or not isinstance(statements[0], ast.Expr):
        raise Refused("one expression was expected")
    return _guard(statements[0].value, CONSTANTS)


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
    return _guard(body, CONSTANTS | dict(zip(names, args, strict=True)))


def same(found, expected) -> bool:
    """Equal, with floats compared to 1e-9 and True never equal to 1."""
    if isinstance(found, float) or isinstance(expected, float):
        return isinstance(found, int | float) and math.isclose(
            found, expected, rel_tol=1e-9, abs_tol=1e-9
        )
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)
