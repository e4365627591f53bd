"""Figures, each drawn from one tidy table that is saved beside it:
`plots.overlap.waterfall(table)`.
"""

from . import ablation, alteration, claims, data, diagram, overlap, own, sets
from .style import matrices, save_figure

__all__ = [
    "ablation",
    "alteration",
    "claims",
    "data",
    "diagram",
    "matrices",
    "overlap",
    "own",
    "save_figure",
    "sets",
]
