"""Profiles: everything a run may vary, in one YAML file each, checked before anything starts."""

import dataclasses
import re
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import yaml

from .paths import PROFILES, short
from .record import UserError

SCORES = ("frequency", "lape", "contrast", "attribution", "contribution", "contribution-response")


@dataclass(frozen=True)
class Pair:
    """A base model and the model tuned from it: local folders (relative to the repository) or hub
    ids.
    """

    name: str
    base: str
    tuned: str
    base_revision: str | None = None
    tuned_revision: str | None = None
    dtype: str = "float32"
    device_map: str | None = None


@dataclass(frozen=True)
class Profile:
    """One run's settings. Shares are fractions in (0, 1]; seeds and sizes are integers."""

    name: str
    dataset: str
    pairs: tuple[Pair, ...]
    seed: int = 0
    template: str = "Instruction: {instruction}\nResponse:"
    batch_size: int = 32
    max_new_tokens: int = 48
    threads: int = 1
    processes: int = 1
    jobs: int = 1
    run_code: bool = False
    epsilon: float = 0.05
    epsilons: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1)
    tau: float = 0.5
    taus: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    resamples: int = 2000
    twins: int = 5
    draws: int = 20
    controls: int = 20
    controls_elsewhere: int = 5
    controls_all_rows: int = 4
    ablation_rows: int = 20
    grid: str | None = None
    scores: tuple[str, ...] = SCORES[:5]
    sizes: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)


KINDS = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    str | None: (str, type(None)),
}


def _build(kind, values: dict, where: str):
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            close = get_close_matches(str(key), known, 1)
            raise UserError(
                f"{where}: unknown key {key!r}"
                + (f", did you mean {close[0]!r}?" if close else ".")
                + f" Known keys: {', '.join(sorted(known))}."
            )
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing. Add it to the file.")
    typed = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in values.items():
        kinds = KINDS.get(typed[key], (list, tuple))
        if not isinstance(value, kinds) or (typed[key] is not bool and isinstance(value, bool)):
            raise UserError(
                f"{where}: {key} is {value!r}, expected {' or '.join(k.__name__ for k in kinds)}."
            )
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def load_profile(name: str, **overrides) -> Profile:
    """Read notebooks/profiles/<name>.yaml; `overrides` replace single keys (None means: keep the
    file's).

    Raises UserError for an unknown profile, an unknown or ill-typed key, a share or number out of
    range, two pairs of one name.

    >>> load_profile("tiny").epsilon
    0.05
    """
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        have = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        raise UserError(
            f"unknown profile {name!r}: {short(path)} does not exist. Profiles: {', '.join(have)}. "
            "Copy own-model.yaml to make one."
        )
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{short(path)} is not valid YAML: {error}") from error
    if (
        not isinstance(values, dict)
        or not isinstance(values.get("pairs"), list)
        or not values["pairs"]
    ):
        raise UserError(f"{short(path)}: expected keys and values with a non-empty list `pairs`.")
    values |= {key: value for key, value in overrides.items() if value is not None}
    values["pairs"] = tuple(
        p if isinstance(p, Pair) else _build(Pair, p, f"{short(path)}, pairs")
        for p in values["pairs"]
    )
    profile = _build(Profile, values | {"name": name}, short(path))
    for key, most in (
        ("epsilon", 0.99),
        ("epsilons", 0.99),
        ("sizes", 0.99),
        ("tau", 1),
        ("taus", 1),
    ):
        for share in np.atleast_1d(np.array(getattr(profile, key), dtype=object)):
            if isinstance(share, str) or not 0 < share <= most:
                raise UserError(
                    f"{short(path)}: {key} holds {share!r}, expected a share in (0, {most}]."
                )
    for field in dataclasses.fields(Profile):
        if field.type is int and getattr(profile, field.name) < (field.name != "seed"):
            raise UserError(
                f"{short(path)}: {field.name} is {getattr(profile, field.name)}, expected 1 or more."
            )
    names = [pair.name for pair in profile.pairs]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in names):
        raise UserError(
            f"{short(path)}: pairs are named {names}; expected different names of letters, digits, "
            "'.', '_' and '-': each names a folder."
        )
    if unknown := set(profile.scores) - set(SCORES):
        raise UserError(
            f"{short(path)}: scores holds {sorted(unknown)}. Known: {', '.join(SCORES)}."
        )
    if "{instruction}" not in profile.template:
        raise UserError(
            f"{short(path)}: template {profile.template!r} has no {{instruction}} in it."
        )
    return profile
