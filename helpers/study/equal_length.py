"""Equal length: counts on equally many positions drawn from each instruction, all draws in one
forward pass. (Ours.)

I' instructions with enough tokens, D draws, M components of a unit. What neurons do on the *same*
token is kept, which thinning finished counts would lose.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import entr
from tqdm import tqdm

from ..analysis import nulls
from ..analysis.sets import PackedSets, nominal_size
from ..analysis.similarity import jaccard_matrix
from ..capture.count import passes
from ..capture.tokens import Encoded
from ..record import NotTestable, UserError, cached
from .counting import SHARD

RULES, SIZE = ("quantile", "exact"), 16  # tie rules; positions of the headline
SIZES = (8, SIZE, 32)  # how many positions are drawn of the tuned model's instructions


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


def with_draws(encoded: list[Encoded], rows, size: int, draws: int, seed: int = 0):
    """The same sequences with a position group more for each draw, "drawn-<size>-0", ...: `size` of
    their counted tokens. rows: their numbers, which with the seed decide the draws. Sequences with
    fewer such tokens have none drawn.
    """
    if not 0 < size < 256 or draws < 1:
        raise UserError(
            f"{draws} draws of {size} positions; expected one draw at least, of 1 to 255 positions."
        )
    found = []
    for one, row in zip(encoded, rows, strict=True):
        where, masks = np.flatnonzero(one.counted), np.zeros((draws, len(one.ids)), bool)
        if len(where) >= size:
            chosen = where[places(len(where), int(row), draws, size, seed)]  # [D, size]
            masks[np.arange(draws)[:, None], chosen] = True
        groups = {f"drawn-{size}-{d}": tuple(mask.tolist()) for d, mask in enumerate(masks)}
        found.append(Encoded(one.ids, one.counted, one.groups | groups))
    return found


class Draws:
    """Takes in what `passes` gives of sequences `with_draws`, and keeps of each draw its sets.

    rows: the sequences' numbers. `arrays` are those of one file of `draw`.
    """

    def __init__(self, rows, size: int, draws: int, epsilon: float, seed: int = 0):
        self.rows, self.size, self.draws = np.asarray(rows), size, draws
        self.epsilon, self.seed, self.found = epsilon, seed, {"rows": []}

    def __call__(self, rows, counts: dict) -> None:
        """One batch: `rows` are places in the list that was read, counts {group's name: Counts}."""
        drawn = [counts[f"drawn-{self.size}-{d}"] for d in range(self.draws)]
        here = drawn[0].tokens == self.size
        if not here.any():
            return
        row = self.rows[rows][here]
        self.found["rows"].append(row)
        for unit in ("neurons", "shared"):
            if drawn[0].family(unit) in drawn[0].neurons:
                values = np.stack([c.unit(unit)[here].reshape(len(row), -1) for c in drawn], 1)
                self._unit(unit, row, values.astype(np.uint8))  # [B', D, M]
        if drawn[0].routed is not None:
            routed = np.stack([c.routed[here] for c in drawn], 1).astype(np.uint8)
            self._add("routed", routed)  # [B', D, L, E]

    def _add(self, name, values):
        self.found.setdefault(name, []).append(values)

    def _unit(self, unit, row, counts):
        size = nominal_size(counts.shape[-1], self.epsilon)
        for rule in RULES:
            each = zip(row.tolist(), counts, strict=True)
            sets = [cut(c, size, rule, [self.seed, i]) for i, c in each]
            self._add(f"sets.{unit}.{rule}", np.packbits(sets, axis=-1))
        self._add(f"level.{unit}", counts.mean((1, 2)))
        self._add(f"total.{unit}", counts.sum((0, 1), dtype=float)[None])

    def arrays(self) -> dict[str, np.ndarray]:
        """What was kept, in the order of the rows' numbers; totals are summed."""
        joined = {
            name: np.concatenate(parts) if parts else np.zeros(0, int)
            for name, parts in self.found.items()
        }
        order = np.argsort(joined["rows"])
        return {
            name: a.sum(0) if name.startswith("total.") else a[order] for name, a in joined.items()
        }


def cut(counts, size: int, rule: str = "quantile", seed=0) -> np.ndarray:
    """The `size` largest of the last axis, bool: with all ties at the cut (quantile), or with a
    draw of them (exact).

    >>> cut(np.array([[3, 1, 3, 0]]), 1).astype(int)
    array([[1, 0, 1, 0]])
    """
    if rule == "exact":
        counts = counts + np.random.default_rng(seed).random(counts.shape)
    return counts >= np.partition(counts, -size, axis=-1)[..., -size, None]


def draw_settings(study, variant: str = "tuned", size: int = 16) -> dict:
    """All that decides the draws of one model, as their files' records keep it."""
    return study.settings(variant) | {
        "size": size,
        "draws": study.profile.draws,
        "draw_seed": study.profile.seed,
        "epsilon": study.profile.epsilon,
        "rules": [*RULES],
    }


def draw_path(study, variant: str, size: int, k: int):
    """Where the draws of the study's k-th file of instructions lie."""
    folder = f"drawn-{size}-{study.profile.epsilon:g}"  # another epsilon's lie beside them
    return study.folder(variant, folder) / f"drawn-{k:05d}.safetensors"


def draw(study, variant: str = "tuned", size: int = 16, beside=()) -> Drawn:
    """One model of a pair on `size` positions drawn `draws` times (the profile's) from each of a
    whole study's rows; from disk if there.

    One file per shard of instructions, with its record: an interrupted run goes on where it was.
    Those of SIZE positions (of the tuned model: SIZES) are made by the pass that makes the counts,
    those of other sizes `beside` by the pass that makes these.
    """
    if study.whole is not study:
        raise UserError("draw: a part of a study; draws are those of the whole. Use study.whole.")
    study.counts(variant)
    profile, parts = study.profile, []

    def compute(rows, k):
        others = [n for n in beside if not draw_path(study, variant, n, k).exists()]
        model, encoded = study.reader(variant)[0], study.take(list(rows)).reading(variant)
        some = [Encoded(e.ids, e.counted, {"prompt": e.counted}) for e in encoded]
        every = {}
        for n in dict.fromkeys([size, *others]):
            every[n] = Draws(rows, n, profile.draws, profile.epsilon, profile.seed)
            some = with_draws(some, rows, n, profile.draws, profile.seed)
        for batch, counts in passes(model, some, profile.batch_tokens):
            for drawn in every.values():
                drawn(batch, counts)
        own = every.pop(size).arrays(), {}
        for n, drawn in every.items():
            kept(n, k, lambda drawn=drawn: (drawn.arrays(), {}))
        return own

    def kept(n, k, compute):
        path = draw_path(study, variant, n, k)
        return cached(path, draw_settings(study, variant, n), compute)[0]

    starts, label = range(0, len(study.rows), SHARD), f"{study.name} {variant} drawn"
    for k, first in enumerate(tqdm(starts, label, delay=2, leave=False, unit=" shards")):
        rows = range(first, min(first + SHARD, len(study.rows)))
        parts.append(kept(size, k, partial(compute, rows, k)))
    return _joined([part for part in parts if len(part["rows"])], size, f"{study.name} {variant}")


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
    """similarity.routing_similarity for profiles of equal totals, counts [I, L, E] -> float32
    [I, I]: as counts are few whole numbers, the entropies of all mixtures are one product of a
    table's rows with one-hot counts.
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
