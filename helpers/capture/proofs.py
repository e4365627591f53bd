"""What was proven of a model holds as long as the model is built as it was then."""

from weakref import WeakKeyDictionary

from .budget import state

OBSERVER = "observer"  # what a bank of experts tells what it does while it is counted


class Proofs:
    """Of each model what was found, as long as its structure is the same. While an intervention is
    open what was found before it stands: the model will be as it was.
    """

    def __init__(self):
        self._found: WeakKeyDictionary = WeakKeyDictionary()  # model -> (structure, what was found)

    def __contains__(self, model) -> bool:
        if model not in self._found:
            return False
        return bool(state(model)) or self._found[model][0] == structure(model)

    def __getitem__(self, model):
        return self._found[model][1]

    def __setitem__(self, model, found) -> None:
        self._found[model] = structure(model), found


def structure(model) -> int:
    """A mark of a model's modules and of what they run: the forwards of their classes, and the
    functions that stand in an instance alone, but for observers, which change nothing. It keeps
    none of them in memory.
    """
    parts = []
    for module in model.modules():
        functions = [(name, value) for name, value in vars(module).items() if callable(value)]
        own = [(name, id(value)) for name, value in functions if name != OBSERVER]
        parts.append((module, type(module), type(module).forward, *own))
    return hash(tuple(parts))
