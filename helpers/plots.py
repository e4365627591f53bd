"""Figures, each drawn from one tidy table that is saved beside it. Colours are Okabe-Ito; nulls are grey and dashed."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.hexainst import CATEGORIES
from helpers.paths import figures_dir
from helpers.record import atomic, write_table

COLOURS = dict(zip(CATEGORIES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"), strict=True))
MARKERS = dict(zip(CATEGORIES, "osD^vP", strict=True))
NULL = {"color": "0.45", "linestyle": "--", "linewidth": 1.4}
VERDICTS = {"supported": "#56B4E9", "mixed": "#F0E442", "not supported": "#E69F00", "not testable": "0.85"}

sns.set_theme(context="notebook", style="ticks", font_scale=0.9)
plt.rcParams |= {"figure.dpi": 80, "savefig.dpi": 140, "svg.hashsalt": "sparcom", "svg.fonttype": "none",
                 "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True}


def save_figure(fig: Figure, table: pd.DataFrame, name: str, profile: str) -> None:
    """Write figures/<profile>/<name>.png, .svg and .csv (the table it was drawn from)."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        with atomic(figures_dir(profile) / f"{name}{suffix}") as draft:
            fig.savefig(draft, metadata=metadata)
    write_table(figures_dir(profile) / f"{name}.csv", table)


def _matrix(ax, table, row, column, value, cmap, norm, annot, fmt):
    rows, columns = pd.unique(table[row]), pd.unique(table[column])
    grid = table.pivot(index=row, columns=column, values=value).loc[rows, columns].astype(float)
    sns.heatmap(grid, ax=ax, cmap=cmap, annot=annot, fmt=fmt, cbar=True, linewidths=0.4, annot_kws={"size": 8},
                square=len(rows) == len(columns), **norm)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=0)


def panels_of(table, panel, size, ncols=None, **axes):
    """A figure with one axes, `size` inches each, per value of a column: (figure, [(axes, value)])."""
    names = list(pd.unique(table[panel]))
    ncols = ncols or len(names)
    nrows = -(-len(names) // ncols)
    fig, grid = plt.subplots(nrows, ncols, figsize=(size[0] * ncols, size[1] * nrows), squeeze=False, **axes)
    for ax in grid.flat[len(names):]:
        ax.set_visible(False)
    return fig, list(zip(grid.flat, names, strict=False))


def lengths(table: pd.DataFrame) -> Figure:
    """Counted tokens per instruction; columns category, half, tokens."""
    fig, ax = plt.subplots(figsize=(8, 3.6))
    halves = list(pd.unique(table["half"]))
    sns.boxplot(table, x="category", y="tokens", hue="half", order=CATEGORIES, hue_order=halves, ax=ax, fliersize=2,
                palette=["#0072B2", "#E69F00"][: len(halves)], linewidth=1, width=0.7)
    ax.axhline(table["tokens"].median(), **NULL, label="median of all")
    ax.set(xlabel="", ylabel="counted tokens per instruction")
    ax.legend(title="half", frameon=False, ncols=3)
    return fig


def frequencies(table: pd.DataFrame) -> Figure:
    """Activation-frequency distribution; columns pair, model, p, share; `model` = "null" is drawn grey and dashed."""
    fig, panels = panels_of(table, "pair", (4.6, 3.4), sharey=True)
    for ax, pair in panels:
        for i, (model, part) in enumerate(table[table["pair"] == pair].groupby("model", sort=False)):
            style = NULL if model.startswith("null") else {"color": list(COLOURS.values())[i], "linewidth": 2}
            ax.plot(part["p"], part["share"], label=model, drawstyle="steps-mid", **style)
        ax.set(title=pair, xlabel="activation frequency p", yscale="log")
    panels[0][0].set_ylabel("share of (instruction, neuron) cells")
    panels[-1][0].legend(frameon=False)
    return fig


def layer_share(table: pd.DataFrame, null: str) -> Figure:
    """Share of each layer's components in the set; columns pair, category, layer, share, null (label: `null`).

    Rows whose category is none of the six (the base, an untrained twin) are drawn grey and dotted.
    """
    fig, panels = panels_of(table, "pair", (4.4, 3.4), sharey=True)
    for ax, pair in panels:
        part = table[table["pair"] == pair]
        for category in CATEGORIES:
            line = part[part["category"] == category]
            ax.plot(line["layer"], line["share"], color=COLOURS[category], marker=MARKERS[category], label=category)
        for other, line in part[~part["category"].isin(CATEGORIES)].groupby("category", sort=False):
            ax.plot(line["layer"], line["share"], label=other, color="0.3", linestyle=":",
                    marker="x" if "twin" in other else ".")
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
            ax.plot(part[x], part[null], color=colour, linestyle="--", alpha=0.6, label=f"{line}: null")
        ax.set(title=name, xlabel=x)
    panels[0][0].set_ylabel(value)
    panels[-1][0].legend(frameon=False, fontsize=8)
    return fig


def routing(table: pd.DataFrame, uniform: float) -> Figure:
    """Routing per layer; columns layer, category, expert, f, own (f minus the mean of the categories).

    Left: f, white = the balanced router's K/E. Right: own, white = the null of a router that ignores the category.
    """
    layers, few = list(pd.unique(table["layer"])), table["expert"].nunique() <= 16
    fig, grid = plt.subplots(len(layers), 2, figsize=(10, 2.6 * len(layers)), squeeze=False)
    for column, (value, white, title) in enumerate((("f", uniform, f"f; white: K/E = {uniform:.2f}"),
                                                    ("own", 0.0, "f - mean of categories; white: null"))):
        reach = float((table[value] - white).abs().max())
        for ax, layer in zip(grid[:, column], layers, strict=True):
            norm = {"vmin": white - reach, "vmax": white + reach}
            _matrix(ax, table[table["layer"] == layer], "category", "expert", value, "PuOr_r", norm, few, ".2f")
            ax.set(title=f"layer {layer}: {title}", ylabel="")
            ax.collections[0].colorbar.ax.set_ylim(0 if white else -reach, white + reach)
    return fig


def matrices(table: pd.DataFrame, row: str, column: str, value: str, signed=(), fmt: str = ".2f", ncols=3) -> Figure:
    """C x C panels; columns `panel`, `row`, `column`, `value`. Panels named in `signed` diverge around a white 0.

    Panels of one kind whose names agree up to the colon share one colour scale.
    """
    fig, panels = panels_of(table, "panel", (4.3, 3.7), ncols=ncols)
    group = table["panel"].str.split(":").str[0]
    reach = table[value].abs().groupby([group, table["panel"].isin(signed)]).max()
    for ax, name in panels:
        most = reach[name.split(":")[0], name in signed]
        norm, cmap = {"vmin": -most if name in signed else 0, "vmax": most}, "PuOr_r" if name in signed else "cividis"
        _matrix(ax, table[table["panel"] == name], row, column, value, cmap, norm, True, fmt)
        ax.set_title(name, fontsize=10)
        if ax.get_subplotspec().colspan.start:
            ax.set_ylabel("")
    return fig


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


def alteration(table: pd.DataFrame) -> Figure:
    """Similarity of base and tuned per layer; columns panel, layer, similarity, low, high, floor (split-half)."""
    fig, panels = panels_of(table, "panel", (4.4, 3.3), sharey=True)
    for ax, name in panels:
        part = table[table["panel"] == name]
        ax.fill_between(part["layer"], part["low"], part["high"], color="#0072B2", alpha=0.2)
        ax.plot(part["layer"], part["similarity"], color="#0072B2", marker="o", label="base vs tuned (95 % CI)")
        ax.plot(part["layer"], part["floor"], label="noise floor: split half", **NULL)
        ax.set(title=name, xlabel="layer", ylim=(0, 1.02))
        ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    panels[0][0].set_ylabel("similarity of components")
    panels[-1][0].legend(frameon=False)
    return fig


def claims(table: pd.DataFrame) -> Figure:
    """Verdicts; columns claim (row), where (column), verdict, text ("effect [CI] vs null")."""
    rows, columns = list(pd.unique(table["claim"])), list(pd.unique(table["where"]))
    fig, ax = plt.subplots(figsize=(2.9 + 1.75 * len(columns), 1.0 + 0.4 * len(rows)))
    for item in table.itertuples():
        x, y = columns.index(item.where), rows.index(item.claim)
        ax.add_patch(plt.Rectangle((x, y), 1, 1, facecolor=VERDICTS[item.verdict], edgecolor="white", linewidth=2))
        ax.text(x + 0.5, y + 0.5, item.text, ha="center", va="center", fontsize=7.5)
    ax.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xticks=np.arange(len(columns)) + 0.5,
           yticks=np.arange(len(rows)) + 0.5)
    ax.set_xticklabels(columns)
    ax.set_yticklabels(rows)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    sns.despine(ax=ax, left=True, bottom=True)
    used = {verdict: colour for verdict, colour in VERDICTS.items() if verdict in set(table["verdict"])}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in used.values()]
    fig.legend(handles, used, loc="outside lower center", ncols=4, frameon=False,
               title="each cell: effect [95 % CI] against its null")
    return fig
