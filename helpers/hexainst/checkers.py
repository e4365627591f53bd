"""Does an answer pass? One registry of checkers; a row names one in `checker` and gives its
arguments.

All are ours and deterministic, all return 1.0 (passes) or 0.0. Text is compared in a normal form:
Unicode NFKC, lower case, one space between words and none around punctuation, so that "The cat sat
." equals "the cat sat.".

An answer cannot stall its check: it fails if it is longer than ANSWER characters, if a row's
`pattern` needs more than PATIENCE on it, or if its code is beyond the bounds of expressions.py;
all else here takes time in proportion to the text. Arguments are checked against the checkers'
annotations before anything is judged.
"""

import inspect
import json
import math
import re
import reprlib
import unicodedata
from collections import defaultdict
from functools import lru_cache
from typing import Annotated, Literal

import pydantic
import regex
from pydantic import AfterValidator, Field

from ..record import UserError
from . import expressions, sandbox

ANSWER = 20_000  # characters; the longest answer that is judged
REPEATS = 100_000  # the most that the numbers in a pattern's braces may multiply to
PATIENCE = 0.25  # seconds of CPU time that a row's pattern may need on one answer
UNSAFE = "unsafe"  # a `run_code` that runs programs without the kernel layer of sandbox.py, too

MARKS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212", "''\"\"---")
NUMBER = re.compile(
    r"(?<![\w.])(-\s*)?"  # sign
    r"(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[+-]?\d+)?|\.\d+)"  # 1,200.5 or 7 or 1e5 or .5
    r"(?:\s*/\s*(\d+))?"
)  # below the fraction line


FENCE = re.compile(r"```[\w+-]*[ \t]*\n(.*?)```", re.S)
BULLET, NUMBERED = r"([-*\u2022]|\d+[.)])\s*\S.*", r"\d+\s*[.)]\s*\S.*"
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++(?=[\s\"')]|\Z)")


def plain(text: str) -> str:
    """Lower case, NFKC, straight quotes and hyphens; white space untouched."""
    return unicodedata.normalize("NFKC", text).translate(MARKS).lower()


@lru_cache(maxsize=64)
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


def numbers(text: str) -> list[tuple[float, int, int]]:
    """Every number of a text as (value, start, end), places in `plain(text)`: thousands commas,
    fractions a/b, tokenised minus. A minus after a number or bracket of its own line subtracts;
    "- " at the start of a further line marks a list.

    >>> [value for value, _, _ in numbers("5 - 3 = 2, or - 1,200.5, or 3/4")]
    [5.0, 3.0, 2.0, -1200.5, 0.75]
    """
    text, found, last = plain(text), [], 0
    for match in NUMBER.finditer(text):
        sign, digits, below = match.groups()
        gap = text[last : match.start()].rstrip(" \t")
        before = gap[-1:] or text[last - 1 : last]
        subtracts = before.isdecimal() or before == ")"  # "5 - 3"
        listed = sign != "-" and before == "\n"  # a list's "- 3"
        value = float(digits.replace(",", "")) / (float(below or 1) or math.nan)
        minus = sign and not subtracts and not listed
        found.append((-value if minus else value, match.start(), match.end()))
        last = match.end()
    return found


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin 2004, with equal weights).

    The subsequence is found by Hyyro's bit-parallel recurrence (2004): one integer holds a column
    of the dynamic programme, so 10,000 words against 10,000 take some 10 ms.

    >>> round(rouge_l("the cat sat", "the cat sat down"), 3)
    0.857
    """
    a, b = words(answer), words(reference)
    if not a or not b:
        return 0.0
    places = defaultdict(int)  # of each word in b, one bit a place
    for j, word in enumerate(b):
        places[word] |= 1 << j
    whole = column = (1 << len(b)) - 1  # a zero where the common subsequence grows
    for word in a:
        hit = column & places.get(word, 0)
        column = (column + hit | column - hit) & whole
    common = len(b) - column.bit_count()
    return 2 * common / (len(a) + len(b))


def _finite(value):
    try:
        expressions.number(value)
    except expressions.Refused as error:
        raise ValueError(str(error)) from error
    return value


def _compiles(pattern):
    """Of Python's re, though it is matched by the library regex, for its time limit; that one
    writes out repeats inside repeats, up to gigabytes.
    """
    repeats = math.prod(int(least) or 1 for least in re.findall(r"\{(\d+)", pattern))
    if repeats > REPEATS:
        raise ValueError(f"repeats that multiply to more than {REPEATS}")
    try:
        re.compile(pattern, re.I | re.S)
        regex.compile(pattern, regex.I | regex.S)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return pattern


def _case(case):
    try:
        args, result = case
        for value in (*args, result):
            expressions.size_of(value)
    except (expressions.Refused, TypeError, ValueError) as error:
        raise ValueError(f"not [arguments, result] of small values ({error})") from error
    return case


# What arguments may be, as JSON or as Python writes them.
Texts = list[str] | tuple[str, ...]
Choice = str | Texts  # a phrase, or several of which one is enough
Phrases = list[Choice] | tuple[Choice, ...]
Count = Annotated[int, Field(ge=0, le=1_000_000)]
Span = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]  # or [least, most]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[int | float | str, AfterValidator(_finite)]
Pattern = Annotated[str, Field(max_length=500), AfterValidator(_compiles)]
Cases = list[Annotated[list, AfterValidator(_case)]]


def label(given, /, *, labels: Texts, answer: str, aliases: Texts = ()):
    """The whole answer is the label `answer` (one of `labels`) or one of its `aliases`."""
    return bare(given) in {bare(name) for name in (answer, *aliases)}


def short_answer(given, /, *, answers: Texts, within: Count = 0):
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


def exact(given, /, *, answer: str):
    """The whole answer is `answer` but for case, spacing, outer quotes and a final full stop."""
    return bare(given) == bare(answer)


def numeric(
    given,
    /,
    *,
    answer: Number,
    tolerance: Amount = 0.0,
    unit: Choice = (),
    expression: Number | None = None,
):
    """The last number of the answer is `answer` within `tolerance` (absolute).

    `answer` is a number or a text such as "3/4". With `unit` (a spelling or a list of them) the
    number must touch one of them or have only punctuation after it. `expression` recomputes
    `answer` when the row is validated.
    """
    found = numbers(given)
    if not found:
        return False
    value, start, end = found[-1]
    before, after = plain(given)[:start].rstrip(), plain(given)[end:]
    units = [plain(name) for name in _choice(unit)]
    fits = (
        not units
        or not re.search(r"[\w%$\u20ac\u00a3\u00b0]", after)
        or any(
            re.match(rf"\s*{re.escape(name)}(?!\w)", after) or before.endswith(name)
            for name in units
        )
    )
    wanted = expressions.number(answer)
    return fits and math.isclose(value, wanted, rel_tol=1e-9, abs_tol=max(tolerance, 1e-9))


def _json(text):
    try:
        return isinstance(json.loads(code_of(text)), dict | list)
    except (ValueError, RecursionError):
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


def _choice(value):
    return [value] if isinstance(value, str) else value


def _in(number, span):
    low, high = (span, span) if isinstance(span, int) else span
    return low <= number <= high


def _contains(given, phrases: Phrases):
    return all(any(has(given, phrase) for phrase in _choice(choice)) for choice in phrases)


def _forbidden(given, phrases: Texts):
    return not any(has(given, phrase) for phrase in phrases)


def _starts_with(given, phrases: Choice):
    return normalise(given).startswith(tuple(map(normalise, _choice(phrases))))


def _ends_with(given, phrases: Choice):
    ends = tuple(normalise(phrase).rstrip(".") for phrase in _choice(phrases))
    return normalise(given).rstrip(".").endswith(ends)


def _min_words(given, least: Count):
    return len(words(given)) >= least


def _max_words(given, most: Count):
    return len(words(given)) <= most


def _pattern(given, pattern: Pattern):
    try:
        found = regex.fullmatch(pattern, normalise(given), regex.I | regex.S, timeout=PATIENCE)
    except (TimeoutError, MemoryError):
        return False
    return found is not None


def _line_count(given, span: Span):
    return _in(len(_lines(given)), span)


def _sentence_count(given, span: Span):
    parts = SENTENCE_END.split(re.sub(r"(?<=\d)\.(?=\d)", "", plain(given)))
    return _in(sum(re.search(r"[^.!?\s]", part) is not None for part in parts), span)


def _format(given, name: Literal[tuple(FORMATS)]):
    return FORMATS[name](given)


CONSTRAINTS = {
    "contains": _contains,
    "forbidden": _forbidden,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "min_words": _min_words,
    "max_words": _max_words,
    "lines": _line_count,
    "sentences": _sentence_count,
    "format": _format,
    "pattern": _pattern,
}


def constraints(given, /, **asked):
    """The answer keeps every constraint asked for, by its name in CONSTRAINTS; it is never empty.

    contains: phrases (a list inside is a choice); forbidden: phrases; starts_with, ends_with: a
    phrase or a choice; min_words, max_words: a number; pattern: regular expression for the whole
    normalised text; lines, sentences: a number or [least, most], where a sentence ends at any . !
    or ? before white space ("Mr. X" counts as two); format: a key of FORMATS.
    """
    asked = {"min_words": 1} | asked
    return all(CONSTRAINTS[name](given, value) for name, value in asked.items())


def rouge_facts(
    given,
    /,
    *,
    reference: str,
    facts: Phrases,
    min_rouge: Amount = 0.2,
    max_words: Count = ANSWER,
    forbidden: Texts = (),
):
    """ROUGE-L against `reference` is at least `min_rouge`; every fact (a phrase or a choice), no
    `forbidden` phrase.
    """
    return (
        _max_words(given, max_words)
        and rouge_l(given, reference) >= min_rouge
        and _contains(given, facts)
        and _forbidden(given, forbidden)
    )


def function_io(given, /, *, cases: Cases):
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


def unit_tests(
    given, without_seccomp=False, /, *, tests: Texts, entry_point: str = "", setup: str = ""
):
    """The answer's program runs all `tests` (assert statements) to the end, in `sandbox.run`;
    executes the program.
    """
    program = code_of(given)
    if entry_point and not re.search(rf"\b{re.escape(entry_point)}\b", program):
        return False
    whole = "\n".join((program, setup, *tests))
    return sandbox.run(whole, without_seccomp=without_seccomp).ok


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


def _arguments(name):
    """A model of the arguments of one checker: its keywords' annotations and defaults."""
    if name == "constraints":
        second = {
            key: list(inspect.get_annotations(f).values())[0] for key, f in CONSTRAINTS.items()
        }
        fields = {key: (kind, None) for key, kind in second.items()}
    else:
        keywords = [
            p
            for p in inspect.signature(CHECKERS[name]).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        fields = {
            p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in keywords
        }
    strict = pydantic.ConfigDict(extra="forbid", strict=True)
    return pydantic.create_model(name, __config__=strict, **fields)


ARGUMENTS = {name: _arguments(name) for name in CHECKERS}


def _split(checker):
    return checker["name"], {key: value for key, value in checker.items() if key != "name"}


def faults(checker) -> list[str]:
    """What is wrong with a row's `checker` value; empty when it can be called."""
    name = checker.get("name") if isinstance(checker, dict) else checker
    if not isinstance(checker, dict) or not isinstance(name, str) or name not in CHECKERS:
        return [f"unknown checker {reprlib.repr(name)}: expected one of {', '.join(CHECKERS)}"]
    name, arguments = _split(checker)
    try:
        ARGUMENTS[name].model_validate(arguments)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return [f"checker {name}: argument {first['loc'][0]!r} {_said(first)}"]
    if name == "label" and bare(checker["answer"]) not in map(bare, checker["labels"]):
        return [
            f"checker label: answer {checker['answer']!r} is not one of labels {checker['labels']}"
        ]
    if name == "numeric" and checker.get("expression") is not None:
        value, said = (expressions.number(checker[key]) for key in ("expression", "answer"))
        if not math.isclose(value, said, rel_tol=1e-9, abs_tol=checker.get("tolerance", 0)):
            told = f"{checker['expression']} = {value}, but answer is {checker['answer']}"
            return [f"checker numeric: {told}"]
    return []


def _said(fault):
    known = {"missing": "is missing", "extra_forbidden": "is unknown"}
    said = fault["msg"].removeprefix("Value error, ")
    shown = f"is bad: {said}, found {reprlib.repr(fault['input'])}"
    return known.get(fault["type"], shown)


def refuse_bad(rows) -> None:
    """Raise UserError for the first of some rows whose checker cannot be called."""
    for row in rows:
        if found := faults(row["checker"]):
            raise UserError(f"row {row.get('id')}: {found[0]}. Correct the row's `checker`.")


def check(row, answer: str, run_code: bool | str = False) -> float | None:
    """Score of `answer` under the row's checker: 1.0 or 0.0; None = not scored.

    None is given for a checker that executes the answer (EXECUTES) unless `run_code` is set (in
    the profile); a pandas mean skips it, and such rows are scored by the reference's NLL alone.
    run_code: False, True, or UNSAFE, which also runs programs where sandbox.py has no kernel layer.
    An answer of more than ANSWER characters fails. Raises UserError for a bad checker, an answer
    that is no text, and where `run_code` is set on a platform that cannot contain a program.

    >>> check({"id": "x", "checker": {"name": "numeric", "answer": 7}}, "3 + 4 = 7")
    1.0
    """
    refuse_bad([row])
    if not isinstance(answer, str):
        raise UserError(
            f"row {row.get('id')}: the answer is {reprlib.repr(answer)}, expected a string. Give "
            "the model's answer; from a CSV file read it with keep_default_na=False, or an empty "
            "one is nan."
        )
    name, arguments = _split(row["checker"])
    if name in EXECUTES and not run_code:
        return None
    if len(answer) > ANSWER:
        return 0.0
    how = (run_code == UNSAFE,) if name in EXECUTES else ()
    try:
        return float(bool(CHECKERS[name](answer, *how, **arguments)))
    except sandbox.Unavailable as error:
        raise UserError(
            f"{error}. Set `run_code: false`: CODE is then scored by the reference's NLL alone."
        ) from error
