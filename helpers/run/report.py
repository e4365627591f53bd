"""What the repository says of itself: the generated blocks of README and data sheets."""

import re
from pathlib import Path

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from ..hexainst import human
from ..paths import DATA, HEXAINST, ROOT, checked, results_dir, short
from ..record import UserError, atomic, read_json, write_json, write_table
from ..study import ledger
from ..study.tuned import RUNS, TABLES
from .plan import plans

PUBLISHED = ("tests.csv", "verdicts.csv")
SHOWN = ("smollm2", "tiny")  # whose numbers have columns on the page
TUNED = ("tuning_tests.csv", "tuning_verdicts.csv")  # the same of the claims about tunings
WHOLE = ("wall_seconds", "peak_rss_mb")  # of a summary: what a run of the whole chain took
PLANNED = {  # README's columns: {title: (column of plans.csv, format)}
    "profile": ("profile", "`{}`"),
    "pair": ("pair", "{}"),
    "parameters": ("parameters", "{:,.0f}"),
    "neurons": ("neurons", "{:,}"),
    "routed experts": ("routed experts", "{:,}"),
    "weights, GB": ("memory GB", "{:.2f}"),
    "counts on disk, GB": ("counts GB", "{:.1f}"),
    "texts read": ("instructions", "{:,}"),
    "times each": ("passes", "{}"),
    "core hours to count": ("core hours", "{:,.1f}"),
    "to ablate": ("ablation hours", "{:,.0f}"),
}


def fill(path: Path, blocks: dict[str, str]) -> str:
    """The text of a Markdown file with its generated blocks, <!-- name: begin --> ... <!-- name:
    end -->, made anew.
    """
    text = path.read_text()
    for name, block in blocks.items():
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
        if not pattern.search(text):
            raise UserError(
                f"{short(path)} has no block <!-- {name}: begin --> ... <!-- {name}: end -->. "
                "Put it back."
            )
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return text


def cost(tiny: dict, real: dict) -> str:
    """Two sentences: what a run of the whole chain took by the default profile, and by a real
    model's; from their summaries.
    """
    minutes, memory = tiny["wall_seconds"] / 60, tiny["peak_rss_mb"] / 1024
    longer, more = real["wall_seconds"] / 60, real["peak_rss_mb"] / 1024
    return (
        f"`make reproduce` took {minutes:.0f} minutes on two cores without a GPU, the environment "
        f"set up before; its largest process held {memory:.1f} GB. With `PROFILE={real['profile']}`"
        f", a real model, it took {longer:.0f} minutes and {more:.1f} GB."
    )


def plans_table() -> str:
    """A Markdown row per pair of data/published/plans.csv (see `write_plans`)."""
    table = pd.read_csv(DATA / "published" / "plans.csv")
    lines = ["| " + " | ".join(PLANNED) + " |", "|---" * len(PLANNED) + "|"]
    for row in table.to_dict("records"):
        cells = [form.format(row[name]) for name, form in PLANNED.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_plans() -> Path:
    """Write data/published/plans.csv: what the chain costs, planned from configurations alone."""
    path = DATA / "published" / "plans.csv"
    write_table(path, plans())
    return path


def review_table() -> str:
    """What the readings of the AI half changed (data/hexainst/review.json), and the faults of a
    random sample.
    """
    tallies = read_json(HEXAINST / "review.json")
    points = list(tallies[0]["by_point"])
    rows = [
        ["reading", "category", "rows read", "changed", "of these replaced", *points],
        ["---"] * (5 + len(points)),
    ]
    rows += [
        [
            *map(t.get, ("reading", "category", "read", "changed", "replaced")),
            *t["by_point"].values(),
        ]
        for t in tallies
    ]
    drawn, faulty = (
        sum(len(t["sample"][key]) for t in tallies if "sample" in t) for key in ("drawn", "faulty")
    )
    low, high = proportion_confint(faulty, drawn, method="wilson")
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + (
        f"\n\nOf {drawn} rows drawn at random for the second reading, {faulty} had a fault: "
        f"{faulty / drawn:.1%} (95 % interval {low:.1%} to {high:.1%}); by category "
        + ", ".join(
            f"{t['category']} {len(t['sample']['faulty'])}" for t in tallies if "sample" in t
        )
        + "."
    )


def claims_table(folders) -> str:
    """A Markdown row per headline claim: for each published folder (see `publish`) the verdict, and
    each pair's effect on all data; a line per kind of component where there are several.
    """
    claims = ledger.read_ledger()
    claims = claims[claims["headline"] == "yes"]
    parts = {Path(f).name: [pd.read_csv(Path(f) / name) for name in PUBLISHED] for f in folders}
    head = ["claim"]
    for name, (tests, _) in parts.items():
        head += [f"verdict, {name}", *pd.unique(tests["pair"])]
    lines = [head, ["---"] * len(head)]
    for claim in claims.to_dict("records"):
        components = claim["components"].split()
        line = [f"`{claim['id']}`: {claim['claim']} ({claim['unit']})"]
        for tests, verdicts in parts.values():
            cells = [_cells(tests, verdicts, claim["id"], component) for component in components]
            line += [_stacked(components, cell) for cell in zip(*cells, strict=True)]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(numbers, keys, form="{:.2f}") -> str:
    """The smallest and the largest number whose key matches, one of each category."""
    found = _matching(numbers, keys)
    return f"{form.format(min(found))} to {form.format(max(found))}"


def _matching(numbers, keys) -> list:
    found = [value for key, value in numbers.items() if re.fullmatch(keys, key)]
    if not found:
        raise KeyError(keys)
    return found


def _able(numbers) -> str:
    measures = [rf"ability\.tuned\.all\..+\.{name}" for name in ("strict", "first")]
    return " / ".join(_spread(numbers, keys) for keys in measures)


def _gains(numbers) -> str:
    ends = _matching(numbers, r"ability\.tuned\.all\..+\.gain_ci")
    return f"{sum(low > 0 for low, _ in ends)} of {len(ends)} categories"


def _members(numbers) -> str:
    found = {int(k.rpartition(".")[2]): v for k, v in numbers.items() if k.startswith("membership")}
    share, null = (numbers[f"unique.neurons.{name}"] for name in ("share", "wordings_null"))
    return f"{found[1]:,}: {share:.0%} ({null:.0%}) / {found[max(found)]:,}"


def _one(key):
    def said(numbers):
        low, high = numbers[f"{key}_ci"]
        return f"{numbers[key]:.2f} [{low:.2f}, {high:.2f}]"

    return said


def _lost(score):
    """Own effect beyond the hardest control; loss of plain text under the same sets."""
    key = f"ablation.equal.{score}"
    own = _one(f"{key}.all.critical")
    return lambda numbers: f"{own(numbers)}; {numbers[f'{key}.plain_text']:.2f}"


def _specific(score):
    """Own effect minus the others', its p, and the same category by category."""
    key = f"ablation.equal.{score}.all"
    mean, each = _one(f"{key}.specificity"), rf"{re.escape(key)}\..+\.specific"
    return lambda n: f"{mean(n)}, p {n[f'{key}.p']:.3f}; {_spread(n, each)}"


FOUND = {  # a question; what the summary's numbers of a pair answer
    "answers that pass the strict checkers (no program is run) / right answer likeliest of a few, "
    "by category": _able,
    "the own instruction makes the reference likelier in": _gains,
    "instructions of one category alike beyond a null that keeps runs of tokens, by category": (
        lambda n: _spread(n, r"overlap\.neurons\.all\..+\.bursty_excess")
    ),
    "neurons in one consensus set: share of those in any (wordings dealt to other categories) / in "
    "all sets": _members,
    "losing the most frequent 5 %, nats per token: own category beyond the hardest control; plain "
    "text": _lost("frequency"),
    "by frequency: own category minus the others, mean [interval], p before Holm; by category": (
        _specific("frequency")
    ),
    "losing 5 % by contribution: own category beyond the hardest control; plain text": _lost(
        "contribution"
    ),
    "by contribution: own category minus the others": _specific("contribution"),
    "layers of two categories alike, tuned / untrained": lambda n: (
        f"{n['layers.neurons.all.stability']:.3f} / {n['layers.neurons.all.twin']:.3f}"
    ),
    "category read off the neurons": _one("nearest.neurons.all.tuned"),
    "category read off the words alone": _one("nearest.neurons.all.words"),
}


def _told(answer, numbers) -> str:
    try:
        return answer(numbers)
    except (KeyError, ValueError):  # the run did not ask
        return "-"


def findings(folders) -> str:
    """A Markdown row per question of FOUND, a column per pair of the published folders."""
    pairs = {
        (Path(folder).name, pair): numbers
        for folder in folders
        for pair, numbers in read_json(Path(folder) / "summary.json")["pairs"].items()
    }
    head = [f"`{pair}`" if pair == name else f"`{pair}` ({name})" for name, pair in pairs]
    lines = [["", *head], ["---"] * (1 + len(pairs))]
    lines += [
        [asked, *(_told(answer, n) for n in pairs.values())] for asked, answer in FOUND.items()
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(folders) -> str:
    """Of each published folder but `tiny`: which headline verdicts are those of the tiny models,
    which are others, and what was not asked of it. A Markdown list.
    """
    claims = ledger.read_ledger()
    headline = set(claims.loc[claims["headline"] == "yes", "id"])
    found = {Path(f).name: _verdicts(Path(f) / PUBLISHED[1], headline) for f in folders}
    tiny, lines = found.pop("tiny"), []
    for name, other in found.items():
        asked = {key: said for key, said in other.items() if said in JUDGED}
        alike = {key: f"{_named(key)}: {said}" for key, said in asked.items() if tiny[key] == said}
        differ = [
            f"{_named(key)}: {said} in `{name}`, {tiny[key]} in `tiny`"
            for key, said in asked.items()
            if key not in alike
        ]
        left = [f"{_named(k)}: {other.get(k, 'not tested')}" for k in tiny if k not in asked]
        lines.append(
            f"- **Another verdict in `{name}` than in `tiny`:** {'; '.join(differ) or 'none'}. "
            f"**The same verdict in both:** {'; '.join(alike.values()) or 'none'}. "
            f"**Without a verdict in `{name}`:** {'; '.join(left) or 'none'}."
        )
    return "\n".join(lines)


def tunings(folder) -> str:
    """What fine-tuning changed in the real model: a paragraph from the tests that notebook 10 made,
    numbers with their intervals.
    """
    tests, verdicts = (pd.read_csv(Path(folder) / name) for name in TUNED)

    def told(name, component="neurons", pair="full", half="all"):
        mine = (tests["id"] == name) & (tests["components"] == component) & (tests["pair"] == pair)
        return effect_cell(tests[mine & (tests["half"] == half)], null=False)

    def listed(verdict):
        some = verdicts[verdicts["verdict"] == verdict].groupby("id", sort=False)["components"]
        return ", ".join(f"`{name}` ({', '.join(parts)})" for name, parts in some) or "none"

    runs = read_json(TABLES / RUNS)
    most = max(run["losses"][-1][1] for run in runs.values())
    return " ".join(
        (
            f"It was tuned in {len(runs)} ways, each by at most {most:,} tokens; one of them, "
            "continued language modelling on words of the same rows, is the control. *k of 6: a to "
            "b* says in how many categories an effect is supported, and its smallest and largest "
            "value; other numbers are effects with 95 % intervals. Instruction tuning makes the "
            "references of rows it never saw likelier, in nats per token, in "
            f"{told('tuning-improves', 'likelier')}; of the rows whose sources it never saw, in "
            f"{told('tuning-improves', 'likelier', half='ai')}. It makes the row's own instruction "
            f"help more in {told('tuning-improves', 'gain')}. The control does the first in "
            f"{told('tuning-improves', 'likelier', 'continued')}, and the last in "
            f"{told('tuning-improves', 'gain', 'continued')}.",
            "Instruction tuning moves the sets beyond the noise floor by "
            f"{told('tuning-beyond-noise')}. How much further than the control: "
            f"{told('tuning-beyond-continued')} (below 0: less far). Two seeds of it end more "
            f"alike than it and the control do, by {told('tuning-beyond-seed')}: the two go "
            "different ways.",
            "Tuning on MATH alone moves MATH's sets more than others' by "
            f"{told('tuning-own-category', pair='alone')}. How much more of the tuning the most "
            "moved tenth of the neurons carries than random tenths, in nats: "
            f"{told('tuning-transplant', 'forward')} (below 0: less). Losing what it moved into a "
            f"category's set costs {told('tuning-matter', 'gained')} more than losing random "
            f"neurons; losing the larger part that it kept there costs "
            f"{told('tuning-matter', 'kept')} more.",
            "The rank correlation of a neuron's change in weights with its change in frequency is "
            f"{told('tuning-weights')}, under the control "
            f"{told('tuning-weights', pair='continued')}.",
            f"Supported: {listed('supported')}; mixed: {listed('mixed')}; not supported: "
            f"{listed('not supported')}. `tuning-improves` judges all tunings, the control among "
            "them. The control differs from the tuning in format, pairing, "
            "loss and effort together; which of them matters it does not say.",
        )
    )


JUDGED = ("supported", "mixed", "not supported")


def _verdicts(path, names) -> dict[tuple[str, str], str]:
    table = pd.read_csv(path)
    some = table[table["id"].isin(names)]
    return dict(zip(zip(some["id"], some["components"], strict=True), some["verdict"], strict=True))


def _named(key) -> str:
    return f"`{key[0]}` ({key[1]})"


def _cells(tests, verdicts, name, component) -> list[str]:
    """A claim's verdict and, of each pair, its effect beside the null."""
    mine = (verdicts["id"] == name) & (verdicts["components"] == component)
    found = tests[(tests["id"] == name) & (tests["components"] == component)]
    found = found[found["half"] == "all"]
    cells = [f"**{verdict}**" for verdict in verdicts.loc[mine, "verdict"]] or ["-"]
    return cells + [effect_cell(found[found["pair"] == pair]) for pair in pd.unique(tests["pair"])]


def _stacked(components, values) -> str:
    """One table cell of several lines: the kind of component and its value, where there is one."""
    if len(components) == 1:
        return values[0]
    named = [f"{c}: {v}" for c, v in zip(components, values, strict=True) if v != "-"]
    return "<br>".join(named) or "-"


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
    return f"{one.effect:.3f} [{one.low:.3f}, {one.high:.3f}]{beside}"


def publish(profile: str) -> Path:
    """Copy a run's ledger and summary, which hold no text of others, to data/published/<profile>:
    every test, every verdict, every headline number. The folder. What the whole chain and each of
    its notebooks took is kept where a run of some notebooks does not say it.
    """
    folder, results = DATA / "published" / checked(profile, "profile"), results_dir(profile)
    tests, verdicts = (pd.read_csv(results / name) for name in ("claims.csv", "verdicts.csv"))
    write_table(folder / PUBLISHED[0], tests)
    write_table(folder / PUBLISHED[1], verdicts)
    path, summary = folder / "summary.json", read_json(results / "summary.json")
    if "wall_seconds" not in summary and path.is_file():
        before = read_json(path)
        summary |= {name: before[name] for name in WHOLE if name in before}
        if "seconds" in before:
            summary["seconds"] = before["seconds"] | summary.get("seconds", {})
    write_json(path, summary)
    for name in TUNED:
        if (results / name).is_file():
            write_table(folder / name, pd.read_csv(results / name))
    return folder


def pages() -> dict[Path, str]:
    """README and data sheet with their generated blocks made anew from what is published: {path:
    text}. Nothing is written.
    """
    readme, sheet = ROOT / "README.md", DATA / "README.md"
    folders = sorted(
        (DATA / "published").glob("*/"), key=lambda folder: (folder.name == "tiny", folder)
    )
    shown = [folder for folder in folders if folder.name in SHOWN]
    blocks = {
        "tunings": tunings(DATA / "published" / "tiny"),
        "cost": cost(*(read_json(DATA / "published" / n / "summary.json") for n in SHOWN[::-1])),
        "claims": claims_table(shown),
        "compared": compared(folders),
        "findings": findings(shown),
        "plans": plans_table(),
    }
    return {
        readme: fill(readme, blocks),
        sheet: fill(sheet, {"review": review_table(), "human": human.table()}),
    }


def write_pages() -> None:
    """Write what `pages` gives, each page whole or not at all."""
    for page, text in pages().items():
        with atomic(page) as draft:
            draft.write_text(text, "utf-8")
