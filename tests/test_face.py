"""The README's ten lines, and the two analyses behind them, against hand-made counts."""

import re
import subprocess
import sys

import numpy as np
import pytest

import helpers
from helpers.capture.counts import Counts
from helpers.paths import ROOT
from helpers.record import NotTestable, UserError


def planted(seed=0, texts=40, neurons=200):
    """Counts of two labels in which neurons 0 to 9 serve the label "a"."""
    rng, labels = np.random.default_rng(seed), np.repeat(["b", "a"], texts // 2)
    rate = np.full((texts, 2, neurons // 2), 0.4)
    rate[labels == "a", 0, :10] = 0.9
    tokens = np.full(texts, 20, np.int32)
    neurons = rng.binomial(20, rate).astype(np.uint16)
    return Counts(tokens, {"dense": neurons}, None, {"dense": (3, 7)}), labels


def test_find_sets_finds_a_planted_set_and_names_its_place():
    counts, labels = planted()
    table = helpers.find_sets(counts, labels, "contrast", 0.05)
    mine = table[table["label"] == "a"]
    assert set(mine["neuron"]) == set(range(10))
    assert set(mine["layer"]) == {3}
    assert mine["rank"].tolist() == list(range(1, 11))
    one = mine.iloc[0]
    p = counts.neurons["dense"][labels == "a", 0, one["neuron"]].mean() / 20
    assert one["p"] == pytest.approx(p)


def test_overlap_finds_the_planted_gap_and_none_where_labels_are_random():
    counts, labels = planted()
    found = helpers.overlap(counts, labels, resamples=199).iloc[0]
    assert found["low"] > max(found["null_gap"], 0)
    assert found["p"] <= 0.01
    random = np.random.default_rng(1).permutation(labels)
    assert helpers.overlap(counts, random, resamples=199).iloc[0]["p"] > 0.05


def test_counts_of_two_models_are_compared_cell_by_cell():
    """By hand: two texts of 4 and 2 tokens, two neurons in each of two experts, two experts."""
    tokens, layers = np.array([4, 2], np.int32), {"expert": (5,)}
    neurons = np.array([[[[4, 3], [2, 1]]], [[[2, 1], [0, 0]]]], np.uint16)
    routed = np.array([[[4, 4]], [[2, 2]]], np.uint16)
    one = Counts(tokens, {"expert": neurons}, routed, layers)
    moved = neurons.copy()
    moved[0, 0, 0, 1], moved[1, 0, 1, 0] = 1, 1  # by 2 of 4 tokens, by 1 of 2
    other = Counts(tokens, {"expert": moved}, routed, layers)
    table = helpers.compare_counts(one, other)
    assert table.to_dict("list") == {
        "kind": ["expert", "routed"],
        "layer": [5, 5],
        "cells": [8, 4],
        "differ": [2 / 8, 0],
        "shift": [(0.5 + 0.5) / 8, 0],
    }
    longer = Counts(tokens + 1, {"expert": moved}, routed, layers)
    dense = Counts(tokens, {"dense": neurons[:, :, 0]}, None, {"dense": (5,)})
    for counts, said in ((longer, "the same texts"), (dense, "one architecture"), (3, "found int")):
        with pytest.raises(UserError, match=said):
            helpers.compare_counts(one, counts)


def test_bad_labels_are_one_clear_error():
    counts, labels = planted()
    with pytest.raises(UserError, match="39 labels for 40 texts"):
        helpers.overlap(counts, labels[:-1])
    with pytest.raises(NotTestable, match="one label only"):
        helpers.find_sets(counts, ["x"] * 40)
    with pytest.raises(UserError, match="score is 'best'"):
        helpers.find_sets(counts, labels, "best")


def test_the_readmes_lines_run_as_they_stand_from_another_folder(tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    script = tmp_path / "mine.py"
    script.write_text(block)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "bars are silent where nobody looks"
    assert all(word in done.stdout for word in ("gap", "layer", "effect"))
    assert (tmp_path / "ablation.png").read_bytes()[:4] == b"\x89PNG"
