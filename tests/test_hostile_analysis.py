"""Every public function of helpers.analysis against what can be wrong with an array: a finite
answer, or one UserError that says so; never NaN, a warning, another exception.
"""

import inspect
import warnings
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pytest

from helpers import analysis
from helpers.analysis import (
    alteration,
    controls,
    dose,
    effects,
    generality,
    nulls,
    regression,
    sets,
    similarity,
    stats,
    wordings,
)
from helpers.record import UserError

ROOMS = [
    import_module(f"{analysis.__name__}.{room.name}")
    for room in iter_modules(analysis.__path__)
    if room.name != "checks"
]
ROWS, L, N, E, C = 24, 3, 8, 4, 3
RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(C), ROWS // C)
HALVES = np.tile([0, 1], ROWS // 2)
WORDINGS = np.array([f"w{k}" for k in np.arange(ROWS) % 8 + 8 * LABELS])  # 8 of each category
TOKENS = RNG.integers(9, 14, ROWS)
COUNTS = RNG.binomial(TOKENS[:, None, None], RNG.uniform(0.1, 0.6, (L, N)))
P = (COUNTS / TOKENS[:, None, None]).reshape(ROWS, -1)
SETS = sets.top_sets(COUNTS, 0.3)[0]
ROUTED = RNG.integers(1, 9, (ROWS, L, E))
S = similarity.jaccard_matrix(SETS)
DISTANCE = np.abs(TOKENS[:, None] - TOKENS).astype(float)
MASK = {"dense": RNG.random((L, 40)) < 0.1}
RATE = {"dense": RNG.random((L, 40))}
DRAWS = RNG.normal(0, 0.1, (ROWS, 5))
OWN = RNG.normal(0.5, 0.2, ROWS)
MATRIX = RNG.normal(0, 0.2, (ROWS, C))
EVERYWHERE = RNG.normal(0, 0.2, (ROWS, 4, C))
CURVE = np.linspace(0, 1, 6)[:, None] + RNG.normal(0, 0.05, (6, ROWS)) * (np.arange(6) > 0)[:, None]
MEANS = sets.category_means(P, LABELS)
CHOSEN = sets.category_sets(MEANS, 5)
NULL = nulls.rate_null(COUNTS, TOKENS, 8)
CELLS = similarity.category_matrix(S, LABELS)
FEW = {"resamples": 19}


def mean(weights):
    return weights @ OWN / weights.sum(1)


def apart(labels):
    return np.array([OWN[row == 0].mean() - OWN[row == 1].mean() for row in np.atleast_2d(labels)])


CALLS = {
    sets.pack: (SETS,),
    sets.codes: (LABELS,),
    sets.indicator: (LABELS,),
    sets.frequency: (COUNTS, TOKENS),
    sets.conditional_frequency: (np.minimum(COUNTS[..., None, :3], 4), np.full((ROWS, L, 1), 5)),
    sets.set_size: (100, 0.05),
    sets.nominal_size: (100, 0.05),
    sets.top_k: (P, 5),
    sets.top_sets: (COUNTS, 0.3),
    sets.top_experts: (ROUTED, 2),
    sets.share_experts: (ROUTED, 0.5),
    sets.category_counts: (SETS, LABELS),
    sets.consensus: (SETS, LABELS),
    sets.membership: (CHOSEN,),
    sets.category_means: (P, LABELS),
    sets.lape: (MEANS,),
    sets.contrast: (P, LABELS),
    sets.margin: (MEANS,),
    sets.category_sets: (MEANS, 5),
    sets.recovery: (CHOSEN, CHOSEN[::-1]),
    similarity.jaccard: (np.array([1, 2]), np.array([2, 3]), np.array([2, 4])),
    similarity.jaccard_matrix: (SETS,),
    similarity.category_matrix: (S, LABELS),
    similarity.within_between: (CELLS,),
    similarity.gap: (S, LABELS),
    similarity.wording_matrix: (S, WORDINGS),
    similarity.gap_across: (S, LABELS, HALVES),
    similarity.jensen_shannon: (ROUTED, ROUTED[::-1]),
    similarity.routing_similarity: (ROUTED,),
    similarity.nearest_consensus: (SETS, LABELS, HALVES),
    similarity.churn: (SETS, SETS[::-1]),
    similarity.noise_floor: ((COUNTS, COUNTS[::-1]), (COUNTS, COUNTS[::-1]), 0.3),
    similarity.agreement: (sets.top_experts(ROUTED, 2), sets.top_experts(ROUTED[::-1], 2)),
    generality.own_gaps: (CELLS,),
    generality.shares: (SETS, LABELS, L, 0.5),
    generality.share_test: (SETS, LABELS, L, 0.5, None, None, FEW),
    generality.nearest_profile: (ROUTED, LABELS, HALVES),
    generality.category_scores: ("contrast", P, LABELS),
    nulls.rate_null: (COUNTS, TOKENS, 8),
    nulls.null_of: (COUNTS.reshape(ROWS, -1).sum(0), P.mean(1), TOKENS, 8),
    nulls.expected_jaccard: (NULL,),
    nulls.chance_jaccard: (np.array([2, 3]), np.array([1, 2]), np.array([9, 9])),
    nulls.membership_test: (SETS, NULL, LABELS, 0.5, 19),
    nulls.redraw_routing: (np.full((ROWS, L, E), 5), np.full(ROWS, 10)),
    regression.same: (LABELS,),
    regression.excess: (S, LABELS, (DISTANCE,), None, 19),
    regression.excess_of_wordings: (S, LABELS, WORDINGS, (DISTANCE,), None, 19),
    wordings.wording_units: (S, LABELS, WORDINGS),
    wordings.gaps_of: (S, LABELS),
    wordings.standard_errors: (S, LABELS[None]),
    wordings.wording_overlap: (S, LABELS, WORDINGS, None, 19),
    wordings.within_excess: (S, S[::-1, ::-1], LABELS, WORDINGS, 19),
    wordings.matrix_excess: (S, S[::-1, ::-1], LABELS, WORDINGS, 19),
    wordings.wording_levels: (S, LABELS, WORDINGS, 19),
    alteration.changes: (SETS, SETS[::-1]),
    alteration.common_gain: (SETS, SETS[::-1], np.roll(SETS, 1, 0), L),
    alteration.layer_rank_correlation: (P.reshape(ROWS, L, N)[0], P.reshape(ROWS, L, N)),
    alteration.change_correlation: (RNG.random((L, N)), P.reshape(ROWS, L, N), 19),
    alteration.shares: (CURVE,),
    alteration.lead: (CURVE, CURVE**2, LABELS, 19),
    alteration.crossing: (np.arange(6), np.tile(np.linspace(0, 1, 6), (2, 1))),
    alteration.crossings: (np.arange(6), [CURVE, CURVE**2], LABELS, 19),
    alteration.cross_correlation: (np.arange(6) * 100, CURVE, CURVE**2, LABELS, (50, 2), 19),
    controls.layer_matched: (MASK, RNG),
    controls.rate_matched: (MASK, RATE, RNG),
    controls.usage_matched: (MASK, RATE, RNG),
    controls.singles: ((2, 3),),
    controls.expected_at_usage: (RNG.random((L, N)), RNG.random((L, N))),
    controls.rate_gap: (MASK, MASK, RATE),
    dose.hinge: (np.arange(5), RNG.random((7, 5))),
    dose.dose_curve: (np.arange(4), [(OWN * k, DRAWS) for k in range(4)], LABELS, 19),
    effects.drawn_means: (DRAWS, LABELS, np.ones((3, ROWS)), RNG),
    effects.group_mean: (OWN, LABELS),
    effects.group_flips: (OWN, LABELS, 19),
    effects.critical: (OWN, {"random": DRAWS}, LABELS, 19),
    effects.critical_by_category: (OWN, {"random": DRAWS}, LABELS, None, 19),
    effects.specific_by_category: (MATRIX, EVERYWHERE, LABELS, 0 * LABELS, 19),
    effects.exchange: (OWN, DRAWS, LABELS, 19),
    effects.slope_of: ([(OWN, DRAWS), (2 * OWN, DRAWS)], LABELS, np.array([-1.0, 1.0]), 19),
    effects.slopes: (np.arange(4),),
    effects.specificity: (MATRIX, EVERYWHERE, LABELS, 0 * LABELS, 19),
    effects.swapped: (MATRIX, LABELS, 0 * LABELS, 19),
    effects.label_statistic: (MATRIX, LABELS[None]),
    stats.headline: ({"a": 0.1, "b": 0.2},),
    stats.cluster_codes: (WORDINGS, LABELS),
    stats.resample_weights: (LABELS, 19),
    stats.interval: (RNG.random((19, 2)),),
    stats.bootstrap: (mean, LABELS, 19),
    stats.cluster_sizes: (WORDINGS, LABELS),
    stats.length_strata: (TOKENS,),
    stats.permutation_test: (apart, LABELS, None, 19),
    stats.shuffled: (LABELS, HALVES, RNG.random((19, ROWS))),
    stats.plus_one: (0.5, RNG.random(19)),
    stats.adjust: (RNG.random(6), "holm"),
    stats.paired_effect: (OWN, 0.5 * OWN[::-1], 19),
    stats.sign_flips: (OWN, 19),
    stats.clustered_share: (RNG.random(ROWS) < 0.3, WORDINGS),
    stats.shared_profile: (P, LABELS, 19),
    stats.shared_profile_beyond: (P, P[::-1], LABELS, 19),
}


def put(value):
    def edit(x):
        x = np.array(x, float)
        x.flat[0] = value
        return x

    return edit


WRONG = {
    "empty": lambda x: x[:0],
    "short": lambda x: x[:-1],
    "one row": lambda x: x[:1],
    "two rows": lambda x: x[:2],
    "flat": lambda x: x.ravel(),
    "scalar": lambda x: x.flat[0],
    "list": lambda x: x.tolist(),
    "constant": lambda x: np.full_like(x, x.flat[0]),
}
WRONG_NUMBERS = {
    "NaN": put(np.nan),
    "infinite": put(np.inf),
    "minus infinite": put(-np.inf),
    "zero": np.zeros_like,
    "negative": lambda x: -x if x.dtype != bool else ~x,
}
NUMBERS = (0, -1, float("nan"), float("inf"), 2.5)
PARTS = {  # rows left: none, one, two; one category; unlike sizes; a category of one row
    "no row": slice(0, 0),
    "one row": slice(0, 1),
    "two rows": slice(0, 2),
    "one category": slice(0, 8),
    "unbalanced": np.r_[0:8, 8:14, 16:18],
    "lonely": slice(0, 17),
}
# a caller's function has rows of its own; names of clusters are handed back as they came; what is
# shuffled has been looked at by permutation_test
LEFT_OUT = {stats.bootstrap, stats.permutation_test, stats.cluster_codes, stats.shuffled}


def finite(found):
    """Whether all floats in an answer are finite."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple) or inspect.isgenerator(found):
        return all(map(finite, found))
    values = np.asarray(found) if not hasattr(found, "bits") else found.bits
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def rows_of(value, rows):
    if not isinstance(value, np.ndarray) or not value.ndim or len(value) != ROWS:
        return value
    return value[rows][:, rows] if value.shape == (ROWS, ROWS) else value[rows]


def attacks(function, arguments):
    """(what is wrong, arguments) of every attack on a call."""
    yield "nothing", arguments
    if function in LEFT_OUT:
        return
    for n, value in enumerate(arguments):
        edits = {}
        if isinstance(value, np.ndarray):
            edits = WRONG if value.dtype.kind == "U" else WRONG | WRONG_NUMBERS
        elif isinstance(value, int | float):
            edits = {number: lambda x, number=number: number for number in NUMBERS}
        for name, edit in edits.items():
            yield f"argument {n} {name}", (*arguments[:n], edit(value), *arguments[n + 1 :])
    for name, rows in PARTS.items():
        yield name, tuple(rows_of(value, rows) for value in arguments)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f"{f.__module__}.{f.__name__}"[17:])
def test_a_finite_answer_or_one_clear_error(function):
    for wrong, arguments in attacks(function, CALLS[function]):
        options = arguments[-1] if arguments[-1] is FEW else {}
        given = arguments[:-1] if options else arguments
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = function(*given, **options)
            except UserError as error:
                clear = wrong != "nothing" and 20 < len(str(error)) < 500
                found = None if clear else error
            except Exception as error:
                found = error
        assert not isinstance(found, Exception), f"{wrong}: {type(found).__name__}: {found}"
        assert found is None or finite(found), f"{wrong}: {found}"


def test_every_public_function_is_attacked():
    public = {
        function
        for room in ROOMS
        for name, function in inspect.getmembers(room, inspect.isfunction)
        if function.__module__ == room.__name__ and not name.startswith("_")
    }
    any_input = {stats.attempt, sets.column_blocks, sets.ranks}  # ranks: inf and NaN have one, too
    left = public - set(CALLS) - any_input
    assert not left, sorted(f.__name__ for f in left)


def test_lists_give_what_arrays_give():
    for function in (similarity.gap, sets.contrast, sets.consensus, effects.swapped):
        plain = [x.tolist() if isinstance(x, np.ndarray) else x for x in CALLS[function]]
        np.testing.assert_array_equal(function(*plain), function(*CALLS[function]))


def test_two_wordings_a_category_are_too_few_for_an_interval_but_not_for_a_mean():
    two = np.array([f"{c} {k % 2}" for k, c in enumerate(LABELS)])
    _, of, rows = wordings.wording_units(S, LABELS, two)
    assert (of == [0, 0, 1, 1, 2, 2]).all()
    assert (rows == 4).all()
    with pytest.raises(UserError, match="has 2 clusters; expected at least 5"):
        wordings.wording_overlap(S, LABELS, two, resamples=19)


def test_sizes_of_categories_do_not_weigh():
    """Unbalanced labels, by loop: every category counts once, whatever its rows."""
    rows = PARTS["unbalanced"]
    some, labels = S[rows][:, rows], LABELS[rows]
    cells = np.array(
        [
            [
                np.mean(
                    [
                        some[i, j]
                        for i in np.flatnonzero(labels == a)
                        for j in np.flatnonzero(labels == b)
                        if i != j
                    ]
                )
                for b in range(C)
            ]
            for a in range(C)
        ]
    )
    inside = np.diag(cells).mean()
    by_hand = inside - cells[~np.eye(C, dtype=bool)].mean()
    assert similarity.gap(some, labels) == pytest.approx(by_hand, abs=1e-6)


def test_constant_columns_stand_for_nothing():
    values = np.column_stack([np.ones(ROWS), np.zeros(ROWS), LABELS == 1])
    found = sets.contrast(values, LABELS)
    assert (found[:, :2] == 0).all()
    assert found[1, 2] == found[:, 2].max() > 0


@pytest.mark.parametrize(
    ("call", "others"),
    [
        (similarity.jaccard_matrix, ()),
        (similarity.nearest_consensus, (LABELS, HALVES)),
        (similarity.churn, (SETS,)),
        (sets.category_counts, (LABELS,)),
        (sets.consensus, (LABELS,)),
        (sets.membership, ()),
        (generality.shares, (LABELS, L, 0.5)),
    ],
)
def test_counts_are_not_taken_for_sets(call, others):
    counts = COUNTS.reshape(ROWS, -1)
    with pytest.raises(UserError, match="holds int64 other than 0 and 1; expected sets"):
        call(counts, *others)
    again, found = call(SETS.astype(int), *others), call(SETS, *others)  # zeros and ones will do
    np.testing.assert_equal(again, found)
