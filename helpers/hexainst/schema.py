"""HexaInst: six categories of instructions, one row each, as JSON lines: schema, validation,
loading, export.

A row: id, half ("ai" | "human"; "A" | "B" in the tiny world), category, source, instruction, input
(may be empty), reference, checker ({"name": ..., arguments}: see checkers.py), tags (subtask,
difficulty, wording, domain; may be empty in the tiny world). A HexaInst-style reconstruction: no
public release of the paper's data set was found.
"""

import json
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pandas as pd

from ..paths import HEXAINST, resolve, short
from ..record import UserError, atomic
from . import checkers, expressions
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


def row_faults(row, run_code: bool = False) -> list[str]:
    """What is wrong with one row (a value read from JSON); empty when sound. `run_code`: execute
    its reference too.
    """
    if not isinstance(row, dict):
        return [f"a row must be an object, found {type(row).__name__}"]
    found = [f"missing field {key!r}" for key in SCHEMA if key not in row]
    found += [
        f"unknown field {key!r}: expected {', '.join(SCHEMA)}" for key in row if key not in SCHEMA
    ]
    found += [
        f"{key} must be {kind.__name__}, found {type(row[key]).__name__}"
        for key, kind in SCHEMA.items()
        if key in row and not isinstance(row[key], kind)
    ]
    if found:
        return found
    found += [
        f"empty {key}"
        for key in ("id", "source", "instruction", "reference")
        if not row[key].strip()
    ]
    if row["category"] not in CATEGORIES:
        found.append(
            f"unknown category {row['category']!r}: expected one of {', '.join(CATEGORIES)}"
        )
    if row["half"] not in HALVES:
        found.append(f"unknown half {row['half']!r}: expected one of {', '.join(HALVES)}")
    elif row["half"] in ("ai", "human"):
        found += [f"tags: missing {key!r}" for key in TAGS if not row["tags"].get(key)]
    name, wrong = row["checker"].get("name"), WRONG
    if row["half"] in ("ai", "human"):
        wrong += (text(row), row["input"])
    try:
        if faults := checkers.faults(row["checker"]):
            return found + faults
        if checkers.check(row, row["reference"], run_code) == 0:
            found.append(
                f"checker {name} rejects the row's own reference {row['reference'][:60]!r}"
            )
        found += [
            f"checker {name} accepts a wrong answer: {answer[:60]!r}"
            for answer in dict.fromkeys(wrong)
            if checkers.check(row, answer, run_code)
        ]
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        re.error,
        expressions.Refused,
    ) as error:
        found.append(f"checker {name} has a bad argument ({type(error).__name__}: {error})")
    return found


def validate(
    path, part: bool = False, run_code: bool = False
) -> tuple[list[dict], list[tuple[int, str]]]:
    """Read a JSONL file: (rows, faults), a fault being (line number, what is wrong); line 0 = the
    file as a whole.

    `part`: the file holds some categories only, so cells are not compared. `run_code`: also
    execute the references of CODE rows in the sandbox. Raises UserError where there is no such
    file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no file {short(path)}: expected JSON lines of the HexaInst schema. "
            "Check the path; `make hexainst-human` builds the human half."
        )
    rows, faults, seen = [], [], {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line.decode())
        except ValueError as error:
            faults.append((number, f"bad JSON: {error}"))
            continue
        found = row_faults(row, run_code)
        faults += [(number, fault) for fault in found]
        if isinstance(row, dict):
            for what, key in (
                ("id", row.get("id")),
                ("text", None if found else " ".join(tokens(text(row)))),
            ):
                if (
                    key is not None
                    and (first := seen.setdefault((what, str(key)), number)) != number
                ):
                    faults.append((number, f"duplicate {what}: the same as in line {first}"))
        rows.append(row)
    if not rows:
        faults.append((0, "no rows"))
    elif not part and not faults:
        cells = Counter((row["half"], row["category"]) for row in rows)
        cells = {
            (half, c): cells[half, c] for half in {row["half"] for row in rows} for c in CATEGORIES
        }
        if len(set(cells.values())) > 1:
            counts = ", ".join(f"{half}/{c} {n}" for (half, c), n in sorted(cells.items()))
            faults.append(
                (
                    0,
                    f"unbalanced: every half and category needs the same number of rows, found {counts}",
                )
            )
    return rows, faults


def load(path) -> pd.DataFrame:
    """Validated rows of one JSONL file, columns as SCHEMA. Raises UserError that shows the first
    faults.
    """
    rows, faults = validate(path)
    if faults:
        shown = "; ".join(f"line {number}: {fault}" for number, fault in faults[:3])
        raise UserError(
            f"{short(path)} has {len(faults)} faults: {shown}. "
            f"`python -m helpers.run validate {short(path)}` prints all."
        )
    return pd.DataFrame(rows, columns=list(SCHEMA))


def load_hexainst(
    half: str | None = None, subset: str = "full", dataset: str = "hexainst", seed: int = 0
) -> pd.DataFrame:
    """Rows of a data set, validated, in file order.

    dataset: "hexainst" (the AI half, and the human half where it is built), "tiny", or a path to
    JSON lines. half: one half only (a missing human half is then an error). subset: "full" or
    "matched" (`corpus.matched`).

    >>> load_hexainst(dataset="tiny", half="A").shape                           # doctest: +SKIP
    (600, 9)
    """
    if subset not in ("full", "matched"):
        raise UserError(f"unknown subset {subset!r}: expected 'full' or 'matched'.")
    if dataset == "hexainst":
        names = [half] if half else ["ai"] + ["human"] * (HEXAINST / "human.jsonl").exists()
        frame = pd.concat([load(HEXAINST / f"{name}.jsonl") for name in names], ignore_index=True)
    else:
        frame = load(HEXAINST / "tiny.jsonl" if dataset == "tiny" else resolve(dataset))
    if half:
        if half not in set(frame["half"]):
            known = ", ".join(sorted(set(frame["half"])))
            raise UserError(f"unknown half {half!r} of {dataset}: expected one of {known}.")
        frame = frame[frame["half"] == half].reset_index(drop=True)
    return matched(frame, seed=seed) if subset == "matched" else frame


def export(folder, half: str = "ai") -> list[Path]:
    """Write one half as Parquet (full and matched; checker and tags as JSON text) and its data
    card; the paths.

    Only the AI half is meant to be handed on: the human half's rows keep their sources' licences.
    """
    if find_spec("pyarrow") is None:
        raise UserError(
            "export writes Parquet with pyarrow, which is not installed. Run `pip install pyarrow` first."
        )
    folder, paths = Path(folder), []
    for subset in ("full", "matched"):
        frame = load_hexainst(half, subset)
        for column in ("checker", "tags"):
            frame[column] = [json.dumps(value, ensure_ascii=False) for value in frame[column]]
        paths.append(folder / f"{half}-{subset}.parquet")
        with atomic(paths[-1]) as draft:
            frame.to_parquet(draft, index=False)
    return [*paths, Path(shutil.copyfile(HEXAINST / "CARD.md", folder / "README.md"))]
