"""A data set described: what words alone tell of a row's category, what its checkers accept, what
its readers changed.
"""

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from ..analysis.stats import SMALLEST, clustered_share
from ..hexainst.checkers import check
from ..hexainst.corpus import predict_category, wordings
from ..hexainst.schema import HEXAINST
from ..paths import short
from ..record import DamagedFile, read_json

TALLY = {
    "reading": str,
    "category": str,
    "read": int,
    "changed": int,
    "replaced": int,
    "by_point": dict,
}
SAMPLE = {"drawn": [], "faulty": []}  # of a reading that drew none

WRONG = "I do not know."


def compared_with(rows: pd.DataFrame, dataset: str, ai, matched) -> dict[str, pd.DataFrame]:
    """Data sets whose words are compared: each half of the chain's rows, unless these are HexaInst
    itself, and the AI half whole and matched in length.
    """
    halves = {} if dataset == "hexainst" else dict(list(rows.groupby("half", sort=False)))
    chain = {f"chain, {half}": part for half, part in halves.items()}
    return chain | {"AI half, full": ai, "AI half, matched": matched}


def lexical(parts: dict[str, pd.DataFrame], seed: int = 0) -> pd.DataFrame:
    """How often a row's category is guessed right from its words alone (`predict_category`, within
    each set of rows): columns set, category ("all", too), n, right, low, high (95 %,
    `clustered_share` by wording), chance (1 / categories).
    """
    out = []
    for name, rows in parts.items():
        right = predict_category(rows, seed=seed) == rows["category"].to_numpy()
        clusters, category = wordings(rows), rows["category"].to_numpy()
        names = list(dict.fromkeys(category))
        for own in ("all", *names):
            here = np.ones(len(rows), bool) if own == "all" else category == own
            few = len(np.unique(clusters[here])) < SMALLEST
            low, high = clustered_share(right[here], None if few else clusters[here])
            found = {"set": name, "category": own, "n": int(here.sum())}
            found |= {"right": right[here].mean(), "low": low, "high": high}
            out.append(found | {"chance": 1 / len(names)})
    return pd.DataFrame(out)


def confusions(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Share of each category's rows (index) that their words put into each category (columns)."""
    names = list(dict.fromkeys(rows["category"]))
    guess = pd.Series(predict_category(rows, seed=seed), rows.index, name="guess")
    table = pd.crosstab(rows["category"], guess, normalize="index")
    return table.reindex(index=names, columns=names, fill_value=0.0)


def checked(rows: pd.DataFrame) -> pd.DataFrame:
    """Per category: rows, references and wrong answers (WRONG) that pass the row's own checker,
    rows whose checker would have to run code, and may not here.
    """
    records = rows.to_dict("records")
    right = [check(row, row["reference"]) for row in records]
    wrong = [check(row, WRONG) for row in records]
    table = pd.DataFrame({"category": rows["category"], "right": right, "wrong": wrong})
    by = table.groupby("category", sort=False)
    return pd.DataFrame(
        {
            "rows": by.size(),
            "references pass": by["right"].sum().astype(int),
            "wrong answers pass": by["wrong"].sum().astype(int),
            "not scored": by["right"].apply(lambda column: column.isna().sum()),
        }
    )


def tallies(path=HEXAINST / "review.json") -> list[dict]:
    """What the readers of the AI half wrote down, a record for each reading and category. Raises
    DamagedFile for a file that holds something else.
    """
    found = read_json(path)
    sound = isinstance(found, list) and all(map(_is_tally, found))
    if not (sound and any(tally.get("sample", SAMPLE)["drawn"] for tally in found)):
        raise DamagedFile(
            f"{short(path)} is no list of readings: expected {', '.join(TALLY)} in each, and in "
            "some a sample, drawn and faulty. Put the committed file back."
        )
    return found


def _is_tally(one) -> bool:
    if not isinstance(one, dict):
        return False
    sample = one.get("sample", SAMPLE)
    lists = [sample.get(name) for name in SAMPLE] if isinstance(sample, dict) else [None]
    typed = all(type(one.get(name)) is kind for name, kind in TALLY.items())
    return typed and all(isinstance(rows, list) for rows in lists)


def readings(path=HEXAINST / "review.json") -> pd.DataFrame:
    """What the readers of the AI half did, as recorded: columns reading, category, read, changed,
    replaced, drawn and faulty (rows of a random sample, and those with a fault; 0 without one).
    """
    table = pd.DataFrame(tallies(path))
    sample = table["sample"] if "sample" in table else pd.Series(None, table.index)
    for name in ("drawn", "faulty"):
        table[name] = [len(one[name]) if isinstance(one, dict) else 0 for one in sample]
    return table[["reading", "category", "read", "changed", "replaced", "drawn", "faulty"]]


def fault_rate(table: pd.DataFrame) -> dict[str, float]:
    """Of `readings`: rows drawn at random, faulty ones, their share and its interval (Wilson)."""
    drawn, faulty = int(table["drawn"].sum()), int(table["faulty"].sum())
    low, high = proportion_confint(faulty, drawn, method="wilson")
    return {"drawn": drawn, "faulty": faulty, "share": faulty / drawn, "low": low, "high": high}


def findings(words: pd.DataFrame, faults: dict) -> list[str]:
    """What `lexical` and `fault_rate` say, a sentence for each set and one for the readers."""
    lines = [
        f"{row['set']}: the words alone give the right category in a share of {row['right']:.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}] of {row['n']} rows (chance {row['chance']:.2f}); "
        f"{_hardest(words[words['set'] == row['set']])}"
        for row in words[words["category"] == "all"].to_dict("records")
    ]
    return [
        *lines,
        f"AI half: of {faults['drawn']} rows drawn at random, a second reader found a fault in "
        f"{faults['faulty']}: {faults['share']:.3f} [{faults['low']:.3f}, {faults['high']:.3f}].",
    ]


def _hardest(table):
    own = table[table["category"] != "all"]
    if own["right"].nunique() == 1:
        return "equally in every category."
    row = own.loc[own["right"].idxmin()]
    return f"the lowest share is in {row['category']}: {row['right']:.3f}."
