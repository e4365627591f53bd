"""Experts ablated one at a time: does losing the expert that is most a category's own cost it more
than losing another expert of the layer that is used as much? All is ours, not the paper's.
"""

import numpy as np
import pandas as pd

from ..analysis.controls import expected_at_usage, singles
from ..analysis.effects import exchange, slope_of
from ..analysis.sets import frequency
from ..record import NotTestable, UserError
from .evaluate import ablation_matrix
from .sets import drawn_as_one, most_own, pattern_numbers

NEIGHBOURS = 4  # experts of nearest use that say what an expert's use alone would cost
SINGLE = ("measured on", "category", "layer", "expert", "own", "f", "increase", "expected", "n")
EFFECTS = ("increase", "expected", "beyond", "low", "high", "p", "p_sets", "sees")
TESTS = ("measured on", "category", *EFFECTS, "n", "note")
ALL = "all"


def alone(study) -> pd.DataFrame:
    """What losing one expert costs: each expert of the layer in which the category's most own one
    stands, rerouted alone, measured on the category's rows.

    The own expert is chosen on the prompts of the half that is not measured. Columns: measured on,
    category, layer, expert, own (is it that one?), f (its share of the tokens of the category's
    prompts and references), increase (nats per reference token), expected (the same at its f, from
    others of the layer, see `expected_at_usage`; 0 where their line runs below it), n (rows),
    `rows` (increase and expected of each of these, [n, 2]) and `clusters` (what each is drawn with,
    [n]). Raises NotTestable where a layer has too few experts for that.
    """
    routed = study.counts().routed
    experts = 0 if routed is None else routed.shape[2]
    if experts <= NEIGHBOURS:
        raise NotTestable(
            f"{experts} experts in a layer, and {NEIGHBOURS} others are needed to say what one's "
            "use would cost."
        )
    used = _use(study)
    return pd.DataFrame(
        line
        for half in study.halves
        for place in most_own(study.half(study.other(half)))
        for line in _layer_of(study.half(half), half, used, **place)
    )


def _use(study) -> np.ndarray:
    """Share of the tokens of each row's prompt and reference that an expert receives, [I, L, E]."""
    both = [study.counts("tuned", positions) for positions in ("prompt", "response")]
    routed = sum(counts.routed.astype(np.int64) for counts in both)
    return frequency(routed, sum(counts.tokens for counts in both))


def _layer_of(part, half, used, category, layer, place, expert) -> list[dict]:
    masks = {at[1]: mask for at, mask in singles(used.shape[1:]) if at[0] == place}
    f = used[part.category(category).places, place].mean(0)
    rows = part.measured().category(category)
    increase = ablation_matrix(rows, masks, "reroute", allow_inert=True).to_numpy()  # [n, E]
    expected = expected_at_usage(increase, np.broadcast_to(f, increase.shape), NEIGHBOURS)
    expected = np.where(expected.mean(0) > 0, expected, 0)  # what nothing uses costs nothing
    head = {"measured on": half, "category": category, "layer": layer, "n": len(increase)}
    clusters = drawn_as_one(rows)
    return [
        head
        | {"expert": e, "own": e == expert, "f": f[e], "increase": increase[:, e].mean()}
        | {"expected": expected[:, e].mean(), "rows": np.c_[increase[:, e], expected[:, e]]}
        | {"clusters": clusters}
        for e in masks
    ]


def beyond_use(study, table: pd.DataFrame) -> pd.DataFrame:
    """What the own experts of a table of `alone` cost beyond their use, nats per reference token: a
    row for each half and category, for each with halves pooled ("all"), and so for all categories.

    Columns: measured on, category, increase, expected, beyond, low, high (95 %, wordings drawn), p
    (their signs flipped, two-sided: do these rows differ by this expert?), p_sets (the own expert
    and the others of its layer, each against its own neighbours in use, change places, one-sided:
    is it this expert?), sees (the smallest effect found with power 0.8), n, note.
    """
    found = []
    for level in (ALL, *study.halves):
        for category in (ALL, *study.categories):
            here = np.ones(len(table), bool)
            if level != ALL:
                here &= table["measured on"] == level
            if category != ALL:
                here &= table["category"] == category
            head = {"measured on": level, "category": category}
            found.append(head | _beyond(table[here], study.profile))
    return pd.DataFrame(found, columns=list(TESTS))


def _beyond(part, profile) -> dict:
    """A row of `beyond_use`; part: lines of `alone`, of whole layers."""
    own = part[part["own"]]
    rows = np.concatenate(own["rows"].to_list())  # [n, 2]
    of_layer = part[~part["own"]].groupby(["measured on", "category"], sort=False)["rows"]
    others = np.concatenate([np.stack(layer.to_list(), -1) for _, layer in of_layer])  # [n, 2, D]
    groups = np.repeat(np.arange(len(own)), own["n"])
    row = {"increase": own["increase"].mean(), "expected": own["expected"].mean(), "n": len(rows)}
    beyond, draws = rows[:, 0] - rows[:, 1], others[:, 0] - others[:, 1]
    row |= {"p_sets": exchange(beyond, draws, groups, profile.resamples, profile.seed)}
    try:
        pair, clusters = [(rows[:, 0], rows[:, 1:])], np.concatenate(own["clusters"].to_list())
        fit = slope_of(pair, groups, [1.0], profile.resamples, profile.seed, clusters)
    except NotTestable as reason:
        return row | {"beyond": row["increase"] - row["expected"], "note": str(reason)}
    ends = dict(zip(("low", "high"), fit["ci"], strict=True))
    return row | ends | {"beyond": fit["estimate"], "p": fit["p"], "sees": fit["sees"], "note": ""}


def of_all(pairs: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(`alone` of several Studies, with low and high of `beyond_use` beside the own experts; their
    `beyond_use`), each with a column `pair`. Of a pair whose experts cannot be tested, or not be
    rerouted, there is only a row of the second, with a note.
    """
    singly, tests, keys = [], [], ["measured on", "category"]
    for name, study in pairs.items():
        try:
            table = alone(study)
        except UserError as reason:
            none = {"measured on": [ALL], "category": [ALL], "note": [str(reason)]}
            tests.append(pd.DataFrame(none).reindex(columns=list(TESTS)).assign(pair=name))
            continue
        found = beyond_use(study, table)
        beside = table[keys].merge(found[[*keys, "low", "high"]], how="left")
        beside.loc[~table["own"].to_numpy(), ["low", "high"]] = np.nan
        ends = {end: beside[end].to_numpy() for end in ("low", "high")}
        singly.append(table[list(SINGLE)].assign(**ends, pair=name))
        tests.append(found.assign(pair=name))
    nothing = pd.DataFrame(columns=["pair", *TESTS])
    return (
        pd.concat(singly, ignore_index=True) if singly else pd.DataFrame(columns=["pair"]),
        pd.concat(tests, ignore_index=True) if tests else nothing,
    )


def summed_up(pairs, sizes, pattern, tests) -> dict[str, dict]:
    """{pair: {key: number}} for the summary, of tables as `sets.expert_sizes`, `sets.layer_pattern`
    and `of_all` give them: how many experts carry the tokens, the layer pattern, single experts.
    """
    found = {name: {} for name in pairs}
    for row in sizes[sizes["model"] == "tuned"].itertuples() if len(sizes) else ():
        found[row.pair] = {
            "set_sizes.experts_per_layer": row.K,
            "set_sizes.experts_half_share": row.carry_half,
        } | pattern_numbers(pattern[pattern["pair"] == row.pair], "experts")
    for pair, part in tests.groupby("pair"):
        found[pair] |= numbers_of(part)
    return found


def numbers_of(tests: pd.DataFrame) -> dict:
    """The headline numbers of one pair's `beyond_use`, as data/claims.csv names them."""
    found = {}
    for row in tests[(tests["category"] == ALL) & tests["p"].notna()].to_dict("records"):
        key = f"ablation.single.experts.{row['measured on']}"
        found |= {f"{key}.beyond": row["beyond"], f"{key}.beyond_ci": [row["low"], row["high"]]}
        found |= {f"{key}.{name}": row[name] for name in ("p", "p_sets", "sees")}
    return found


def sentences(singly: pd.DataFrame, tests: pd.DataFrame) -> list[str]:
    """What `of_all` says, pair by pair."""
    if tests.empty:
        return ["No pair here has routed experts to be ablated one at a time."]
    said = []
    for pair, part in tests.groupby("pair", sort=False):
        pooled = part[part["measured on"] == ALL].set_index("category")
        row, each = pooled.loc[ALL], pooled.drop(ALL)
        if np.isnan(row["p"]):
            said.append(f"{pair}: not testable one expert at a time: {row['note']}")
            continue
        above, below = (each.index[at].to_list() for at in (each["low"] > 0, each["high"] < 0))
        mine = singly[singly["pair"] == pair]
        layers = mine.groupby(["measured on", "category"])
        most = mine.loc[layers["increase"].idxmax(), "own"].sum()
        chance = (1 / layers.size()).sum()
        said.append(
            f"{pair}: rerouting the expert that is most a category's own costs "
            f"{row['increase']:.3f} nats per token; other experts of its layer would cost "
            f"{row['expected']:.3f} at its use. The difference is {row['beyond']:.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}] (null 0; detectable from {row['sees']:.3f}; p "
            f"{row['p_sets']:.3f} with the experts of a layer exchanged, before Holm). Category by "
            f"category the interval lies above 0 in {', '.join(above) or 'none'}, below 0 in "
            f"{', '.join(below) or 'none'}. In {most} of {layers.ngroups} cases (a "
            f"category on one half) the own expert is the one of its layer whose loss costs most "
            f"(by chance: {chance:.1f})."
        )
    return said
