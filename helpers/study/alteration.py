"""What tuning changed in a study's components, beyond noise and beyond mere training, when, and
whether it matters.

A measure (`churned`, `training`, `leads`, ...) reads one study, and its measured tunings where it
asks for `runs`, and yields (key, values); `measured` takes it to all pairs that have a base. What
cannot be tested is a row with a note. (Ours.)
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..analysis.alteration import change_correlation, changes, common_gain, lead, shares
from ..analysis.controls import layer_matched
from ..analysis.sets import codes, consensus, frequency, set_size, top_experts, top_sets
from ..analysis.similarity import agreement, churn, jensen_shannon, noise_floor
from ..analysis.stats import adjust, attempt, bootstrap, paired_effect, plus_one
from ..capture.interventions import transplant, weight_change
from ..hexainst.corpus import wordings
from ..record import NotTestable
from .evaluate import ablation_matrix, nll
from .sets import drawn_as_one, layer_numbers

MODELS = ("base", "tuned")
SPLIT = ("prompt-even", "prompt-odd")
FATES = ("kept", "gained", "lost")
TUNINGS = {"full-s0": "replay", "full-s1": "seed", "lora-s0": "lora"}
TUNED, TRAINED = "full-s0", "pretraining-s0"  # the run, and the one without any instruction
SHARES, TENTH = (0.05, 0.1, 0.4, 1.0), 0.1  # of the neurons, transplanted
DRAWS = {0.05: 2, 0.1: 10, 0.4: 10, 1.0: 0}  # random sets of each share
WAYS = {"forward": ("base", "tuned"), "reverse": ("tuned", "base")}  # host, donor
NO_RUN = "not testable: data/trajectory/ has no such run of this pair at these settings"


class Found(NamedTuple):
    """A tidy table, and the summary's numbers of each pair: {pair: {key: value}}."""

    table: pd.DataFrame
    numbers: dict


def with_base(studies: dict) -> tuple[dict, str]:
    """The studies that have a base, and a sentence that names the others."""
    pairs = {name: study for name, study in studies.items() if study.has_base}
    single = ", ".join(name for name in studies if name not in pairs)
    if not single:
        return pairs, "Every model here has its base: " + ", ".join(pairs) + "."
    return pairs, f"No base: {single}. What tuning changed cannot be asked of a single model."


def measured(pairs: dict, measure, runs=None) -> Found:
    """`measure(study)`, or `measure(study, runs[pair])`, of all pairs.

    A measure yields (key, values); the key ends in what.half. The row has pair, what, half, note
    and the values, the numbers are alteration.{key}.{name}.
    """
    rows, numbers = [], {pair: {} for pair in pairs}
    for pair, study in pairs.items():
        for key, values in measure(study) if runs is None else measure(study, runs[pair]):
            numbers[pair] |= {f"alteration.{key}.{k}": v for k, v in values.items() if k != "note"}
            what, half = key.split(".")[-2:]
            rows.append({"pair": pair, "what": what, "half": half, "note": ""} | values)
    return Found(pd.DataFrame(rows), numbers)


def joined(studies: dict, *found: Found) -> dict:
    """The numbers of several findings, as `summary.write_part` takes them; a single model's part is
    empty.
    """
    numbers = {name: {} for name in studies}
    for one in found:
        for pair, keys in one.numbers.items():
            numbers[pair] |= keys
    return numbers


def shown(table: pd.DataFrame, columns, by=("pair", "what", "half"), digits: int = 3):
    """Some columns as a page prints them: rounded, an interval as [low, high], what is missing as
    "not testable"; the note only where there is one. An empty table is a sentence.
    """
    if table.empty:
        return "nothing to show: no model here has what this needs"

    def said(value):
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(f"{v:.{digits}f}" for v in value) + "]"
        if value is None or value != value:
            return "not testable"
        if not isinstance(value, (float, np.floating)):
            return value
        small = 0 < abs(value) < 0.5 * 10**-digits  # a p is never 0
        return float(f"{value:.1g}") if small else round(float(value), digits)

    noted = ["note"] if "note" in table and table["note"].astype(bool).any() else []
    names = [*by, *(c for c in columns if c in table), *noted]
    return table[names].set_index(list(by)).map(said)


# ---- what a study holds


def halves(study) -> dict[str, np.ndarray]:
    """{"all" and each fold: which rows, bool [I]}."""
    fold = study.rows["fold"].to_numpy()
    return {"all": np.ones(len(fold), bool)} | {half: fold == half for half in study.halves}


def sets(study, variant: str) -> np.ndarray:
    """Each instruction's set of neurons, bool [I, M]."""
    return study.once(
        ("sets", variant),
        lambda: top_sets(study.counts(variant).unit("neurons"), study.profile.epsilon)[0],
    )


def units(study) -> tuple[str, ...]:
    """The components whose sets or routing are compared: neurons and, if there are any, experts."""
    return tuple(unit for unit in study.units if unit != "shared")


def unchanged(study) -> bool:
    """Do base and tuned count the same on every row? Then tuning left nothing to be found."""
    one, two = (study.counts(model).arrays() for model in MODELS)
    return all(np.array_equal(one[name], two[name]) for name in one)


def _how(study):
    return {"resamples": study.profile.resamples, "seed": study.profile.seed}


def _effect(study, first, second=0.0, clusters=None):
    return paired_effect(first, np.zeros_like(first) + second, **_how(study), clusters=clusters)


# ---- what changed


class Similarities(NamedTuple):
    """Base against tuned on the same tokens [I]; half of the tokens against the other half, within
    one model (floor) and from one to the other (across), [I], and layer by layer [I, L]; fates
    {kept, gained, lost} [I, L] of neurons across the halves, None of experts.
    """

    similarity: np.ndarray
    floor: np.ndarray
    across: np.ndarray
    layers: tuple[np.ndarray, np.ndarray]
    fates: dict | None


def similarities(study, unit: str) -> Similarities:
    """How alike base and tuned are, beside the noise floor: Jaccard of sets of neurons,
    Jensen-Shannon similarity of routing.
    """
    of = _of_experts if unit == "experts" else _of_neurons
    return study.once(("alteration", unit), lambda: of(study))


def _of_neurons(study):
    parts = [[study.counts(model, where).unit("neurons") for where in SPLIT] for model in MODELS]
    layers = parts[0][0].shape[1]
    split = noise_floor(*parts, study.profile.epsilon, layers)
    whole = churn(sets(study, "base"), sets(study, "tuned"), layers)["jaccard"]
    kept = {name: of_union(found)["kept"] for name, found in split.items()}
    return Similarities(
        whole,
        (split["base"]["jaccard"] + split["tuned"]["jaccard"]) / 2,
        split["across"]["jaccard"],
        ((kept["base"] + kept["tuned"]) / 2, kept["across"]),
        split["across"],
    )


def _of_experts(study):
    def alike(one, two):  # (model, positions) twice -> [I, L]
        return jensen_shannon(*(study.counts(*which).routed for which in (one, two)))

    floor, across = _halves_of_tokens(alike)
    whole = alike(("base", "prompt"), ("tuned", "prompt")).mean(1)
    return Similarities(whole, floor.mean(1), across.mean(1), (floor, across), None)


def _halves_of_tokens(alike) -> tuple[np.ndarray, np.ndarray]:
    """(floor, across): how alike even and odd tokens are in one model, mean of both; and even
    tokens of one model and odd ones of the other, mean of both ways. alike: of (model, positions).
    """
    even, odd = SPLIT
    floor = [alike((model, even), (model, odd)) for model in MODELS]
    across = [alike((one, even), (two, odd)) for one, two in (MODELS, MODELS[::-1])]
    return sum(floor) / 2, sum(across) / 2


def of_union(found: dict, axis=None) -> dict:
    """{"kept", "gained", "lost"} [I, L] as shares of the union, per layer or, axis 1, over all."""
    values = {f: found[f] if axis is None else found[f].sum(axis) for f in FATES}
    return {f: v / np.maximum(sum(values.values()), 1) for f, v in values.items()}


def churned(study):
    """Base against tuned, beside the floor: excess_churn = floor minus across, per unit, half."""
    for unit in units(study):
        found = similarities(study, unit)
        for half, here in halves(study).items():
            yield f"{unit}.{half}", attempt(partial(_excess, study, found, here))


def _excess(study, found, here):
    effect = _effect(study, found.floor[here], found.across[here])
    return {
        "similarity": found.similarity[here].mean(),
        "noise_floor": found.floor[here].mean(),
        "across": found.across[here].mean(),
        "excess_churn": effect.difference,
        "excess_churn_ci": [effect.low, effect.high],
        "p": effect.p,
        "detectable": effect.detectable,
        "n": int(here.sum()),
    }


def layers(pairs: dict) -> pd.DataFrame:
    """Similarity across the halves, layer by layer, beside the floor: panel, layer, similarity,
    low, high, floor, excess (floor minus similarity), excess_low, excess_high, beyond (below the
    floor, Benjamini-Hochberg over layers), n.
    """
    found = []
    for pair, study in pairs.items():
        for unit in units(study):
            floor, across = similarities(study, unit).layers
            line, change = _effect(study, across), _effect(study, floor, across)
            rows = {
                "panel": f"{pair}: {unit}",
                "layer": layer_numbers(study, unit),
                "similarity": line.difference,
                "low": line.low,
                "high": line.high,
                "floor": floor.mean(0),
                "excess": change.difference,
                "excess_low": change.low,
                "excess_high": change.high,
                "beyond": (adjust(change.p, "bh") < 0.05) & (change.difference > 0),
                "n": len(across),
            }
            found.append(pd.DataFrame(rows))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def categories(pairs: dict) -> pd.DataFrame:
    """Neurons by category: shares of the union kept, gained and lost across the halves of tokens,
    the floor of kept, their difference, its interval and p, Holm's over the categories; and by how
    much the mean activation frequency moved.
    """
    found = []
    for pair, study in pairs.items():
        alike, moved = similarities(study, "neurons"), _frequencies(study, "neurons")
        fates, rows = of_union(alike.fates, 1), []
        drift = (moved[1] - moved[0]).reshape(len(study.rows), -1).mean(1)
        for code, category in enumerate(study.categories):
            here = study.labels == code
            row = {"pair": pair, "category": category, "note": "", "n": int(here.sum())}
            row |= {fate: values[here].mean() for fate, values in fates.items()}
            row |= {"floor": alike.floor[here].mean()}
            rows.append(row | attempt(partial(_category, study, alike, fates, drift, here)))
        table = pd.DataFrame(rows)
        if "p" in table:
            tested = table["p"].notna()
            table.loc[tested, "holm"] = adjust(table.loc[tested, "p"].astype(float), "holm")
        found.append(table)
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def layer_fates(study) -> pd.DataFrame:
    """Of the neurons in either set, layer by layer, the shares kept, gained and lost across the
    halves of tokens, and kept within one model (floor), means over rows: layer, kept, gained, lost,
    floor, n.
    """
    found = similarities(study, "neurons")
    shares_of = {fate: values.mean(0) for fate, values in of_union(found.fates).items()}
    rows = {"layer": layer_numbers(study)} | shares_of
    return pd.DataFrame(rows | {"floor": found.layers[0].mean(0), "n": len(study.rows)})


def _category(study, alike, fates, drift, here):
    effect = _effect(study, alike.floor[here], fates["kept"][here])
    change = _effect(study, drift[here])
    return {
        "excess": effect.difference,
        "ci": [effect.low, effect.high],
        "p": effect.p,
        "change of p": change.difference,
        "its ci": [change.low, change.high],
    }


def _frequencies(study, unit):
    """Of base and tuned, [I, L, ...] each."""
    found = [study.counts(model) for model in MODELS]
    return [frequency(c.unit(unit), c.tokens) for c in found]


def routing(pairs: dict) -> pd.DataFrame:
    """Per layer, the share of the K most used experts that stay: pair, layer, K, kept (of whole
    prompts), across (of base and tuned on the other half of the tokens), floor (of one model on
    both halves), excess = floor minus across, ci, n.
    """
    found = []
    for pair, study in pairs.items():
        if "experts" not in study.units:
            continue
        alike = partial(_alike_experts, study)
        kept = alike(("base", "prompt"), ("tuned", "prompt")).mean(0)
        floor, across = _halves_of_tokens(alike)
        excess = _effect(study, floor, across)
        numbers, k = layer_numbers(study, "experts"), study.counts().per_token()
        for n, layer in enumerate(numbers):
            row = {"kept": kept[n], "across": across[:, n].mean(), "floor": floor[:, n].mean()}
            row |= {"excess": excess.difference[n], "ci": [excess.low[n], excess.high[n]]}
            found.append({"pair": pair, "layer": layer, "K": k} | row | {"n": len(floor)})
    return pd.DataFrame(found)


def _alike_experts(study, one, two) -> np.ndarray:
    """Of the K most used experts under one (model, positions), the share that are so under the
    other, too: [I, L]; ties are broken apart.
    """
    k, seed = study.counts().per_token(), study.profile.seed
    routed = [study.counts(*which).routed for which in (one, two)]
    return agreement(*(top_experts(counts, k, seed + n) for n, counts in enumerate(routed)))


# ---- is it tuning, or just training?


def training(study, runs: dict):
    """Tuning against as many steps of further pre-training: similarity of base and further
    pre-trained minus similarity of base and tuned, per instruction; wordings are the clusters.
    """
    for unit in units(study):
        for half, here in halves(study).items():
            yield (
                f"training.{unit}.{half}",
                attempt(partial(_beyond, study, runs, unit, here)),
            )


def _beyond(study, runs, unit, here):
    tuned, trained = _comparable(runs)
    one, two = (getattr(run, unit) for run in (trained, tuned))
    if one is None or two is None:
        raise NotTestable(f"the measured runs hold no {unit}.")
    some = here[tuned.rows]
    names = wordings(study.rows.iloc[tuned.rows[some]])
    effect = _effect(study, one[-1][some], two[-1][some], names)
    return {
        "pretrained": one[-1][some].mean(),
        "tuned": two[-1][some].mean(),
        "beyond": effect.difference,
        "beyond_ci": [effect.low, effect.high],
        "p_beyond": effect.p,
        "detectable": effect.detectable,
        "n": int(some.sum()),
        "wordings": len(set(names)),
    }


def _comparable(runs):
    """The tuning and the further pre-training; NotTestable unless both read the same rows at the
    same steps.
    """
    if not {TUNED, TRAINED} <= set(runs):
        raise NotTestable(f"data/trajectory/ lacks {TUNED} or {TRAINED} at these settings.")
    tuned, trained = runs[TUNED], runs[TRAINED]
    if not np.array_equal(tuned.rows, trained.rows) or tuned.steps[-1] != trained.steps[-1]:
        raise NotTestable(f"{tuned.name} and {trained.name} differ in their rows or steps.")
    return tuned, trained


def training_curves(pairs: dict, runs: dict) -> pd.DataFrame:
    """Similarity to the base along the steps of tuning and of further pre-training: panel, run,
    step, value, low, high, n.
    """
    found = []
    for pair, study in pairs.items():
        for unit in units(study) if {TUNED, TRAINED} <= set(runs[pair]) else ():
            for key, said in ((TRAINED, "further pre-training"), (TUNED, "instruction tuning")):
                run = runs[pair][key]
                names = wordings(study.rows.iloc[run.rows])
                line = _effect(study, getattr(run, unit).T, clusters=names)
                rows = {"panel": f"{pair}: {unit}", "run": said, "step": run.steps}
                rows |= {"value": line.difference, "low": line.low, "high": line.high}
                found.append(pd.DataFrame(rows | {"n": len(run.rows)}))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


# ---- when


def leads(study, runs: dict):
    """Components before ability? `lead` by the share that left the base's sets (neurons, experts)
    and by the share that came to the final ones (settled); of neurons also the smaller of the two.
    """
    if TUNED not in runs:
        yield "trajectory.neurons.all", {"note": NO_RUN}
        return
    run = runs[TUNED]
    curves = {"neurons": run.neurons, "experts": run.experts, "settled": run.to_final}
    for half, here in halves(study).items():
        some = here[run.rows]
        rows = study.rows.iloc[run.rows[some]]
        for unit, values in curves.items():
            if values is not None:
                found = attempt(partial(_lead, study, values[:, some], run.correct[:, some], rows))
                if unit == "neurons":
                    both = [values[:, some], run.to_final[:, some]]
                    found |= attempt(partial(smaller_lead, study, both, run.correct[:, some], rows))
                yield f"trajectory.{unit}.{half}", found


def _lead(study, values, correct, rows):
    groups = codes(rows["category"].to_numpy())
    return lead(values, correct, groups, **_how(study)) | {"n": len(rows)}


def smaller_lead(study, curves, correct, rows) -> dict:
    """The smaller of the leads of several curves of components, [S, I] each, over the ability's;
    wordings drawn. p: share of resamples no higher than 0.
    """

    statistic = partial(least_lead, curves, correct)
    found = bootstrap(statistic, np.zeros(len(rows), int), **_how(study), clusters=wordings(rows))
    return {
        "smaller_lead": found.estimate,
        "smaller_lead_ci": [found.low, found.high],
        "p_smaller_lead": plus_one(0.0, -found.replicates),
        "smaller_detectable": found.detectable,
    }


def least_lead(curves, ability, weights) -> np.ndarray:
    """The smaller of the leads of several curves [S, I] over the ability's, of weights [R, I]."""
    own = shares(ability, weights)
    ahead = [(shares(values, weights) - own)[:, 1:].mean(1) for values in curves]
    return np.min(ahead, axis=0)


def curves(pairs: dict, runs: dict) -> pd.DataFrame:
    """Shares of the tuning's final change along its steps: panel, line, step, value, null (bool:
    the ability under further pre-training, in units of what tuning gained), n.
    """
    found = []
    for pair in pairs:
        run = runs[pair].get(TUNED)
        for line, values in attempt(partial(_lines, runs[pair])).items() if run else ():
            if line != "note":
                rows = {"panel": pair, "line": line, "step": run.steps, "value": values}
                rows |= {"null": "pre-training" in line, "n": len(run.rows)}
                found.append(pd.DataFrame(rows))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def _lines(runs):
    run, trained = runs[TUNED], runs.get(TRAINED)
    lines = {"neurons: left the base's sets": shares(run.neurons)[0]}
    lines |= {"neurons: came to the final sets": shares(run.to_final)[0]}
    ability = run.correct.mean(1)  # NaN where a category could not be scored
    if np.isfinite(ability).all():
        lines["accuracy"] = shares(run.correct)[0]
        if trained is not None and np.array_equal(trained.steps, run.steps):
            gained = trained.correct.mean(1) - trained.correct[0].mean()
            lines["null: accuracy, further pre-training"] = gained / (ability[-1] - ability[0])
    if run.experts is not None:
        lines["experts: left the base's routing"] = shares(run.experts)[0]
    return lines


def provenance(pairs: dict, runs: dict) -> pd.DataFrame:
    """The measured runs: pair, run, steps, checkpoints, rows, final accuracy, whether the last
    checkpoint is the shipped model, and how alike its sets are to the shipped model's.
    """
    found = []
    for pair, study in pairs.items():
        for name, run in runs[pair].items():
            last = run.record["checkpoints"][max(run.record["checkpoints"])]
            alike = churn(sets(study, "tuned")[run.rows], run.final)["jaccard"].mean()
            row = {"pair": pair, "run": name, "steps": int(run.steps[-1])}
            row |= {"checkpoints": len(run.steps), "n": len(run.rows)}
            row |= {"accuracy": run.correct[-1].mean(), "like the base": run.neurons[-1].mean()}
            row |= {"like the shipped": alike, "shipped": last == run.record["tuned"]}
            found.append(row)
    return pd.DataFrame(found)


def common(study, runs: dict):
    """Do other tunings of the base gain the same neurons? Jaccard of the gained sets minus its
    expectation by chance, per instruction; beside them the control of mere training, `training`.
    """
    for name, unit in (TUNINGS | {TRAINED: "training"}).items():
        for half, here in halves(study).items() if name in runs else ():
            yield f"common.{unit}.{half}", attempt(partial(_common, study, runs[name], here))


def _common(study, run, here):
    some = here[run.rows]
    of = (sets(study, model)[run.rows][some] for model in MODELS)
    depth = study.counts("base").unit("neurons").shape[1]
    gained = common_gain(*of, run.final[some], depth)
    effect = _effect(study, gained[:, 0], gained[:, 1])
    return {
        "jaccard": gained[:, 0].mean(),
        "by chance": gained[:, 1].mean(),
        "excess": effect.difference,
        "excess_ci": [effect.low, effect.high],
        "p": effect.p,
        "n": len(gained),
    }


# ---- the weights


def moved(study, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """(relative change of each component's gate or router row [L, M], |change of its frequency|
    [I, L, M]).
    """
    change = study.once(
        "weight change", lambda: weight_change(*(study.model(model)[0] for model in MODELS))
    )[study.counts("base").family(unit)]
    flat, (one, two) = change.reshape(len(change), -1), _frequencies(study, unit)
    return flat, np.abs(two - one).reshape(len(one), *flat.shape)


def weights(study):
    """Rank correlation, within layers, of change in weights and change in frequency."""
    for unit in study.units:
        (change, values), names = moved(study, unit), wordings(study.rows)
        for half, here in halves(study).items():
            how = _how(study) | {"clusters": names[here]}
            found = attempt(partial(change_correlation, change, values[here], **how))
            yield f"weights.{unit}.{half}", found | {"n": int(here.sum())}


def weight_bins(pairs: dict, found: Found, most: int = 10) -> pd.DataFrame:
    """Change in frequency in bins of equal change in weights: panel (with rho and p), layer,
    weight, moved, components, null (the layer's mean: no relation), n.
    """
    rows = []
    for pair, study in pairs.items():
        for unit in study.units:
            numbers, key = found.numbers[pair], f"alteration.weights.{unit}.all"
            if f"{key}.rho" not in numbers:
                continue
            said = f"rho {numbers[key + '.rho']:.2f}, p {numbers[key + '.p']:.4f}"
            change, values = moved(study, unit)
            places = layer_numbers(study, unit)
            for layer, w, m in zip(places, change, values.mean(0), strict=True):
                for part in np.array_split(np.argsort(w, kind="stable"), min(most, len(w))):
                    row = {"panel": f"{pair}: {unit}\n{said}", "layer": layer}
                    row |= {"weight": w[part].mean(), "moved": m[part].mean()}
                    row |= {"components": len(part), "null": m.mean(), "n": len(values)}
                    rows.append(row)
    return pd.DataFrame(rows)


# ---- does it matter?


def matter(study):
    """What tuning moved into a category's consensus set (gained), kept there, moved out (lost), is
    ablated in the tuned model: own effect minus the mean of layer-matched random sets, chosen on
    one half and measured on the other.
    """
    found = attempt(lambda: study.once("matter", lambda: _matter(study)))
    if "note" in found:
        yield "matter.gained.all", found
        return
    for fate in ("gained", "kept", "lost"):
        for half, parts in _pooled(study).items():
            values = [found[fate, part] for part in parts if not found[fate, part].empty]
            yield f"matter.{fate}.{half}", attempt(partial(_critical, study, values))


def _pooled(study):
    """{"all": both halves, each half: itself}."""
    return {"all": study.halves} | {half: (half,) for half in study.halves}


def _matter(study):
    """{(fate, half): DataFrame of row, category, size, difference, a line per measured row}."""
    found = {}
    for half in study.halves:
        rng, other = study.rng(half), study.other(half)
        here, chosen = study.half(half).measured(), halves(study)[other]
        one, two = (
            consensus(sets(study, model)[chosen], study.labels[chosen], study.profile.tau)
            for model in MODELS
        )
        for fate, members in changes(one, two).items():
            lines = [pd.DataFrame(columns=["row", "category", "size", "difference"])]
            for category, own in zip(study.categories, members, strict=True):
                if own.any():
                    rows = here.category(category)
                    values = _ablated(rows, own, rng)
                    line = {"category": category, "size": int(own.sum()), "difference": values}
                    lines.append(pd.DataFrame(line | {"row": rows.places}))
            found[fate, half] = pd.concat(lines[1:] or lines, ignore_index=True)
    return found


def _ablated(here, members, rng):
    """Own effect minus the controls' mean, per row."""
    mask, number = here.whole.counts().mask("neurons", members), here.profile.controls
    masks = {"own": mask} | {draw: layer_matched(mask, rng) for draw in range(number)}
    table = ablation_matrix(here, masks, "zero", allow_inert=True)
    return (table["own"] - table.drop(columns="own").mean(axis=1)).to_numpy()


def _critical(study, values):
    if not values:
        raise NotTestable("tuning left every category's set empty here.")
    table = pd.concat(values)
    difference, groups = table["difference"].to_numpy(float), table["category"].to_numpy(str)
    clusters = drawn_as_one(study.take(table["row"].to_numpy(int)))
    found = bootstrap(lambda w: w @ difference / w.sum(1), groups, **_how(study), clusters=clusters)
    sizes = table.groupby("category")["size"].mean()
    return {
        "critical": found.estimate,
        "critical_ci": [found.low, found.high],
        "p": _effect(study, difference, clusters=clusters).p,
        "detectable": found.detectable,
        "neurons": sizes.mean(),
        "n": len(table),
    }


def matter_of_rows(study) -> dict[str, np.ndarray]:
    """What the means of `matter` are of, halves one after the other: {fate: own effect minus the
    controls' mean, float32 [n], and fate_rows: places of these rows, int32 [n]}; empty where
    nothing could be ablated.
    """
    parts = attempt(lambda: study.once("matter", lambda: _matter(study)))
    if "note" in parts:
        return {}
    found = {}
    for fate in ("gained", "kept", "lost"):
        table = pd.concat([parts[fate, half] for half in study.halves])
        found[fate] = table["difference"].to_numpy(np.float32)
        found[f"{fate}_rows"] = table["row"].to_numpy(np.int32)
    return found


def picture(found: Found, value: str = "critical") -> pd.DataFrame:
    """A finding's rows that have a value, for a figure: panel (the pair), its interval as low and
    high.
    """
    table = found.table
    if value not in table:
        return pd.DataFrame()
    table = table[table[value].notna()]
    ci = pd.DataFrame(table[f"{value}_ci"].tolist(), table.index, ["low", "high"])
    return table.drop(columns=f"{value}_ci").join(ci).rename(columns={"pair": "panel"})


def transplanted(study):
    """The most moved tenth of the neurons, ranked on one half, given the other model's weights,
    against as many random ones of their layers: loss of references on the other half.
    """
    found = attempt(lambda: study.once("transplants", lambda: _transplants(study)))
    if "note" in found:
        yield "transplant.forward.all", found
        return
    for way, sign in (("forward", 1), ("reverse", -1)):
        for half, parts in _pooled(study).items():
            of = [found[way, part][TENTH] for part in parts]
            values = np.concatenate([sign * (random - own) for own, random in of], axis=1)
            rows = [drawn_as_one(study.half(part).measured()) for part in parts]
            put = partial(_put, study, values, np.concatenate(rows))
            yield f"transplant.{way}.{half}", attempt(put)


def transplants_of_rows(study) -> dict[str, np.ndarray]:
    """What the means of `transplanted` are of, halves one after the other: {way: by how much the
    most moved tenth beat the random ones' mean, float32 [n], and rows: their places, int32 [n]};
    empty where nothing could be exchanged.
    """
    parts = attempt(lambda: study.once("transplants", lambda: _transplants(study)))
    if "note" in parts:
        return {}
    found = {}
    for way, sign in (("forward", 1), ("reverse", -1)):
        tenths = [parts[way, half][TENTH] for half in study.halves]
        values = [sign * (random.mean(0) - own) for own, random in tenths]
        found[way] = np.concatenate(values).astype(np.float32)
    places = [study.half(half).measured().places for half in study.halves]
    return found | {"rows": np.concatenate(places).astype(np.int32)}


def _put(study, values, clusters):
    """values [draws, n]: by how much the most moved beat each random set. p flips signs over
    wordings and takes the sets for given; p_sets: how many random sets did as well.
    """
    found = _effect(study, values.mean(0), clusters=clusters)
    numbers = {"effect": found.difference, "effect_ci": [found.low, found.high], "p": found.p}
    numbers["p_sets"] = plus_one(0.0, -values.mean(1))
    return numbers | {"detectable": found.detectable, "n": values.shape[1]}


def _transplants(study):
    """{(way, half): {share: (loss [n] with the most moved, losses [draws, n] with random ones)}};
    share 0: the host's and the donor's loss as they are.
    """
    found, mask_of = {}, study.whole.counts("base").mask
    change = moved(study, "neurons")[1]
    for way, names in WAYS.items():
        (host, _), (donor, _) = (study.model(name) for name in names)
        for half in study.halves:
            chosen, here = halves(study)[study.other(half)], study.half(half).measured()
            order = np.argsort(-change[chosen].mean(0).ravel(), kind="stable")
            read = [here.encoded("reference", name) for name in names]
            size, rng = study.profile.batch_tokens, study.rng(half)

            def loss(mask, host=host, donor=donor, read=read[0], size=size):
                with transplant(host, donor, mask):
                    return nll(host, read, size)

            parts = {0.0: (nll(host, read[0], size), nll(donor, read[1], size))}
            for share in SHARES:
                members = np.isin(np.arange(len(order)), order[: set_size(len(order), share)])
                mask = mask_of("neurons", members)
                drawn = [layer_matched(mask, rng) for _ in range(DRAWS[share])]
                parts[share] = loss(mask), np.array([loss(one) for one in drawn])
            found[way, half] = parts
    return found


def transplant_curve(pairs: dict) -> pd.DataFrame:
    """Loss along the share of neurons exchanged, the halves weighing the same: panel, set, share,
    loss, low, high (least and greatest of the random draws), host, donor, n.
    """
    rows = []
    for pair, study in pairs.items():
        found = attempt(lambda study=study: study.once("transplants", lambda: _transplants(study)))
        for way, names in WAYS.items() if "note" not in found else ():
            parts = [found[way, half] for half in study.halves]
            host, donor = (np.mean([part[0.0][n].mean() for part in parts]) for n in (0, 1))
            place = {"panel": f"{pair}: {names[1]} into {names[0]}", "host": host, "donor": donor}
            place["n"] = sum(len(part[0.0][0]) for part in parts)
            rows += [place | row for row in _points(parts, host)]
    return pd.DataFrame(rows)


def _points(parts, host):
    for kind in ("most moved", "random"):
        yield {"set": kind, "share": 0.0, "loss": host, "low": host, "high": host}
        for share in SHARES:
            if kind == "most moved" or not DRAWS[share]:
                losses = [np.mean([part[share][0].mean() for part in parts])]
            else:
                losses = np.mean([part[share][1].mean(1) for part in parts], axis=0)
            row = {"loss": np.mean(losses), "low": np.min(losses), "high": np.max(losses)}
            yield {"set": kind, "share": share} | row


# ---- in words


def sentences(pairs: dict, *found: Found) -> list[str]:
    """What was found of each pair, from the numbers alone; what is not there is left out."""
    numbers = joined(pairs, *found)
    lines = []
    for pair, study in pairs.items():
        if unchanged(study):
            lines.append(f"{pair}: nothing changed. Base and tuned count the same on every row.")
            continue
        for unit in units(study):
            lines += _said(pair, unit, numbers[pair])
        lines += _said_of_sets(pair, numbers[pair])
    return lines or ["No model here has a base: nothing was asked."]


def _value(numbers, key, name, ci=None):
    low, high = numbers[f"alteration.{key}.{ci or name + '_ci'}"]
    return f"{numbers[f'alteration.{key}.{name}']:.3f} [{low:.3f}, {high:.3f}]"


def _told(numbers, key, name, p="p"):
    """Above 0, below 0 or not told from 0, by interval and p."""
    low, high = numbers[f"alteration.{key}.{name}_ci"]
    if numbers[f"alteration.{key}.{p}"] >= 0.05 or low <= 0 <= high:
        return "not told from 0"
    return "above 0" if low > 0 else "below 0"


def _said(pair, unit, numbers):
    if f"alteration.{unit}.all.excess_churn" in numbers:
        value, told = (f(numbers, f"{unit}.all", "excess_churn") for f in (_value, _told))
        yield f"{pair}, {unit}: changed beyond the noise floor by {value}, {told}."
    key = f"training.{unit}.all"
    if f"alteration.{key}.beyond" in numbers:
        told = _told(numbers, key, "beyond", "p_beyond")
        yield (
            f"{pair}, {unit}: beyond as many steps of further pre-training by "
            f"{_value(numbers, key, 'beyond')}, {told}."
        )
    key = f"trajectory.{unit}.all"
    if f"alteration.{key}.lead" in numbers:
        what = "routing" if unit == "experts" else "what left the base's sets"
        yield (
            f"{pair}, {unit}: counted by {what}, the components' lead over accuracy is "
            f"{_value(numbers, key, 'lead')}."
        )
    if f"alteration.{key}.smaller_lead" in numbers:
        first = numbers[f"alteration.{key}.smaller_lead_ci"][0] > 0
        told = "by both metrics" if first else "by one metric at most"
        yield (
            f"{pair}, {unit}: that components change before accuracy does is seen {told}; the "
            f"smaller of the two leads is {_value(numbers, key, 'smaller_lead')}."
        )


def _said_of_sets(pair, numbers):
    moved = "transplant of the most moved tenth, beyond random"
    given = " on these instructions, random sets given"
    for kind, names, what, said, where in (
        ("matter", ("gained", "kept", "lost"), "critical", "ablated, beyond random sets", ""),
        ("transplant", tuple(WAYS), "effect", moved, given),
    ):
        for name in names:
            key = f"{kind}.{name}.all"
            if f"alteration.{key}.{what}" in numbers:
                value, told = (f(numbers, key, what) for f in (_value, _told))
                sets = numbers.get(f"alteration.{key}.p_sets")
                drawn = f"; p over random sets {sets:.2f}" if sets else ""
                yield f"{pair}, {name}: {said}: {value} nats per token, {told}{where}{drawn}."


def ways(curve: pd.DataFrame) -> list[str]:
    """How far the whole feed-forward part goes: from the host's loss towards the donor's."""
    lines = []
    whole = curve[(curve["share"] == 1) & (curve["set"] == "most moved")] if len(curve) else curve
    for row in whole.itertuples():
        gap = row.donor - row.host
        far = f"{100 * (row.loss - row.host) / gap:.0f} % of the way" if gap else "no way to go"
        lines.append(
            f"{row.panel}: the loss goes from {row.host:.2f} to {row.loss:.2f}; the model that the "
            f"weights come from has {row.donor:.2f}: {far}"
        )
    return lines
