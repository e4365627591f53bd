"""What instructions share, beside every cheap explanation of it: a study's overlap as tables, and
as the summary's numbers.

An `Overlap` holds the similarities of one pair of models. A measure (`level`, `own_categories`,
`wording_step`, `left_over`, ...) gives numbers for one kind of component and one half; `measured`
takes it to all pairs, units and halves. (Ours, but for the overlap itself.)
"""

from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..analysis import nulls
from ..analysis.generality import nearest_profile, share_test, shares
from ..analysis.regression import Excess, excess, excess_of_wordings
from ..analysis.sets import codes, consensus, nominal_size, top_experts, top_sets
from ..analysis.similarity import (
    category_matrix,
    gap,
    gap_across,
    jaccard_matrix,
    nearest_consensus,
    routing_similarity,
    within_between,
)
from ..analysis.stats import (
    SEEN_ONE_SIDED,
    adjust,
    attempt,
    bootstrap,
    cluster_codes,
    headline,
    length_strata,
    paired_effect,
    permutation_test,
    plus_one,
    shuffled,
)
from ..analysis.wordings import (
    matrix_excess,
    within_excess,
    wording_levels,
    wording_overlap,
    wording_units,
)
from ..bars import bar
from ..hexainst.corpus import predict_category, texts, tokens, wordings
from ..record import NotTestable
from . import equal_length
from .counting import twin_names

DRAWN = 16  # positions of an instruction at equal length
STRATA = 10  # of length
REDRAWS = 5  # of routing, under the rate-matched null
TESTED = ["pair", "unit", "half"]


class Found(NamedTuple):
    """A tidy table, and the summary's numbers of each pair: {pair: {key: value}}."""

    table: pd.DataFrame
    numbers: dict


class Overlap:
    """Similarities of all pairs of a study's instructions, computed when asked for, once.

    labels, wordings [I], str; lengths [I], counted tokens; halves {name: bool [I]}, "all" first.
    """

    def __init__(self, study):
        rows = study.rows
        self.study, self.profile = study, study.profile
        self.labels, self.wordings = rows["category"].to_numpy(), wordings(rows)
        self.lengths = study.counts().tokens
        folds = {half: (rows["fold"] == half).to_numpy() for half in study.halves}
        self.halves = {"all": np.ones(len(rows), bool)} | folds
        self.twins = twin_names(study.profile.twins)
        self.how = {"resamples": study.profile.resamples, "seed": study.profile.seed}

    @cached_property
    def words(self) -> np.ndarray:
        """Overlap of the tokens of two instructions' texts: Jaccard, [I, I]."""
        read = [tokens(text) for text in texts(self.study.rows)]
        known = sorted(set().union(*read))
        return jaccard_matrix(np.array([np.isin(known, row) for row in read]))

    @cached_property
    def apart(self) -> np.ndarray:
        """Difference in length, [I, I]."""
        return np.abs(np.subtract.outer(self.lengths, self.lengths))

    def sets(self, variant: str, unit: str, epsilon=None, rule: str = "quantile") -> np.ndarray:
        """Each instruction's set, bool [I, M]: top-epsilon neurons, or the K experts that a layer
        chose most.
        """
        c, seed = self.study.counts(variant), self.profile.seed
        if unit != "experts":
            return top_sets(c.unit(unit), epsilon or self.profile.epsilon, rule, seed)[0]
        chosen = round(c.routed.sum() / (c.tokens.sum() * c.routed.shape[1]))
        return top_experts(c.routed, chosen, seed).reshape(len(c.tokens), -1)

    def similarity(self, variant: str, unit: str) -> np.ndarray:
        """[I, I]: Jaccard of sets of neurons, Jensen-Shannon similarity of uncut routing."""

        def compute():
            if unit == "experts":
                return routing_similarity(self.study.counts(variant).routed)
            return jaccard_matrix(self.sets(variant, unit))

        return self.study.once(("similarity", variant, unit), compute)

    def null(self, variant: str, unit: str, bursty: bool = False) -> np.ndarray:
        """What the rate-matched null expects of each pair, [I, I]; bursty: it keeps that a neuron
        fires in bursts (see nulls.rate_null).
        """
        c, seed = self.study.counts(variant), self.profile.seed

        def compute():
            if unit != "experts":
                size = nominal_size(c.unit(unit)[0].size, self.profile.epsilon)
                made = nulls.rate_null(c.unit(unit), c.tokens, size, dependence=bursty)
                return nulls.expected_jaccard(made)
            redrawn = (nulls.redraw_routing(c.routed, c.tokens, seed + n) for n in range(REDRAWS))
            return np.mean([routing_similarity(r) for r in redrawn], axis=0)

        return self.study.once(("null", variant, unit, bursty), compute)

    @property
    def long(self) -> np.ndarray:
        """Places of the instructions with as many tokens as equal length draws, int [I']."""
        return self.longer(DRAWN)

    def longer(self, size: int, half: str = "all") -> np.ndarray:
        """Places of a half's instructions with `size` tokens or more, int [I']. Raises NotTestable
        where a category has none: what is left would be said of fewer categories than were asked.
        """
        here = self.halves[half]
        found = np.flatnonzero((self.lengths >= size) & here)
        some = set(self.labels[found])
        short = [str(c) for c in dict.fromkeys(self.labels[here]) if c not in some]
        if short:
            whose = f"of {', '.join(short)} " if some else ""
            raise NotTestable(
                f"{self.study.name}: no instruction {whose}has {size} tokens to draw from."
            )
        return found

    def equal(self, variant: str, unit: str, rule: str = "quantile") -> np.ndarray:
        """Similarity minus its rate-matched null at equal length, mean over draws, [I', I'];
        "twins": the mean over all twins. rule: of sets whose cut is tied (see equal_length.cut).
        """
        if variant == "twins":
            return np.mean([self.equal(twin, unit, rule) for twin in self.twins], axis=0)
        return self.drawn(variant, DRAWN, rule=rule)[unit]

    def drawn(self, variant: str, size: int, beside=(), rule: str = "quantile") -> dict:
        """{unit: similarity minus null} on `size` drawn positions, [I', I'] each; beside: sizes
        that will be asked for too. rule: "exact" is of units that have sets.
        """
        key = ("equal", variant, size, rule)
        return self.study.once(key, lambda: self._drawn(variant, size, beside, rule))

    def _drawn(self, variant, size, beside, rule):
        drawn = equal_length.draw(self.study, variant, size, beside)
        epsilon, seed = self.profile.epsilon, self.profile.seed
        return {
            unit: np.mean(list(equal_length.similarities(drawn, unit, rule)), axis=0)
            - equal_length.null_similarity(drawn, unit, epsilon, rule, seed)
            for unit in self.study.units
            if rule == "quantile" or unit != "experts"
        }


def measured(overlaps: dict, measure, halves=None) -> Found:
    """`measure(overlap, unit, half)` of all pairs, units and halves (of `halves` alone, if given).

    A measure returns {what: {name: value}}, what being a category, a variant, or "" for nothing
    more. Its row has pair, unit, half, what and these values, its numbers the keys
    overlap.{unit}.{half}.{what}.{name} ("tuned" and "" are left out). What cannot be tested is a
    row with a note that says why.
    """
    rows, numbers = [], {pair: {} for pair in overlaps}
    todo = [
        (pair, unit, half)
        for pair, overlap in overlaps.items()
        for unit in overlap.study.units
        for half in halves or overlap.halves
    ]
    for pair, unit, half in bar(todo, measure.__name__.replace("_", " "), delay=5):
        found = attempt(partial(measure, overlaps[pair], unit, half))
        found = {"": found} if "note" in found else found
        for what, values in found.items():
            where = [unit, half] + [what] * (what not in ("", "tuned"))
            key = ".".join(["overlap", *where])
            numbers[pair] |= {f"{key}.{k}": v for k, v in values.items() if k != "note"}
            place = {"pair": pair, "unit": unit, "half": half, "what": what, "note": ""}
            rows.append(place | values)
    return Found(pd.DataFrame(rows), numbers)


def joined(*found: Found, **settings) -> dict:
    """The numbers of several findings, as `summary.write_part` takes them; each pair's begin with
    the `settings`.
    """
    numbers = {pair: dict(settings) for one in found for pair in one.numbers}
    for one in found:
        for pair, keys in one.numbers.items():
            numbers[pair].update(keys)
    return numbers


def shown(table: pd.DataFrame, columns, by=("pair", "unit", "half"), digits: int = 3):
    """Some columns of a table as a page prints them: rounded, an interval as [low, high], a p with
    four digits, what is missing as "not testable"; the note only where there is one.
    """

    def said(value):
        if isinstance(value, (list, tuple, np.ndarray)):
            return "[" + ", ".join(f"{v:.{digits}f}" for v in value) + "]"
        if value is None or value != value:
            return "not testable"
        return round(float(value), digits) if isinstance(value, (float, np.floating)) else value

    def chance(p):
        return "not testable" if p is None or p != p else f"{p:.4f}" if p >= 1e-4 else "< 0.0001"

    noted = ["note"] if "note" in table and table["note"].astype(bool).any() else []
    names = [*by, *(c for c in columns if c in table), *noted]
    page = table[names].set_index(list(by))
    odds = [c for c in page if c in ("p", "holm", "bh", "largest_p") or c.startswith("p_")]
    return page.apply(lambda column: column.map(chance if column.name in odds else said))


# ---- the gap, as first declared: rows, not wordings


def level(overlap: Overlap, unit: str, half: str) -> dict:
    """Within and between, their gap, its null; the gap beyond the first twin's, and the base's.

    Intervals: bootstrap of instructions. p_label, p_excess, p_tuning: labels permuted within length
    strata; p_null: resamples whose level is no higher than the null's. These are the numbers of the
    first declared claims; rows that share wordings make them too sure (see `wording_step`).
    """
    here, seen = np.ix_(*2 * [overlap.halves[half]]), overlap.study.has_base
    S = overlap.similarity("tuned", unit)[here]
    others = {"excess": overlap.similarity("twin", unit)[here]}
    others |= {"tuning": overlap.similarity("base", unit)[here]} if seen else {}
    y, lengths = overlap.labels[overlap.halves[half]], overlap.lengths[overlap.halves[half]]
    kinds = [S, *(S - other for other in others.values())]

    def matrices(**drawn):
        return np.stack([category_matrix(m, **drawn) for m in kinds], 1)

    test = permutation_test(
        lambda shuffled: matrices(labels=shuffled),
        codes(y),
        length_strata(lengths, STRATA),
        **overlap.how,
    )
    found = bootstrap(lambda w: matrices(labels=y, weights=w), y, **overlap.how)
    null = within_between(category_matrix(overlap.null("tuned", unit)[here], y))
    return {"": _level_numbers(found, test, null, list(others)) | {"n": len(y)}}


def _level_numbers(found, test, null, others) -> dict:
    now, redrawn = within_between(found.estimate), within_between(found.replicates)
    shuffled = within_between(test.null)["gap"]
    low, high = np.quantile(redrawn["gap"], [0.025, 0.975], axis=0)
    p = plus_one(now["gap"], shuffled)
    row = {
        "within": now["within"][0],
        "within_ci": np.quantile(redrawn["within"][:, 0], [0.025, 0.975]).tolist(),
        "null_within": null["within"],
        "p_null": plus_one(-null["within"], -redrawn["within"][:, 0]),
        "between": now["between"][0],
        "null_gap": null["gap"],
        "detectable": shuffled[:, 0].mean() + SEEN_ONE_SIDED * shuffled[:, 0].std(),
    }
    names = [("gap", "p_label"), *((f"{name}_gap", f"p_{name}") for name in others)]
    for n, (name, key) in enumerate(names):
        row |= {name: now["gap"][n], f"{name}_ci": [low[n], high[n]], key: p[n]}
    if "tuning" in others:
        row["base_gap"] = row["gap"] - row["tuning_gap"]
    return row


# ---- wordings as the unit


def _part(overlap, half):
    """(what np.ix_ makes of the half, its labels, its wordings, its length strata)."""
    chosen = overlap.halves[half]
    names = overlap.wordings[chosen]
    strata = length_strata(overlap.lengths[chosen], STRATA, names)
    return np.ix_(chosen, chosen), overlap.labels[chosen], names, strata


def own_categories(overlap: Overlap, unit: str, half: str) -> dict:
    """Each category's own level beyond the rate-matched null, in pairs of different wordings;
    beside it the same beyond the bursty null (neurons). Holm over the categories.
    """
    here, y, names, _ = _part(overlap, half)
    S, found = overlap.similarity("tuned", unit)[here], {}
    for name, bursty in (("within", False), ("bursty", True))[: 1 + (unit != "experts")]:
        null = overlap.null("tuned", unit, bursty)[here]
        found[name] = within_excess(S, null, y, names, **overlap.how)
    holm, rows = adjust(found["within"]["p"], "holm"), {}
    for n, category in enumerate(dict.fromkeys(y)):
        alike = y == category
        own = {"within": found["within"]["within"][n], "null": found["within"]["null"][n]}
        for name, of in found.items():
            own[f"{name}_excess"] = of["excess"][n]
            own[f"{name}_excess_ci"] = [of["low"][n], of["high"][n]]
            own |= {f"p_{name}": of["p"][n], f"{name}_detectable": of["detectable"][n]}
        count = {"n": int(alike.sum()), "wordings": len(set(names[alike]))}
        rows[category] = own | {"holm": holm[n]} | count
    return rows


def six_by_six(overlaps: dict) -> pd.DataFrame:
    """Observed minus rate-matched null of every two categories, all rows: pair, unit, panel,
    category, other category, observed, null, excess, low, high, marked (0 outside the interval), n.
    """
    rows = []
    for pair, overlap in overlaps.items():
        for unit in overlap.study.units:
            rows += _cells(overlap, unit, f"{pair}, {unit}")
    return pd.DataFrame(rows)


def _cells(overlap, unit, panel):
    S, null = overlap.similarity("tuned", unit), overlap.null("tuned", unit)
    found = attempt(lambda: matrix_excess(S, null, overlap.labels, overlap.wordings, **overlap.how))
    if "note" in found:
        return []
    names = list(dict.fromkeys(overlap.labels))
    for a, b in np.ndindex(len(names), len(names)):
        cell = {name: float(values[a, b]) for name, values in found.items()}
        marked = cell["low"] > 0 or cell["high"] < 0
        place = {"panel": panel, "unit": unit, "category": names[a], "other category": names[b]}
        yield place | cell | {"marked": marked, "n": len(overlap.labels)}


def wording_step(overlap: Overlap, unit: str, half: str) -> dict:
    """Same wording, other wording of the category, other category: means; other_wording is the gap
    between the last two, with its interval and p (wordings drawn and permuted as wholes, within
    length strata). For tuned and, where there is one, base and `tuning`, tuned minus base.
    """
    here = _part(overlap, half)[0]
    variants = overlap.study.variants[::-1]
    pairs = {v: (overlap.similarity(v, unit)[here], overlap.null(v, unit)[here]) for v in variants}
    if overlap.study.has_base:
        pairs["tuning"] = tuple(np.subtract(pairs["tuned"], pairs["base"]))
    return {v: attempt(partial(_step, overlap, half, *pair)) for v, pair in pairs.items()}


def _step(overlap, half, S, null) -> dict:
    _, y, names, strata = _part(overlap, half)
    if not S.any():
        raise NotTestable("base and tuned have the same sets: nothing is told apart.")
    found = wording_overlap(S, y, names, strata, **overlap.how)
    return {
        "same": found["same_wording"],
        "other": found["other_wording"],
        "different": found["other_category"],
        "step": found["step"],
        "other_wording": found["gap"],
        "other_wording_ci": found["gap_ci"],
        "p_other_wording": found["p"],
        "other_wording_null": wording_overlap_of(null, y, names),
        "other_wording_detectable": found["detectable"],
        "n": len(y),
        "wordings": int(found["wordings"].sum()),
    }


def wording_overlap_of(similarity, labels, clusters) -> float:
    """`wording_overlap`'s gap alone: other wordings of a category minus other categories."""
    matrix, of, _ = wording_units(similarity, labels, clusters)
    return float(gap(matrix, of))


KINDS = {
    "same_wording": "same wording",
    "other_wording": "other wording, same category",
    "other_category": "other category",
}


def wording_picture(overlaps: dict) -> pd.DataFrame:
    """The three levels with intervals, and the rate-matched null's, all rows: panel, model, pairs
    (which pairs of instructions), value, low, high, null, n, wordings.
    """
    rows = []
    for pair, overlap in overlaps.items():
        for unit in overlap.study.units:
            for variant in reversed(overlap.study.variants):
                where = {"panel": f"{pair}, {unit}", "model": variant}
                rows += [where | row for row in _levels(overlap, unit, variant)]
    return pd.DataFrame(rows)


def _levels(overlap, unit, variant):
    y, names = overlap.labels, overlap.wordings
    found, null = (
        attempt(partial(wording_levels, m(variant, unit), y, names, **how))
        for m, how in ((overlap.similarity, overlap.how), (overlap.null, {"resamples": 2}))
    )
    for key, said in KINDS.items():
        if found.get(key):
            value, low, high = found[key]
            values = {"value": value, "low": low, "high": high, "null": null[key][0]}
            yield {"pairs": said, **values, "n": len(y), "wordings": len(set(names))}


# ---- what all controls leave


def first_left_over(overlap: Overlap, unit: str, half: str) -> dict:
    """What controls leave, as first declared: coefficient of `same category` given token overlap
    and difference in length, similarity at equal length minus its null minus the twins'; rows, not
    wordings, are drawn and permuted.
    """
    found, units = overlap.study.once(("first", half), lambda: _first(overlap, half))
    value, low, high, p, least = (part[units.index(unit)] for part in found)
    row = {"excess": value, "excess_ci": [low, high], "p_remains": p, "excess_detectable": least}
    return {"": row | {"n": int(overlap.halves[half][overlap.long].sum())}}


def _first(overlap, half):
    """All units at once: they share each shuffle, which is what takes the time."""
    here, which = _drawn(overlap, half)
    units, whole = overlap.study.units, np.ix_(which, which)
    stack = [(overlap.equal("tuned", u) - overlap.equal("twins", u))[here] for u in units]
    given = [overlap.words[whole], overlap.apart[whole]]
    strata = length_strata(overlap.lengths[which], STRATA)
    return excess(stack, overlap.labels[which], given, strata, **overlap.how), units


def _drawn(overlap, half):
    """(index of the half's rows among those that are drawn, their places among all)."""
    chosen = np.isin(overlap.long, overlap.longer(DRAWN, half))
    return np.ix_(chosen, chosen), overlap.long[chosen]


ESTIMATORS = ("alone", "twins off", "twins given")


def left_over(overlap: Overlap, unit: str, half: str) -> dict:
    """What the controls leave by three estimators, and the smallest of them in size; tuned, and
    base. Wordings are drawn and permuted.

    The coefficient of `same category` given token overlap and difference in length: of similarity
    at equal length minus its null ("alone"); of the same minus the twins' ("twins off"); with the
    twins' as a third covariate ("twins given").
    """
    here, which = _drawn(overlap, half)
    random = overlap.equal("twins", unit)[here]
    return {
        v: attempt(partial(_smallest, overlap, overlap.equal(v, unit)[here], random, which))
        for v in overlap.study.variants[::-1]
    }


def _smallest(overlap, alone, random, which) -> dict:
    found = _estimates(overlap, alone, random, which)
    best = headline({name: one["value"] for name, one in found.items()})
    least, row = found[best.name], {}
    for name, one in found.items():
        key = name.replace(" ", "_")
        row |= {key: one["value"], f"{key}_ci": one["ci"]}
    return {
        "smallest": least["value"],
        "smallest_ci": least["ci"],
        "p_smallest": least["p"],
        "smallest_is": best.name,
        "smallest_detectable": least["detectable"],
        "largest_p": max(one["p"] for one in found.values()),
        "n": len(which),
        "wordings": len(set(overlap.wordings[which])),
    } | row


def _estimates(overlap, alone, random, which) -> dict:
    y, names, whole = overlap.labels[which], overlap.wordings[which], np.ix_(which, which)
    given = [overlap.words[whole], overlap.apart[whole]]
    strata = length_strata(overlap.lengths[which], STRATA, names)
    one = excess_of_wordings([alone, alone - random], y, names, given, strata, **overlap.how)
    free = excess_of_wordings(alone, y, names, [*given, random], strata, **overlap.how)
    results = [*map(Excess._make, zip(*one, strict=True)), free]
    return {
        name: {"value": float(r.estimate), "ci": [float(r.low), float(r.high)], "p": float(r.p)}
        | {"detectable": float(r.detectable)}
        for name, r in zip(ESTIMATORS, results, strict=True)
    }


STEPS = ("observed", "minus null", "equal length", "minus twins", "minus twins, sizes equal")


def waterfall(overlaps: dict, left: Found) -> pd.DataFrame:
    """What each control leaves, all rows: pair, unit, panel, model, step, left, low, high, n.

    First the gap between other wordings of a category and other categories, as observed (of the
    instructions that have enough tokens), minus its null, at equal length, minus the twins'; the
    same of sets of exactly equal size, ties at the cut drawn (experts have no cut); then
    `left_over`'s three coefficients given the words. Intervals: bootstrap of wordings.
    """
    rows = []
    for row in left.table[left.table["half"] == "all"].to_dict("records"):
        if row["note"]:
            continue
        overlap, unit, variant = overlaps[row["pair"]], row["unit"], row["what"]
        where = {"panel": f"{row['pair']}, {unit}", "model": variant, "n": row["n"]}
        found = _falls(overlap, unit, variant)
        found += [
            (f"words, {name}", row[key], *row[f"{key}_ci"])
            for name, key in ((name, name.replace(" ", "_")) for name in ESTIMATORS)
        ]
        names = ("step", "left", "low", "high")
        rows += [where | dict(zip(names, one, strict=True)) for one in found]
    return pd.DataFrame(rows, columns=["panel", "model", "n", "step", "left", "low", "high"])


def _falls(overlap, unit, variant) -> list[tuple]:
    which = overlap.long
    whole, drawn = np.ix_(which, which), overlap.equal(variant, unit)
    S, N = overlap.similarity(variant, unit)[whole], overlap.null(variant, unit)[whole]
    some = [S, S - N, drawn, drawn - overlap.equal("twins", unit)]
    if unit != "experts":
        some.append(np.subtract(*(overlap.equal(v, unit, "exact") for v in (variant, "twins"))))
    y, names = overlap.labels[which], overlap.wordings[which]
    matrices, of = [wording_units(m, y, names)[0] for m in some], wording_units(S, y, names)[1]
    found = bootstrap(
        lambda w: np.stack([gap(m, of, w) for m in matrices], -1),
        of,
        clusters=np.arange(len(of)),
        **overlap.how,
    )
    return list(zip(STEPS[: len(some)], *(a.tolist() for a in found[:3]), strict=True))


# ---- general and unique components


def membership(overlaps: dict) -> Found:
    """In how many categories' consensus sets the neurons stand: pair, number, components, and how
    many the rate-matched null expects, with p (more than expected).
    """
    rows, numbers = [], {}
    for pair, overlap in overlaps.items():
        found = attempt(partial(_members, overlap))
        numbers[pair] = {f"membership.neurons.{n}": v[0] for n, v in found.items() if n != "note"}
        names = ("components", "null", "p", "note")
        said = {"": (0, np.nan, np.nan, found["note"])} if "note" in found else found
        rows += [
            {"pair": pair, "number": n} | dict(zip(names, (*v, "")[:4], strict=True))
            for n, v in said.items()
        ]
    return Found(pd.DataFrame(rows), numbers)


def _members(overlap) -> dict:
    """{number of categories: (neurons, as many as the null expects, p)}."""
    c, profile = overlap.study.counts(), overlap.profile
    size = nominal_size(c.unit("neurons")[0].size, profile.epsilon)
    made = nulls.rate_null(c.unit("neurons"), c.tokens, size)
    sets = overlap.sets("tuned", "neurons")
    test = nulls.membership_test(sets, made, overlap.labels, profile.tau, **overlap.how)
    values = (test[name].tolist() for name in ("observed", "expected", "p"))
    return dict(enumerate(zip(*values, strict=True), 1))


UNTESTED = pd.DataFrame({"kind": ["none"], "layer": [-1]})


def layer_shares(overlaps: dict) -> Found:
    """Shares of each layer's components that are unique and general, minus the null (labels
    permuted over whole wordings): panel, kind, layer, share, null, excess, low, high (bootstrap of
    wordings), p, bh (Benjamini-Hochberg over layers), marked, n, width (of a layer).

    Numbers: unique.{unit}.share, .null, .p, the share of unique ones among components in any set,
    labels permuted over rows as first declared; .wordings_null, .wordings_p over wordings.
    """
    tables, numbers = [], {}
    for pair, overlap in overlaps.items():
        numbers[pair] = {}
        for unit in overlap.study.units:
            found = attempt(partial(_shares, overlap, unit))
            note = {"panel": f"{pair}, {unit}", "note": found.get("note", "")}
            tables.append(found.get("table", UNTESTED).assign(**note))
            keys = {f"unique.{unit}.{k}": v for k, v in found.get("numbers", {}).items()}
            numbers[pair] |= keys
    return Found(pd.concat(tables, ignore_index=True), numbers)


def _shares(overlap, unit) -> dict:
    c, tau, how = overlap.study.counts(), overlap.profile.tau, overlap.how
    layers = c.layers["expert" if unit == "experts" else c.family(unit)]
    sets, y, names = overlap.sets("tuned", unit), overlap.labels, overlap.wordings
    rows = share_test(sets, y, len(layers), tau, length_strata(overlap.lengths, STRATA), **how)
    few = how | {"resamples": max(99, how["resamples"] // 4)}  # each costs a product with the sets
    strata = length_strata(overlap.lengths, STRATA, names)
    test = share_test(sets, y, len(layers), tau, strata, names, **few)
    again = bootstrap(
        lambda w: shares(sets, codes(y), len(layers), tau, w), y, clusters=names, **few
    )
    error, null = (again.high - again.low)[:-1] / 2, test.null.mean(0)[:-1]
    above, half = test.estimate[:-1] - null, len(layers)
    table = {
        "kind": np.repeat(["unique", "general"], half),
        "layer": [*layers, *layers],
        "share": test.estimate[:-1],
        "null": null,
        "excess": above,
        "low": above - error,
        "high": above + error,
        "p": test.p[:-1],
        "bh": np.r_[adjust(test.p[:half], "bh"), adjust(test.p[half:-1], "bh")],
        "n": len(y),
        "width": sets.shape[1] // half,
    }
    table = pd.DataFrame(table)
    numbers = {
        "share": rows.estimate[-1],
        "null": rows.null[:, -1].mean(),
        "p": rows.p[-1],
        "wordings_null": test.null[:, -1].mean(),
        "wordings_p": test.p[-1],
    }
    return {"table": table.assign(marked=table["bh"] < 0.05), "numbers": numbers}


# ---- reading the category off a set


def readable(overlaps: dict) -> Found:
    """Is the category of the other half's instructions read off the components? Accuracy of tuned,
    base, twins and words, all trained on the other half, per pair, unit and half.

    excess: tuned minus the mean of the twins, signs flipped over instructions (as first declared);
    beyond: tuned minus the larger of base's and the words' accuracy, over wordings.
    """
    rows, numbers = [], {pair: {} for pair in overlaps}
    for pair, overlap in overlaps.items():
        for unit in overlap.study.units:
            found = attempt(partial(_readable, overlap, unit))
            for half in overlap.halves:
                row = {"note": found["note"]} if "note" in found else found[half]
                place = {"pair": pair, "unit": unit, "half": half, "note": ""}
                rows.append(place | row)
                key = f"nearest.{unit}.{half}"
                numbers[pair] |= {f"{key}.{k}": v for k, v in row.items() if k != "note"}
    return Found(pd.DataFrame(rows), numbers)


def _readable(overlap, unit) -> dict:
    study, y = overlap.study, overlap.labels
    fold = study.rows["fold"].to_numpy()
    right = {
        variant: _read_off(overlap, variant, unit, fold)
        for variant in (*study.variants, *overlap.twins)
    }
    right["words"] = (predict_category(study.rows, fold) == y).astype(float)
    right["twins"] = np.mean([right.pop(twin) for twin in overlap.twins], axis=0)
    return {half: _compared(overlap, right, chosen) for half, chosen in overlap.halves.items()}


def _read_off(overlap, variant, unit, fold):
    if unit == "experts":
        routed = overlap.study.counts(variant).routed
        return nearest_profile(routed, overlap.labels, fold)["correct"]
    sets, which = overlap.sets(variant, unit), np.unique(fold, return_inverse=True)[1]
    return nearest_consensus(sets, overlap.labels, which, overlap.profile.tau)["correct"]


def _compared(overlap, right, chosen) -> dict:
    here = {name: correct[chosen] for name, correct in right.items()}
    means = {name: float(correct.mean()) for name, correct in here.items()}
    spread = {f"{name}_ci": _accuracy(overlap, correct, chosen) for name, correct in here.items()}
    best = max(("words", "base"), key=lambda name: means.get(name, -1))
    names, how = overlap.wordings[chosen], overlap.how
    first = paired_effect(here["tuned"], here["twins"], **how)
    beyond = paired_effect(here["tuned"], here[best], clusters=names, **how)
    return (means | spread) | {
        "chance": 1 / len(set(overlap.labels)),
        "excess": float(first.difference),
        "excess_ci": [float(first.low), float(first.high)],
        "p": float(first.p),
        "detectable": float(first.detectable),
        "yardstick": best,
        "beyond": float(beyond.difference),
        "beyond_ci": [float(beyond.low), float(beyond.high)],
        "p_beyond": float(beyond.p),
        "beyond_detectable": float(beyond.detectable),
        "n": len(names),
        "wordings": len(set(names)),
    }


def _accuracy(overlap, correct, chosen) -> list[float]:
    """Interval of a mean over rows, wordings drawn."""
    names, one = overlap.wordings[chosen], np.zeros(len(correct))
    found = bootstrap(lambda w: w @ correct / w.sum(1), one, clusters=names, **overlap.how)
    return [float(found.low), float(found.high)]


def readable_picture(found: Found) -> pd.DataFrame:
    """`readable`'s accuracies, long: panel, half, read off, accuracy, low, high, chance, n,
    wordings.
    """
    rows = []
    for row in found.table[found.table["note"] == ""].to_dict("records"):
        same = {name: row[name] for name in ("half", "chance", "n", "wordings")}
        for name in ("tuned", "base", "words", "twins"):
            if row.get(name, np.nan) == row.get(name):
                low, high = row[f"{name}_ci"]
                said = {"read off": name, "accuracy": row[name], "low": low, "high": high}
                rows.append({"panel": f"{row['pair']}, {row['unit']}"} | same | said)
    return pd.DataFrame(rows)


def halves_agree(overlaps: dict) -> Found:
    """Are instructions of a category more alike than others *across* the halves? Mean similarity of
    pairs of one row of each half, same category minus other; interval over wordings, p by
    permuting labels over whole wordings within each half.
    """
    rows, numbers = [], {pair: {} for pair in overlaps}
    for pair, overlap in overlaps.items():
        for unit in overlap.study.units:
            found = attempt(partial(_agreement, overlap, unit))
            rows.append({"pair": pair, "unit": unit, "note": ""} | found)
            numbers[pair] |= {f"halves.{unit}.{k}": v for k, v in found.items() if k != "note"}
    return Found(pd.DataFrame(rows), numbers)


def _agreement(overlap, unit) -> dict:
    S, y = overlap.similarity("tuned", unit), codes(overlap.labels)
    names = overlap.study.halves
    if len(names) != 2:
        raise NotTestable(f"{overlap.study.name}: {len(names)} half; two are compared.")
    folds, half = np.unique(overlap.study.rows["fold"].to_numpy(str), return_inverse=True)
    wordings = np.char.add(folds[half], overlap.wordings)  # of even and odd rows one may be in both
    how = overlap.how | {"clusters": wordings}
    found = bootstrap(lambda w: gap_across(S, y, half, w), 2 * y + half, **how)
    test = permutation_test(lambda shuffled: gap_across(S, shuffled, half), y, half, **how)
    return {
        "agreement": float(test.estimate),
        "agreement_ci": [float(found.low), float(found.high)],
        "p": float(test.p),
        "detectable": float(test.detectable),
        "n": len(y),
        "wordings": len(set(wordings)),
    }


# ---- does it depend on a choice of ours?


def over_epsilon(overlaps: dict) -> pd.DataFrame:
    """The gap of wordings over epsilon, for both tie rules: pair, epsilon, rule, gap, null (the
    gap of the rate-matched null, ties as in `quantile`), n; neurons of the tuned model.
    """
    rows = []
    for pair, overlap in overlaps.items():
        for epsilon in bar(overlap.profile.epsilons, f"{pair} epsilon", delay=5):
            found = attempt(partial(_at_epsilon, overlap, epsilon))
            null = found.pop("null", np.nan)
            for rule in equal_length.RULES:
                place = {"pair": pair, "epsilon": epsilon, "rule": rule, "n": len(overlap.labels)}
                rows.append(place | {"gap": found.get(rule, np.nan), "null": null})
    return pd.DataFrame(rows)


def _at_epsilon(overlap, epsilon) -> dict:
    c, y, names = overlap.study.counts(), overlap.labels, overlap.wordings
    size = nominal_size(c.unit("neurons")[0].size, epsilon)
    null = nulls.expected_jaccard(nulls.rate_null(c.unit("neurons"), c.tokens, size))
    seen = {
        rule: jaccard_matrix(overlap.sets("tuned", "neurons", epsilon, rule))
        for rule in equal_length.RULES
    }
    return {k: wording_overlap_of(S, y, names) for k, S in (seen | {"null": null}).items()}


def over_tau(overlaps: dict, shuffles: int = 20) -> pd.DataFrame:
    """Unique and general neurons over epsilon and tau: pair, kind, epsilon, tau, components (in any
    consensus set), value, null (labels permuted over whole wordings, within strata of their mean
    length: mean of `shuffles` draws).

    unique: their share of the components in any set; general: their share of all neurons.
    """
    rows = []
    for pair, overlap in overlaps.items():
        layers = overlap.study.counts().unit("neurons").shape[1]
        dealt, y = _dealt(overlap, shuffles), codes(overlap.labels)
        for epsilon in bar(overlap.profile.epsilons, f"{pair} epsilon", delay=5):
            sets = overlap.sets("tuned", "neurons", epsilon)
            for tau in overlap.profile.taus:
                size = int(consensus(sets, overlap.labels, tau).any(0).sum())
                found, null = (shares(sets, labels, layers, tau) for labels in (y, dealt))
                place = {"pair": pair, "epsilon": epsilon, "tau": tau, "components": size}
                for kind, at in (("unique", slice(-1, None)), ("general", slice(layers, -1))):
                    values = {"value": found[:, at].mean(), "null": null[:, at].mean()}
                    rows.append({"kind": kind} | place | values)
    return pd.DataFrame(rows)


def _dealt(overlap, shuffles) -> np.ndarray:
    """Labels permuted over whole wordings, within strata of their mean length, int [R, I]."""
    strata = length_strata(overlap.lengths, STRATA, overlap.wordings)
    code, of, strata = cluster_codes(overlap.wordings, codes(overlap.labels), strata)
    noise = np.random.default_rng(overlap.profile.seed).random((shuffles, len(of)))
    return shuffled(of, strata, noise)[:, code]


def over_length(overlaps: dict, sizes=equal_length.SIZES) -> pd.DataFrame:
    """The gap of wordings at equal length, minus its null, over the number of drawn positions:
    pair, positions, instructions, gap of each unit, note.
    """
    rows = []
    for pair, overlap in overlaps.items():
        for size in sizes:
            found = attempt(partial(_gaps_at, overlap, size, sizes))
            place = {"pair": pair, "positions": size, "note": ""}
            rows.append(place | {"instructions": int((overlap.lengths >= size).sum())} | found)
    return pd.DataFrame(rows)


def _gaps_at(overlap, size, sizes) -> dict:
    which, found = overlap.longer(size), overlap.drawn("tuned", size, sizes)
    y, names = overlap.labels[which], overlap.wordings[which]
    return {f"gap, {unit}": wording_overlap_of(S, y, names) for unit, S in found.items()}


# ---- in words


def sentences(steps: Found, own: Found, left: Found, read: Found, members: Found) -> list[str]:
    """What was found of all rows of each pair and unit, in sentences: `wording_step`,
    `own_categories`, `left_over`, `readable`, and of each pair `membership`. What is not supported
    stands beside the smallest effect that the test could have seen.
    """
    found = list(_say_members(members.table))
    for (pair, unit), _ in steps.table.groupby(["pair", "unit"], sort=False):
        rows = [_of(one.table, pair, unit) for one in (steps, own, left, read)]
        says = (_say_step, _say_own, _say_left, _say_read)
        found.append(f"{pair}, {unit}.")
        for say, part in zip(says, rows, strict=True):
            notes = part["note"].iloc[0]
            found.append(f"  {notes}" if notes else f"  {say(part)}")
    return found


def _say_members(table):
    for pair, part in table[table["note"] == ""].groupby("pair", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        yield (
            f"{pair}: {first['components']:.0f} neurons stand in one category's consensus set "
            f"(null: {first['null']:.0f}), {last['components']:.0f} in all {last['number']} "
            f"(null: {last['null']:.0f})."
        )


def _of(table, pair, unit):
    return table[(table["pair"] == pair) & (table["unit"] == unit) & (table["half"] == "all")]


def _value(row, name, p, least) -> str:
    """A value, its interval, its p, and what could have been seen where nothing is."""
    low, high = row[f"{name}_ci"]
    said = f"{row[name]:.3f} [{low:.3f}, {high:.3f}], p {row[p]:.4f}"
    clear = low > 0 and row[p] < 0.05
    return said if clear else f"{said} (not supported; detectable from {row[least]:.3f})"


def _variants(part):
    """The rows of tuned and, where there is one, of base (else None)."""
    rows = {row["what"]: row for row in part.to_dict("records") if not row["note"]}
    return rows["tuned"], rows.get("base")


def _say_step(part):
    tuned, base = _variants(part)
    more = _value(tuned, "other_wording", "p_other_wording", "other_wording_detectable")
    beside = "" if base is None else f" In the base {base['other_wording']:.3f}."
    step = tuned["step"]
    return (
        f"Alike by {tuned['other']:.3f} in one category and other wordings, by "
        f"{tuned['different']:.3f} in different categories: the gap is {more}, n {tuned['n']} in "
        f"{tuned['wordings']} wordings.{beside}"
        + (f" The same wording adds {step:.3f}." if step == step and step is not None else "")
    )


def _say_own(part):
    above = part["within_excess_ci"].map(lambda ci: ci[0] > 0)
    clear = part[above & (part["holm"] < 0.05)]
    rest = part.drop(clear.index)["within_detectable"]
    names = ", ".join(clear["what"]) or "none"
    seen = f"; elsewhere {rest.min():.3f} to {rest.max():.3f} could have been seen"
    return (
        f"Above the rate-matched null in {len(clear)} of {len(part)} categories ({names})"
        + (seen if len(rest) else "")
        + "."
    )


def _say_left(part):
    tuned, base = _variants(part)
    left = _value(tuned, "smallest", "p_smallest", "smallest_detectable")
    beside = "" if base is None else f"; in the base {base['smallest']:.3f}"
    return f"The controls leave {left} (`{tuned['smallest_is']}`, the smallest of three){beside}."


def _say_read(part):
    row = part.iloc[0]
    others = [n for n in ("base", "words", "twins") if row.get(n, np.nan) == row.get(n, np.nan)]
    beside = ", ".join(f"{name} {row[name]:.2f}" for name in others)
    beyond = _value(row, "beyond", "p_beyond", "beyond_detectable")
    return (
        f"The category is read off with accuracy {row['tuned']:.2f} ({beside}). Tuned minus "
        f"{row['yardstick']}, the better of base and words: {beyond}, two-sided."
    )
