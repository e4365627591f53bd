"""Figures of the ledger of claims."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import NULL, PAGE, SMALLEST, colours, entry, error_bars, if_any, legend_below, markers


@if_any
def forest(table: pd.DataFrame) -> Figure:
    """Effect minus null with its 95 % interval, a panel per unit of measure, a row per claim.

    Columns claim (row), measure (panel), pair, effect, low, high, null, supported (filled marker)
    or not (hollow). Effects of different measures do not share an axis.
    """
    measures, pairs = list(pd.unique(table["measure"])), list(pd.unique(table["pair"]))
    heights = [table.loc[table["measure"] == m, "claim"].nunique() + 1 for m in measures]
    row = max(0.2, 0.1 * len(pairs))
    size = (PAGE, 0.9 + 0.4 * len(measures) + row * sum(heights))
    fig, grid = plt.subplots(len(measures), 1, figsize=size, height_ratios=heights, squeeze=False)
    for ax, measure in zip(grid.flat, measures, strict=True):
        part = table[table["measure"] == measure]
        claims = list(pd.unique(part["claim"]))
        for row in part.itertuples():
            lane = (pairs.index(row.pair) + 0.5) / len(pairs) - 0.5
            _interval(ax, row, claims.index(row.claim) + 0.7 * lane, pairs)
        ax.axvline(0, **NULL)
        ax.set(ylim=(len(claims) - 0.45, -0.55), xlabel=f"effect minus null, {measure}")
        ax.set_yticks(range(len(claims)), claims, fontsize=SMALLEST)
        ax.grid(axis="y", color="0.93")
    handles = [
        entry(pair, color=colours(pairs)[pair], marker=markers(pairs)[pair]) for pair in pairs
    ]
    handles += [
        entry(
            "not supported, or not in every category",
            color="0.2",
            marker="o",
            markerfacecolor="white",
        )
    ]
    handles += [entry("null", **NULL)]
    legend_below(fig, [], len(handles), handles)
    return fig


def _interval(ax, row, y, pairs) -> None:
    colour, hollow = colours(pairs)[row.pair], {} if row.supported else {"markerfacecolor": "white"}
    middle = pd.Series([row.effect - row.null])
    bars = error_bars(row.low - row.null, middle, row.high - row.null)
    look = {"fmt": markers(pairs)[row.pair], "color": colour, "markersize": 5, "linewidth": 1.4}
    ax.errorbar(middle, [y], xerr=bars, **look, **hollow)
