"""What all figures share: colours (Okabe-Ito), grey dashed nulls, panels, legends, saving."""

from functools import wraps
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from PIL import Image

from ..paths import checked, figures_dir
from ..record import atomic, write_table
from ..study.summary import span

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#000000")
SHAPES = "osD^vPX*"
NULL = {"color": "0.45", "linestyle": "--", "linewidth": 1.4}
SMALLEST = 8  # points: no text of a figure is smaller
PAGE = 9.4  # inches: a wider figure is shown scaled down, its text with it

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


def if_any(draw):
    """The figure of a table; of one without a row, an empty page that says so."""

    @wraps(draw)
    def drawn(table, *more) -> Figure:
        if len(table):
            return draw(table, *more)
        fig = plt.figure(figsize=(6, 1))
        fig.text(0.5, 0.5, "not testable: see the table's notes", ha="center", va="center")
        return fig

    return drawn


def colours(names) -> dict:
    """A colour for each name, in their order; beyond the palette's eight it begins again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


def markers(names) -> dict:
    """A marker for each name, in their order, so that no figure rests on colour alone."""
    return {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(names)}


def few_colours(png: bytes) -> bytes:
    """A PNG of 256 colours, a third of the size; one that has no more is left as it is."""
    found = Image.open(BytesIO(png))
    if found.mode == "P":
        return png
    how = {"method": Image.Quantize.MAXCOVERAGE, "dither": Image.Dither.NONE}
    pixels = BytesIO()
    found.convert("RGB").quantize(256, **how).save(pixels, "png", optimize=True)
    return pixels.getvalue()


def save_figure(fig: Figure, table: pd.DataFrame, name: str, profile: str) -> None:
    """Write figures/<profile>/<name>.png (see `few_colours`), .svg and .csv (the table it was drawn
    from).
    """
    checked(name, "figure")
    pixels = BytesIO()
    fig.savefig(pixels, format="png")
    with atomic(figures_dir(profile) / f"{name}.png") as draft:
        Path(draft).write_bytes(few_colours(pixels.getvalue()))
    with atomic(figures_dir(profile) / f"{name}.svg") as draft:
        fig.savefig(draft, metadata={"Date": None})
    write_table(figures_dir(profile) / f"{name}.csv", table)


def panels(table: pd.DataFrame, column: str, size, per_row: int = 3, **axes):
    """A figure with one axes, `size` inches each, for each value of a column; on a full page
    narrower, down to 0.7 of it, before fewer stand in a row.

    Returns (figure, [(axes, value, the value's rows)]); unused places are hidden.
    """
    names = list(pd.unique(table[column]))
    places = max(1, len(names))
    width = min(per_row, max(1, int(PAGE / (0.7 * size[0]))), places)
    rows = -(-places // width)
    page = min(size[0] * width, PAGE), size[1] * rows
    fig, grid = plt.subplots(rows, width, figsize=page, squeeze=False, **axes)
    for ax in grid.flat[len(names) :]:
        ax.set_visible(False)
    shown = zip(grid.flat, names, strict=False)
    return fig, [(ax, name, table[table[column] == name]) for ax, name in shown]


def title(name: str, part: pd.DataFrame) -> str:
    """A panel's title: its name and, where the table has a column `n`, the range of n."""
    return f"{name} (n = {span(part['n'])})" if "n" in part else name


def label_left(drawn, label: str) -> None:
    """The y label, on the first axes of each row only."""
    for ax, *_ in drawn:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(label)


def legend_below(fig, drawn, most: int = 4, handles=(), title: str = "") -> None:
    """One legend for all panels, below them, in as many columns (at most `most`) as the page has.

    `handles` are entries of one's own, after those found in the axes.
    """
    found = {}
    for ax, *_ in drawn:
        own, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, own, strict=True))
    found |= {handle.get_label(): handle for handle in handles}
    look = {
        "loc": "outside lower center",
        "frameon": False,
        "fontsize": SMALLEST,
        "handlelength": 3,
    }
    look |= {"title": title, "title_fontsize": SMALLEST}
    for columns in range(most, 0, -1):
        legend = fig.legend(found.values(), found, ncols=columns, **look)
        fig.canvas.draw()
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()


def entry(label: str, **look):
    """A legend entry of its own: a line or a marker that stands for `label`."""
    return plt.Line2D([], [], label=label, **look)


def whole_numbers(ax) -> None:
    """Ticks of the x axis at whole numbers only: layers, experts."""
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))


def error_bars(low, value, high) -> list:
    """The two lengths that matplotlib's errorbar asks for, never negative."""
    return [(value - low).clip(lower=0), (high - value).clip(lower=0)]


def heat_map(ax, table, row: str, column: str, value: str, **look) -> None:
    """One table as a heat map on `ax`, rows and columns in their order of first appearance.

    `look` goes to seaborn.heatmap: cmap, vmin, vmax, annot, fmt.
    """
    ends, codes = {}, {}  # by codes: labels of several kinds have no order
    for name in (row, column):
        codes[name], found = pd.factorize(table[name], use_na_sentinel=False)
        ends[name] = pd.Index(found, dtype=object, name=name)
    grid = table.assign(**codes).pivot(index=row, columns=column, values=value).astype(float)
    grid = grid.set_axis(ends[row]).set_axis(ends[column], axis=1)
    square = len(ends[row]) == len(ends[column])
    sns.heatmap(grid, ax=ax, linewidths=0.4, annot_kws={"size": SMALLEST}, square=square, **look)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=0)


def matrices(
    table: pd.DataFrame, row: str, column: str, value: str, signed=(), unit: str = ""
) -> Figure:
    """C x C panels; columns `panel`, `row`, `column`, `value`, the last in `unit`.

    Panels named in `signed` diverge around a white 0. Panels of one kind, whose names agree up to
    the colon, share one colour scale.
    """
    fig, drawn = panels(table, "panel", (4.3, 3.3), 2)
    kind = table["panel"].str.split(":").str[0]
    reach = table[value].abs().groupby([kind, table["panel"].isin(signed)]).max()
    for ax, name, part in drawn:
        diverges = name in signed
        most = reach[name.split(":")[0], diverges]
        look = {"vmin": -most, "cmap": "PuOr_r"} if diverges else {"vmin": 0, "cmap": "cividis"}
        look |= {"cbar_kws": {"label": unit}}
        heat_map(ax, part, row, column, value, vmax=most, annot=True, fmt="z.2f", **look)
        ax.set_title(name, fontsize=10)
        ax.set_ylabel(row if ax.get_subplotspec().is_first_col() else "")
    return fig
