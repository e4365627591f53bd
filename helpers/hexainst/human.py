"""The human half: 600 rows from public human-written sources, fetched on the user's machine,
pinned, never committed.

    python -m helpers.run human [--local FOLDER] [--run-code]         (make hexainst-human)

`data/hexainst/human_sources.yaml` pins each file by sha256, says what is read from it and in which
words it is asked; `rules` turn upstream rows into rows of ours. The choice among them depends on
the plan and the sources alone: ids and hashes of the rows chosen are committed
(`human_choice.csv`), and a build that chooses others says so. Everything here is ours, not the
paper's.
"""

import hashlib
import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Literal

import pandas as pd
import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from ..paths import HEXAINST, short
from ..record import UserError, atomic, digest, read_json, sha256, write_json, write_table
from .corpus import shingles, text, tokens
from .rules import FREE, RULES, Refused
from .schema import CATEGORIES, load, row_faults, validate
from .sources import fetch, read

PLAN = HEXAINST / "human_sources.yaml"
CHOICE = HEXAINST / "human_choice.csv"
COUNTS = HEXAINST / "human_counts.json"


class Strict(BaseModel, extra="forbid", strict=True):
    """Part of a plan: no key beside these, no value of another type."""


class File(Strict):
    """A file of others: its name here, its sha256, and the wheel or the url that it comes from."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    sha256: str
    wheel: str | None = None
    url: str | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _from_somewhere(self):
        if (self.wheel is None) == (self.url is None):
            raise ValueError("expected a wheel or a url")
        return self


class Wording(Strict, extra="allow"):
    """How a source's rows are asked."""

    say: str


class Source(Strict):
    """What is read of files, and by which rule; rows are named by their number, or their id."""

    category: Literal[CATEGORIES]
    files: list[str]
    member: str | None = None
    rule: Literal[tuple(RULES)]
    at_most: int
    instruction: str
    licence: str
    by: str
    prefer: bool = False
    once: str | None = None
    kind: list[str] = []
    exclude: dict[str, str] = {}
    tasks: dict[str, list | dict | str | None] = {}
    wordings: list[Wording] = []


class Plan(Strict):
    """What `human_sources.yaml` says."""

    seed: int
    rows: int
    longest: int
    bins: dict[int, int]
    near_duplicate: float
    files: dict[str, File]
    sources: dict[str, Source]

    @model_validator(mode="after")
    def _known_files(self):
        for name, source in self.sources.items():
            if unknown := [file for file in source.files if file not in self.files]:
                raise ValueError(f"{name}: files names {unknown[0]!a}, none of the plan's")
        return self


def read_plan(path=PLAN) -> dict:
    """The plan as read from YAML; tasks picked by hand without labels are None. Raises UserError
    for a file that cannot be read, and where it is not as `Plan` has it.
    """
    try:
        plan = yaml.safe_load(Path(path).read_text("utf-8"))
        Plan.model_validate(plan)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(key) for key in fault["loc"])
        raise UserError(
            f"{short(path)}: {where}: {fault['msg']}, found {ascii(fault['input'])[:80]}. Correct "
            "it (a number that is a name stands in quotes), or put the file back from git."
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{short(path)} cannot be read ({reason}). Put it back from git."
        ) from error
    return plan


def upstream(source: dict, files: dict[str, Path]) -> list[tuple[str, dict]]:
    """A source's rows, each with its name: its own id where it has one, else its number from 1.

    `once` names a field: of rows that agree in it only the first is kept; `kind` keeps rows of
    these categories only.
    """
    rows = [row for name in source["files"] for row in read(files[name], source.get("member"))]
    if key := source.get("once"):
        first = {}
        for row in rows:
            first.setdefault(_field(row, key), row)
        rows = list(first.values())
    if kinds := source.get("kind"):
        rows = [row for row in rows if _field(row, "category") in kinds]
    return [
        (str(_field(row, "id")) if "tasks" in source else str(number), row)
        for number, row in enumerate(rows, 1)
    ]


def _field(row, key):
    if key not in row:
        raise UserError(
            f"a row has no field {key!r} (it has {', '.join(map(str, row))[:200]}): its layout is "
            "not the pinned version's. Use the pinned version, or correct human_sources.yaml."
        )
    return row[key]


def candidates(
    name: str, source: dict, rows: list[tuple[str, dict]], longest: int = 250
) -> tuple[list[dict], Counter]:
    """Rows of ours from a source's rows, in its order, and why the others were refused (reason:
    count). The checkers of the rows are tried later, on those that are to be taken.
    """
    found, refused = [], Counter()
    wordings = source.get("wordings") or [{"say": ""}]
    for place, (key, row) in enumerate(rows):
        try:
            if key in source.get("exclude", {}):
                raise Refused(source["exclude"][key])
            if "tasks" in source and key not in source["tasks"]:
                raise Refused("not picked by hand for this category")
            wording = wordings[place % len(wordings)] | {"task": source.get("tasks", {}).get(key)}
            made = RULES[source["rule"]](row, wording)
            _fits(made, longest)
        except Refused as reason:
            refused[str(reason)] += 1
            continue
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"{name}, row {key}: not as the rule {source['rule']!r} expects it "
                f"({type(error).__name__}: {error}). Its layout is not the pinned version's: use "
                "the pinned version, or correct human_sources.yaml."
            ) from error
        shared = f"{name}-{place % len(wordings) + 1:02d}"
        made["tags"] |= {
            "wording": shared if "wordings" in source else f"{name}, row {key}",
            "instruction": source["instruction"],
        }
        head = {"id": "?", "half": "human", "category": source["category"]}
        found.append(head | {"source": f"{name}, row {key}"} | made)
    return found, refused


def _fits(row, longest):
    if len(tokens(text(row))) > longest:
        raise Refused(f"longer than {longest} tokens")
    if len(tokens(row["reference"])) > longest:
        raise Refused(f"its reference is longer than {longest} tokens")


def name_of(row) -> str:
    """The source of a row, by its name in the plan."""
    return row["source"].split(", row ")[0]


def choose(
    found: list[dict], plan: dict, room: dict[str, int], others: list[dict] = ()
) -> tuple[list[dict], dict[str, Counter]]:
    """`plan["rows"]` of a category's candidates, and per source why others were passed over.

    In an order drawn by hashing seed and source: first as many of each length bin as
    `plan["bins"]` says (least: rows), then of any length; at most `room[source]` of a source; no
    row nearly like one taken or one of `others`; no row that fails the validator. Rows of sources
    marked `prefer` come first, FREE ones last.
    """
    preferred = {name for name in room if plan["sources"][name].get("prefer")}
    order = sorted(found, key=lambda row: _rank(plan["seed"], row, preferred))
    bins, room = dict(plan["bins"]), dict(room)
    grams, taken, passed = [shingles(tokens(text(row))) for row in others], {}, {}
    for binned, row in product((True, False), order):
        name, own = name_of(row), tokens(text(row))
        place = max((least for least in bins if least <= len(own)), default=None)
        if len(taken) == plan["rows"]:
            break
        if not room[name] or row["source"] in taken | passed or binned and not bins.get(place):
            continue
        if fault := _fault(row, own := shingles(own), grams, plan["near_duplicate"]):
            passed[row["source"]] = (name, fault)
            continue
        taken[row["source"]] = row
        grams.append(own)
        room[name] -= 1
        if binned:
            bins[place] -= 1
    reasons = {name: Counter(why for n, why in passed.values() if n == name) for name in room}
    return list(taken.values()), reasons


def _fault(row, own, grams, near):
    """Why a row cannot be taken beside the rows whose 3-grams are given; None if it can."""
    if any(len(own & other) > near * len(own | other) for other in grams):
        return "nearly the same as another row"
    faults = row_faults(row)
    return faults[0].split(":")[0].split("'")[0].strip() if faults else None


def _rank(seed, row, preferred):
    drawn = hashlib.sha256(f"{seed} {row['source']}".encode()).hexdigest()
    return row["tags"]["subtask"] == FREE, name_of(row) not in preferred, drawn


def sources_of(plan: dict, files: dict[str, Path], category: str) -> dict[str, dict]:
    """The plan's sources of a category whose files are here."""
    return {
        name: source
        for name, source in plan["sources"].items()
        if source["category"] == category and all(file in files for file in source["files"])
    }


def select(plan: dict, files: dict[str, Path], others: pd.DataFrame) -> tuple[list[dict], dict]:
    """All rows chosen, with ids, and counts per source: offered, taken, refused (reason: count)."""
    chosen, counts = [], {}
    for category in CATEGORIES:
        sources = sources_of(plan, files, category)
        found = []
        for name, source in sources.items():
            rows = upstream(source, files)
            made, refused = candidates(name, source, rows, plan["longest"])
            found += made
            counts[name] = {"offered": len(rows), "taken": 0, "refused": refused}
        near = others[others["category"] == category].to_dict("records")
        room = {name: source["at_most"] for name, source in sources.items()}
        rows, passed = choose(found, plan, room, near)
        if len(rows) < plan["rows"]:
            raise UserError(
                f"{category}: only {len(rows)} of {plan['rows']} rows: the rules accept "
                f"{len(found)} of {', '.join(sources)}. Raise at_most or lower rows in "
                "human_sources.yaml."
            )
        for name in sources:
            counts[name]["refused"] = dict(counts[name]["refused"] + passed[name])
            counts[name]["taken"] = sum(name_of(row) == name for row in rows)
        chosen += [row | {"id": f"human-{category}-{i:03d}"} for i, row in enumerate(rows, 1)]
    return chosen, counts


def gather(plan: dict, cache, local=None) -> tuple[dict[str, Path], list[str]]:
    """Every file of the plan, fetched and verified, and a note on each optional one left out: those
    are never fetched, so that what is built does not hang on a connection.
    """
    local = Path(local).expanduser() if local else None
    if local and not local.is_dir():
        raise UserError(f"--local {local}: no such folder. Give the folder that holds the copies.")
    files, notes = {}, []
    for name, file in plan["files"].items():
        here = [Path(folder) / file["name"] for folder in (local, cache) if folder]
        if file.get("optional") and not any(path.is_file() for path in here):
            notes.append(f"{name} is left out: no {file['name']} in {short(cache)} or --local")
            continue
        files[name] = fetch(file, cache, local)
    return files, notes


def build(
    plan=PLAN, local=None, out=HEXAINST / "human.jsonl", run_code=False, record=False
) -> tuple[Path, dict, list[str]]:
    """Fetch, verify, choose, validate and write the human half: its path, counts per source, and
    notes of what was left out.

    run_code: execute CODE references too. record: write the committed choice and counts anew (for
    maintainers); otherwise the choice is held against them.
    """
    settings = read_plan(plan)
    files, notes = gather(settings, HEXAINST / "sources", local)
    chosen, counts = select(settings, files, load(HEXAINST / "ai.jsonl"))
    choice = listed(chosen)
    with atomic(out) as draft:
        draft.write_text("".join(_line(row) + "\n" for row in chosen), "utf-8")
        if faults := validate(draft, run_code=run_code)[1]:
            raise UserError(
                f"{len(faults)} faults in the human half; line {faults[0][0]}: {faults[0][1]}. "
                "Exclude the row in human_sources.yaml."
            )
        made_of = digest({"plan": settings, "files": sorted(files)})
        if record:
            write_table(CHOICE, choice)
            write_json(COUNTS, {"made_of": made_of, "sha256": sha256(draft), "sources": counts})
        else:
            notes.append(compare(choice, made_of))
    return Path(out), counts, notes


def _line(row):
    return json.dumps(row, ensure_ascii=False)


def listed(rows: list[dict]) -> pd.DataFrame:
    """What is committed of the rows, none of it their text: id, category, source, the row's name
    there, and the sha256 of the row as its JSON line.
    """
    return pd.DataFrame(
        {
            "id": [row["id"] for row in rows],
            "category": [row["category"] for row in rows],
            "source": [name_of(row) for row in rows],
            "row": [row["source"].split(", row ")[1] for row in rows],
            "sha256": [hashlib.sha256(_line(row).encode()).hexdigest() for row in rows],
        }
    )


def compare(choice: pd.DataFrame, made_of: str) -> str:
    """A note that the rows chosen are the committed ones, or that they cannot be compared.

    Raises UserError where plan and sources are the committed ones and the rows are not.
    """
    if read_json(COUNTS)["made_of"] != made_of:
        return f"another plan or other sources than those of {short(CHOICE)}: not compared with it"
    known = pd.read_csv(CHOICE, dtype=str)
    if list(choice["id"]) != list(known["id"]):
        raise UserError(
            f"{len(choice)} rows were chosen, {short(CHOICE)} lists {len(known)} or other ids. "
            "Put it back from git."
        )
    if len(other := choice[(choice != known).any(axis=1)]):
        first = other.iloc[0]
        raise UserError(
            f"{len(other)} of {len(choice)} rows are not those of {short(CHOICE)}, first "
            f"{first['id']} ({first['source']}, row {first['row']}), though plan and sources are "
            "the same. The rules or the checkers were changed: nothing was written."
        )
    return f"all {len(choice)} rows are those of {short(CHOICE)}"


def table() -> str:
    """The datasheet's table of the human half: per source its licence, what was offered and taken,
    and why rows were refused, from the committed counts.
    """
    plan, counts = read_plan(), read_json(COUNTS)["sources"]
    head = "category | source | written by | licence | instruction | offered | taken"
    head = [*head.split(" | "), "refused, and why"]
    lines = [head, ["---"] * len(head)]
    for name, source in plan["sources"].items():
        if name not in counts:
            continue
        offered, taken, refused = (counts[name][key] for key in ("offered", "taken", "refused"))
        why = [f"{n} {reason}" for reason, n in sorted(refused.items(), key=lambda item: -item[1])]
        if rest := offered - taken - sum(refused.values()):
            why.append(f"{rest} not needed")
        cells = [source[key] for key in ("category", "by", "licence", "instruction")]
        lines.append([cells[0], f"`{name}`", *cells[1:], offered, taken, "; ".join(why)])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
