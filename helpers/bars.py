"""Progress bars where a person can see them: in a terminal and in a notebook, not in a pipe."""

import sys
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

_STAGE = ContextVar("stage", default=None)  # the bar that `moved` moves


def bar(steps=None, label: str = "", **settings) -> tqdm:
    """A tqdm bar over `steps`, or one to move by hand; gone when it is done, silent where stderr is
    a pipe or a file. `settings` are tqdm's own.

    >>> [step for step in bar("ab", "reading")]
    ['a', 'b']
    """
    return tqdm(steps, desc=label, leave=False, disable=not seen(sys.stderr), **settings)


@contextmanager
def stage(label: str, total: int, **settings):
    """Inside, `moved` moves one bar over many short calls; the outermost stage is the one shown.

    >>> with stage("ablations", 2):
    ...     moved(2)
    """
    if _STAGE.get() is not None:
        yield
        return
    with bar(None, label, total=total, delay=5, **settings) as told:
        token = _STAGE.set(told)
        try:
            yield
        finally:
            _STAGE.reset(token)


def moved(by: int) -> None:
    """Move the bar of the stage that is under way, if there is one."""
    told = _STAGE.get()
    if told is not None:
        told.update(by)


def seen(stream) -> bool:
    """Whether a person looks at what is written there: a terminal, or the page of a notebook.

    >>> import io
    >>> seen(io.StringIO())
    False
    """
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")
