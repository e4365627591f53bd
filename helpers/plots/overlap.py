"""Figures of generality and uniqueness under their controls."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import COLOURS, NULL, panels_of


def membership(table: pd.DataFrame) -> Figure:
    """In how many categories a component stands; columns pair, number (1..6), share, null."""
    fig, panels = panels_of(table, "pair", (4.2, 3.3), sharey=True)
    for ax, pair in panels:
        part = table[table["pair"] == pair]
        ax.bar(part["number"], part["share"], color="#0072B2", label="observed")
        ax.plot(part["number"], part["null"], "D", color="0.45", label="null: labels permuted")
        ax.set(title=pair, xlabel="categories it serves")
    panels[0][0].set_ylabel("share of the components in any set")
    panels[-1][0].legend(frameon=False)
    return fig


def waterfall(table: pd.DataFrame) -> Figure:
    """What each control leaves of the gap; columns panel, step, half, left, low, high. The line at
    0: nothing.
    """
    steps, halves = (list(pd.unique(table[name])) for name in ("step", "half"))
    fig, panels = panels_of(table, "panel", (5.6, 3.4), 2, sharex=True)
    for ax, name in panels:
        for n, half in enumerate(halves):
            part = table[(table["panel"] == name) & (table["half"] == half)]
            x = (
                np.array([steps.index(step) for step in part["step"]])
                + (n - (len(halves) - 1) / 2) * 0.17
            )
            colour = list(COLOURS.values())[n]
            ax.errorbar(
                x,
                part["left"],
                [part["left"] - part["low"], part["high"] - part["left"]],
                fmt="osD^"[n % 4],
                color=colour,
                capsize=2,
                markersize=5,
                linewidth=1.3,
                label=half,
            )
            if n == 0:
                ax.bar(
                    x - (n - (len(halves) - 1) / 2) * 0.17,
                    part["left"],
                    width=0.8,
                    color="0.9",
                    zorder=0,
                )
        ax.axhline(0, label="null: nothing left", **NULL)
        ax.set_ylim(min(-0.06 * part["high"].max(), ax.get_ylim()[0]), None)
        ax.set(title=name, xticks=range(len(steps)))
        ax.set_xticklabels([step.replace(" ", "\n") for step in steps], fontsize=8)
        ax.tick_params(labelbottom=True)
        if ax.get_subplotspec().colspan.start == 0:
            ax.set_ylabel("gap that is left (95 % CI)")
    fig.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    return fig


def sensitivity(table: pd.DataFrame) -> Figure:
    """Heat maps over epsilon and tau; columns panel, epsilon, tau, value, null, components. Each
    cell: value, below it its null and of how many components; "no set" where no component is in
    any set.
    """
    fig, panels = panels_of(table, "panel", (5.2, 3.4), 2)
    most = (table["value"] - table["null"]).abs().max()
    for ax, name in panels:
        part = table[table["panel"] == name]
        grid, null, number = (
            part.pivot(index="tau", columns="epsilon", values=value)
            for value in ("value", "null", "components")
        )
        image = ax.imshow(
            grid - null, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto", origin="lower"
        )
        for y, x in np.ndindex(*grid.shape):
            excess = grid.iat[y, x] - null.iat[y, x]
            said = f"{grid.iat[y, x]:.2f}\nnull {null.iat[y, x]:.2f}\nof {number.iat[y, x]}"
            ax.text(
                x,
                y,
                said if number.iat[y, x] else "no set",
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if abs(excess) > 0.65 * most else "black",
            )
        ax.set(
            title=name,
            xlabel="epsilon",
            ylabel="tau",
            xticks=range(grid.shape[1]),
            yticks=range(grid.shape[0]),
        )
        ax.set_xticklabels(grid.columns)
        ax.set_yticklabels(grid.index)
        fig.colorbar(image, ax=ax, label="minus null")
    return fig


def layers(table: pd.DataFrame) -> Figure:
    """Shares of each layer's components; columns panel, kind, layer, share, null, low, high (95 %
    of the null), marked (a star: Benjamini-Hochberg over layers below 0.05).
    """
    fig, panels = panels_of(table, "panel", (4.3, 3.2), 2)
    colours, styles = (
        dict(zip(pd.unique(table["kind"]), values, strict=False))
        for values in (("#0072B2", "#D55E00"), ("--", ":"))
    )
    for ax, name in panels:
        for kind, part in table[table["panel"] == name].groupby("kind", sort=False):
            ax.plot(part["layer"], part["share"], color=colours[kind], marker="o", label=kind)
            ax.plot(part["layer"], part["null"], **NULL | {"linestyle": styles[kind]})
            ax.fill_between(
                part["layer"], part["low"], part["high"], color="0.6", alpha=0.35, linewidth=0
            )
            marked = part[part["marked"]]
            ax.plot(
                marked["layer"],
                marked["share"],
                "*",
                color=colours[kind],
                markersize=15,
                markeredgecolor="white",
            )
        ax.set(title=name, xlabel="layer", ylim=(0, None))
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        if ax.get_subplotspec().colspan.start == 0:
            ax.set_ylabel("share of the layer's components")
    handles, labels = panels[0][0].get_legend_handles_labels()
    handles += [plt.Line2D([], [], **NULL | {"linestyle": style}) for style in styles.values()]
    handles += [plt.Line2D([], [], marker="*", color="0.2", linestyle="", markersize=11)]
    labels += [f"null of {kind}: labels permuted (band: 95 %)" for kind in styles] + [
        "BH over layers < 0.05"
    ]
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return fig
