"""Figures of the data set itself."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import NULL, PALETTE, label_left, panels

BOXES = {"fliersize": 2, "linewidth": 1, "width": 0.7}


def lengths(table: pd.DataFrame) -> Figure:
    """Counted tokens per instruction; columns category, half, tokens."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    halves = list(pd.unique(table["half"]))
    look = BOXES | {"hue": "half", "hue_order": halves, "palette": list(PALETTE[: len(halves)])}
    sns.boxplot(table, x="category", y="tokens", ax=ax, **look)
    ax.axhline(table["tokens"].median(), **NULL, label="median of all")
    ax.set(xlabel="", ylabel="counted tokens per instruction")
    ax.legend(title="half", frameon=False, ncols=3)
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
        ax.set(xlabel="", title=f"{half} half (dashed: median of both)")
    label_left(drawn, "tokens per instruction")
    sns.move_legend(drawn[-1][0], "upper left", bbox_to_anchor=(1, 1), frameon=False, title="")
    return fig
