"""The grid of ablations as tables: `python -m helpers.grid --profile P` computes what is missing, and writes them.

data/grid/<profile>.csv has a row per pair, score, size and half; <profile>-matrices.csv the six-by-six matrices; the
record <profile>.json says of which models, rows and settings they are. Committed, so that notebook 06 can read them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from helpers.causal import critical, specificity
from helpers.cells import cells, expected, pooled
from helpers.choosing import KINDS, SEES_REFERENCE
from helpers.components import category_means
from helpers.config import load_profile
from helpers.corpus import folds
from helpers.hexainst import CATEGORIES, load_hexainst
from helpers.paths import DATA
from helpers.record import DamagedFile, UserError, read_json, sha256, verify, versions, write_json, write_table

GRID = DATA / "grid"
KEPT = ("weights", "data", "seed", "template", "dtype", "rows", "draws", "everywhere", "operator")


def own_effect(profile, arrays: dict, half, kinds=("random",)) -> dict:
    """`critical` and `specificity` (see causal) of what `measure` returned, pooled; half [n] as `pooled` gives it."""
    labels, settings = arrays["labels"], (profile.resamples, profile.seed)
    own = arrays["own"][np.arange(len(labels)), labels]
    found = critical(own, {kind: arrays[kind] for kind in kinds}, labels + len(CATEGORIES) * half, *settings)
    return found | specificity(arrays["own"], arrays["everywhere"], labels, half, *settings)


def summary(profile, found: dict, pair: str, score: str, size: float, where: list[str]) -> dict:
    """One row of the table: a cell's effects and controls, or those of several halves pooled (their rows together)."""
    parts = [found[pair, score, size, half] for half in where]
    arrays, half = pooled([arrays for arrays, _ in parts])
    kinds, labels, record = [kind for kind in KINDS if kind in arrays], arrays["labels"], parts[0][1]
    row = {"pair": pair, "score": score, "sees_reference": score in SEES_REFERENCE, "size": size,
           "neurons": record["neurons"], "half": where[0] if len(where) == 1 else "all", "rows": len(labels),
           "draws": record["draws"], "alike": float(np.mean([r["alike"] for _, r in parts]))}
    effects = own_effect(profile, arrays, half, kinds)
    row |= {kind: effects.pop(kind, None) for kind in KINDS}
    row |= {f"{kind}_gap": float(np.mean([r["gaps"][kind] for _, r in parts])) if kind in kinds else None
            for kind in KINDS[1:]}
    row |= effects
    return {k: v for key, value in row.items() for k, v in (
        ((f"{key[:-3]}_low", value[0]), (f"{key[:-3]}_high", value[1])) if key.endswith("_ci") else ((key, value),))}


def table_of(profile, found: dict) -> pd.DataFrame:
    """A row per pair, score, size and half, and for the halves pooled; a control that could not be drawn is empty."""
    keys = dict.fromkeys(key[:3] for key in found)
    return pd.DataFrame([summary(profile, found, *key, where) for key in keys
                         for halves in [[k[3] for k in found if k[:3] == key]]
                         for where in [halves, *([half] for half in halves)]])


def matrix_of(found: dict, pair: str, score: str, size: float) -> dict[str, np.ndarray]:
    """[C ablated, C measured], mean over the halves: `own` effects and those of `random` sets."""
    parts = [arrays for key, (arrays, _) in found.items() if key[:3] == (pair, score, size)]
    both = {"own": lambda arrays: arrays["own"], "random": lambda arrays: arrays["everywhere"].mean(1)}
    return {name: np.mean([category_means(of(arrays), arrays["labels"]).T for arrays in parts], 0)
            for name, of in both.items()}


def matrix_table(found: dict) -> pd.DataFrame:
    """All matrices as one tidy table: pair, score, size, ablated, measured, own, random."""
    parts = []
    for key in dict.fromkeys(key[:3] for key in found):
        both, names = matrix_of(found, *key), list(CATEGORIES)
        grid = pd.MultiIndex.from_product([names, names], names=["ablated", "measured"]).to_frame(index=False)
        head = dict(zip(("pair", "score", "size"), key, strict=True))
        parts.append(grid.assign(**head, **{name: np.round(m.ravel(), 5) for name, m in both.items()}))
    return pd.concat(parts)[["pair", "score", "size", "ablated", "measured", "own", "random"]]


def committed(profile, rows) -> tuple[pd.DataFrame, pd.DataFrame, dict] | None:
    """(table, matrices, record) of the grid that a profile names (`grid: tiny-full`), or of its own. None: it has none,
    or one of another seed or epsilon than this run's.

    Raises RecordMismatch if the models, rows or settings are no longer those it was made with, DamagedFile if the
    tables are not those of the record."""
    name = profile.grid or profile.name
    if profile.grid is None and not (GRID / f"{name}.json").exists():
        return None
    paths = [GRID / f"{name}{end}" for end in (".csv", "-matrices.csv")]
    record = read_json(GRID / f"{name}.json")
    if (record["seed"], record["epsilon"]) != (profile.seed, profile.epsilon):
        return None
    for pair in profile.pairs:
        want = expected(profile, pair, rows, "any", profile.epsilon, "any")
        verify(record["pairs"].get(pair.name, {}), {key: want[key] for key in KEPT}, paths[0])
    for path in paths:
        if not path.exists() or sha256(path) != record["sha256"][path.name]:
            raise DamagedFile(f"{path.name} is missing or not the one its record describes. Run `make grid`, or take "
                              "it from the repository.")
    return *(pd.read_csv(path) for path in paths), record


def tables(profile, rows, **ready) -> tuple[pd.DataFrame, pd.DataFrame, dict | None]:
    """The grid that is `committed`, else the headline size computed here (or kept from before) and no record.

    ready: `loaded`, `counts` and `ranked`, as `cells` takes them."""
    if (found := committed(profile, rows)) is not None:
        return found
    computed = cells(profile, rows, sizes=[profile.epsilon], **ready)
    return table_of(profile, computed), matrix_table(computed), None


def write(profile, rows, found: dict) -> list[Path]:
    """Write data/grid/<profile>.csv, -matrices.csv and their record .json, which says how many cells they hold."""
    tables = {"": table_of(profile, found), "-matrices": matrix_table(found)}
    paths = [GRID / f"{profile.name}{end}.csv" for end in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_table(path, table)
    made = {pair.name: expected(profile, pair, rows, "any", profile.epsilon, "any") for pair in profile.pairs}
    pairs = {name: {key: want[key] for key in KEPT} for name, want in made.items()}
    write_json(GRID / f"{profile.name}.json", {
        "profile": profile.name, "seed": profile.seed, "epsilon": profile.epsilon, "pairs": pairs,
        "scores": profile.scores, "sizes": profile.sizes, "draws_elsewhere": profile.controls_elsewhere,
        "resamples": profile.resamples, "made_with": versions(), "cells": len(found),
        "sha256": {path.name: sha256(path) for path in paths}})
    return paths


def main(argv=None) -> int:
    """Compute what is missing of a profile's grid, print each cell; when all is there, write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--profile", required=True)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--pairs", nargs="+", help="only these, e.g. to share the work among processes; no table")
    choice.add_argument("--finished", action="store_true", help="compute nothing, write the table of what is there")
    options = parser.parse_args(argv)
    try:
        profile = load_profile(options.profile)
        torch.set_num_threads(profile.threads)
        rows = load_hexainst(dataset=profile.dataset)
        rows = rows.assign(fold=folds(rows))
        found = cells(profile, rows, pairs=options.pairs, compute_missing=not options.finished,
                      say=lambda cell: print(cell, flush=True))
        if options.pairs is None:
            print(*write(profile, rows, found), sep="\n")
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
