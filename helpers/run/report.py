"""What the repository says of itself: the generated blocks of README and data sheets."""

import re
from pathlib import Path

import pandas as pd
from statsmodels.stats.proportion import proportion_confint

from ..paths import CLAIMS, DATA, HEXAINST, ROOT, short
from ..record import UserError, read_json


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


def cost(summary: dict) -> str:
    """A sentence: what a run of the chain took."""
    minutes, memory = summary["wall_seconds"] / 60, summary["peak_rss_mb"] / 1024
    return (
        f"`make reproduce` took {minutes:.0f} minutes on two cores without a GPU, the environment "
        f"set up before; its largest process held {memory:.1f} GB."
    )


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


def claims_table(verdicts: dict[str, str], tests: pd.DataFrame, source: str) -> str:
    """A Markdown row per claim and unit of a source: claim, verdict, each pair's first test (all
    data, or one half).
    """
    ledger = pd.read_csv(CLAIMS)
    ledger, pairs = ledger[ledger["source"] == source], list(pd.unique(tests["pair"]))
    first = tests.drop_duplicates(["id", "unit", "pair"]).set_index(["id", "unit", "pair"])
    cells = {
        key: f"{t.effect:.3f} [{t.low:.3f}, {t.high:.3f}] / {t.null:.3f}"
        for key, t in first.iterrows()
    }
    lines = [
        "| claim | unit | verdict | "
        + " | ".join(f"{pair}: effect [95 % CI] / null" for pair in pairs)
        + " |",
        "|---|---|---|" + "---|" * len(pairs),
    ]
    for row in ledger.itertuples():
        for n, unit in enumerate(row.units.split()):
            found = " | ".join(cells.get((row.id, unit, pair), "-") for pair in pairs)
            claim = "as above" if n else row.claim
            lines.append(f"| {claim} | {unit} | **{verdicts[f'{row.id}.{unit}']}** | {found} |")
    return "\n".join(lines)


def pages(results: Path) -> dict[Path, str]:
    """README and data sheet with their generated blocks made anew from a run's `results`: {path:
    text}. Nothing is written.
    """
    summary, tests = read_json(results / "summary.json"), pd.read_csv(results / "claims.csv")
    readme, sheet = ROOT / "README.md", DATA / "README.md"
    blocks = {
        "cost": cost(summary),
        "claims": claims_table(summary["claims"], tests, "paper"),
        "claims-ours": claims_table(summary["claims"], tests, "ours"),
    }
    return {readme: fill(readme, blocks), sheet: fill(sheet, {"review": review_table()})}
