"""Nothing on disk is half-written, and nothing is read under settings it was not made with."""

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from helpers import record
from helpers.config import Pair, Profile
from helpers.paths import ROOT
from helpers.record import DamagedFile, RecordMismatch, UserError
from helpers.study import summary

ARRAYS = {
    "routed": np.arange(6, dtype=np.uint16).reshape(2, 3),
    "tokens": np.array([4, 5], np.int32),
}
PROFILE = Profile("mine", "tiny", (Pair("a", "b", "c"),))


def test_tensors_come_back_as_they_were(tmp_path):
    record.write_tensors(tmp_path / "x.safetensors", ARRAYS, {"seed": 1})
    arrays, found = record.read_tensors(tmp_path / "x.safetensors", {"seed": 1})
    assert found["seed"] == 1
    assert arrays.keys() == ARRAYS.keys()
    for name in ARRAYS:
        np.testing.assert_array_equal(arrays[name], ARRAYS[name], strict=True)


def test_other_settings_are_refused_not_reused(tmp_path):
    record.write_tensors(tmp_path / "x.safetensors", ARRAYS, {"profile": "tiny"})
    with pytest.raises(RecordMismatch, match="profile = 'tiny', this run has 'mine'.*Delete"):
        record.read_tensors(tmp_path / "x.safetensors", {"profile": "mine"})


def test_what_to_delete_is_the_record_alone_or_what_the_caller_names(tmp_path):
    path, want = tmp_path / "x.safetensors", {"seed": 2}
    record.write_tensors(path, ARRAYS, {"seed": 1})
    with pytest.raises(RecordMismatch, match=rf"Delete {path.with_suffix('.json')} to compute"):
        record.cached(path, want, lambda: (ARRAYS, {}))
    with pytest.raises(RecordMismatch, match="this run has 2. Do this, or use the former setting"):
        record.cached(path, want, lambda: (ARRAYS, {}), "Do this")
    path.with_suffix(".json").unlink()
    assert record.cached(path, want, lambda: (ARRAYS, {}))[1]["seed"] == 2


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no record", "broken record"])
def test_damaged_files_are_named(tmp_path, harm):
    path = tmp_path / "x.safetensors"
    record.write_tensors(path, ARRAYS, {})
    whole = path.read_bytes()
    {
        "truncate": lambda: path.write_bytes(whole[:-3]),
        "flip": lambda: path.write_bytes(whole[:-1] + b"\xff"),
        "remove": path.unlink,
        "no record": path.with_suffix(".json").unlink,
        "broken record": lambda: path.with_suffix(".json").write_text("{"),
    }[harm]()
    with pytest.raises(DamagedFile, match=r"x\.(safetensors|json)"):
        record.read_tensors(path)


def test_what_stands_beside_tensors_is_held_to_its_digest(tmp_path):
    """A value changed, gone or new, or no digest at all; written twice, it is its own again."""
    path = tmp_path / "x.safetensors"
    made = record.write_tensors(path, ARRAYS, {"seed": 1, "answers": ["a", "b"], "gap": 0.1})
    without = {key: value for key, value in made.items() if key != "gap"}
    unsealed = {key: value for key, value in made.items() if key != "record"}
    for odd in (made | {"answers": ["a", "c"]}, made | {"width": 100}, without, unsealed):
        record.write_json(path.with_suffix(".json"), odd)
        with pytest.raises(DamagedFile, match=r"x\.json was edited, or is of a former version"):
            record.read_tensors(path, {"seed": 1})
        arrays, found = record.cached(path, {"seed": 1}, lambda: (ARRAYS, dict(unsealed)))
        assert found == made == record.read_tensors(path, {"seed": 1})[1]
    assert record.write_tensors(path, ARRAYS, made) == made


def test_a_failed_write_leaves_the_former_file_and_no_draft(tmp_path):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": 1})

    def half():
        with record.atomic(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert record.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    with (
        pytest.raises(UserError, match="No space left.*Free the disk"),
        record.atomic(tmp_path / "x.json"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not os.listdir(tmp_path)


def test_a_path_that_cannot_be_a_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        record.write_json(tmp_path / "file" / "x.json", {})


def test_nan_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(tmp_path / "x.json", {"p": float("nan")})
    assert not os.listdir(tmp_path)


def test_sha256_of_a_folder_sees_names_and_contents(tmp_path):
    (tmp_path / "a").write_text("1")
    first = record.sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = record.sha256(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, record.sha256(tmp_path)}) == 3


def test_summary_parts_of_other_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "results_dir", lambda name: tmp_path / name)
    summary.write_part(
        PROFILE, "05_x", {"a": {"overlap.gap": np.float64(0.1234567), "ci": (0.1, 0.2)}}
    )
    assert summary.read_parts(PROFILE, ["05_x"]) == {
        "a": {"overlap.gap": 0.123457, "ci": [0.1, 0.2]}
    }
    other = Profile("mine", "tiny", PROFILE.pairs, seed=7)
    with pytest.raises(RecordMismatch, match="settings.seed = 0, this run has 7"):
        summary.read_parts(other, ["05_x"])


@pytest.mark.parametrize("how", ["threads", "jobs", "processes"])
def test_by_how_many_a_summary_part_was_computed_decides_nothing(tmp_path, monkeypatch, how):
    monkeypatch.setattr(summary, "results_dir", lambda name: tmp_path / name)
    summary.write_part(PROFILE, "05_x", {"a": {"overlap.gap": 0.5}})
    other = Profile("mine", "tiny", PROFILE.pairs, **{how: 2})
    assert summary.stamp(other) != summary.stamp(PROFILE)
    assert summary.read_parts(other, ["05_x"]) == {"a": {"overlap.gap": 0.5}}


def test_a_number_that_is_not_0_is_not_written_as_0(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "results_dir", lambda name: tmp_path / name)
    numbers = {
        "p": 4.56789e-9,
        "low": -1.23456e-7,
        "ci": [2.5e-17, 0.1234567],  # a rounding error of a sum
        "nought": 0.0,
        "small": 5.1e-7,  # six decimals hold it
    }
    summary.write_part(PROFILE, "05_x", {"a": numbers})
    assert summary.read_parts(PROFILE, ["05_x"]) == {
        "a": {
            "p": 4.57e-9,
            "low": -1.23e-7,
            "ci": [0, 0.123457],
            "nought": 0,
            "small": 1e-6,
        }
    }


def test_damaged_summary_parts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "results_dir", lambda name: tmp_path / name)
    good = summary.stamp(PROFILE)
    odd = good | {"settings": [], "pairs": {}}
    record.write_json(tmp_path / "mine/summary/05_x.json", odd)
    with pytest.raises(RecordMismatch, match="settings"):
        summary.read_parts(PROFILE, ["05_x"])
    for part in ([], None, {}, good, good | {"pairs": []}, good | {"pairs": {"b": {}}}):
        record.write_json(tmp_path / "mine/summary/05_x.json", part)
        with pytest.raises(DamagedFile, match=r"05_x\.json"):
            summary.read_parts(PROFILE, ["05_x"])
    good["pairs"] = {"a": 3}
    record.write_json(tmp_path / "mine/summary/05_x.json", good)
    with pytest.raises(DamagedFile, match="expected the numbers of the pairs a"):
        summary.read_parts(PROFILE, ["05_x"])
    with pytest.raises(UserError, match="cannot name a file"):
        summary.read_parts(PROFILE, ["../05_x"])


# ---- records of any shape


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"3",
        b'"text"',
        b"{}",
        b'{"sha256": null}',
        b'{"sha256": 3}',
        b'{"sha256": ["a"]}',
        b'{"sha256": "a", "sha256": "a"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"sha256": "' + b"0" * 64 + b'"}',
        b"9" * 9999,
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b"",
        b"\0",
    ],
)
def test_a_record_of_any_shape_is_damage_not_a_traceback(tmp_path, text):
    path = tmp_path / "x.safetensors"
    record.write_tensors(path, ARRAYS, {"seed": 1})
    path.with_suffix(".json").write_bytes(text)
    with pytest.raises(DamagedFile, match=r"x\.(json|safetensors)"):
        record.read_tensors(path)


def test_a_folder_in_a_files_place_is_damage_and_cannot_be_written(tmp_path):
    for name in ("x.json", "x.safetensors"):
        path = tmp_path / name[0] / name
        record.write_tensors(tmp_path / "x" / "x.safetensors", ARRAYS, {})
        path.unlink()
        path.mkdir()
        with pytest.raises(DamagedFile, match="cannot be read: Is a directory"):
            record.read_tensors(tmp_path / "x" / "x.safetensors")
        with pytest.raises(UserError, match="cannot write .*Is a directory"):
            record.write_tensors(tmp_path / "x" / "x.safetensors", ARRAYS, {})
        path.rmdir()


def test_an_expected_value_is_compared_as_json_has_it(tmp_path):
    want = {"sizes": (0.1, np.float64(0.2)), "n": np.int64(3), "none": None, "to": {"a": (1,)}}
    record.write_tensors(tmp_path / "x.safetensors", ARRAYS, want)
    assert record.read_tensors(tmp_path / "x.safetensors", want)[1]["sizes"] == [0.1, 0.2]
    for found in ({"to": {"a": [1], "b": None}}, {"to": 3}, {"to": None}, {}):
        with pytest.raises(RecordMismatch, match="was made with to"):
            record.verify(found, {"to": {"a": (1,)}}, tmp_path / "x")
    for found in ([], None, "to", 3):
        with pytest.raises(DamagedFile, match="has no record"):
            record.verify(found, {"to": 1}, tmp_path / "x")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda kind: st.one_of(
        st.lists(kind, max_size=3),
        st.dictionaries(st.sampled_from(["sha256", "seed", "to", "a"]), kind, max_size=4),
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())), JSON)
def test_any_record_is_read_or_refused(data, wanted):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(b"")
        path.with_suffix(".json").write_bytes(data)
        with pytest.raises(UserError):
            record.read_tensors(path, {"seed": 1, "to": {"a": wanted}})
        with contextlib.suppress(UserError):
            record.verify(record.read_json(path.with_suffix(".json")), {"to": wanted}, path)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(
        st.binary(max_size=40),
        JSON.map(lambda value: json.dumps({"x": value}).encode()),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "I7", None]),
                "shape": st.sampled_from([[1], [2, 2], [-1], [2**62, 2**62], None]),
                "data_offsets": st.sampled_from([[0, 4], [0, 99], [4, 0], None]),
            }
        ).map(lambda value: json.dumps({"x": value}).encode()),
    ),
    st.booleans(),
)
def test_any_tensors_are_read_or_refused(data, framed):
    """Even where the record's sha256 is the file's: it was edited, or written by other hands."""
    data = len(data).to_bytes(8, "little") + data + b"1234" if framed else data
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(DamagedFile):
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        made = record.sealed({"sha256": hashlib.sha256(data).hexdigest()})
        path.with_suffix(".json").write_text(json.dumps(made))
        arrays, found = record.read_tensors(path)
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
        assert found == made


# ---- compute or load


def counted(arrays, found, calls):
    def compute():
        calls.append(1)
        return arrays, found

    return compute


def test_cached_computes_once_and_then_reads(tmp_path):
    path, calls = tmp_path / "deep" / "x.safetensors", []
    odd = {"strided": np.arange(9).reshape(3, 3).T, "single": np.float64(3), "yes": [True, False]}
    compute = counted(odd, {"gap": np.float32(0.5)}, calls)
    first = record.cached(path, {"seed": 1, "sizes": (1, 2)}, compute)
    again = record.cached(path, {"seed": 1, "sizes": (1, 2)}, compute)
    assert calls == [1]
    assert first[1] == again[1]
    assert first[1]["gap"] == 0.5
    assert first[1]["sizes"] == [1, 2]
    assert first[0].keys() == odd.keys()
    for name, array in odd.items():
        np.testing.assert_array_equal(first[0][name], array)
        np.testing.assert_array_equal(first[0][name], again[0][name], strict=True)
    assert sorted(os.listdir(path.parent)) == ["x.json", "x.safetensors"]


def test_cached_computes_what_is_damaged_and_refuses_what_is_other(tmp_path):
    path, calls = tmp_path / "x.safetensors", []
    compute = counted(ARRAYS, {}, calls)
    record.cached(path, {"seed": 1}, compute)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    record.cached(path, {"seed": 1}, compute)
    assert path.read_bytes() == whole
    path.with_suffix(".json").write_text("[]")
    record.cached(path, {"seed": 1}, compute)
    assert len(calls) == 3
    with pytest.raises(RecordMismatch, match="seed = 1, this run has 2"):
        record.cached(path, {"seed": 2}, compute)
    assert len(calls) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, ZeroDivisionError])
def test_a_computation_that_ends_badly_leaves_nothing_and_holds_nothing(tmp_path, error):
    def compute():
        raise error

    for _ in range(2):
        with pytest.raises(error):
            record.cached(tmp_path / "x.safetensors", {}, compute)
        assert not os.listdir(tmp_path)


# ---- several at once


def at_once(number, work):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]


def test_what_one_computes_the_others_wait_for_and_read(tmp_path, monkeypatch):
    calls, found, said, waiting = [], [], [], threading.Event()
    monkeypatch.setattr(
        record, "print", lambda line, file: (said.append(line), waiting.set()), raising=False
    )

    def compute():
        calls.append(1)
        assert waiting.wait(60)
        return ARRAYS, {}

    at_once(3, lambda i: found.append(record.cached(tmp_path / "x.safetensors", {}, compute)))
    assert calls == [1]
    assert "x is being written by another process; waiting" in said[0]
    assert len(found) == 3
    assert found[0][1] == found[1][1] == found[2][1]
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


def test_a_file_that_many_write_is_always_one_of_theirs(tmp_path):
    path, faults = tmp_path / "x.json", []

    def work(i):
        try:
            for _ in range(20):
                record.write_json(path, [i] * 1000)
                assert len(set(record.read_json(path))) == 1
                record.sweep(tmp_path)
        except Exception as error:
            faults.append(error)

    at_once(4, work)
    assert not faults
    assert os.listdir(tmp_path) == ["x.json"]


KILLED = """
import sys, time
from helpers.record import atomic, computing
with computing(sys.argv[1] + "/x.json"), atomic(sys.argv[1] + "/x.json") as draft:
    draft.write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_process_holds_is_left_alone_until_it_is_killed(tmp_path):
    record.write_json(tmp_path / "x.json", {"old": 1})
    own = {"notes.json": "{", ".notes.json": "{", ".x.json.mine": "", "counts.txt": "", ".lock": ""}
    own[".x.json.orig.txt"] = "a user's own"
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    (tmp_path / ".y.safetensors.ab_12xyz.safetensors").write_text("of a former version, killed")
    command, env = [sys.executable, "-c", KILLED, tmp_path], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            record.sweep(tmp_path)
            assert (tmp_path / ".x.json.draft.json").read_text() == "half"
            assert not (tmp_path / ".y.safetensors.ab_12xyz.safetensors").exists()
            with record.computing(tmp_path / "x.json", wait=False) as mine:
                assert not mine
        finally:
            process.send_signal(signal.SIGKILL)
    record.sweep(tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.name != "x.json"} == own
    assert record.read_json(tmp_path / "x.json") == {"old": 1}


# ---- no room, no right


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("where", ["write_bytes", "fsync", "replace"])
def test_whatever_keeps_a_file_from_being_written_is_one_line(tmp_path, monkeypatch, error, where):
    path = tmp_path / "x.safetensors"
    record.write_tensors(path, ARRAYS, {"seed": 1})

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Path if where == "write_bytes" else os, where, fail)
    with pytest.raises(UserError, match="cannot write .*Free the disk") as said:
        record.write_tensors(path, {"other": np.zeros(3)}, {"seed": 2})
    monkeypatch.undo()
    assert "\n" not in str(said.value)
    assert record.read_tensors(path, {"seed": 1})[0].keys() == ARRAYS.keys()
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


def test_a_file_that_outgrows_its_limit_is_one_line_and_the_old_one_stays(tmp_path):
    path, limits = tmp_path / "x.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    record.write_tensors(path, ARRAYS, {"seed": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*File too large"):
            record.cached(path.with_name("y.safetensors"), {}, lambda: ({"a": np.ones(9999)}, {}))
        with pytest.raises(UserError, match="cannot write .*File too large"):
            record.write_tensors(path, {"a": np.ones(9999)}, {})
        with pytest.raises(UserError, match="cannot write .*File too large"):
            record.write_json(path.with_suffix(".json"), ["x" * 99_999])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert record.read_tensors(path, {"seed": 1})[0].keys() == ARRAYS.keys()
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


def test_a_folder_is_written_whole_or_stays_what_it_was(tmp_path, monkeypatch):
    path = tmp_path / "folder"

    def write(name, fails=False):
        with record.atomic_folder(path) as draft:
            (draft / name).write_text(name)
            if fails:
                raise KeyboardInterrupt

    write("one")
    with pytest.raises(KeyboardInterrupt):
        write("two", fails=True)
    assert [file.name for file in path.iterdir()] == ["one"]
    path.rename(tmp_path / ".folder.sparcom-old")  # killed between the two renames
    with pytest.raises(KeyboardInterrupt):
        write("two", fails=True)
    assert [file.name for file in path.iterdir()] == ["one"]
    write("two")
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
