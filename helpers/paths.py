"""Where things lie. Nothing here reads, writes or creates anything.

In a clone of the repository everything lies in the clone. The package `sparcom`, installed from it,
brings this code and the profiles alone: run inside a clone it uses that clone, elsewhere the
current directory takes its place, so results go to ./data/results and figures to ./figures.
"""

import os
import re
from pathlib import Path


def _clone(*folders) -> Path | None:
    """The first of these folders that is a clone of the repository."""
    parts = ("helpers", "notebooks/profiles", "data")
    return next((f for f in folders if all((f / part).is_dir() for part in parts)), None)


PACKAGE = Path(__file__).resolve().parent
CLONE = _clone(PACKAGE.parent, Path.cwd())  # None where there is none around
ROOT = CLONE or Path.cwd()
COMMAND = "sparcom" if __name__.startswith("sparcom.") else "python -m helpers.run"
DATA = ROOT / "data"
MODELS = DATA / "models"
CACHE = DATA / "cache" / "models"  # fetched and converted checkpoints; git-ignored
HEXAINST = DATA / "hexainst"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
SHIPPED = PACKAGE / "profiles"  # of an installed package: copies of the clone's
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


def profile_files() -> dict[str, Path]:
    """{name: file} of every profile: a clone's; elsewhere those in ./notebooks/profiles, ./profiles
    or the current directory, and the ones that came with the package.
    """
    folders = [PROFILES] if CLONE else [SHIPPED, Path.cwd(), ROOT / "profiles", PROFILES]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


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
