"""Losses under ablations, kept on disk: what was measured once is not measured again, by no
notebook and after no interruption.
"""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..record import digest, sha256, writing

ALSO = ("study/evaluate.py", "study/study.py")  # code that a loss hangs on, besides `capture`


def code_of(helpers) -> str:
    """A digest of the code in a folder `helpers` that a loss hangs on."""
    helpers = Path(helpers)
    files = [*sorted((helpers / "capture").glob("*.py")), *(helpers / name for name in ALSO)]
    return digest([sha256(file) for file in files])


CODE = code_of(Path(__file__).resolve().parents[1])  # as it was imported


def line_of(settings: str, key: str, losses: list[float]) -> str:
    """What is kept of one set: JSON that ends with a digest of the rest, so that a line which was
    cut or edited is not taken for one that was measured.

    >>> line_of("settings", "key", [0.5])
    '["settings","key",[0.5],"6396ff9710b3e1b7"]'
    """
    held = [settings, key, losses]
    return json.dumps([*held, digest(held)[:16]], separators=(",", ":"))


class Losses:
    """{key: losses of some rows, nats per token, float64 [n]} in a file of JSON lines, one for each
    set that was measured; written at once, in one piece, so any number of processes may share it.

    settings: all that decides a loss besides its key. Lines of other settings stay, and are not
    read; a line that is not as it was written is measured again, and so is a loss that is not
    finite. Without a path they are remembered, not kept. (Ours.)
    """

    def __init__(self, path=None, settings: dict | None = None):
        self.path = path and Path(path)
        self.settings = digest((settings or {}) | {"code": CODE})
        self.kept = dict(self._lines()) if path else {}

    def __call__(self, keys: list[str], compute) -> list[np.ndarray]:
        """What is kept under each key; `compute(missing)` yields the others, kept one by one."""
        missing = [key for key in dict.fromkeys(keys) if key not in self.kept]
        found = {}
        for key, losses in zip(missing, compute(missing) if missing else (), strict=True):
            found[key] = np.asarray(losses, float)
            if np.isfinite(losses).all():
                self.kept[key] = found[key]
                self._keep(key, found[key])
        return [self.kept[key] if key in self.kept else found[key] for key in keys]

    def _lines(self):
        text = self.path.read_text("utf-8", errors="replace") if self.path.is_file() else ""
        for line in text.splitlines():
            if not line.startswith(f'["{self.settings}",'):
                continue
            with suppress(ValueError, RecursionError):  # no JSON, or of another form
                _, key, losses, _ = json.loads(line)
                if line == line_of(self.settings, key, losses):
                    yield key, np.array(losses, float)

    def _keep(self, key, losses):
        if not self.path:
            return
        line = line_of(self.settings, key, losses.tolist())
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(f"\n{line}".encode())  # after a line that was cut short, a new one
