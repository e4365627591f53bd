"""Figures of frequencies and sets."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from ..hexainst.schema import CATEGORIES
from .style import COLOURS, MARKERS, NULL, heat_map, panels_of


def frequencies(table: pd.DataFrame) -> Figure:
    """Activation-frequency distribution; columns pair, model, p, share; `model` = "null" is drawn
    grey and dashed.
    """
    fig, panels = panels_of(table, "pair", (4.6, 3.4), sharey=True)
    for ax, pair in panels:
        for i, (model, part) in enumerate(
            table[table["pair"] == pair].groupby("model", sort=False)
        ):
            style = (
                NULL
                if model.startswith("null")
                else {"color": list(COLOURS.values())[i], "linewidth": 2}
            )
            ax.plot(part["p"], part["share"], label=model, drawstyle="steps-mid", **style)
        ax.set(title=pair, xlabel="activation frequency p", yscale="log")
    panels[0][0].set_ylabel("share of (instruction, neuron) cells")
    panels[-1][0].legend(frameon=False)
    return fig


def layer_share(table: pd.DataFrame, null: str) -> Figure:
    """Share of each layer's components in the set; columns pair, category, layer, share, null
    (label: `null`).

    Rows whose category is none of the six (the base, an untrained twin) are drawn grey and dotted.
    """
    fig, panels = panels_of(table, "pair", (4.4, 3.4), sharey=True)
    for ax, pair in panels:
        part = table[table["pair"] == pair]
        for category in CATEGORIES:
            line = part[part["category"] == category]
            ax.plot(
                line["layer"],
                line["share"],
                color=COLOURS[category],
                marker=MARKERS[category],
                label=category,
            )
        for other, line in part[~part["category"].isin(CATEGORIES)].groupby("category", sort=False):
            ax.plot(
                line["layer"],
                line["share"],
                label=other,
                color="0.3",
                linestyle=":",
                marker="x" if "twin" in other else ".",
            )
        floor = part.drop_duplicates("layer").sort_values("layer")
        ax.plot(floor["layer"], floor["null"], label=null, **NULL)
        ax.set(title=pair, xlabel="layer")
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0][0].set_ylabel("share of the layer in the set")
    panels[-1][0].legend(frameon=False, fontsize=8)
    return fig


def sweep(table: pd.DataFrame, x: str, value: str, null: str, panel: str = "pair") -> Figure:
    """A statistic along a sweep, beside its null; columns `panel`, line, `x`, `value`, `null`."""
    fig, panels = panels_of(table, panel, (4.4, 3.4), sharey=True)
    for ax, name in panels:
        for i, (line, part) in enumerate(table[table[panel] == name].groupby("line", sort=False)):
            colour = list(COLOURS.values())[i]
            ax.plot(part[x], part[value], color=colour, marker="osD^"[i % 4], label=str(line))
            ax.plot(
                part[x], part[null], color=colour, linestyle="--", alpha=0.6, label=f"{line}: null"
            )
        ax.set(title=name, xlabel=x)
    panels[0][0].set_ylabel(value)
    panels[-1][0].legend(frameon=False, fontsize=8)
    return fig


def routing(table: pd.DataFrame, uniform: float) -> Figure:
    """Routing per layer; columns layer, category, expert, f, own (f minus the mean of the
    categories).

    Left: f, white = the balanced router's K/E. Right: own, white = the null of a router that
    ignores the category.
    """
    layers, few = list(pd.unique(table["layer"])), table["expert"].nunique() <= 16
    fig, grid = plt.subplots(len(layers), 2, figsize=(10, 2.6 * len(layers)), squeeze=False)
    for column, (value, white, title) in enumerate(
        (
            ("f", uniform, f"f; white: K/E = {uniform:.2f}"),
            ("own", 0.0, "f - mean of categories; white: null"),
        )
    ):
        reach = float((table[value] - white).abs().max())
        for ax, layer in zip(grid[:, column], layers, strict=True):
            norm = {"vmin": white - reach, "vmax": white + reach}
            heat_map(
                ax,
                table[table["layer"] == layer],
                "category",
                "expert",
                value,
                "PuOr_r",
                norm,
                few,
                ".2f",
            )
            ax.set(title=f"layer {layer}: {title}", ylabel="")
            ax.collections[0].colorbar.ax.set_ylim(0 if white else -reach, white + reach)
    return fig
