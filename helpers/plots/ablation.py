"""Figures of what ablations do."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..config import SCORES
from .style import (
    NULL,
    PALETTE,
    SMALLEST,
    colours,
    entry,
    error_bars,
    heat_map,
    if_any,
    label_left,
    legend_below,
    markers,
    panels,
    title,
)

SCORE_COLOURS = dict(zip(SCORES, [PALETTE[i] for i in (0, 5, 2, 4, 1, 3)], strict=True))


def dose(table: pd.DataFrame) -> Figure:
    """Damage against the share ablated; columns pair, line, share, increase, low, high.

    Lines that begin with "null" are grey and dashed.
    """
    fig, drawn = panels(table, "pair", (4.8, 3.6), sharey=True)
    shares = sorted(table["share"].unique())
    for ax, pair, part in drawn:
        dashes = iter(("--", ":", "-.") * len(table))
        for line, values in part.groupby("line", sort=False):
            if line.startswith("null"):
                look = NULL | {"linestyle": next(dashes)}
                ax.plot(values["share"], values["increase"], label=line, **look)
                continue
            look = {"color": SCORE_COLOURS[line]}
            ax.fill_between(values["share"], values["low"], values["high"], alpha=0.2, **look)
            ax.plot(values["share"], values["increase"], marker="o", label=line, **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(shares, [f"{share:.0%}" for share in shares], minor=False)
        ax.minorticks_off()
        ax.set(title=title(pair, part), xlabel="share of the neurons ablated")
    label_left(drawn, "own category: increase of\nloss, nats per token")
    legend_below(fig, drawn, 2)
    return fig


def league(table: pd.DataFrame) -> Figure:
    """Scores by what their sets do beyond the hardest control; shades: sizes.

    Columns pair, score, size, critical, critical_low, critical_high, sees_reference.
    """
    fig, drawn = panels(table, "pair", (5.0, 4.0), sharey=True, sharex=True)
    sizes, scores = sorted(table["size"].unique()), list(pd.unique(table["score"]))
    shades = plt.cm.viridis(np.linspace(0.9, 0.05, len(sizes)))
    seen = set(table.loc[table["sees_reference"], "score"])
    for ax, pair, part in drawn:
        for s, (size, shade) in enumerate(zip(sizes, shades, strict=True)):
            line = part[part["size"] == size]
            shift = 0.62 * (s - (len(sizes) - 1) / 2) / max(len(sizes) - 1, 1)
            y = line["score"].map(scores.index).astype(float) + shift
            bars = error_bars(line["critical_low"], line["critical"], line["critical_high"])
            look = {"fmt": "o", "markersize": 4, "color": shade, "linewidth": 1.4}
            ax.errorbar(line["critical"], y, xerr=bars, label=f"{size:.0%}", **look)
        ax.axvline(0, **NULL)
        ax.set(title=title(pair, part), xlabel="own effect - hardest control (95 % CI)")
        ax.set_yticks(range(len(scores)), [f"{s} *" if s in seen else s for s in scores])
        ax.set_ylim(len(scores) - 0.4, -0.6)
    said = "share ablated." + "  * has seen references of the choosing half" * bool(seen)
    legend_below(fig, drawn, len(sizes) + 1, [entry("null", **NULL)], said)
    return fig


@if_any
def by_category(table: pd.DataFrame) -> Figure:
    """A row per category, a panel per pair: own effect minus the hardest control, by score.

    Columns pair, category, score, critical, critical_low, critical_high, supported (filled).
    """
    fig, drawn = panels(table, "pair", (5.0, 3.8), sharex=False)
    scores = list(pd.unique(table["score"]))
    for ax, pair, part in drawn:
        categories = list(pd.unique(part["category"]))
        for n, score in enumerate(scores):
            line = part[part["score"] == score]
            lane = 0.3 * (n - (len(scores) - 1) / 2)
            y = line["category"].map(categories.index).astype(float) + lane
            bars = error_bars(line["critical_low"], line["critical"], line["critical_high"])
            look = {"fmt": "none", "color": SCORE_COLOURS[score], "linewidth": 1.5}
            ax.errorbar(line["critical"], y, xerr=bars, **look)
            for held, face in ((True, SCORE_COLOURS[score]), (False, "white")):
                some = line["supported"] == held
                look = {"color": SCORE_COLOURS[score], "markerfacecolor": face, "linestyle": ""}
                label = score if held else None
                ax.plot(line["critical"][some], y[some], marker="osD^"[n % 4], label=label, **look)
        ax.axvline(0, **NULL)
        ax.set(title=title(pair, part), xlabel="own effect - hardest control, nats (95 % CI)")
        ax.set_yticks(range(len(categories)), categories)
        ax.set_ylim(len(categories) - 0.5, -0.5)
    colour = SCORE_COLOURS
    handles = [entry(s, color=colour[s], marker="osD^"[i % 4]) for i, s in enumerate(scores)]
    hollow = entry("not supported", marker="o", color="0.2", markerfacecolor="white", linestyle="")
    legend_below(fig, [], 4, [*handles, hollow, entry("null", **NULL)])
    return fig


def damage(table: pd.DataFrame) -> Figure:
    """General against specific damage, a point per category's set, both axes symmetric logarithmic.

    Columns pair, score, category, plain, own; `score` "null: random" in grey. Where sets hurt
    plain text more than their own category by 0.05 nats or more, the one furthest right of a score
    and category is labelled.
    """
    fig, drawn = panels(table, "pair", (5.2, 4.4))
    categories = list(pd.unique(table["category"]))
    shape = markers(categories)
    for ax, pair, part in drawn:
        for row in part.itertuples():
            null = row.score.startswith("null")
            colour = NULL["color"] if null else SCORE_COLOURS[row.score]
            look = {"s": 18, "alpha": 0.45} if null else {"s": 36, "alpha": 0.9, "zorder": 2}
            ax.scatter(row.plain, row.own, marker=shape[row.category], color=colour, **look)
        blunt = part[~part["score"].str.startswith("null") & (part["plain"] > part["own"] + 0.05)]
        last = blunt.sort_values("plain").drop_duplicates(["score", "category"], keep="last")
        for row in last.itertuples():  # below, and not beyond the right margin
            at = {"xytext": (5, -6), "textcoords": "offset points", "fontsize": SMALLEST}
            ax.annotate(row.category, (row.plain, row.own), ha="right", va="top", **at)
        both = part[["plain", "own"]].to_numpy()
        ends = 1.5 * min(both.min(), -0.01), 1.5 * max(both.max(), 0.01)
        ax.plot(ends, ends, label="as much damage to any text", **NULL)
        ax.set_xscale("symlog", linthresh=0.01)
        ax.set_yscale("symlog", linthresh=0.01)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(xlim=ends, ylim=ends)
        ax.set(title=title(pair, part), xlabel="general: increase of plain text's loss, nats")
    label_left(drawn, "specific: increase of the\nown category's loss, nats")
    dot = {"marker": "o", "linestyle": ""}
    scores = pd.unique(table["score"])
    handles = [entry(s, color=SCORE_COLOURS.get(s, NULL["color"]), **dot) for s in scores]
    handles += [entry(c, marker=shape[c], linestyle="", color="0.2") for c in categories]
    legend_below(fig, drawn, 5, handles)
    return fig


def agreement(table: pd.DataFrame) -> Figure:
    """Do seeds and halves agree? A point per pair and half; columns pair, half, score, critical,
    critical_low, critical_high, supported (filled) or not (hollow).
    """
    scores, pairs, halves = (list(pd.unique(table[name])) for name in ("score", "pair", "half"))
    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.75 * len(scores)))
    lanes = [(pair, half) for pair in pairs for half in halves]
    colour, shape = colours(pairs), markers(halves)
    for row in table.itertuples():
        lane = lanes.index((row.pair, row.half)) / max(len(lanes) - 1, 1) - 0.5
        y, own = scores.index(row.score) + 0.72 * lane, colour[row.pair]
        face = own if row.supported else "white"
        ax.plot([row.critical_low, row.critical_high], [y, y], color=own, linewidth=1.3)
        look = {"marker": shape[row.half], "color": own, "markerfacecolor": face}
        ax.plot(row.critical, y, markersize=5, **look)
    for y in range(1, len(scores)):
        ax.axhline(y - 0.5, color="0.9", linewidth=0.8)
    ax.axvline(0, **NULL)
    ax.set_xlabel("own effect - hardest control, nats per reference token (95 % CI)")
    ax.set_ylim(len(scores) - 0.45, -0.55)
    ax.set_yticks(range(len(scores)), scores)
    dot = {"linestyle": "", "color": "0.2"}
    handles = [entry(pair, color=colour[pair], linewidth=3) for pair in pairs]
    handles += [entry(f"measured on {half}", marker=shape[half], **dot) for half in halves]
    handles += [entry("not supported", marker="o", markerfacecolor="white", **dot)]
    legend_below(fig, [], 4, [*handles, entry("null", **NULL)])
    return fig


def planted(table: pd.DataFrame) -> Figure:
    """Recall of planted neurons, a panel for each kind of decoys, a row for each score.

    Columns decoys, noise, loss, score, recall (study.planted.league's table). Under each column:
    noise, and what the planted neurons are worth, nats.
    """
    fig, drawn = panels(table, "decoys", (5.4, 3.2), 2, sharey=True)
    for ax, name, part in drawn:
        last = ax is drawn[-1][0] or ax.get_subplotspec().is_last_col()
        size = [f"{row.noise:g}\n{row.loss:.2f}" for row in part.itertuples()]
        part = part.assign(size=size).sort_values(["noise", "loss"])
        part = part.assign(order=part["score"].map(SCORES.index))
        part = part.sort_values("order", kind="stable")
        heat_map(
            ax,
            part,
            "score",
            "size",
            "recall",
            vmin=0,
            vmax=1,
            cmap="cividis",
            annot=True,
            fmt=".2f",
            cbar=last,
            cbar_kws={"label": "recall"},
        )
        chance, draws = part["chance"].iloc[0], part["draws"].iloc[0]
        title = f"decoys: {name} (chance {chance:.2f}, {draws:.0f} draws)"
        ax.set(title=title, xlabel="noise, and loss without the planted, nats", ylabel="")
    return fig


def single_experts(table: pd.DataFrame) -> Figure:
    """What losing one expert costs; columns pair, measured on, category, layer, expert, own,
    increase, expected, low, high (of own increase minus expected), n. A panel per pair, a line per
    category and half: the category's own expert, with that interval, what others of the layer would
    cost at its use (the null), and these others.
    """
    lines = table.groupby(["measured on", "category"]).ngroups
    fig, drawn = panels(table, "pair", (7.2, 1.2 + 0.3 * lines), per_row=1)
    for ax, pair, part in drawn:
        of_category = part.groupby(["category", "measured on"], sort=False)
        for at, (_, line) in enumerate(of_category):
            others, own = line[~line["own"]], line[line["own"]]
            ax.plot(others["increase"], [at] * len(others), "o", **OTHERS)
            low, high = own["expected"] + own["low"], own["expected"] + own["high"]
            around = error_bars(low, own["increase"], high)
            ax.errorbar(own["increase"], [at], xerr=around, fmt="o", color=PALETTE[0], capsize=3)
            ax.plot(own["expected"], [at], "D", **EXPECTED)
        own = part[part["own"]].groupby(["category", "measured on"], sort=False).first()
        named = [
            f"{category}, half {half}: layer {row.layer}, expert {row.expert} (n = {row.n})"
            for (category, half), row in zip(own.index, own.itertuples(), strict=True)
        ]
        ax.set_yticks(range(len(named)), named)
        ax.invert_yaxis()
        ax.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        ax.set(title=pair, xlabel="increase of loss, nats per token")
    handles = [entry("most own expert, 95 % interval", marker="o", color=PALETTE[0])]
    handles.append(entry("null: others of the layer, at its use", **EXPECTED, marker="D"))
    handles.append(entry("the others of the layer, one each", **OTHERS, marker="o"))
    legend_below(fig, [], 3, handles)
    return fig


OTHERS = {"color": "0.6", "markersize": 4, "linestyle": "", "alpha": 0.7}
EXPECTED = {"color": "0.2", "markersize": 6, "linestyle": "", "markerfacecolor": "white"}
