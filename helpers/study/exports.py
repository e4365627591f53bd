"""Sets for other programs: LSN's list of neurons, ESFT's expert configuration, safetensors masks
and CSV, written; LSN's files read and held against ours.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..analysis.nulls import chance_jaccard
from ..analysis.similarity import jaccard
from ..capture.gguf_files import BAD, one_line
from ..hexainst.schema import refuse_over
from ..paths import checked, short
from ..record import (
    DamagedFile,
    UserError,
    atomic,
    read_tensors,
    write_json,
    write_table,
    write_tensors,
)
from .atlas import chosen, expected, refuse


@dataclass(frozen=True)
class Sets:
    """The sets of one model.

    pair, categories   names
    members            unit ("neurons", "shared", "experts") -> bool [C, L, ...], layers first
    layers             unit -> the L layer numbers
    about              how the sets were chosen, for the record beside a file
    """

    pair: str
    categories: tuple[str, ...]
    members: dict[str, np.ndarray]
    layers: dict[str, tuple[int, ...]]
    about: dict = field(default_factory=dict)


def sets_of_study(study, score: str = "contrast", share: float | None = None) -> Sets:
    """A study's sets in the tuned model, as its atlas has them (see `atlas`)."""
    refuse(study, score)
    about = expected(study, score, share)
    counts, members, layers = study.counts(), {}, {}
    for unit in study.units:
        sets = chosen(study, unit, score, about["share"])[2]
        members[unit] = sets.reshape(len(sets), *counts.unit(unit).shape[1:])
        layers[unit] = counts.layers["expert" if unit == "experts" else counts.family(unit)]
    return Sets(study.name, study.categories, members, layers, about)


# ---- written


def export(sets: Sets, kind: str, folder) -> list[Path]:
    """Write sets into a folder for other programs, and beside them what they are, as JSON; the
    paths.

    lsn          <pair>.neuron.pth, as the authors of "Language-Specific Neurons" (Tang et al. 2024)
                 save theirs: a list over categories of a list over layers of a LongTensor with the
                 neurons' numbers. Dense models only.
    esft         <pair>-<category>.json, the expert configuration of ESFT (Wang et al. 2024): for
                 each layer with experts their numbers. Sparse models only.
    safetensors  <pair>-masks.safetensors, a bool mask [C, L, ...] per unit; see `read_masks`
    csv          <pair>-sets.csv, a row per member: category, unit, layer, expert, neuron

    Raises UserError for another kind, a model that the kind cannot hold, a file that is there
    already, a folder that cannot be written. (Ours, but for the formats.)
    """
    if kind not in KINDS:
        raise UserError(f"format {kind!r} is unknown, expected one of {', '.join(KINDS)}.")
    stem = Path(folder) / checked(sets.pair, "pair")
    files, write = KINDS[kind](sets, stem)
    refuse_over(files)
    write()
    return files


def _record(sets, unit=None):
    layers = {unit: sets.layers[unit]} if unit else sets.layers
    return sets.about | {"pair": sets.pair, "categories": sets.categories, "layers": layers}


def _lsn(sets, stem):
    if sets.members["neurons"].ndim != 3:
        raise UserError(
            f"{sets.pair}: LSN's format holds one MLP per layer, and this model's neurons stand in "
            "routed experts. Use --format safetensors or csv, or esft for whole experts."
        )
    files = [Path(f"{stem}.neuron.pth"), Path(f"{stem}.neuron.json")]
    place = {number: at for at, number in enumerate(sets.layers["neurons"])}
    found = [
        [
            torch.from_numpy(np.flatnonzero(own[place[n]]) if n in place else np.zeros(0, np.int64))
            for n in range(max(place) + 1)
        ]
        for own in sets.members["neurons"]
    ]

    def write():
        with atomic(files[0]) as draft:
            torch.save(found, draft)
        write_json(files[1], _record(sets, "neurons"))

    return files, write


def _esft(sets, stem):
    if "experts" not in sets.members:
        raise UserError(
            f"{sets.pair} is dense: there are no experts to configure. Use --format lsn, "
            "safetensors or csv."
        )
    names = {checked(f"{stem.name}-{name}", "category"): name for name in sets.categories}
    files = {name: stem.with_name(f"{file}.json") for file, name in names.items()}
    about = Path(f"{stem}-esft-record.json")

    def write():
        for (_, path), own in zip(files.items(), sets.members["experts"], strict=True):
            layers = zip(sets.layers["experts"], own, strict=True)
            experts = {str(number): np.flatnonzero(row).tolist() for number, row in layers}
            rest = {"shared_experts": False, "non_expert_modules": False}
            write_json(path, {"experts": experts} | rest)
        write_json(about, _record(sets, "experts"))

    return [*files.values(), about], write


def _safetensors(sets, stem):
    path = Path(f"{stem}-masks.safetensors")
    files = [path, path.with_suffix(".json")]
    return files, lambda: write_tensors(path, sets.members, _record(sets))


def _csv(sets, stem):
    files = [Path(f"{stem}-sets.csv"), Path(f"{stem}-sets.json")]

    def write():
        write_table(files[0], members_table(sets))
        write_json(files[1], _record(sets))

    return files, write


KINDS = {"lsn": _lsn, "esft": _esft, "safetensors": _safetensors, "csv": _csv}


def members_table(sets: Sets) -> pd.DataFrame:
    """A row per category, unit and member: category, unit, layer, expert, neuron (empty where there
    is none).
    """
    parts = []
    for unit, members in sets.members.items():
        code, layer, *inner = np.nonzero(members)
        part = pd.DataFrame({"category": np.take(np.array(sets.categories, object), code)})
        part = part.assign(unit=unit, layer=np.take(sets.layers[unit], layer))
        nothing = pd.array([None] * len(part), dtype="Int64")
        expert = unit == "experts" or len(inner) == 2
        part["expert"] = pd.array(inner[0], dtype="Int64") if expert else nothing
        part["neuron"] = nothing if unit == "experts" else pd.array(inner[-1], dtype="Int64")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


# ---- read


def read_masks(path) -> Sets:
    """What `export(sets, "safetensors", ...)` wrote. Raises DamagedFile where it is not whole, or
    holds something else.
    """
    members, record = read_tensors(path)
    if not _are_sets(members, record):
        raise DamagedFile(
            f"{short(path)} holds no sets: expected a bool mask per unit, and in "
            f"{Path(path).with_suffix('.json').name} their pair, categories and layers. Name a "
            "file that `export --format safetensors` wrote."
        )
    layers = {unit: tuple(numbers) for unit, numbers in record["layers"].items()}
    return Sets(record["pair"], tuple(record["categories"]), members, layers, record)


def _are_sets(members, record) -> bool:
    pair, names, layers = (record.get(key) for key in ("pair", "categories", "layers"))
    if not (isinstance(pair, str) and _all(str, names) and isinstance(layers, dict)):
        return False
    if layers.keys() != members.keys() or not all(_all(int, some) for some in layers.values()):
        return False
    shapes = {unit: (len(names), len(numbers)) for unit, numbers in layers.items()}
    return all(m.dtype == bool and m.shape[:2] == shapes[unit] for unit, m in members.items())


def _all(kind, values) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def read_lsn(path, shape: tuple[int, int]) -> np.ndarray:
    """The sets of an LSN file as bool [languages, L, N], for a model of `shape` (L layers, N
    neurons each). The file names no languages: know their order from where it comes.

    It is unpickled as plain tensors (`weights_only`): code in it does not run. Raises UserError for
    a file that holds anything else, or sets of a model of another shape.
    """
    path = Path(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{short(path)} cannot be read: {error.strerror}. Check it.") from error
    except (pickle.UnpicklingError, EOFError, *BAD) as error:
        raise DamagedFile(
            f"{short(path)} is not a file of plain tensors ({one_line(error)[:100]}); "
            "nothing in it was run. Take an LSN file: lists of tensors of neuron numbers."
        ) from error
    _refuse_lsn(found, shape, short(path))
    sets = np.zeros((len(found), *shape), bool)
    for own, layers in zip(sets, found, strict=True):
        for row, numbers in zip(own, layers, strict=True):
            row[numbers.long().numpy()] = True
    return sets


def _refuse_lsn(found, shape, where):
    if not (isinstance(found, list) and found and all(isinstance(one, list) for one in found)):
        raise UserError(f"{where} holds {type(found).__name__}, expected a list of lists.")
    for one in found:
        if not all(isinstance(x, torch.Tensor) and _numbers(x) for x in one):
            raise UserError(f"{where}: expected a tensor [n] of whole numbers for each layer.")
        if len(one) != shape[0]:
            raise UserError(
                f"{where} is of a model of {len(one)} layers, expected {shape[0]}. Take the file "
                "of this model."
            )
        last = max((int(x.max()) for x in one if len(x)), default=0)
        least = min((int(x.min()) for x in one if len(x)), default=0)
        if last >= shape[1] or least < 0:
            raise UserError(
                f"{where} names neurons {least} to {last}, but a layer has {shape[1]}. Take the "
                "file of this model."
            )


def _numbers(tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    whole = tensor.dtype in (torch.int64, torch.int32, torch.int16)
    return plain and tensor.dim() == 1 and (whole or not len(tensor))


def compare(theirs, names: Sequence[str], sets: Sets) -> pd.DataFrame:
    """Jaccard of each of their sets, bool [K, L, N] (see `read_lsn`), with each of ours: columns
    theirs, ours, size_theirs, size_ours, jaccard, chance (as many at random in each layer).
    """
    own = sets.members["neurons"]
    if theirs.shape[1:] != own.shape[1:] or len(names) != len(theirs):
        raise UserError(
            f"{len(names)} names, their sets {theirs.shape}, ours {own.shape}: expected a name for "
            "each, and the same layers and neurons. Take both from one model."
        )
    pool, rows = [own.shape[2]] * own.shape[1], []
    for name, one in zip(names, theirs, strict=True):
        for category, two in zip(sets.categories, own, strict=True):
            first, second = one.sum(1), two.sum(1)
            row = {"theirs": name, "ours": category, "size_theirs": int(first.sum())}
            row["size_ours"] = int(second.sum())
            row["jaccard"] = float(jaccard((one & two).sum(), first.sum(), second.sum()))
            some = first.sum() + second.sum() > 0
            row["chance"] = chance_jaccard(first, second, pool) if some else 0.0
            rows.append(row)
    return pd.DataFrame(rows)
