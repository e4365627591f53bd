"""Figures of the ledger of claims."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from .style import VERDICTS


def claims(table: pd.DataFrame) -> Figure:
    """Verdicts; columns claim (row), where (column), verdict, text ("effect [CI] vs null")."""
    rows, columns = list(pd.unique(table["claim"])), list(pd.unique(table["where"]))
    fig, ax = plt.subplots(figsize=(2.9 + 1.75 * len(columns), 1.0 + 0.4 * len(rows)))
    for item in table.itertuples():
        x, y = columns.index(item.where), rows.index(item.claim)
        ax.add_patch(
            plt.Rectangle(
                (x, y), 1, 1, facecolor=VERDICTS[item.verdict], edgecolor="white", linewidth=2
            )
        )
        ax.text(x + 0.5, y + 0.5, item.text, ha="center", va="center", fontsize=7.5)
    ax.set(
        xlim=(0, len(columns)),
        ylim=(len(rows), 0),
        xticks=np.arange(len(columns)) + 0.5,
        yticks=np.arange(len(rows)) + 0.5,
    )
    ax.set_xticklabels(columns)
    ax.set_yticklabels(rows)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    used = {
        verdict: colour for verdict, colour in VERDICTS.items() if verdict in set(table["verdict"])
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in used.values()]
    fig.legend(
        handles,
        used,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title="each cell: effect [95 % CI] against its null",
    )
    return fig
