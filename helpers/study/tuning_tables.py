"""Tables and numbers of the tunings of one model, from what `tuned` kept: no model, no text.

Every comparison is paired, row by row of HexaInst, and draws whole wordings. What cannot be tested
is a row with a note. All is ours, not the paper's.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..analysis.alteration import shares
from ..analysis.stats import SMALLEST, adjust, attempt, bootstrap, paired_effect, plus_one
from ..paths import short
from ..record import NotTestable, RecordMismatch, read_tensors, verify
from . import alteration
from .ledger import LEVEL
from .tuned import (
    CONTROL,
    CONTROLS,
    DEALT,
    MAIN,
    MATTERS,
    ROWS,
    RUNS,
    START,
    digest_of,
    kept_runs,
)
from .tuning import TUNINGS

SECOND, ALONE = "again", "alone"
MEASURES = {"likelier": ("own", -1), "gain": ("gain", 1), "ranked": ("first", 1)}  # and its sign
CARRIED = {"matter": ("gained", "gained_rows"), "transplant": ("forward", "rows")}  # row by row


class Measured(NamedTuple):
    """What `Tunings.measure` left in a folder. parts: {part: (arrays, record)}; rows as
    `rows_table`; runs {tuning: record}; how: resamples and seed of every interval and test.
    """

    rows: pd.DataFrame
    runs: dict
    parts: dict
    how: dict

    def part(self, name: str):
        """(arrays, record) of a part; empty where it was not measured."""
        return self.parts.get(name, ({}, {}))

    def halves(self, places=slice(None)) -> dict[str, np.ndarray]:
        """{"all" and each half: which of these rows}."""
        half = self.rows["half"].to_numpy()[places]
        both = {name: half == name for name in pd.unique(half)}
        return {"all": np.ones(len(half), bool)} | both

    def effect(self, first, second, places):
        """`paired_effect` of two arrays over rows, wordings the clusters, or rows where a set of
        them has fewer than five wordings.
        """
        names = self.rows["wording"].to_numpy()[places]
        clusters = names if len(set(names)) >= SMALLEST else None
        return paired_effect(first, second, **self.how, clusters=clusters)


def read_measured(folder, resamples: int = 2000, seed: int = 0) -> Measured:
    """What is kept in a folder. Raises DamagedFile where a file is not the one that was written,
    RecordMismatch where parts were measured on different rows or tunings.
    """
    folder, parts, first = Path(folder), {}, None
    runs = kept_runs(folder)
    rows = pd.read_csv(folder / ROWS)
    for path in sorted(folder.glob("*.safetensors")):
        arrays, record = read_tensors(path)
        first = first or {key: record[key] for key in ("rows", "tunings", "epsilon")}
        verify(record, first, path, f"Take every part in {short(folder)} from one run")
        parts[path.stem] = arrays, record
    if first and first["tunings"] != digest_of(runs):
        raise RecordMismatch(
            f"{short(folder / RUNS)} names other tunings than those that were measured beside it. "
            "Put the file back that came with the tables, or measure again."
        )
    return Measured(rows, runs, parts, {"resamples": resamples, "seed": seed})


def asked(found: Measured) -> dict[str, pd.DataFrame]:
    """The tables that claims are asked of, all tunings one below the other: `improved`,
    `needs_pairing`, `beyond`, `led`, `matters_more`.
    """
    tables = (improved, needs_pairing, beyond, led, matters_more)
    return {table.__name__: every(found, table) for table in tables}


def numbers(found: Measured, tables: dict) -> dict[str, dict]:
    """{tuning: {key: number}} of all that the claims about tunings ask for, tables as `asked` gives
    them; what was not measured, or cannot be tested, is left out.
    """
    out = {}
    for name in found.runs:
        out[name] = {}
        for part, record in _stated(found, name):
            for row in record:
                key = {"weights": "weights.", "churned": ""}.get(part, f"{part}.")
                key = f"alteration.{key}{row['what']}.{row['half']}"
                keep = {k: v for k, v in row.items() if k not in ("pair", "what", "half", "note")}
                out[name] |= {f"{key}.{k}": v for k, v in keep.items() if v is not None}
        for table in tables.values():
            for row in table[table["tuning"] == name].to_dict("records"):
                out[name] |= _keyed(row)
    return out


def _stated(found, name):
    for part, kept in (("churned", "changed"), *((what, what) for what in MATTERS)):
        record = found.part(f"{kept}-{name}")[1]
        if part in record:
            yield part, record[part]


def _keyed(row):
    """A row of a table with columns key, value, value_ci, p as the summary's numbers."""
    if row["note"]:
        return {}
    stem, _, name = row["key"].rpartition(".")
    p = "p" if name in ("improved", "excess") else f"p_{name}"
    return {row["key"]: row["value"], f"{row['key']}_ci": row["ci"], f"{stem}.{p}": row["p"]}


def _row(key, compute, **place):
    """A row of a table: its place, key, value, ci, p, n, note."""

    def tried():
        effect, n = compute()
        ci = [float(effect.low), float(effect.high)]
        return {"value": float(effect.difference), "ci": ci, "p": float(effect.p), "n": n}

    empty = {"value": np.nan, "ci": [np.nan, np.nan], "p": np.nan, "n": 0, "note": ""}
    return place | {"key": key} | empty | attempt(tried)


def improved(found: Measured, name: str, against: str = START) -> pd.DataFrame:
    """What a tuning made of rows it never saw, against the start or another tuning, by measure,
    half and category: tuning, measure, half, category, before (of `against`), after, chance (of
    `ranked`), value (above 0: better), ci, p (two-sided, sign flips of wordings), n, note, key, and
    p by Holm over the categories.

    likelier: nats per token by which the loss of the reference is lower; gain: by which the
    instruction gain is higher; ranked: share of rows whose right answer is the likeliest candidate.
    """
    (before, _), (after, _) = found.part(f"able-{against}"), found.part(f"able-{name}")
    if not before or not after or name == against:
        return pd.DataFrame(columns=["tuning", "key", "note"])
    key = "improved" if against == START else f"better_than_{against}"
    places, out = before["rows"], []
    category = found.rows["category"].to_numpy()[places]
    for measure, (column, sign) in MEASURES.items():
        for half, here in found.halves(places).items():
            for one in pd.unique(category):
                some = here & (category == one) & np.isfinite(before[column] + after[column])
                pair = [sign * values[column][some].astype(float) for values in (after, before)]
                place = {"tuning": name, "measure": measure, "half": half, "category": one}
                place |= {"before": before[column][some].mean() if some.any() else np.nan}
                place |= {"after": after[column][some].mean() if some.any() else np.nan}
                drawn = some.any() and measure == "ranked"
                place |= {"chance": before["chance"][some].mean() if drawn else np.nan}
                out.append(
                    _row(
                        f"tuning.{measure}.{half}.{one}.{key}",
                        lambda p=pair, s=some: (found.effect(*p, places[s]), int(s.sum())),
                        **place,
                    )
                )
    return holm(pd.DataFrame(out), ["measure", "half"])


def better(found: Measured, name: str) -> pd.DataFrame:
    """`improved` against continued language modelling instead of the start. (Not a claim.)"""
    return improved(found, name, CONTROL)


def controls_of(name: str) -> tuple[str, ...]:
    """The controls that a tuning is held against: none of a control, and no dealt answers of all
    categories beside a tuning on one.
    """
    if name in CONTROLS:
        return ()
    return (CONTROL,) if TUNINGS[name].category else CONTROLS


def needs_pairing(found: Measured, name: str) -> pd.DataFrame:
    """`improved` against the tuning on dealt answers instead of the start: what wrong pairs do not
    give, and what they spoil.
    """
    return improved(found, name, DEALT if DEALT in controls_of(name) else name)


def holm(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The table with `holm`, p adjusted within each group of `by`."""
    table = table.assign(holm=np.nan)
    for _, part in table[table["p"].notna()].groupby(by, sort=False):
        table.loc[part.index, "holm"] = adjust(part["p"].to_numpy(float), "holm")
    return table


def beyond(found: Measured, name: str) -> pd.DataFrame:
    """A tuning against its controls, and against another seed: tuning, what, half, category ("" for
    all), tuned, control, value, ci, p, n, note, key.

    beyond: similarity of start and continued model minus that of start and tuned one, beyond_dealt:
    of start and dealt model minus it; beyond_seed: of the two seeds' ends minus that of the
    tuning's and the continued end, pairing: minus that of the tuning's and the dealt end; excess:
    Jaccard with the main tuning's gained neurons, chance taken off, minus the continued model's;
    own: see `own`.
    """
    pairs, out = found.part("pairs")[0], []
    alike = _between(pairs, found)
    apart_from = dict(zip(CONTROLS, ("beyond", "beyond_dealt"), strict=True))
    for control in controls_of(name):
        each, away = control == CONTROL, (alike(START, control), alike(START, name))
        out += _compared(found, name, apart_from[control], *away, each)
    if name == MAIN:
        for what, control in (("beyond_seed", CONTROL), ("pairing", DEALT)):
            out += _compared(found, name, what, alike(MAIN, SECOND), alike(MAIN, control))
    if f"gain~{name}" in pairs and name not in (*CONTROLS, ALONE):
        both = (pairs.get(f"gain~{one}") for one in (name, CONTROL))
        out += _compared(found, name, "excess", *both, unit=f"common.{name}")
    if name == ALONE and alike(START, ALONE) is not None:
        out += _own(found, alike(START, MAIN), alike(START, ALONE))
    columns = ["tuning", "what", "half", "category", "tuned", "control", "key", "note"]
    return pd.DataFrame(out) if out else pd.DataFrame(columns=columns)


def _between(pairs, found):
    """A function of two models: similarity of their sets, [I], or None."""

    def alike(one, other):
        if one == START and f"changed-{other}" in found.parts:
            return found.part(f"changed-{other}")[0]["similarity"]
        return pairs.get(f"{one}~{other}", pairs.get(f"{other}~{one}"))

    return alike


def _compared(found, name, what, first, second, each=False, unit="neurons"):
    """Rows of `beyond`: first minus second per row, of all rows and halves, and by category."""
    if first is None or second is None:
        return
    category = found.rows["category"].to_numpy()
    groups = [""] + (list(pd.unique(category)) if each else [])
    for half, here in found.halves().items():
        for one in groups:
            some = here & ((category == one) | (one == "")) & np.isfinite(first + second)
            pair = [values[some].astype(float) for values in (first, second)]
            key = ".".join(["tuning", unit, half, *([one] if one else []), what])
            place = {"tuning": name, "what": what, "half": half, "category": one}
            place |= {"control": pair[0].mean(), "tuned": pair[1].mean()}
            at = np.flatnonzero(some)
            yield _row(key, lambda p=pair, a=at: (found.effect(*p, a), len(a)), **place)


class Statistic(NamedTuple):
    """An estimate with its interval and p, named as `stats.Effect` names them."""

    difference: float
    low: float
    high: float
    p: float


def _resampled(statistic, groups, clusters, how) -> Statistic:
    """A statistic of weights [R, I], its interval, and the share of resamples no higher than 0."""
    found = bootstrap(statistic, groups, **how, clusters=clusters)
    p = plus_one(0.0, -found.replicates)
    return Statistic(found.estimate, found.low, found.high, p)


def _own(found, main, alone):
    """Does tuning on one category move its components more than others'? Per row by how much more
    it moved than the tuning on all did; the mean over its own category minus the mean of the
    others' means; wordings drawn within categories.
    """
    category, own = found.rows["category"].to_numpy(), TUNINGS[ALONE].category
    more = (main - alone).astype(float)
    for half, here in found.halves().items():
        names = [own, *(one for one in pd.unique(category) if one != own)]
        member = np.array([(category == one)[here] for one in names], float)  # [C, I]

        def statistic(weights, member=member, values=more[here]):
            means = (weights * values) @ member.T / (weights @ member.T)
            return means[:, 0] - means[:, 1:].mean(1)

        def compute(here=here, statistic=statistic):
            clusters = found.rows["wording"].to_numpy()[here]
            return _resampled(statistic, category[here], clusters, found.how), int(here.sum())

        place = {"tuning": ALONE, "what": "own", "half": half, "category": own}
        yield _row(f"tuning.neurons.{half}.own", compute, **place)


def led(found: Measured, name: str) -> pd.DataFrame:
    """Did the components change before the loss fell? The smaller of two leads, by half: tuning,
    what, half, value, ci, p (one-sided), n, note, key. Not testable where the tuning did not change
    the loss beyond its interval: there are no shares of nothing.
    """
    arrays, out = found.part(f"changed-{name}")[0], []
    if not arrays or name in CONTROLS:
        return pd.DataFrame(columns=["tuning", "key", "note"])
    places = arrays["curve_rows"]
    for half, here in found.halves(places).items():
        curves = [arrays[key][:, here] for key in ("near", "settled", "loss")]

        def compute(curves=curves, here=here):
            *components, loss = curves
            if not _told(found, loss, places[here]):
                raise NotTestable("the tuning did not change this loss beyond its interval.")
            statistic = partial(alteration.least_lead, components, loss)
            clusters = found.rows["wording"].to_numpy()[places[here]]
            groups = np.zeros(int(here.sum()), int)
            return _resampled(statistic, groups, clusters, found.how), int(here.sum())

        place = {"tuning": name, "what": "smaller_lead", "half": half}
        out.append(_row(f"tuning.neurons.{half}.smaller_lead", compute, **place))
    return pd.DataFrame(out)


def matters_more(found: Measured, name: str) -> pd.DataFrame:
    """What a tuning's components carry, minus what a control's carry of the control, on the rows
    measured in both: tuning, what, control, half, value, ci, p, n, note, key.

    gained: the cost of losing the neurons that moved in, beyond random ones, each in its own model;
    forward: what the most moved tenth takes off the start's loss, beyond random tenths. After a
    tuning that raised that loss this is not what the tenth carries of the tuning.
    """
    out = []
    for part, (what, rows) in CARRIED.items():
        mine = found.part(f"{part}-{name}")[0]
        for control in controls_of(name):
            theirs = found.part(f"{part}-{control}")[0]
            if mine and theirs:
                both = np.intersect1d(mine[rows], theirs[rows], return_indices=True)
                out += _carried(found, (name, part, what, control), (mine, theirs), both)
    return pd.DataFrame(out) if out else pd.DataFrame(columns=["tuning", "key", "note"])


def _carried(found, where, arrays, both):
    name, part, what, control = where
    places, *of = both
    pair = [values[what][at].astype(float) for values, at in zip(arrays, of, strict=True)]
    for half, here in found.halves(places).items():
        place = {"tuning": name, "what": what, "control": control, "half": half}
        some = [values[here] for values in pair]
        yield _row(
            f"tuning.{part}.{control}.{half}.{what}",
            lambda s=some, h=here: (found.effect(*s, places[h]), int(h.sum())),
            **place,
        )


# ---- what the page shows


def every(found: Measured, table) -> pd.DataFrame:
    """One of the tables of `asked`, or `better`, of all tunings, one below the other."""
    parts = [table(found, name) for name in found.runs]
    having = [part for part in parts if len(part)] or parts[:1]
    return pd.concat(having, ignore_index=True) if having else pd.DataFrame(columns=["tuning"])


def budgets(found: Measured, data: pd.DataFrame) -> pd.DataFrame:
    """What each tuning read: tuning, reads, category, seed, steps, tokens, times (that over the
    tokens of all its instructions, from the table `data`; NaN of plain text), and the mean loss of
    its first and of its last tenth of steps (of what it reads: not comparable between kinds).
    """
    rows, held = [], data.groupby("category")["tokens"].sum()
    for name, run in found.runs.items():
        losses = [loss for _, _, loss in run["losses"]]
        tenth, how = max(1, len(losses) // 10), run["tuning"]
        row = {"tuning": name, "reads": how["reads"], "category": how["category"] or "all"}
        row |= {"low rank": how["low_rank"], "seed": how["seed"], "steps": len(losses)}
        whole = held.get(how["category"], held.sum()) if how["reads"] != "text" else np.nan
        row |= {"tokens": run["losses"][-1][1], "times": run["losses"][-1][1] / whole}
        row |= {"first": np.mean(losses[:tenth])}
        rows.append(row | {"last": np.mean(losses[-tenth:])})
    return pd.DataFrame(rows)


def recorded(found: Measured, part: str, table: str, rename: bool = False) -> pd.DataFrame:
    """A table that was made beside the models, of every tuning that has it, with its name in the
    column `tuning`: of part "changed" the tables churned, categories and fates; of
    "matter", "transplant", "weights" theirs.
    """
    tables = [
        pd.DataFrame(found.part(f"{part}-{name}")[1][table]).assign(tuning=name)
        for name in found.runs
        if table in found.part(f"{part}-{name}")[1]
    ]
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return whole.rename(columns={"pair": "panel"}) if rename else whole


def pictured(table: pd.DataFrame, value: str, panel: str) -> pd.DataFrame:
    """Rows that have a value, for a figure: its interval as low and high, `panel` named so."""
    table = table[table[value].notna()] if value in table else table.iloc[:0]
    ci = "ci" if "ci" in table else f"{value}_ci"
    bounds = pd.DataFrame(table[ci].tolist(), table.index, ["low", "high"])
    return table.drop(columns=ci).join(bounds).rename(columns={panel: "panel"})


def resemblance(found: Measured) -> pd.DataFrame:
    """Mean similarity of the sets of every two models, over all rows: names by names."""
    names = [START, *found.runs]
    alike = _between(found.part("pairs")[0], found)
    table = pd.DataFrame(1.0, index=names, columns=names)
    for one in names:
        for other in names:
            if one != other and (values := alike(one, other)) is None:
                values = alike(other, one)
            if one != other:
                table.loc[one, other] = np.nan if values is None else float(np.mean(values))
    return table


def of_one_category(found: Measured) -> pd.DataFrame:
    """Category by category: similarity to the start of the model tuned on all, of the one tuned on
    a single category, and by how much the second moved more.
    """
    alike = _between(found.part("pairs")[0], found)
    values = {name: alike(START, name) for name in (MAIN, ALONE)}
    if any(value is None for value in values.values()):
        return pd.DataFrame()
    table = pd.DataFrame(values).groupby(found.rows["category"], sort=False).mean()
    return table.assign(**{"moved more": table[MAIN] - table[ALONE]}).reset_index()


def apart(found: Measured) -> pd.DataFrame:
    """How much further from the start's sets each tuning is than continued language modelling is
    at the same step: panel, line, step, value, low, high, n. The null is 0.
    """
    control, out = found.part(f"changed-{CONTROL}")[0], []
    for name in [name for name in found.runs if name != CONTROL and control]:
        arrays = found.part(f"changed-{name}")[0]
        if arrays:
            near = [one["near"].T.astype(float) for one in (control, arrays)]
            line = found.effect(*near, arrays["curve_rows"])
            rows = {"panel": "neurons", "line": name, "step": arrays["steps"]}
            rows |= {"value": line.difference, "low": line.low, "high": line.high}
            out.append(pd.DataFrame(rows | {"n": len(arrays["curve_rows"])}))
    return pd.concat(out, ignore_index=True) if out else pd.DataFrame()


def where(found: Measured, name: str = MAIN) -> pd.DataFrame:
    """Where a tuning changed more than noise, and more than its controls did, by layer and
    category: panel, category, layer, value (change beyond the noise floor, minus the control's),
    low, high, p, n, beyond (told from 0, Benjamini-Hochberg over all cells of a panel).
    """
    mine, record = found.part(f"changed-{name}")
    numbers = [row["layer"] for row in record.get("fates", ())]
    nulls = {"beyond noise": 0.0}
    for control in controls_of(name):
        theirs = found.part(f"changed-{control}")[0]
        nulls |= {f"beyond {control}": theirs["layers"].astype(float)} if theirs else {}
    panels = [_cells(found, mine["layers"], nulls[p], numbers, p) for p in nulls if mine]
    return pd.concat(panels, ignore_index=True) if panels else pd.DataFrame()


def _cells(found, layers, null, numbers, panel):
    """One panel of `where`: layers [I, L] minus their null, by category; numbers, of the L."""
    change, category = layers.astype(float) - null, found.rows["category"].to_numpy()
    rows = []
    for one in pd.unique(category):
        at = np.flatnonzero(category == one)
        effect = found.effect(change[at], np.zeros_like(change[at]), at)
        row = {"panel": panel, "category": one, "layer": numbers}
        row |= {"value": effect.difference, "low": effect.low, "high": effect.high}
        rows.append(pd.DataFrame(row | {"p": effect.p, "n": len(at)}))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(beyond=adjust(table["p"].to_numpy(), "bh") < LEVEL)


def trajectories(found: Measured) -> pd.DataFrame:
    """Shares of the final change along each tuning: panel, line, step, value, null, n; the null is
    the loss of the same references under continued language modelling, in units of what the tuning
    took off it. A tuning that did not change that loss beyond its interval has no shares of it, and
    is left out.
    """
    control, out = found.part(f"changed-{CONTROL}")[0], []
    for name in [name for name in found.runs if name not in CONTROLS]:
        arrays = found.part(f"changed-{name}")[0]
        if arrays and not _told(found, arrays["loss"], arrays["curve_rows"]):
            continue
        lines = {"left the start's sets": "near", "came to the final sets": "settled"}
        lines |= {"loss of references": "loss"} if arrays else {}
        curves = attempt(partial(_shares, arrays, lines)) if arrays else {}
        if control and arrays and "note" not in curves:
            loss, other = arrays["loss"].mean(1), control["loss"].mean(1)
            said = "null: loss, continued language modelling"
            curves[said] = (other - loss[0]) / (loss[-1] - loss[0])
        for line, values in curves.items():
            if line != "note":
                rows = {"panel": name, "line": line, "step": arrays["steps"], "value": values}
                rows |= {"null": line.startswith("null"), "n": len(arrays["curve_rows"])}
                out.append(pd.DataFrame(rows))
    return pd.concat(out, ignore_index=True) if out else pd.DataFrame()


def _told(found, loss, places) -> bool:
    """Whether a tuning changed a loss [S, I] of rows at these places, beyond its interval."""
    change = found.effect(*(loss[end].astype(float) for end in (0, -1)), places)
    return bool(change.low > 0 or change.high < 0)


def _shares(arrays, lines):
    return {line: shares(arrays[key].astype(float))[0] for line, key in lines.items()}


SAID = (  # a number, its p, what it says above 0, and below
    (
        "alteration.neurons.all.excess_churn",
        "p",
        "its sets moved beyond the noise floor, by",
        "its sets moved less than the noise floor, by",
    ),
    (
        "tuning.neurons.all.beyond",
        "p_beyond",
        "they moved further than under continued language modelling, by",
        "they moved less far than under continued language modelling, by",
    ),
    (
        "tuning.neurons.all.beyond_seed",
        "p_beyond_seed",
        "two seeds of it end more alike than it and continued language modelling, by",
        "two seeds of it end less alike than it and continued language modelling, by",
    ),
    (
        "tuning.neurons.all.beyond_dealt",
        "p_beyond_dealt",
        "they moved further than under dealt answers, by",
        "they moved less far than under dealt answers, by",
    ),
    (
        "tuning.neurons.all.pairing",
        "p_pairing",
        "two seeds of it end more alike than it and the tuning on dealt answers, by",
        "two seeds of it end less alike than it and the tuning on dealt answers, by",
    ),
    (
        "tuning.neurons.all.own",
        "p_own",
        "its own category's sets moved more than the others', by",
        "its own category's sets moved less than the others', by",
    ),
    (
        "tuning.neurons.all.smaller_lead",
        "p_smaller_lead",
        "by either metric its sets run ahead of the loss, as a share of the whole change by",
        "by one metric at least its sets lag behind the loss, as a share of the whole change by",
    ),
    (
        "alteration.transplant.forward.all.effect",
        "p",
        "inside the start, its most moved tenth lowers the loss more than random tenths, nats",
        "inside the start, its most moved tenth lowers the loss less than random tenths, nats",
    ),
    (
        "alteration.matter.gained.all.critical",
        "p",
        "losing what it gained costs more than losing random neurons, in nats by",
        "losing what it gained costs less than losing random neurons, in nats by",
    ),
    *(
        (
            f"tuning.{part}.{control}.all.{what}",
            f"p_{what}",
            f"{said} more than in the control {control}, in nats by",
            f"{said} less than in the control {control}, in nats by",
        )
        for part, what, said in (
            ("transplant", "forward", "the most moved tenth lowers the start's loss"),
            ("matter", "gained", "losing what it gained costs"),
        )
        for control in CONTROLS
    ),
)


def sentences(numbers: dict, improved: pd.DataFrame) -> list[str]:
    """What was found, tuning by tuning, from `numbers` and a table as `improved` gives it; what is
    not there is left out.
    """
    lines = []
    for name, known in numbers.items():
        lines += _said_to_improve(name, improved)
        for key, p, above, below in SAID:
            if key in known:
                stem = key.rpartition(".")[0]
                lines.append(f"{name}: {_said(known, key, f'{stem}.{p}', above, below)}.")
    return lines


def _said(known, key, p, above, below):
    value, (low, high) = known[key], known[f"{key}_ci"]
    sure = (low > 0 or high < 0) and min(known[p], 1 - known[p]) < LEVEL  # some p are one-sided
    if value < 0:
        above, value, low, high = below, -value, -high, -low
    return f"{above} {value:.3f} [{low:.3f}, {high:.3f}]{'' if sure else ', not told from 0'}"


def ends(found: Measured) -> list[str]:
    """Which models end most like the main tuning, and what all its neurons carry, both ways."""
    near = resemblance(found)[MAIN].drop(MAIN).dropna().sort_values(ascending=False)
    listed = ", ".join(f"{name} {value:.3f}" for name, value in near.items())
    lines = [f"Most like {MAIN}, of most to least alike sets: {listed}."]
    curve = recorded(found, "transplant", "curve")
    if len(curve):
        for panel, rows in curve[curve["share"] == 1].groupby("panel", sort=False):
            row = rows.iloc[0]
            lines.append(
                f"{panel}, all neurons: the loss goes from {row['host']:.2f} to {row['loss']:.2f}; "
                f"the other model's is {row['donor']:.2f}."
            )
    return lines


def _said_to_improve(name, table):
    """In which categories each measure improved or fell, by interval and Holm."""
    table = table[table["tuning"] == name]
    for measure in MEASURES if len(table) else ():
        part = table[(table["measure"] == measure) & (table["half"] == "all")]
        part = part[part["value"].notna()]
        low, high = (np.array([ci[end] for ci in part["ci"]]) for end in (0, 1))
        sure = (part["holm"] < LEVEL).to_numpy()
        up, down = (part["category"][sure & side].tolist() for side in (low > 0, high < 0))
        yield (
            f"{name}, {measure}: better in {', '.join(up) or 'none'}, worse in "
            f"{', '.join(down) or 'none'} of {len(part)} categories."
        )
