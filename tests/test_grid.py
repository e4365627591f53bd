"""The grid: a killed run ends with the same bytes, other settings are refused, tables say what the
cells say.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers.config import Pair, Profile
from helpers.hexainst.schema import CATEGORIES
from helpers.paths import ROOT
from helpers.record import DamagedFile, NotTestable, RecordMismatch, UserError
from helpers.study import grid, planted
from helpers.study.ablation import pooled
from helpers.study.grid import cells
from helpers.study.scores import sets_of, standing
from helpers.study.study import Study
from tests import zoo

torch.set_num_threads(1)
PROFILE = {
    "name": "planted",
    "dataset": "none",
    "template": "say: {instruction}\n",
    "scores": ("contribution",),
    "sizes": (0.05, 0.1),
    "controls": 2,
    "controls_elsewhere": 1,
    "controls_all_rows": 1,
    "ablation_rows": 5,
    "resamples": 50,
}


RECORD = {"seed": 0, "epsilon": 0.05, "pairs": {}, "sha256": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(settings, ...) -> a study of the planted model, whose files are there."""
    folder, loaded, rows = (
        tmp_path_factory.mktemp("planted"),
        (planted.model(), zoo.tokenizer()),
        planted.rows(6),
    )
    for part in loaded:
        part.save_pretrained(folder)
    pair, counts = Pair("pair", str(folder), str(folder)), planted.study(rows).counts()

    def study(data=rows, **settings):
        profile = Profile(pairs=(pair,), **PROFILE | settings)
        made = Study(profile, pair, data, {"tuned": loaded})
        made.once(("counts", "tuned", "prompt"), lambda: counts)
        return made

    return study


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "results_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(grid, "GRID", tmp_path / "committed")
    return tmp_path


def contents(folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.rglob("grid/**/*")) if path.is_file()
    }


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(world, folder, monkeypatch):
    cells(world())
    whole, compute, done = contents(folder), grid.compute, []
    assert len(whole) == 2 * 4
    for path in folder.rglob("grid/**/*.*"):
        path.unlink()

    def killed(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(args[1])
        return compute(*args)

    monkeypatch.setattr(grid, "compute", killed)
    with pytest.raises(KeyboardInterrupt):
        cells(world())
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert len(stamps) == 2
    monkeypatch.setattr(grid, "compute", lambda *args: done.append(args[1]) or compute(*args))
    cells(world())
    assert len(done) == 4
    assert contents(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize("record", ["whole", "gone"])
def test_a_damaged_cell_is_computed_again_and_one_of_other_settings_is_refused(
    world, folder, record
):
    cells(world(), sizes=[0.1])
    before = contents(folder)
    path = next(folder.rglob("*.safetensors"))
    path.write_bytes(b"half")
    if record == "gone":
        path.with_suffix(".json").unlink()
    cells(world(), sizes=[0.1])
    assert contents(folder) == before
    with pytest.raises(RecordMismatch, match="draws = 1, this run has 4.*Delete .*grid/pair to"):
        cells(world(controls_elsewhere=4), sizes=[0.1])


def test_tables_say_what_the_cells_say_and_the_committed_ones_come_back(world, folder):
    studies = {"pair": world()}
    found = cells(studies["pair"])
    table, matrices = grid.table_of(found, 50, 0), grid.matrix_table(found, CATEGORIES)
    assert len(table) == 2 * 3
    assert set(table["half"]) == {"all", "A", "B"}
    assert len(matrices) == 2 * 36
    row = table[(table["size"] == 0.05) & (table["half"] == "B")].iloc[0]
    arrays = found["pair", "contribution", 0.05, "B"][0]
    own = arrays["own"][np.arange(len(arrays["labels"])), arrays["labels"]]
    assert np.isclose(row["own"], own.mean())
    assert row["rows"] == 30
    assert row["neurons"] == 12
    assert np.isclose(
        row["critical"], own.mean() - max(arrays[k].mean() for k in ("random", "rate", "magnitude"))
    )
    both, half = pooled([found["pair", "contribution", 0.05, h][0] for h in ("A", "B")])
    assert both["own"].shape == (60, 6)
    assert half.tolist() == [0] * 30 + [1] * 30
    assert grid.committed(studies) is None
    paths = grid.write(studies, found)
    again, again_matrices, by_category, record = grid.tables(studies)
    assert len(by_category) == 3 * 6  # the headline size alone
    mean = by_category[(by_category["size"] == 0.05) & (by_category["half"] == "B")]
    assert set(mean["category"]) == set(CATEGORIES)
    assert np.allclose(again["critical"], table["critical"])
    assert len(again_matrices) == len(matrices)
    assert record["draws_elsewhere"] == 1
    assert grid.committed({"pair": world(seed=1)}) is None
    with pytest.raises(RecordMismatch, match="rows.*Run `.* grid --profile planted` to compute"):
        grid.committed({"pair": world(ablation_rows=4)})
    with pytest.raises(RecordMismatch, match="Take the line `grid: planted` out of the profile"):
        grid.committed({"pair": world(ablation_rows=4, grid="planted")})
    paths[0].write_text("pair\n")
    with pytest.raises(DamagedFile, match="make grid"):
        grid.committed(studies)


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "5", "half", '{"seed": 0}']
    + [json.dumps(RECORD | change) for change in ({"pairs": []}, {"sha256": 1}, {"seed": "0"})],
)
def test_a_record_that_is_none_of_a_grid_is_one_line(world, folder, text):
    studies = {"pair": world()}
    grid.GRID.mkdir()
    (grid.GRID / "planted.json").write_text(text)
    for read in (grid.committed, lambda some: grid.write_categories(some, {})):
        with pytest.raises(DamagedFile, match=r"planted\.json is missing, or .* `make grid`"):
            read(studies)


def test_a_table_that_the_record_does_not_name_is_one_line(world, folder):
    studies = {"pair": world()}
    grid.GRID.mkdir()
    for end in grid.TABLES:
        (grid.GRID / f"planted{end}.csv").write_text("pair\n")
    record = RECORD | {"pairs": grid.kept(studies)}
    (grid.GRID / "planted.json").write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match=r"planted\.csv is missing or not the one"):
        grid.committed(studies)


def test_measured_rows_are_the_same_number_of_each_category(world):
    here = world().half("A").measured().rows
    assert here["category"].value_counts().to_dict() == dict.fromkeys(CATEGORIES, 5)
    assert set(here["fold"]) == {"A"}


def test_cells_of_other_measured_rows_are_refused(world, folder):
    """As many rows of as many categories, the data the same: another choice of wordings."""
    cells(world(ablation_rows=2), sizes=[0.1])
    rows = world().rows
    alike = rows.groupby(["fold", "category"]).cumcount() < 2
    tags = [{"wording": "one" if one else row} for one, row in zip(alike, rows["id"], strict=True)]
    with pytest.raises(RecordMismatch, match="rows"):
        cells(world(rows.assign(tags=tags), ablation_rows=2), sizes=[0.1])


def test_cells_of_the_same_rows_under_other_labels_are_refused(world, folder):
    """Sets, labels and matrices hang on them; ids, texts and the rows measured are the same."""
    found, rows = cells(world(), sizes=[0.1]), world().rows
    turned = dict(zip(CATEGORIES, CATEGORIES[1:] + CATEGORIES[:1], strict=True))
    other = world(rows.assign(category=rows["category"].map(turned)))
    want = [grid.expected(study) for study in (world(), other)]
    assert [key for key in want[0] if want[0][key] != want[1][key]] == ["data"]
    with pytest.raises(RecordMismatch, match="made with data"):
        cells(other, sizes=[0.1])
    grid.write({"pair": world()}, found | cells(world(), sizes=[0.05]))
    with pytest.raises(RecordMismatch, match="made with data"):
        grid.committed({"pair": other})


def test_a_whole_grid_is_not_written_over_with_what_is_left_of_one(world, folder):
    studies, whole = {"pair": world()}, cells(world())
    with pytest.raises(UserError, match="0 of 4 cells of the grid are finished: nothing is"):
        grid.write(studies, {})
    some = dict(list(whole.items())[:3])
    grid.write(studies, some)  # nothing stood there
    kept = [path.read_bytes() for path in grid.write(studies, whole)]
    with pytest.raises(UserError, match="3 of 4 cells .* or remove .*json first"):
        grid.write(studies, some)
    assert [path.read_bytes() for path in grid.write(studies, whole)] == kept


def test_a_grid_without_the_scores_that_are_told_by_category_says_so(world, folder):
    studies, whole = {"pair": world()}, cells(world())
    grid.write(studies, whole)
    other = {("pair", "frequency", *key[2:]): cell for key, cell in whole.items()}
    with pytest.raises(UserError, match="no row of .*Add frequency and contribution"):
        grid.write_categories(studies, other)


def test_what_is_not_there_is_left_out_and_computed_nowhere(world, folder, monkeypatch):
    cells(world(), sizes=[0.1])
    monkeypatch.setattr(grid, "compute", None)
    found = cells(world(), compute_missing=False)
    assert [key[2:] for key in found] == [(0.1, "A"), (0.1, "B")]


def test_finished_cells_are_shown_by_the_categories_of_their_rows(world, folder, monkeypatch):
    """In order of first appearance among the rows, which is not the data set's."""
    rows = planted.rows(6)
    study = world(rows.iloc[::-1].reset_index(drop=True))
    assert grid.shown({"pair": study}) is None
    found, names = cells(study, sizes=[0.1]), study.categories
    assert names != CATEGORIES
    monkeypatch.setattr(grid, "compute", None)
    table = grid.shown({"pair": study})
    table = table.set_index(["ablated", "measured"])["own"]
    for k, name in enumerate(names):
        each = []
        for (*_, half), (arrays, _) in found.items():
            of = study.half(half).measured().rows["category"] == name
            each.append(arrays["own"][of.to_numpy(), k].mean())
        assert table[name, name] == pytest.approx(np.mean(each), abs=1e-4)


def test_finished_cells_of_other_settings_are_not_shown_and_no_weights_are_fetched(
    world, folder, monkeypatch
):
    cells(world(), sizes=[0.1])
    for change in ({"template": "{instruction}"}, {"controls_elsewhere": 4}, {"seed": 1}):
        with pytest.raises(RecordMismatch, match=rf"{next(iter(change))[:4]}.*Delete .*grid/pair"):
            grid.shown({"pair": world(**change)})
    monkeypatch.setattr(Study, "checkpoint", lambda study: {"weights": "others"})
    with pytest.raises(RecordMismatch, match="made with weights"):
        grid.shown({"pair": world()})
    monkeypatch.setattr(Study, "checkpoint", lambda study: pytest.fail("looked for weights"))
    monkeypatch.setattr(Study, "at_hand", False)
    assert len(grid.shown({"pair": world()})) == 36
    next(folder.rglob("*.safetensors")).write_bytes(b"half")
    with pytest.raises(DamagedFile, match="truncated or not the file"):
        grid.shown({"pair": world()})


def test_the_order_of_the_cells_does_not_depend_on_what_was_there_before(world, folder):
    fresh = list(cells(world()))
    next(folder.rglob("*0.05-B.safetensors")).unlink()
    assert list(cells(world())) == fresh


def test_a_grid_on_one_half_is_not_testable(world, folder):
    rows = planted.rows(6)
    with pytest.raises(NotTestable, match="cannot be measured on another"):
        cells(world(rows[rows["fold"] == "A"]))
    assert not contents(folder)


def test_a_cells_sets_are_chosen_on_the_half_it_is_not_measured_on(world, folder):
    """The halves' references differ, and so their sets: each cell says which rows chose it."""
    rows = planted.rows(6)
    rows.loc[rows["fold"] == "B", "reference"] = "zyx"
    study = world(rows, scores=("attribution",))
    chosen = {
        half: sets_of(standing(study.half(half), ["attribution"]), "attribution", 0.1)
        for half in study.halves
    }
    assert (chosen["A"] != chosen["B"]).any()
    for (*_, half), (arrays, _) in cells(study, sizes=[0.1]).items():
        found = np.unpackbits(arrays["sets"], axis=-1, count=240).astype(bool)
        assert (found == chosen[study.other(half)]).all()
        assert len(arrays["labels"]) == 30


RANK = """
import sys
from pathlib import Path
import pandas as pd, torch
from helpers.config import Pair, Profile
from helpers.study import counting, grid, study
from tests.test_grid import PROFILE

torch.set_num_threads(1)
folder = Path(sys.argv[1])
grid.results_dir = lambda name: folder / "out" / name
study.counts_dir = lambda *names: (folder / "out").joinpath(*names)
made, compute = [], grid.compute
grid.compute = lambda *args: made.append(args[1]) or compute(*args)
pair = Pair("pair", str(folder / "model"), str(folder / "model"))
whole = study.Study(Profile(pairs=(pair,), **PROFILE), pair, pd.read_pickle(folder / "rows"))
found = grid.cells(whole)
rank, world, _ = counting.processes()
(folder / f"rank-{rank}-of-{world}").write_text(f"{len(made)} {len(found)}")
"""


def test_cells_dealt_to_two_processes_are_those_of_one_to_the_byte(tmp_path):
    """Each process computes its half of the cells, and both come back with all of them."""
    for part in (planted.model(), zoo.tokenizer()):
        part.save_pretrained(tmp_path / "model")
    planted.rows(6).to_pickle(tmp_path / "rows")
    (tmp_path / "rank.py").write_text(RANK)
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    run += ["--rdzv-endpoint=localhost:0"]
    kept = {}
    for number in (2, 1):
        command = [*run, f"--nproc-per-node={number}", str(tmp_path / "rank.py"), str(tmp_path)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        kept[number] = contents(tmp_path / "out")
        if number == 2:
            stopped = next(tmp_path.rglob("*0.1-B.safetensors"))
            stopped.unlink()
            subprocess.run(
                command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
            assert contents(tmp_path / "out") == kept[2]
            shutil.rmtree(tmp_path / "out")
    assert kept[1] == kept[2]
    assert len(kept[1]) == 2 * 4
    said = {path.name: path.read_text() for path in tmp_path.glob("rank-*")}
    assert said == {"rank-0-of-1": "4 4", "rank-0-of-2": "0 4", "rank-1-of-2": "1 4"}
