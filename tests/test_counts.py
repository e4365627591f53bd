"""Counts on disk: what an interruption, a damaged file or a full disk may do to them."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.capture.counts import Counts, Gathered, Shards
from helpers.config import Pair, Profile
from helpers.paths import ROOT
from helpers.record import DamagedFile, RecordMismatch, UserError
from helpers.study import study as room
from helpers.study.study import Study


def made(first, last) -> Counts:
    """Counts that tell from which rows they are."""
    rows = np.arange(first, last)
    table = (rows[:, None, None, None] * np.ones((1, 2, 3, 4))).astype(np.uint16)
    return Counts(
        rows.astype(np.int32),
        {"expert": table, "shared": table[:, :, 0]},
        table[..., 0],
        {"expert": (1, 3), "shared": (1, 3)},
    )


@pytest.fixture
def shards(tmp_path):
    return Shards(tmp_path / "counts", {"profile": "test", "weights": "abc"}, 10, 4)


def fill(shards, which=None):
    for k in range(len(shards)) if which is None else which:
        shards.write(k, made(shards.rows(k).start, shards.rows(k).stop), {"device": "cpu"})


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_rows_are_dealt_out_in_order_and_come_back_whole(shards):
    assert [list(shards.rows(k)) for k in range(len(shards))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert not shards.finished()
    assert shards.missing() == [0, 1, 2]
    fill(shards)
    assert not shards.finished()
    assert shards.missing() == []
    record = shards.finish()
    assert shards.finished()
    assert record["total"] == 10
    assert len(record["shards"]) == 3
    back, expected = shards.load(), made(0, 10)
    assert back.layers == expected.layers
    for name, array in expected.arrays().items():
        assert (back.arrays()[name] == array).all()
        assert back.arrays()[name].dtype == array.dtype


def test_a_table_is_read_row_by_row_from_the_disk(shards):
    fill(shards)
    for family in ("expert", "shared", "routed"):
        table, whole = shards.table(family), shards.load()
        expected = whole.routed if family == "routed" else whole.neurons[family]
        assert table.shape == expected.shape
        assert all((table[i] == expected[i]).all() for i in (0, 9, 3, 4, 7))


def test_writing_order_leaves_no_trace(shards, tmp_path):
    fill(shards, [2, 0, 1])
    shards.finish()
    other = Shards(tmp_path / "other", shards.settings, 10, 4)
    fill(other)
    other.finish()
    assert contents(shards.folder) == contents(other.folder)


def test_batches_are_gathered_group_by_group_every_row_at_its_place():
    gathered = Gathered(7)
    for part, rows in (((0, 2), [4, 0]), ((5, 7), [1, 3]), ((2, 5), [2, 6, 5])):
        gathered(rows, {"one": made(*part), "other": made(part[0] + 10, part[1] + 10)})
    assert gathered.counts["one"].tokens.tolist() == [1, 5, 2, 6, 0, 4, 3]
    assert gathered.counts["other"].tokens.tolist() == [11, 15, 12, 16, 10, 14, 13]
    neurons = Counts.join([made(0, 7)]).neurons["expert"]
    assert (gathered.counts["one"].neurons["expert"] == neurons[[1, 5, 2, 6, 0, 4, 3]]).all()


def test_a_unit_is_one_kind_of_component():
    sparse = made(3, 5)
    assert sparse.unit("neurons") is sparse.neurons["expert"]
    assert sparse.unit("experts") is sparse.routed
    assert sparse.unit("shared") is sparse.neurons["shared"]
    dense = Counts(sparse.tokens, {"dense": sparse.neurons["shared"]}, None, {"dense": (0, 1)})
    assert dense.unit("neurons") is dense.neurons["dense"]
    members = np.zeros(2 * 3 * 4, bool)
    members[13] = True
    assert list(sparse.mask("neurons", members)) == ["expert"]
    assert sparse.mask("neurons", members)["expert"][1, 0, 1]
    assert sparse.mask("experts", members[:6])["experts"].shape == (2, 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.path(1).unlink(),
        lambda s: s.path(1).with_suffix(".json").unlink(),
        lambda s: s.path(1).write_bytes(s.path(1).read_bytes()[:-5]),
        lambda s: s.path(1).write_bytes(b""),
        lambda s: s.path(1).write_bytes(s.path(0).read_bytes()),
        lambda s: s.path(1).with_suffix(".json").write_text('{"profile": '),
    ],
)
def test_a_damaged_shard_is_never_read_and_is_computed_again(shards, damage):
    fill(shards)
    shards.finish()
    whole = contents(shards.folder)
    damage(shards)
    with pytest.raises(DamagedFile):
        shards.load()
    assert not shards.finished()
    assert shards.missing() == [1]
    fill(shards, shards.missing())
    shards.finish()
    assert contents(shards.folder) == whole


def test_a_flipped_bit_is_noticed(shards):
    fill(shards)
    data = bytearray(shards.path(0).read_bytes())
    data[-1] ^= 1
    shards.path(0).write_bytes(data)
    assert shards.missing() == [0]


def test_other_settings_are_refused_even_half_way(shards):
    fill(shards, [1])
    other = Shards(shards.folder, shards.settings | {"weights": "abd"}, 10, 4)
    for attempt in (other.finished, other.missing, lambda: other.read(1)):
        with pytest.raises(RecordMismatch, match="weights = 'abc', this run has 'abd'.*Delete"):
            attempt()
    with pytest.raises(RecordMismatch, match="rows"):
        Shards(shards.folder, shards.settings, 10, 3).missing()


def test_shards_of_two_kinds_of_machine_are_no_capture(shards):
    fill(shards, [0, 1])
    shards.write(2, made(8, 10), {"device": "cuda"})
    with pytest.raises(RecordMismatch, match="counted with device .*expected one kind"):
        shards.finish()


def test_a_missing_shard_cannot_be_finished(shards):
    fill(shards, [0, 2])
    with pytest.raises(DamagedFile, match=r"counts-00001\.json"):
        shards.finish()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*make the folder writable"):
        fill(Shards(tmp_path / "file" / "counts", {}, 4, 4))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="make the folder writable"):
        fill(Shards(tmp_path / "counts", {}, 4, 4))
    tmp_path.chmod(0o700)


def test_a_full_disk_leaves_only_whole_shards(shards, monkeypatch):
    fill(shards, [0])
    before = contents(shards.folder)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*what was finished is kept"):
        fill(shards, [1])
    assert contents(shards.folder) == before
    assert shards.missing() == [1, 2]


# ---- records that were edited, files that are not ours ----


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_shard_edited_with_its_own_record_is_computed_again(shards):
    fill(shards)
    shards.finish()
    whole = contents(shards.folder)
    shards.write(1, made(5, 9), {"device": "cpu"})  # another table, with a record of its own
    assert not shards.finished()
    assert not shards.sealed()
    assert shards.missing() == [1]
    with pytest.raises(
        DamagedFile, match=r"counts-00001\.json is not the record that record\.json"
    ):
        shards.load()
    fill(shards, shards.missing())
    shards.finish()
    assert contents(shards.folder) == whole


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("record", {"total": 11}, RecordMismatch),
        ("record", {"size": 5}, RecordMismatch),
        ("record", {"weights": "abd"}, RecordMismatch),
        ("record", {"total": None}, None),
        ("record", {"shards": []}, None),
        ("record", {"shards": {"a": 1}}, None),
        ("record", {"shards": [0, [], None]}, None),
        ("record", {"shards": ["a", "b", "c"]}, None),
        ("record", {"found": [{}, {}, {}]}, None),
        ("record", {"layers": {}}, None),
        ("record", {"layers": []}, None),
        ("counts-00001", {"layers": {}}, None),
        ("counts-00001", {"layers": {"expert": [1, 3], "shared": [2, 3]}}, None),
        ("counts-00001", {"layers": {"expert": 3, "shared": None}}, None),
        ("counts-00001", {"found": []}, None),
        ("counts-00001", {"sha256": 3}, None),
        ("counts-00001", {"record": "a"}, None),
        ("counts-00001", {"note": "mine"}, None),
        ("counts-00001", {"rows": [0, 4]}, RecordMismatch),
        ("counts-00001", {"profile": ["test"]}, RecordMismatch),
    ],
)
def test_an_edited_record_is_refused_or_its_shards_are_computed_again(shards, name, changes, error):
    fill(shards)
    shards.finish()
    whole = contents(shards.folder)
    edit(shards.folder / f"{name}.json", **changes)
    if error:
        for attempt in (shards.finished, shards.sealed):
            with pytest.raises(error, match=f"{name}.* was made with"):
                attempt()
    else:
        assert not shards.finished()
        assert not shards.sealed()
        fill(shards, shards.missing())
        shards.finish()
        assert shards.finished()
        assert contents(shards.folder) == whole


@pytest.mark.parametrize("value", [{}, {"expert": 3, "shared": None}, {"expert": ["a"], "b": []}])
def test_layers_that_are_none_are_damage_even_before_the_folder_is_complete(shards, value):
    fill(shards)
    edit(shards.path(1).with_suffix(".json"), layers=value)
    assert shards.missing() == [1]


def test_files_that_are_not_counts_are_never_touched(shards):
    own = {"notes.json": "{", ".counts.json": "{", "counts-mine.json": "[", ".record.txt": "x"}
    shards.folder.mkdir()
    for name, text in own.items():
        (shards.folder / name).write_text(text)
    (shards.folder / "counts-00002.json").mkdir()
    assert not shards.finished()
    (shards.folder / "counts-00002.json").rmdir()
    fill(shards)
    shards.finish()
    assert shards.finished()
    assert {name: (shards.folder / name).read_text() for name in own} == own


DAMAGE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda kind: st.one_of(
        st.lists(kind, max_size=3),
        st.dictionaries(st.sampled_from(["expert", "shared", "device"]), kind, max_size=3),
    ),
    max_leaves=5,
)
KEYS = ["total", "size", "layers", "found", "shards", "rows", "sha256", "profile"]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(["record", "counts-00000"]),
    st.one_of(
        st.dictionaries(st.sampled_from(KEYS), DAMAGE, min_size=1).map(lambda d: (True, d)),
        DAMAGE.map(lambda value: (False, value)),
    ),
)
def test_any_records_of_a_folder_are_read_or_refused(name, change):
    with tempfile.TemporaryDirectory() as folder:
        shards = Shards(Path(folder), {"profile": "test"}, 2, 2)
        fill(shards)
        shards.finish()
        path, (some, value) = shards.folder / f"{name}.json", change
        path.write_text(json.dumps(json.loads(path.read_text()) | value if some else value))
        for attempt in (shards.finished, shards.sealed, shards.load, shards.finish):
            with contextlib.suppress(UserError):
                attempt()


# ---- several at once ----


def test_a_shard_that_another_holds_comes_last_and_is_not_computed_twice(shards):
    begun, go, done = threading.Event(), threading.Event(), []

    def work(name):
        def count(shard):
            done.append((name, shard))
            if name == "first":
                begun.set()
                assert go.wait(60)
            if (name, shard) == ("second", 2):
                go.set()
            return made(shards.rows(shard).start, shards.rows(shard).stop), {"device": "cpu"}

        return count

    first = threading.Thread(target=shards.fill, args=(work("first"),))
    first.start()
    assert begun.wait(60)
    shards.fill(work("second"))
    first.join()
    assert sorted(shard for _, shard in done) == [0, 1, 2]
    assert done[:3] == [("first", 0), ("second", 1), ("second", 2)]
    assert not shards.missing()
    assert len(contents(shards.folder)) == 6


def test_a_failure_lets_go_and_what_was_finished_stays(shards):
    def count(shard):
        if shard == 1:
            raise KeyboardInterrupt
        return made(shards.rows(shard).start, shards.rows(shard).stop), {"device": "cpu"}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            shards.fill(count)
        assert shards.missing() == [1, 2]
        assert sorted(contents(shards.folder)) == ["counts-00000.json", "counts-00000.safetensors"]


def test_reading_and_writing_at_once_never_damages(shards):
    """A folder asked for while another writes it: complete or not, but never a fault."""
    faults, stop = [], threading.Event()

    def ask():
        try:
            while not stop.is_set():
                shards.finished()
                shards.sealed()
        except Exception as error:
            faults.append(error)

    askers = [threading.Thread(target=ask) for _ in range(2)]
    [thread.start() for thread in askers]
    for _ in range(8):
        fill(shards)
        shards.finish()
    stop.set()
    [thread.join() for thread in askers]
    assert not faults
    assert shards.finished()
    assert len(contents(shards.folder)) == 7


def test_leftovers_of_a_killed_run_are_gone_after_the_next(shards):
    shards.folder.mkdir()
    for name in (
        ".counts-00000.safetensors.draft.safetensors",
        ".counts-00001.json.k3_9xyab.json",
        ".counts-00001.both.lock",
        ".record.json.draft.json",
    ):
        (shards.folder / name).write_text("")
    shards.fill(lambda k: (made(shards.rows(k).start, shards.rows(k).stop), {"device": "cpu"}))
    assert len(contents(shards.folder)) == 6


# ---- kill -9 ----


def run(checkpoint, folder, pause=0.0, patch=setattr):
    """Capture twelve instructions, three to a shard; `pause` seconds before each shard."""
    encode = room.encode_once
    patch(room, "counts_dir", lambda *names: Path(folder) / names[-1])
    patch(room, "SHARD", 3)
    patch(
        room,
        "encode_once",
        lambda *args, **options: (time.sleep(float(pause)), encode(*args, **options))[1],
    )
    rows = pd.DataFrame(
        [{"instruction": f"add {i} and {2 * i}.", "input": "", "reference": "x"} for i in range(12)]
    )
    pair = Pair("pair", str(checkpoint), str(checkpoint))
    Study(Profile("test", "none", (pair,), batch_tokens=64), pair, rows).counts("base")


def test_a_killed_run_keeps_its_shards_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    checkpoint, killed = tmp_path / "model", tmp_path / "killed"
    prompt = killed / "prompt"
    zoo.build("qwen2_moe").save_pretrained(checkpoint)
    zoo.tokenizer().save_pretrained(checkpoint)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, test_counts; test_counts.run(*sys.argv[1:])",
            checkpoint,
            killed,
            "0.5",
        ],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not (prompt / "counts-00001.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (prompt / "record.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in prompt.glob("counts-0000[01]*")}
    (prompt / ".counts-00002.safetensors.draft.safetensors").write_bytes(
        b"half a file"
    )  # what a kill may leave
    assert len(kept) == 4
    assert not (prompt / "counts-00002.json").exists()
    for folder in (killed, tmp_path / "whole"):
        with monkeypatch.context() as patch:
            run(checkpoint, folder, 0, patch.setattr)
    assert {name: (prompt / name).stat().st_mtime_ns for name in kept} == kept  # not computed again
    found = {name: data for name, data in contents(prompt).items() if not name.startswith(".")}
    assert found == contents(tmp_path / "whole" / "prompt")
    assert json.loads(found["record.json"])["total"] == 12
