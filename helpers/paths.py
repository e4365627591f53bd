"""Where things lie. Nothing here reads, writes or creates anything."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
MODELS = DATA / "models"
CACHE = DATA / "cache" / "models"  # fetched and converted checkpoints; git-ignored
HEXAINST = DATA / "hexainst"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
FIGURES = ROOT / "figures"
CLAIMS = DATA / "claims.csv"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


class UserError(Exception):
    """Bad input, said in one message: what was found, what was expected, where, and what to do."""

    def _render_traceback_(self):
        """Jupyter prints this instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


def checked(name, kind: str = "name") -> str:
    """`name`, if it may become a file's or a folder's; `kind` says in the message what it names.

    One to 64 letters (A to Z), digits, '.', '_' and '-', the first no '.' or '-': so no name leads
    out of its folder, hides, or is taken for an option. Raises UserError for any other. (Ours.)

    >>> checked("tiny-dense", "pair")
    'tiny-dense'
    """
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    found = ascii(name[:80] if isinstance(name, str) else type(name).__name__)
    raise UserError(
        f"{kind} {found} cannot name a file or folder: expected 1 to 64 letters, digits, '.', '_' "
        "and '-', the first a letter, a digit or '_'. Choose another."
    )


def resolve(path) -> Path:
    """A path that a user gave, as it is if absolute, else from the repository; `~` is the home.

    >>> resolve("data/mine.jsonl") == DATA / "mine.jsonl"
    True
    """
    return ROOT / os.path.expanduser(path)


def results_dir(profile: str) -> Path:
    """Folder of all that one profile computed: counts, tables, executed notebooks, summary.json."""
    return DATA / "results" / checked(profile, "profile")


def counts_dir(profile: str, pair: str, variant: str, positions: str) -> Path:
    """Folder of the counts of one model (`variant`: base or tuned) at one kind of token
    `positions`.
    """
    own = checked(pair, "pair"), checked(variant, "variant"), checked(positions, "positions")
    return results_dir(profile).joinpath(*own)


def figures_dir(profile: str) -> Path:
    """Folder of one profile's figures (PNG, SVG and the CSV each was drawn from)."""
    return FIGURES / checked(profile, "profile")


def short(path) -> str:
    """A path as a message shows it: relative to the repository where it lies inside."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
