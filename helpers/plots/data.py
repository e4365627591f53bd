"""Figures of the data set itself."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import (
    NULL,
    PALETTE,
    SHAPES,
    SMALLEST,
    colours,
    entry,
    error_bars,
    label_left,
    legend_below,
    markers,
    panels,
    title,
)

BOXES = {"fliersize": 2, "linewidth": 1, "width": 0.7}


def lengths(table: pd.DataFrame) -> Figure:
    """Counted tokens per instruction; columns category, half, tokens."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    halves = list(pd.unique(table["half"]))
    look = BOXES | {"hue": "half", "hue_order": halves, "palette": list(PALETTE[: len(halves)])}
    sns.boxplot(table, x="category", y="tokens", ax=ax, **look)
    ax.axhline(table["tokens"].median(), **NULL, label="median of all")
    ax.set(xlabel="", ylabel="counted tokens per instruction")
    most = table.groupby(["category", "half"]).size().max()
    ax.legend(title=f"half (n = {most} rows a box)", frameon=False, ncols=3)
    return fig


def subset_lengths(table: pd.DataFrame) -> Figure:
    """Tokens per instruction before and after matching, a panel per half.

    Columns half, subset, category, tokens.
    """
    fig, drawn = panels(table, "half", (5.4, 3.4), sharey=True)
    look = BOXES | {"hue": "subset", "palette": ["0.8", "#56B4E9"]}
    for ax, half, part in drawn:
        last = half == drawn[-1][1]
        sns.boxplot(part, x="category", y="tokens", ax=ax, legend=last, **look)
        ax.axhline(part["tokens"].median(), **NULL)
        most = part.groupby(["subset", "category"]).size().groupby("subset").max()
        boxes = " or ".join(str(n) for n in sorted(set(most), reverse=True))
        said = f"half {half}\nn = {boxes} rows a box (dashed: median of both)"
        ax.set_title(said, fontsize=10)
        ax.set_xlabel("")
    label_left(drawn, "tokens per instruction")
    sns.move_legend(drawn[-1][0], "upper left", bbox_to_anchor=(1, 1), frameon=False, title="")
    return fig


def lexical(table: pd.DataFrame) -> Figure:
    """How often words alone tell a row's category, beside chance; columns set, category, right,
    low, high, chance, n (rows of the set's category).
    """
    names, sets = list(pd.unique(table["category"])), list(pd.unique(table["set"]))
    fig, ax = plt.subplots(figsize=(9, 3.8))
    for i, (name, own) in enumerate(table.groupby("set", sort=False)):
        x = [names.index(c) + 0.7 * ((i + 0.5) / len(sets) - 0.5) for c in own["category"]]
        look = {"color": colours(sets)[name], "marker": markers(sets)[name], "linestyle": ""}
        bars = error_bars(own["low"], own["right"], own["high"])
        ends = dict.fromkeys((own["n"].min(), own["n"].max()))
        label = f"{name} (n = {' to '.join(map(str, ends))})"
        ax.errorbar(x, own["right"], bars, label=label, **look)
    for chance in pd.unique(table["chance"]):
        ax.axhline(chance, **NULL, label=f"null: chance, {chance:.2f}")
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="share guessed right from words", ylim=(0, 1.05))
    legend_below(fig, [(ax,)], most=3)
    return fig


MEASURED = {
    "strict": "share of answers that are right",
    "first": "share of rows: right one likeliest",
    "gain": "instruction gain, nats per token",
}


def ability(table: pd.DataFrame) -> Figure:
    """What models can do, a panel per pair and measure; columns pair, model, half, category,
    measure (of MEASURED), value, low, high, null.

    Colours are models, markers halves; a grey dash is the null of its category.
    """
    table = table[table["measure"].isin(MEASURED)]
    table = table.assign(panel=table["pair"] + ": " + table["measure"])
    names, models = list(pd.unique(table["category"])), colours(pd.unique(table["model"]))
    shapes = dict(zip(pd.unique(table["half"]), SHAPES, strict=False))
    lines = [(model, half) for model in models for half in shapes]
    fig, drawn = panels(table, "panel", (4.4, 3.3))
    for ax, panel, part in drawn:
        nulls = part.groupby("category", sort=False)["null"].mean()
        at = [names.index(name) for name in nulls.index]
        ax.hlines(nulls, [x - 0.4 for x in at], [x + 0.4 for x in at], **NULL)
        for (model, half), own in part.groupby(["model", "half"], sort=False):
            shift = (lines.index((model, half)) + 0.5) / len(lines) - 0.5
            x = [names.index(name) + 0.7 * shift for name in own["category"]]
            look = {"color": models[model], "marker": shapes[half], "linestyle": "", "ms": 5}
            bars = error_bars(own["low"], own["value"], own["high"])
            ax.errorbar(x, own["value"], bars, label=f"{model}, half {half}", **look)
        turned = 90 if len(names) > 6 else 0
        ax.set_xticks(range(len(names)), names, rotation=turned, fontsize=SMALLEST)
        measure = panel.rpartition(": ")[2]
        ax.set(title=title(panel.rpartition(": ")[0], part), ylabel=MEASURED[measure])
    legend_below(fig, drawn, handles=[entry("null: 0, or candidates drawn", **NULL)])
    return fig
