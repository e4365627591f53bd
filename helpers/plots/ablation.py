"""Figures of what ablations do."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..config import SCORES
from ..hexainst.schema import CATEGORIES
from .style import COLOURS, MARKERS, NULL, panels_of

SCORE_COLOURS = dict(
    zip(SCORES, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7"), strict=True)
)


def dose(table: pd.DataFrame) -> Figure:
    """Damage against the share ablated; columns pair, line, share, increase, low, high. Lines that
    begin with "null" are grey and dashed.
    """
    fig, panels = panels_of(table, "pair", (4.8, 3.6), sharey=True)
    for ax, pair in panels:
        nulls = 0
        for line, part in table[table["pair"] == pair].groupby("line", sort=False):
            if line.startswith("null"):
                style = NULL | {"linestyle": ("--", ":", "-.")[nulls % 3]}
                ax.plot(part["share"], part["increase"], label=line, **style)
                nulls += 1
                continue
            colour = SCORE_COLOURS[line]
            ax.fill_between(
                part["share"], part["low"], part["high"], color=colour, alpha=0.2, linewidth=0
            )
            ax.plot(part["share"], part["increase"], color=colour, marker="o", label=line)
        shares = sorted(table["share"].unique())
        ax.set_xscale("log", base=2)
        ax.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
        ax.minorticks_off()
        ax.set(title=pair, xlabel="share of the neurons ablated")
    panels[0][0].set_ylabel("own category: increase of\nloss, nats per token")
    handles, names = panels[0][0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return fig


def league(table: pd.DataFrame) -> Figure:
    """Scores by what their sets do beyond the hardest control; columns pair, score, size,
    critical, critical_low, critical_high, sees_reference. Shades: sizes.
    """
    fig, panels = panels_of(table, "pair", (5.0, 4.0), sharey=True, sharex=True)
    sizes, scores = sorted(table["size"].unique()), list(pd.unique(table["score"]))
    shades = plt.cm.viridis(np.linspace(0.9, 0.05, len(sizes)))
    marks = table.drop_duplicates("score").set_index("score")["sees_reference"]
    for ax, pair in panels:
        for s, (size, shade) in enumerate(zip(sizes, shades, strict=True)):
            part = table[(table["pair"] == pair) & (table["size"] == size)].set_index("score")
            y = np.array([scores.index(score) for score in part.index]) + 0.62 * (
                s / max(len(sizes) - 1, 1) - 0.5
            )
            bars = [
                part["critical"] - part["critical_low"],
                part["critical_high"] - part["critical"],
            ]
            ax.errorbar(
                part["critical"],
                y,
                xerr=np.clip(bars, 0, None),
                fmt="o",
                markersize=4,
                color=shade,
                linewidth=1.4,
                label=f"{size:.0%}",
            )
        ax.axvline(0, **NULL)
        ax.set(title=pair, xlabel="own effect - hardest control (95 % CI)")
        ax.set_yticks(
            range(len(scores)), [f"{score} *" if marks[score] else score for score in scores]
        )
        ax.set_ylim(len(scores) - 0.4, -0.6)
    fig.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(sizes),
        frameon=False,
        title="share ablated.  Grey: null.  * has seen references of the choosing half",
        title_fontsize=8,
        fontsize=8,
    )
    return fig


def damage(table: pd.DataFrame) -> Figure:
    """General against specific damage, a point per category's set; columns pair, score, category,
    plain, own; `score` "null: random" in grey.
    """
    fig, panels = panels_of(table, "pair", (4.8, 3.9))
    for ax, pair in panels:
        for score, part in table[table["pair"] == pair].groupby("score", sort=False):
            null = score.startswith("null")
            style = (
                {"s": 18, "alpha": 0.45, "zorder": 1}
                if null
                else {"s": 34, "alpha": 0.9, "zorder": 2}
            )
            for category, point in part.groupby("category"):
                ax.scatter(
                    point["plain"],
                    point["own"],
                    marker=MARKERS[category],
                    linewidths=0,
                    **style,
                    color=NULL["color"] if null else SCORE_COLOURS[score],
                )
        ax.axline((0, 0), slope=1, **NULL)
        ax.set(title=pair, xlabel="general: increase of plain text's loss")
    panels[0][0].set_ylabel("specific: increase of the\nown category's loss")
    dots = {"marker": "o", "linestyle": ""}
    handles = [
        plt.Line2D([], [], color=SCORE_COLOURS.get(score, NULL["color"]), label=score, **dots)
        for score in pd.unique(table["score"])
    ]
    handles += [
        plt.Line2D([], [], marker=MARKERS[c], linestyle="", color="0.2", label=c)
        for c in CATEGORIES
    ]
    handles += [plt.Line2D([], [], label="as much damage to any text", **NULL)]
    fig.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return fig


def agreement(table: pd.DataFrame) -> Figure:
    """Do seeds and halves agree? A point per pair and half; columns pair, half, score, critical,
    critical_low, critical_high, supported (filled) or not (hollow).
    """
    scores, pairs, halves = (list(pd.unique(table[name])) for name in ("score", "pair", "half"))
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.75 * len(scores)))
    lanes = [(pair, half) for pair in pairs for half in halves]
    for row in table.itertuples():
        y = scores.index(row.score) + 0.72 * (
            lanes.index((row.pair, row.half)) / max(len(lanes) - 1, 1) - 0.5
        )
        colour = list(COLOURS.values())[pairs.index(row.pair)]
        ax.plot([row.critical_low, row.critical_high], [y, y], color=colour, linewidth=1.3)
        ax.plot(
            row.critical,
            y,
            marker="osD^"[halves.index(row.half) % 4],
            color=colour,
            markersize=5,
            markerfacecolor=colour if row.supported else "white",
        )
    for y in range(1, len(scores)):
        ax.axhline(y - 0.5, color="0.9", linewidth=0.8)
    ax.axvline(0, **NULL)
    ax.set(
        xlabel="own effect - hardest control, nats per reference token (95 % CI)",
        ylim=(len(scores) - 0.45, -0.55),
    )
    ax.set_yticks(range(len(scores)), scores)
    handles = [
        plt.Line2D([], [], color=colour, linewidth=3, label=pair)
        for pair, colour in zip(pairs, COLOURS.values(), strict=False)
    ]
    handles += [
        plt.Line2D(
            [], [], marker="osD^"[i % 4], color="0.2", linestyle="", label=f"measured on {half}"
        )
        for i, half in enumerate(halves)
    ]
    hollow = {"marker": "o", "color": "0.2", "markerfacecolor": "white", "linestyle": ""}
    handles += [
        plt.Line2D([], [], label="not supported", **hollow),
        plt.Line2D([], [], label="null", **NULL),
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return fig


def bars(table: pd.DataFrame) -> Figure:
    """The explorer without its selectors: a panel per score, columns pair, score, ablated,
    measured, beyond.
    """
    pairs, scores = (list(pd.unique(table[name])) for name in ("pair", "score"))
    fig, grid = plt.subplots(
        len(pairs),
        len(scores),
        figsize=(2.9 * len(scores), 2.5 * len(pairs)),
        squeeze=False,
        sharey="row",
    )
    for (p, pair), (s, score) in ((a, b) for a in enumerate(pairs) for b in enumerate(scores)):
        ax, part = grid[p, s], table[(table["pair"] == pair) & (table["score"] == score)]
        for c, measured in enumerate(CATEGORIES):
            values = (
                part[part["measured"] == measured]
                .set_index("ablated")["beyond"]
                .reindex(CATEGORIES)
            )
            ax.bar(
                np.arange(len(CATEGORIES)) + 0.13 * (c - 2.5),
                values,
                0.12,
                color=COLOURS[measured],
                label=measured,
            )
        ax.axhline(0, **NULL)
        ax.set_xticks(range(len(CATEGORIES)), CATEGORIES, fontsize=7)
        ax.set_title(f"{pair}, {score}", fontsize=9)
    for row in grid:
        row[0].set_ylabel("effect - random", fontsize=9)
    for ax in grid[-1]:
        ax.set_xlabel("ablated set", fontsize=9)
    fig.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        title="category whose loss was measured",
        fontsize=8,
        title_fontsize=8,
    )
    return fig
