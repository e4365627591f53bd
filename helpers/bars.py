"""Progress bars where a person can see them: in a terminal and in a notebook, not in a pipe."""

import sys

from tqdm import tqdm


def bar(steps=None, label: str = "", **settings) -> tqdm:
    """A tqdm bar over `steps`, or one to move by hand; gone when it is done, silent where stderr is
    a pipe or a file. `settings` are tqdm's own.

    >>> [step for step in bar("ab", "reading")]
    ['a', 'b']
    """
    return tqdm(steps, desc=label, leave=False, disable=not seen(sys.stderr), **settings)


def seen(stream) -> bool:
    """Whether a person looks at what is written there: a terminal, or the page of a notebook.

    >>> import io
    >>> seen(io.StringIO())
    False
    """
    return stream.isatty() or type(stream).__module__.startswith("ipykernel.")
