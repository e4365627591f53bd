"""The public face's counts and tables: your model, your texts, your labels, without a profile."""

import re
from hashlib import blake2b

import numpy as np
import pandas as pd

from ..analysis.generality import category_scores
from ..analysis.nulls import expected_jaccard, rate_null
from ..analysis.sets import (
    category_means,
    category_sets,
    frequency,
    nominal_size,
    set_size,
    top_sets,
)
from ..analysis.similarity import category_matrix, gap, jaccard_matrix
from ..analysis.stats import SMALLEST, bootstrap, length_strata, permutation_test
from ..capture.count import count as count_texts
from ..capture.counts import Counts
from ..capture.tokens import chat_template, list_of
from ..config import defaults, refuse_other
from ..record import NotTestable, UserError, visible

SCORES = ("frequency", "lape", "contrast")  # those that counts alone can give
MOST = 50  # labels
COMPARED = 1200  # texts held against one another, as many as HexaInst has
CELLS = 2**24  # frequencies in memory at once (64 MiB)
DEFAULT = defaults()
READ = ("template", "chat", "batch_tokens")  # what of a profile decides counts


def count(model, tokenizer, texts, responses=None, **settings) -> Counts:
    """Counts of the texts' own tokens (of the responses', where given), each read as a profile's
    instruction is: in its template, or in the model's chat format.

    texts: a list, a column, a generator of I strings. `settings` are a profile's: `template`
    ("{instruction}" reads the bare text), `chat`, `batch_tokens`. Counts are uint16 [I, ...].
    Raises UserError for what cannot be read: no list, no text, an empty one, one that is too long.
    (Paper, sec. counting.)

    >>> from helpers import count, load_model
    >>> model, tokenizer = load_model("data/models/tiny-dense/tuned")
    >>> counts = count(model, tokenizer, ["ada has a cat .", "what is 2 plus 3 ?"])
    >>> counts.tokens.tolist(), counts.neurons["dense"].shape, counts.neurons["dense"].dtype
    ([5, 6], (2, 4, 512), dtype('uint16'))
    """
    profile = defaults(READ, **settings)
    how = {"template": read_in(profile, tokenizer), "responses": responses}
    return count_texts(model, tokenizer, texts, profile.batch_tokens, **how)


def read_in(profile, tokenizer) -> str:
    """What stands around a text: the profile's template or, if it says `chat`, the tokenizer's."""
    return chat_template(tokenizer) if profile.chat else profile.template


def find_sets(
    counts: Counts, labels, score: str = "contrast", share: float = DEFAULT.epsilon
) -> pd.DataFrame:
    """The `share` of the neurons that a score ranks first for each label: a row per neuron and
    label, with label, layer, neuron (its place in the layer; in a sparse model expert, too), rank,
    score (higher: stands more for the label) and the neuron's mean activation frequency p in [0, 1]
    under that label.

    counts of I texts (see `count`), labels [I]: names or numbers, 2 to 50 different ones, each of
    two texts or more. Raises UserError for other labels or an unknown score, NotTestable for a
    single label. (Ours; the paper's sets of single instructions are those of `top_sets`.)

    >>> from helpers import count, find_sets, load_model
    >>> model, tokenizer = load_model("data/models/tiny-dense/tuned")
    >>> texts = ["ada has a cat .", "boris has a dog .", "2 plus 3 is 5 .", "4 plus 3 is 7 ."]
    >>> sets = find_sets(count(model, tokenizer, texts), ["pets", "pets", "sums", "sums"])
    >>> sets.groupby("label").size().to_dict()  # 5 % of 4 x 512 neurons
    {'pets': 102, 'sums': 102}
    """
    refuse_other(score, SCORES, "score")
    y, names = labels_of(labels, len(counts_of(counts).tokens))
    values = counts.unit("neurons")
    scores, means = _scores(score, values.reshape(len(y), -1), counts.tokens, y)  # [C, M] each
    members = category_sets(scores, set_size(scores.shape[1], share))
    layers = counts.layers[counts.family("neurons")]
    parts = []
    for code in range(len(names)):
        chosen = np.flatnonzero(members[code])
        chosen = chosen[np.argsort(-scores[code, chosen], kind="stable")]
        place = np.unravel_index(chosen, values.shape[1:])
        where = {"label": code, "layer": np.take(layers, place[0])}
        where |= {"expert": place[1]} if len(place) == 3 else {}
        where |= {"neuron": place[-1], "rank": np.arange(len(chosen)) + 1}
        where |= {"score": scores[code, chosen], "p": means[code, chosen]}
        parts.append(pd.DataFrame(where))
    table = pd.concat(parts, ignore_index=True)
    return table.assign(label=named(table["label"], names))


def overlap(
    counts: Counts,
    labels,
    epsilon: float = DEFAULT.epsilon,
    resamples: int = DEFAULT.resamples,
    seed: int = DEFAULT.seed,
) -> pd.DataFrame:
    """Do texts of one label share neurons more than texts of different labels? One row: within,
    between and gap (mean Jaccard of the texts' top-epsilon sets), low and high (95 % interval of
    the gap, texts drawn), null_gap (every neuron keeps its rate, every text its length), p (labels
    shuffled among texts of like length), n.

    Texts with the same tokens and counts throughout cannot be told from copies: one of them is
    compared. Of more than 1,200 texts, as many of each label are drawn; n says how many are
    compared. Raises NotTestable where a label has fewer than five different texts, UserError where
    copies have two labels. (Paper, sec. generality; ours.)
    """
    defaults(epsilon=epsilon, resamples=resamples, seed=seed)  # refused as in a profile
    y, names = labels_of(labels, len(counts_of(counts).tokens))
    once = _once(counts, y, names)
    some = once[_drawn(y[once], COMPARED // len(names), seed)]
    y, tokens, values = y[some], counts.tokens[some], counts.unit("neurons")[some]
    for code, name in enumerate(names):
        if (y == code).sum() < SMALLEST:
            raise NotTestable(
                f"label {name!r} has {(y == code).sum()} texts, expected {SMALLEST} or more "
                "(better 20) for an interval; copies count once. Add texts, or leave the label out."
            )
    similarity = jaccard_matrix(top_sets(values, epsilon)[0])
    size = nominal_size(values[0].size, epsilon)
    expected = expected_jaccard(rate_null(values, tokens, size))
    matrix = category_matrix(similarity, y)
    interval = bootstrap(lambda w: gap(similarity, y, w), y, resamples, seed=seed)
    strata = length_strata(tokens)
    test = permutation_test(lambda drawn: gap(similarity, drawn), y, strata, resamples, seed)
    inside = np.eye(len(matrix), dtype=bool)
    row = {
        "within": matrix[inside].mean(),
        "between": matrix[~inside].mean(),
        "gap": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "null_gap": gap(expected, y),
        "p": test.p,
        "n": len(y),
    }
    return pd.DataFrame([{name: float(value) for name, value in row.items()}]).astype({"n": int})


def compare_counts(counts: Counts, other: Counts) -> pd.DataFrame:
    """How far two models' counts of the same texts lie apart, such as those of a model and of its
    four-bit version: a row per kind (dense, shared, expert: neurons; routed: experts) and
    layer, with cells (texts x components), differ
    (the share of them that are not equal) and shift (the mean absolute difference of the frequency,
    in [0, 1]).

    Raises UserError for counts of another architecture, and of texts of other numbers of tokens:
    what a text says, counts do not know. (Ours.)

    >>> from helpers import compare_counts, count, load_model
    >>> texts = ["ada has a cat .", "what is 2 plus 3 ?"]
    >>> base, tuned = (count(*load_model(f"data/models/tiny-dense/{kind}"), texts)
    ...     for kind in ("base", "tuned"))
    >>> table = compare_counts(base, tuned)
    >>> table["layer"].tolist(), table["cells"].tolist()
    ([0, 1, 2, 3], [1024, 1024, 1024, 1024])
    >>> compare_counts(base, base)["differ"].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    mine, others = counts_of(counts).arrays(), counts_of(other).arrays()
    shapes = [{name: a.shape[1:] for name, a in arrays.items()} for arrays in (mine, others)]
    if shapes[0] != shapes[1] or counts.layers != other.layers:
        raise UserError(
            f"counts of components {shapes[0]} beside {shapes[1]}: expected those of one "
            "architecture. Compare versions of one model."
        )
    if not np.array_equal(counts.tokens, other.tokens):
        raise UserError(
            f"counts of {len(counts.tokens)} texts beside {len(other.tokens)}, or of other tokens: "
            "expected the same texts, read alike. Count both models on one list of texts."
        )
    rows = []
    for name in mine:
        if name == "tokens":
            continue
        kind = name.removeprefix("neurons.")
        layers = counts.layers["expert" if kind == "routed" else kind]
        for place, layer in enumerate(layers):
            one, two = (arrays[name][:, place] for arrays in (mine, others))
            apart = frequency(one, counts.tokens) - frequency(two, counts.tokens)
            row = {"kind": kind, "layer": layer, "cells": one.size}
            rows.append(row | {"differ": (one != two).mean(), "shift": np.abs(apart).mean()})
    return pd.DataFrame(rows)


def counts_of(counts) -> Counts:
    """Counts as they are; UserError for what is none."""
    if not isinstance(counts, Counts):
        raise UserError(
            f"counts: found {type(counts).__name__}, expected what count(model, tokenizer, texts) "
            "gives. Count the texts first."
        )
    return counts


def labels_of(labels, texts: int) -> tuple[np.ndarray, list]:
    """Labels of `texts` texts as codes int [texts], and their names in order of first appearance.

    Raises UserError unless each text has one (a name or a number), there are 2 to 50 and each has
    two texts at least, and for True beside 1, which Python takes for one; a single label is
    NotTestable.

    >>> labels_of(["b", "a", "b", "a"], 4)
    (array([0, 1, 0, 1]), ['b', 'a'])
    """
    labels = list_of(labels, "labels")
    if len(labels) != texts:
        raise UserError(
            f"{len(labels)} labels for {texts} texts: give one label per text, in the order of the "
            "texts."
        )
    first = {}
    for row, label in enumerate(labels):
        if not pd.api.types.is_scalar(label) or pd.isna(label) or not _is_name(str(label)):
            raise UserError(
                f"label {row} is {label!r}: expected a name or a number, one for each text. Label "
                "the text, or leave it out."
            )
        other = first.setdefault(label, label)
        if pd.api.types.is_bool(other) != pd.api.types.is_bool(label):
            raise UserError(
                f"label {row} is {label!r}, an earlier one {other!r}: the same to Python. Write "
                "both as names, or both as numbers."
            )
    names = list(first)
    if len(names) < 2:
        raise NotTestable(
            f"one label only ({', '.join(map(repr, names))}), expected 2 to {MOST}: there is "
            "nothing to compare it with. Add texts of another label."
        )
    if len(names) > MOST:
        raise UserError(
            f"{len(names)} different labels, expected 2 to {MOST}. Join labels; of measured "
            "numbers make classes."
        )
    places = {name: code for code, name in enumerate(names)}
    y = np.array([places[label] for label in labels])
    alone = [names[code] for code in np.flatnonzero(np.bincount(y) < 2)]
    if alone:
        raise UserError(
            f"one text only has the label {', '.join(map(repr, alone[:10]))}: expected two or more "
            "of each. Add texts, join labels, or leave them out."
        )
    return y, names


def named(codes, names: list) -> pd.Series:
    """The labels of rows from their codes, each as it was given: those of several kinds, such as
    whole numbers and others, are not made one kind.
    """
    kinds = {type(name) for name in names}
    labels = [names[code] for code in codes]
    return pd.Series(labels, dtype=None if len(kinds) == 1 else object)


def _is_name(label: str) -> bool:
    """Whether a label can be shown and written: it is visible, and holds no half of a character."""
    return visible(label) and not re.search(r"[\ud800-\udfff]", label)


def _scores(score, counts, tokens, y) -> tuple[np.ndarray, np.ndarray]:
    """A score [C, M] and the labels' mean frequencies [C, M] from counts [I, M], some neurons at a
    time: the frequencies of many texts need not stand in memory.
    """
    step, scores, means = max(1, CELLS // len(y)), [], []
    for first in range(0, counts.shape[1], step):
        p = frequency(counts[:, first : first + step], tokens)
        means.append(category_means(p, y))
        if score == "contrast":
            scores.append(category_scores(score, p, y))
    means = np.concatenate(means, axis=1)
    if score == "contrast":
        return np.concatenate(scores, axis=1), means
    return category_scores(score, means, np.arange(len(means))), means


def _once(counts, y, names) -> np.ndarray:
    """Places of the texts that are no copy of an earlier one. Raises UserError for copies that have
    two labels.
    """
    first = {}
    for row, cells in enumerate(zip(*counts.arrays().values(), strict=True)):
        mark = blake2b(b"".join(cell.tobytes() for cell in cells)).digest()
        other = first.setdefault(mark, row)
        if y[row] != y[other]:
            raise UserError(
                f"texts {other} and {row} have the same counts, as copies have, and the labels "
                f"{names[y[other]]!r} and {names[y[row]]!r}. Give them one label, or leave one out."
            )
    return np.array([*first.values()])


def _drawn(y, most: int, seed: int) -> np.ndarray:
    """Places of at most `most` texts of each label, in order."""
    order = np.random.default_rng(seed).permutation(len(y))
    nth = pd.Series(y[order]).groupby(y[order]).cumcount().to_numpy()
    return np.sort(order[nth < most])
