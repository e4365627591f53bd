"""From integer counts to frequencies, and from frequencies to sets of neurons and experts. Arrays
in, arrays out.

I instructions, L layers, N neurons of a layer, E experts, C categories, M components (what is
compared, flattened). `sets` are a bool array [I, M] or its bit-packed twin `PackedSets`, wherever
they are asked for. `labels` are names of any kind, or codes 0..C-1; see `codes`.
"""

from dataclasses import dataclass
from numbers import Real

import numpy as np
from scipy.special import entr

from ..record import NotTestable, UserError
from .checks import alongside, takes

BLOCK = 16_384  # columns unpacked at a time: 79 MB of float32 at 1,200 instructions


@dataclass(frozen=True)
class PackedSets:
    """Sets over `width` components, 8 to a byte: uint8 [I, ceil(width / 8)], the first in the
    highest bit.
    """

    bits: np.ndarray
    width: int
    shape = property(lambda self: (len(self.bits), self.width))

    def __getitem__(self, rows):
        """Rows as bool: `sets[3]` is [M], `sets[mask]` is [rows, M], `sets[:]` unpacks all."""
        return np.unpackbits(self.bits[rows], axis=-1, count=self.width).view(bool)

    def columns(self, part):
        """A slice of components as bool [I, stop - start]; it starts at a whole byte."""
        bits = self.bits[:, part.start // 8 : (part.stop + 7) // 8]
        return np.unpackbits(bits, axis=1, count=part.stop - part.start).view(bool)


@takes(sets="... M!")
def pack(sets) -> PackedSets:
    """Bit-pack bool sets [I, M]; unpack with `packed[:]`."""
    return PackedSets(np.packbits(sets, axis=-1), np.shape(sets)[-1])


def column_blocks(sets, columns=BLOCK):
    """Yield (slice, float32 [I, <= columns]) over the components; a full float copy never stands
    in memory.
    """
    for start in range(0, sets.shape[1], columns):
        part = slice(start, min(start + columns, sets.shape[1]))
        block = sets.columns(part) if isinstance(sets, PackedSets) else sets[:, part]
        yield part, block.astype(np.float32)


def codes(labels, names=None) -> np.ndarray:
    """Category codes 0..C-1, int [I].

    labels: [I]. Whole numbers are codes already; anything else is a name, coded in order of first
    appearance, or by its place in `names` where these are given (whole numbers, too). What has a
    place for each category takes the codes of one call: those of a part of the rows may differ.
    Raises UserError for missing or unknown names, NotTestable if a category has no instruction.

    >>> codes(["b", "a", "b"]), codes(["b", "a", "b"], names=["a", "b"])
    (array([0, 1, 0]), array([1, 0, 1]))
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise UserError(f"labels have the shape {list(labels.shape)}; expected one for each row.")
    if names is None and np.issubdtype(labels.dtype, np.integer):
        found, expected = labels.astype(int), range(max(labels, default=0) + 1)
        empty = sorted(set(expected) ^ set(labels.tolist()))  # negative codes, too
    else:
        listed = labels.tolist()
        missing = sum(name is None or name != name for name in listed)
        expected = list(dict.fromkeys(listed) if names is None else names)
        unknown = sorted(map(str, set(listed) - set(expected)))
        if missing or unknown:
            raise UserError(
                f"labels hold {unknown} and {missing} missing values; expected names of "
                f"{expected[:10]} only. Correct the category column."
            )
        places = {name: code for code, name in enumerate(expected)}
        found = np.array([places[name] for name in listed], dtype=int)
        empty = [name for name in expected if places[name] not in found]
    if len(empty) or not len(found):
        raise NotTestable(
            f"no instruction in category {empty[:10]}; expected at least one in each. Add rows; "
            "whole numbers must be codes 0, 1, .. without a gap (others: hand over their names)."
        )
    return found


def indicator(labels) -> np.ndarray:
    """Category membership, float32 [C, I]: 1 where the instruction (column) is of the category
    (row).
    """
    labels = codes(labels)
    return (labels == np.arange(labels.max() + 1)[:, None]).astype(np.float32)


@takes(counts="I ...", tokens="I")
def frequency(counts, tokens) -> np.ndarray:
    """Activation or routing frequency p = counts / T in [0, 1], float32 (paper, sec. counting).

    counts: integers [I, ...]; tokens: T [I], the positions counted. Error where T < 1 or counts >
    T.

    >>> frequency(np.array([[1, 2], [5, 0]]), np.array([2, 5]))
    array([[0.5, 1. ],
           [1. , 0. ]], dtype=float32)
    """
    counts, tokens = np.asarray(counts), np.asarray(tokens)
    whole = tokens.reshape(-1, *[1] * (counts.ndim - 1))
    if len(counts) != len(tokens) or (tokens < 1).any():
        raise UserError(
            f"{len(counts)} rows, {len(tokens)} token numbers, {(tokens < 1).sum()} below 1; "
            "expected one "
            "positive number per row. Drop instructions without a counted token."
        )
    if (counts > whole).any():
        raise UserError(
            "some counts exceed their tokens; expected counts <= tokens. Take both from the same "
            "capture."
        )
    return np.divide(counts, whole, dtype=np.float32)


@takes(counts="I L E N", routed="I L E")
def conditional_frequency(counts, routed) -> np.ndarray:
    """How often an expert's neuron fires when its expert is chosen: p / f, float32; 0 where it
    never is. Ours.

    counts: [I, L, E, N] tokens where the neuron fires in a chosen expert; routed: [I, L, E]. p
    alone mostly restates routing. p <= f holds by definition (paper): a violation is an error.
    """
    counts, routed = np.asarray(counts), np.asarray(routed)[..., None]
    if (counts > routed).any():
        raise UserError(
            "a neuron fires more often than its expert is chosen; expected p <= f. Take one "
            "capture."
        )
    return np.divide(counts, np.maximum(routed, 1), dtype=np.float32)


def _number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def set_size(width: int, share: float) -> int:
    """How many of `width` components are a share of them: the nearest whole number, at least 1.
    The one rule for sizes that are chosen freely (scores, ablation; the committed grid's, too);
    `nominal_size` is what a quantile keeps.

    >>> set_size(2048, 0.05), set_size(4096, 0.05), set_size(100, 0.29), set_size(8, 0.05)
    (102, 205, 29, 1)
    """
    if not (_number(share) and 0 < share <= 1 <= width < np.inf):
        raise UserError(f"share {share!r} of {width}; expected 0 < share <= 1 of one or more.")
    return max(1, round(share * width))


def nominal_size(width: int, epsilon: float) -> int:
    """k: how many of `width` untied values are >= their (1 - epsilon) quantile, floor(1 + (M - 1)
    epsilon): `set_size`, one more or one less.
    """
    if not (_number(epsilon) and 0 < epsilon < 1 <= width < np.inf):
        raise UserError(
            f"epsilon is {epsilon!r} of {width}; expected a share strictly between 0 and 1, e.g. "
            "0.05, of one or more."
        )
    return int(1 + (width - 1) * epsilon + 1e-9)


def _known_rule(rule):
    if rule not in ("quantile", "exact"):
        raise UserError(f"tie rule {rule!r}; expected 'quantile' or 'exact'.")


def top_k(values, k: int, rule: str = "exact", seed=0) -> np.ndarray:
    """The k largest along the last axis, bool of the values' shape: numbers of any kind, finite.

    rule: `exact` draws among those tied at the cut (seeded; by index, early ones would win),
    `quantile` keeps them all.

    >>> top_k([3, 1, 3, 0], 1, "quantile").astype(int), top_k([3, 1, 3, 0], 1).sum()
    (array([1, 0, 1, 0]), np.int64(1))
    """
    values = np.asarray(values)
    _known_rule(rule)
    width = values.shape[-1] if values.ndim else 0
    if not 0 < k <= width or not np.isfinite(values).all():
        raise UserError(
            f"set size {k} of {width}, {(~np.isfinite(values)).sum()} scores not finite; "
            "expected 1 <= size <= components and finite scores."
        )
    if rule == "quantile":
        return values >= np.partition(values, -k, axis=-1)[..., -k, None]
    return ranks(values, seed) < k


def top_sets(counts, epsilon, rule="quantile", seed=0, packed=False):
    """The top-epsilon components of each instruction, one cut over all layers (paper, sec.
    identification).

    counts: integers [I, ...] (in one instruction they order as p does), or a list of such arrays
    to be joined, e.g. one per layer; read row by row: a memory map, or anything with `shape` and
    `[i]`, will do. rule: `quantile` keeps p >= the (1 - epsilon) quantile, so ties enlarge the
    set; `exact` keeps k and draws among those tied at the cut, seeded per row (give base and tuned
    different seeds, or their draws agree). Returns sets, bool [I, M] or PackedSets, and a report
    of arrays [I]: `size`, `nominal` k, `threshold` (a count), `tied` (components at it),
    `tie_mass` (their share of M), `testable` (False: cut at zero, or everything kept).

    >>> sets, report = top_sets(np.array([[4, 1, 3, 3, 0]]), 0.25)
    >>> sets.astype(int), report["size"], report["tied"]
    (array([[1, 0, 1, 1, 0]]), array([3]), array([2]))
    """
    _known_rule(rule)
    parts = counts if isinstance(counts, (list, tuple)) else [counts]
    if any(len(getattr(part, "shape", ())) < 2 or 0 in part.shape for part in parts) or not parts:
        raise UserError(
            f"counts of the shapes {[np.shape(part) for part in parts][:3]}; expected [I, ...], "
            "one instruction or more, or a list of such arrays."
        )
    rows, width = parts[0].shape[0], sum(int(np.prod(part.shape[1:])) for part in parts)
    k = nominal_size(width, epsilon)
    sets = np.zeros((rows, -(-width // 8)), np.uint8) if packed else np.zeros((rows, width), bool)
    report = {name: np.zeros(rows, int) for name in ("size", "threshold", "tied")}
    for i in range(rows):
        row = np.concatenate([np.asarray(part[i]).reshape(-1) for part in parts])  # [M]
        if not np.issubdtype(row.dtype, np.integer):
            raise UserError(
                f"counts are {row.dtype}; expected integers. Pass counts, not frequencies."
            )
        if row.min() < 0:
            raise UserError(f"row {i} holds counts below 0; expected none. Pass counts.")
        at_least = np.bincount(row)[::-1].cumsum()[
            ::-1
        ]  # [highest + 1]: components with a count >= t
        cut = np.flatnonzero(at_least >= k)[-1]
        chosen, tied = row >= cut, np.flatnonzero(row == cut)
        if rule == "exact":
            draw = np.random.default_rng([seed, i])
            chosen[draw.choice(tied, at_least[cut] - k, replace=False, shuffle=False)] = False
        report["threshold"][i], report["tied"][i], report["size"][i] = cut, len(tied), chosen.sum()
        sets[i] = np.packbits(chosen) if packed else chosen
    report |= {
        "nominal": np.full(rows, k),
        "tie_mass": report["tied"] / width,
        "testable": (report["threshold"] > 0) & (report["size"] < width),
    }
    return (PackedSets(sets, width) if packed else sets), report


def ranks(values, seed=0) -> np.ndarray:
    """Ranks along the last axis, 0 = largest; ties in seeded random order (by index, early ones
    would win): `top_k` keeps ranks below k.
    """
    values = np.asarray(values, float)
    order = np.lexsort((np.random.default_rng(seed).random(values.shape), -values), axis=-1)
    return order.argsort(-1)


@takes(routing="I L E")
def top_experts(routing, k, seed=0) -> np.ndarray:
    """The k most frequent experts of each layer, ties drawn: bool [I, L, E] from f or counts [I,
    L, E]. Ours.
    """
    if not 0 < k <= routing.shape[-1]:
        raise UserError(f"k is {k} with {routing.shape[-1]} experts; expected 1 <= k <= experts.")
    return top_k(routing, k, seed=seed)


@takes(routing="I L E")
def share_experts(routing, share=0.5, seed=0) -> np.ndarray:
    """The fewest experts that carry `share` of a layer's routing: bool, from f or counts [I, L,
    E]. Ours.
    """
    total = routing.sum(-1, keepdims=True)
    if not 0 < share <= 1 or (total <= 0).any():
        raise UserError(
            f"share {share}, {(total <= 0).sum()} layers without tokens; expected 0 < share <= 1 "
            "and none."
        )
    place, ordered = ranks(routing, seed), np.empty(routing.shape)
    np.put_along_axis(ordered, place, routing / total, axis=-1)
    before = ordered.cumsum(-1) - ordered  # what the experts ranked higher carry
    return np.take_along_axis(before < share - 1e-6, place, axis=-1)


@takes(sets="I M?", labels="I")
def category_counts(sets, labels) -> np.ndarray:
    """In how many instructions of each category a component is in the set: int32 [C, M]."""
    groups = indicator(labels)
    counts = np.empty((len(groups), sets.shape[1]), np.int32)
    for part, block in column_blocks(sets):
        counts[:, part] = groups @ block  # exact: whole numbers far below 2^24
    return counts


@takes(sets="I M?", labels="I")
def consensus(sets, labels, tau=0.5) -> np.ndarray:
    """Consensus sets C_tau: components in at least a share tau of the category's instructions,
    bool [C, M].

    >>> consensus(np.array([[1, 1], [1, 0]], bool), [0, 0], tau=1.0)
    array([[ True, False]])
    """
    if not 0 < tau <= 1:
        raise UserError(f"tau is {tau}; expected 0 < tau <= 1, e.g. 0.5.")
    needed = np.ceil(tau * indicator(labels).sum(1) - 1e-4)  # 0.3 x 10 is 3, whatever the rounding
    return category_counts(sets, labels) >= needed[:, None]


@takes(consensus_sets="C M?")
def membership(consensus_sets) -> np.ndarray:
    """In how many of the C consensus sets a component stands, int [M]: C = general, 1 = unique, 0
    = in none.
    """
    return np.asarray(consensus_sets).sum(0)


@takes(values="I M", labels="I")
def category_means(values, labels) -> np.ndarray:
    """Mean over a category's instructions, each weighing the same: float32 [C, M] from [I, M]."""
    groups = indicator(labels)
    return groups @ np.asarray(values, np.float32) / groups.sum(1, keepdims=True)


@takes(rates="C M")
def lape(rates, floor=0.5) -> np.ndarray:
    """Specificity by entropy, [C, M], from category rates [C, M]: share x (log C - entropy of the
    shares), nats.

    LAPE's idea (language activation probability entropy), per category (ours) so that equal sizes
    can be drawn: 0 fires alike everywhere, log C in one category only. Under the `floor` quantile
    of highest rates: 0, rare is not specific.
    """
    rates = np.asarray(rates, float)
    if rates.min() < 0:
        raise UserError(f"a rate is {rates.min()}; expected none below 0. Pass frequencies.")
    highest, total = rates.max(0), rates.sum(0)
    shares = rates / np.where(total > 0, total, 1)
    often = (highest >= np.quantile(highest, floor)) & (total > 0)
    return shares * (np.log(len(rates)) - entr(shares).sum(0)) * often


@takes(values="I M", labels="I")
def contrast(values, labels, columns=4096) -> np.ndarray:
    """Category mean minus the mean of the rest, in SD over instructions: [C, M] from [I, M];
    constant: 0. Ours.
    """
    groups, values = indicator(labels).astype(float), np.asarray(values)
    if len(groups) < 2:
        raise NotTestable("one category; expected at least two to contrast.")
    weights = groups / groups.sum(1, keepdims=True) - (1 - groups) / (1 - groups).sum(
        1, keepdims=True
    )  # [C, I]
    scores = np.zeros((len(groups), values.shape[1]))
    for start in range(0, values.shape[1], columns):
        block = values[:, start : start + columns].astype(float)
        varies = np.ptp(block, axis=0) > 0
        scores[:, start : start + columns][:, varies] = (
            weights @ block[:, varies] / block[:, varies].std(0)
        )
    return scores


@takes(means="C ...")
def margin(means) -> np.ndarray:
    """A category's mean minus the largest of the others', [C, M]: how contribution scores are
    contrasted. Ours.
    """
    means = np.asarray(means)
    if len(means) < 2:
        raise NotTestable("one category; expected at least two to compare.")
    return np.stack([row - np.delete(means, c, axis=0).max(0) for c, row in enumerate(means)])


@takes(scores="C M")
def category_sets(scores, size, seed=0) -> np.ndarray:
    """Sets of equal size: the `size` best components of each category by a score [C, M], ties
    drawn. bool.
    """
    return top_k(np.asarray(scores, float), size, seed=seed)


@takes(found="... M?", planted="... M?")
def recovery(found, planted) -> dict:
    """How well sets found [.., M] recover those planted [.., M]: precision (share of the found
    that were planted) and recall (of the planted that were found), arrays [..]; 0 where none are.
    """
    found, planted = np.asarray(found, bool), np.asarray(planted, bool)
    alongside(found, planted=planted)
    hits = (found & planted).sum(-1)
    return {
        "precision": hits / np.maximum(found.sum(-1), 1),
        "recall": hits / np.maximum(planted.sum(-1), 1),
    }
