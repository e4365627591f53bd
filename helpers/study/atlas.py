"""The atlas: a row per neuron or expert that is in any category's set, with how often it is on, its
ranks and fate, the tokens it answers to, and what losing it alone costs.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from ..analysis.alteration import changes
from ..analysis.controls import rate_matched, usage_matched
from ..analysis.generality import category_scores
from ..analysis.sets import category_means, category_sets, frequency, membership, ranks, set_size
from ..capture.count import count_encoded
from ..capture.sites import find_sites
from ..capture.tokens import Encoded, texts_of
from ..config import SCORES, defaults, refuse_other
from ..hexainst.corpus import few_of_many
from ..paths import results_dir, short
from ..record import (
    DamagedFile,
    NotTestable,
    UserError,
    atomic,
    finished,
    read_record,
    sha256,
    verify,
    versions,
    write_json,
    write_table,
)
from . import quick
from .evaluate import ablation_matrix
from .scores import read_outputs, standing
from .sets import MASSIVE, beside_layer, clusters_of, context, mean_interval
from .study import Study

NAMES = {
    "neurons": "neuron",
    "shared": "shared",
    "experts": "expert",
}  # unit of counts: in the table
PROBED, LEEWAY = 8, 0.05  # own texts that are counted again, and how much may differ
OTHERS = (
    "the counts are of other texts or of another model: {}. Give what "
    "count(model, tokenizer, texts) gives for these, in the same template."
)
TOP, TOKENS = 20, 5  # single ablations per category and unit; tokens shown of each component


def atlas(study: Study, score: str = "contrast", share: float | None = None, top: int = TOP):
    """The atlas of a study, a DataFrame; rows by unit, layer, expert, neuron.

    pair, unit ("neuron", "shared" or "expert"), layer, expert, neuron (empty where there is none)
    score        by which the sets were chosen: one of SCORES; those that read a model are for the
                 unit "neuron" alone, and "contrast" stands in for the others
    p_C, low_C, high_C   mean frequency in category C in [0, 1] and its 95 % interval (wordings
                 drawn); for an expert that of routing
    score_C, rank_C, in_C   score, rank among all of its unit (1 = first), whether in C's set: the
                 `share` (default: the profile's epsilon) ranked first; of experts, as many as the
                 router takes
    sets, part   the categories whose set it is in; "general" (all), "unique" (one), "some", or ""
                 (none: a lost one)
    fate         "kept" in a category's set of base and tuned model, else "gained" or "lost"; ""
                 without a base
    massive      whether its largest output is more than MASSIVE times its layer's median
    tokens       JSON list of the TOKENS tokens of the prompts on which its output (an expert's
                 router weight) is largest: row (its id), position, token, left, right, value. The
                 same beginning of a text is shown once.
    effect, effect_low, effect_high   of the `top` first of each category: by how much the loss of
                 that category's references rises, nats per token, when it alone is ablated (neurons
                 zeroed, experts rerouted); effect_control: the same of one random component outside
                 the set, of its layer and of like frequency; effect_of: the category, where a
                 component stands first in several that of its best rank
    Empty effects: not among the first, no references, or (control) a layer that is all in the set.

    Sets and effects are of the same rows: a description. Tests that choose on one half and measure
    on the other are `grid` and `needed`. (Ours.)
    """
    refuse(study, score)
    share = study.profile.epsilon if share is None else share
    every = [_members(study, unit, score, share) for unit in study.units]
    table = pd.concat(every, ignore_index=True)
    table = table.join(_tokens(study, table))
    table = table.join(_effects(study, table, top))
    table.insert(0, "pair", study.name)
    return table.drop(columns="place")


def own_study(
    model, tokenizer, texts, labels, counts, references=None, template=quick.DEFAULT.template
) -> Study:
    """A Study of texts of your own that a model has counted (see `count`), for `atlas`: nothing is
    read from or written to disk.

    labels [I] of any kind, as text without white space; references [I], texts whose loss single
    ablations are measured on, or none; template: what the counts were made with. Raises UserError
    for lengths that do not fit, or labels that become one.

    The template is that of the profile, as `count`'s. Raises UserError for counts of other texts,
    in another template or of another model, as far as numbers of tokens, layers and PROBED texts
    tell, which are read again; and for labels and texts that `count` and `find_sets` refuse.

    >>> study = own_study(model, tokenizer, texts, labels, counts)           # doctest: +SKIP
    >>> table = atlas(study, share=0.02)                                     # doctest: +SKIP
    """
    texts = texts_of(texts, "text")
    y, labels = quick.labels_of(labels, len(texts))
    references = [""] * len(texts) if references is None else texts_of(references, "reference")
    found = {"references": len(references), "counts": len(quick.counts_of(counts).tokens)}
    if wrong := {name: size for name, size in found.items() if size != len(texts)}:
        raise UserError(f"{len(texts)} texts, but {wrong}: give one of each per text, in order.")
    names = ["_".join(str(label).split()) for label in labels]
    if len(set(names)) < len(labels):
        raise UserError(f"labels {sorted(map(repr, labels))} become the same word: rename one.")
    category = [names[code] for code in y]
    rows = pd.DataFrame({"instruction": texts, "reference": references, "category": category})
    rows = rows.assign(id=[f"text-{i}" for i in range(len(rows))], half="own", fold="own", input="")
    profile = defaults(template=template)
    study = Study(profile, profile.pairs[0], rows, {"tuned": (model, tokenizer)})
    sites = find_sites(model)
    shapes = {f: (n.shape[1], n.shape[-1]) for f, n in counts.neurons.items()}
    widths = {f: [s.width for s in sites if s.family == f] for f in {s.family for s in sites}}
    read = [sum(one.counted) for one in study.encoded()]
    if read != counts.tokens.tolist() or shapes != {f: (len(w), w[0]) for f, w in widths.items()}:
        raise UserError(OTHERS.format("tokens or layers differ"))
    if strange := _counted_otherwise(model, study.encoded(), counts):
        raise UserError(OTHERS.format(f"text {strange[0]}, counted again, differs"))
    study.once(("counts", "tuned", "prompt"), lambda: counts)
    study.once(("checkpoint", "tuned"), lambda: {"ref": "own", "commit": None, "weights": None})
    return study


def _counted_otherwise(model, encoded, counts) -> list[int]:
    """Which of PROBED texts, spread over all, have other counts when they are read again alone: in
    sum by more than LEEWAY of the larger count, as no rounding has it.
    """
    some = np.unique(np.linspace(0, len(encoded) - 1, PROBED).astype(int)).tolist()
    found = []
    for place in some:
        again = count_encoded(model, [encoded[place]]).arrays()
        pairs = [
            (again[name][0].astype(int), kept[place]) for name, kept in counts.arrays().items()
        ]
        differ = sum(np.abs(one - other).sum() for one, other in pairs)
        if differ > LEEWAY * sum(np.maximum(one, other).sum() for one, other in pairs):
            found.append(place)
    return found


def refuse(study, score: str) -> None:
    """UserError for an unknown score or names of several words, NotTestable for one category."""
    refuse_other(score, SCORES, "score")
    if len(study.categories) < 2:
        raise NotTestable("one category: nothing can be its own. Give rows of two or more.")
    if split := [name for name in study.categories if len(str(name).split()) != 1]:
        raise UserError(f"categories {split}: names of one word are needed here. Rename them.")


# ---- sets, ranks and fates


def _p(study, unit, variant="tuned"):
    counts = study.counts(variant)
    return frequency(counts.unit(unit), counts.tokens).reshape(len(study.rows), -1)  # [I, M]


def _scores(study, unit, score, variant="tuned"):
    """(score's name, [C, M])."""
    if unit == "neurons" and score not in quick.SCORES:
        return score, standing(study, [score], variant).scores[score]
    name = score if score in quick.SCORES else "contrast"
    return name, category_scores(name, _p(study, unit, variant), study.labels)


def _size(study, unit, share) -> int:
    """How many a category's set holds: of experts, as many as the router takes."""
    counts = study.counts()
    if unit == "experts":
        return len(counts.layers["expert"]) * counts.per_token()
    return set_size(counts.unit(unit)[0].size, share)


def chosen(study, unit: str, score: str, share: float, variant: str = "tuned") -> tuple:
    """(name of the score, scores [C, M], sets bool [C, M]) of one unit of counts; see `atlas`."""
    name, scores = _scores(study, unit, score, variant)
    return name, scores, category_sets(scores, _size(study, unit, share), study.profile.seed)


def _members(study, unit, score, share) -> pd.DataFrame:
    """The rows of one unit, but for tokens and effects; place: where in the flattened unit."""
    name, scores, sets = chosen(study, unit, score, share)
    order, before = ranks(scores, study.profile.seed) + 1, None  # [C, M]
    if study.has_base:
        before = chosen(study, unit, score, share, "base")[2]
    place = np.flatnonzero((sets if before is None else sets | before).any(0))
    table = _where(study, unit, place).assign(score=name)
    columns = _rates(study, _p(study, unit)[:, place])
    for code, category in enumerate(study.categories):
        columns[f"score_{category}"] = scores[code, place]
        columns[f"rank_{category}"] = order[code, place]
        columns[f"in_{category}"] = sets[code, place]
    columns |= _standing(study.categories, sets[:, place])
    columns["fate"] = "" if before is None else _fates(before[:, place], sets[:, place])
    return table.assign(**columns)


def _where(study, unit, place):
    counts = study.counts()
    at = np.unravel_index(place, counts.unit(unit).shape[1:])
    numbers = counts.layers["expert" if unit == "experts" else counts.family(unit)]
    table = pd.DataFrame({"unit": NAMES[unit], "place": place, "layer": np.take(numbers, at[0])})
    nothing = pd.array([None] * len(place), dtype="Int64")
    routed = unit == "experts" or len(at) == 3
    table["expert"] = pd.array(at[1], dtype="Int64") if routed else nothing
    table["neuron"] = nothing if unit == "experts" else pd.array(at[-1], dtype="Int64")
    return table


def _rates(study, p) -> dict:
    clusters, _ = clusters_of(study)
    found = {}
    for code, category in enumerate(study.categories):
        here = study.labels == code
        drawn = None if clusters is None else clusters[here]
        one = mean_interval(p[here], study.profile, drawn)
        found[f"p_{category}"] = one["mean"]
        found[f"low_{category}"], found[f"high_{category}"] = (
            np.clip(one[name], 0, 1) for name in ("low", "high")
        )
    return found


def _standing(categories, sets) -> dict:
    """sets and part of components [C, m]."""
    number, names = membership(sets), np.array(categories, object)
    part = np.select(
        [number == len(sets), number == 1, number > 1], ["general", "unique", "some"], ""
    )
    return {"sets": [" ".join(names[own]) for own in sets.T], "part": part}


def _fates(before, after) -> np.ndarray:
    found = changes(before, after)
    return np.select([found[fate].any(0) for fate in found], list(found), "")


# ---- tokens


class _Strongest:
    """The largest outputs of chosen components, and of every neuron, while a model reads.

    wanted {family: {place: int [m]}}, the numbers of the components wanted there. seen {(family,
    place): (value, row, token)}, each [<= TOKENS, m]; largest {family: {place: max |h| [N]}}.
    """

    def __init__(self, wanted):
        self.wanted, self.seen, self.largest = wanted, {}, {}

    def __call__(self, family, place, row, token, h):
        if not len(h):
            return
        own = self.largest.setdefault(family, {})
        own[place] = np.maximum(own.get(place, 0), np.abs(h).max(0))
        numbers = self.wanted.get(family, {}).get(place)
        if numbers is None:
            return
        value = h[:, numbers]  # [n, m]
        new = (value, *(np.broadcast_to(x[:, None], value.shape) for x in (row, token)))
        if (family, place) in self.seen:
            new = [np.concatenate(two) for two in zip(self.seen[family, place], new, strict=True)]
        order = np.lexsort((new[2], new[1], -np.abs(new[0])), axis=0)[:TOKENS]
        self.seen[family, place] = [np.take_along_axis(x, order, 0) for x in new]


def first_seen(encoded: list[Encoded]) -> list[Encoded]:
    """The sequences with those tokens marked that no sequence before has read after the same
    beginning: the others give the same output once more.
    """
    known, out = set(), []
    for one in encoded:
        marks, beginning = [], 0
        for token in one.ids:
            beginning = hash((beginning, token))
            marks.append(beginning not in known)
            known.add(beginning)
        out.append(Encoded(one.ids, tuple(marks)))
    return out


def _tokens(study, table) -> pd.DataFrame:
    """Columns massive and tokens of the atlas's rows: the prompts, template and BOS included, are
    read once.
    """
    counts, wanted, spots = study.counts(), {}, []
    for unit, part in table.groupby("unit", sort=False):
        of = next(name for name in NAMES if NAMES[name] == unit)
        family, shape = (
            "experts" if unit == "expert" else counts.family(of),
            counts.unit(of).shape[1:],
        )
        for at in zip(*np.unravel_index(part["place"], shape), strict=True):
            at = tuple(map(int, at))
            key, number = (at, 0) if unit == "expert" else (at[:-1], at[-1])
            numbers = wanted.setdefault(family, {}).setdefault(key, [])
            spots.append((family, key, len(numbers), number))
            numbers.append(number)
    model, tokenizer = study.model()
    read, strongest = study.encoded(), _Strongest(wanted)
    read_outputs(model, first_seen(read), strongest, study.profile.batch_tokens)
    massive = {family: _massive(strongest.largest, counts, family) for family in wanted}
    rows = [
        {
            "massive": bool(massive[family][(*key, number)]) if family != "experts" else False,
            "tokens": _shown(study, tokenizer, read, strongest.seen.get((family, key)), column),
        }
        for family, key, column, number in spots
    ]
    return pd.DataFrame(rows, table.index, ["massive", "tokens"])


def _massive(largest, counts, family):
    """Which neurons of a family are massive, bool of its shape; of whole experts, nothing."""
    if family == "experts":
        return None
    values = np.zeros(counts.neurons[family].shape[1:], np.float32)
    for place, found in largest.get(family, {}).items():
        values[place] = found
    return beside_layer(values).reshape(values.shape) > MASSIVE


def _shown(study, tokenizer, read, seen, column) -> str:
    """The tokens of one component as JSON; an output of 0 is none."""
    out = []
    for value, row, at in zip(*(x[:, column] for x in seen), strict=True) if seen else ():
        if value:
            left, token, right = context(tokenizer, read[row].ids, int(at))
            where = {"row": study.rows["id"][row], "position": int(at), "token": token}
            out.append(where | {"left": left, "right": right, "value": float(f"{value:.6g}")})
    return json.dumps(out, ensure_ascii=False)


# ---- single ablations


def _effects(study, table, top) -> pd.DataFrame:
    """Columns effect ... effect_of of the atlas's rows."""
    found = pd.DataFrame(
        {name: np.nan for name in ("effect", "effect_low", "effect_high", "effect_control")},
        table.index,
    ).assign(effect_of="")
    if not (study.rows["reference"].str.strip() != "").all():
        return found
    order = table[[f"rank_{category}" for category in study.categories]].to_numpy()
    first, best = order.min(1) <= top, order.argmin(1)
    few = few_of_many(study.rows, ["category", "fold"], study.profile.ablation_rows)
    for code, category in enumerate(study.categories):
        here = study.take(few & (study.labels == code))
        for unit in study.units:
            members = table[table["unit"] == NAMES[unit]]
            own = members[first[members.index] & (best[members.index] == code)]
            if len(own):
                barred = members.loc[members[f"in_{category}"], "place"]
                rise = _alone(here, unit, code, own["place"], barred)
                found.loc[own.index] = rise.set_index(own.index).assign(effect_of=category)
    return found


def _alone(here, unit, code, places, barred) -> pd.DataFrame:
    """Effects of components, each ablated alone, on one category's rows (`here`), beside those of
    one random component each: of its layer, of like frequency, none of the `barred`.
    """
    study, counts = here.whole, here.whole.counts()
    every = np.arange(counts.unit(unit)[0].size)
    [(family, barred)] = counts.mask(unit, np.isin(every, barred)).items()
    rate = counts.mask(unit, category_means(_p(study, unit), study.labels)[code])
    draw, masks = usage_matched if unit == "experts" else rate_matched, {}
    rng = np.random.default_rng([study.profile.seed, code])
    for place in places:
        own = masks[place, "own"] = counts.mask(unit, every == place)
        layer = np.argwhere(own[family])[0][0]
        if not (barred | own[family])[layer].all():
            masks[place, "control"] = draw(own, rate, rng, {family: barred})
    operator = "reroute" if unit == "experts" else "zero"
    rises = ablation_matrix(here, masks, operator, allow_inert=True)
    rises.columns = pd.MultiIndex.from_tuples(rises.columns)
    found = mean_interval(_only(rises, "own", places), study.profile, clusters_of(here)[0])
    controls = _only(rises, "control", places).mean(0)
    names = {"mean": "effect", "low": "effect_low", "high": "effect_high"}
    found = {names[name]: values for name, values in found.items()}
    return pd.DataFrame(found | {"effect_control": controls})


def _only(rises, kind, places) -> np.ndarray:
    """[n, places]; NaN where there is no such column."""
    return rises.reindex(columns=[(place, kind) for place in places]).to_numpy()


# ---- kept on disk


def expected(study, score="contrast", share=None, top=TOP) -> dict:
    """All that decides a study's atlas, as its record keeps it."""
    profile = study.profile
    return {
        "pair": study.name,
        "weights": {name: study.checkpoint(name)["weights"] for name in study.variants},
        "data": study.digest("rows"),
        "score": score,
        "share": profile.epsilon if share is None else share,
        "top": top,
        "seed": profile.seed,
        "template": study.template,
        "dtype": study.pair.dtype,
        "resamples": profile.resamples,
        "rows": study.measured_rows(),
    }


def kept(study, *settings) -> pd.DataFrame:
    """`atlas(study, *settings)`, from disk where it was finished under the same settings, else
    computed and kept in data/results/<profile>/atlas/. Raises RecordMismatch as `cached` does.
    """
    path, want = _path(study), expected(study, *settings)

    def made():
        _write(path, atlas(study, *settings), want | {"made_with": versions()})
        return _read(path, want)

    return finished(path, lambda: _read(path, want), made)


def settings_kept(study) -> tuple[str, float | None]:
    """(score, share) of the study's kept atlas; the defaults where none is made yet. Raises
    RecordMismatch for an atlas made under other settings than the study's.
    """
    path = _path(study).with_suffix(".json")
    if not path.is_file():
        return "contrast", None
    record = read_record(path, {"score": str, "top": int})
    settings = record["score"], record.get("share")
    verify(record, expected(study, *settings, record["top"]), path)
    return settings


def write(studies: dict, pair: str | None = None, *settings) -> list[Path]:
    """Make the atlas of every study {pair: Study} of a profile, or of one, and write
    data/results/<profile>/atlas.parquet and .csv, all finished pairs one below the other, with
    their record atlas.json.
    """
    if pair is not None and pair not in studies:
        raise UserError(f"pair {pair!r}: the profile has {', '.join(studies)}. Name one of them.")
    parts = {}
    for name, study in studies.items():
        if pair in (None, name):
            parts[name] = kept(study, *settings)
            study.close()
        else:
            with suppress(DamagedFile):  # not made yet
                parts[name] = _read(_path(study), expected(study, *settings))
    path = results_dir(next(iter(studies.values())).profile.name) / "atlas.parquet"
    table = pd.concat(parts.values(), ignore_index=True)
    write_table(path.with_suffix(".csv"), table)
    pairs = {name: expected(studies[name], *settings) for name in parts}
    _write(path, table, {"pairs": pairs, "csv": sha256(path.with_suffix(".csv"))})
    return [path, path.with_suffix(".csv"), path.with_suffix(".json")]


def read(profile: str) -> pd.DataFrame:
    """The table that `write` left for a profile. Raises DamagedFile where there is none, or not the
    one that its record describes.
    """
    return _read(results_dir(profile) / "atlas.parquet", {})


def _path(study) -> Path:
    return results_dir(study.profile.name) / "atlas" / f"{study.name}.parquet"


def _write(path, table, record):
    with atomic(path) as draft:
        table.to_parquet(draft, index=False)
    write_json(path.with_suffix(".json"), record | {"sha256": sha256(path)})


def _read(path, want) -> pd.DataFrame:
    record = read_record(path.with_suffix(".json"), {"sha256": str})
    verify(record, want, path)
    if not path.is_file() or sha256(path) != record["sha256"]:
        raise DamagedFile(
            f"{short(path)} is missing or not the file that its record describes. Delete "
            f"{path.with_suffix('.json').name}, and run `python -m helpers.run atlas` again."
        )
    return pd.read_parquet(path)
