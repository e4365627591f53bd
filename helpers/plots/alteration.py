"""Figures of what fine-tuning changes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..hexainst.schema import CATEGORIES
from .style import COLOURS, MARKERS, NULL, panels_of

FATE = {"kept": "#0072B2", "gained": "#009E73", "lost": "#D55E00"}


def _grid(table, panel, size, **axes):
    """As panels_of, two panels in a row if there are more than three, with each panel's part of
    the table.
    """
    fig, panels = panels_of(table, panel, size, 2 if table[panel].nunique() > 3 else None, **axes)
    return fig, [(ax, name, table[table[panel] == name]) for ax, name in panels]


def layers(table: pd.DataFrame) -> Figure:
    """Similarity of base and tuned per layer beside the noise floor; columns panel, layer,
    similarity, low, high, floor, beyond (bool: below the floor after BH over layers; drawn as a
    filled marker).
    """
    fig, panels = _grid(table, "panel", (4.3, 3.6), sharey=True)
    for ax, name, part in panels:
        ax.fill_between(part["layer"], part["low"], part["high"], color="#0072B2", alpha=0.2)
        ax.plot(part["layer"], part["similarity"], color="#0072B2", label="base vs tuned (95 % CI)")
        for beyond, face in ((True, "#0072B2"), (False, "white")):
            some = part[part["beyond"] == beyond]
            label = "changed beyond the floor (BH)" if beyond else "not beyond the floor"
            ax.plot(
                some["layer"],
                some["similarity"],
                "o",
                color="#0072B2",
                markerfacecolor=face,
                markersize=8,
                label=label if len(some) else None,
            )
        ax.plot(part["layer"], part["floor"], label="null: split-half noise floor", **NULL)
        ax.set(title=name, xlabel="layer", ylim=(0, 1.02))
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0][0].set_ylabel("similarity of components")
    _legend(fig, panels)
    return fig


def _left(panels, label):
    for ax, *_ in panels:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(label)


def _legend(fig, panels, ncols=4):
    """One legend for all panels, below them, in as many columns as the page is wide."""
    found = {}
    for ax, *_ in panels:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    for columns in range(ncols, 0, -1):
        legend = fig.legend(
            found.values(),
            found,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
            handlelength=3,
        )
        fig.canvas.draw()
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()


def flow(table: pd.DataFrame) -> Figure:
    """Where an instruction's set goes, layer by layer: left column base, right column tuned, the
    band between them is kept. Columns panel, layer, kept, gained, lost (mean components of an
    instruction).
    """
    fig, panels = _grid(table, "panel", (5.2, 4.2))
    for ax, name, part in panels:
        gap = 0.06 * max(part[["kept", "lost"]].sum().sum(), part[["kept", "gained"]].sum().sum())
        left = right = 0.0
        for row in part.sort_values("layer", ascending=False).itertuples():
            ax.fill_between(
                [0.12, 0.88],
                [left, right],
                [left + row.kept, right + row.kept],
                color=FATE["kept"],
                alpha=0.45,
                linewidth=0,
                label="kept" if row.Index == part.index[0] else None,
            )
            for x, y, fate in ((0, left, "lost"), (0.88, right, "gained")):
                ax.add_patch(plt.Rectangle((x, y), 0.12, row.kept, color=FATE["kept"], linewidth=0))
                ax.add_patch(
                    plt.Rectangle(
                        (x, y + row.kept),
                        0.12,
                        getattr(row, fate),
                        color=FATE[fate],
                        linewidth=0,
                        label=fate if row.Index == part.index[0] else None,
                    )
                )
            ax.text(
                -0.02,
                left + (row.kept + row.lost) / 2,
                f"layer {row.layer}: {row.lost:.0f} lost",
                ha="right",
                va="center",
                fontsize=8.5,
            )
            ax.text(
                1.02,
                right + (row.kept + row.gained) / 2,
                f"{row.gained:.0f} gained",
                va="center",
                fontsize=8.5,
            )
            ax.text(
                0.5,
                (left + right + row.kept) / 2,
                f"{row.kept:.0f} kept",
                ha="center",
                va="center",
                fontsize=8.5,
            )
            left, right = left + row.kept + row.lost + gap, right + row.kept + row.gained + gap
        ax.set(
            title=name,
            xlim=(-0.45, 1.35),
            ylim=(0, max(left, right)),
            xticks=[0.06, 0.94],
            yticks=[],
        )
        ax.set_xticklabels(["base", "tuned"])
        ax.spines[["left", "bottom"]].set_visible(False)
    _legend(fig, panels)
    return fig


def weights(table: pd.DataFrame) -> Figure:
    """Change in frequency along change in weights, in bins of equal number per layer; columns
    panel, layer, weight (relative change), moved (mean |change of p or f|), components (of the
    bin; single ones are not joined).
    """
    fig, panels = _grid(table, "panel", (4.0, 3.4))
    for ax, name, part in panels:
        for i, (layer, line) in enumerate(part.groupby("layer")):
            ax.plot(
                line["weight"],
                line["moved"],
                color=plt.cm.viridis(i / max(part["layer"].nunique() - 1, 1) * 0.85),
                marker="osD^vP"[i % 6],
                label=f"layer {layer}",
                markersize=5,
                clip_on=False,
                linestyle="-" if line["components"].min() > 1 else "",
            )
        ax.set(title=name, xlabel="relative change of its weights", ylim=(0, None))
    _left(panels, "mean |change of p| (of f)")
    _legend(fig, panels, ncols=8)
    return fig


def transplant(table: pd.DataFrame) -> Figure:
    """Loss along the share of neurons transplanted; columns panel, set ("most moved", "random"),
    share, loss, host (loss without), donor (loss of the other model).
    """
    fig, panels = _grid(table, "panel", (4.0, 3.5))
    for ax, name, part in panels:
        for kind, style in (
            ("most moved", {"color": "#0072B2", "marker": "o"}),
            ("random", NULL | {"marker": "D"}),
        ):
            line = part[part["set"] == kind]
            label = (
                "most moved first" if kind == "most moved" else "null: as many random, same layers"
            )
            ax.plot(100 * line["share"], line["loss"], label=label, **style)
        ax.axhline(
            part["host"].iloc[0], color="#E69F00", linewidth=1.2, label="the model as it was"
        )
        ax.axhline(
            part["donor"].iloc[0],
            color="#009E73",
            linewidth=1.2,
            label="the model the weights come from",
        )
        ax.set(title=name, xlabel="% of neurons transplanted", xlim=(-2, 102), ylim=(0, None))
    _left(panels, "loss of references\n(nats per token)")
    _legend(fig, panels)
    return fig


def trajectory(table: pd.DataFrame) -> Figure:
    """Task accuracy and component change over a tuning; columns panel, line (a category, or a
    component curve), step, value in [0, 1].
    """
    fig, panels = _grid(table, "panel", (5.6, 4.0), sharey=True)
    for ax, name, part in panels:
        for category in CATEGORIES:
            line = part[part["line"] == category]
            ax.plot(
                line["step"],
                line["value"],
                color=COLOURS[category],
                marker=MARKERS[category],
                markersize=4,
                linewidth=1.2,
                label=f"accuracy {category}",
            )
        others = [line for line in pd.unique(part["line"]) if line not in CATEGORIES]
        for kind, style in zip(others, ("-", ":", "-.", "--"), strict=False):
            line = part[part["line"] == kind]
            ax.plot(
                line["step"],
                line["value"],
                color="black",
                linestyle=style,
                linewidth=2.4,
                label=kind,
            )
        ax.set_xscale("symlog", linthresh=25)
        ticks = np.array([0, 25, 100, 400, 1000, 2000])
        top = max(1.05, 1.03 * table["value"].max())
        ax.set(title=name, xlabel="step of the tuning", ylim=(-0.05, top), xticks=ticks)
        ax.set_xticklabels(ticks)
        ax.minorticks_off()
    panels[0][0].set_ylabel("accuracy; share of\nthe final change made")
    _legend(fig, panels, ncols=5)
    return fig
