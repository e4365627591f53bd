"""The grid of ablations: a cell per pair, score, size and half, computed once, kept, and read as
tables.

A cell's sets are chosen on one half of the rows (column `fold`) and measured on the other. A killed
run goes on where it stopped; a cell depends on nothing but its record, so it comes out the same,
but for rounding, whatever was computed before it. The tables are data/grid/<profile>.csv, a row per
pair, score, size and half, and <profile>-matrices.csv, the six-by-six matrices; <profile>.json says
of which models, rows and settings they are.
"""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ..analysis.effects import critical_by_category, specific_by_category
from ..analysis.sets import category_means
from ..hexainst.corpus import wordings
from ..paths import DATA, results_dir, short
from ..record import (
    DamagedFile,
    NotTestable,
    UserError,
    cached,
    read_json,
    read_tensors,
    sha256,
    verify,
    versions,
    write_json,
    write_table,
)
from .ablation import KINDS, draws_of, measure, own_effect, pooled
from .counting import processes
from .scores import SEES_REFERENCE, sets_of, standing

GRID, TABLES = DATA / "grid", ("", "-matrices", "-categories")
HEADLINE = ("frequency", "contribution")  # scores that are judged category by category
KEPT = ("weights", "data", "seed", "template", "dtype", "rows", "draws", "everywhere", "operator")
RECORD = {"seed": int, "epsilon": float, "pairs": dict, "sha256": dict}  # what is read of it


def cells_of(profile, scores=None, sizes=None) -> list[tuple[str, float]]:
    """(score, size) of a profile's grid, the headline size first; a score that sees responses only
    there.
    """
    sizes = sizes or [profile.epsilon, *(s for s in profile.sizes if s != profile.epsilon)]
    return [
        (score, size)
        for size in sizes
        for score in scores or profile.scores
        if size == profile.epsilon or score != "contribution-response"
    ]


def cell_path(profile: str, pair: str, score: str, size: float, half: str) -> Path:
    """Where one cell lies; `half` is the one it is measured on."""
    name = f"{score}-{size:g}-{half.replace(' ', '-')}.safetensors"
    return results_dir(profile) / "grid" / pair / name


def expected(study, score="any", size=None, half="any", fetch=True) -> dict:
    """All that decides a cell, as its record keeps it; `made_with` versions stand beside it and
    are not compared. Without a size: of the headline's. Not to `fetch`: without what is read from
    a checkpoint that is not at hand.
    """
    profile = study.profile
    head = size in (None, profile.epsilon)
    model = {}
    if fetch or study.at_hand:
        model = {"weights": study.checkpoint()["weights"], "template": study.template}
    return model | {
        "pair": study.name,
        "data": study.digest("rows"),
        "score": score,
        "size": profile.epsilon if size is None else size,
        "measured": half,
        "operator": "zero",
        "seed": profile.seed,
        "dtype": study.pair.dtype,
        "rows": study.measured_rows(),
        "draws": profile.controls if head else profile.controls_elsewhere,
        "everywhere": profile.controls_all_rows if head else min(2, profile.controls_all_rows),
    }


def compute(study, want: dict) -> tuple[dict, dict]:
    """(arrays, what was found on the way) of the cell that `want` describes (see `expected`)."""
    score, size, half, seed = (want[key] for key in ("score", "size", "measured", "seed"))
    ranked = standing(study.half(study.other(half)), [score])
    sets, counts = sets_of(ranked, score, size, seed), study.counts()
    name = f"{study.name}/{score}/{size:g}/{half}"
    drawn, gaps = draws_of(ranked, counts, sets, want["draws"], seed, name)
    controls = {kind: dict(zip(study.categories, m, strict=True)) for kind, m in drawn.items()}
    here = study.half(half).measured()
    arrays = measure(here, study.masks(sets), controls, everywhere=want["everywhere"])
    shared = (sets.astype(int) @ sets.T) / (sets[:, None] | sets[None]).sum(-1)
    layers = sets.reshape(len(sets), counts.unit("neurons").shape[1], -1).sum(-1)  # [C, L]
    found = {
        "neurons": int(sets[0].sum()),
        "alike": float(shared[~np.eye(len(sets), dtype=bool)].mean()),
        "gaps": gaps,
        "made_with": versions(),
    }
    return arrays | {"layers": layers.astype(np.int32), "sets": np.packbits(sets, axis=-1)}, found


def cells(study, scores=None, sizes=None, compute_missing=True) -> dict:
    """{(pair, score, size, half): (arrays, record)} of one pair: from disk where a cell is
    finished, else computed and kept, or left out if `compute_missing` is False.

    Several processes (see counting.processes) deal the cells out among them, and each returns all.
    Raises RecordMismatch for a cell made under other settings, NotTestable where there is one half
    only.
    """
    every = _every(study, scores, sizes)
    rank, world, wait = processes()
    if compute_missing and world > 1:
        study.counts()  # all count together
        for cell in tqdm(every[rank::world], f"{study.name} grid", delay=5, unit=" cells"):
            _cell(study, *cell)
        wait()
    bar = tqdm(every, f"{study.name} grid", delay=5, unit=" cells")
    names = study.profile.name, study.name
    return {
        (study.name, *cell): _cell(study, *cell)
        for cell in bar
        if compute_missing or cell_path(*names, *cell).exists()
    }


def _every(study, scores=None, sizes=None) -> list[tuple[str, float, str]]:
    some = cells_of(study.profile, scores, sizes)
    return [(*cell, half) for cell in some for half in study.halves]


def _cell(study, score, size, half):
    path = cell_path(study.profile.name, study.name, score, size, half)
    want = expected(study, score, size, half)
    return cached(path, want, lambda: compute(study, want), _anew(path))


def _anew(path) -> str:
    return f"Delete {short(path.parent)} to compute this pair's cells anew"


def finished(study) -> dict:
    """`cells` of one pair that are kept, with nothing computed and nothing fetched. Raises
    RecordMismatch for a cell made under other settings, DamagedFile for one that is not whole.
    """
    found = {}
    for cell in _every(study):
        path = cell_path(study.profile.name, study.name, *cell)
        if path.exists():
            want = expected(study, *cell, fetch=False)
            found[study.name, *cell] = read_tensors(path, want, _anew(path))
    return found


def summary(parts: dict, resamples: int, seed: int) -> dict:
    """Effects and controls of one cell {half: (arrays, record)}, or of several halves pooled (their
    rows together); a control that could not be drawn is None.
    """
    arrays, half = pooled([arrays for arrays, _ in parts.values()])
    records = [record for _, record in parts.values()]
    kinds = [kind for kind in KINDS if kind in arrays]
    effects = own_effect(arrays, half, resamples, seed, kinds)
    gaps = {
        f"{kind}_gap": float(np.mean([r["gaps"][kind] for r in records])) if kind in kinds else None
        for kind in KINDS[1:]
    }
    row = {
        "neurons": records[0]["neurons"],
        "half": "all" if len(parts) > 1 else next(iter(parts)),
        "rows": len(arrays["labels"]),
        "draws": records[0]["draws"],
        "alike": float(np.mean([r["alike"] for r in records])),
        **{kind: effects.pop(kind, None) for kind in KINDS},
        **gaps,
    }
    return row | {
        k: v
        for key, value in effects.items()
        for k, v in (
            ((f"{key[:-3]}_low", value[0]), (f"{key[:-3]}_high", value[1]))
            if key.endswith("_ci")
            else ((key, value),)
        )
    }


def table_of(found: dict, resamples: int, seed: int) -> pd.DataFrame:
    """A row per pair, score, size and half, and for the halves pooled; a control that could not be
    drawn is empty.
    """
    rows = []
    for pair, score, size in dict.fromkeys(key[:3] for key in found):
        parts = {k[3]: cell for k, cell in found.items() if k[:3] == (pair, score, size)}
        seen = {"sees_reference": score in SEES_REFERENCE}
        head = {"pair": pair, "score": score} | seen | {"size": size}
        some = [parts, *({half: cell} for half, cell in parts.items() if len(parts) > 1)]
        rows += [head | summary(where, resamples, seed) for where in some]
    return pd.DataFrame(rows)


BY_CATEGORY = (  # columns of `category_table` besides those that say of what a row is
    *("own", "hardest", "control", "critical", "critical_low", "critical_high", "p_sets"),
    *("critical_sees", "specific", "specific_low", "specific_high", "p_specific", "specific_sees"),
)


def category_rows(parts: dict, clusters: dict, resamples: int, seed: int) -> list[dict]:
    """Per category what one cell {half: (arrays, record)} says, or several pooled: critical (own
    effect minus the hardest control) with its interval, p_sets and what the test could have seen;
    specific (own category minus the others) with its interval and p. clusters {half: [n]}, the
    wordings of the rows measured.
    """
    arrays, half = pooled([arrays for arrays, _ in parts.values()])
    labels, kinds = arrays["labels"], [kind for kind in KINDS if kind in arrays]
    own = arrays["own"][np.arange(len(labels)), labels]
    wording = np.concatenate([[f"{h}: {name}" for name in clusters[h]] for h in parts])
    settings = resamples, seed
    controls = {kind: arrays[kind] for kind in kinds}
    try:
        found = critical_by_category(own, controls, labels, half, *settings, wording)
    except NotTestable:
        found = []  # no category has wordings enough: the table says so by its empty cells
    critical = {row["category"]: row for row in found}
    apart = specific_by_category(
        arrays["own"], arrays["everywhere"], labels, half, *settings, wording
    )
    rows = []
    for two in apart:
        one = critical.get(two["category"], {})
        row = {"own": one.get("own"), "hardest": one.get("hardest"), "control": one.get("control")}
        row |= {"critical": one.get("effect"), "critical_low": one.get("low")}
        row |= {"critical_high": one.get("high"), "p_sets": one.get("p_sets")}
        row |= {"critical_sees": one.get("sees"), "specific": two.get("specific")}
        row |= {"specific_low": two.get("low"), "specific_high": two.get("high")}
        row |= {"p_specific": two.get("p"), "specific_sees": two.get("sees")}
        rows.append({"code": two["category"]} | row)
    return rows


def category_table(studies: dict, found: dict) -> pd.DataFrame:
    """A row per pair, score, size, half (and halves pooled) and category; see `category_rows`."""
    rows = []
    for pair, score, size in dict.fromkeys(key[:3] for key in found):
        study, profile = studies[pair], studies[pair].profile
        parts = {k[3]: cell for k, cell in found.items() if k[:3] == (pair, score, size)}
        clusters = {half: wordings(study.half(half).measured().rows) for half in parts}
        some = [parts, *({half: cell} for half, cell in parts.items() if len(parts) > 1)]
        for where in some:
            head = {"pair": pair, "score": score, "size": size}
            head |= {"half": "all" if len(where) > 1 else next(iter(where))}
            for row in category_rows(where, clusters, profile.resamples, profile.seed):
                name = study.categories[row.pop("code")]
                rows.append(head | {"category": name} | row)
    columns = ["pair", "score", "size", "half", "category", *BY_CATEGORY]
    return pd.DataFrame(rows, columns=columns)


def matrix_of(found: dict, pair: str, score: str, size: float) -> dict[str, np.ndarray]:
    """[C ablated, C measured], mean over the halves: `own` effects and those of `random` sets."""
    parts = [arrays for key, (arrays, _) in found.items() if key[:3] == (pair, score, size)]
    both = {
        "own": lambda arrays: arrays["own"],
        "random": lambda arrays: arrays["everywhere"].mean(1),
    }
    return {
        name: np.mean([category_means(of(arrays), arrays["labels"]).T for arrays in parts], 0)
        for name, of in both.items()
    }


def matrix_table(found: dict, categories) -> pd.DataFrame:
    """All matrices as one tidy table: pair, score, size, ablated, measured, own, random."""
    parts, names = [], list(categories)
    for key in dict.fromkeys(key[:3] for key in found):
        grid = pd.MultiIndex.from_product([names, names], names=["ablated", "measured"]).to_frame(
            index=False
        )
        head = dict(zip(("pair", "score", "size"), key, strict=True))
        means = {name: np.round(m.ravel(), 5) for name, m in matrix_of(found, *key).items()}
        parts.append(grid.assign(**head, **means))
    return pd.concat(parts)[["pair", "score", "size", "ablated", "measured", "own", "random"]]


def kept(studies: dict, fetch=True) -> dict:
    """{pair: what its cells were made of}, as the record beside the committed tables keeps it."""
    made = {name: expected(study, fetch=fetch) for name, study in studies.items()}
    return {name: {key: want[key] for key in KEPT if key in want} for name, want in made.items()}


def _record(name: str) -> dict:
    path = GRID / f"{name}.json"
    with suppress(DamagedFile):
        record = read_json(path)
        if isinstance(record, dict) and all(type(record.get(k)) is RECORD[k] for k in RECORD):
            return record
    raise DamagedFile(
        f"{short(path)} is missing, or no record of a grid's tables with {', '.join(RECORD)}. "
        "Run `make grid`, or take it from the repository."
    )


def committed(studies: dict, fetch=True) -> tuple | None:
    """(table, matrices, categories, record) of the grid that the studies' profile names, or
    of its own. None: it has none, or one of another seed or epsilon than this run's. `fetch`: see
    `expected`.

    Raises RecordMismatch if the models, rows or settings are no longer those it was made with,
    DamagedFile if the tables are not those of the record.
    """
    profile = next(iter(studies.values())).profile
    name = profile.grid or profile.name
    if profile.grid is None and not (GRID / f"{name}.json").exists():
        return None
    paths = [GRID / f"{name}{end}.csv" for end in TABLES]
    record = _record(name)
    if (record["seed"], record["epsilon"]) != (profile.seed, profile.epsilon):
        return None
    anew = f"Run `python -m helpers.run grid --profile {name}` to compute it anew"
    if profile.grid:
        anew = f"Take the line `grid: {name}` out of the profile"
    for pair, want in kept(studies, fetch).items():
        verify(record["pairs"].get(pair, {}), want, paths[0], anew)
    for path in paths:
        if not path.exists() or sha256(path) != record["sha256"].get(path.name):
            raise DamagedFile(
                f"{path.name} is missing or not the one its record describes. Run `make grid`, or "
                "take it from the repository."
            )
    return *(pd.read_csv(path) for path in paths), record


def _tables_of(studies, found):
    study = next(iter(studies.values()))
    profile = study.profile
    table = table_of(found, profile.resamples, profile.seed)
    headline = {
        k: cell for k, cell in found.items() if k[1] in HEADLINE and k[2] == profile.epsilon
    }
    return table, matrix_table(found, study.categories), category_table(studies, headline)


def tables(studies: dict) -> tuple:
    """(table, matrices, categories, record): the grid that is `committed`, else the headline size
    computed here (or kept from before) and no record. studies {pair: Study}, of one profile.
    """
    if (found := committed(studies)) is not None:
        return found
    headline = [next(iter(studies.values())).profile.epsilon]
    computed = {}
    for study in studies.values():
        computed |= cells(study, sizes=headline)
    return *_tables_of(studies, computed), None


def shown(studies: dict) -> pd.DataFrame | None:
    """The matrices of the grid that is `committed`, else those of all cells that are `finished`.
    None where there is neither.
    """
    if (known := committed(studies, fetch=False)) is not None:
        return known[1]
    found = {}
    for study in studies.values():
        found |= finished(study)
    return matrix_table(found, next(iter(studies.values())).categories) if found else None


def write_categories(studies: dict, found: dict) -> Path:
    """Write data/grid/<profile>-categories.csv alone, of the HEADLINE scores' cells at the headline
    size, beside tables that are there already. Raises RecordMismatch unless these are of the same
    models, rows and settings, UserError unless the cells say what the tables say.
    """
    profile = next(iter(studies.values())).profile
    record = _record(profile.name)
    anew = f"Run `python -m helpers.run grid --profile {profile.name}` to compute it anew"
    verify(record["pairs"], kept(studies), GRID / f"{profile.name}.json", anew)
    before = pd.read_csv(GRID / f"{profile.name}.csv").set_index(["pair", "score", "size", "half"])
    again = table_of(found, profile.resamples, profile.seed).set_index(before.index.names)
    if len(missing := again.index.difference(before.index)):
        raise UserError(
            f"{short(GRID / profile.name)}.csv has no row of {missing[0]}, whose cells are to be "
            f"told by category. Add {' and '.join(HEADLINE)} to the profile's scores and run "
            "`make grid`."
        )
    gap = (again["own"] - before.loc[again.index, "own"]).abs().max()
    if not gap < 0.01:
        raise UserError(f"own effects differ from the grid's by up to {gap:.3f}. Run `make grid`.")
    path = GRID / f"{profile.name}-categories.csv"
    write_table(path, category_table(studies, found))
    record["sha256"][path.name] = sha256(path)
    write_json(GRID / f"{profile.name}.json", record)
    return path


def write(studies: dict, found: dict) -> list[Path]:
    """Write data/grid/<profile>.csv, -matrices.csv, -categories.csv and their record: how many
    cells they hold.

    Raises UserError where no cell is finished, or not all are and a table of the grid is there.
    """
    profile = next(iter(studies.values())).profile
    record = GRID / f"{profile.name}.json"
    every = sum(len(cells_of(profile)) * len(study.halves) for study in studies.values())
    if not found or len(found) < every and record.exists():
        raise UserError(
            f"{len(found)} of {every} cells of the grid are finished: nothing is written. Run "
            f"`make grid PROFILE={profile.name}` to the end"
            + (f", or remove {short(record)} first." if found else ".")
        )
    paths = [GRID / f"{profile.name}{end}.csv" for end in TABLES]
    for path, table in zip(paths, _tables_of(studies, found), strict=True):
        write_table(path, table)
    write_json(
        record,
        {
            "profile": profile.name,
            "seed": profile.seed,
            "epsilon": profile.epsilon,
            "pairs": kept(studies),
            "scores": profile.scores,
            "sizes": profile.sizes,
            "draws_elsewhere": profile.controls_elsewhere,
            "resamples": profile.resamples,
            "made_with": versions(),
            "cells": len(found),
            "sha256": {path.name: sha256(path) for path in paths},
        },
    )
    return paths
