"""Figures of generality and uniqueness under their controls."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .style import (
    NULL,
    PAGE,
    PALETTE,
    SMALLEST,
    colours,
    entry,
    error_bars,
    if_any,
    label_left,
    legend_below,
    markers,
    panels,
    span,
    whole_numbers,
)

FEW = 10  # components: a share of fewer says nothing
TOO_FEW = "0.85"  # grey, which is no colour of the scale
MODELS = ("tuned", "base", "words", "twins")  # one colour and marker each, in every figure


def _title(ax, name, part, *more):
    """A panel's name, and of how many instructions (and wordings) it speaks."""
    said = [f"n = {span(part['n'])}", *more]
    if "wordings" in part:
        said[0] += f" in {span(part['wordings'])} wordings"
    ax.set_title(f"{name}\n{', '.join(said)}", fontsize=10)


@if_any
def excess_matrices(table: pd.DataFrame) -> Figure:
    """Observed minus null of every two categories; columns panel, unit, category, other category,
    excess, low, high, marked (0 lies outside the interval), n.

    In each cell the value and, below, its interval's two ends; bold where marked. One colour scale
    for all sets, one for all routing profiles.
    """
    cells = 0.46 * table["category"].nunique()
    fig, drawn = panels(table, "panel", (1.9 + cells, 1.1 + cells), 2)
    kind = np.where(table["unit"] == "experts", "Jensen-Shannon", "Jaccard")
    most = table["excess"].abs().groupby(kind).max()
    for ax, name, part in drawn:
        names = list(pd.unique(part["category"]))
        measure = "Jensen-Shannon" if part["unit"].iloc[0] == "experts" else "Jaccard"
        grid = part.pivot(index="category", columns="other category", values="excess")
        look = {"cmap": "PuOr_r", "vmin": -most[measure], "vmax": most[measure]}
        image = ax.imshow(grid.loc[names, names], aspect="auto", **look)
        for row in part.itertuples():
            _cell(ax, names.index(row[4]), names.index(row.category), row, most[measure])
        ax.set_xticks(range(len(names)), names)
        ax.set_yticks(range(len(names)), names)
        _title(ax, name, part)
        fig.colorbar(image, ax=ax, label=f"{measure}, minus null")
    return fig


def _cell(ax, x, y, row, most):

    def said(value):
        return f"{value:z.{2 if most > 0.05 else 3}f}".replace("0.", ".")

    dark = abs(row.excess) > 0.65 * most
    look = {"ha": "center", "fontsize": SMALLEST, "color": "white" if dark else "black"}
    weight = "bold" if row.marked else "normal"
    ax.text(x, y - 0.12, said(row.excess), va="bottom", weight=weight, **look)
    ax.text(x, y - 0.08, f"{said(row.low)}\n{said(row.high)}", va="top", linespacing=1, **look)


@if_any
def wordings(table: pd.DataFrame) -> Figure:
    """Same wording, other wording, other category; columns panel, model, pairs, value, low, high,
    null, n, wordings. Grey dashes: the rate-matched null of that model.
    """
    kinds, models = list(pd.unique(table["pairs"])), list(pd.unique(table["model"]))
    fig, drawn = panels(table, "panel", (4.9, 3.3), 2)
    for ax, name, part in drawn:
        for n, model in enumerate(models):
            line = part[part["model"] == model]
            lane = (n - (len(models) - 1) / 2) * 0.3
            place = line["pairs"].map(kinds.index).astype(float) + lane  # no row: stays text
            bars = error_bars(line["low"], line["value"], line["high"])
            ax.errorbar(place, line["value"], bars, linestyle="", label=model, **_look(model))
            ax.hlines(line["null"], place - 0.13, place + 0.13, **_dashes())
        ax.set_xticks(range(len(kinds)), [kind.replace(", ", ",\n") for kind in kinds])
        ax.set_xlim(-0.5, len(kinds) - 0.5)
        _title(ax, name, part)
    label_left(drawn, "mean similarity of two instructions")
    legend_below(fig, drawn, 4, [entry("rate-matched null", **NULL)])
    return fig


def _look(model) -> dict:
    names = [*MODELS, model]
    colour, shape = colours(names[:4] if model in MODELS else names), markers(MODELS)
    return {"color": colour[model], "fmt": shape.get(model, "o"), "capsize": 2, "markersize": 6}


def _dashes() -> dict:
    return {"colors": NULL["color"], "linestyles": "--", "linewidth": NULL["linewidth"]}


@if_any
def waterfall(table: pd.DataFrame) -> Figure:
    """What each control leaves of the gap; columns panel, model, step, left, low, high, n.

    Steps that begin with `words` are coefficients given the words: three estimators beside each
    other, not one after the other. The line at 0: nothing left.
    """
    steps, models = (list(pd.unique(table[name])) for name in ("step", "model"))
    steps.sort(key=lambda step: step.startswith("words"))  # a panel may lack one
    fig, drawn = panels(table, "panel", (6.4, 3.5), 2, sharey=True)
    last = [n for n, step in enumerate(steps) if step.startswith("words")]
    for ax, name, part in drawn:
        for n, model in enumerate(models):
            line = part[part["model"] == model]
            lane = (n - (len(models) - 1) / 2) * 0.36
            place = line["step"].map(steps.index).astype(float) + lane
            look, bars = _look(model), error_bars(line["low"], line["left"], line["high"])
            ax.barh(place, line["left"], height=0.34, color=look["color"], alpha=0.3, linewidth=0)
            ax.errorbar(line["left"], place, xerr=bars, linestyle="", label=model, **look)
        ax.axhspan(last[0] - 0.5, last[-1] + 0.5, color="0.95", zorder=0)
        ax.axvline(0, label="null: nothing left", **NULL)
        ax.set_xlim(min(-0.04 * part["high"].max(), ax.get_xlim()[0]), None)
        ax.set_ylim(len(steps) - 0.4, -0.6)
        ax.set_yticks(range(len(steps)), steps)
        ax.set_xlabel("gap that is left (95 % interval)")
        _title(ax, name, part)
    grey = {"marker": "s", "color": "0.88", "linestyle": "", "markersize": 10}
    legend_below(fig, drawn, 5, [entry("three estimators of one thing", **grey)])
    return fig


@if_any
def layers(table: pd.DataFrame) -> Figure:
    """Shares of each layer's components minus their null; columns panel, kind, layer, excess, low,
    high, marked (Benjamini-Hochberg over layers below 0.05: filled), n, width (of a layer).
    """
    fig, drawn = panels(table, "panel", (4.9, 3.2), 2)
    kinds = list(pd.unique(table["kind"]))
    look = dict(zip(kinds, ((PALETTE[0], "o"), (PALETTE[4], "s")), strict=False))
    for ax, name, part in drawn:
        for n, (kind, line) in enumerate(part.groupby("kind", sort=False)):
            colour, shape = look[kind]
            place = line["layer"] + (n - 0.5) * 0.16
            bars = error_bars(line["low"], line["excess"], line["high"])
            ax.errorbar(place, line["excess"], bars, color=colour, fmt="-", capsize=2, zorder=2)
            for chosen, face in ((line["marked"], colour), (~line["marked"], "white")):
                style = {"color": colour, "marker": shape, "markerfacecolor": face, "zorder": 3}
                ax.plot(place[chosen], line["excess"][chosen], linestyle="", **style)
        ax.axhline(0, **NULL)
        ax.set_xlabel("layer")
        whole_numbers(ax)
        _title(ax, name, part, f"{int(part['width'].max())} components a layer")
    label_left(drawn, "share minus null")
    handles = [entry(kind, color=look[kind][0], marker=look[kind][1]) for kind in kinds]
    hollow = {"color": "0.2", "marker": "o", "markerfacecolor": "white", "linestyle": ""}
    handles += [entry("not beyond its null (BH 5 %)", **hollow)]
    legend_below(fig, drawn, 4, [*handles, entry("null: wordings permuted", **NULL)])
    return fig


def sensitivity(gaps: pd.DataFrame, shares: pd.DataFrame) -> Figure:
    """Left, a row per pair: the gap over epsilon under both tie rules (columns pair, epsilon, rule,
    gap, null, n). Right: the share of unique components over epsilon and tau minus its null
    (columns pair, epsilon, tau, value, null, components; those of fewer than FEW are grey).
    """
    pairs = list(pd.unique(gaps["pair"]))
    size = {"figsize": (PAGE, 3.7 * len(pairs)), "width_ratios": (1, 1.5)}
    fig, grid = plt.subplots(len(pairs), 2, squeeze=False, **size)
    most = (shares["value"] - shares["null"])[shares["components"] >= FEW].abs().max()
    for (left, right), pair in zip(grid, pairs, strict=True):
        _over_epsilon(left, pair, gaps[gaps["pair"] == pair])
        image = _over_tau(right, shares[shares["pair"] == pair], most)
        right.set_title(f"{pair}: unique neurons")
        fig.colorbar(image, ax=right, label="share minus null")
    look = {"marker": "s", "color": TOO_FEW, "linestyle": "", "markersize": 10}
    few = entry(f"fewer than {FEW} neurons: not coloured", **look)
    legend_below(fig, [(ax,) for ax in grid[:, 0]], 4, [few])
    return fig


def _over_epsilon(ax, pair, part):
    rules = list(pd.unique(part["rule"]))
    for rule, line in part.groupby("rule", sort=False):
        look = {"color": colours(rules)[rule], "marker": markers(rules)[rule]}
        ax.plot(line["epsilon"], line["gap"], label=f"ties: {rule}", **look)
    line = part[part["rule"] == rules[0]]
    ax.plot(line["epsilon"], line["null"], label="rate-matched null", **NULL)
    ax.set(xscale="log", xlabel="epsilon", ylabel="gap of other wordings", ylim=(0, None))
    ax.set_xticks(line["epsilon"], [f"{e:g}" for e in line["epsilon"]])
    ax.minorticks_off()
    _title(ax, f"{pair}, neurons", part)


def _over_tau(ax, part, most):
    found, null, number = (
        part.pivot(index="tau", columns="epsilon", values=value)
        for value in ("value", "null", "components")
    )
    look = {"cmap": plt.get_cmap("PuOr_r").with_extremes(bad=TOO_FEW), "vmin": -most, "vmax": most}
    above = (found - null).where(number >= FEW)
    image = ax.imshow(above, aspect="auto", origin="lower", **look)
    for y, x in np.ndindex(*found.shape):
        dark = abs(above.iat[y, x]) > 0.65 * most
        said = f"{found.iat[y, x]:.2f}\nnull {null.iat[y, x]:.2f}\nof {number.iat[y, x]}"
        look = {"ha": "center", "va": "center", "fontsize": SMALLEST}
        text = said if number.iat[y, x] else "no set"
        ax.text(x, y, text, color="white" if dark else "black", **look)
    ax.set(xlabel="epsilon", ylabel="tau")
    ax.set_xticks(range(found.shape[1]), found.columns)
    ax.set_yticks(range(found.shape[0]), found.index)
    return image


@if_any
def readable(table: pd.DataFrame) -> Figure:
    """Accuracy of reading a category off; columns panel, half, read off, accuracy, low, high,
    chance, n, wordings.
    """
    halves, models = list(pd.unique(table["half"])), list(pd.unique(table["read off"]))
    fig, drawn = panels(table, "panel", (4.6, 3.2), 2, sharey=True)
    for ax, name, part in drawn:
        for n, model in enumerate(models):
            line = part[part["read off"] == model]
            lane = (n - (len(models) - 1) / 2) * 0.16
            place = line["half"].map(halves.index).astype(float) + lane
            bars = error_bars(line["low"], line["accuracy"], line["high"])
            ax.errorbar(place, line["accuracy"], bars, linestyle="", label=model, **_look(model))
        ax.axhline(part["chance"].iloc[0], label="chance", **NULL)
        ax.set(ylim=(0, 1.03), xlim=(-0.5, len(halves) - 0.5))
        ax.set_xticks(range(len(halves)), halves)
        _title(ax, name, part)
    label_left(drawn, "accuracy")
    legend_below(fig, drawn, 5)
    return fig
