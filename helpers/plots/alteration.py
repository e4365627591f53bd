"""Figures of what fine-tuning changes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from .style import (
    NULL,
    PALETTE,
    SHAPES,
    SMALLEST,
    error_bars,
    heat_map,
    label_left,
    legend_below,
    panels,
    title,
    whole_numbers,
)


def _panels(table, size, **axes):
    """As `style.panels`, each title with its n; of an empty table, a page that says so."""
    if table.empty:
        fig, ax = plt.subplots(figsize=(5, 1))
        ax.text(0.5, 0.5, "nothing to draw: no model here has what this needs", ha="center")
        ax.axis("off")
        return fig, []
    fig, drawn = panels(table, "panel", size, 2 if table["panel"].nunique() > 3 else 3, **axes)
    for ax, name, part in drawn:
        ax.set_title(title(name, part), fontsize=10)
    return fig, drawn


def _finish(fig, drawn, label, most=4) -> Figure:
    if drawn:
        label_left(drawn, label)
        legend_below(fig, drawn, most)
    return fig


def _steps(ax, steps) -> None:
    """Checkpoints at equal distances: they are denser early, where most happens."""
    ax.set_xticks(range(len(steps)), [f"{step}" for step in steps], rotation=60, fontsize=SMALLEST)
    ax.set_xlabel("step (checkpoints, not to scale)")


def layers(table: pd.DataFrame) -> Figure:
    """Similarity of base and tuned per layer beside the noise floor; columns panel, layer,
    similarity, low, high, floor, n, beyond (bool: below the floor after BH over layers; drawn as a
    filled marker).
    """
    fig, drawn = _panels(table, (3.6, 3.4), sharey=True)
    own = {"color": PALETTE[0]}
    for ax, _, part in drawn:
        ax.fill_between(part["layer"], part["low"], part["high"], alpha=0.2, **own)
        ax.plot(part["layer"], part["similarity"], label="base vs tuned (95 % CI)", **own)
        for beyond, face in ((True, PALETTE[0]), (False, "white")):
            some = part[part["beyond"] == beyond]
            said = "changed beyond the floor (BH)" if beyond else "not beyond the floor"
            look = own | {"markerfacecolor": face, "markersize": 8}
            label = said if len(some) else None
            ax.plot(some["layer"], some["similarity"], "o", label=label, **look)
        ax.plot(part["layer"], part["floor"], label="null: split-half noise floor", **NULL)
        ax.set(xlabel="layer", ylim=(0, 1.02))
        whole_numbers(ax)
    return _finish(fig, drawn, "similarity of components")


def differences(table: pd.DataFrame, label: str, null: str, names) -> Figure:
    """Effects minus their null, which is drawn at 0, along the steps; columns panel, line (one of
    `names`, whose places give the colours), step, value, low, high (drawn as a band), n.
    """
    fig, drawn = _panels(table, (7.2, 3.6))
    for ax, _, part in drawn:
        places = sorted(pd.unique(part["step"]))
        _steps(ax, places)
        for line, rows in part.groupby("line", sort=False):
            n, at = names.index(line), [places.index(place) for place in rows["step"]]
            colour = PALETTE[n % 8]
            ax.fill_between(at, rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
            look = {"color": colour, "marker": SHAPES[n % 8], "markersize": 4}
            ax.plot(at, rows["value"], label=line, **look)
        ax.axhline(0, label=f"null: {null}", **NULL)
    return _finish(fig, drawn, label, 6)


def where(table: pd.DataFrame) -> Figure:
    """Change beyond noise or beyond a control's, category by layer, around a white 0; columns
    panel, category, layer, value, beyond (told from 0: dotted), n. All panels share one scale.
    """
    fig, drawn = _panels(table, (3.1, 2.7))
    for ax, _, part in drawn:
        most = table["value"].abs().max()
        look = {"vmin": -most, "vmax": most, "cmap": "PuOr_r"}
        heat_map(ax, part, "category", "layer", "value", **look, cbar_kws={"shrink": 0.8})
        names, depths = (list(pd.unique(part[key])) for key in ("category", "layer"))
        told = part[part["beyond"]]
        at = [
            [found.index(one) + 0.5 for one in told[key]]
            for key, found in (("layer", depths), ("category", names))
        ]
        ax.scatter(*at, s=4, color="black", label="told from 0 (Benjamini-Hochberg)")
        ax.set_xticks([n + 0.5 for n in range(0, len(depths), 5)], depths[::5])
        ax.set(xlabel="layer", ylabel="")
        if not ax.get_subplotspec().is_first_col():
            ax.set_yticks([])
    return _finish(fig, drawn, "")


def training(table: pd.DataFrame) -> Figure:
    """Similarity to the base along the steps of instruction tuning and, its null, of further
    pre-training; columns panel, run, step, value, low, high, n.
    """
    fig, drawn = _panels(table, (3.8, 3.4), sharey=True)
    looks = {
        "instruction tuning": {"color": PALETTE[0], "marker": "o"},
        "further pre-training": NULL | {"marker": "D"},
    }
    for ax, _, part in drawn:
        for run, look in looks.items():
            line = part[part["run"] == run]
            at, null = np.arange(len(line)), "null: " * (run != "instruction tuning")
            ax.fill_between(at, line["low"], line["high"], color=look["color"], alpha=0.2)
            ax.plot(at, line["value"], label=f"{null}{run} (95 % CI)", markersize=4, **look)
            _steps(ax, line["step"])
        ax.set_ylim(0, 1.02)
    return _finish(fig, drawn, "similarity to the base")


def trajectory(table: pd.DataFrame) -> Figure:
    """Ability and component change over a tuning, as shares of the final change; columns panel,
    line, step, value, null (bool: drawn as one), n.
    """
    fig, drawn = _panels(table, (4.4, 3.8), sharey=True)
    names = list(pd.unique(table.loc[~table["null"], "line"])) if drawn else []
    for ax, _, part in drawn:
        for line, values in part.groupby("line", sort=False):
            look = NULL | {"marker": "x"}
            if line in names:
                n = names.index(line)
                look = {"color": PALETTE[-n % 8], "marker": SHAPES[n % 8], "linewidth": 1.8}
            ax.plot(range(len(values)), values["value"], label=line, markersize=5, **look)
            _steps(ax, values["step"])
    for ax, *_ in drawn[:1]:  # all share its axis
        ax.set_ylim(min(-0.05, 1.05 * table["value"].min()), max(1.05, 1.03 * table["value"].max()))
    return _finish(fig, drawn, "share of the final change", 3)


def matter(table: pd.DataFrame) -> Figure:
    """What each set's ablation costs beyond random sets, which are its null, 0; columns panel,
    what, half, critical, low, high, n.
    """
    fig, drawn = _panels(table, (4.2, 3.2))
    for ax, _, part in drawn:
        names, parts = list(pd.unique(part["what"])), list(pd.unique(part["half"]))
        for n, half in enumerate(parts):
            rows = part[part["half"] == half].rename(columns={"critical": "value"})
            at = [names.index(what) + 0.2 * (n - (len(parts) - 1) / 2) for what in rows["what"]]
            said = "both halves" if half == "all" else f"measured on {half}"
            _points(ax, at, rows, n, label=f"{said} (95 % CI)", capsize=3)
        ax.axhline(0, label="null: as many random neurons of the same layers", **NULL)
        turned = {"rotation": 40, "fontsize": SMALLEST} if len(names) > 3 else {}
        ax.set_xticks(range(len(names)), names, **turned)
        ax.set_xlim(-0.5, len(names) - 0.5)
    return _finish(fig, drawn, "loss beyond random sets\n(nats per token)", 2)


def _points(ax, at, rows, n, **look) -> None:
    """Values with their intervals at `at`, in the n-th colour and shape."""
    bars = error_bars(rows["low"], rows["value"], rows["high"])
    look |= {"color": PALETTE[n % 8], "marker": SHAPES[n % 8], "linestyle": ""}
    ax.errorbar(at, rows["value"], bars, **look)


def improved(table: pd.DataFrame) -> Figure:
    """What tunings made of each category, above 0 better; columns panel (the measure), category,
    tuning, value, low, high, n. An axis that reaches beyond 1 (nats, never shares) is logarithmic
    from 0.1 on, so that no category squashes the others.
    """
    fig, drawn = _panels(table, (4.4, 3.4))
    for ax, _, part in drawn:
        names, tunings = list(pd.unique(part["category"])), list(pd.unique(part["tuning"]))
        for n, tuning in enumerate(tunings):
            rows = part[part["tuning"] == tuning]
            shift = 0.13 * (n - (len(tunings) - 1) / 2)
            at = [names.index(category) + shift for category in rows["category"]]
            _points(ax, at, rows, n, label=tuning, capsize=2, markersize=4)
        ax.axhline(0, label="null: nothing gained", **NULL)
        ax.set_xticks(range(len(names)), names, fontsize=SMALLEST)
        if part[["low", "high"]].abs().max(axis=None) > 1:
            ax.set_yscale("symlog", linthresh=0.1, linscale=0.4)
            ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=0.1, subs=(1, 3)))
            ax.yaxis.set_major_formatter("{x:g}")
    return _finish(fig, drawn, "improvement", 6)


def transplant(table: pd.DataFrame) -> Figure:
    """Loss along the share of neurons transplanted; columns panel, set ("most moved", "random"),
    share, loss, low, high (of the draws), host (loss without), donor (the other model's, which may
    lie far off: a number in the title), n.
    """
    fig, drawn = _panels(table, (4.3, 3.5))
    kinds = {
        "most moved": ("most moved first", {"color": PALETTE[0], "marker": "o"}),
        "random": ("null: as many random, same layers (band: all draws)", NULL | {"marker": "D"}),
    }
    for ax, _, part in drawn:
        for kind, (label, look) in kinds.items():
            line = part[part["set"] == kind]
            band = {"color": look["color"], "alpha": 0.25, "linewidth": 0}
            ax.fill_between(100 * line["share"], line["low"], line["high"], **band)
            ax.plot(100 * line["share"], line["loss"], label=label, markersize=5, **look)
        ax.axhline(
            part["host"].iloc[0], color=PALETTE[1], linewidth=1.2, label="the model as it was"
        )
        donor = f"the weights are those of a model at {part['donor'].iloc[0]:.2f}"
        ax.set_title(f"{ax.get_title()}\n{donor}")
        ax.set(xlabel="% of neurons transplanted", xlim=(-2, 102))
    return _finish(fig, drawn, "loss of references\n(nats per token)", 2)


def weights(table: pd.DataFrame) -> Figure:
    """Change in frequency along change in weights, in bins of equal number per layer; columns
    panel, layer, weight (relative change), moved (mean |change of p or f|), components (of the
    bin; single ones are not joined), null (the layer's mean: no relation), n.
    """
    fig, drawn = _panels(table, (4.3, 3.5))
    for ax, _, part in drawn:
        most = max(part["layer"].nunique() - 1, 1)
        for i, (layer, line) in enumerate(part.groupby("layer")):
            look = {"color": plt.cm.viridis(i / most * 0.85), "marker": SHAPES[i % 8]}
            look |= {"linestyle": "-" if line["components"].min() > 1 else "", "clip_on": False}
            ax.plot(line["weight"], line["moved"], label=f"layer {layer}", markersize=5, **look)
            said = None if i else "null: no relation (the layer's mean)"
            ax.plot(line["weight"], line["null"], label=said, **NULL | {"linewidth": 1})
        ax.set(xlabel="relative change of its weights", ylim=(0, None))
    return _finish(fig, drawn, "mean |change of p| (of f)", 5)
