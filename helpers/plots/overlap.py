"""Figures of generality and uniqueness under their controls."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    NULL,
    PALETTE,
    SMALLEST,
    entry,
    error_bars,
    label_left,
    legend_below,
    panels,
    whole_numbers,
)


def membership(table: pd.DataFrame) -> Figure:
    """In how many categories a component stands; columns pair, number (1..C), share, null."""
    fig, drawn = panels(table, "pair", (4.2, 3.3), sharey=True)
    for ax, pair, part in drawn:
        ax.bar(part["number"], part["share"], color=PALETTE[0], label="observed")
        ax.plot(part["number"], part["null"], "D", color="0.45", label="null: labels permuted")
        ax.set(title=pair, xlabel="categories it serves")
        whole_numbers(ax)
    label_left(drawn, "share of the components in any set")
    drawn[-1][0].legend(frameon=False)
    return fig


def waterfall(table: pd.DataFrame) -> Figure:
    """What each control leaves of the gap; columns panel, step, half, left, low, high.

    The line at 0: nothing. Bars are the first half named in the table.
    """
    steps, halves = (list(pd.unique(table[name])) for name in ("step", "half"))
    fig, drawn = panels(table, "panel", (5.6, 3.4), 2, sharex=True)
    for ax, name, part in drawn:
        for n, half in enumerate(halves):
            line = part[part["half"] == half]
            place = np.array([steps.index(step) for step in line["step"]])
            bars = error_bars(line["low"], line["left"], line["high"])
            look = {"fmt": "osD^"[n % 4], "color": PALETTE[n], "capsize": 2, "markersize": 5}
            shift = (n - (len(halves) - 1) / 2) * 0.17
            ax.errorbar(place + shift, line["left"], bars, linewidth=1.3, label=half, **look)
            if n == 0:
                ax.bar(place, line["left"], width=0.8, color="0.9", zorder=0)
        ax.axhline(0, label="null: nothing left", **NULL)
        ax.set_ylim(min(-0.06 * part["high"].max(), ax.get_ylim()[0]), None)
        ax.set(title=name, xticks=range(len(steps)))
        ax.set_xticklabels([step.replace(" ", "\n") for step in steps], fontsize=SMALLEST)
        ax.tick_params(labelbottom=True)
    label_left(drawn, "gap that is left (95 % CI)")
    legend_below(fig, drawn, 5)
    return fig


def sensitivity(table: pd.DataFrame) -> Figure:
    """Heat maps over epsilon and tau; columns panel, epsilon, tau, value, null, components.

    Each cell: value, below it its null and of how many components; "no set" where no component is
    in any set.
    """
    fig, drawn = panels(table, "panel", (6.4, 3.8), 2)
    most = (table["value"] - table["null"]).abs().max()
    for ax, name, part in drawn:
        grid, null, number = (
            part.pivot(index="tau", columns="epsilon", values=value)
            for value in ("value", "null", "components")
        )
        look = {"cmap": "PuOr_r", "vmin": -most, "vmax": most, "aspect": "auto", "origin": "lower"}
        image = ax.imshow(grid - null, **look)
        for y, x in np.ndindex(*grid.shape):
            dark = abs(grid.iat[y, x] - null.iat[y, x]) > 0.65 * most
            said = f"{grid.iat[y, x]:.2f}\nnull {null.iat[y, x]:.2f}\nof {number.iat[y, x]}"
            look = {"ha": "center", "va": "center", "fontsize": SMALLEST}
            text = said if number.iat[y, x] else "no set"
            ax.text(x, y, text, color="white" if dark else "black", **look)
        ax.set(title=name, xlabel="epsilon", ylabel="tau")
        ax.set_xticks(range(grid.shape[1]), grid.columns)
        ax.set_yticks(range(grid.shape[0]), grid.index)
        fig.colorbar(image, ax=ax, label="minus null")
    return fig


def layers(table: pd.DataFrame) -> Figure:
    """Shares of each layer's components; columns panel, kind, layer, share, null, low, high (95 %
    of the null), marked (a star: Benjamini-Hochberg over layers below 0.05).
    """
    fig, drawn = panels(table, "panel", (4.3, 3.2), 2)
    kinds = pd.unique(table["kind"])
    colour = dict(zip(kinds, (PALETTE[0], PALETTE[4]), strict=False))
    dashes = {kind: NULL | {"linestyle": s} for kind, s in zip(kinds, ("--", ":"), strict=False)}
    for ax, name, part in drawn:
        for kind, line in part.groupby("kind", sort=False):
            ax.plot(line["layer"], line["share"], color=colour[kind], marker="o", label=kind)
            ax.plot(line["layer"], line["null"], **dashes[kind])
            band = {"color": "0.6", "alpha": 0.35, "linewidth": 0}
            ax.fill_between(line["layer"], line["low"], line["high"], **band)
            marked = line[line["marked"]]
            star = {"color": colour[kind], "markersize": 12, "markeredgecolor": "white"}
            ax.plot(marked["layer"], marked["share"], "*", clip_on=False, zorder=5, **star)
        ax.set(title=name, xlabel="layer", ylim=(0, None))
        whole_numbers(ax)
    label_left(drawn, "share of the layer's components")
    handles = [
        entry(f"null of {kind}: labels permuted (band: 95 %)", **look)
        for kind, look in dashes.items()
    ]
    star = {"marker": "*", "color": "0.2", "linestyle": "", "markersize": 11}
    legend_below(fig, drawn, 3, [*handles, entry("BH over layers < 0.05", **star)])
    return fig
