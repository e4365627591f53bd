"""The grid of ablations: a cell per pair, score, size and half, computed once, kept, and read as
tables.

A cell's sets are chosen on one half of the rows (column `fold`) and measured on the other. A killed
run goes on where it stopped; a cell depends on nothing but its record, so it comes out the same
whatever was computed before it. The tables are data/grid/<profile>.csv, a row per pair, score, size
and half, and <profile>-matrices.csv, the six-by-six matrices; <profile>.json says of which models,
rows and settings they are.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ..analysis.sets import category_means
from ..capture.loading import fingerprint, locate
from ..hexainst.corpus import text
from ..hexainst.schema import CATEGORIES
from ..paths import DATA, results_dir
from ..record import (
    DamagedFile,
    digest,
    read_json,
    read_tensors,
    sha256,
    verify,
    versions,
    write_json,
    write_table,
    write_tensors,
)
from .ablation import KINDS, draws_of, measure, measured_rows, own_effect, pooled
from .counting import capture, open_model
from .scores import SEES_REFERENCE, sets_of, standing


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


def cell_path(profile, pair: str, score: str, size: float, half: str) -> Path:
    """Where one cell lies; `half` is the one it is measured on."""
    return (
        results_dir(profile.name)
        / "grid"
        / pair
        / f"{score}-{size:g}-{half.replace(' ', '-')}.safetensors"
    )


def expected(profile, pair, rows, score, size, half) -> dict:
    """All that decides a cell, as its record keeps it; `made_with` versions stand beside it and
    are not compared.
    """
    data = [
        [row["id"], text(row), row["reference"], row["fold"]] for row in rows.to_dict("records")
    ]
    head = size == profile.epsilon
    return {
        "pair": pair.name,
        "weights": fingerprint(locate(pair.tuned, pair.tuned_revision)[0]),
        "data": digest(data),
        "score": score,
        "size": size,
        "measured": half,
        "operator": "zero",
        "seed": profile.seed,
        "template": profile.template,
        "dtype": pair.dtype,
        "rows": profile.ablation_rows,
        "draws": profile.controls if head else profile.controls_elsewhere,
        "everywhere": profile.controls_all_rows if head else min(2, profile.controls_all_rows),
    }


def compute(profile, pair, rows, counts, loaded, half, ranked, score, size) -> tuple[dict, dict]:
    """(arrays, what was found on the way) of one cell; `ranked` is the standing of the other half."""
    want, here = (
        expected(profile, pair, rows, score, size, half),
        measured_rows(profile, rows, half),
    )
    sets = sets_of(ranked, score, size, profile.seed)
    drawn, gaps = draws_of(
        ranked, counts, sets, want["draws"], profile.seed, f"{pair.name}/{score}/{size:g}/{half}"
    )
    own = {c: counts.mask("neurons", members) for c, members in zip(CATEGORIES, sets, strict=True)}
    controls = {kind: dict(zip(CATEGORIES, masks, strict=True)) for kind, masks in drawn.items()}
    arrays = measure(loaded, profile, here, own, controls, everywhere=want["everywhere"])
    shared = (sets.astype(int) @ sets.T) / (sets[:, None] | sets[None]).sum(-1)
    layers = sets.reshape(len(sets), counts.unit("neurons").shape[1], -1).sum(-1)  # [C, L]
    found = {
        "neurons": int(sets[0].sum()),
        "alike": float(shared[~np.eye(len(sets), dtype=bool)].mean()),
        "gaps": gaps,
    }
    return arrays | {"layers": layers.astype(np.int32), "sets": np.packbits(sets, axis=-1)}, found


def cells(
    profile,
    rows,
    scores=None,
    sizes=None,
    pairs=None,
    loaded=None,
    counts=None,
    ranked=None,
    say=None,
    compute_missing=True,
) -> dict:
    """{(pair, score, size, half): (arrays, record)}: from disk where a cell is finished, else
    computed and kept.

    rows: all instructions with their column `fold`. loaded, counts {pair: ...} and ranked {(pair,
    choosing half): Standing} are used where the caller has them. Raises RecordMismatch for a cell
    made under other settings.
    """
    out, halves = {}, list(rows["fold"].unique())
    for pair in (
        profile.pairs if pairs is None else [pair for pair in profile.pairs if pair.name in pairs]
    ):
        missing = []
        for half in halves:
            for score, size in cells_of(profile, scores, sizes):
                path = cell_path(profile, pair.name, score, size, half)
                try:
                    want = expected(profile, pair, rows, score, size, half)
                    out[pair.name, score, size, half] = read_tensors(path, want)
                except DamagedFile:
                    missing.append((half, score, size))
        if not missing or not compute_missing:
            continue
        model = (loaded or {}).get(pair.name) or open_model(pair, "tuned")
        have = (counts or {}).get(pair.name) or capture(
            profile, pair, "tuned", "prompt", rows, model
        )
        needed = {half: sorted({score for h, score, _ in missing if h == half}) for half in halves}
        from_half = {half: next(h for h in halves if h != half) for half in halves if needed[half]}
        ranks = {
            half: (ranked or {}).get((pair.name, chosen))
            or standing(profile, rows, have, model, chosen, needed[half])
            for half, chosen in from_half.items()
        }
        for half, score, size in sorted(
            missing, key=lambda cell: (cell[2] != profile.epsilon, cell[2])
        ):
            path = cell_path(profile, pair.name, score, size, half)
            want = expected(profile, pair, rows, score, size, half)
            try:
                out[pair.name, score, size, half] = read_tensors(
                    path, want
                )  # another process was here
                continue
            except DamagedFile:
                arrays, found = compute(
                    profile, pair, rows, have, model, half, ranks[half], score, size
                )
            write_tensors(path, arrays, found | want | {"made_with": versions()})
            out[pair.name, score, size, half] = read_tensors(path, want)
            if say:
                say(f"{pair.name} {score} {size:g} on {half}")
    return out


GRID = DATA / "grid"
KEPT = ("weights", "data", "seed", "template", "dtype", "rows", "draws", "everywhere", "operator")


def summary(profile, found: dict, pair: str, score: str, size: float, where: list[str]) -> dict:
    """One row of the table: a cell's effects and controls, or those of several halves pooled
    (their rows together).
    """
    parts = [found[pair, score, size, half] for half in where]
    arrays, half = pooled([arrays for arrays, _ in parts])
    kinds, labels, record = (
        [kind for kind in KINDS if kind in arrays],
        arrays["labels"],
        parts[0][1],
    )
    row = {
        "pair": pair,
        "score": score,
        "sees_reference": score in SEES_REFERENCE,
        "size": size,
        "neurons": record["neurons"],
        "half": where[0] if len(where) == 1 else "all",
        "rows": len(labels),
        "draws": record["draws"],
        "alike": float(np.mean([r["alike"] for _, r in parts])),
    }
    effects = own_effect(profile, arrays, half, kinds)
    row |= {kind: effects.pop(kind, None) for kind in KINDS}
    row |= {
        f"{kind}_gap": float(np.mean([r["gaps"][kind] for _, r in parts]))
        if kind in kinds
        else None
        for kind in KINDS[1:]
    }
    row |= effects
    return {
        k: v
        for key, value in row.items()
        for k, v in (
            ((f"{key[:-3]}_low", value[0]), (f"{key[:-3]}_high", value[1]))
            if key.endswith("_ci")
            else ((key, value),)
        )
    }


def table_of(profile, found: dict) -> pd.DataFrame:
    """A row per pair, score, size and half, and for the halves pooled; a control that could not be
    drawn is empty.
    """
    keys = dict.fromkeys(key[:3] for key in found)
    return pd.DataFrame(
        [
            summary(profile, found, *key, where)
            for key in keys
            for halves in [[k[3] for k in found if k[:3] == key]]
            for where in [halves, *([half] for half in halves)]
        ]
    )


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


def matrix_table(found: dict) -> pd.DataFrame:
    """All matrices as one tidy table: pair, score, size, ablated, measured, own, random."""
    parts = []
    for key in dict.fromkeys(key[:3] for key in found):
        both, names = matrix_of(found, *key), list(CATEGORIES)
        grid = pd.MultiIndex.from_product([names, names], names=["ablated", "measured"]).to_frame(
            index=False
        )
        head = dict(zip(("pair", "score", "size"), key, strict=True))
        parts.append(
            grid.assign(**head, **{name: np.round(m.ravel(), 5) for name, m in both.items()})
        )
    return pd.concat(parts)[["pair", "score", "size", "ablated", "measured", "own", "random"]]


def committed(profile, rows) -> tuple[pd.DataFrame, pd.DataFrame, dict] | None:
    """(table, matrices, record) of the grid that a profile names (`grid: tiny-full`), or of its
    own. None: it has none, or one of another seed or epsilon than this run's.

    Raises RecordMismatch if the models, rows or settings are no longer those it was made with,
    DamagedFile if the tables are not those of the record.
    """
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
            raise DamagedFile(
                f"{path.name} is missing or not the one its record describes. Run `make grid`, or take "
                "it from the repository."
            )
    return *(pd.read_csv(path) for path in paths), record


def tables(profile, rows, **ready) -> tuple[pd.DataFrame, pd.DataFrame, dict | None]:
    """The grid that is `committed`, else the headline size computed here (or kept from before) and
    no record.

    ready: `loaded`, `counts` and `ranked`, as `cells` takes them.
    """
    if (found := committed(profile, rows)) is not None:
        return found
    computed = cells(profile, rows, sizes=[profile.epsilon], **ready)
    return table_of(profile, computed), matrix_table(computed), None


def write(profile, rows, found: dict) -> list[Path]:
    """Write data/grid/<profile>.csv, -matrices.csv and their record .json, which says how many
    cells they hold.
    """
    tables = {"": table_of(profile, found), "-matrices": matrix_table(found)}
    paths = [GRID / f"{profile.name}{end}.csv" for end in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        write_table(path, table)
    made = {
        pair.name: expected(profile, pair, rows, "any", profile.epsilon, "any")
        for pair in profile.pairs
    }
    pairs = {name: {key: want[key] for key in KEPT} for name, want in made.items()}
    write_json(
        GRID / f"{profile.name}.json",
        {
            "profile": profile.name,
            "seed": profile.seed,
            "epsilon": profile.epsilon,
            "pairs": pairs,
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
