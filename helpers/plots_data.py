"""Figures of the data set itself."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.hexainst import CATEGORIES
from helpers.plots import NULL


def subset_lengths(table: pd.DataFrame) -> Figure:
    """Tokens per instruction before and after matching, a panel per half; columns half, subset, category, tokens."""
    halves = list(pd.unique(table["half"]))
    fig, grid = plt.subplots(1, len(halves), figsize=(7.6 if len(halves) == 1 else 5.4 * len(halves), 3.4), sharey=True,
                             squeeze=False)
    for ax, half in zip(grid.flat, halves, strict=True):
        part = table[table["half"] == half]
        sns.boxplot(part, x="category", y="tokens", hue="subset", order=CATEGORIES, ax=ax, fliersize=2, linewidth=1,
                    width=0.7, palette=["0.8", "#56B4E9"], legend=half == halves[-1])
        ax.axhline(part["tokens"].median(), **NULL)
        ax.set(xlabel="", ylabel="tokens per instruction", title=f"{half} half (dashed: median of both)")
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title="")
    return fig
