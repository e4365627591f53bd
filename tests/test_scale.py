"""The path at paper scale (counts on disk, packed sets, column blocks) in small: the same answers,
bounded memory.

The full sizes, 1,200 x 352,256 and 1,200 x 2,162,688, are timed by `make bench`.
"""

import tracemalloc

import numpy as np
import pytest

from helpers.analysis.sets import BLOCK, PackedSets, category_counts, consensus, top_sets
from helpers.analysis.similarity import churn, jaccard_matrix, nearest_consensus
from helpers.capture.counts import Counts, Shards

ROWS, WIDTH = 24, 8 * 12_000 + 5  # not whole bytes, several column blocks
LABELS, HALVES = np.arange(ROWS) % 6, np.arange(ROWS) // 12


def draw(width, seed=0):
    """Counts uint16 of instructions that share rates, in two layers."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(1, 2, width)
    return np.stack([rng.binomial(rng.integers(15, 60), rate) for _ in range(ROWS)]).astype(
        np.uint16
    )


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """The counts as memory maps, one shard of components each."""
    counts, folder = draw(WIDTH), tmp_path_factory.mktemp("counts")
    for name, part in (("a", slice(0, 40_001)), ("b", slice(40_001, None))):
        np.save(folder / f"{name}.npy", counts[:, part])
    return counts, [np.load(folder / f"{name}.npy", mmap_mode="r") for name in "ab"]


def peak(call):
    """Largest memory (bytes) that a call allocates, numpy arrays included."""
    tracemalloc.start()
    call()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("rule", ["quantile", "exact"])
def test_packed_sets_from_disk_give_the_same_answers(on_disk, rule):
    counts, shards = on_disk
    plain, report = top_sets(counts, 0.05, rule)
    packed, same = top_sets(shards, 0.05, rule, packed=True)
    assert isinstance(packed, PackedSets)
    assert packed.bits.nbytes == ROWS * 12_001
    assert (packed[:] == plain).all()
    assert all((report[key] == same[key]).all() for key in report)
    assert WIDTH > 5 * BLOCK
    assert (jaccard_matrix(packed) == jaccard_matrix(plain)).all()
    assert (category_counts(packed, LABELS) == category_counts(plain, LABELS)).all()
    assert (consensus(packed, LABELS, 0.75) == consensus(plain, LABELS, 0.75)).all()
    guesses = [nearest_consensus(sets, LABELS, HALVES)["correct"] for sets in (packed, plain)]
    assert (guesses[0] == guesses[1]).all()
    reverse = PackedSets(packed.bits[::-1], WIDTH)
    both = churn(packed, reverse), churn(plain, plain[::-1])
    assert all((both[0][key] == both[1][key]).all() for key in both[0])


def test_sets_are_cut_row_by_row(on_disk):
    """Memory beyond the result is that of a few rows, not of the counts."""
    _, shards = on_disk
    row = WIDTH * 8  # one row as int64, what a histogram works on
    assert peak(lambda: top_sets(shards, 0.05, packed=True)) < ROWS * WIDTH / 8 + 4 * row


def test_overlap_needs_one_block_at_a_time(on_disk):
    """Memory beyond the result is that of unpacked column blocks, however many components there
    are.
    """
    packed, _ = top_sets(on_disk[1], 0.05, packed=True)
    block = ROWS * BLOCK * 4  # the next is unpacked while one is held
    twice = PackedSets(np.concatenate([packed.bits, packed.bits], 1), 2 * packed.bits.shape[1] * 8)
    once, double = peak(lambda: jaccard_matrix(packed)), peak(lambda: jaccard_matrix(twice))
    assert double < 1.05 * once < 3 * block
    result = 6 * twice.width * (4 + 1)  # counts and bools, [6, M]
    assert peak(lambda: consensus(twice, LABELS)) < result + 3 * block


def test_tables_of_all_families_share_the_one_shard_in_memory(tmp_path):
    """Beyond the result: one shard and its file's bytes; not a shard per family."""
    shards, width = Shards(tmp_path, {"profile": "scale"}, 96, 48), 50_000
    draws = np.random.default_rng(0)
    for k in range(len(shards)):
        neurons = {
            family: draws.integers(0, 60, (48, 1, width)).astype(np.uint16)
            for family in ("dense", "shared")
        }
        layers = {family: (0,) for family in neurons}
        shards.write(k, Counts(np.full(48, 60, np.int32), neurons, None, layers), {})
    shard, row = 48 * 2 * width * 2, 2 * width * 8

    def cut():
        tables = [shards.table(family) for family in ("dense", "shared")]
        return top_sets(tables, 0.05, packed=True)

    assert peak(cut) < 2 * shard + 96 * 2 * width / 8 + row
