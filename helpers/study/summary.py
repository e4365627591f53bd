"""Headline numbers: one part per notebook, merged into summary.json."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from ..paths import results_dir
from ..record import read_json, verify, versions, write_json


def stamp(profile) -> dict:
    """What decides a profile's results: its name, its settings (as JSON has them) and the package
    versions.
    """
    settings = json.loads(json.dumps(dataclasses.asdict(profile)))
    return {"profile": profile.name, "settings": settings, "versions": versions()}


def _part(profile, notebook: str) -> Path:
    return results_dir(profile.name) / "summary" / f"{notebook}.json"


def write_part(profile, notebook: str, pairs: dict[str, dict]) -> None:
    """Write one notebook's headline numbers: {pair: {dotted key: number, list or text}}; floats to
    6 decimals. What could not be measured (a number that is NaN) is left out: the ledger then says
    "not testable".
    """

    def rounded(value):
        if isinstance(value, dict):
            return {k: rounded(v) for k, v in value.items() if not _missing(v)}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [rounded(v) for v in value]
        return round(float(value), 6) if isinstance(value, (float, np.floating)) else value

    write_json(_part(profile, notebook), stamp(profile) | {"pairs": rounded(pairs)})


def _missing(value):
    return isinstance(value, (float, np.floating)) and np.isnan(value)


def read_parts(profile, notebooks) -> dict[str, dict]:
    """The merged headline numbers of several notebooks: {pair: {key: value}}; refuses parts of
    other settings.
    """
    merged = {pair.name: {} for pair in profile.pairs}
    for notebook in notebooks:
        part = read_json(_part(profile, notebook))
        verify(part, stamp(profile), _part(profile, notebook))
        for pair, numbers in part["pairs"].items():
            merged[pair] |= numbers
    return merged
