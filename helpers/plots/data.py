"""Figures of the data set itself."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..hexainst.schema import CATEGORIES
from .style import NULL


def lengths(table: pd.DataFrame) -> Figure:
    """Counted tokens per instruction; columns category, half, tokens."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    halves = list(pd.unique(table["half"]))
    sns.boxplot(
        table,
        x="category",
        y="tokens",
        hue="half",
        order=CATEGORIES,
        hue_order=halves,
        ax=ax,
        fliersize=2,
        palette=["#0072B2", "#E69F00"][: len(halves)],
        linewidth=1,
        width=0.7,
    )
    ax.axhline(table["tokens"].median(), **NULL, label="median of all")
    ax.set(xlabel="", ylabel="counted tokens per instruction")
    ax.legend(title="half", frameon=False, ncols=3)
    return fig


def subset_lengths(table: pd.DataFrame) -> Figure:
    """Tokens per instruction before and after matching, a panel per half; columns half, subset,
    category, tokens.
    """
    halves = list(pd.unique(table["half"]))
    fig, grid = plt.subplots(
        1,
        len(halves),
        figsize=(7.6 if len(halves) == 1 else 5.4 * len(halves), 3.4),
        sharey=True,
        squeeze=False,
    )
    for ax, half in zip(grid.flat, halves, strict=True):
        part = table[table["half"] == half]
        sns.boxplot(
            part,
            x="category",
            y="tokens",
            hue="subset",
            order=CATEGORIES,
            ax=ax,
            fliersize=2,
            linewidth=1,
            width=0.7,
            palette=["0.8", "#56B4E9"],
            legend=half == halves[-1],
        )
        ax.axhline(part["tokens"].median(), **NULL)
        ax.set(
            xlabel="",
            ylabel="tokens per instruction",
            title=f"{half} half (dashed: median of both)",
        )
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False, title="")
    return fig
