"""Equal length: counts on equally many positions drawn from each instruction, all draws in one
forward pass. (Ours.)

I' instructions with enough tokens, D draws, M components of a unit. What neurons do on the *same*
token is kept, which thinning finished counts would lose.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import entr
from tqdm import tqdm

from ..analysis import nulls
from ..analysis.sets import PackedSets, nominal_size
from ..analysis.similarity import jaccard_matrix
from ..capture.count import count_activations
from ..capture.counter import Counter
from ..capture.tokens import batches
from ..paths import counts_dir
from ..record import NotTestable, UserError, cached
from .counting import SHARD

RULES = ("quantile", "exact")


class Drawn(NamedTuple):
    """One model's sets and routing on `size` drawn positions of each instruction that has as many.

    rows    int [I'], their places among all instructions
    sets    {unit: {rule: uint8 [I', D, ceil(M / 8)]}}, top-epsilon sets (see top_sets), bit-packed
    total   {unit: float [M]}, counts summed over instructions and draws
    level   {unit: float [I']}, mean share active
    routed  uint8 [I', D, L, E], or None
    """

    size: int
    rows: np.ndarray
    sets: dict
    total: dict
    level: dict
    routed: np.ndarray | None


def places(tokens: int, row: int, draws: int, size: int, seed: int = 0) -> np.ndarray:
    """`size` of an instruction's 0..tokens-1, int [D, size], without replacement; decided by seed
    and row alone.
    """
    order = np.random.default_rng([seed, row]).permuted(
        np.tile(np.arange(tokens), (draws, 1)), axis=1
    )
    return order[:, :size]


class DrawCounter(Counter):
    """Counts what Counter counts and, beside it, on drawn places: `places` [B, T, D] bool, set
    before each call; `drawn` {site: uint8 [B, D, N], or [B, D, E, N]} and `chosen_by` {site: uint8
    [B, D, E]} after it.
    """

    def __call__(self, *masks):
        self.drawn, self.chosen_by, self._moved = {}, {}, {}
        return super().__call__(*masks)

    def _tally(self, cells):
        """How many drawn tokens are marked: cells [B * T, N] -> uint8 [B, D, N]. Exact, as float32
        is below 2**24.
        """
        if cells.device not in self._moved:
            self._moved[cells.device] = self.places.to(cells.device, torch.float32).transpose(
                1, 2
            )  # [B, D, T]
        mask = self._moved[cells.device]
        return (mask @ cells.view(mask.shape[0], mask.shape[2], -1).float()).to(torch.uint8).cpu()

    def watch_mlp(self, site):
        """Hook on an MLP's activation module."""
        full = super().watch_mlp(site)

        def hook(module, args, out):
            full(module, args, out)
            self.drawn[site.name] = self._tally(out.reshape(-1, site.width) > 0)

        return hook

    def watch_router(self, site):
        """Hook before a bank of experts."""
        full = super().watch_router(site)

        def hook(module, args):
            full(module, args)
            chosen = torch.zeros(len(args[1]), site.experts, device=args[1].device)
            self.chosen_by[site.name] = self._tally(chosen.scatter_(1, args[1], 1))

        return hook

    def watch_experts(self, site):
        """Observer inside a bank of experts: ids [R] expert, rows [R] token, gate [R, N]; one
        expert at a time.
        """
        full = super().watch_experts(site)

        def observer(ids, rows, gate):
            full(ids, rows, gate)
            found = torch.zeros(
                *self.places.shape[::2], site.experts, site.width, dtype=torch.uint8
            )
            for e in ids.unique().tolist():
                cells = torch.zeros(
                    self.places.shape[:2].numel(), site.width, dtype=torch.bool, device=gate.device
                )
                cells[rows[ids == e]] = gate[ids == e] > 0
                found[:, :, e] = self._tally(cells)
            self.drawn[site.name] = found

        return observer


def draw_counts(model, encoded, rows, size: int, draws: int, seed: int = 0, batch_size: int = 32):
    """Yield (row [B'], {unit: uint8 [B', D, M]}, routed uint8 [B', D, L, E] or None) per batch,
    one forward pass each.

    encoded: the sequences (see `encode`); rows: their numbers, which with the seed decide the
    draws, whatever the batch size. Sequences with fewer than `size` counted tokens are left out.
    Batches come longest first.
    """
    if not 0 < size < 256 or draws < 1:
        raise UserError(
            f"{draws} draws of {size} positions; expected one draw at least, of 1 to 255 positions."
        )
    kept = [i for i, e in enumerate(encoded) if sum(e.counted) >= size]
    if not kept:
        return
    with count_activations(model, DrawCounter) as counter:
        for batch in batches([encoded[i] for i in kept], batch_size):
            row = np.array([rows[kept[i]] for i in batch.rows])
            counter.places = torch.zeros(*batch.input_ids.shape, draws, dtype=torch.bool)
            for b, mask in enumerate(batch.count_mask):
                where = mask.nonzero()[:, 0].numpy()
                chosen = where[places(len(where), int(row[b]), draws, size, seed)]  # [D, size]
                counter.places[b, chosen, np.arange(draws)[:, None]] = True
            full = counter(batch.input_ids, batch.attention_mask, batch.count_mask)
            yield row, *_gathered(counter, full, size)


def _gathered(counter, full, size):
    def stack(found, family):
        parts = [found[s.name].numpy() for s in counter.sites if s.family == family]
        return np.stack(parts, axis=2)  # [B, D, L, (E,) N]

    units = {
        unit: stack(counter.drawn, full.family(unit))
        for unit in ("neurons", "shared")
        if full.family(unit) in full.neurons
    }
    routed = None if full.routed is None else stack(counter.chosen_by, "expert")
    if routed is not None and (routed.sum(-1) != counter.chosen * size).any():
        raise RuntimeError(f"drawn tokens do not add up to {counter.chosen} experts each.")
    return {unit: c.reshape(*c.shape[:2], -1) for unit, c in units.items()}, routed


def cut(counts, size: int, rule: str = "quantile", seed=0) -> np.ndarray:
    """The `size` largest of the last axis, bool: with all ties at the cut (quantile), or with a
    draw of them (exact).

    >>> cut(np.array([[3, 1, 3, 0]]), 1).astype(int)
    array([[1, 0, 1, 0]])
    """
    if rule == "exact":
        counts = counts + np.random.default_rng(seed).random(counts.shape)
    return counts >= np.partition(counts, -size, axis=-1)[..., -size, None]


def draw(study, variant: str = "tuned", size: int = 16) -> Drawn:
    """One model of a pair on `size` positions drawn `draws` times (the profile's) from each of a
    whole study's rows; from disk if there.

    One file per shard of instructions, with its record: an interrupted run goes on where it was.
    """
    if study.whole is not study:
        raise UserError("draw: a part of a study; draws are those of the whole. Use study.whole.")
    profile, label = study.profile, f"{study.name} {variant} drawn"
    made = study.settings(variant) | {
        "size": size,
        "draws": profile.draws,
        "draw_seed": profile.seed,
        "epsilon": profile.epsilon,
        "rules": [*RULES],
    }
    folder, parts = counts_dir(profile.name, study.name, variant, f"drawn-{size}"), []

    def compute(rows):
        model, encoded = study.reader(variant)[0], study.take(list(rows)).encoded(variant=variant)
        options = (size, profile.draws, profile.seed, profile.batch_size)
        counted = draw_counts(model, encoded, rows, *options)
        return _summed(counted, profile.epsilon, profile.seed), {}

    starts = range(0, len(study.rows), SHARD)
    for k, first in enumerate(tqdm(starts, label, delay=2, leave=False, unit=" shards")):
        rows, path = range(first, min(first + SHARD, len(study.rows))), f"drawn-{k:05d}.safetensors"
        parts.append(cached(folder / path, made, lambda rows=rows: compute(rows))[0])
    return _joined([part for part in parts if len(part["rows"])], size, f"{study.name} {variant}")


def _summed(counted, epsilon, seed) -> dict[str, np.ndarray]:
    """The arrays of one shard, in the order of its instructions."""
    found = {"rows": []}
    for row, units, routed in counted:
        found["rows"].append(row)
        for unit, counts in units.items():
            size = nominal_size(counts.shape[-1], epsilon)
            for rule in RULES:
                sets = [
                    cut(c, size, rule, [seed, i]) for i, c in zip(row.tolist(), counts, strict=True)
                ]
                found.setdefault(f"sets.{unit}.{rule}", []).append(np.packbits(sets, axis=-1))
            found.setdefault(f"level.{unit}", []).append(counts.mean((1, 2)))
            found.setdefault(f"total.{unit}", []).append(counts.sum((0, 1), dtype=float)[None])
        if routed is not None:
            found.setdefault("routed", []).append(routed)
    arrays = {
        name: np.concatenate(parts) if parts else np.zeros(0, int) for name, parts in found.items()
    }
    order = np.argsort(arrays["rows"])
    return {name: a.sum(0) if name.startswith("total.") else a[order] for name, a in arrays.items()}


def _joined(parts, size, where) -> Drawn:
    if not parts:
        raise NotTestable(f"{where}: no instruction has {size} counted tokens; draw fewer.")
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays |= {
        name: sum(part[name] for part in parts) for name in arrays if name.startswith("total.")
    }
    units = [name.partition(".")[2] for name in arrays if name.startswith("total.")]
    sets = {unit: {rule: arrays[f"sets.{unit}.{rule}"] for rule in RULES} for unit in units}
    return Drawn(
        size,
        arrays["rows"],
        sets,
        {u: arrays[f"total.{u}"] for u in units},
        {u: arrays[f"level.{u}"] / size for u in units},
        arrays.get("routed"),
    )


def similarities(drawn: Drawn, unit: str, rule: str = "quantile"):
    """Yield the pairwise similarity of each draw, float32 [I', I']: Jaccard of sets, or
    Jensen-Shannon of routing.
    """
    if unit == "experts":
        for d in range(drawn.routed.shape[1]):
            yield equal_routing_similarity(drawn.routed[:, d])
        return
    width = len(drawn.total[unit])
    for d in range(drawn.sets[unit][rule].shape[1]):
        sets = PackedSets(np.ascontiguousarray(drawn.sets[unit][rule][:, d]), width)[:]
        if sets.all(1).any():
            raise NotTestable(
                f"{unit}: a set holds every component (its cut is at zero); draw more positions."
            )
        yield jaccard_matrix(sets)


def equal_routing_similarity(routed) -> np.ndarray:
    """overlap.routing_similarity for profiles of equal totals, counts [I, L, E] -> float32 [I, I]:
    as counts are few whole numbers, the entropies of all mixtures are one product of a table's
    rows with one-hot counts.
    """
    layers, n, most = routed.shape[1], int(routed[0, 0].sum()), int(routed.max()) + 1
    if (routed.sum(-1) != n).any():
        raise UserError(
            "routing counts of different totals; expected equally many positions of each row."
        )
    mixed = entr(np.add.outer(np.arange(most), np.arange(most)) / (2 * n))  # [c, c]
    one_hot = np.eye(most, dtype=np.float32)[routed].reshape(len(routed), -1)
    mixture = mixed.astype(np.float32)[routed].reshape(len(routed), -1) @ one_hot.T  # summed [I, I]
    entropy = entr(routed / n).sum((1, 2))
    return np.clip(
        1 - (mixture - np.add.outer(entropy, entropy) / 2) / (layers * np.log(2)), 0, 1
    ).astype(np.float32)


def null_similarity(drawn: Drawn, unit: str, epsilon: float, rule: str = "quantile", seed: int = 0):
    """What the rate-matched null expects at this length: float32 [I', I'], for experts one number
    for all pairs.

    Neurons: nulls.rate_null of the margins over all draws. Experts: at equal length all
    instructions are alike under the null, so the mean over pairs of redrawn routing (one redraw
    per draw) is what each pair expects.
    """
    if unit != "experts":
        size = nominal_size(len(drawn.total[unit]), epsilon)
        tokens = np.full(len(drawn.rows), drawn.size)
        return nulls.expected_jaccard(
            nulls.null_of(drawn.total[unit], drawn.level[unit], tokens, size, rule)
        )
    off, means = ~np.eye(len(drawn.rows), dtype=bool), []
    for d in range(drawn.routed.shape[1]):
        redrawn = nulls.redraw_routing(
            drawn.routed[:, d], np.full(len(drawn.rows), drawn.size), [seed, d]
        )
        means.append(equal_routing_similarity(redrawn)[off].mean(dtype=float))
    return np.float32(np.mean(means))
