"""What models have read: a line for every forward pass, in the file that SPARCOM_TOKENS names, and
what the least would have been.

Nothing is written where the environment names no file, and nothing that is measured depends on it.
A line of the ledger is JSON: model, altered (a digest of what was done to the model, empty if
nothing was), purpose, lengths and texts (tokens and digest of each sequence, padding left out), new
(tokens generated behind each), padded (tokens with padding), seconds. It is appended in one piece,
so any number of processes may write one file.
"""

import json
import os
import time
from collections import Counter
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from ..paths import short
from ..record import DamagedFile, UserError, writing

LEDGER = "SPARCOM_TOKENS"  # the environment variable
OWN_WORDS = "Use the tokenizer that belongs to the model, no words added, or resize its embeddings."
CAST = (
    "torch.autocast is open, so it would be read in another precision than its own: leave the "
    "autocast block, or load it in the dtype that is meant"
)
_names: WeakKeyDictionary = WeakKeyDictionary()  # model -> what the ledger calls it
_altered: WeakKeyDictionary = WeakKeyDictionary()  # model -> digests of what is done to it now
_apart: WeakKeyDictionary = WeakKeyDictionary()  # model -> what else is done to each sequence


def kept_in(path) -> None:
    """From now on this process and those it starts write the ledger `path`, unless the environment
    names another.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault(LEDGER, str(Path(path).absolute()))


def named(model, name: str) -> None:
    """What the ledger calls a model from now on; else it is its class."""
    _names[model] = name


def mark(*how) -> str:
    """A digest of strings, numbers, arrays, and dicts of arrays.

    >>> mark("zero", {"dense": np.array([True])}) == mark("zero", {"dense": np.array([False])})
    False
    """
    found = blake2b(digest_size=6)
    for part in how:
        for name, value in sorted(part.items()) if isinstance(part, dict) else [("", part)]:
            found.update(f"{name}{np.shape(value)}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def state(model) -> str:
    """What is done to a model now: its digests, joined; empty if nothing is."""
    return "+".join(_altered.get(model, ()))


@contextmanager
def altered(model, *how):
    """While open, the model's passes are those of another model: `how` says of which, in strings,
    numbers, arrays, and dicts of arrays.
    """
    marks = _altered.setdefault(model, [])
    marks.append(mine := mark(*how))
    try:
        yield
    finally:
        marks.remove(mine)


@contextmanager
def altered_apart(model, of_each):
    """While open, the sequences of a pass are those of different models: `of_each()` gives the
    digest of what is done to each, [B].
    """
    marks = _apart.setdefault(model, [])
    marks.append(of_each)
    try:
        yield
    finally:
        marks.remove(of_each)


@contextmanager
def reading(model, ids, mask, purpose: str, begun=None):
    """Around one forward pass over ids [B, T], of which mask [B, T] is no padding: its line in the
    ledger, once it has ended well. Yields a list for the numbers of tokens generated behind each
    sequence, [B]; it may stay empty. begun: what the sequences go on from (see beginnings); their
    digests are of it and them, their lengths without it.

    Raises UserError, before the pass, for an id that the model has no embedding of, inside
    torch.autocast, and where the ledger cannot be written.
    """
    _refuse_unknown(model, ids)
    if is_cast(model):
        raise UserError(f"{type(model).__name__}: {CAST}.")
    path = os.environ.get(LEDGER)
    _refuse_unwritable(path)
    new, start = [], time.perf_counter()
    yield new
    if not path:
        return
    seconds, rows = time.perf_counter() - start, ids.cpu().numpy()
    texts = [row[at] for row, at in zip(rows, mask.cpu().numpy() == 1, strict=True)]
    before = b"" if begun is None else begun.ids.cpu().numpy().tobytes()
    under = zip(*(of_each() for of_each in _apart.get(model, ())), strict=True)
    under = ["".join(marks).encode() for marks in under] or [b""] * len(texts)
    whole = [how + before + text.tobytes() for how, text in zip(under, texts, strict=True)]
    line = {
        "model": _names.get(model, type(model).__name__),
        "altered": state(model),
        "purpose": purpose,
        "lengths": [len(text) for text in texts],
        "texts": [blake2b(one, digest_size=6).hexdigest() for one in whole],
        "new": new,
        "padded": rows.size + len(rows) * max(new, default=0),
        "seconds": round(seconds, 6),
    }
    with writing(path), open(path, "ab", buffering=0) as ledger:
        ledger.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _refuse_unwritable(path) -> None:
    """UserError where the environment names a ledger to which no line can be appended."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    there = os.path.isdir(folder) and not os.path.isdir(path)
    if not (there and os.access(path if os.path.exists(path) else folder, os.W_OK)):
        raise UserError(
            f"{LEDGER} names {short(path)}, which cannot be written: expected a file in a folder "
            "that is there. Make the folder, or unset the variable."
        )


def is_cast(model) -> bool:
    """Whether torch.autocast is open for a device that the model is on."""
    kinds = {t.device.type for t in chain(model.parameters(), model.buffers())} - {"meta"}
    return any(map(torch.is_autocast_enabled, kinds))


def _refuse_unknown(model, ids) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if strange := ids[(ids < 0) | (ids >= rows)].tolist():
        raise UserError(
            f"{type(model).__name__} cannot read the token id {strange[0]}, which lies outside "
            f"its {rows} embeddings. {OWN_WORDS}"
        )


def lines_of(path) -> list[dict]:
    """The lines of one ledger. Raises DamagedFile for a file that is none."""
    try:
        return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{short(path)} is no ledger of tokens: {error}. Delete it.") from error


def spent(lines: list[dict], by=("purpose",)) -> dict[tuple, dict]:
    """{values of the keys `by`: sums}: passes, tokens (padding left out), minimum (each sequence
    read once by each model, altered or not; an answer is another sequence than its prompt), ratio
    of the two, padding (share of all tokens), seconds. (Ours.)

    >>> line = {"model": "m", "altered": "", "purpose": "losses", "lengths": [3, 1],
    ...         "texts": ["a", "b"], "new": [], "padded": 6, "seconds": 0.5}
    >>> found = spent([line, line])["losses",]
    >>> found["tokens"], found["minimum"], round(found["padding"], 2)
    (8, 4, 0.33)
    """
    totals, least = {}, {}
    for line in lines:
        key = tuple(line[name] for name in by)
        total = totals.setdefault(key, Counter())
        lengths = np.array(line["lengths"]) + np.array(line["new"] or 0)
        total.update(passes=1, tokens=int(lengths.sum()))
        total.update(padded=line["padded"], seconds=line["seconds"])
        state = line["model"], line["altered"], bool(line["new"])
        texts = least.setdefault(key, {})
        for text, n in zip(line["texts"], lengths, strict=True):
            texts[*state, text] = min(n, texts.get((*state, text), n))
    return {
        key: dict(total)
        | {
            "minimum": (minimum := int(sum(least[key].values()))),
            "ratio": total["tokens"] / minimum,
            "padding": 1 - total["tokens"] / total["padded"],
        }
        for key, total in totals.items()
    }
