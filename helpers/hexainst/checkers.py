"""Does an answer pass? One registry of checkers; a row names one in `checker` and gives its
arguments.

All are ours and deterministic, all return 1.0 (passes) or 0.0. Text is compared in a normal form:
Unicode NFKC, lower case, one space between words and none around punctuation, so that "The cat sat
." equals "the cat sat.".
"""

import inspect
import json
import math
import re
import unicodedata
from functools import lru_cache

from ..record import UserError
from . import expressions, sandbox

MARKS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212", "''\"\"---")
NUMBER = re.compile(
    r"(?<![\w.])(-\s*)?"  # sign
    r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?|\.\d+)"  # 1,200.5 or 7 or 1e5 or .5
    r"(?:\s*/\s*(\d+))?"
)  # below the fraction line


FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)```", re.S)
BULLET, NUMBERED = r"([-*\u2022]|\d+[.)])\s*\S.*", r"\d+\s*[.)]\s*\S.*"


def plain(text: str) -> str:
    """Lower case, NFKC, straight quotes and hyphens; white space untouched."""
    return unicodedata.normalize("NFKC", text).translate(MARKS).lower()


@lru_cache(maxsize=512)
def normalise(text: str) -> str:
    """The form in which texts are compared.

    >>> normalise("  The cat , too , sat .")
    'the cat,too,sat.'
    """
    return re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", plain(text))).strip()


def bare(text: str) -> str:
    """`normalise` without quotes and asterisks around it and without a final full stop."""
    return normalise(text).strip(".\"'`*")


def words(text: str) -> list[str]:
    """Words of a text, lower case; "don't" and "well-known" are one word each."""
    return re.findall(r"\w+(?:['-]\w+)*", plain(text))


def has(text: str, phrase: str) -> bool:
    """Whether `phrase` stands in `text` as whole words, both normalised."""
    phrase = normalise(phrase)
    before, after = (
        r"(?<!\w)" if phrase[:1].isalnum() else "",
        r"(?!\w)" if phrase[-1:].isalnum() else "",
    )
    return re.search(before + re.escape(phrase) + after, normalise(text)) is not None


def code_of(answer: str) -> str:
    """The first fenced code block of an answer, or else the answer itself."""
    found = FENCE.search(answer)
    return found.group(1).strip() if found else answer.strip()


def numbers(text: str) -> list[tuple[float, str, str]]:
    """Every number of a text as (value, text before, text after); thousands commas, fractions a/b,
    tokenised minus. A minus after a number or bracket of its own line subtracts; "- " at the start
    of a further line marks a list.

    >>> [value for value, _, _ in numbers("5 - 3 = 2, or - 1,200.5, or 3/4")]
    [5.0, 3.0, 2.0, -1200.5, 0.75]
    """
    text, found = plain(text), []
    for match in NUMBER.finditer(text):
        sign, digits, below = match.groups()
        not_sign = (
            r"[\d)][ \t]*\Z" if sign == "-" else r"[\d)][ \t]*\Z|\n[ \t]*\Z"
        )  # "5 - 3"; a list's "- 3"
        minus = sign and not re.search(not_sign, text[: match.start()])
        value = float(digits.replace(",", "")) / (float(below or 1) or math.nan)
        found.append((-value if minus else value, text[: match.start()], text[match.end() :]))
    return found


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin 2004, with equal weights).

    >>> round(rouge_l("the cat sat", "the cat sat down"), 3)
    0.857
    """
    a, b = words(answer), words(reference)
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, best[j] = (
                best[j],
                diagonal + 1 if word == other else max(best[j], best[j - 1]),
            )
    return 2 * best[-1] / (len(a) + len(b)) if a and b else 0.0


def label(given, /, *, labels, answer, aliases=()):
    """The whole answer is the label `answer` (one of `labels`) or one of its `aliases`."""
    return bare(given) in {bare(name) for name in (answer, *aliases)}


def short_answer(given, /, *, answers, within=0):
    """The whole answer, without a leading article, is one of `answers`; or it holds one and has <=
    `within` words.
    """
    wanted = {_answer(text) for text in answers}
    return (
        _answer(given) in wanted
        or len(words(given)) <= within
        and any(has(given, text) for text in wanted)
    )


def _answer(text):
    return re.sub(r"^(the|an?) ", "", bare(text))


def exact(given, /, *, answer):
    """The whole answer is `answer` but for case, spacing, enclosing quotes and a final full stop."""
    return bare(given) == bare(answer)


def numeric(given, /, *, answer, tolerance=0.0, unit=(), expression=None):
    """The last number of the answer is `answer` within `tolerance` (absolute).

    `answer` is a number or a text such as "3/4". With `unit` (a spelling or a list of them) the
    number must touch one of them or have only punctuation after it. `expression` recomputes
    `answer` when the row is validated.
    """
    found = numbers(given)
    if not found:
        return False
    value, before, after = found[-1]
    units = [plain(name) for name in ([unit] if isinstance(unit, str) else unit)]
    fits = (
        not units
        or not re.search(r"[\w%$\u20ac\u00a3\u00b0]", after)
        or any(
            re.match(rf"\s*{re.escape(name)}(?!\w)", after) or before.rstrip().endswith(name)
            for name in units
        )
    )
    return fits and math.isclose(
        value, expressions.evaluate(answer), rel_tol=1e-9, abs_tol=max(tolerance, 1e-9)
    )


def _json(text):
    try:
        return isinstance(json.loads(code_of(text)), dict | list)
    except ValueError:
        return False


def _lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


FORMATS = {
    "json": _json,
    "list": lambda text: (
        len(_lines(text)) > 1 and all(re.fullmatch(BULLET, line) for line in _lines(text))
    ),
    "numbered": lambda text: (
        len(_lines(text)) > 1 and all(re.fullmatch(NUMBERED, line) for line in _lines(text))
    ),
    "uppercase": lambda text: text.isupper(),
    "lowercase": lambda text: text.islower(),
}


def constraints(
    given,
    /,
    *,
    contains=(),
    forbidden=(),
    starts_with=(),
    ends_with=(),
    min_words=1,
    max_words=10_000,
    pattern=None,
    lines=None,
    sentences=None,
    format=None,
):
    """The answer keeps every constraint given.

    contains: phrases (a list inside is a choice); forbidden: phrases; starts_with, ends_with: a
    phrase or a choice; pattern: regular expression for the whole normalised text; lines,
    sentences: a number or [least, most], where a sentence ends at any . ! or ? before white space
    ("Mr. X" counts as two); format: a key of FORMATS.
    """
    text, count = normalise(given), len(words(given))
    ends = len(
        re.findall(
            r"[^.!?\s][^.!?]*(?:[.!?]+(?=\s|[\"')]|$)|$)",
            re.sub(r"(?<=\d)\.(?=\d)", "", plain(given)),
        )
    )
    return (
        min_words <= count <= max_words
        and all(any(has(given, phrase) for phrase in _choice(choice)) for choice in contains)
        and not any(has(given, phrase) for phrase in forbidden)
        and (not starts_with or any(text.startswith(normalise(p)) for p in _choice(starts_with)))
        and (
            not ends_with
            or any(text.rstrip(".").endswith(normalise(p).rstrip(".")) for p in _choice(ends_with))
        )
        and (pattern is None or re.fullmatch(pattern, text, re.I | re.S) is not None)
        and _in(len(_lines(given)), lines)
        and _in(ends, sentences)
        and (format is None or FORMATS[format](given))
    )


def _choice(value):
    return [value] if isinstance(value, str) else value


def _in(number, span):
    low, high = (span, span) if isinstance(span, int) else span or (0, math.inf)
    return low <= number <= high


def rouge_facts(given, /, *, reference, facts, min_rouge=0.2, max_words=10_000, forbidden=()):
    """ROUGE-L against `reference` is at least `min_rouge`; every fact (a phrase or a choice), no
    `forbidden` phrase.
    """
    return (
        len(words(given)) <= max_words
        and rouge_l(given, reference) >= min_rouge
        and all(any(has(given, phrase) for phrase in _choice(fact)) for fact in facts)
        and not any(has(given, phrase) for phrase in forbidden)
    )


def function_io(given, /, *, cases):
    """A one-line Python function gives the right result in each of `cases` [[args, result], ...].

    Interpreted by `expressions.call`, never executed; a refused or failing function does not pass.
    """
    try:
        return all(
            expressions.same(expressions.call(code_of(given), args), result)
            for args, result in cases
        )
    except expressions.Refused:
        return False


def unit_tests(given, /, *, tests, entry_point=None, setup=""):
    """The answer's program runs all `tests` (assert statements) to the end, in `sandbox.run`;
    executes the program.
    """
    program = code_of(given)
    if entry_point and not re.search(rf"\b{re.escape(entry_point)}\b", program):
        return False
    return sandbox.run("\n".join((program, setup, *tests))).ok


CHECKERS = {
    f.__name__: f
    for f in (
        label,
        short_answer,
        exact,
        numeric,
        constraints,
        rouge_facts,
        function_io,
        unit_tests,
    )
}


EXECUTES = {"unit_tests"}


def faults(checker) -> list[str]:
    """What is wrong with a row's `checker` value; empty when it can be called."""
    if not isinstance(checker, dict) or checker.get("name") not in CHECKERS:
        name = checker.get("name") if isinstance(checker, dict) else checker
        return [f"unknown checker {name!r}: expected one of {', '.join(CHECKERS)}"]
    arguments = {key: value for key, value in checker.items() if key != "name"}
    try:
        inspect.signature(CHECKERS[checker["name"]]).bind("", **arguments)
    except TypeError as error:
        return [f"checker {checker['name']}: {error}"]
    if checker["name"] == "label" and bare(checker["answer"]) not in map(bare, checker["labels"]):
        return [
            f"checker label: answer {checker['answer']!r} is not one of labels {checker['labels']}"
        ]
    if checker["name"] == "numeric" and checker.get("expression"):
        value, said = (
            expressions.evaluate(checker["expression"]),
            expressions.evaluate(checker["answer"]),
        )
        if not math.isclose(value, said, rel_tol=1e-9, abs_tol=checker.get("tolerance", 0)):
            return [
                f"checker numeric: {checker['expression']} = {value}, but answer is {checker['answer']}"
            ]
    return []


def check(row, answer: str, run_code: bool = False) -> float | None:
    """Score of `answer` under the row's checker: 1.0 or 0.0; None = not scored.

    None is given for a checker that executes the answer (EXECUTES) unless `run_code` is set (in
    the profile); a pandas mean skips it, and such rows are scored by the reference's NLL alone.
    Raises UserError for a bad checker, and where `run_code` is set on a platform that cannot
    contain a program.

    >>> check({"id": "x", "checker": {"name": "numeric", "answer": 7}}, "3 + 4 = 7")
    1.0
    """
    checker = row["checker"]
    if found := faults(checker):
        raise UserError(f"row {row.get('id')}: {found[0]}. Correct the row's `checker`.")
    if checker["name"] in EXECUTES and not run_code:
        return None
    arguments = {key: value for key, value in checker.items() if key != "name"}
    try:
        return float(bool(CHECKERS[checker["name"]](answer, **arguments)))
    except sandbox.Unavailable as error:
        raise UserError(
            f"{error}. Set `run_code: false`: CODE is then scored by the reference's NLL alone."
        ) from error
