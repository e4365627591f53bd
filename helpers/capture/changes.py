"""Changes of a model for a while, taken back in whatever order their contexts close."""

from contextlib import contextmanager
from dataclasses import dataclass

_open: list = []  # in the order in which they were opened


@dataclass(eq=False)
class _Change:
    target: object
    do: object
    undo: object


@contextmanager
def changed(target, do):
    """While open, a change of `target` holds: `do()` makes it and returns what takes it back.

    Contexts of one target may overlap: the later ones are undone before this one is, last first,
    and done again after it.
    """
    mine = _Change(target, do, do())
    _open.append(mine)
    try:
        yield
    finally:
        later = [one for one in _open[_open.index(mine) + 1 :] if one.target == target]
        for one in (*later[::-1], mine):
            one.undo()
        _open.remove(mine)
        for one in later:
            one.undo = one.do()


def replaced(view, at, rows):
    """While open, the rows `at` (a mask) of a view of weights are others."""
    held = [rows]

    def swap():
        held[0], view[at] = view[at], held[0]  # view[at] is a copy
        return swap

    return changed(view.data_ptr(), swap)


def swapped(module, name: str, around):
    """While open, one instance has another method, `around(the one it has)`; then the former
    instance attribute, if any, comes back.
    """
    own = vars(module)

    def do():
        former = {name: own[name]} if name in own else {}
        own[name] = around(getattr(module, name))

        def undo():
            del own[name]
            own.update(former)

        return undo

    return changed((id(module), name), do)
