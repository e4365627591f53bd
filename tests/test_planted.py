"""The league of scores: the planted truth holds in the edited model, and the table says what the
draws say.
"""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.config import SCORES
from helpers.hexainst.schema import CATEGORIES
from helpers.record import DamagedFile, RecordMismatch
from helpers.run import __main__ as command
from helpers.study import planted
from helpers.study.evaluate import ablation_matrix
from tests import zoo

torch.set_num_threads(1)


def test_the_tokenizer_is_that_of_the_zoo():
    assert planted.tokenizer().get_vocab() == zoo.tokenizer().get_vocab()


def test_losing_the_planted_neurons_hurts_their_category_alone_and_decoys_hurt_none():
    for decoys in planted.DECOYS:
        made, members = planted.world(decoys, 0.03, 0.1, 0)
        assert (members.sum(1) == planted.MANY).all()
        assert members.sum(0).max() == 1
        here = planted.study(planted.rows(2), made)
        hurt = ablation_matrix(here, here.masks(members), "zero").to_numpy()
        means = np.stack([hurt[here.labels == c].mean(0) for c in range(len(CATEGORIES))])
        assert means.diagonal().min() > 0.5
        assert abs(means[~np.eye(6, dtype=bool)]).max() < 0.05


def test_auc_by_all_pairs():
    rng = np.random.default_rng(0)
    scores, members = rng.integers(0, 6, (3, 40)), rng.random((3, 40)) < 0.2
    by_hand = [
        np.mean([(a > b) + (a == b) / 2 for a in row[m] for b in row[~m]])
        for row, m in zip(scores, members, strict=True)
    ]
    assert np.allclose(planted.auc(scores, members), by_hand)
    assert (planted.auc(np.ones((3, 40)), members) == 0.5).all()


@pytest.fixture(scope="module")
def small():
    return planted.league(("none", "writers"), (0.01,), (0.1,), draws=5)


def test_the_table_is_the_mean_over_draws(small):
    found = [planted.find("writers", 0.01, 0.1, seed) for seed in range(5)]
    row = small[(small["decoys"] == "writers") & (small["score"] == "lape")].iloc[0]
    mine = [one[SCORES.index("lape")] for one in found]
    for name in ("recall", "auc", "loss"):
        assert row[name] == pytest.approx(np.mean([one[name] for one in mine]))
    assert row["recall_low"] <= row["recall"] <= row["recall_high"]
    assert row["chance"] == planted.MANY / (planted.LAYERS * planted.N)


def test_who_finds_what_is_told_by_what_the_decoys_do(small):
    recall = small.set_index(["decoys", "score"])["recall"]
    assert (recall["none"] == 1).all()
    assert recall["writers", "attribution"] == 1
    assert recall["writers", "contribution"] < 0.1
    assert 0.3 < recall["writers", "contrast"] < 0.7  # a coin's throw between planted and writers


def test_the_committed_table_is_whole_and_of_the_settings_that_stand_here(tmp_path, monkeypatch):
    table = planted.committed()
    settings = [planted.DECOYS, planted.WRITES, planted.NOISES, SCORES]
    assert len(table) == np.prod(list(map(len, settings)))
    assert (table["draws"] == planted.DRAWS).all()
    one = table[(table["decoys"] == "none") & (table["noise"] == 0.1)]
    assert (one["recall"] == 1).all()
    path = tmp_path / "planted.csv"
    planted.write(table, path)
    pd.testing.assert_frame_equal(planted.committed(path), table)
    monkeypatch.setitem(planted.SETTINGS, "draws", 11)
    with pytest.raises(RecordMismatch, match="draws.* Run `python -m helpers.run planted`"):
        planted.committed(path)
    monkeypatch.undo()
    path.write_text("decoys\n")
    with pytest.raises(DamagedFile, match="helpers.run planted"):
        planted.committed(path)


def test_the_command_writes_the_table(tmp_path, monkeypatch, capsys, small):
    monkeypatch.setattr(planted, "TABLE", tmp_path / "planted.csv")
    monkeypatch.setattr(planted, "league", lambda: small)
    monkeypatch.setattr(planted.write, "__defaults__", (tmp_path / "planted.csv",))
    assert command.main(["planted"]) == 0
    assert len(pd.read_csv(tmp_path / "planted.csv")) == len(small)
    assert "planted.csv" in capsys.readouterr().out


def test_the_sentences_count_the_settings():
    table = planted.committed()
    said = planted.sentences(table)
    assert len(said) == 1 + len(SCORES)
    part = table[table["score"] == "attribution"]
    assert f"in {(part['recall'] >= 0.9).sum()} of {len(part)} settings" in "\n".join(said)
