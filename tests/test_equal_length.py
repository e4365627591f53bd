"""Counts on drawn positions: against one forward pass per draw and a plain loop; deterministic;
resumable.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import zoo

from helpers.analysis import nulls
from helpers.analysis import similarity as overlap
from helpers.analysis.sets import PackedSets, nominal_size, top_sets
from helpers.capture import budget
from helpers.capture.count import count_encoded, count_groups
from helpers.capture.tokens import Encoded, encode
from helpers.config import Pair, Profile
from helpers.record import NotTestable, RecordMismatch, UserError
from helpers.study import equal_length as room
from helpers.study import study as study_room
from helpers.study.equal_length import (
    RULES,
    SIZES,
    cut,
    draw,
    equal_routing_similarity,
    null_similarity,
    places,
    similarities,
    with_draws,
)
from helpers.study.study import Study

TEXTS = [
    "add 1 and 2.",
    "name a fish",
    "is it so? yes or no: a, b, c",
    "go",
    "sum: a long one, then another one.",
]
SIZE, DRAWS = 6, 4


@pytest.fixture(params=["llama", "qwen2_moe", "mixtral"])
def model(request):
    return zoo.build(request.param)


def collected(model, encoded, batch_tokens=64, seed=0):
    """rows [I'], {unit: counts [I', D, M]}, routed [I', D, L, E] or None"""
    prompts = [Encoded(e.ids, e.counted, {"prompt": e.counted}) for e in encoded]
    some = with_draws(prompts, range(len(encoded)), SIZE, DRAWS, seed)
    groups = count_groups(model, some, batch_tokens)
    drawn = [groups[f"drawn-{SIZE}-{d}"] for d in range(DRAWS)]
    rows = np.flatnonzero(drawn[0].tokens == SIZE)
    units = {
        unit: np.stack([c.unit(unit)[rows].reshape(len(rows), -1) for c in drawn], 1)
        for unit in ("neurons", "shared")
        if drawn[0].family(unit) in drawn[0].neurons
    }
    routed = None if drawn[0].routed is None else np.stack([c.routed[rows] for c in drawn], 1)
    return rows, units, routed


def test_drawn_counts_are_those_of_one_pass_per_draw(model):
    """Oracle: the exact counter, told to count only the drawn tokens, once per instruction and
    draw.
    """
    encoded = encode(zoo.tokenizer(), TEXTS, template="do: {instruction}\nthen")
    rows, units, routed = collected(model, encoded)
    assert (
        rows.tolist()
        == [i for i, e in enumerate(encoded) if sum(e.counted) >= SIZE]
        == [0, 1, 2, 4]
    )
    for at, i in enumerate(rows):
        where = np.flatnonzero(encoded[i].counted)
        for d, chosen in enumerate(places(len(where), i, DRAWS, SIZE)):
            only = tuple(t in set(where[chosen]) for t in range(len(encoded[i].ids)))
            one = count_encoded(model, [Encoded(encoded[i].ids, only)], 1)
            assert one.tokens[0] == SIZE
            for unit, counts in units.items():
                assert (counts[at, d] == one.unit(unit)[0].ravel()).all()
            assert routed is None or (routed[at, d] == one.routed[0]).all()
    if routed is not None:
        assert (routed.sum(-1) == SIZE * model.config.num_experts_per_tok).all()


def test_draws_do_not_depend_on_batch_size_and_differ_by_seed_row_and_draw(model):
    encoded = encode(zoo.tokenizer(), TEXTS)
    one, other, reseeded = (
        collected(model, encoded, *options)[1] for options in ((1,), (500,), (500, 1))
    )
    for unit in one:
        assert (one[unit] == other[unit]).mean() > 0.999
        assert (one[unit] != reseeded[unit]).any()
    order = places(20, 3, DRAWS, 20)
    assert (np.sort(order) == np.arange(20)).all()
    assert len({tuple(o) for o in order}) == DRAWS
    assert (order[:, :SIZE] == places(20, 3, DRAWS, SIZE)).all()
    assert (order != places(20, 4, DRAWS, 20)).any()


@pytest.mark.parametrize("rule", ["quantile", "exact"])
def test_cut_is_top_sets(rule):
    counts = np.random.default_rng(0).integers(0, 9, (5, 400))
    sets, report = top_sets(counts, 0.05, rule)
    found = cut(counts, nominal_size(400, 0.05), rule)
    assert (found.sum(1) == report["size"]).all()
    assert (
        (found == sets).all() if rule == "quantile" else (counts[found] >= counts[sets].min()).all()
    )


def test_routing_similarity_of_equal_totals_is_the_general_one():
    routed = np.random.default_rng(0).multinomial(8, np.full(5, 0.2), (30, 3)).astype(np.uint8)
    assert np.allclose(
        equal_routing_similarity(routed), overlap.routing_similarity(routed), atol=1e-5
    )
    with pytest.raises(UserError, match="different totals"):
        equal_routing_similarity(routed * np.r_[2, np.ones(29, int)][:, None, None])


@pytest.fixture
def setting(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    zoo.build("qwen2_moe").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    monkeypatch.setattr(study_room, "counts_dir", lambda *names: tmp_path.joinpath(*names))
    for place in (room, study_room):
        monkeypatch.setattr(place, "SHARD", 4)
    pair = Pair("pair", str(folder), str(folder))
    rows = pd.DataFrame([{"instruction": t, "input": "", "reference": "x"} for t in TEXTS * 2])
    profile = Profile("test", "none", (pair,), batch_tokens=64, draws=DRAWS, epsilon=0.2)
    return Study(profile, pair, rows), tmp_path


def test_sets_on_disk_are_those_of_the_counts_and_an_interrupted_run_goes_on(setting, monkeypatch):
    study, folder = setting
    profile, texts = study.profile, list(study.rows["instruction"])
    drawn, opened = draw(study, "tuned", SIZE), study.model()
    row, units, routed = collected(opened[0], encode(opened[1], texts, template=profile.template))
    assert (drawn.rows == row).all()
    assert (drawn.routed == routed).all()
    for unit, counts in units.items():
        sets = PackedSets(drawn.sets[unit]["quantile"], counts.shape[2])[:]
        assert (sets[:, 1] == top_sets(counts[:, 1].astype(int), profile.epsilon)[0]).all()
        assert np.allclose(drawn.total[unit], counts.sum((0, 1)))
        assert np.allclose(drawn.level[unit] * SIZE, counts.mean((1, 2)))
    next(folder.glob("test/pair/tuned/drawn-6-*/drawn-00001.safetensors")).unlink()
    again = draw(study, "tuned", SIZE)
    assert all((again.sets[u][r] == drawn.sets[u][r]).all() for u in drawn.sets for r in room.RULES)
    other = Study(dataclasses.replace(profile, epsilon=0.1), study.pair, study.rows)
    smaller = draw(other, "tuned", SIZE).sets["neurons"]["exact"]  # beside the others
    assert np.bitwise_count(smaller).sum() < np.bitwise_count(drawn.sets["neurons"]["exact"]).sum()
    study.close()
    monkeypatch.setattr(study_room, "open_model", None)  # all shards are there: no model is opened
    draw(study, "tuned", SIZE)
    other = dataclasses.replace(profile, seed=1)
    with pytest.raises(RecordMismatch, match="draw_seed"):
        draw(Study(other, study.pair, study.rows), "tuned", SIZE)
    with pytest.raises(UserError, match="draws are those of the whole"):
        draw(study.take([0, 1]), "tuned", SIZE)


def test_nulls_at_equal_length(setting):
    study, _ = setting
    drawn = draw(study, "tuned", SIZE)
    assert len(list(similarities(drawn, "neurons"))) == DRAWS
    expected = null_similarity(drawn, "neurons", study.profile.epsilon)
    assert expected.shape == (len(drawn.rows),) * 2
    assert np.isfinite(expected).all()
    constant = null_similarity(drawn, "experts", study.profile.epsilon)
    routed = drawn.routed[:, 0]
    redrawn = nulls.redraw_routing(routed, np.full(len(routed), SIZE), 1)
    assert constant.shape == ()
    assert abs(constant - equal_routing_similarity(redrawn).mean()) < 0.1


def test_too_short_instructions_are_not_testable(setting):
    study, _ = setting
    with pytest.raises(NotTestable, match="200 counted tokens"):
        draw(study, "tuned", 200)
    with pytest.raises(UserError, match="1 to 255"):
        draw(study, "tuned", 300)


def test_the_pass_that_counts_draws_all_sizes_of_the_tuned_model(setting, monkeypatch):
    study, folder = setting
    study.counts("tuned")
    ledger = folder / "x.tokens.jsonl"
    monkeypatch.setenv(budget.LEDGER, str(ledger))
    made = [draw(study, "tuned", size) for size in SIZES[:2]]
    assert not ledger.exists()
    for path in folder.rglob("drawn-*/*.*"):
        path.unlink()
    for size, before in zip(SIZES, made, strict=False):
        again = draw(study, "tuned", size)
        assert (again.rows == before.rows).all()
        for rule in RULES:
            assert (again.sets["neurons"][rule] == before.sets["neurons"][rule]).all()
    assert ledger.exists()


def test_several_sizes_are_drawn_in_one_pass_and_are_those_drawn_alone(setting, monkeypatch):
    study, folder = setting
    study.counts("tuned")
    ledger = folder / "x.tokens.jsonl"
    monkeypatch.setenv(budget.LEDGER, str(ledger))
    draw(study, "tuned", SIZE, (SIZE, 3))
    draw(study, "tuned", 3, (SIZE, 3))
    [row] = budget.spent(budget.lines_of(ledger)).values()
    assert row["tokens"] == sum(len(e.ids) for e in study.reading("tuned"))
    places = [path for size in (SIZE, 3) for path in sorted(folder.rglob(f"drawn-{size}-*/*.*"))]
    together = [path.read_bytes() for path in places]
    assert len(together) >= 8
    for path in places:
        path.unlink()
    for size in (3, SIZE):
        draw(study, "tuned", size)
    assert [path.read_bytes() for path in places] == together
