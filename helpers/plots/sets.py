"""Figures of frequencies and sets."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    NULL,
    PAGE,
    PALETTE,
    SMALLEST,
    colours,
    heat_map,
    label_left,
    legend_below,
    markers,
    panels,
    whole_numbers,
)


def frequencies(table: pd.DataFrame) -> Figure:
    """Distribution of the activation frequency; columns pair, model, p, share, n (cells).

    A `model` that begins with "null" is drawn grey and dashed.
    """
    fig, drawn = panels(table, "pair", (4.6, 3.4), sharey=True)
    models = [model for model in pd.unique(table["model"]) if not model.startswith("null")]
    for ax, pair, part in drawn:
        for model, line in part.groupby("model", sort=False):
            own = {"color": colours(models).get(model), "marker": markers(models).get(model)}
            own |= {"linewidth": 2, "markersize": 4}
            look = NULL if model.startswith("null") else own
            ax.plot(line["p"], line["share"], label=model, drawstyle="steps-mid", **look)
        ax.set_yscale("log")
        title = f"{pair} (n = {part['n'].iloc[0]:,} cells)"
        ax.set(title=title, xlabel="activation frequency p")
    bottom = min(0.3 / table["n"].max(), 0.1)  # a share below one cell cannot be seen
    drawn[0][0].set_ylim(bottom=bottom)  # after all panels: it ends the search for the shared top
    label_left(drawn, "share of (instruction, neuron) cells")
    legend_below(fig, drawn)
    return fig


def layer_share(table: pd.DataFrame, null: str) -> Figure:
    """Share of each layer's components in the set; columns pair, category, layer, share, null, n
    (rows).

    `null` is the label of the column of that name. Rows marked in a column `other` (the base, an
    untrained twin) are drawn grey and dotted. Columns low and high, where given, are bands.
    """
    fig, drawn = panels(table, "pair", (4.6, 3.6), sharey=True)
    own = list(pd.unique(table.loc[~table["other"], "category"]))
    for ax, pair, part in drawn:
        for category, line in part.groupby("category", sort=False):
            if category in own:
                look = {"color": colours(own)[category], "marker": markers(own)[category]}
            else:
                look = {
                    "color": "0.3",
                    "linestyle": ":",
                    "marker": "x" if "twin" in category else ".",
                }
            ax.plot(line["layer"], line["share"], label=category, **look)
            if "low" in line:
                band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
                ax.fill_between(line["layer"], line["low"], line["high"], **band)
        floor = part.drop_duplicates("layer").sort_values("layer")
        ax.plot(floor["layer"], floor["null"], label=null, **NULL)
        ax.set(title=f"{pair} (n = {part['n'].min()} a category)", xlabel="layer")
        whole_numbers(ax)
    label_left(drawn, "share of the layer in the set")
    legend_below(fig, drawn)
    return fig


def sweep(table: pd.DataFrame, x: str, value: str, null: str, panel: str = "pair") -> Figure:
    """A statistic along a sweep, beside its null; columns `panel`, line, `x`, `value`, `null`."""
    fig, drawn = panels(table, panel, (4.4, 3.4), sharey=True)
    for ax, name, part in drawn:
        for i, (line, values) in enumerate(part.groupby("line", sort=False)):
            own = {"color": PALETTE[i], "marker": "osD^"[i % 4], "label": str(line)}
            ax.plot(values[x], values[value], **own)
            dashed = {"color": PALETTE[i], "linestyle": "--", "alpha": 0.6}
            ax.plot(values[x], values[null], label=f"{line}: null", **dashed)
        ax.set(title=name, xlabel=x)
    label_left(drawn, value)
    drawn[-1][0].legend(frameon=False, fontsize=SMALLEST)
    return fig


def routing(table: pd.DataFrame, most: int = 6) -> Figure:
    """What is a category's own in the routing; columns model, layer, category, expert, own (f minus
    the mean of the categories), n. A column of panels per model, one scale; at most `most` layers.

    White is the null, a router that ignores the category.
    """
    every, models = list(pd.unique(table["layer"])), list(pd.unique(table["model"]))
    step = max(1, -(-(len(every) - 1) // max(most - 1, 1)))
    layers, few = every[::step], table["expert"].nunique() * len(models) <= 16
    size = min(5.2 * len(models), PAGE), 2.5 * len(layers)
    fig, grid = plt.subplots(len(layers), len(models), figsize=size, squeeze=False)
    reach = float(table["own"].abs().max())
    look = {"cmap": "PuOr_r", "vmin": -reach, "vmax": reach, "annot": few, "fmt": "z.2f"}
    for row, layer in zip(grid, layers, strict=True):
        for ax, model in zip(row, models, strict=True):
            part = table[(table["layer"] == layer) & (table["model"] == model)]
            heat_map(ax, part, "category", "expert", "own", cbar=ax is row[-1], **look)
            ax.set(title=f"layer {layer}: {model}", ylabel="")
    fig.suptitle(f"f minus the mean of the categories (white: null; n = {table['n'].max()} rows)")
    return fig
