"""Files that can be trusted: written whole or not at all, and never read under another setting
than they were made.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import unicodedata
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load, save

from .paths import UserError, short

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
# what `atomic` and `locked` leave when they are killed: .NAME.lock, .NAME.draft.END; a former
# version's drafts had eight letters of chance instead of the word
LEFT = re.compile(r"\.(?P<name>.+(?P<end>\.\w+))\.(lock|(draft|[a-z0-9_]{8})(?P=end))")

HOLLOW = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing


class NotTestable(UserError):
    """The data at hand cannot answer: too few instructions, nothing that varies, an empty set, one
    half only.
    """


class RecordMismatch(UserError):
    """A file on disk was made under other settings than the ones now asked for."""


class DamagedFile(UserError):
    """A file on disk is missing, truncated or not what its name says."""


def visible(given: str) -> bool:
    """Whether a text shows anything: a letter, number, mark or symbol, not only spaces and
    characters without a shape.

    >>> visible("7"), visible("\\u200b \\ufeff")
    (True, False)
    """
    return any(unicodedata.category(c)[0] in "LNPS" and c not in HOLLOW for c in given)


@contextmanager
def writing(path):
    """Whatever keeps `path` from being written is one UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot write {short(path)}: {why}. Free the disk or make the folder writable, then "
            "run again; what was finished is kept."
        ) from error


@contextmanager
def locked(path, wait: bool = True):
    """While the block runs, no other process or thread that asks holds `path`. Yields True; where
    another holds it, waits (and says so), or yields False if not to `wait`.

    The lock is the kernel's, on `.<name>.lock` beside `path`: it ends with its process, however
    that ends, and the file is removed when the block is done. (Ours.)
    """
    path = Path(path)
    lock, held = FileLock(path.with_name(f".{path.name}.lock")), True
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if held := wait:
                named = short(path.with_suffix(""))
                print(f"{named} is being written by another process; waiting", file=sys.stderr)
                lock.acquire()
    try:
        yield held
    finally:
        if held:
            with suppress(OSError):  # while it is held: who waits for it sees that it is gone
                os.unlink(lock.lock_file)
            lock.release()


def computing(path, wait: bool = True):
    """`locked` on a file and its record while both are made; `atomic` locks each alone."""
    return locked(Path(path).with_suffix(".both"), wait)


def sweep(folder) -> None:
    """Remove the drafts and locks that killed processes left in a folder; none that is held."""
    for file in sorted(Path(folder).glob(".*")):
        if (left := LEFT.fullmatch(file.name)) and file.is_file():
            with locked(file.with_name(left["name"]), wait=False) as mine:
                if mine:
                    file.unlink(missing_ok=True)


@contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; it takes the name `path` only when the block ends well.
    A second process that writes the same file waits.

    >>> with atomic("/tmp/sparcom_example.txt") as draft:
    ...     _ = draft.write_text("whole")
    >>> Path("/tmp/sparcom_example.txt").read_text()
    'whole'
    """
    path = Path(path)
    draft = path.with_name(f".{path.name}.draft{path.suffix}")
    with locked(path):
        try:
            with writing(path):
                draft.write_bytes(b"")
                yield draft
                with open(draft, "rb+") as written:
                    os.fsync(written.fileno())
                os.chmod(draft, 0o644)
                os.replace(draft, path)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path):
    """Yield an empty folder beside `path`; it takes the place of the folder `path` only when the
    block ends well, or what stood there stays. A second process that writes the same waits.
    """
    path = Path(path)
    draft, old = (path.with_name(f".{path.name}.sparcom-{end}") for end in ("draft", "old"))
    with locked(path), writing(path):
        try:
            if old.exists() and not path.exists():  # killed between the two renames
                os.rename(old, path)
            for left in (draft, old):
                shutil.rmtree(left, ignore_errors=True)
            draft.mkdir()
            yield draft
            _swap(draft, path, old)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, path: Path, old: Path) -> None:
    """`draft` takes the place of `path`, which comes back should that fail."""
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(draft, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sha256(path) -> str:
    """Hex digest of one file, or of all files below a folder (names and contents, sorted)."""
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


def _text(obj) -> str:
    return json.dumps(obj, indent=1, sort_keys=True, default=_plain, allow_nan=False) + "\n"


def write_json(path, obj) -> None:
    """Write `obj` as sorted, indented JSON; atomic. NaN is refused: it is no JSON, nor a result."""
    text = _text(obj)
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _once(pairs):
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key stands twice")
    return record


def read_json(path):
    """Read JSON; a missing or damaged file is one clear error."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_once)
    except FileNotFoundError as error:
        raise DamagedFile(
            f"{short(path)} is missing: the notebook that writes it has not run for this profile. "
            "Run `make reproduce`, or the earlier notebooks in order."
        ) from error
    except OSError as error:
        raise DamagedFile(
            f"{short(path)} cannot be read: {error.strerror}. Move what stands there away, or make "
            "it readable, and run again."
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too many digits or levels
        raise DamagedFile(
            f"{short(path)} is not valid JSON ({str(error)[:200]}). Delete it and run again."
        ) from error


def read_record(path, keys: dict[str, type] | None = None) -> dict:
    """Read a JSON object that must hold `keys` {name: type}; else DamagedFile, as `read_json`."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise DamagedFile(
            f"{short(path)} holds {_shown(record)}, expected a record. Delete it and run again."
        )
    for key, kind in (keys or {}).items():
        if type(record.get(key)) is not kind:
            raise DamagedFile(
                f"{short(path)}: {key} is {_shown(record.get(key, 'missing'))}, expected "
                f"{kind.__name__}. Delete it and run again."
            )
    return record


def _shown(value) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def write_table(path, table) -> None:
    """Write a DataFrame as CSV without its index; atomic; floats with 10 significant digits."""
    with atomic(path) as draft:
        table.to_csv(draft, index=False, float_format="%.10g")


def sealed(record: dict) -> dict:
    """A record as JSON has it, with a digest of all the rest in it under `record`, so that one
    which was edited is not taken for one that was written (see `refuse_edited`).

    >>> sealed({"seed": 1})["record"][:16]
    'a4bbadc1c78966d2'
    """
    record = json.loads(_text(record))
    return record | {"record": _digest_within(record)}


def refuse_edited(record: dict, path) -> None:
    """Raise DamagedFile unless a record read at `path` is one that `sealed` made."""
    if record.get("record") != _digest_within(record):
        raise DamagedFile(
            f"{short(path)} was edited, or is of a former version: `record` is not the digest of "
            "the rest of it. Delete it and run again, or put the file back that was written."
        )


def _digest_within(record):
    return digest({key: value for key, value in record.items() if key != "record"})


def write_tensors(path, arrays: dict[str, np.ndarray], record: dict) -> dict:
    """Write arrays as safetensors and, last, `record` plus the file's sha256 as JSON beside it
    (same stem), `sealed`; the record as it stands there.
    """
    path = Path(path)
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    record = sealed(record | {"sha256": hashlib.sha256(data).hexdigest()})
    text = _text(record)
    with atomic(path) as draft:
        draft.write_bytes(data)
    with atomic(path.with_suffix(".json")) as draft:
        draft.write_text(text, encoding="utf-8")
    return record


def read_tensors(
    path, expect: dict | None = None, remedy: str = ""
) -> tuple[dict[str, np.ndarray], dict]:
    """Read what `write_tensors` wrote: (arrays, record).

    Raises DamagedFile when a file is missing or is not the one the record describes, or the record
    was edited; RecordMismatch when a key of `expect` differs from the record (`remedy`: see
    `verify`).
    """
    path = Path(path)
    record = read_record(path.with_suffix(".json"), {"sha256": str})
    verify(record, expect or {}, path, remedy)
    refuse_edited(record, path.with_suffix(".json"))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedFile(
            f"{short(path)} cannot be read: {error.strerror}. Delete it and its record "
            f"{path.with_suffix('.json').name}, and run again."
        ) from error
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise DamagedFile(
            f"{short(path)} is truncated or not the file that was written: its sha256 is not the "
            f"one in {path.with_suffix('.json').name}. Delete both and run again."
        )
    try:
        return load(data), record
    except (SafetensorError, ValueError, TypeError, LookupError) as error:
        raise DamagedFile(
            f"{short(path)} is no readable safetensors file ({error}). Delete it, run again."
        ) from error


def cached(path, want: dict, compute, remedy: str = "") -> tuple[dict[str, np.ndarray], dict]:
    """(arrays, record): what is at `path` if it is whole and its record holds `want`, else what
    `compute()` -> (arrays, found) gives, kept there with the record `found` and `want`.

    A missing or damaged file is computed again, one made under other settings raises
    RecordMismatch (`remedy`: see `verify`). What comes back is what stands on the disk: arrays in C
    order, a record as JSON has it. (Ours.)
    """

    def made():
        arrays, found = compute()
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        return arrays, write_tensors(path, arrays, found | want)

    return finished(path, lambda: read_tensors(path, want, remedy), made)


def finished(path, read, make):
    """`read()`, or `make()` where that raises DamagedFile: `path` is not there, or not whole.
    Two processes never make one file: the second waits, then reads it. (Ours.)
    """
    path = Path(path)
    with suppress(DamagedFile):
        return read()
    sweep(path.parent)
    with computing(path):
        with suppress(DamagedFile):  # another process was here
            return read()
        return make()


def verify(record: dict, expect: dict, where, remedy: str = "") -> None:
    """Raise RecordMismatch unless every key of `expect` stands in `record` with the same value, as
    JSON has them; names what differs. `remedy` ends the message; by default it is to delete the
    record of `where`, and nothing else.
    """
    remedy = remedy or f"Delete {short(Path(where).with_suffix('.json'))} to compute it anew"
    if not isinstance(record, dict):
        raise DamagedFile(f"{short(where)} has no record but {_shown(record)}. Run it again.")
    for key, value in json.loads(json.dumps(expect, default=_plain)).items():
        found = record.get(key)
        if found == value:
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            name = min(k for k in found.keys() | value.keys() if _at(found, k) != _at(value, k))
            key, found, value = f"{key}.{name}", found.get(name), value.get(name)
        raise RecordMismatch(
            f"{short(where)} was made with {key} = {_shown(found)}, this run has {_shown(value)}. "
            f"{remedy}, or use the former setting."
        )


def _at(values, key):
    return (key in values, values.get(key))
