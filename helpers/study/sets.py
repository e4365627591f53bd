"""Sets of neurons and experts as tables: how often components are on, sizes and ties, consensus,
layers, routing, and single neurons shown on what they read.
"""

import numpy as np
import pandas as pd
from scipy.stats import binom

from ..analysis.sets import (
    category_means,
    conditional_frequency,
    consensus,
    contrast,
    frequency,
    share_experts,
    top_experts,
    top_sets,
)
from ..analysis.stats import (
    SMALLEST,
    attempt,
    bootstrap,
    cluster_sizes,
    shared_profile,
    shared_profile_beyond,
)
from ..capture.sites import find_sites
from ..capture.tokens import Encoded
from ..hexainst.corpus import wordings
from ..record import read_json
from .scores import read_outputs
from .study import READ_ALONE

MASSIVE = 100  # times the median of its layer
NEEDED = ("prompt", "prompt-even", "prompt-odd", "response")  # kinds of positions
BINS = np.linspace(0, 1, 21)
SHOWN = {"twin": "twin (random weights)"}


def models(study) -> tuple[str, ...]:
    """The pair's models and the random twin, whose counts notebook 02 takes."""
    return (*study.variants, "twin")


def of_all(pairs: dict, table, *args) -> pd.DataFrame:
    """`table(study, *args)` of several Studies, one below the other, with a column `pair`; of none,
    a table without rows.
    """
    if not pairs:
        return pd.DataFrame(columns=["pair"])
    found = [table(study, *args) for study in pairs.values()]
    found = [part.assign(pair=name) for name, part in zip(pairs, found, strict=True)]
    whole = pd.concat(found, ignore_index=True)
    return whole[["pair", *whole.columns.drop("pair")]]


def clusters_of(study) -> tuple[np.ndarray | None, str]:
    """(cluster of each row, "wordings"), or (None, "rows") where some category has fewer than five
    wordings: too few to draw from.
    """
    clusters = wordings(study.rows)
    few = min(cluster_sizes(clusters, study.labels)) < SMALLEST
    return (None, "rows") if few else (clusters, "wordings")


def drawn_as_one(study) -> np.ndarray:
    """What each row is drawn with, str [I]: its cluster (`clusters_of`) or, without these, itself;
    rows of two halves apart, since they are measured under two sets.
    """
    clusters, _ = clusters_of(study)
    names = study.places if clusters is None else clusters
    return np.array([f"{fold}: {x}" for fold, x in zip(study.rows["fold"], names, strict=True)])


# ---- what is counted


def inventory(study) -> pd.DataFrame:
    """What each model's counts hold: instructions, the neurons analysed, everything counted."""
    counts = {model: study.counts(model) for model in models(study)}
    return pd.DataFrame(
        {
            "model": model,
            "instructions": len(c.tokens),
            "analysed": c.family("neurons"),
            "neurons": c.unit("neurons")[0].size,
            "counted": ", ".join(sorted(c.neurons)),
            "median T": int(np.median(c.tokens)),
        }
        for model, c in counts.items()
    )


def sites_of(study) -> pd.DataFrame:
    """Where neurons stand in the tuned model: columns layer, family, name, width, experts."""
    columns = ("layer", "family", "name", "width", "experts")
    sites = find_sites(study.reader("tuned")[0])
    return pd.DataFrame([{k: getattr(site, k) for k in columns} for site in sites])


def positions(study) -> pd.DataFrame:
    """Counts of every model at every kind of positions the chain needs, counted where they are not
    on disk: columns model, positions, instructions, tokens, mean p (over dense or routed neurons,
    a shared expert's left out), where read (the same of the tokens that reach the neuron alone).
    """
    out = []
    for model in models(study):
        for where in ("prompt",) if model == "twin" else NEEDED:
            c = study.counts(model, where)
            values = c.unit("neurons")
            on, tokens = values.sum(dtype=np.int64), c.tokens.sum()
            reached = tokens * values[0].size
            if c.routed is not None:
                reached = c.routed.sum(dtype=np.int64) * values.shape[-1]
            line = {"model": model, "positions": where, "instructions": len(c.tokens)}
            line |= {"tokens": tokens, "mean p": on / tokens / values[0].size}
            out.append(line | {"where read": on / reached})
    return pd.DataFrame(out)


def batching(study) -> pd.DataFrame:
    """Of the tuned model's first instructions: cells whose count differs when each is read alone
    instead of in a batch, as the record beside the counts says: columns instructions, cells,
    differ, most.
    """
    record = study.shards("tuned", "prompt").folder / "counts-00000.json"
    read = {"instructions": min(READ_ALONE, len(study.rows))}
    return pd.DataFrame([read | read_json(record)["found"]["batching"]])


def frequencies(study) -> pd.DataFrame:
    """Distribution of p over all instructions and neurons: columns model, p (a bin's middle),
    share, n (cells). The line "null: one rate for all" is what interchangeable neurons would show,
    each on with its instruction's mean rate (binomial in T, exact).
    """
    tables = [_binned(_p(study, model), SHOWN.get(model, model)) for model in models(study)]
    rates, tokens = _p(study).mean(1), study.counts().tokens
    null = np.zeros(len(BINS) - 1)
    for rate, total in zip(rates, tokens.tolist(), strict=True):
        k = np.arange(total + 1)
        steps = np.divide(k, total, dtype=np.float32)  # as `frequency` has them
        null += np.histogram(steps, BINS, weights=binom.pmf(k, total, rate))[0] / len(tokens)
    middle = (BINS[:-1] + BINS[1:]) / 2
    tables.append(pd.DataFrame({"model": "null: one rate for all", "p": middle, "share": null}))
    return pd.concat(tables).assign(n=study.counts().unit("neurons").size)


def _p(study, model="tuned"):
    counts = study.counts(model)
    return frequency(counts.unit("neurons"), counts.tokens).reshape(len(counts.tokens), -1)


def _binned(p, model):
    share = np.histogram(p, BINS)[0] / p.size
    return pd.DataFrame({"model": model, "p": (BINS[:-1] + BINS[1:]) / 2, "share": share})


# ---- sets


def sizes(study) -> pd.DataFrame:
    """Size and ties of one instruction's set over the profile's shares and its epsilon, tuned
    model: columns epsilon, nominal and realised (neurons; median over instructions), tie mass (of
    all neurons), kept by the exact rule (of the realised set), untestable (instructions).
    """
    values = study.counts().unit("neurons")
    profile, out = study.profile, []
    for share in sorted({*profile.epsilons, profile.epsilon}):
        sets, report = top_sets(values, share)
        exact, _ = top_sets(values, share, rule="exact", seed=profile.seed)
        out.append(
            {
                "epsilon": share,
                "nominal": int(report["nominal"][0]),
                "realised": np.median(report["size"]),
                "realised share": np.median(report["size"]) / values[0].size,
                "tie mass": np.median(report["tie_mass"]),
                "kept by exact": (exact & sets).sum() / sets.sum(),
                "untestable": int((~report["testable"]).sum()),
            }
        )
    return pd.DataFrame(out)


def agreement(study) -> pd.DataFrame:
    """Sizes of consensus sets: a row per model and tau, a column per category, and `in all`."""
    out = []
    for model in models(study):
        sets, _ = top_sets(study.counts(model).unit("neurons"), study.profile.epsilon)
        for tau in study.profile.taus:
            members = consensus(sets, study.labels, tau)
            own = dict(zip(study.categories, members.sum(1), strict=True))
            out.append({"model": model, "tau": tau} | own | {"in all": members.all(0).sum()})
    return pd.DataFrame(out)


# ---- layers


def layer_profile(study, unit: str, model: str = "tuned") -> np.ndarray:
    """What each instruction does in each layer, [I, L]. neurons: share of the layer's neurons in
    the instruction's set; experts: how concentrated routing is, 1 - entropy(f / K) / log E.
    """
    whole = study.whole.once(("layers", unit, model), lambda: _layers(study.whole, unit, model))
    return whole[study.places]


def _layers(study, unit, model):
    values = study.counts(model).unit(unit)
    if unit == "neurons":
        sets, _ = top_sets(values, study.profile.epsilon)
        return sets.reshape(*values.shape[:2], -1).mean(-1)
    share = values / values.sum(-1, keepdims=True, dtype=float)
    plogp = np.where(share > 0, share * np.log(np.maximum(share, 1e-12)), 0)
    return 1 + plogp.sum(-1) / np.log(values.shape[-1])


def layer_shares(study, unit: str = "neurons") -> pd.DataFrame:
    """Mean layer profile of each category of the tuned model, with its 95 % interval, and of the
    other models over all rows: columns category, layer, share, low, high, null (the same in every
    layer), other (True for the base's and the twin's lines), n.
    """
    own, numbers = layer_profile(study, unit), layer_numbers(study, unit)
    clusters, _ = clusters_of(study)
    parts = {name: study.labels == code for code, name in enumerate(study.categories)}
    tables = [
        _line(
            own[here], numbers, study.profile, None if clusters is None else clusters[here]
        ).assign(category=name, other=False)
        for name, here in parts.items()
        if here.any()
    ]
    for model in (*study.variants[:-1], "twin"):
        name = "random twin (mean)" if model == "twin" else f"{model} (mean)"
        line = _line(layer_profile(study, unit, model), numbers, study.profile, clusters)
        tables.append(line.assign(category=name, other=True))
    return pd.concat(tables, ignore_index=True).assign(null=own.mean())


def _line(values, numbers, profile, clusters):
    found = mean_interval(values, profile, clusters)
    return pd.DataFrame({"layer": numbers, "share": found.pop("mean"), **found, "n": len(values)})


def mean_interval(values, profile, clusters=None) -> dict[str, np.ndarray]:
    """mean, low and high (95 %), each [M], of values [n, M] over rows, which are drawn in
    clusters where these are given; low and high are NaN where there are too few.
    """
    mean, bands = values.mean(0), {}
    for start in range(0, values.shape[1], 4096):  # the same draws for every block
        block = values[:, start : start + 4096]
        found = attempt(
            lambda block=block: bootstrap(
                lambda w: w @ block / w.sum(1, keepdims=True),
                np.zeros(len(block)),
                profile.resamples,
                seed=profile.seed,
                clusters=clusters,
            )._asdict()
        )
        for name in ("low", "high"):
            nothing = np.full(block.shape[1], np.nan)
            bands.setdefault(name, []).append(found.get(name, nothing))
    return {"mean": mean} | {name: np.concatenate(parts) for name, parts in bands.items()}


def layer_numbers(study, unit: str = "neurons") -> list[int]:
    """The numbers, in the model, of the layers that have a unit: the L of its counts."""
    counts = study.counts()
    return list(counts.layers["expert" if unit == "experts" else counts.family(unit)])


def layer_pattern(study, unit: str = "neurons") -> pd.DataFrame:
    """Do categories share one layer profile, and more than in an untrained network? A row per half:
    stability, low, high, null (layers shuffled: 0), p; base, twin: the same statistic of these;
    beyond, beyond_low, beyond_high, p_beyond: tuned minus twin, rows drawn for both together;
    units: what was drawn for that. NaN and a `note` where it is not testable.
    """
    return pd.DataFrame(
        {"half": half} | attempt(lambda half=half: _pattern(study, unit, half))
        for half in ("all", *study.halves)
    )


def _pattern(study, unit, half):
    part = study if half == "all" else study.half(half)
    profile, labels = study.profile, part.rows["category"].to_numpy()
    by = {model: layer_profile(part, unit, model) for model in models(study)}
    found = {
        model: shared_profile(values, labels, profile.resamples, profile.seed)
        for model, values in by.items()
    }
    clusters, units = clusters_of(part)
    more = shared_profile_beyond(
        by["tuned"], by["twin"], labels, profile.resamples, profile.seed, clusters
    )
    own = found["tuned"]
    return {
        "stability": float(own["stability"]),
        "low": float(own["stability_ci"][0]),
        "high": float(own["stability_ci"][1]),
        "null": 0.0,
        "p": float(own["p"]),
        **{model: float(found[model]["stability"]) for model in models(study) if model != "tuned"},
        "beyond": float(more["beyond"]),
        "beyond_low": float(more["beyond_ci"][0]),
        "beyond_high": float(more["beyond_ci"][1]),
        "p_beyond": float(more["p"]),
        "detectable": float(more["detectable"]),
        "n": len(labels),
        "units": units,
    }


def pattern_numbers(pattern: pd.DataFrame, unit: str) -> dict:
    """`layer_pattern` of one pair as keys of the summary: layers.<unit>.<half>.stability, _ci, p,
    base, twin, beyond_twin, beyond_twin_ci, p_beyond_twin, beyond_twin_detectable; nothing where it
    was not testable.
    """
    numbers = {}
    for row in pattern.to_dict("records"):
        if np.isnan(row.get("stability", np.nan)):
            continue
        numbers |= {
            f"layers.{unit}.{row['half']}.{key}": value
            for key, value in {
                "stability": row["stability"],
                "stability_ci": [row["low"], row["high"]],
                "p": row["p"],
                "base": row.get("base", np.nan),
                "twin": row["twin"],
                "beyond_twin": row["beyond"],
                "beyond_twin_ci": [row["beyond_low"], row["beyond_high"]],
                "p_beyond_twin": row["p_beyond"],
                "beyond_twin_detectable": row["detectable"],
            }.items()
        }
    return numbers


# ---- experts


def numbers_of(sizes: pd.DataFrame, pattern: pd.DataFrame, epsilon: float) -> dict[str, dict]:
    """{pair: {key: number}} for the summary: sizes of the sets at epsilon, the layer pattern."""
    found = {}
    for row in sizes[sizes["epsilon"] == epsilon].to_dict("records"):
        found[row["pair"]] = {
            "epsilon": epsilon,
            "set_sizes.neurons": row["realised"],
            "set_sizes.neurons_nominal": int(row["nominal"]),
            "tie_mass.neurons": row["tie mass"],
        } | pattern_numbers(pattern[pattern["pair"] == row["pair"]], "neurons")
    return found


def routing(study, models=("tuned", "twin")) -> pd.DataFrame:
    """Mean routing of each category: columns model, category, layer, expert, f, uniform (K / E),
    own (f minus the mean of the categories: 0 for a router that ignores the category), n (rows).
    """
    tables = []
    for model in models:
        f = _f(study, model)
        means = category_means(f.reshape(len(f), -1), study.labels).reshape(-1, *f.shape[1:])
        grid = pd.MultiIndex.from_product(
            [study.categories, layer_numbers(study, "experts"), range(f.shape[2])],
            names=["category", "layer", "expert"],
        )
        cells = {"f": means.ravel(), "own": (means - means.mean(0)).ravel()}
        table = pd.DataFrame(cells, index=grid).reset_index()
        k = round(float(f[0].sum(-1).mean()))
        tables.append(table.assign(model=model, uniform=k / f.shape[2], n=len(f)))
    return pd.concat(tables, ignore_index=True)


def _f(study, model="tuned"):
    counts = study.counts(model)
    return frequency(counts.routed, counts.tokens)  # [I, L, E]


def most_own(study, model="tuned") -> list[dict]:
    """For each category the expert that is most its own (largest mean f minus the categories'
    mean): category, layer (its number), place (among the layers with experts), expert.
    """
    table, layers = routing(study, (model,)), layer_numbers(study, "experts")
    best = table.loc[table.groupby("category", sort=False)["own"].idxmax()]
    return [
        row | {"place": layers.index(row["layer"])}
        for row in best[["category", "layer", "expert"]].to_dict("records")
    ]


def own_experts(study) -> pd.DataFrame:
    """Each category's most own expert: chosen on one half (largest mean f minus the categories'
    mean), measured on the other, in the tuned model and in the twin: columns model, category,
    layer, expert, own, low, high (95 %), n.
    """
    choose, measure = study.half(study.halves[0]), study.half(study.other(study.halves[0]))
    clusters, _ = clusters_of(measure)
    out = []
    for model in ("tuned", "twin"):
        f = _f(measure, model)
        for best in most_own(choose, model):
            one = f[:, best.pop("place"), best["expert"]]
            found = _own(one, measure, study.categories.index(best["category"]), clusters)
            out.append({"model": model} | best | found)
    return pd.DataFrame(out)


def _own(values, study, code, clusters):
    member = (study.labels == np.arange(len(study.categories))[:, None]).astype(float)

    def own(weights):
        drawn = weights[:, None] * member  # [R, C, I]
        means = drawn @ values / drawn.sum(-1)
        return means[:, code] - means.mean(1)

    every = np.ones((1, len(values)))
    out = {"own": float(own(every)[0]), "low": np.nan, "high": np.nan, "n": int(member[code].sum())}
    found = attempt(
        lambda: bootstrap(
            own, study.labels, study.profile.resamples, seed=study.profile.seed, clusters=clusters
        )._asdict()
    )
    return out | {name: float(found[name]) for name in ("low", "high") if name in found}


def expert_sizes(study) -> pd.DataFrame:
    """A row for the tuned model and one for the twin: K, the mean number of experts that carry half
    of a layer's routing, the size of each category's consensus set of the K most frequent experts
    of each layer, and how many experts stand in all of them.
    """
    out, profile = [], study.profile
    for model in ("tuned", "twin"):
        counts = study.counts(model)
        sets = top_experts(counts.routed, counts.per_token(), profile.seed)
        agreed = consensus(sets.reshape(len(sets), -1), study.labels, profile.tau)
        half = share_experts(counts.routed, 0.5, profile.seed).sum(-1).mean()
        line = {"model": model, "K": counts.per_token(), "carry_half": half}
        line |= dict(zip(study.categories, agreed.sum(1), strict=True))
        out.append(line | {"in all": agreed.all(0).sum()})
    return pd.DataFrame(out)


def routing_share(study) -> pd.DataFrame:
    """How much of an expert neuron's frequency is routing, in the tuned model and the twin:
    correlation over (instruction, neuron) cells of p with f, and of p given routed (p / f, where
    the expert was reached) with f and with p; their means; how much of an instruction's set stands
    in the K most frequent experts of its layer, and what chance would put there.
    """
    out = []
    for model in ("tuned", "twin"):
        counts = study.counts(model)
        p, f = frequency(counts.unit("neurons"), counts.tokens), _f(study, model)
        given = conditional_frequency(counts.unit("neurons"), counts.routed)
        reached = np.broadcast_to(counts.routed[..., None] > 0, p.shape)
        wide = np.broadcast_to(f[..., None], p.shape)
        k, (chosen, _) = counts.per_token(), top_sets(counts.unit("neurons"), study.profile.epsilon)
        first = np.broadcast_to(
            top_experts(counts.routed, k, study.profile.seed)[..., None], p.shape
        )
        out.append(
            {
                "model": model,
                "corr(p, f)": np.corrcoef(p.ravel(), wide.ravel())[0, 1],
                "corr(p given routed, f)": np.corrcoef(given[reached], wide[reached])[0, 1],
                "corr(p, p given routed)": np.corrcoef(p[reached], given[reached])[0, 1],
                "reached": reached.mean(),
                "set in top-K": (chosen & first.reshape(len(p), -1)).sum() / chosen.sum(),
                "chance": k / f.shape[2],
                "mean p": p.mean(),
                "mean p given routed": given[reached].mean(),
                "cells": p.size,
            }
        )
    return pd.DataFrame(out)


# ---- single neurons


def striking(study, rows) -> dict[str, int]:
    """Three neurons of the tuned model, {role: place in the flattened unit}: the one most often on,
    the one most a category's own (`contrast` of p), the one with the largest output beside its
    layer's median, on the given rows (places; see `largest_outputs`).
    """
    p = _p(study)
    roles = {"most frequent": int(p.mean(0).argmax())}
    if len(np.unique(study.labels)) > 1:
        z = contrast(p, study.labels)
        category, place = np.unravel_index(z.argmax(), z.shape)
        roles[f"most {study.categories[category]}'s own"] = int(place)
    roles["largest beside its layer"] = int(largest_outputs(study, rows)[1].argmax())
    return roles


def largest_outputs(study, rows) -> tuple[np.ndarray, np.ndarray]:
    """(largest |h|, the same over the median of its layer's neurons), each [M], of the unit
    "neurons" in the tuned model, on all tokens that it reads of the given rows (places).
    A neuron over MASSIVE is a massive activation (Sun et al. 2024; per neuron: ours).
    """
    shape, family = study.counts().unit("neurons").shape[1:], study.counts().family("neurons")
    largest = np.zeros(shape, np.float32)

    def tell(kind, place, row, token, h):
        if kind == family and len(h):
            largest[place] = np.maximum(largest[place], np.abs(h).max(0))

    read_outputs(study.model()[0], _everything(study, rows), tell, study.profile.batch_tokens)
    return largest.ravel(), beside_layer(largest)


def beside_layer(largest) -> np.ndarray:
    """Largest |h| [L, ...] over the median of the layer's neurons that wrote at all, flat [M]."""
    layers = largest.reshape(len(largest), -1)
    middle = np.array([np.median(layer[layer > 0]) if layer.any() else 1.0 for layer in layers])
    return (layers / middle[:, None]).ravel()


def strongest_tokens(study, neurons: dict[str, int], rows, most: int = 5) -> pd.DataFrame:
    """The tokens on which single neurons of the tuned model write most, in context: columns role,
    neuron, category, output (h, with its sign), text (the token in brackets). The model reads the
    given rows (places) once. The same beginning of a text gives the same output and is shown once;
    of a neuron whose expert no token reaches there is no line.
    """
    shape, family = study.counts().unit("neurons").shape[1:], study.counts().family("neurons")
    places = {role: np.unravel_index(one, shape) for role, one in neurons.items()}
    read, found = _everything(study, rows), {role: [] for role in neurons}

    def tell(kind, place, row, token, h):
        for role, (*where, neuron) in places.items():
            if kind == family and tuple(where) == place:
                found[role] += zip(h[:, neuron].tolist(), row.tolist(), token.tolist(), strict=True)

    model, tokenizer = study.model()
    read_outputs(model, read, tell, study.profile.batch_tokens)
    category, out = study.rows["category"].to_numpy()[rows], []
    for role, seen in found.items():
        name = neuron_name(study, neurons[role])
        once = {read[row].ids[: token + 1]: (h, row, token) for h, row, token in seen}
        for h, row, token in sorted(once.values(), key=lambda one: -abs(one[0]))[:most]:
            line = {"role": role, "neuron": name, "category": category[row], "output": h}
            out.append(line | {"text": _in_context(tokenizer, read[row].ids, token)})
    return pd.DataFrame(out, columns=["role", "neuron", "category", "output", "text"])


def neuron_name(study, place: int) -> str:
    """Where a neuron of the flattened unit stands: "layer 1, neuron 7", with its expert if any."""
    counts = study.counts()
    layer, *expert, neuron = np.unravel_index(place, counts.unit("neurons").shape[1:])
    number = counts.layers[counts.family("neurons")][layer]
    return ", ".join([f"layer {number}", *(f"expert {e}" for e in expert), f"neuron {neuron}"])


def _everything(study, rows):
    """The rows as the tuned model reads them, every token marked: template and BOS, too."""
    read = study.take(np.asarray(rows)).encoded()
    return [Encoded(one.ids, (True,) * len(one.ids)) for one in read]


def _in_context(tokenizer, ids, at):
    left, token, right = context(tokenizer, ids, at)
    return f"{left} [{token}] {right}".replace("\n", "\\n").strip()


def context(tokenizer, ids, at) -> list[str]:
    """Token `at` of `ids` as text, between the four before it and the three behind it."""
    before, token, after = ids[max(0, at - 4) : at], ids[at : at + 1], ids[at + 1 : at + 4]
    return [tokenizer.decode(list(part)).strip() for part in (before, token, after)]


# ---- in words


def capture_findings(positions: pd.DataFrame, batching: pd.DataFrame) -> list[str]:
    """What `positions` and `batching` of several pairs say, a sentence for each pair."""
    prompt = positions[positions["positions"] == "prompt"].set_index(["pair", "model"])
    lines = []
    for row in batching.to_dict("records"):
        tuned, twin = (prompt.loc[(row["pair"], model)] for model in ("tuned", "twin"))
        lines.append(
            f"{row['pair']}: on {tuned['tokens']:,} prompt tokens of {tuned['instructions']:,} "
            f"instructions a neuron of the tuned model is on {tuned['mean p']:.1%} of the time, "
            f"of the random twin {twin['mean p']:.1%} (of the tokens that reach it: "
            f"{tuned['where read']:.1%} and {twin['where read']:.1%}). Batching moved "
            f"{row['differ']} of {row['cells']:,} cells, looked at in {row['instructions']} "
            "instructions."
        )
    return lines


def set_findings(sizes: pd.DataFrame, epsilon: float) -> list[str]:
    """What `sizes` of several pairs say at the profile's epsilon, a sentence for each pair."""
    return [
        f"{row['pair']}: at epsilon {epsilon:g} a set is nominally {row['nominal']} neurons and "
        f"holds {row['realised']:.0f} (median); {row['tie mass']:.1%} of all neurons tie at its "
        f"cut, and the exact rule keeps {row['kept by exact']:.2f} of it."
        for row in sizes[sizes["epsilon"] == epsilon].to_dict("records")
    ]


def layer_findings(shares: pd.DataFrame) -> list[str]:
    """Where the largest share of a layer's neurons is in the set: for each category, and for the
    models that `layer_shares` puts beside the tuned one; a sentence for each pair.
    """
    lines = []
    for pair, part in shares.groupby("pair", sort=False):
        best = part.loc[part.groupby("category", sort=False)["share"].idxmax()]
        where = [f"{row.category} in layer {row.layer}" for row in best.itertuples()]
        lines.append(
            f"{pair}: the layer with the largest share of its neurons in the set is, by "
            f"category and model, {', '.join(where)}."
        )
    return lines


def pattern_findings(pattern: pd.DataFrame) -> list[str]:
    """What `layer_pattern` of several pairs says of all rows, a sentence for each pair."""
    if pattern.empty:
        return []
    return [
        f"{row['pair']}: {_pattern_said(row)}"
        for row in pattern[pattern["half"] == "all"].to_dict("records")
    ]


def _pattern_said(row):
    if np.isnan(row.get("stability", np.nan)):
        return f"whether categories share a layer pattern is {row['note']}"
    more = row["beyond_low"] > 0 and row["p_beyond"] < 0.05
    said = (
        f"the layer profiles of two categories correlate {row['stability']:.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}] on average (null, layers shuffled: 0; "
        f"p {row['p']:.4f}). In the untrained twin they correlate {row['twin']:.3f}. Tuned minus "
        f"twin is {row['beyond']:+.3f} [{row['beyond_low']:+.3f}, {row['beyond_high']:+.3f}] "
        f"(one-sided p {row['p_beyond']:.4f}, n = {row['n']} instructions). That the pattern was "
        f"learnt is {'' if more else 'not '}supported."
    )
    if row["beyond_high"] < 0:
        said += " The categories are less alike in the tuned model than in the twin."
    if not more and 1 - row["twin"] < row["detectable"]:
        said += (
            f" The twin leaves room for a difference of {1 - row['twin']:.3f} at most, and the "
            f"test sees differences from {row['detectable']:.3f} on: it had little chance to "
            "support the claim."
        )
    return said


def routing_findings(share: pd.DataFrame, own: pd.DataFrame) -> list[str]:
    """What `routing_share` and `own_experts` of several pairs say, two sentences for each pair."""
    if share.empty:
        return ["No model of this profile has routed experts: there is nothing to say here."]
    lines = []
    for pair, part in share[share["model"] == "tuned"].groupby("pair", sort=False):
        row = part.iloc[0]
        untrained = share[(share["pair"] == pair) & (share["model"] == "twin")].iloc[0]
        lines.append(
            f"{pair}: an expert neuron's frequency shares {row['corr(p, f)'] ** 2:.0%} of its "
            f"variance with routing (twin: {untrained['corr(p, f)'] ** 2:.0%}), and its frequency "
            f"given routed shares {row['corr(p given routed, f)'] ** 2:.1%}. Of a set, "
            f"{row['set in top-K']:.0%} stand in the layer's K most frequent experts (twin: "
            f"{untrained['set in top-K']:.0%}; chance: {row['chance']:.0%})."
        )
        mine = own[own["pair"] == pair].set_index(["model", "category"])
        tuned, twin = (mine.loc[model] for model in ("tuned", "twin"))
        beyond = tuned.index[tuned["low"] > twin["high"].reindex(tuned.index)].to_list()
        above = tuned.index[tuned["low"] > 0].to_list()
        lines.append(
            f"{pair}: the expert that is most a category's own receives between "
            f"{tuned['own'].min():+.2f} and {tuned['own'].max():+.2f} more of its tokens than on "
            f"the categories' mean (null 0; in the twin between {twin['own'].min():+.2f} and "
            f"{twin['own'].max():+.2f}). The interval lies above 0 in "
            f"{', '.join(above) or 'no category'}, and above the twin's interval in "
            f"{', '.join(beyond) or 'no category'}."
        )
    return lines
