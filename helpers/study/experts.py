"""Experts ablated one at a time: does losing the expert that is most a category's own cost it more
than losing another expert of the layer that is used as much? All is ours, not the paper's.
"""

import numpy as np
import pandas as pd

from ..analysis.controls import expected_at_usage, singles
from ..analysis.effects import slope_of
from ..record import NotTestable
from .evaluate import ablation_matrix
from .sets import most_own, use_of_experts

EFFECTS = ("increase", "expected", "beyond", "low", "high", "p", "sees")
TESTS = ("measured on", "category", *EFFECTS, "n")
NEIGHBOURS = 4  # experts of nearest use that say what an expert's use alone would cost


def alone(study) -> pd.DataFrame:
    """What losing one expert costs: each expert of the layer in which the category's most own one
    stands, rerouted alone, measured on the category's rows.

    The own expert is chosen on the half that is not measured. Columns: measured on, category,
    layer, expert, own (is it that one?), f (its share of the tokens of the category's prompts),
    increase (nats per reference token), expected (the same at its f, from others of the layer, see
    `expected_at_usage`), n (rows), and `rows`: increase and expected of each of these, [n, 2].
    Raises NotTestable where a layer has too few experts for that.
    """
    experts = study.counts().routed.shape[2]
    if experts <= NEIGHBOURS:
        raise NotTestable(
            f"{study.name}: {experts} experts in a layer, and {NEIGHBOURS} others are needed to "
            "say what one's use would cost."
        )
    return pd.DataFrame(
        line
        for half in study.halves
        for place in most_own(study.half(study.other(half)))
        for line in _layer_of(study.half(half), half, **place)
    )


def _layer_of(part, half, category, layer, place, expert) -> list[dict]:
    f = use_of_experts(part.category(category))  # [I, L, E]
    masks = {at[1]: mask for at, mask in singles(f.shape[1:]) if at[0] == place}
    rows, f = part.measured().category(category), f[:, place].mean(0)
    increase = ablation_matrix(rows, masks, "reroute", allow_inert=True).to_numpy()  # [n, E]
    expected = expected_at_usage(increase, np.broadcast_to(f, increase.shape), NEIGHBOURS)
    head = {"measured on": half, "category": category, "layer": layer, "n": len(increase)}
    return [
        head
        | {"expert": e, "own": e == expert, "f": f[e], "increase": increase[:, e].mean()}
        | {"expected": expected[:, e].mean(), "rows": np.c_[increase[:, e], expected[:, e]]}
        for e in masks
    ]


def beyond_use(study, table: pd.DataFrame) -> pd.DataFrame:
    """What the own experts of a table of `alone` cost beyond their use, nats per reference token: a
    row for each half and category, for each with halves pooled ("all"), and so for all categories.

    Columns: measured on, category, increase, expected, beyond, low, high (95 %), p (signs flipped
    over rows, two-sided), sees (the smallest effect found with power 0.8), n.
    """
    own, halves = table[table["own"]], list(study.halves)
    found = []
    for level in ("all", *halves):
        some = own if level == "all" else own[own["measured on"] == level]
        for category in ("all", *study.categories):
            part = some if category == "all" else some[some["category"] == category]
            head = {"measured on": level, "category": category}
            found.append(head | _beyond(part, study.profile))
    return pd.DataFrame(found)


def _beyond(part, profile) -> dict:
    rows = np.concatenate(part["rows"].to_list())  # [n, 2]
    groups = np.repeat(np.arange(len(part)), part["n"])
    row = {"increase": part["increase"].mean(), "expected": part["expected"].mean()}
    try:
        pair = [(rows[:, 0], rows[:, 1:])]
        fit = slope_of(pair, groups, [1.0], profile.resamples, profile.seed)
    except NotTestable:
        return row | {"beyond": row["increase"] - row["expected"], "n": len(rows)}
    ends = dict(zip(("low", "high"), fit["ci"], strict=True)) | {"p": fit["p"], "sees": fit["sees"]}
    return row | {"beyond": fit["estimate"]} | ends | {"n": len(rows)}


def of_all(pairs: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`alone` of several Studies, with low and high of `beyond_use` beside the own experts; their
    `beyond_use`), each with a column `pair`; of none that can be tested, two tables without rows.
    """
    singly, tests, keys = [], [], ["measured on", "category"]
    for name, study in pairs.items():
        try:
            table = alone(study)
        except NotTestable:
            continue
        found = beyond_use(study, table).reindex(columns=list(TESTS))
        beside = table[keys].merge(found[[*keys, "low", "high"]], how="left")
        table = table.drop(columns="rows").assign(low=beside["low"], high=beside["high"])
        table.loc[~table["own"], ["low", "high"]] = np.nan
        singly.append(table.assign(pair=name))
        tests.append(found.assign(pair=name))
    if not singly:
        return pd.DataFrame(columns=["pair"]), pd.DataFrame(columns=["pair", *TESTS])
    return pd.concat(singly, ignore_index=True), pd.concat(tests, ignore_index=True)


def numbers_of(tests: pd.DataFrame) -> dict:
    """The headline numbers of one pair's `beyond_use`, as data/claims.csv names them."""
    found = {}
    for row in tests[(tests["category"] == "all") & tests["p"].notna()].to_dict("records"):
        key = f"ablation.single.experts.{row['measured on']}"
        found |= {f"{key}.beyond": row["beyond"], f"{key}.beyond_ci": [row["low"], row["high"]]}
        found |= {f"{key}.p": row["p"], f"{key}.sees": row["sees"]}
    return found


def sentences(singly: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """What `of_all` says, pair by pair."""
    if tests.empty:
        return ["No pair here has experts enough to be ablated one at a time."]
    said = []
    for pair, part in tests.groupby("pair", sort=False):
        pooled = part[part["measured on"] == "all"].set_index("category")
        row, each = pooled.loc["all"], pooled.drop("all")
        held = each.index[each["low"] > 0].to_list()
        mine = singly[singly["pair"] == pair]
        layers = mine.groupby(["measured on", "category"])["increase"]
        worst = mine.loc[layers.idxmax(), "own"]
        said.append(
            f"{pair}: rerouting the expert that is most a category's own costs "
            f"{row['increase']:.3f} nats per token; other experts of its layer would cost "
            f"{row['expected']:.3f} at its use. The difference is {row['beyond']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] (null 0; detectable from {row['sees']:.3f}). "
            f"Category by category the interval lies above 0 in {', '.join(held) or 'none'}. Of "
            f"{len(worst)} layers, {worst.sum()} lose most by the own expert."
        )
    return said
