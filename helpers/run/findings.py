"""What README says was found: questions answered model by model, models compared, the ledger."""

import re
from pathlib import Path

import pandas as pd

from ..record import read_record, refuse_edited
from ..study import ledger
from ..study.summary import verified
from ..study.tuned import CONTROL, CONTROLS, DEALT

PUBLISHED = ("tests.csv", "verdicts.csv")
TUNED = ("tuning_tests.csv", "tuning_verdicts.csv")  # the same of the claims about tunings
JUDGED = ("supported", "mixed", "not supported")


def published(folder, name: str) -> Path:
    """The table `name` of a published folder, held against its summary (see `verified`)."""
    said = "Publish the profile again, or take the folder from the repository."
    return verified(Path(folder), name, said)


def read(folder, *names) -> list[pd.DataFrame]:
    """Tables of a published folder."""
    return [pd.read_csv(published(folder, name)) for name in names]


def summary(folder) -> dict:
    """The summary of a published folder. Raises DamagedFile where it was edited."""
    path = Path(folder) / "summary.json"
    record = read_record(path, {"pairs": dict})
    refuse_edited(record, path)
    return record


def rows_of(lines) -> str:
    """A Markdown table; the first line is its head."""
    head, *others = lines
    every = [head, ["---"] * len(head), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def effect_cell(tests, null: bool = True) -> str:
    """An effect, its interval and null; of several categories, in how many it is supported, and
    the smallest and largest effect.
    """
    if not len(tests):
        return "-"
    if len(tests) > 1:
        held, values = int(tests["supported"].sum()), tests["effect"]
        return f"{held} of {len(tests)}: {values.min():.3f} to {values.max():.3f}"
    one = tests.iloc[0]
    beside = f" / {one.null:.3f}" if null else ""
    return f"{_signed(one)}{beside}"


def answer(tests) -> str:
    """What one pair's tests of a claim say: in how many of the categories it holds (both halves
    together), or yes, no, or in part (on both halves together and on each).

    Raises `KeyError` where there is no test.
    """
    held = _held(tests)
    if _by_category(tests):
        return f"**in {held.sum()} of {len(held)} categories**"
    return "**yes**" if held.all() else "**in part**" if held.any() else "**no**"


def _held(tests) -> pd.Series:
    """Which of one pair's tests of a claim are supported; of a claim about each category, those on
    both halves together.
    """
    if not len(tests):
        raise KeyError("no test")
    if _by_category(tests):
        tests = tests[tests["category"].notna() & (tests["half"] == "all")]
    return tests["supported"]


def _by_category(tests) -> bool:
    return tests["category"].notna().any()


def _matching(numbers, keys) -> list:
    found = [value for key, value in numbers.items() if re.fullmatch(keys, key)]
    if not found:
        raise KeyError(keys)
    return found


def _spread(numbers, keys) -> str:
    found = _matching(numbers, keys)
    return f"{min(found):.2f} to {max(found):.2f}"


def _one(numbers, key) -> str:
    low, high = numbers[f"{key}_ci"]
    return f"{numbers[key]:.2f} [{low:.2f}, {high:.2f}]"


def _able(numbers, tests) -> str:
    strict, first = (rf"ability\.tuned\.all\..+\.{name}" for name in ("strict", "first"))
    ends = _matching(numbers, r"ability\.tuned\.all\..+\.gain_ci")
    cut = numbers["answers.tuned.cut"]
    return (
        f"**in {sum(low > 0 for low, _ in ends)} of {len(ends)} categories**; passes "
        f"{_spread(numbers, strict)} ({cut:.0%} of the answers cut), ranked first "
        f"{_spread(numbers, first)}"
    )


def _alike(numbers, tests) -> str:
    mine = _tests(tests, "excess-smallest", "neurons")
    return f"{answer(mine)}: {effect_cell(mine[mine['half'] == 'all'], null=False)}"


def _readable(numbers, tests) -> str:
    said = answer(_tests(tests, "readable-beyond", "neurons"))
    return (
        f"{said}: neurons {_one(numbers, 'nearest.neurons.all.tuned')}, "
        f"words {_one(numbers, 'nearest.neurons.all.words')}"
    )


def _consensus(numbers, tests) -> str:
    found = {int(k.rpartition(".")[2]): v for k, v in numbers.items() if k.startswith("membership")}
    share, null = (numbers[f"unique.neurons.{name}"] for name in ("share", "wordings_null"))
    return f"{found[1]:,}: {share:.0%}, dealt {null:.0%}; {found[max(found)]:,} in all"


def _layers(numbers, tests) -> str:
    said = answer(_tests(tests, "layer-pattern-learned", "neurons"))
    alike, twin = (numbers[f"layers.neurons.all.{name}"] for name in ("stability", "twin"))
    return f"{said}: {alike:.3f}, untrained {twin:.3f}"


def _needed(score):
    """By how many categories a score's sets are needed; the mean effect, and on plain text."""
    key = f"ablation.equal.{score}"

    def said(numbers, tests):
        held = answer(_tests(tests, "critical-by-category", score))
        mean = _one(numbers, f"{key}.all.critical")
        return f"{held}: {mean}; plain text {numbers[f'{key}.plain_text']:.2f}"

    return said


def _parts(score):
    """What parts of a score's sets cost alone, beyond random ones, and their share of the set."""

    def said(numbers, tests):
        key, found = f"ablation.parts.{score}", []
        for part in ("general", "own", "no_massive"):
            if f"{key}.{part}.critical" in numbers:
                cost, share = numbers[f"{key}.{part}.critical"], numbers[f"{key}.{part}.share"]
                found.append(f"{part.replace('_', ' ')} ({share:.0%}) {cost:.2f}")
        if not found:
            raise KeyError(key)
        return "; ".join(found)

    return said


def _specific(score):
    """In how many categories own effect exceeds the others'; the mean, its p, and the spread."""
    key = f"ablation.equal.{score}.all"

    def said(numbers, tests):
        held = answer(_tests(tests, "specific-by-category", score))
        mean, each = _one(numbers, f"{key}.specificity"), rf"{re.escape(key)}\..+\.specific"
        return f"{held}: {mean}, p {numbers[f'{key}.p']:.3f}; each {_spread(numbers, each)}"

    return said


def _tests(tests, name, component):
    return tests[(tests["id"] == name) & (tests["components"] == component)]


ASKED = {  # a question; what a pair's numbers and tests answer
    "Does the own instruction make the reference likelier than another one does?": _able,
    "**1. Do instructions of a category share neurons** beyond chance, length and words?": _alike,
    "Do neurons tell the category better than words do?": _readable,
    "How many neurons are in one category's consensus set alone?": _consensus,
    "Do categories share a layer pattern that training made?": _layers,
    "**2. Are the neurons that fire most often needed** by their category?": _needed("frequency"),
    "Which part of the set is it, lost alone? (beyond random sets)": _parts("frequency"),
    "Do they serve it more than the others?": _specific("frequency"),
    "**3. Are the neurons that contribute most needed** by their category?": _needed(
        "contribution"
    ),
    "Do these serve it more than the others?": _specific("contribution"),
}


def _told(ask, *found) -> str:
    try:
        return ask(*found)
    except (KeyError, ValueError):  # the run did not ask
        return "-"


def answers(folders) -> str:
    """A Markdown row per question of ASKED, a column per pair of the published folders."""
    pairs, head = [], [""]
    for folder in map(Path, folders):
        (tests,) = read(folder, PUBLISHED[0])
        for pair, numbers in summary(folder)["pairs"].items():
            head.append(f"`{pair}`")
            pairs.append((numbers, tests[tests["pair"] == pair]))
    rows = [[said, *(_told(ask, *pair) for pair in pairs)] for said, ask in ASKED.items()]
    return rows_of([head, *rows])


SAID = {  # a claim and its components; what is shown where they hold
    ("excess-smallest", "neurons"): (
        "instructions of a category share neurons, beyond chance, length and words"
    ),
    ("critical-by-category", "frequency"): (
        "the neurons that fire most often in a category are needed by it, in most categories"
    ),
    ("critical-by-category", "contribution"): (
        "the neurons that contribute most to a category are needed by it, in most categories"
    ),
    ("specific-by-category", "frequency"): (
        "the neurons that fire most often in a category serve it more than the others, in most "
        "categories"
    ),
    ("specific-by-category", "contribution"): (
        "the neurons that contribute most to a category serve it more than the others, in most "
        "categories"
    ),
    ("readable-beyond", "neurons"): (
        "neurons tell an instruction's category better than its words do"
    ),
    ("layer-pattern-learned", "neurons"): (
        "the layer pattern that categories share is one that training made"
    ),
}


def in_brief(folders) -> str:
    """What of SAID is shown in every pair of the published folders, in some alone, in none: a
    Markdown line each.
    """
    tests = pd.concat(read(folder, PUBLISHED[0])[0] for folder in folders)
    pairs = tuple(pd.unique(tests["pair"]))
    groups = {}
    for claim, said in SAID.items():
        mine = _tests(tests, *claim)
        shown = tuple(pair for pair in pairs if _mostly(mine[mine["pair"] == pair]))
        groups.setdefault(shown, []).append(said)
    ordered = sorted(groups, key=len, reverse=True)
    return "\n".join(
        f"- **Shown in {_of(some, pairs)}:** {'; '.join(groups[some])}." for some in ordered
    )


def _of(some, pairs) -> str:
    if some in (pairs, ()):
        return "all of them" if some else "none of them"
    return f"{' and '.join(f'`{name}`' for name in some)} alone"


def _mostly(tests) -> bool:
    """Whether each of one pair's tests of a claim is supported; of a claim about each category,
    more than half of them. What was not asked is not shown.
    """
    if not len(tests):
        return False
    held = _held(tests)
    return held.mean() > 0.5 if _by_category(tests) else held.all()


def compared(folders) -> str:
    """Of each published folder but `tiny`, a column: which headline verdicts are those of the tiny
    models, which are others, and what was not asked of it. A Markdown table.
    """
    claims = ledger.read_ledger()
    headline = set(claims.loc[claims["headline"] == "yes", "id"])
    found = {Path(f).name: _verdicts(f, headline) for f in folders}
    tiny = found.pop("tiny")
    kinds = {
        "supported in both": lambda own, other: own == other == "supported",
        "supported there alone": lambda own, other: own == "supported" != other,
        "supported in `tiny` alone": lambda own, other: other == "supported" != own,
        "supported in neither (of some categories or parts, or of none)": lambda own, other: (
            "supported" not in (own, other)
        ),
    }
    lines = [["", *(f"`{name}` beside `tiny`" for name in found)]]
    for said, holds in kinds.items():
        cells = [
            [key for key in tiny if own.get(key) in JUDGED and holds(own[key], tiny[key])]
            for own in found.values()
        ]
        lines.append([said, *map(_listed, cells)])
    left = [[key for key in tiny if own.get(key) not in JUDGED] for own in found.values()]
    return rows_of([*lines, ["asked of `tiny` alone", *map(_listed, left)]])


def _verdicts(folder, names) -> dict[tuple[str, str], str]:
    (table,) = read(folder, PUBLISHED[1])
    some = table[table["id"].isin(names)]
    return dict(zip(zip(some["id"], some["components"], strict=True), some["verdict"], strict=True))


def _listed(keys) -> str:
    """Claims by name, their components in brackets."""
    parts = {}
    for name, component in keys:
        parts.setdefault(name, []).append(component)
    return ", ".join(f"`{name}` ({', '.join(of)})" for name, of in parts.items()) or "none"


CHANGES = {  # a question: (claim, components, tuning)
    "references of rows it never saw likelier, nats per token": ("improves", "likelier", "full"),
    "the row's own instruction helps more, nats per token": ("improves", "gain", "full"),
    "the right answer, or the own reference, ranks first more often": (
        "improves",
        "ranked",
        "full",
    ),
    "references likelier than after dealt answers, nats per token": (
        "needs-pairing",
        "likelier",
        "full",
    ),
    "sets moved beyond the noise floor": ("beyond-noise", "neurons", "full"),
    "the most moved tenth lowers the loss more than random tenths, nats": (
        "transplant",
        "forward",
        "full",
    ),
    "losing what moved into a set costs more than random neurons, nats": (
        "matter",
        "gained",
        "full",
    ),
    "that minus the same after mere training, nats": ("matter-beyond", "continued", "full"),
    "that minus the same after dealt answers, nats": ("matter-beyond", "dealt", "full"),
}


def tunings(folder) -> str:
    """What fine-tuning changed in the real model: the answer in short, and a Markdown row per
    question of CHANGES: the effect, the same of each control where it was asked, and the verdict,
    from notebook 10's tests.
    """
    return f"{in_short(folder)}\n\n{_changes(folder)}"


def in_short(folder) -> str:
    """Did tuning help, did it move the sets further than its controls, and elsewhere? The real
    model's answers, and those of the pairs of the profile that the folder is of.
    """
    tests, own = read(folder, TUNED[0], PUBLISHED[0])
    helped = _tests(tests[tests["half"] == "all"], "tuning-improves", "likelier")
    held = {pair: part["supported"].sum() for pair, part in helped.groupby("pair")}
    full = tests[tests["pair"] == "full"]
    asked = ("beyond-continued", "beyond-dealt", "beyond-seed", "pairing")
    moved, wrong, apart, pairing = (_whole(full, f"tuning-{what}")[0] for what in asked)
    others = _whole(own, "alteration-beyond-training")
    listed = "; ".join(f"`{row.pair}`: {_further(row)}" for row in others)
    return (
        f"References that it never saw became likelier in {held['full']} of "
        f"{helped['category'].nunique()} categories, by mere training in {held[CONTROL]}, by dealt "
        f"answers in {held[DEALT]}. The sets moved {_further(moved)} ({listed}), and "
        f"{_further(wrong, 'dealt answers')}. How much more alike two seeds of the tuning end than "
        f"tuning and mere training do: {_signed(apart)}; than tuning and dealt answers do: "
        f"{_signed(pairing)}."
    )


def _whole(tests, name) -> list:
    """A claim's tests of neurons on both halves together, one of each pair."""
    found = _tests(tests, name, "neurons")
    return list(found[found["half"] == "all"].itertuples())


def _further(row, control: str = "mere training") -> str:
    if row.low <= 0 <= row.high:
        return f"neither further nor less far than by {control}: {_signed(row)}"
    if row.effect > 0:
        return f"further than by {control}, by {_signed(row)}"
    return f"less far than by {control}, by {_interval(-row.effect, -row.high, -row.low)}"


def _signed(row) -> str:
    return _interval(row.effect, row.low, row.high)


def _interval(effect, low, high) -> str:
    return f"{effect:.3f} [{low:.3f}, {high:.3f}]"


def _changes(folder) -> str:
    tests, verdicts = read(folder, *TUNED)
    verdicts = verdicts.set_index(["id", "components"])["verdict"]
    whole = tests[tests["half"] == "all"]
    heads = ["tuning", "mere training", "dealt answers"]
    lines = [["both halves together", *heads, "claim and verdict"]]
    for said, (ending, component, pair) in CHANGES.items():
        mine = _tests(whole, f"tuning-{ending}", component)
        effects = [
            effect_cell(mine[mine["pair"] == tuning], null=False) for tuning in (pair, *CONTROLS)
        ]
        verdict = verdicts[f"tuning-{ending}", component]
        lines.append([said, *effects, f"`tuning-{ending}` ({component}): {verdict}"])
    return rows_of(lines)


def claims_table(folders) -> str:
    """A Markdown row per headline claim: for each published folder the verdict, and each pair's
    effect on all data; a line per kind of component where there are several. Below it, the current
    claims that are no headline and not supported everywhere.
    """
    claims = ledger.read_ledger()
    claims = claims[claims["headline"] == "yes"]
    parts = {Path(f).name: read(f, *PUBLISHED) for f in folders}
    head = ["claim"]
    for name, (tests, _) in parts.items():
        head += [f"verdict, {name}", *pd.unique(tests["pair"])]
    lines = [head]
    for claim in claims.to_dict("records"):
        components = claim["components"].split()
        line = [f"`{claim['id']}`: {claim['claim']} ({claim['unit']})"]
        for tests, verdicts in parts.values():
            cells = [_cells(tests, verdicts, claim["id"], component) for component in components]
            line += [_stacked(components, cell) for cell in zip(*cells, strict=True)]
        lines.append(line)
    return f"{rows_of(lines)}\n\n{_others(folders)}"


def _others(folders) -> str:
    """Current claims beside the headline ones, of each folder those that were judged and not
    supported everywhere.
    """
    claims = ledger.read_ledger()
    newer = {old for names in claims["replaces"] for old in names.split()}
    beside = set(claims.loc[claims["headline"] != "yes", "id"]) - newer
    said = []
    for folder in map(Path, folders):
        found = _verdicts(folder, beside)
        missed = [
            f"{verdict}: {_listed([key for key, one in found.items() if one == verdict])}"
            for verdict in JUDGED[1:]
        ]
        said.append(f"`{folder.name}`: {'; '.join(missed)}.")
    return f"Current claims beside these that are not supported everywhere. {' '.join(said)}"


def _cells(tests, verdicts, name, component) -> list[str]:
    """A claim's verdict and, of each pair, its effect beside the null."""
    found = _tests(tests, name, component)
    found = found[found["half"] == "all"]
    said = _tests(verdicts, name, component)["verdict"]
    cells = [f"**{verdict}**" for verdict in said] or ["-"]
    return cells + [effect_cell(found[found["pair"] == pair]) for pair in pd.unique(tests["pair"])]


def _stacked(components, values) -> str:
    """One table cell of several lines: the kind of component and its value, where there is one."""
    if len(components) == 1:
        return values[0]
    named = [f"{c}: {v}" for c, v in zip(components, values, strict=True) if v != "-"]
    return "<br>".join(named) or "-"
