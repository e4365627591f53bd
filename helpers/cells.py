"""The cells of the grid of ablations, score x size x half of every pair: one file each, computed once, then kept.

A cell's sets are chosen on one half of the rows (column `fold`) and measured on the other. A killed run goes on where
it stopped; a cell depends on nothing but its record, so it comes out the same whatever was computed before it.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from helpers.capture import capture, open_model
from helpers.checkpoints import fingerprint, locate
from helpers.choosing import draws_of, sets_of, standing
from helpers.components import codes
from helpers.corpus import text
from helpers.evaluate import ablation_matrix
from helpers.hexainst import CATEGORIES
from helpers.paths import results_dir
from helpers.record import DamagedFile, digest, read_tensors, versions, write_tensors


def measure(loaded, profile, rows, own: dict, controls: dict, operator: str = "zero", everywhere: int = 0, **options):
    """Increases of loss, nats per reference token, and the rows' category codes: {"own": [n, sets], kind: [n, draws],
    "everywhere": [n, everywhere, C], "labels": [n]}.

    own: {name: mask}, on all rows. controls: {kind: {category: [masks]}}, each on its own category's rows alone; the
    first `everywhere` draws of the first kind also on all rows. `options` go to `ablate`. A single set may be dead;
    raises RuntimeError if none of them changed any loss.
    """
    def run(at, masks):
        return ablation_matrix(*loaded, profile, at, masks, operator, allow_inert=True, **options).to_numpy()
    labels, first = rows["category"].to_numpy(), next(iter(controls.values()))
    found = {"own": run(rows, own)} if own else {}
    for category in first:
        at = labels == category
        table = run(rows[at], {(kind, d): m for kind in controls for d, m in enumerate(controls[kind][category])})
        start = 0
        for kind in controls:
            width = len(controls[kind][category])
            found.setdefault(kind, np.zeros((len(rows), width)))[at] = table[:, start:start + width]
            start += width
    if everywhere:
        masks = {(d, category): first[category][d] for d in range(everywhere) for category in first}
        found["everywhere"] = run(rows, masks).reshape(len(rows), everywhere, -1)
    if not any(increase.any() for increase in found.values()):
        raise RuntimeError(f"{operator!r} of {len(own)} sets and their controls changed no loss: it missed the model.")
    return found | {"labels": codes(labels).astype(np.int32)}


def pooled(parts: list[dict]) -> tuple[dict, np.ndarray]:
    """(arrays that all parts have, their rows together; the part [n] that a row comes from)."""
    names = [name for name in parts[0] if all(name in part for part in parts) and name not in ("layers", "sets")]
    from_part = np.concatenate([np.full(len(part["labels"]), i) for i, part in enumerate(parts)])
    return {name: np.concatenate([part[name] for part in parts]) for name in names}, from_part


def measured_rows(profile, rows, half) -> pd.DataFrame:
    """The first `ablation_rows` rows of each category of a half."""
    return rows[rows["fold"] == half].groupby("category", sort=False).head(profile.ablation_rows).reset_index(drop=True)


def cells_of(profile, scores=None, sizes=None) -> list[tuple[str, float]]:
    """(score, size) of a profile's grid, the headline size first; a score that sees responses only there."""
    sizes = sizes or [profile.epsilon, *(s for s in profile.sizes if s != profile.epsilon)]
    return [(score, size) for size in sizes for score in scores or profile.scores
            if size == profile.epsilon or score != "contribution-response"]


def cell_path(profile, pair: str, score: str, size: float, half: str) -> Path:
    """Where one cell lies; `half` is the one it is measured on."""
    return results_dir(profile.name) / "grid" / pair / f"{score}-{size:g}-{half.replace(' ', '-')}.safetensors"


def expected(profile, pair, rows, score, size, half) -> dict:
    """All that decides a cell, as its record keeps it; `made_with` versions stand beside it and are not compared."""
    data = [[row["id"], text(row), row["reference"], row["fold"]] for row in rows.to_dict("records")]
    head = size == profile.epsilon
    return {"pair": pair.name, "weights": fingerprint(locate(pair.tuned, pair.tuned_revision)[0]), "data": digest(data),
            "score": score, "size": size, "measured": half, "operator": "zero", "seed": profile.seed,
            "template": profile.template, "dtype": pair.dtype, "rows": profile.ablation_rows,
            "draws": profile.controls if head else profile.controls_elsewhere,
            "everywhere": profile.controls_all_rows if head else min(2, profile.controls_all_rows)}


def compute(profile, pair, rows, counts, loaded, half, ranked, score, size) -> tuple[dict, dict]:
    """(arrays, what was found on the way) of one cell; `ranked` is the standing of the other half."""
    want, here = expected(profile, pair, rows, score, size, half), measured_rows(profile, rows, half)
    sets = sets_of(ranked, score, size, profile.seed)
    drawn, gaps = draws_of(ranked, counts, sets, want["draws"], profile.seed, f"{pair.name}/{score}/{size:g}/{half}")
    own = {c: counts.mask("neurons", members) for c, members in zip(CATEGORIES, sets, strict=True)}
    controls = {kind: dict(zip(CATEGORIES, masks, strict=True)) for kind, masks in drawn.items()}
    arrays = measure(loaded, profile, here, own, controls, everywhere=want["everywhere"])
    shared = (sets.astype(int) @ sets.T) / (sets[:, None] | sets[None]).sum(-1)
    layers = sets.reshape(len(sets), counts.unit("neurons").shape[1], -1).sum(-1)                # [C, L]
    found = {"neurons": int(sets[0].sum()), "alike": float(shared[~np.eye(len(sets), dtype=bool)].mean()), "gaps": gaps}
    return arrays | {"layers": layers.astype(np.int32), "sets": np.packbits(sets, axis=-1)}, found


def cells(profile, rows, scores=None, sizes=None, pairs=None, loaded=None, counts=None, ranked=None,
          say=None, compute_missing=True) -> dict:
    """{(pair, score, size, half): (arrays, record)}: from disk where a cell is finished, else computed and kept.

    rows: all instructions with their column `fold`. loaded, counts {pair: ...} and ranked {(pair, choosing half):
    Standing} are used where the caller has them. Raises RecordMismatch for a cell made under other settings.
    """
    out, halves = {}, list(rows["fold"].unique())
    for pair in profile.pairs if pairs is None else [pair for pair in profile.pairs if pair.name in pairs]:
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
        have = (counts or {}).get(pair.name) or capture(profile, pair, "tuned", "prompt", rows, model)
        needed = {half: sorted({score for h, score, _ in missing if h == half}) for half in halves}
        from_half = {half: next(h for h in halves if h != half) for half in halves if needed[half]}
        ranks = {half: (ranked or {}).get((pair.name, chosen)) or standing(
            profile, rows, have, model, chosen, needed[half]) for half, chosen in from_half.items()}
        for half, score, size in sorted(missing, key=lambda cell: (cell[2] != profile.epsilon, cell[2])):
            path = cell_path(profile, pair.name, score, size, half)
            want = expected(profile, pair, rows, score, size, half)
            try:
                out[pair.name, score, size, half] = read_tensors(path, want)         # another process was here
                continue
            except DamagedFile:
                arrays, found = compute(profile, pair, rows, have, model, half, ranks[half], score, size)
            write_tensors(path, arrays, found | want | {"made_with": versions()})
            out[pair.name, score, size, half] = read_tensors(path, want)
            if say:
                say(f"{pair.name} {score} {size:g} on {half}")
    return out
