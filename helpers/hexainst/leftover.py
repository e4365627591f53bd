"""Rows to tune on: what the human half's sources hold beside its 600 rows. None stands in HexaInst,
none is nearly a row of it.

The same pinned files, rules and wordings; `gather_rows` makes them on the user's machine and they
are never committed, only counted (`counted`) and hashed. Everything here is ours, not the paper's.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ..paths import HEXAINST, short
from ..record import DamagedFile, UserError, atomic, digest
from .corpus import shingles, text, texts, tokens
from .human import candidates, choose, gather, name_of, read_plan, sources_of, upstream
from .rules import draft
from .schema import CATEGORIES, SCHEMA, read_row

MOST = 600  # rows of a category, shared among its sources as in the human half
READ = ("id", "category", "source", "instruction", "input", "reference", "tags")  # of a row


def gather_rows(
    hexainst: pd.DataFrame, most: int = MOST, local=None, plan: dict | None = None
) -> pd.DataFrame:
    """At most `most` rows of each category, in the columns of HexaInst, from the plan's sources.

    hexainst: all its rows, both halves; a row that stands there, or shares more than the plan's
    `near_duplicate` of its word 3-grams with one, or with one taken before, is passed over. The
    order is drawn by hashing, as in the human half. A category may end with fewer rows: see
    `counted`. Raises UserError where `hexainst` has no human half, or a source cannot be fetched.
    """
    if "human" not in set(hexainst["half"]):
        raise UserError(
            "HexaInst's human half is not here, so no row can be told from its rows. "
            "Run `make hexainst-human`."
        )
    plan = plan or read_plan()
    files, _ = gather(plan, HEXAINST / "sources", local)
    known, taken = hexainst.to_dict("records"), []
    standing = {row["source"] for row in known}
    for category in CATEGORIES:
        sources = sources_of(plan, files, category)
        found = []
        for name, source in sources.items():
            made, _ = candidates(name, source, upstream(source, files), plan["longest"])
            found += [row for row in made if row["source"] not in standing]
        room = {n: -(-most * source["at_most"] // plan["rows"]) for n, source in sources.items()}
        rows, _ = choose(found, plan | {"rows": most, "bins": {}}, room, known)
        if len(rows) < most:
            rows += _unchecked(sources, files, plan, known + rows)
        taken += [row | {"id": f"left-{category}-{n:03d}"} for n, row in enumerate(rows, 1)]
    rows = pd.DataFrame(taken)
    refuse_overlap(rows, hexainst, plan["near_duplicate"])
    return rows


def _unchecked(sources, files, plan, known) -> list[dict]:
    """Tasks that were picked by hand for a category, in their own words alone: no checker is fair
    to them, and none is needed to learn from them.
    """
    found, held = [], {row["source"] for row in known}
    for name, source in sources.items():
        for key, task in upstream(source, files) if "tasks" in source else ():
            if key not in source["tasks"] or f"{name}, row {key}" in held:
                continue
            one = task["instances"][0]
            made = draft(task["instruction"], one["input"], one["output"], {}, subtask="own words")
            made["tags"] |= {"wording": f"{name}, row {key}", "instruction": "human"}
            short_enough = max(len(tokens(text(made))), len(tokens(made["reference"])))
            if made["reference"] and short_enough <= plan["longest"]:
                head = {"half": "human", "category": source["category"]}
                found.append(head | {"source": f"{name}, row {key}"} | made)
    if not found:
        return []
    alike = nearest(texts(pd.DataFrame(found)), texts(pd.DataFrame(known)))
    near = {row.row for row in alike.itertuples() if row.jaccard > plan["near_duplicate"]}
    return [row for place, row in enumerate(found) if place not in near]


def refuse_overlap(rows: pd.DataFrame, hexainst: pd.DataFrame, near: float = 0.5) -> None:
    """Raise UserError if a row to tune on stands in HexaInst, or is nearly a row of it: the same
    text, the same row of a source, or more than `near` of their word 3-grams in common (Jaccard).
    """
    held = {digest(said): name for said, name in zip(texts(hexainst), hexainst["id"], strict=True)}
    if "source" in rows and "source" in hexainst:
        held |= dict(zip(hexainst["source"], hexainst["id"], strict=True))
    for row in rows.to_dict("records"):
        if name := held.get(digest(text(row))) or held.get(row.get("source")):
            raise UserError(_taught(row, name))
    alike = nearest(texts(rows), texts(hexainst))
    if len(alike) and alike["jaccard"].max() > near:
        worst = alike.loc[alike["jaccard"].idxmax()]
        raise UserError(
            _taught(rows.iloc[int(worst["row"])], hexainst["id"].iloc[int(worst["other"])])
        )


def _taught(row, name):
    return (
        f"row {row['id']} to tune on stands in HexaInst, or nearly so ({name}): what is measured "
        "there would have been taught. Remove the row, or gather the rows again."
    )


def nearest(some: list[str], others: list[str]) -> pd.DataFrame:
    """Of each text the most alike one of others, by word 3-grams: row, other, jaccard; texts that
    share none are left out.
    """
    grams, index = [shingles(tokens(said)) for said in others], {}
    for place, own in enumerate(grams):
        for gram in own:
            index.setdefault(gram, []).append(place)
    found = []
    for row, said in enumerate(some):
        own = shingles(tokens(said))
        shared = np.bincount(
            [place for gram in own for place in index.get(gram, ())], minlength=len(others)
        )
        union = np.array([len(own) + len(other) for other in grams]) - shared
        jaccard = shared / np.maximum(union, 1)
        if jaccard.any():
            best = int(jaccard.argmax())
            found.append({"row": row, "other": best, "jaccard": float(jaccard[best])})
    return pd.DataFrame(found, columns=["row", "other", "jaccard"])


def plain_text(rows: pd.DataFrame) -> list[str]:
    """The rows' human words as documents without any instruction: of each row what was given (its
    own instruction where that is the human part) and, as a document of its own, its reference.

    What was asked and what answers it never stand in one document. Order: all that was given, then
    all references, as the rows stand.
    """
    given = [
        row["input"] if row["input"] and row["tags"]["instruction"] == "ours" else text(row)
        for row in rows.to_dict("records")
    ]
    return given + rows["reference"].to_list()


def counted(rows: pd.DataFrame, encoded=None) -> pd.DataFrame:
    """What may be committed of rows to tune on: category, source, rows, and, where they are
    `encoded` (see study.reading), the tokens that are read and those that teach.
    """
    sizes = {
        "tokens": [len(one.ids) for one in encoded] if encoded else 0,
        "taught": [sum(one.counted) for one in encoded] if encoded else 0,
    }
    table = rows.assign(source=[name_of(row) for row in rows.to_dict("records")], **sizes)
    grouped = table.groupby(["category", "source"], sort=False)
    return grouped[["tokens", "taught"]].sum().assign(rows=grouped.size()).reset_index()


def save_rows(path, rows: pd.DataFrame) -> None:
    """Write rows as JSON lines; whole or not at all."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows.to_dict("records")]
    with atomic(path) as draft:
        draft.write_text("".join(lines), "utf-8")


def read_rows(path) -> pd.DataFrame:
    """Rows that `save_rows` wrote. Raises DamagedFile where they are missing or something else."""
    try:
        rows = [_row(line) for line in Path(path).read_bytes().splitlines()]
        if not rows:
            raise ValueError("it is empty")
        return pd.DataFrame(rows)
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{short(path)} holds no rows to tune on ({str(error)[:100]}). Gather them with "
            "`python -m helpers.run tune --gather`."
        ) from error


def _row(line):
    row = read_row(line)
    if not (isinstance(row, dict) and all(isinstance(row.get(key), SCHEMA[key]) for key in READ)):
        raise ValueError(f"found {ascii(row)[:40]}, expected {', '.join(READ)}")
    if not isinstance(row["tags"].get("instruction"), str):
        raise ValueError("a row without tags.instruction")
    return row


def rows_digest(rows: pd.DataFrame) -> str:
    """A digest of what is read of the rows, and in which order."""
    return digest([[row["id"], text(row), row["reference"]] for row in rows.to_dict("records")])
