"""Nothing on disk is half-written, and nothing is read under settings it was not made with."""

import errno
import os

import numpy as np
import pytest

from helpers import record
from helpers.config import Pair, Profile
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


def test_a_failed_write_leaves_the_former_file_and_no_draft(tmp_path):
    path = tmp_path / "x.json"
    record.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), record.atomic(path) as draft:
        draft.write_text("half")
        raise KeyboardInterrupt
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
