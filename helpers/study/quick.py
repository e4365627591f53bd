"""The public face's two analyses: your model, your texts, your labels, as tidy tables."""

import numpy as np
import pandas as pd

from ..analysis.generality import category_scores
from ..analysis.nulls import expected_jaccard, rate_null
from ..analysis.sets import category_sets, codes, frequency, nominal_size, set_size, top_sets
from ..analysis.similarity import category_matrix, gap, jaccard_matrix
from ..analysis.stats import bootstrap, length_strata, permutation_test
from ..capture.counts import Counts
from ..record import UserError

SCORES = ("frequency", "lape", "contrast")  # those that counts alone can give


def find_sets(counts: Counts, labels, score: str = "contrast", share: float = 0.05) -> pd.DataFrame:
    """The `share` of the neurons that a score ranks first for each label: a row per neuron and
    label, with label, layer, neuron (its place in the layer; in a sparse model expert, too), rank
    and the neuron's mean activation frequency p in [0, 1] under that label.

    counts of I texts (see `count`), labels [I] of any kind, 2 to 50 different ones. Raises
    UserError for labels of another length or an unknown score, NotTestable for a single label.
    (Ours; the paper's sets of single instructions are those of `top_sets`.)
    """
    _refuse(counts, labels)
    if score not in SCORES:
        raise UserError(f"score is {score!r}, expected one of {', '.join(SCORES)}.")
    values = counts.unit("neurons")
    p = frequency(values, counts.tokens).reshape(len(labels), -1)  # [I, M]
    scores = category_scores(score, p, codes(labels))  # [C, M]
    size = set_size(p.shape[1], share)
    members, names = category_sets(scores, size), pd.unique(np.asarray(labels))
    layers = counts.layers[counts.family("neurons")]
    parts = []
    for code, name in enumerate(names):
        chosen = np.flatnonzero(members[code])
        chosen = chosen[np.argsort(-scores[code, chosen], kind="stable")]
        place = np.unravel_index(chosen, values.shape[1:])
        where = {"label": name, "layer": np.take(layers, place[0])}
        where |= {"expert": place[1]} if len(place) == 3 else {}
        mean = p[codes(labels) == code][:, chosen].mean(0)
        where |= {"neuron": place[-1], "rank": np.arange(len(chosen)) + 1, "p": mean}
        parts.append(pd.DataFrame(where))
    return pd.concat(parts, ignore_index=True)


def overlap(counts: Counts, labels, epsilon: float = 0.05, resamples: int = 999) -> pd.DataFrame:
    """Do texts of one label share neurons more than texts of different labels? One row: within,
    between and gap (mean Jaccard of the texts' top-epsilon sets), low and high (95 % interval of
    the gap, texts drawn), null_gap (every neuron keeps its rate, every text its length), p (labels
    shuffled among texts of like length), n.

    Raises NotTestable where a label has fewer than five texts. (Paper, sec. generality; ours.)
    """
    _refuse(counts, labels)
    values, y = counts.unit("neurons"), codes(labels)
    similarity = jaccard_matrix(top_sets(values, epsilon)[0])
    size = nominal_size(values[0].size, epsilon)
    expected = expected_jaccard(rate_null(values, counts.tokens, size))
    matrix = category_matrix(similarity, y)
    interval = bootstrap(lambda w: gap(similarity, y, w), y, resamples)
    strata = length_strata(counts.tokens)
    test = permutation_test(lambda drawn: gap(similarity, drawn), y, strata, resamples)
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


def _refuse(counts, labels) -> None:
    if len(labels) != len(counts.tokens):
        raise UserError(
            f"{len(labels)} labels for {len(counts.tokens)} texts: give one label per text, in the "
            "order of the texts."
        )
