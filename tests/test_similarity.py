"""Overlap, classification and alteration, each against a loop or a case worked by hand."""

from itertools import combinations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from helpers.analysis import similarity as ov
from helpers.analysis.sets import consensus, pack, top_experts, top_sets
from helpers.record import UserError

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 0, 2, 2, 2])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def similarity(rng):
    return ov.jaccard_matrix(rng.random((12, 60)) < 0.3)


def jaccard(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("width", [50, 16_384, 16_400, 40_000])
def test_jaccard_matrix_by_loop_across_blocks(rng, width):
    sets, others = rng.random((9, width)) < 0.1, rng.random((4, width)) < 0.2
    for left, right in ((sets, others), (pack(sets), pack(others)), (pack(sets), others)):
        matrix, cross = ov.jaccard_matrix(left), ov.jaccard_matrix(left, right)
        assert matrix.shape == (9, 9)
        assert cross.shape == (9, 4)
        assert (np.diag(matrix) == 1).all()
        assert np.allclose(matrix, [[jaccard(a, b) for b in sets] for a in sets], atol=1e-7)
        assert np.allclose(cross, [[jaccard(a, b) for b in others] for a in sets], atol=1e-7)


def loop_matrix(similarity, labels, drawn):
    """Mean over pairs of two different instructions in a list of drawn ones (with repetition)."""
    count = labels.max() + 1
    cells = [[[] for _ in range(count)] for _ in range(count)]
    for a, b in np.ndindex(len(drawn), len(drawn)):
        if drawn[a] != drawn[b]:
            cells[labels[drawn[a]]][labels[drawn[b]]].append(similarity[drawn[a], drawn[b]])
    return np.array([[np.mean(cell) for cell in row] for row in cells])


def test_category_matrix_by_loop(similarity):
    expected = loop_matrix(similarity, LABELS, np.arange(12))
    assert np.allclose(ov.category_matrix(similarity, LABELS), expected, atol=1e-6)


def test_weighted_category_matrix_is_the_loop_over_the_drawn_copies(rng, similarity):
    weights = rng.integers(1, 4, (70, 12))  # more than one chunk of 64
    weights[:, 0] = 0
    got = ov.category_matrix(similarity, LABELS, weights)
    assert got.shape == (70, 3, 3)
    for n in (0, 33, 69):
        drawn = np.repeat(np.arange(12), weights[n].astype(int))
        assert np.allclose(got[n], loop_matrix(similarity, LABELS, drawn), atol=1e-6)


def test_relabelled_category_matrices(rng, similarity):
    shuffled = np.stack([rng.permutation(LABELS) for _ in range(130)])
    got = ov.category_matrix(similarity, shuffled)
    for n in (0, 64, 129):
        assert np.allclose(got[n], loop_matrix(similarity, shuffled[n], np.arange(12)), atol=1e-6)
    assert np.allclose(ov.gap(similarity, shuffled)[5], ov.gap(similarity, shuffled[5]), atol=1e-6)


def test_gap_across_halves_by_loop(rng, similarity):
    halves, weights = np.arange(12) % 2, rng.integers(0, 3, (5, 12)).astype(float)
    shuffled = np.stack([rng.permutation(LABELS) for _ in range(5)])
    for labels, given in ((shuffled, None), (LABELS, weights)):
        got = ov.gap_across(similarity, labels, halves, given)
        for n in range(5):
            y, w = (labels[n], np.ones(12)) if given is None else (labels, weights[n])
            sums = {True: [0, 0], False: [0, 0]}
            for i, j in np.ndindex(12, 12):
                if halves[i] == 0 and halves[j] == 1:
                    sums[y[i] == y[j]][0] += w[i] * w[j] * similarity[i, j]
                    sums[y[i] == y[j]][1] += w[i] * w[j]
            assert np.isclose(
                got[n], sums[True][0] / sums[True][1] - sums[False][0] / sums[False][1], atol=1e-5
            )
    with pytest.raises(UserError, match="across the halves"):
        ov.gap_across(similarity, np.zeros(12, int), halves)


def test_within_between_by_hand():
    result = ov.within_between([[0.5, 0.1], [0.3, 0.7]])
    assert {key: round(float(value), 6) for key, value in result.items()} == {
        "within": 0.6,
        "between": 0.2,
        "gap": 0.4,
    }


def test_names_and_codes_give_the_same_matrix(rng):
    names = np.array(["CLS", "CODE", "QA", "GEN", "MATH", "SUM"] * 2)
    similarity = ov.jaccard_matrix(rng.random((12, 60)) < 0.3)
    assert np.allclose(
        ov.category_matrix(similarity, names), ov.category_matrix(similarity, np.arange(12) % 6)
    )


def test_jensen_shannon_is_scipys(rng):
    f, g = rng.dirichlet(np.full(8, 0.3), (5, 3)), rng.dirichlet(np.full(8, 0.3), (5, 3))
    f[0, 0, :4] = 0  # experts never chosen
    expected = 1 - jensenshannon(f, g, base=2, axis=-1) ** 2
    assert np.allclose(ov.jensen_shannon(f, g * 4), expected)
    assert ov.jensen_shannon(f, f).min() > 1 - 1e-12


def test_routing_similarity_by_loop(rng):
    routed = rng.poisson(2, (7, 3, 5)) + 1
    found = ov.routing_similarity(routed)
    for a, b in np.ndindex(7, 7):
        expected = ov.jensen_shannon(routed[a], routed[b]).mean()
        assert np.isclose(found[a, b], expected, atol=1e-6)


def test_nearest_consensus_by_loop(rng):
    labels, folds = np.arange(36) % 3, np.arange(36) // 18
    sets = rng.random((36, 40)) < 0.25 + 0.35 * (np.arange(40) % 3 == labels[:, None])
    for given in (sets, pack(sets)):
        result = ov.nearest_consensus(given, labels, folds)
        for i in range(36):
            rest = folds != folds[i]
            near = [jaccard(sets[i], centre) for centre in consensus(sets[rest], labels[rest])]
            best = np.flatnonzero(np.isclose(near, max(near)))
            assert result["correct"][i] == (1 / len(best) if labels[i] in best else 0)
            assert result["guess"][i] == (best[0] if len(best) == 1 else -1)
    assert result["accuracy"] == result["correct"].mean() > 0.6 > result["chance"]
    assert np.allclose(
        result["per_category"], [result["correct"][labels == c].mean() for c in range(3)]
    )


def test_nearest_consensus_is_at_chance_without_an_effect(rng):
    labels, folds = np.arange(1200) % 6, np.arange(1200) // 600
    sets = rng.random((1200, 200)) < rng.beta(1, 1, 200)
    accuracy = ov.nearest_consensus(sets, labels, folds)["accuracy"]
    assert abs(accuracy - 1 / 6) < 4 * np.sqrt(5 / 36 / 1200)


def test_ties_between_consensus_sets_count_as_chance():
    sets = np.ones((8, 5), bool)
    result = ov.nearest_consensus(sets, [0, 1] * 4, [0] * 4 + [1] * 4)
    assert result["accuracy"] == 0.5
    assert (result["guess"] == -1).all()


def test_churn_by_loop(rng):
    base, tuned = rng.random((5, 12)) < 0.5, rng.random((5, 12)) < 0.5
    for old, new in ((base, tuned), (pack(base), pack(tuned))):
        result = ov.churn(old, new, layers=3)
        for i, layer in np.ndindex(5, 3):
            a, b = (set(np.flatnonzero(s[i, 4 * layer : 4 * layer + 4])) for s in (base, tuned))
            assert [result[k][i, layer] for k in ("kept", "gained", "lost")] == [
                len(a & b),
                len(b - a),
                len(a - b),
            ]
        assert np.allclose(
            result["jaccard"], [jaccard(a, b) for a, b in zip(base, tuned, strict=True)]
        )


def test_noise_floor_tells_change_from_noise(rng):
    length, rate = 20, rng.beta(1, 2, 600)
    other = np.where(np.arange(600) < 90, rng.permutation(rate), rate)  # what tuning did
    draw = lambda q: rng.binomial(length, q, (60, 600))  # noqa: E731
    same = ov.noise_floor((draw(rate), draw(rate)), (draw(rate), draw(rate)), 0.05, layers=2)
    changed = ov.noise_floor((draw(rate), draw(rate)), (draw(other), draw(other)), 0.05, layers=2)
    excess = [
        (f["base"]["jaccard"] + f["tuned"]["jaccard"]) / 2 - f["across"]["jaccard"]
        for f in (same, changed)
    ]
    assert abs(excess[0].mean()) < 0.01 < 0.04 < excess[1].mean()
    halves = [top_sets(c, 0.05)[0] for c in (draw(rate), draw(rate))]
    assert ov.churn(*halves)["jaccard"].mean() < 0.9  # noise alone is far from 1
    assert (changed["across"]["kept"].shape, changed["base"]["lost"].shape) == ((60, 2), (60, 2))


def test_across_sums_both_pairings(rng):
    counts = [rng.binomial(9, 0.4, (4, 80)) for _ in range(4)]
    across = ov.noise_floor(counts[:2], counts[2:], 0.1)["across"]
    b1, b2, t1, t2 = (top_sets(c, 0.1)[0] for c in counts)
    assert (across["kept"][:, 0] == (b1 & t2).sum(1) + (b2 & t1).sum(1)).all()
    assert (across["gained"][:, 0] == (t2 & ~b1).sum(1) + (t1 & ~b2).sum(1)).all()


def test_halves_break_their_ties_apart():
    tied = np.ones(
        (30, 40), int
    )  # with one seed for all, equal ties would be broken alike and nothing would seem lost
    floor = ov.noise_floor((tied, tied), (tied, tied), 0.25, rule="exact")
    assert all(floor[name]["jaccard"].mean() < 0.3 for name in ("base", "tuned", "across"))


def test_agreement_by_hand(rng):
    base = top_experts(np.array([[[5, 4, 1, 0], [0, 1, 2, 3]]]), 2)
    tuned = top_experts(np.array([[[5, 0, 4, 1], [3, 2, 1, 0]]]), 2)
    assert ov.agreement(base, tuned).tolist() == [[0.5, 0.0]]
    random = [top_experts(rng.random((500, 4, 8)), 2) for _ in range(2)]
    assert abs(ov.agreement(*random).mean() - 2 / 8) < 0.02


def test_jaccard_matrix_is_the_pairwise_jaccard_of_papers_sets(rng):
    sets, _ = top_sets(rng.binomial(20, rng.beta(1, 2, 300), (10, 300)), 0.05)
    matrix = ov.jaccard_matrix(sets)
    assert all(
        np.isclose(matrix[a, b], jaccard(sets[a], sets[b])) for a, b in combinations(range(10), 2)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ov.jaccard_matrix(np.array([[1, 0], [0, 0]], bool)),
            "1 empty sets, first at row 1",
        ),
        (
            lambda: ov.jaccard_matrix(np.ones((2, 3), bool), np.ones((2, 4), bool)),
            r"others has the shape \[2, 4\]; expected \[J, M\]",
        ),
        (lambda: ov.category_matrix(np.full((4, 4), np.nan), [0, 0, 1, 1]), "NaN"),
        (lambda: ov.category_matrix(np.eye(3), [0, 0, 1]), "no pair of different instructions"),
        (
            lambda: ov.category_matrix(np.eye(4), [0, 0, 1, 1], [[2, 0, 1, 1]]),
            "no pair of different instructions",
        ),
        (lambda: ov.within_between([[1.0]]), "at least 2"),
        (lambda: ov.jensen_shannon(np.zeros(4), np.ones(4)), "1 routing profiles are empty"),
        (
            lambda: ov.nearest_consensus(np.ones((4, 3), bool), [0, 1, 0, 1], [0] * 4),
            "One half is missing",
        ),
        (
            lambda: ov.nearest_consensus(np.ones((4, 3), bool), [0, 0, 1, 1], [0, 0, 1, 1]),
            "a category has no instruction",
        ),
        (
            lambda: ov.nearest_consensus(np.zeros((4, 3), bool), [0, 1, 0, 1], [0, 0, 1, 1]),
            "consensus sets are empty",
        ),
        (lambda: ov.churn(np.ones((2, 6), bool), np.ones((3, 6), bool)), "from the same rows"),
        (lambda: ov.churn(np.ones((2, 6), bool), np.ones((2, 6), bool), layers=4), "whole layers"),
        (lambda: ov.churn(np.zeros((2, 6), bool), np.zeros((2, 6), bool)), "2 empty unions"),
        (
            lambda: ov.agreement(np.ones((1, 1, 3), bool), np.eye(3, dtype=bool)[None, :1]),
            "differ in size",
        ),
    ],
)
def test_bad_input_is_said_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()
