"""Drawings of what is counted: a gated feed-forward block, and a sparse one with its router."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from .style import PAGE, PALETTE, SMALLEST

DENSE, SPARSE = "one gated block", "a mixture of experts, K = 2"
FILL = {"weights": "0.93", "counted": "#CFE5F5", "value": "white", "idle": "white"}
COLUMNS = ["panel", "part", "label", "kind", "x", "y", "to"]
PARTS = (
    (DENSE, "x", "x", "value", 2, 0, "gate up"),
    (DENSE, "gate", "gate", "weights", 1, 1, "act"),
    (DENSE, "up", "up", "weights", 3, 1, "h"),
    (DENSE, "act", "A = act(gate x)\ncounted: A > 0", "counted", 1, 2, "h"),
    (DENSE, "h", "h = A ⊙ up x", "value", 2, 3, "down"),
    (DENSE, "down", "down", "weights", 2, 4, "out"),
    (DENSE, "out", "to the residual stream", "value", 2, 5, ""),
    (SPARSE, "x", "x", "value", 2.6, 0, "router e1 e3 shared"),
    (SPARSE, "router", "router\ncounted: its K experts", "counted", 0.4, 1.2, "e1 e3"),
    (SPARSE, "e0", "expert 0", "idle", 0.4, 2.5, ""),
    (SPARSE, "e1", "expert 1\nA > 0", "counted", 1.5, 2.5, "sum"),
    (SPARSE, "e2", "expert 2", "idle", 2.6, 2.5, ""),
    (SPARSE, "e3", "expert 3\nA > 0", "counted", 3.7, 2.5, "sum"),
    (SPARSE, "shared", "shared\nA > 0", "counted", 4.8, 2.5, "sum"),
    (SPARSE, "sum", "weighted sum", "value", 2.6, 4, "out"),
    (SPARSE, "out", "to the residual stream", "value", 2.6, 5, ""),
)


def parts() -> pd.DataFrame:
    """The boxes of the drawing: columns panel, part, label, kind (weights, value, counted: what a
    capture counts, idle: an expert that this token does not reach), x, y, to (parts that it feeds).
    """
    return pd.DataFrame(PARTS, columns=COLUMNS)


def blocks(table: pd.DataFrame) -> Figure:
    """The drawing of `parts`, a panel each: boxes, and arrows the way a token goes."""
    names = list(pd.unique(table["panel"]))
    size = min(5.2 * len(names), PAGE), 4.4
    fig, axes = plt.subplots(1, len(names), figsize=size, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        own = table[table["panel"] == name].set_index("part")
        boxes = {part.Index: _box(ax, part) for part in own.itertuples()}
        for part in own.itertuples():
            for other in part.to.split():
                _arrow(ax, boxes[part.Index], boxes[other], part.kind == "counted")
        ax.set(xlim=(own["x"].min() - 0.9, own["x"].max() + 0.9), ylim=(-0.5, 5.5), title=name)
        ax.axis("off")
    return fig


def _box(ax, part):
    idle = part.kind == "idle"
    edge = {"edgecolor": "0.7" if idle else "0.2", "linestyle": "--" if idle else "-"}
    frame = {"boxstyle": "round,pad=0.4", "facecolor": FILL[part.kind], **edge}
    look = {"ha": "center", "va": "center", "size": SMALLEST + 1, "color": "0.5" if idle else "0"}
    weight = "bold" if part.kind == "counted" else "normal"
    return ax.text(part.x, part.y, part.label, bbox=frame, weight=weight, zorder=3, **look)


def _arrow(ax, start, end, counted):
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    look = {"arrowstyle": "-|>", "color": PALETTE[0] if counted else "0.3", "linewidth": 1.4}
    look |= {"shrinkA": 2, "shrinkB": 2, **ends}
    ax.annotate("", end.get_position(), start.get_position(), arrowprops=look)
