"""Figures of the public face's tables: sets of labels, and what ablating them costs."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..study.own import noted, refuse_table
from .style import NULL, PAGE, PALETTE, SMALLEST, entry, error_bars, heat_map, legend_below

ANNOTATED = 8  # labels or layers up to which a map's cells hold their numbers
KINDS = {"random": "o", "rate": "s", "magnitude": "D"}


def draw_sets(table: pd.DataFrame) -> Figure:
    """Where each label's neurons stand, of a table of `find_sets`: a row per label (n neurons), a
    column per layer, the share of the label's set that lies there. The white line of the scale is
    the null, as many in every layer.

    >>> table = {"label": ["a", "a", "b"], "layer": [0, 1, 1], "neuron": [3, 4, 4]}
    >>> draw_sets(pd.DataFrame(table)).axes[0].get_xlabel()
    'layer'
    """
    refuse_table(table, ("label", "layer", "neuron"), "find_sets")
    code, names = pd.factorize(table["label"])
    layers = np.sort(table["layer"].unique())
    grid = pd.crosstab(code, table["layer"].to_numpy(), normalize="index")
    long = grid.rename_axis(index="label", columns="layer").stack()
    long = long.rename("share of the set").reset_index()
    size = min(3.6 + 0.5 * len(layers), PAGE), 1.6 + 0.34 * len(grid)
    fig, ax = plt.subplots(figsize=size)
    few = max(grid.shape) <= ANNOTATED
    look = {"vmin": 0, "cmap": "cividis", "annot": few, "fmt": ".0%"}
    heat_map(ax, long, "label", "layer", "share of the set", **look)
    ax.set(title="where the sets stand", ylabel="")
    said = [f"{name} (n = {n})" for name, n in zip(names, np.bincount(code), strict=True)]
    ax.set_yticks(np.arange(len(said)) + 0.5, said)
    scale = ax.collections[0].colorbar.ax
    scale.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    scale.axhline(1 / len(layers), color="white")
    scale.set_ylabel(f"share of the set\n(white: null, {1 / len(layers):.0%})")
    return fig


def draw_ablation(table: pd.DataFrame) -> Figure:
    """What ablations cost, of a table of `ablation_table`. Left, every label's own set: increase of
    its loss (filled where the interval of what is beyond the hardest control lies above 0 and
    Holm's p below 0.05), that interval around it, and the control sets, grey. Right (of many labels
    below), every set on every label's texts, random sets of the same layers taken off.
    """
    table = noted(table)
    labels = list(pd.unique(table["measured"]))
    longest = max(len(str(name)) for name in labels)
    turned = longest > 7  # letters: a column is no wider
    width, height = 3.6 + 0.5 * min(len(labels), 11), max(1.9 + 0.36 * len(labels), 3.2)
    height += 0.08 * longest * turned
    beside = len(labels) <= 5  # else the right one below the left
    size = (min(3.9 + width, PAGE), height) if beside else (width, 2 * height)
    fig, (left, right) = plt.subplots(*((1, 2) if beside else (2, 1)), figsize=size)
    own = table[table["ablated"] == table["measured"]].reset_index(drop=True)
    for row in own.itertuples():
        _own_effect(left, row)
    left.axvline(0, color="0.85", linewidth=0.8, zorder=0)
    left.set_yticks(range(len(own)), [f"{row.measured} (n = {row.n})" for row in own.itertuples()])
    left.set_ylim(len(own) - 0.5, -0.5)
    left.set(title="own set", xlabel="increase of loss, nats per token")
    beyond = table.assign(beyond=table["increase"] - table["random"])
    most = float(beyond["beyond"].abs().max()) or 1.0
    look = {"vmin": -most, "vmax": most, "cmap": "PuOr_r", "fmt": "z.2f"}
    look["annot"] = len(labels) <= ANNOTATED
    heat_map(right, beyond, "ablated", "measured", "beyond", **look)
    right.tick_params(axis="x", rotation=90 * turned)
    right.set(title="increase minus random control", xlabel="measured on", ylabel="set ablated of")
    kinds = [kind for kind in KINDS if kind in own and own[kind].notna().any()]
    handles = [entry("own set, 95 % interval", marker="o", color=PALETTE[0])]
    open_ = {"marker": "o", "color": PALETTE[0], "markerfacecolor": "white"}
    handles.append(entry("not supported", **open_))
    grey = {"color": NULL["color"], "linestyle": "", "markersize": 5}
    handles += [entry(f"null: {kind}", marker=KINDS[kind], **grey) for kind in kinds]
    legend_below(fig, [], 5, handles)
    return fig


def _own_effect(ax, row) -> None:
    """One label's line: controls, increase, and the interval of what is beyond the hardest."""
    at, colour = row.Index, PALETTE[0]
    for kind, marker in KINDS.items():
        value = getattr(row, kind, np.nan)
        ax.plot(value, at, marker=marker, color=NULL["color"], markersize=5, linestyle="")
    if row.note:
        ax.annotate(" not testable", (row.increase, at), va="center", fontsize=SMALLEST)
    held = not row.note and row.low > 0 and row.holm < 0.05
    bar = error_bars(*(pd.Series([v]) for v in (row.low, row.effect, row.high)))
    look = {"color": colour, "markerfacecolor": colour if held else "white", "zorder": 3}
    ax.errorbar(row.increase, at, xerr=None if row.note else bar, fmt="o", **look)
