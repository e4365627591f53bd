"""Counts -> frequencies -> sets, each against a loop or a case worked by hand."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from helpers.analysis import sets as co
from helpers.paths import DATA
from helpers.record import NotTestable, UserError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tokens_of_a_moe(rng, layers=2, experts=5, neurons=4, chosen=2, lengths=(3, 7, 12)):
    """Token-level truth: routed [I, L, E] and counts [I, L, E, N] by looping over tokens."""
    routed = np.zeros((len(lengths), layers, experts), int)
    counts = np.zeros((len(lengths), layers, experts, neurons), int)
    for i, length in enumerate(lengths):
        for _ in range(length):
            for layer in range(layers):
                for expert in rng.choice(experts, chosen, replace=False):
                    routed[i, layer, expert] += 1
                    counts[i, layer, expert] += rng.random(neurons) < 0.4
    return routed, counts, np.array(lengths)


def test_frequencies_keep_the_papers_invariants(rng):
    routed, counts, tokens = tokens_of_a_moe(rng)
    f, p = co.frequency(routed, tokens), co.frequency(counts, tokens)
    assert np.allclose(f.sum(-1), 2)  # sum over experts = K
    assert (p <= f[..., None]).all()
    assert p[1, 0, 3, 2] == np.float32(counts[1, 0, 3, 2] / 7)
    given = co.conditional_frequency(counts, routed)
    assert np.allclose(given * f[..., None], p, atol=1e-6)
    assert (given[routed == 0] == 0).all()
    assert np.isfinite(given).all()
    assert (routed == 0).any()


def test_uint16_counts_give_float32(rng):
    assert co.frequency(np.array([[65535]], np.uint16), [65535]).tolist() == [[1.0]]
    assert co.frequency(np.array([[3]], np.uint16), np.array([4])).dtype == np.float32


@pytest.mark.parametrize("epsilon", [0.005, 0.013, 0.05, 0.1, 0.37])
def test_quantile_rule_is_numpys_quantile(rng, epsilon):
    for length in (1, 5, 20, 300):
        counts = rng.binomial(length, rng.beta(1, 2, 501), (6, 501))
        sets, report = co.top_sets(counts, epsilon)
        for i, row in enumerate(counts):
            p = row / length
            expected = p >= np.quantile(p, 1 - epsilon, method="higher")
            assert (sets[i] == expected).all()
            assert report["size"][i] == expected.sum() >= report["nominal"][i]
            assert report["threshold"][i] == row[expected].min()
            assert report["tied"][i] == (row == row[expected].min()).sum()
            assert report["tie_mass"][i] == report["tied"][i] / 501


def test_quantile_rule_is_the_default_linear_quantile_too(rng):
    counts = rng.binomial(30, rng.beta(1, 2, 977), (20, 977))
    expected = counts >= np.quantile(counts, 0.95, axis=1)[:, None]
    assert (co.top_sets(counts, 0.05)[0] == expected).all()


def test_nominal_size_without_ties():
    for width in (20, 101, 2048):
        for epsilon in (0.01, 0.05, 0.1):
            untied = np.random.default_rng(1).permutation(width)[None]
            sets, report = co.top_sets(untied, epsilon)
            assert (
                sets.sum()
                == report["nominal"][0]
                == (untied >= np.quantile(untied, 1 - epsilon) - 1e-6).sum()
            )


def test_exact_rule_keeps_k_and_draws_only_among_ties(rng):
    counts = rng.binomial(10, rng.beta(1, 2, 400), (50, 400))
    wide, report = co.top_sets(counts, 0.05)
    sets, exact = co.top_sets(counts, 0.05, rule="exact", seed=3)
    above = counts > report["threshold"][:, None]
    assert (sets.sum(1) == exact["nominal"]).all()
    assert (exact["size"] == exact["nominal"]).all()
    assert (sets <= wide).all()
    assert (above <= sets).all()
    assert (report["size"] > exact["size"]).any()
    assert (exact["tied"] == report["tied"]).all()
    assert (sets == co.top_sets(counts, 0.05, rule="exact", seed=3)[0]).all()
    assert (sets != co.top_sets(counts, 0.05, rule="exact", seed=4)[0]).any()


def test_exact_draws_favour_no_position_and_differ_between_rows():
    sets, _ = co.top_sets(np.ones((2000, 40), int), 0.25, rule="exact")
    drawn = sets.sum(0)  # k = 10 of 40: 500 expected at each place, SD 19
    assert abs(drawn - 500).max() < 5 * 19.4


def test_packed_sharded_and_plain_agree(rng):
    counts = rng.binomial(12, 0.3, (5, 3, 37)).astype(np.uint16)
    plain, report = co.top_sets(counts, 0.1, rule="exact", seed=2)
    packed, same = co.top_sets(
        [counts[:, 0], counts[:, 1:]], 0.1, rule="exact", seed=2, packed=True
    )
    assert packed.shape == plain.shape == (5, 111)
    assert (packed[:] == plain).all()
    assert (packed[2] == plain[2]).all()
    assert all((report[key] == same[key]).all() for key in report)
    assert (co.pack(plain).bits == packed.bits).all()
    for columns in (8, 64, 4096):
        for sets in (plain, packed):
            joined = np.concatenate([block for _, block in co.column_blocks(sets, columns)], 1)
            assert joined.dtype == np.float32
            assert (joined == plain).all()


def test_rows_that_the_cut_cannot_separate_are_marked():
    rows = np.array(
        [[0] * 19 + [3], [0] * 20, [4] * 20, [0] * 10 + [1] * 10, [1] * 10 + [2] * 9 + [3]]
    )
    assert co.top_sets(rows, 0.05)[1]["testable"].tolist() == [True, False, False, True, True]
    assert not co.top_sets(rows[:1], 0.5)[1]["testable"][0]  # the cut falls on zero
    assert not co.top_sets(rows[1:2], 0.05, rule="exact")[1]["testable"][0]


def test_top_experts_are_the_most_frequent_with_fair_ties(rng):
    routed, _, tokens = tokens_of_a_moe(rng, lengths=(40, 60))
    chosen = co.top_experts(co.frequency(routed, tokens), 2)
    assert (chosen.sum(-1) == 2).all()
    for i, layer in np.ndindex(2, 2):
        assert routed[i, layer][chosen[i, layer]].min() >= routed[i, layer][~chosen[i, layer]].max()
    ties = co.top_experts(np.ones((3000, 1, 6)), 2)[:, 0].sum(0)
    assert abs(ties - 1000).max() < 5 * 26


def test_share_experts_by_hand_and_by_loop(rng):
    f = np.array([[[0.1, 0.6, 0.3], [0.4, 0.25, 0.35]], [[0.5, 0.2, 0.3], [0, 0, 2.0]]])
    assert co.share_experts(f).tolist() == [
        [[False, True, False], [True, False, True]],
        [[True, False, False], [False, False, True]],
    ]
    routed = rng.poisson(5, (6, 3, 9)) + np.arange(9) / 100
    for share in (0.3, 0.5, 1.0):
        for row, got in zip(
            routed.reshape(-1, 9), co.share_experts(routed, share).reshape(-1, 9), strict=True
        ):
            order = np.argsort(-row)
            needed = next(
                n for n in range(1, 10) if row[order[:n]].sum() >= share * row.sum() - 1e-9
            )
            assert set(np.flatnonzero(got)) == set(order[:needed])


@pytest.mark.parametrize("tau", [0.25, 0.3, 0.5, 0.6, 1.0])
def test_consensus_by_loop(rng, tau):
    labels = np.repeat([0, 1, 2], [50, 25, 4])[rng.permutation(79)]
    sets = rng.random((79, 100)) < tau
    for given in (sets, co.pack(sets)):
        counts, got = co.category_counts(given, labels), co.consensus(given, labels, tau)
        for c in range(3):
            members = sets[labels == c]
            assert (counts[c] == members.sum(0)).all()
            # in whole twentieths: 0.6 x 25 is 15, though not in floating point
            assert (got[c] == (members.sum(0) * 20 >= round(tau * 20) * len(members))).all()


def test_membership_by_hand():
    consensus = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1]], bool)
    assert co.membership(consensus).tolist() == [3, 1, 0, 2]


def test_names_are_coded_as_they_first_appear_or_as_a_list_says():
    labels, order = ["SUM", "QA", "SUM", "CLS"], ["CLS", "QA", "SUM"]
    assert co.codes(labels).tolist() == [0, 1, 0, 2]
    assert co.codes(labels, order).tolist() == [2, 1, 2, 0]
    assert co.codes([30, 10, 30], [10, 30]).tolist() == [1, 0, 1]
    assert co.codes(np.array([2, 0, 1, 1], np.uint8)).tolist() == [2, 0, 1, 1]
    assert co.codes([True, False]).tolist() == [0, 1]
    assert co.codes([f"kind {n % 50}" for n in range(120)]).max() == 49
    assert (co.indicator(labels) == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).all()
    assert co.category_means(np.arange(4.0)[:, None], labels)[:, 0].tolist() == [1, 1, 3]


def test_lape_by_hand_and_by_loop(rng):
    rates = np.zeros((6, 4))
    rates[2, 0], rates[:, 1], rates[:2, 2], rates[0, 3] = 0.5, 0.5, 0.4, 0.001
    scores = co.lape(rates, floor=0.25)
    assert np.allclose(scores[:, 0], np.log(6) * (np.arange(6) == 2))
    assert np.allclose(scores[:, 1], 0)
    assert np.allclose(scores[:2, 2], np.log(3) / 2)
    assert (scores[:, 3] == 0).all()
    rates = rng.random((3, 20))
    share = rates / rates.sum(0)
    entropy = np.array([-sum(s * np.log(s) for s in share[:, m]) for m in range(20)])
    assert np.allclose(co.lape(rates, floor=0), share * (np.log(3) - entropy))
    assert np.isfinite(co.lape(np.zeros((6, 3)))).all()


def test_contrast_by_loop(rng):
    labels, p = np.repeat([0, 1, 2], [5, 4, 6]), rng.random((15, 30)).astype(np.float32)
    p[:, 7] = 0.3  # constant
    scores = co.contrast(p, labels, columns=8)
    for c, m in np.ndindex(3, 30):
        own, rest = p[labels == c, m].astype(float), p[labels != c, m].astype(float)
        expected = 0 if m == 7 else (own.mean() - rest.mean()) / p[:, m].astype(float).std()
        assert abs(scores[c, m] - expected) < 1e-6


def test_margin_by_hand():
    assert co.margin([[3, 1], [2, 5], [0, 4]]).tolist() == [[1, -4], [-1, 1], [-3, -1]]


def test_category_sets_are_equal_in_size_and_best(rng):
    scores = rng.random((6, 80))
    sets = co.category_sets(scores, 11)
    assert (sets.sum(1) == 11).all()
    for row, chosen in zip(scores, sets, strict=True):
        assert row[chosen].min() > row[~chosen].max()
    tied = sum(co.category_sets(np.zeros((1, 20)), 5, seed=s)[0].astype(int) for s in range(400))
    assert abs(tied - 100).max() < 5 * 8.7


def test_an_empty_category_is_not_testable():
    for labels, names in (([0, 2], None), ([1, 2], None), (["a", "c"], ["a", "b", "c"]), ([], [])):
        with pytest.raises(NotTestable, match="no instruction in category"):
            co.codes(labels, names)


@pytest.mark.parametrize("rule", ["quantile", "exact"])
def test_top_k_by_sorting(rng, rule):
    for values in (rng.integers(0, 6, (9, 4, 30)), rng.normal(size=(9, 4, 30)), np.zeros((2, 5))):
        for k in (1, 4, values.shape[-1]):
            got = co.top_k(values, k, rule, 3)
            cut = np.sort(values, axis=-1)[..., -k, None]
            if rule == "quantile":
                assert (got == (values >= cut)).all()
            else:
                assert (got.sum(-1) == k).all()
                assert (got >= (values > cut)).all()
                assert (got <= (values >= cut)).all()
                assert (got == co.top_k(values, k, rule, 3)).all()


def test_top_k_and_top_sets_cut_alike(rng):
    counts = rng.binomial(9, 0.4, (20, 300))
    k = co.nominal_size(300, 0.1)
    assert (co.top_k(counts, k, "quantile") == co.top_sets(counts, 0.1)[0]).all()


def test_one_rule_for_sizes():
    for width in (1, 7, 100, 2048, 16384):
        for share in (0.005, 0.05, 0.07, 0.29, 1.0):
            exact = Fraction(round(share * 1000), 1000) * width
            size = co.set_size(width, share)
            assert size == 1 or abs(size - exact) <= Fraction(1, 2)
    assert co.nominal_size(2048, 0.05) == co.set_size(2048, 0.05) + 1


def test_the_committed_grids_sets_have_the_size_of_the_rule():
    table = pd.read_csv(DATA / "grid" / "tiny-full.csv")
    for row in table.to_dict("records"):
        width = 4 * 8 * 128 if "moe" in row["pair"] else 4 * 512
        assert row["neurons"] == co.set_size(width, row["size"])


def test_recovery_by_hand():
    found, planted = (
        np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool),
        np.array([[1, 0, 1, 1]] * 2, bool),
    )
    assert co.recovery(found, planted)["precision"].tolist() == [0.5, 0.0]
    assert co.recovery(found, planted)["recall"].tolist() == [pytest.approx(1 / 3), 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: co.frequency(np.ones((2, 3), int), [1, 0]), "1 below 1"),
        (
            lambda: co.frequency(np.ones((2, 3), int), [1]),
            r"tokens has the shape \[1\]; expected \[I\] with I = 2",
        ),
        (lambda: co.frequency(np.full((1, 3), 5), [4]), "counts <= tokens"),
        (lambda: co.conditional_frequency(np.full((1, 1, 2, 3), 2), np.ones((1, 1, 2))), "p <= f"),
        (lambda: co.top_sets(np.ones((2, 3), int), 0), "epsilon is 0"),
        (lambda: co.top_sets(np.ones((2, 3), int), 1.0), "epsilon is 1.0"),
        (lambda: co.top_sets(np.ones((2, 3)), 0.5), "float64; expected integers"),
        (lambda: co.top_sets(np.ones((2, 3), int), 0.5, rule="first"), "tie rule 'first'"),
        (lambda: co.top_experts(np.ones((1, 1, 4)), 5), "k is 5 with 4 experts"),
        (lambda: co.share_experts(np.zeros((1, 1, 4))), "1 layers without tokens"),
        (lambda: co.consensus(np.ones((2, 3), bool), [0, 1], tau=0), "tau is 0"),
        (lambda: co.consensus(np.ones((2, 3), bool), [0, 2]), r"category \[1\]"),
        (lambda: co.codes(["CLS", "POETRY"], ["CLS", "QA"]), "POETRY"),
        (lambda: co.codes(["CLS", None]), "1 missing"),
        (lambda: co.codes([0.0, np.nan]), "1 missing"),
        (lambda: co.set_size(10, 0), "share 0"),
        (lambda: co.set_size(0, 0.5), "of 0"),
        (lambda: co.top_k([[1, 2]], 3), "set size 3"),
        (lambda: co.top_k([1, np.inf], 1), "1 scores not finite"),
        (lambda: co.top_k([1, 2], 1, "first"), "tie rule 'first'"),
        (lambda: co.codes(np.array([], int)), "no instruction"),
        (lambda: co.codes([0, 1, -1]), r"\[-1\]"),
        (lambda: co.contrast(np.ones((3, 2)), [0, 0, 0]), "at least two"),
        (lambda: co.category_sets(np.array([[0.0, np.nan]]), 1), "scores is empty or holds NaN"),
        (lambda: co.category_sets(np.zeros((2, 3)), 4), "set size 4 of 3"),
    ],
)
def test_bad_input_is_said_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()
