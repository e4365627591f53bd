"""The ledger of claims: each is looked up in the summary's numbers and judged by its declared rule.

A row of data/claims.csv names keys of the summary with {unit} (the kind of component, or a score),
{half} and perhaps {category} left open; its `null` is a key or a number; `detectable` is a key, or
empty where the test says no such number of its own. A *test* is one claim for one kind of
component, pair and half (and category).
"""

import csv
import re
from itertools import product

import numpy as np
import pandas as pd

from ..analysis.stats import SEEN_TWO_SIDED, adjust
from ..config import SCORES
from ..paths import CLAIMS, short
from ..record import UserError

TEST = ["id", "components", "pair", "half", "category"]
LEVEL = 0.05
TUNINGS = "tunings"  # what these claims need: the tables of data/tuning
NEEDS = ("", "pair", TUNINGS)
FILLED = ("id", "claim", "components", "effect", "ci", "null", "p", "rule")  # never empty
OTHERS = ("unit", "needs", "source", "grade", "statistic")
OTHERS += ("detectable", "replaces", "headline", "amended")
KEYS, OPEN = ("effect", "ci", "null", "p", "detectable"), re.compile(r"{(unit|half|category)}")


def read_ledger(path=CLAIMS, tunings: bool = False) -> pd.DataFrame:
    """The claims as declared, a row each, every cell a text (empty where there is nothing): those
    of the chain's pairs or, with `tunings`, those of the real model's tunings (`make tune`).

    Raises UserError for a file that is no such table, and for a claim that stands twice, lacks what
    it is judged by, or replaces one that is not there.
    """
    claims = _declared(path)
    if faults := _faults(claims):
        raise UserError(f"{short(path)}: {'; '.join(faults[:3])}. Mend the rows and run again.")
    return claims[(claims["needs"] == TUNINGS) == tunings].reset_index(drop=True)


def _declared(path) -> pd.DataFrame:
    form = "expected commas between cells, UTF-8. Put the committed file back, or save it so."
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{short(path)} is no table of claims ({error}): {form}") from error
    if wrong := [name for name in (*FILLED, *OTHERS) if header.count(name) != 1]:
        raise UserError(f"{short(path)} has not one column {', '.join(wrong)}: {form}")
    if wrong := [row for row in rows if len(row) != len(header)]:
        raise UserError(
            f"{short(path)}: the row {wrong[0][0][:60]!a} has {len(wrong[0])} cells, expected "
            f"{len(header)}. Complete it, and put quotes around a cell that holds a comma."
        )
    return pd.DataFrame(rows, columns=header, dtype=str)


def _faults(claims) -> list[str]:
    """What is wrong with the rows, in words."""
    names = claims["id"].tolist()
    found = [] if names else ["no claim stands there"]
    found += [f"{name!a} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    for row in claims.to_dict("records"):
        name, replaced = row["id"], row["replaces"].split()
        found += [f"{name!a} has no {column}" for column in FILLED if not row[column].strip()]
        if row["needs"] not in NEEDS:
            found.append(f"{name!a} needs {row['needs']!a}, expected one of {', '.join(NEEDS[1:])}")
        found += [f"{name!a} replaces {old!a}, no claim" for old in replaced if old not in names]
        found += [
            f"{name!a} leaves more open in its {column} than {{unit}}, {{half}} and {{category}}"
            for column in KEYS
            if re.search("[{}]", OPEN.sub("", row[column]))
        ]
    return found


def look_up(ledger, numbers: dict, halves, categories) -> pd.DataFrame:
    """Every test that the numbers {pair: {key: value}} hold: TEST, effect, low, high, null, p,
    detectable (the smallest effect that would be found in 4 of 5 experiments, in the claim's unit:
    the test's own number, else 2.8 standard errors of the interval).

    Keys that a pair does not have (routed experts in a dense model) give no test.
    """
    found = []
    for row in ledger.to_dict("records"):
        by_half = halves if "{half}" in row["effect"] else ["all"]
        by_category = categories if "{category}" in row["effect"] else [""]
        places = product([row["id"]], row["components"].split(), numbers, by_half, by_category)
        for place in places:
            where = dict(zip(TEST, place, strict=True))
            found += _test(row, numbers[where["pair"]], where)
    return pd.DataFrame(found, columns=[*TEST, "effect", "low", "high", "null", "p", "detectable"])


def _test(row, numbers, where) -> list[dict]:
    names = {"unit": where["components"], "half": where["half"], "category": where["category"]}
    effect, ci, null, p = (row[column].format(**names) for column in ("effect", "ci", "null", "p"))
    if numbers.get(effect) is None:
        return []
    low, high = numbers[ci]
    null = numbers[null] if null in numbers else float(null)
    own = numbers.get(row["detectable"].format(**names))
    # an interval of 95 % reaches 1.96 standard errors to either side
    found = {"effect": numbers[effect], "low": low, "high": high, "null": null, "p": numbers[p]}
    found["detectable"] = SEEN_TWO_SIDED * (high - low) / (2 * 1.96) if own is None else own
    return [where | found]


def first_example(ledger, numbers: dict):
    """What is worked by hand: (claim, kind of component, pair) of the first test on all data that
    the numbers {pair: {key: value}} hold, None where they hold none.

    Claims about each category are passed over.
    """
    tests = look_up(ledger, numbers, ["all"], [])
    if not len(tests):
        return None
    name, component, pair = tests.loc[0, TEST[:3]]
    return ledger[ledger["id"] == name].iloc[0], component, pair


def judge(tests: pd.DataFrame) -> pd.DataFrame:
    """The tests with `holm` and `supported`: the interval lies above the null and Holm p < 0.05.

    Holm runs over all tests of a claim; where a claim asks of each category, over the categories
    of one kind of component, pair and half.
    """
    tests = tests.assign(holm=np.nan)
    for _, claim in tests.groupby("id", sort=False):
        whole = (claim["category"] == "").all()
        families = [claim] if whole else [part for _, part in claim.groupby(TEST[:4], sort=False)]
        for family in families:
            tests.loc[family.index, "holm"] = adjust(family["p"].to_numpy(float), "holm")
    tests["supported"] = (tests["low"] > tests["null"]) & (tests["holm"] < LEVEL)
    return tests


def verdicts(ledger, tests: pd.DataFrame, single=()) -> pd.DataFrame:
    """One row per claim and kind of component: id, components, verdict, tests, supported,
    detectable, unit, where, replaced_by.

    verdict  supported (all tests), not supported (none), mixed; "needs a pair" where all pairs are
             in `single` (models without a base) and the claim compares two; else "not testable",
             also for a claim about each category that holds in all that could be tested, but not
             all could
    detectable  what *every* test of the row would have found with power 0.8 (the least sensitive
             one's number), in `unit`: read it beside "not supported"
    where    of claims about each category: in how many of them, pair by pair, halves pooled
    replaced_by  the claims of the ledger that are to be read in its place
    """
    newer = _newer(ledger)
    rows, asked = [], tests.loc[tests["category"] != "", "category"].nunique()
    for claim in ledger.to_dict("records"):
        for component in claim["components"].split():
            part = tests[(tests["id"] == claim["id"]) & (tests["components"] == component)]
            each = part[part["category"] != ""]
            if len(each):
                part = each[each["half"] == "all"]
            where = [
                f"{pair}: in {group.sum()} of {asked} categories{_untested(asked - len(group))}"
                for pair, group in part.groupby("pair", sort=False)["supported"]
                if len(each)
            ]
            verdict = _verdict(part["supported"])
            if verdict == "supported" and len(each) and (part.groupby("pair").size() < asked).any():
                verdict = "not testable"
            if not len(part) and claim["needs"] == "pair" and single:
                verdict = "needs a pair"
            rows.append(
                {
                    "id": claim["id"],
                    "components": component,
                    "verdict": verdict,
                    "tests": len(part),
                    "supported": int(part["supported"].sum()),
                    "detectable": round(part["detectable"].max(), 4) if len(part) else None,
                    "unit": claim.get("unit", ""),
                    "where": "; ".join(where),
                    "replaced_by": " ".join(newer.get(claim["id"], ())),
                }
            )
    return pd.DataFrame(rows)


def _newer(ledger) -> dict[str, list[str]]:
    """The claims that replace each replaced one."""
    found = {}
    for claim in ledger.to_dict("records"):
        for old in claim.get("replaces", "").split():
            found.setdefault(old, []).append(claim["id"])
    return found


def _untested(number: int) -> str:
    return f" ({number} not testable)" if number else ""


def _verdict(supported) -> str:
    if not len(supported):
        return "not testable"
    if supported.all():
        return "supported"
    return "mixed" if np.any(supported) else "not supported"


def replaced(ledger, found: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of replaced claims beside those that replace them: id, components, verdict, by,
    new verdict (of the same components; of neurons those of the scores that choose them, where the
    newer claim is about scores).
    """
    rows = []
    for claim in ledger[ledger["replaces"] != ""].to_dict("records"):
        new = found[found["id"] == claim["id"]].set_index("components")["verdict"]
        by_score = "; ".join(f"{score}: {said}" for score, said in new.items() if score in SCORES)
        for old in found[found["id"].isin(claim["replaces"].split())].itertuples():
            said = new.get(old.components) or f"not asked of {old.components}"
            if old.components == "neurons" and "neurons" not in new:
                said = by_score or said
            rows.append((old.id, old.components, old.verdict, claim["id"], said))
    return pd.DataFrame(rows, columns=["id", "components", "verdict", "by", "new verdict"])


def forest_table(ledger, tests: pd.DataFrame) -> pd.DataFrame:
    """A row per claim, kind of component and pair on all data, as plots.claims.forest draws it.

    A claim about each category is shown by the mean over the categories of effect, bounds and null
    (the bounds' mean is wider than the mean's interval), supported where all categories are, and
    all could be tested.
    """
    measure = ledger.set_index("id")["unit"]
    part = tests[(tests["half"] == "all") & tests["id"].isin(ledger["id"])]
    values = ["effect", "low", "high", "null", "supported"]
    grouped = part.groupby(["id", "components", "pair"], sort=False)[values]
    table = grouped.mean().reset_index()
    asked = tests.loc[tests["category"] != "", "category"].nunique()
    each = part.loc[part["category"] != "", "id"].unique()
    whole = (grouped.size().to_numpy() == asked) | ~table["id"].isin(each)
    table["supported"] = (table["supported"] == 1) & whole
    table["claim"] = table["id"] + ", " + table["components"]
    return table.assign(measure=table["id"].map(measure)).sort_values(
        "measure", kind="stable", ignore_index=True
    )


def keyed(found: pd.DataFrame) -> dict[str, str]:
    """{"id.components": verdict}, as the summary keeps it."""
    return {f"{row.id}.{row.components}": row.verdict for row in found.itertuples()}


def sentences(ledger, found: pd.DataFrame) -> list[str]:
    """One sentence per headline claim: the claim, its verdicts, and where it holds."""
    said = []
    for claim in ledger[ledger["headline"] == "yes"].to_dict("records"):
        rows = found[found["id"] == claim["id"]]
        verdicts = "; ".join(
            f"{row.components}: {row.verdict}" + (f" ({row.where})" if row.where else "")
            for row in rows.itertuples()
        )
        said.append(f"{claim['claim']}. {verdicts}.")
    return said
