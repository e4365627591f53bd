"""SPARCOM: which neurons and experts of a language model serve which kind of instruction.

The public face: `load_model`, `count`, `compare_counts`, `find_sets`, `overlap`, `ablation_table`
(tables), `draw_sets`, `draw_ablation` (figures), `ablate` (a context). Everything else stands in
the packages; see README.md in this folder.
"""

from importlib import import_module

FACE = {
    "load_model": "capture.loading",
    "count": "study.quick",
    "compare_counts": "study.quick",
    "find_sets": "study.quick",
    "overlap": "study.quick",
    "ablation_table": "study.own",
    "draw_sets": "plots.own",
    "draw_ablation": "plots.own",
    "ablate": "capture.interventions",
}
__all__ = list(FACE)


def __getattr__(name: str):
    """A name of the face, imported when it is first asked for: torch is not loaded before."""
    if name not in FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FACE[name]}", __name__), name)
