"""What the repository says of itself: the generated blocks of README and data sheets."""

import re
from pathlib import Path

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from ..config import load_profile
from ..hexainst import human
from ..paths import DATA, ROOT, checked, results_dir, short
from ..record import (
    UserError,
    atomic,
    atomic_folder,
    read_record,
    sealed,
    sha256,
    write_json,
    write_table,
)
from ..study import dataset
from ..study.summary import refuse_other, verified
from . import findings
from .plan import plans

RUN = ("claims.csv", "verdicts.csv")  # tables of a run's folder
SHOWN = ("smollm2", "tiny")  # whose numbers have columns on the page
WHOLE = ("wall_seconds", "gflops", "cores", "peak_rss_mb")  # what a run of the whole chain took
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
        f"`make reproduce` took {minutes:.0f} minutes on {_cores(tiny)}, without a GPU, the "
        f"environment set up before; its largest process held {memory:.1f} GB. With "
        f"`PROFILE={real['profile']}`, a real model, on both halves of its data (`make "
        "hexainst-human` first; without it the machine-written half alone is read), it took "
        f"{longer:.0f} minutes and {more:.1f} GB on {_cores(real)}."
    )


def _cores(summary) -> str:
    speed = f"{summary['gflops']} GFLOP/s each" if "gflops" in summary else "unknown speed"
    number = summary.get("cores", "")
    return f"{number} core{'s' * (number != 1)} of {speed}".lstrip()


def plans_table() -> str:
    """A Markdown row per pair of data/published/plans.csv (see `write_plans`)."""
    table = pd.read_csv(DATA / "published" / "plans.csv")
    rows = [
        [form.format(row[name]) for name, form in PLANNED.values()]
        for row in table.to_dict("records")
    ]
    return findings.rows_of([list(PLANNED), *rows])


def write_plans() -> Path:
    """Write data/published/plans.csv: what the chain costs, planned from configurations alone."""
    path = DATA / "published" / "plans.csv"
    write_table(path, plans())
    return path


def review_table() -> str:
    """What the readings of the AI half changed (data/hexainst/review.json), and the faults of a
    random sample.
    """
    tallies = dataset.tallies()
    points = list(tallies[0]["by_point"])
    rows = [["reading", "category", "rows read", "changed", "of these replaced", *points]]
    for t in tallies:
        said = map(t.get, ("reading", "category", "read", "changed", "replaced"))
        rows.append([*map(str, said), *map(str, t["by_point"].values())])
    drawn, faulty = (
        sum(len(t["sample"][key]) for t in tallies if "sample" in t) for key in ("drawn", "faulty")
    )
    low, high = proportion_confint(faulty, drawn, method="wilson")
    return findings.rows_of(rows) + (
        f"\n\nOf {drawn} rows drawn at random for the second reading, {faulty} had a fault: "
        f"{faulty / drawn:.1%} (95 % interval {low:.1%} to {high:.1%}); by category "
        + ", ".join(
            f"{t['category']} {len(t['sample']['faulty'])}" for t in tallies if "sample" in t
        )
        + "."
    )


def publish(profile: str) -> Path:
    """Copy a run's ledger and summary, which hold no text of others, to data/published/<profile>:
    every test, every verdict, every headline number. The folder, written whole or not at all; its
    summary holds the tables' sha256, and a digest of itself. What the whole chain and each of its
    notebooks took, and the tables of tunings, are kept where a run of some notebooks does not say
    it.

    Raises RecordMismatch for a run of other settings than the profile's, DamagedFile for tables
    that are not those of the run's summary.
    """
    folder, results = DATA / "published" / checked(profile, "profile"), results_dir(profile)
    path, summary = folder / "summary.json", read_record(results / "summary.json", {"pairs": dict})
    refuse_other(summary, load_profile(profile), results / "summary.json")
    named = zip(findings.PUBLISHED, RUN, strict=True)
    tables = {name: pd.read_csv(verified(results, own)) for name, own in named}
    summary.pop("settings", None)
    with atomic_folder(folder) as draft:
        if "wall_seconds" not in summary and path.is_file():
            before = findings.summary(folder)
            summary |= {name: before[name] for name in WHOLE if name in before}
            if "seconds" in before:
                summary["seconds"] = before["seconds"] | summary.get("seconds", {})
        for name in findings.TUNED:
            if (results / name).is_file():
                tables[name] = pd.read_csv(results / name)
            elif (folder / name).is_file():
                (tables[name],) = findings.read(folder, name)
        for name, table in tables.items():
            write_table(draft / name, table)
        summary["tables"] = {name: sha256(draft / name) for name in tables}
        write_json(draft / "summary.json", sealed(summary))
    return folder


def pages() -> dict[Path, str]:
    """README and data sheet with their generated blocks made anew from what is published: {path:
    text}. Nothing is written.
    """
    readme, sheet = ROOT / "README.md", DATA / "README.md"
    whole = [path.parent for path in (DATA / "published").glob("[!.]*/summary.json")]
    folders = sorted(whole, key=lambda folder: (folder.name == "tiny", folder))
    shown = [folder for folder in folders if folder.name in SHOWN]
    blocks = {
        "tunings": findings.tunings(DATA / "published" / "tiny"),
        "cost": cost(*(findings.summary(DATA / "published" / name) for name in SHOWN[::-1])),
        "claims": findings.claims_table(shown),
        "compared": findings.compared(folders),
        "findings": findings.answers(shown),
        "brief": findings.in_brief(shown),
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
