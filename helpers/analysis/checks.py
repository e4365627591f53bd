"""What an analysis refuses before it computes: arrays that are empty, not finite, or of shapes that
do not belong together.
"""

from collections.abc import Sequence
from functools import wraps
from inspect import signature

import numpy as np

from ..record import NotTestable, UserError

COUNTED = ("resamples", "layers", "size")


def takes(**shapes: str):
    """Check a function's arguments before it runs: takes(values="I M", labels="I").

    A letter is a size, the same wherever it stands in one call; `...` are any dimensions, also
    none. Lists become arrays; None and what has no dimensions of its own to show are left alone.
    A trailing `!` asks for whole numbers or booleans, `?` for booleans (or zeros and ones): sets.
    COUNTED arguments are whole numbers above 0; `layers` divides M. Raises UserError for shapes,
    NotTestable for empty arrays and NaN or infinite values.

    >>> @takes(x="I L", y="I")
    ... def total(x, y): return (x.sum(1) * y).sum()
    >>> total([[1, 2], [3, 4]], [1, 1])
    np.int64(10)
    """

    def enter(function):
        parameters = signature(function)

        @wraps(function)
        def checked(*args, **options):
            given = parameters.bind(*args, **options)
            sizes: dict[str, int] = {}
            for name, shape in shapes.items():
                if given.arguments.get(name) is not None:
                    value = _array(name, given.arguments[name])
                    _check(function.__name__, name, value, shape, sizes)
                    given.arguments[name] = value
            for name in COUNTED:
                number = given.arguments.get(name, 1)
                whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
                if not whole or number < 1:
                    raise UserError(
                        f"{function.__name__}: {name} is {number!r}; expected a whole number above "
                        "0."
                    )
            if sizes.get("M", 0) % given.arguments.get("layers", 1):
                raise UserError(
                    f"{function.__name__}: {sizes['M']} components in "
                    f"{given.arguments['layers']} layers; expected whole layers."
                )
            return function(*given.args, **given.kwargs)

        return checked

    return enter


def _array(name, value):
    """Lists as arrays; whatever else has a shape (packed sets, files in memory) as it is."""
    if hasattr(value, "shape"):
        return value
    if isinstance(value, Sequence | int | float):
        try:
            return np.asarray(value)
        except ValueError as error:
            raise UserError(f"{name}: rows of different lengths; expected one array.") from error
    return value


def _check(where, name, value, shape, sizes) -> None:
    found = getattr(value, "shape", None)
    if found is None:
        return
    names = shape.rstrip("!?").split()
    fixed = [n for n in names if n != "..."]
    fits = len(found) == len(fixed) or ("..." in names and len(found) > len(fixed))
    at = names.index("...") if "..." in names else len(names)
    placed = found[:at] + found[len(found) - (len(fixed) - at) :] if at < len(names) else found
    if fits:
        agreed = {n: sizes.setdefault(n, size) for n, size in zip(fixed, placed, strict=True)}
        fits = tuple(agreed[n] for n in fixed) == tuple(placed)
    if not fits:
        known = ", ".join(f"{n} = {size}" for n, size in sizes.items())
        raise UserError(
            f"{where}: {name} has the shape {list(found)}; expected [{', '.join(names)}]"
            f"{' with ' + known if known else ''}. Take all arrays from the same rows."
        )
    if 0 in found:
        raise NotTestable(
            f"{where}: {name} is empty or holds NaN: its shape is {list(found)}; expected at least "
            "one row."
        )
    kind = getattr(getattr(value, "dtype", None), "kind", "b")
    if shape.endswith("!") and kind not in "bui":
        raise UserError(f"{where}: {name} is {value.dtype}; expected whole numbers or booleans.")
    if shape.endswith("?") and kind != "b" and not np.isin(value, (0, 1)).all():
        raise UserError(
            f"{where}: {name} holds {value.dtype} other than 0 and 1; expected sets: which "
            "components are in, as booleans. Make them of counts (top_sets, consensus)."
        )
    if kind == "f" and not np.isfinite([value.min(), value.max()]).all():
        raise NotTestable(
            f"{where}: {name} is empty or holds NaN or infinite values; expected finite ones. "
            "Leave out what cannot be."
        )


def alongside(array, **others) -> None:
    """Raise UserError unless arrays broadcast with `array`: they are of the same rows."""
    for name, other in others.items():
        try:
            np.broadcast_shapes(np.shape(array), np.shape(other))
        except ValueError as error:
            raise UserError(
                f"{name} has the shape {list(np.shape(other))} beside {list(np.shape(array))}; "
                "expected the same rows and components in both."
            ) from error


def same_shape(first, others, what: str) -> None:
    """Raise UserError unless every array of `others` has the shape of `first`."""
    for other in others:
        if np.shape(other) != np.shape(first):
            raise UserError(
                f"{what} of the shape {list(np.shape(other))} beside {list(np.shape(first))}; "
                "expected one value for each pair of the same rows."
            )


def each_category(labels, count: int, halves=None) -> None:
    """Raise UserError unless labels are codes below `count`, NotTestable unless there are two
    categories or more and every one has a row (in every half, where these are given).
    """
    labels = np.asarray(labels)
    if labels.min() < 0 or labels.max() >= count:
        raise UserError(
            f"labels from {labels.min()} to {labels.max()} with {count} sets; expected codes from "
            "0, one set for each category."
        )
    parts = [labels] if halves is None else [labels[halves == h] for h in np.unique(halves)]
    if count < 2 or any(len(np.unique(part)) < count for part in parts):
        raise NotTestable(
            f"{len(np.unique(labels))} categories with rows, {count} sets; expected two categories "
            "or more, each with rows (in each half). Add rows."
        )
