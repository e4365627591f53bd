"""Losses under ablations, kept on disk: what was measured once is not measured again, by no
notebook and after no interruption.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np

from ..record import digest, sha256

HELPERS = Path(__file__).resolve().parents[1]


@cache
def code() -> str:
    """A digest of the code that a loss hangs on: after a change of it, all are measured anew."""
    files = [*sorted((HELPERS / "capture").glob("*.py")), HELPERS / "study" / "evaluate.py"]
    return digest([sha256(file) for file in files])


class Losses:
    """{key: losses of some rows, nats per token, float64 [n]} in a file of JSON lines, one for each
    set that was measured; written at once, in one piece, so any number of processes may share it.

    settings: all that decides a loss besides its key. Lines of other settings stay, and are not
    read; a line that was cut short is measured again, and so is a loss that is not finite. (Ours.)
    """

    def __init__(self, path, settings: dict):
        self.path = Path(path)
        self.settings = digest(settings | {"code": code()})
        self.kept = dict(self._lines())

    def __call__(self, key: str, compute) -> np.ndarray:
        """What is kept under this key, else `compute()`."""
        if key not in self.kept:
            self.kept[key] = np.asarray(compute(), float)
            self._keep(key, self.kept[key])
        return self.kept[key]

    def _lines(self):
        text = self.path.read_text("utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            try:
                settings, key, losses = json.loads(line)
                found = np.array(losses, float)
            except (ValueError, TypeError):
                continue
            if settings == self.settings and isinstance(key, str) and found.ndim == 1:
                yield key, found

    def _keep(self, key, losses):
        if not np.isfinite(losses).all():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps([self.settings, key, losses.tolist()], separators=(",", ":"))
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"\n{line}".encode())  # after a line that was cut short, a new one
