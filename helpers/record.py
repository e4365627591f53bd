"""Files that can be trusted: written whole or not at all, and never read under another setting
than they were made.
"""

import hashlib
import json
import os
import platform
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .paths import short

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "scipy",
    "statsmodels",
    "safetensors",
    "tokenizers",
)


class UserError(Exception):
    """Bad input, said in one message: what was found, what was expected, where, and what to do."""

    def _render_traceback_(self):
        """Jupyter prints this instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class NotTestable(UserError):
    """The data at hand cannot answer: too few instructions, nothing that varies, an empty set, one
    half only.
    """


class RecordMismatch(UserError):
    """A file on disk was made under other settings than the ones now asked for."""


class DamagedFile(UserError):
    """A file on disk is missing, truncated or not what its name says."""


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; it takes the name `path` only when the block ends well.

    >>> with atomic("/tmp/sparcom_example.txt") as draft:
    ...     _ = draft.write_text("whole")
    >>> Path("/tmp/sparcom_example.txt").read_text()
    'whole'
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
        )
    except OSError as error:
        raise UserError(
            f"cannot write {short(path)}: {error.strerror}. Free the disk or make the folder "
            "writable, then run again; what was finished is kept."
        ) from error
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        with open(draft, "rb+") as written:
            os.fsync(written.fileno())
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise UserError(
            f"writing {short(path)} failed: {error.strerror or error}. Free the disk or make the folder "
            "writable, then run again; what was finished is kept."
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def sha256(path) -> str:
    """Hex digest of one file, or of all files below a folder (names and contents, in sorted order)."""
    path, digest = Path(path), hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def digest(obj) -> str:
    """Hex digest of anything JSON can hold, independent of key order."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions that can change a number: python and the packages of PACKAGES."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def write_json(path, obj) -> None:
    """Write `obj` as sorted, indented JSON; atomic. A NaN is refused: it is not JSON, nor a result."""
    text = json.dumps(obj, indent=1, sort_keys=True, default=_plain, allow_nan=False)
    with atomic(path) as draft:
        draft.write_text(text + "\n")


def read_json(path):
    """Read JSON; a missing or damaged file is one clear error."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError as error:
        raise DamagedFile(
            f"{short(path)} is missing: the notebook that writes it has not run for this profile. "
            "Run `make reproduce`, or the earlier notebooks in order."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(
            f"{short(path)} is not valid JSON ({error}). Delete it and run again."
        ) from error


def write_table(path, table) -> None:
    """Write a DataFrame as CSV without its index; atomic; floats with 10 significant digits."""
    with atomic(path) as draft:
        table.to_csv(draft, index=False, float_format="%.10g")


def write_tensors(path, arrays: dict[str, np.ndarray], record: dict) -> None:
    """Write arrays as safetensors and, last, `record` plus the file's sha256 as JSON beside it
    (same stem).
    """
    path = Path(path)
    with atomic(path) as draft:
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, draft)
        found = sha256(draft)
    write_json(path.with_suffix(".json"), record | {"sha256": found})


def read_tensors(path, expect: dict | None = None) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `write_tensors` wrote: (arrays, record).

    Raises DamagedFile when a file is missing or is not the one the record describes,
    RecordMismatch when a key of `expect` differs from the record.
    """
    path = Path(path)
    record = read_json(path.with_suffix(".json"))
    verify(record, expect or {}, path)
    if not path.exists() or sha256(path) != record["sha256"]:
        raise DamagedFile(
            f"{short(path)} is missing or truncated: its sha256 is not the one in "
            f"{path.with_suffix('.json').name}. Delete both and run again."
        )
    try:
        return load_file(path), record
    except SafetensorError as error:
        raise DamagedFile(
            f"{short(path)} is no readable safetensors file ({error}). Delete it, run again."
        ) from error


def cached(path, want: dict, compute) -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, record) of `path`: what is there if its record matches `want`, else what
    `compute()` -> (arrays, found) gives, written with the record `found` and `want`.

    A missing or damaged file is computed again; one made under other settings raises RecordMismatch.
    """
    try:
        return read_tensors(path, want)
    except DamagedFile:
        arrays, found = compute()
    write_tensors(path, arrays, found | want)
    return arrays, read_json(Path(path).with_suffix(".json"))


def verify(record: dict, expect: dict, where) -> None:
    """Raise RecordMismatch unless every key of `expect` stands in `record` with the same value;
    names what differs.
    """
    for key, value in expect.items():
        found = record.get(key)
        if found == value:
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            name = min(k for k in found.keys() | value.keys() if found.get(k) != value.get(k))
            key, found, value = f"{key}.{name}", found.get(name), value.get(name)
        raise RecordMismatch(
            f"{short(where)} was made with {key} = {found!r}, this run has {value!r}. "
            f"Delete {short(Path(where).parent)} to compute it anew, or use the former setting."
        )
