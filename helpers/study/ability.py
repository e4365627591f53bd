"""What a model can do at all: strict scores of its answers, whether the right answer is the
likeliest of a few, and how much likelier an instruction makes it.
"""

import re
from dataclasses import replace

import numpy as np
import pandas as pd

from ..analysis.stats import SMALLEST, clustered_share, paired_effect
from ..capture.count import refuse_long
from ..capture.loading import check_pair
from ..capture.tokens import encode
from ..hexainst.checkers import bare
from ..hexainst.corpus import few_of_many, text, texts, wordings
from ..record import NotTestable
from .answers import new_tokens
from .evaluate import nll, scored
from .reading import encode_bare
from .study import Study

NEIGHBOURS = (-2, -1, 1, 2)  # of a row, among those of its category and half: its distractors
MEASURES = ("strict", "first", "gain", "gain_none")
EACH = ["pair", "model", "half", "category"]

# ---- measured


def ability(study, variant: str = "tuned") -> pd.DataFrame:
    """What `variant` makes of each row [I]: its greedy answer and, for `ablation_rows` rows of
    each category and half (see `few_of_many`; NaN elsewhere), what it finds likely.

    answer, score      as in `evaluate.scored`: all rows, NaN where the checker may not run code
    cut                whether the answer fills all tokens it may have (`answers.new_tokens`)
    first              1 if the right answer has the lowest loss per token of the candidates: the
                       labels that the row names, else its reference and those of
                       up to four neighbours; NaN without a candidate beside the right one
    chance             what `first` would be if candidates were drawn
    own, other, none   loss of the reference, nats per token: after its own instruction, after the
                       neighbours' (mean over them), after the template around nothing
    gain, gain_none    other - own, none - own: what the instruction adds
    wording, fold      the row's cluster, and its half

    Of a row at most six sequences are read, and one for each label. (Ours.)
    """
    rows = study.rows
    found = scored(study, variant).assign(fold=rows["fold"], wording=wordings(rows))
    places = np.flatnonzero(few_of_many(rows, ["fold", "category"], study.profile.ablation_rows))
    likelihoods = likely(study.take(places), variant).set_axis(places, axis=0)
    return found.assign(cut=_cut(study, variant)).join(likelihoods)


def _cut(study, variant) -> np.ndarray:
    most = study.profile.max_new_tokens
    read = zip(study.answer_ids(variant), study.rows.to_dict("records"), strict=True)
    return np.array([len(ids) >= new_tokens(row, most) for ids, row in read], bool)


def abilities(pairs: dict) -> pd.DataFrame:
    """`ability` of every model of several Studies, one below the other; each model is let go before
    the next, for two large ones may fill the memory.
    """
    tables = []
    for study in pairs.values():
        for variant in study.variants:
            tables.append(ability(study, variant))
            study.close()
    return pd.concat(tables, ignore_index=True)


def by_template(pairs: dict) -> pd.DataFrame:
    """What the tuned models make of the rows of `ability`'s likelihoods in their chat format and in
    the profile's bare template: strict, first, gain (means) and n by pair, category and template;
    empty where the profile has no chat format.
    """
    out = []
    for name, study in pairs.items():
        if not study.profile.chat:
            continue
        plain = replace(study.profile, chat=False)
        bare_one = Study(plain, study.pair, study.rows, {"tuned": study.model("tuned")})
        some = few_of_many(study.rows, ["fold", "category"], study.profile.ablation_rows)
        for template, each in (("chat", study), ("bare", bare_one)):
            part = each.take(np.flatnonzero(some))
            found = scored(part, answers=part.generate()).rename(columns={"score": "strict"})
            found = found.assign(template=template, **likely(part)[["first", "gain"]])
            out.append(found.assign(pair=name, n=1))
        study.close()
    if not out:
        return pd.DataFrame()
    means = {"strict": "mean", "first": "mean", "gain": "mean", "n": "sum"}
    by = ["pair", "category", "template"]
    return pd.concat(out).groupby(by, sort=False).agg(means)


def lineage(pairs: dict) -> pd.DataFrame:
    """Did each tuned model start from its base? `check_pair` of every pair that has one: columns
    pair, family, layer, cosine, change; no row for a single model.
    """
    tables = [pd.DataFrame(columns=["pair", "family", "layer"])]
    for name, study in pairs.items():
        if study.has_base:
            layers = check_pair(study.model("base"), study.model("tuned"))
            tables.append(pd.DataFrame(layers).assign(pair=name))
            study.close()
    return pd.concat(tables[1:] or tables).set_index(["pair", "family", "layer"])


def likely(study, variant: str = "tuned") -> pd.DataFrame:
    """What `variant` finds likely of every row of a study: the columns first, chance, own, other,
    none, gain and gain_none of `ability`, without any answer generated.
    """
    rows, near = study.rows, neighbours(study.rows)
    reference = rows["reference"].to_list()
    offered = [
        candidates(row, [reference[j] for j in near[i]])
        for i, row in enumerate(rows.to_dict("records"))
    ]
    crossed = [(j, reference[i]) for i in near for j in near[i]]  # its reference, their instruction
    ranked = [(i, answer) for i, some in enumerate(offered) for answer in some]
    asked = list(dict.fromkeys([*enumerate(reference), *crossed, *ranked]))
    loss = dict(zip(asked, _losses(study, variant, asked), strict=True))
    table = [
        {
            "own": loss[i, reference[i]],
            "other": _mean([loss[j, reference[i]] for j in near[i]]),
            **rank_first([(loss[i, answer], right) for answer, right in offered[i].items()]),
        }
        for i in range(len(rows))
    ]
    table = pd.DataFrame(table).assign(none=_after_nothing(study, variant))
    return table.assign(gain=table["other"] - table["own"], gain_none=table["none"] - table["own"])


def neighbours(rows: pd.DataFrame) -> dict[int, list[int]]:
    """Of each row, by its place: the rows one and two places before and behind it, in a circle,
    among those of its category and fold, whose reference is another. If j is i's, i is j's.
    """
    reference = rows["reference"].map(bare).to_numpy()
    near = {}
    for own in rows.reset_index(drop=True).groupby(["fold", "category"]).indices.values():
        for place, i in enumerate(own):
            around = dict.fromkeys(own[(place + step) % len(own)] for step in NEIGHBOURS)
            near[int(i)] = [int(j) for j in around if reference[j] != reference[i]]
    return near


def candidates(row, others) -> dict[str, bool]:
    """Answers to rank, and whether each is right: where its checker has labels those that the row
    names (all of them if those are not a right and a wrong one), else its own reference and
    `others`, those of its neighbours.

    >>> candidates({"reference": "no", "checker": {"name": "exact"}}, ["yes"])
    {'yes': False, 'no': True}
    """
    checker = row["checker"]
    if "labels" not in checker:
        return dict.fromkeys(others, False) | {row["reference"]: True}
    right = {bare(name) for name in (checker["answer"], *checker.get("aliases", ()))}
    offered = {label: bare(label) in right for label in checker["labels"]}
    named = {label: ok for label, ok in offered.items() if _names(row, label)}
    return named if any(named.values()) and not all(named.values()) else offered


def _names(row, label) -> bool:
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text(row), re.IGNORECASE) is not None


def rank_first(losses) -> dict[str, float]:
    """Of candidates [(loss, whether it is right)]: `first`, 1 if a right one has the lowest loss,
    its share of those that tie; `chance`, the share that is right. NaN if all are, or none is.

    >>> rank_first([(0.5, True), (0.7, False)])
    {'first': 1.0, 'chance': 0.5}
    """
    right = [ok for _, ok in losses]
    if all(right) or not any(right):
        return {"first": np.nan, "chance": np.nan}
    least = min(loss for loss, _ in losses)
    lowest = [ok for loss, ok in losses if loss == least]
    return {"first": float(np.mean(lowest)), "chance": float(np.mean(right))}


def _losses(study, variant, pairs) -> np.ndarray:
    """Loss per token of an answer after row i's instruction, of pairs (i, answer)."""
    model, tokenizer = study.model(variant)
    read = texts(study.rows)
    prompts, answers = [read[i] for i, _ in pairs], [answer for _, answer in pairs]
    encoded = encode(tokenizer, prompts, template=study.template, responses=answers)
    refuse_long(model, encoded, [study.rows["id"].iloc[i] for i, _ in pairs])
    return nll(model, encoded, study.profile.batch_tokens)


def _after_nothing(study, variant) -> np.ndarray:
    """Loss per token of each reference after the template around nothing, [I]; NaN where nothing
    would be read.
    """
    model, tokenizer = study.model(variant)
    try:
        encoded = encode_bare(tokenizer, study.rows, study.template)
    except NotTestable:
        return np.full(len(study.rows), np.nan)
    return nll(model, encoded, study.profile.batch_tokens)


def _mean(values):
    return float(np.mean(values)) if values else np.nan


# ---- summed up


def standings(found: pd.DataFrame, resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Each measure of `ability` by pair, model, half ("all" and each fold) and category: columns
    measure, n, value, low, high (95 %), null, p, units.

    strict and first are shares (interval: see `clustered_share`; null 0 and chance), gain and
    gain_none nats per token (`paired_effect`: null 0, two-sided p). units: what counts as
    independent, wordings, or rows where a category has fewer than five. Without five rows there is
    no interval, and without one no value: NaN, "not testable".
    """
    halves = pd.concat([found.assign(half="all"), found.assign(half=found["fold"])])
    out = []
    for place, part in halves.groupby(EACH, sort=False):
        for measure in MEASURES:
            column = "score" if measure == "strict" else measure
            own = part[part[column].notna()]
            summed = _summed(own, column, resamples, seed)
            out.append(dict(zip(EACH, place, strict=True)) | {"measure": measure} | summed)
    return pd.DataFrame(out)


def _summed(own, column, resamples, seed):
    clustered = own["wording"].nunique() >= SMALLEST
    clusters = own["wording"].to_numpy() if clustered else np.arange(len(own))
    out = {"n": len(own), "value": np.nan, "low": np.nan, "high": np.nan, "null": 0.0, "p": np.nan}
    out["units"] = "wordings" if clustered else "rows"
    if own.empty:
        return out | {"units": "not testable"}
    values = own[column].to_numpy(float)
    out["value"] = values.mean()
    if len(own) < SMALLEST:
        return out | {"units": "not testable"}
    if column in ("score", "first"):
        low, high = clustered_share(values, clusters)
        null = own["chance"].mean() if column == "first" else 0.0
        return out | {"low": low, "high": high, "null": null}
    effect = paired_effect(values, np.zeros(len(own)), resamples, seed=seed, clusters=clusters)
    return out | {"low": effect.low, "high": effect.high, "p": effect.p}


def side_by_side(summed: pd.DataFrame) -> pd.DataFrame:
    """`standings` to read: a row per pair, model, half and category, "value [low, high]" of each
    measure, in how many rows, and the gain's p.
    """
    cell = summed["value"].map("{:.2f}".format)
    cell += summed["low"].map(" [{:.2f}, ".format) + summed["high"].map("{:.2f}]".format)
    shown = summed.assign(cell=cell.where(summed["units"] != "not testable", "not testable"))
    wide = shown.pivot(index=EACH, columns="measure", values="cell")[list(MEASURES)]
    n = shown.pivot(index=EACH, columns="measure", values="n")[["strict", "gain"]]
    p = shown.pivot(index=EACH, columns="measure", values="p")["gain"].round(4)
    order = pd.MultiIndex.from_frame(summed[EACH].drop_duplicates())
    return wide.join(n.add_prefix("n ")).assign(**{"p gain": p}).loc[order]


def without_gain(summed: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    """{(pair, model): categories in which the instruction adds nothing that is seen}: the gain's
    interval is not above 0 in all rows together, or there is none.
    """
    gain = summed[(summed["measure"] == "gain") & (summed["half"] == "all")]
    return {
        key: part.loc[~(part["low"] > 0), "category"].to_list()
        for key, part in gain.groupby(["pair", "model"], sort=False)
    }


def cut_short(found: pd.DataFrame) -> pd.DataFrame:
    """Of the answers of `abilities`, by pair and model: n, `cut` (the share that fills all tokens
    it may have, so the rest was never said), right, and `right, cut` (how many of these are cut).
    """
    right = found["score"] == 1
    table = found.assign(n=1, right=right, both=right & found["cut"])
    by = table.groupby(["pair", "model"], sort=False)
    table = by.agg({"n": "sum", "cut": "mean", "right": "sum", "both": "sum"})
    return table.rename(columns={"both": "right, cut"})


def findings(summed: pd.DataFrame, cut: pd.DataFrame) -> list[str]:
    """What `standings` and `cut_short` say, a few sentences for each model."""
    lines = []
    for (pair, model), missing in without_gain(summed).items():
        here = summed["pair"].eq(pair) & summed["model"].eq(model) & summed["half"].eq("all")
        by = {name: part.set_index("category") for name, part in summed[here].groupby("measure")}
        count = len(by["gain"])
        lines.append(
            f"{pair}, {model}: {_range(by['strict'], 'of the answers are right')}; the right one "
            f"is the likeliest {_range(by['first'], 'of the time')} (a random draw among the "
            f"candidates: {by['first']['null'].min():.2f} to {by['first']['null'].max():.2f}, by "
            "category). The own "
            f"instruction makes the reference likelier in {count - len(missing)} of {count} "
            f"categories{_least(by['gain'], missing)}."
        )
        ended = cut.loc[(pair, model)]
        lines.append(
            f"   {ended['cut']:.0%} of its answers fill all tokens they may have, so they are cut; "
            f"{ended['right, cut']:.0f} of its {ended['right']:.0f} right answers are."
        )
        if missing:
            lines.append(
                f"   No gain is seen in {', '.join(missing)}. For these categories we call no "
                f"neuron of {pair}, {model}, instruction-serving."
            )
    return lines


def _range(table, what):
    known = table["value"].dropna()
    if known.empty:
        return f"none {what} (not testable)"
    low, high = known.idxmin(), known.idxmax()
    if f"{known[low]:.2f}" == f"{known[high]:.2f}":
        return f"{known[low]:.2f} {what}, in every category"
    return f"{known[low]:.2f} ({low}) to {known[high]:.2f} ({high}) {what}"


def _least(gain, missing):
    rest = gain.drop(index=missing)
    if rest.empty:
        return ""
    row = rest.loc[rest["value"].idxmin()]
    return (
        f"; among these the gain is smallest in {row.name}: {row['value']:.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}] nats per token"
    )


def numbers(summed: pd.DataFrame, cut: pd.DataFrame) -> dict[str, dict]:
    """{pair: {key: number}} for the summary: ability.<model>.<half>.<category>.<measure>, with
    _ci, _n and, of the gains, _p; accuracy.<model>.<category>, the strict score over all rows;
    answers.<model>.<column> of `cut_short`.
    """
    parts = {pair: {} for pair in summed["pair"].unique()}
    for row in summed.itertuples():
        key = f"ability.{row.model}.{row.half}.{row.category}.{row.measure}"
        part = parts[row.pair]
        part |= {key: row.value, f"{key}_n": row.n, f"{key}_p": row.p}
        if row.low == row.low:
            part[f"{key}_ci"] = [row.low, row.high]
        if (row.half, row.measure) == ("all", "strict"):
            part[f"accuracy.{row.model}.{row.category}"] = row.value
    for (pair, model), row in cut.iterrows():
        parts[pair] |= {f"answers.{model}.{name.replace(', ', '_')}": v for name, v in row.items()}
    return parts


def examples(rows: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Of each pair, model and category the first right and the first wrong answer: columns verdict,
    instruction, answer, reference; where there is none, the line is left out.
    """
    kinds = {1.0: "right", 0.0: "wrong"}
    known = found.assign(verdict=found["score"].map(kinds)).dropna(subset="verdict")
    first = known.groupby(["pair", "model", "category", "verdict"], sort=False).head(1)
    asked = pd.Series(texts(rows), rows["id"])
    expected = rows.set_index("id")["reference"]
    first = first.assign(instruction=first["id"].map(asked), reference=first["id"].map(expected))
    return first[[*EACH[:2], "category", "verdict", "instruction", "answer", "reference"]]
