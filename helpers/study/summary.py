"""Headline numbers: one part per notebook, merged into summary.json."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from ..paths import checked, results_dir, short
from ..record import DamagedFile, read_record, sha256, verify, versions, write_json

NOTEBOOKS = (
    "00_start_here",
    "03_neurons",
    "04_experts",
    "05_generality_uniqueness",
    "06_ablation",
    "07_alteration",
)  # those that write a part
NOISE = 1e-12  # smaller numbers are rounding errors of sums
HOW = ("threads", "jobs", "processes")  # settings that decide no number: by what it is computed


def stamp(profile) -> dict:
    """What decides a profile's results: its name, its settings (as JSON has them) and the package
    versions.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(profile)))
    return {"profile": profile.name, "settings": settings, "versions": versions()}


def _deciding(record: dict) -> dict:
    settings = record.get("settings")
    if not isinstance(settings, dict):
        return record
    return record | {"settings": {k: v for k, v in settings.items() if k not in HOW}}


def refuse_other(record: dict, profile, path) -> None:
    """Raise RecordMismatch where a summary says that it is of other settings than the profile's;
    one of a former version says nothing, and is taken as it is.
    """
    if "settings" in record:
        stated, now = ({"settings": one["settings"]} for one in (record, stamp(profile)))
        anew = f"Run `make reproduce PROFILE={profile.name}` to compute it anew"
        verify(_deciding(stated), _deciding(now), path, anew)


def _part(profile, notebook: str) -> Path:
    return results_dir(profile.name) / "summary" / f"{checked(notebook, 'notebook')}.json"


def write_part(profile, notebook: str, pairs: dict[str, dict]) -> None:
    """Write one notebook's headline numbers: {pair: {dotted key: number, list or text}}; floats to
    6 decimals, or to 3 significant digits where that would make them 0. What could not be measured
    (a number that is NaN) is left out: the ledger then says "not testable".
    """

    def rounded(value):
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items() if not _missing(v)}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [rounded(v) for v in value]
        return _short(float(value)) if isinstance(value, (float, np.floating)) else value

    write_json(_part(profile, notebook), stamp(profile) | {"pairs": rounded(pairs)})


def _short(value: float) -> float:
    kept = round(value, 6)
    return kept if kept or abs(value) < NOISE else float(f"{value:.3g}")


def _missing(value):
    return isinstance(value, (float, np.floating)) and np.isnan(value)


def read_parts(profile, notebooks) -> dict[str, dict]:
    """The merged headline numbers of several notebooks: {pair: {key: value}}; refuses parts of
    other settings (how many threads and processes computed them decides nothing). A pair that a
    notebook left out (a model without a base) has none from it.
    """
    merged = {pair.name: {} for pair in profile.pairs}
    for notebook in notebooks:
        path = _part(profile, notebook)
        part = read_record(path, {"pairs": dict})
        anew = f"Run notebook {notebook} again to compute it anew"
        verify(_deciding(part), _deciding(stamp(profile)), path, anew)
        for pair, numbers in part["pairs"].items():
            if pair not in merged or not isinstance(numbers, dict):
                raise DamagedFile(
                    f"{short(path)} holds {pair!a}, expected the numbers of the pairs "
                    f"{', '.join(merged)}. Delete it and run {notebook} again."
                )
            merged[pair] |= numbers
    return merged


def verified(folder: Path, name: str, remedy: str = "Run notebook 08 again.") -> Path:
    """The table `name` of a run's folder. Raises DamagedFile, which ends with the `remedy`, where
    it is missing, empty, or not the one whose sha256 stands in the folder's summary.json under
    `tables`; a summary of a former version has none, and its tables are taken as they are.
    """
    path, summary = folder / name, folder / "summary.json"
    if not path.is_file() or not path.stat().st_size:
        raise DamagedFile(f"{short(path)} is missing or empty. {remedy}")
    record = read_record(summary, {"pairs": dict}) if summary.is_file() else {}
    tables, found = record.get("tables", {}), sha256(path)
    if not isinstance(tables, dict) or tables.get(name, found) != found:
        raise DamagedFile(
            f"{short(path)} was cut or changed: its sha256 is not the one in {short(summary)}. "
            f"{remedy}"
        )
    return path


def span(numbers) -> str:
    """The range of whole numbers, "120 to 240", or the number that all are."""
    least, most = int(min(numbers)), int(max(numbers))
    return f"{most}" if least == most else f"{least} to {most}"
