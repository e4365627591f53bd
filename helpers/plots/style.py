"""What all figures share: colours (Okabe-Ito), nulls in grey and dashed, panels, saving."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from ..hexainst.schema import CATEGORIES
from ..paths import checked, figures_dir
from ..record import atomic, write_table

COLOURS = dict(
    zip(CATEGORIES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"), strict=True)
)
MARKERS = dict(zip(CATEGORIES, "osD^vP", strict=True))
NULL = {"color": "0.45", "linestyle": "--", "linewidth": 1.4}
VERDICTS = {
    "supported": "#56B4E9",
    "mixed": "#F0E442",
    "not supported": "#E69F00",
    "not testable": "0.85",
}

sns.set_theme(context="notebook", style="ticks", font_scale=0.9)


plt.rcParams |= {
    "figure.dpi": 80,
    "savefig.dpi": 140,
    "svg.hashsalt": "sparcom",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


def save_figure(fig: Figure, table: pd.DataFrame, name: str, profile: str) -> None:
    """Write figures/<profile>/<name>.png, .svg and .csv (the table it was drawn from)."""
    checked(name, "figure")
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        with atomic(figures_dir(profile) / f"{name}{suffix}") as draft:
            fig.savefig(draft, metadata=metadata)
    write_table(figures_dir(profile) / f"{name}.csv", table)


def heat_map(ax, table, row, column, value, cmap, norm, annot, fmt):
    """One table as a heat map on `ax`; `norm`: vmin and vmax; `annot`: write each value with `fmt`."""
    rows, columns = pd.unique(table[row]), pd.unique(table[column])
    grid = table.pivot(index=row, columns=column, values=value).loc[rows, columns].astype(float)
    sns.heatmap(
        grid,
        ax=ax,
        cmap=cmap,
        annot=annot,
        fmt=fmt,
        cbar=True,
        linewidths=0.4,
        annot_kws={"size": 8},
        square=len(rows) == len(columns),
        **norm,
    )
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=0)


def panels_of(table, panel, size, ncols=None, **axes):
    """A figure with one axes, `size` inches each, per value of a column: (figure, [(axes, value)])."""
    names = list(pd.unique(table[panel]))
    ncols = ncols or len(names)
    nrows = -(-len(names) // ncols)
    fig, grid = plt.subplots(
        nrows, ncols, figsize=(size[0] * ncols, size[1] * nrows), squeeze=False, **axes
    )
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    return fig, list(zip(grid.flat, names, strict=False))


def matrices(
    table: pd.DataFrame, row: str, column: str, value: str, signed=(), fmt: str = ".2f", ncols=3
) -> Figure:
    """C x C panels; columns `panel`, `row`, `column`, `value`. Panels named in `signed` diverge
    around a white 0.

    Panels of one kind whose names agree up to the colon share one colour scale.
    """
    fig, panels = panels_of(table, "panel", (4.3, 3.7), ncols=ncols)
    group = table["panel"].str.split(":").str[0]
    reach = table[value].abs().groupby([group, table["panel"].isin(signed)]).max()
    for ax, name in panels:
        most = reach[name.split(":")[0], name in signed]
        norm, cmap = (
            {"vmin": -most if name in signed else 0, "vmax": most},
            "PuOr_r" if name in signed else "cividis",
        )
        heat_map(ax, table[table["panel"] == name], row, column, value, cmap, norm, True, fmt)
        ax.set_title(name, fontsize=10)
        if ax.get_subplotspec().colspan.start:
            ax.set_ylabel("")
    return fig
