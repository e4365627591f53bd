"""HexaInst: six categories of instructions, one row each, as JSON lines: schema, validation,
loading, export.

A row: id, half ("ai" | "human"; "A" | "B" in the tiny world), category, source, instruction, input
(may be empty), reference, checker ({"name": ..., arguments}: see checkers.py), tags (subtask,
difficulty, wording, domain; may be empty in the tiny world). A HexaInst-style reconstruction: no
public release of the paper's data set was found.

A file is judged whole before anything runs: every fault is named with its line, whatever the bytes.
"""

import json
import math
import os
import shutil
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from ..paths import CLONE, COMMAND, HEXAINST, resolve, short
from ..record import UserError, atomic, visible
from . import checkers
from .corpus import matched, text, tokens

CATEGORIES = ("CLS", "CODE", "QA", "GEN", "MATH", "SUM")
NAMES = dict(
    zip(
        CATEGORIES,
        (
            "classification",
            "code",
            "question answering",
            "generation",
            "mathematics",
            "summarisation",
        ),
        strict=True,
    )
)


HALVES = ("ai", "human", "A", "B")
SCHEMA = {
    "id": str,
    "half": str,
    "category": str,
    "source": str,
    "instruction": str,
    "input": str,
    "reference": str,
    "checker": dict,
    "tags": dict,
}


TAGS = ("subtask", "difficulty", "wording", "domain")
WRONG = ("", "I do not know.", "qwx -987654321")


LINE, DIGITS = 1_000_000, 40  # the most bytes of a row, the most digits of a whole number in it


def row_faults(row, run_code: bool | str = False) -> list[str]:
    """What is wrong with one row (a value read from JSON); empty when sound. `run_code`: execute
    its reference too (see checkers.check).
    """
    if not isinstance(row, dict):
        return [f"a row must be an object, found {type(row).__name__}"]
    return _type_faults(row) or _value_faults(row) + _checker_faults(row, run_code)


def _type_faults(row):
    found = [f"missing field {key!r}" for key in SCHEMA if key not in row]
    found += [
        f"unknown field {str(key)[:60]!r}: expected {', '.join(SCHEMA)}"
        for key in row
        if key not in SCHEMA
    ]
    found += [
        f"{key} must be {kind.__name__}, found {type(row[key]).__name__}"
        for key, kind in SCHEMA.items()
        if key in row and not isinstance(row[key], kind)
    ]
    tags = row["tags"] if not found else {}
    return found + [
        f"tags: {key[:60]!r} must be str, found {type(value).__name__}"
        for key, value in tags.items()
        if not isinstance(value, str)
    ]


def _value_faults(row):
    found = [
        f"empty {key}"
        for key in ("id", "source", "instruction", "reference")
        if not visible(row[key])
    ]
    for key, known in (("category", CATEGORIES), ("half", HALVES)):
        if row[key] not in known:
            found.append(f"unknown {key} {row[key][:60]!r}: expected one of {', '.join(known)}")
    if row["half"] in ("ai", "human"):
        found += [f"tags: missing {key!r}" for key in TAGS if not row["tags"].get(key)]
    if len(row["reference"]) > checkers.ANSWER:
        found.append(
            f"reference has more than {checkers.ANSWER} characters, the most of any answer"
        )
    return found


def _checker_faults(row, run_code):
    if found := checkers.faults(row["checker"]):
        return found
    name, wrong = row["checker"]["name"], WRONG
    if row["half"] in ("ai", "human"):
        wrong += (text(row), row["input"])
    if checkers.check(row, row["reference"], run_code) == 0:
        found.append(f"checker {name} rejects the row's own reference {row['reference'][:60]!r}")
    return found + [
        f"checker {name} accepts a wrong answer: {answer[:60]!r}"
        for answer in dict.fromkeys(wrong)
        if checkers.check(row, answer, run_code)
    ]


def _object(pairs):
    keys = Counter(key for key, _ in pairs)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"the key {twice[0][:60]!r} stands twice in one object")
    return dict(pairs)


def _integer(digits):
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of more than {DIGITS} digits")
    return int(digits)


def _decimal(digits):
    if not math.isfinite(float(digits)):
        raise ValueError(f"{digits[:60]} is not a finite number")
    return float(digits)


def read_row(line: bytes):
    """The JSON value of one line; ValueError says why it is none, or none that can be kept: a
    blank line, a key twice, a number that is not finite or too long, half a surrogate pair, too
    long, too deep.
    """
    if len(line) > LINE:
        raise ValueError(f"more than {LINE} bytes")
    if not line.strip():
        raise ValueError("the line is blank, expected a row in each. Take it out")
    try:
        row = json.loads(
            line.decode(),
            object_pairs_hook=_object,
            parse_constant=_decimal,
            parse_int=_integer,
            parse_float=_decimal,
        )
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair, {error.object[error.start]!r}") from error
    except RecursionError as error:
        raise ValueError("too many lists or objects inside one another") from error
    return row


def _lines(path):
    """The lines of a file and, of the file as a whole, its faults so far."""
    path = resolve(path)
    if not os.path.isfile(path):
        raise UserError(
            f"no file {path}: expected JSON lines of the HexaInst schema. "
            "Check the path; `make hexainst-human` builds the human half."
            f"{'' if CLONE else ' HexaInst and the tiny world lie in a clone of the repository.'}"
        )
    try:
        given = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {short(path)}: {error.strerror}. Check its rights."
        ) from error
    for mark, name in (
        (b"\xef\xbb\xbf", "a byte order mark"),
        (b"\xff\xfe", "UTF-16"),
        (b"\xfe\xff", "UTF-16"),
    ):
        if given.startswith(mark):
            return [], [(1, f"the file begins with {name}: save it as UTF-8 without a mark")]
    lines = given.splitlines()
    return lines, [] if lines else [(0, "no rows")]


def validate(
    path, part: bool = False, run_code: bool | str = False
) -> tuple[list[dict], list[tuple[int, str]]]:
    """Read a JSONL file: (rows, faults), a fault being (line number, what is wrong); line 0 = the
    file as a whole.

    path: from the repository, or absolute. `part`: the file holds some categories only, so cells
    are not compared. `run_code`: also execute the references of CODE rows in the sandbox. Raises
    UserError where there is no such file.
    """
    lines, faults = _lines(path)
    rows, seen = [], {}
    for number, line in enumerate(lines, 1):
        try:
            row = read_row(line)
        except ValueError as error:
            faults.append((number, f"bad JSON: {error}"))
            continue
        found = row_faults(row, run_code)
        found += _repeats(row, seen, number, sound=not found)
        faults += [(number, fault) for fault in found]
        rows.append(row)
    if not part and not faults:
        faults += [(0, fault) for fault in _unbalanced(rows)]
    return rows, faults


def _repeats(row, seen, number, sound):
    """Faults of a row whose id or text an earlier line has; `seen` keeps the first line of each."""
    own = {"id": row.get("id")} if isinstance(row, dict) else {}
    if sound:
        own["text"] = " ".join(tokens(text(row)))
    first = {what: seen.setdefault((what, str(key)), number) for what, key in own.items()}
    return [
        f"duplicate {what}: the same as in line {line}"
        for what, line in first.items()
        if line != number
    ]


def _unbalanced(rows):
    cells = Counter((row["half"], row["category"]) for row in rows)
    halves, known = ({cell[i] for cell in cells} for i in (0, 1))
    sizes = {(half, c): cells[half, c] for half in sorted(halves) for c in sorted(known)}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{half}/{c} {n}" for (half, c), n in sizes.items())
        yield f"unbalanced: every half and category needs the same number of rows, found {counts}"
    if len(known) < 2:
        yield f"only one category, {', '.join(known)}: there is nothing to compare it with"


def remarks(rows: list[dict]) -> list[str]:
    """What a sound data set lacks and its user should know: categories without a row, categories
    none of whose rows has a score.
    """
    scored = {c: set() for c in CATEGORIES}
    for row in rows:
        scored[row["category"]].add(row["checker"]["name"] not in checkers.EXECUTES)
    missing = ", ".join(c for c, found in scored.items() if not found)
    silent = ", ".join(c for c, found in scored.items() if found == {False})
    said = [f"no row of {missing}: all results leave it out"] if missing else []
    if silent:
        said.append(f"{silent}: every checker executes the answer, so no score without `run_code`")
    return said


def number_of(faults) -> str:
    """How many, in words: "1 fault", "2 faults"."""
    return f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"


def load(path) -> pd.DataFrame:
    """Validated rows of one JSONL file, columns as SCHEMA. Raises UserError that shows the first
    faults.
    """
    rows, faults = validate(path)
    if faults:
        shown = "; ".join(f"line {n}: {fault}" if n else fault for n, fault in faults[:3])
        raise UserError(
            f"{short(path)} has {number_of(faults)}: {shown}. "
            f"`{COMMAND} validate {short(path)}` prints all."
        )
    return pd.DataFrame(rows, columns=list(SCHEMA))


def load_hexainst(
    half: str | None = None, subset: str = "full", dataset: str = "hexainst", seed: int = 0
) -> pd.DataFrame:
    """Rows of a data set, validated, in file order.

    dataset: "hexainst" (the AI half, and the human half where it is built), "tiny", or a path to
    JSON lines (from the repository, or absolute). half: one half only (a missing human half is
    then an error). subset: "full" or "matched" (`corpus.matched`). Warns of what the rows lack
    (`remarks`). Raises UserError where a file of HexaInst holds another half, or what the other
    file holds.

    >>> load_hexainst(dataset="tiny", half="A").shape                           # doctest: +SKIP
    (600, 9)
    """
    if subset not in ("full", "matched"):
        raise UserError(f"unknown subset {subset!r}: expected 'full' or 'matched'.")
    if half and half not in HALVES:
        raise UserError(f"unknown half {half!r}: expected one of {', '.join(HALVES)}.")
    if dataset == "hexainst":
        names = [half] if half else ["ai"] + ["human"] * (HEXAINST / "human.jsonl").exists()
        frame = pd.concat(_halves(names), ignore_index=True)
    else:
        frame = load(HEXAINST / "tiny.jsonl" if dataset == "tiny" else resolve(dataset))
    if half:
        if half not in set(frame["half"]):
            known = ", ".join(sorted(set(frame["half"])))
            raise UserError(f"unknown half {half!r} of {dataset}: expected one of {known}.")
        frame = frame[frame["half"] == half].reset_index(drop=True)
    for remark in remarks(frame.to_dict("records")):
        warnings.warn(f"data set {dataset}: {remark}.", stacklevel=2)
    return matched(frame, seed=seed) if subset == "matched" else frame


def _halves(names) -> list[pd.DataFrame]:
    """The rows of HexaInst's files: of each its own half, none in two of them."""
    frames, seen = [], {}
    for name in names:
        file = f"{name}.jsonl"
        frames.append(load(HEXAINST / file))
        others = sorted(set(frames[-1]["half"]) - {name})
        found = [f"rows of half {', '.join(others)}, expected {name} alone"] if others else []
        for number, row in enumerate(frames[-1].to_dict("records"), 1):
            again = _repeats(row, seen, f"{number} of {file}", sound=True)
            found += [f"line {number}, {fault}" for fault in again]
        if found:
            raise UserError(
                f"{short(HEXAINST / file)} holds {'; '.join(found[:3])}. Put the {name} half in "
                "its place; `make hexainst-human` builds the human one."
            )
    return frames


def refuse_over(paths) -> None:
    """Raise UserError where a file that is to be written is there already, or a dangling link."""
    if there := [short(path) for path in paths if os.path.lexists(path)]:
        raise UserError(
            f"{', '.join(there)} stands there already and is kept. Name another folder, or move it."
        )


def export(folder, half: str = "ai") -> list[Path]:
    """Write one half as Parquet (full and matched; checker and tags as JSON text) and its data
    card; the paths. Raises UserError where a file of these names is there already.

    Only the AI half is meant to be handed on: the human half's rows keep their sources' licences.
    """
    if find_spec("pyarrow") is None:
        raise UserError(
            "export writes Parquet with pyarrow, which is not installed. Run `pip install pyarrow`."
        )
    folder = Path(folder)
    tables = {folder / f"{half}-{subset}.parquet": subset for subset in ("full", "matched")}
    card = folder / "README.md"
    refuse_over([*tables, card])
    for path, subset in tables.items():
        frame = load_hexainst(half, subset)
        for column in ("checker", "tags"):
            frame[column] = [json.dumps(value, ensure_ascii=False) for value in frame[column]]
        with atomic(path) as draft:
            frame.to_parquet(draft, index=False)
    with atomic(card) as draft:
        shutil.copyfile(HEXAINST / "CARD.md", draft)
    return [*tables, card]
