"""Figures of what fine-tuning changes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    NULL,
    PALETTE,
    SMALLEST,
    colours,
    label_left,
    legend_below,
    markers,
    panels,
    whole_numbers,
)

FATE = {"kept": PALETTE[0], "gained": PALETTE[2], "lost": PALETTE[4]}
SIDE = 0.12  # width of the columns of `flow`


def _panels(table, size, **axes):
    return panels(table, "panel", size, 2 if table["panel"].nunique() > 3 else 3, **axes)


def layers(table: pd.DataFrame) -> Figure:
    """Similarity of base and tuned per layer beside the noise floor; columns panel, layer,
    similarity, low, high, floor, beyond (bool: below the floor after BH over layers; drawn as a
    filled marker).
    """
    fig, drawn = _panels(table, (4.3, 3.6), sharey=True)
    own = {"color": PALETTE[0]}
    for ax, name, part in drawn:
        ax.fill_between(part["layer"], part["low"], part["high"], alpha=0.2, **own)
        ax.plot(part["layer"], part["similarity"], label="base vs tuned (95 % CI)", **own)
        for beyond, face in ((True, PALETTE[0]), (False, "white")):
            some = part[part["beyond"] == beyond]
            said = "changed beyond the floor (BH)" if beyond else "not beyond the floor"
            look = own | {"markerfacecolor": face, "markersize": 8}
            label = said if len(some) else None
            ax.plot(some["layer"], some["similarity"], "o", label=label, **look)
        ax.plot(part["layer"], part["floor"], label="null: split-half noise floor", **NULL)
        ax.set(title=name, xlabel="layer", ylim=(0, 1.02))
        whole_numbers(ax)
    label_left(drawn, "similarity of components")
    legend_below(fig, drawn)
    return fig


def flow(table: pd.DataFrame) -> Figure:
    """Where an instruction's set goes, layer by layer: left column base, right column tuned, the
    band between them is kept. Columns panel, layer, kept, gained, lost (mean components of an
    instruction).
    """
    fig, drawn = _panels(table, (5.2, 4.2))
    for ax, name, part in drawn:
        gap = 0.06 * max(part[["kept", "lost"]].sum().sum(), part[["kept", "gained"]].sum().sum())
        left = right = 0.0
        for n, row in enumerate(part.sort_values("layer", ascending=False).itertuples()):
            _band(ax, row, left, right, named=n == 0)
            left, right = left + row.kept + row.lost + gap, right + row.kept + row.gained + gap
        ax.set(title=name, xlim=(-0.45, 1.35), ylim=(0, max(left, right)), yticks=[])
        ax.set_xticks([SIDE / 2, 1 - SIDE / 2], ["base", "tuned"])
        ax.spines[["left", "bottom"]].set_visible(False)
    legend_below(fig, drawn)
    return fig


def _band(ax, row, left, right, named) -> None:
    """One layer of `flow`, its columns from `left` and `right` upwards."""
    low, high = [left, right], [left + row.kept, right + row.kept]
    band = {
        "color": FATE["kept"],
        "alpha": 0.45,
        "linewidth": 0,
        "label": "kept" if named else None,
    }
    ax.fill_between([SIDE, 1 - SIDE], low, high, **band)
    for x, y, fate in ((0, left, "lost"), (1 - SIDE, right, "gained")):
        ax.add_patch(plt.Rectangle((x, y), SIDE, row.kept, color=FATE["kept"], linewidth=0))
        look = {"color": FATE[fate], "linewidth": 0, "label": fate if named else None}
        ax.add_patch(plt.Rectangle((x, y + row.kept), SIDE, getattr(row, fate), **look))
    text = {"va": "center", "fontsize": SMALLEST + 0.5}
    lost, gained = f"layer {row.layer}: {row.lost:.0f} lost", f"{row.gained:.0f} gained"
    ax.text(-0.02, left + (row.kept + row.lost) / 2, lost, ha="right", **text)
    ax.text(1.02, right + (row.kept + row.gained) / 2, gained, **text)
    ax.text(0.5, (left + right + row.kept) / 2, f"{row.kept:.0f} kept", ha="center", **text)


def weights(table: pd.DataFrame) -> Figure:
    """Change in frequency along change in weights, in bins of equal number per layer; columns
    panel, layer, weight (relative change), moved (mean |change of p or f|), components (of the
    bin; single ones are not joined).
    """
    fig, drawn = _panels(table, (4.0, 3.4))
    for ax, name, part in drawn:
        most = max(part["layer"].nunique() - 1, 1)
        for i, (layer, line) in enumerate(part.groupby("layer")):
            look = {"color": plt.cm.viridis(i / most * 0.85), "marker": "osD^vP"[i % 6]}
            look |= {"linestyle": "-" if line["components"].min() > 1 else "", "clip_on": False}
            ax.plot(line["weight"], line["moved"], label=f"layer {layer}", markersize=5, **look)
        ax.set(title=name, xlabel="relative change of its weights", ylim=(0, None))
    label_left(drawn, "mean |change of p| (of f)")
    legend_below(fig, drawn, 8)
    return fig


def transplant(table: pd.DataFrame) -> Figure:
    """Loss along the share of neurons transplanted; columns panel, set ("most moved", "random"),
    share, loss, host (loss without), donor (loss of the other model).
    """
    fig, drawn = _panels(table, (4.0, 3.5))
    kinds = {
        "most moved": ("most moved first", {"color": PALETTE[0], "marker": "o"}),
        "random": ("null: as many random, same layers", NULL | {"marker": "D"}),
    }
    ends = {"host": ("the model as it was", 1), "donor": ("the model the weights come from", 2)}
    for ax, name, part in drawn:
        for kind, (label, look) in kinds.items():
            line = part[part["set"] == kind]
            ax.plot(100 * line["share"], line["loss"], label=label, **look)
        for end, (label, colour) in ends.items():
            ax.axhline(part[end].iloc[0], color=PALETTE[colour], linewidth=1.2, label=label)
        ax.set(title=name, xlabel="% of neurons transplanted", xlim=(-2, 102), ylim=(0, None))
    label_left(drawn, "loss of references\n(nats per token)")
    legend_below(fig, drawn)
    return fig


def trajectory(table: pd.DataFrame) -> Figure:
    """Task accuracy and component change over a tuning; columns panel, line, step, value in [0, 1],
    component (bool: a curve of components, drawn black; else a category's accuracy).
    """
    fig, drawn = _panels(table, (5.6, 4.0), sharey=True)
    categories = list(pd.unique(table.loc[~table["component"], "line"]))
    colour, shape = colours(categories), markers(categories)
    ticks, top = np.array([0, 25, 100, 400, 1000, 2000]), max(1.05, 1.03 * table["value"].max())
    for ax, name, part in drawn:
        dashes = iter(("-", ":", "-.", "--") * len(table))
        for line, values in part.groupby("line", sort=False):
            if line in categories:
                look = {"color": colour[line], "marker": shape[line], "markersize": 4}
                look |= {"linewidth": 1.2, "label": f"accuracy {line}"}
            else:
                look = {
                    "color": "black",
                    "linestyle": next(dashes),
                    "linewidth": 2.4,
                    "label": line,
                }
            ax.plot(values["step"], values["value"], **look)
        ax.set_xscale("symlog", linthresh=25)
        ax.set(title=name, xlabel="step of the tuning", ylim=(-0.05, top))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    label_left(drawn, "accuracy; share of\nthe final change made")
    legend_below(fig, drawn, 5)
    return fig
