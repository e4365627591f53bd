"""Where things lie. Nothing here reads, writes or creates anything."""

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


def results_dir(profile: str) -> Path:
    """Folder of everything one profile computed: counts, tables, executed notebooks, summary.json."""
    return DATA / "results" / profile


def counts_dir(profile: str, pair: str, variant: str, positions: str) -> Path:
    """Folder of the counts of one model (`variant`: base or tuned) at one kind of token
    `positions`.
    """
    return results_dir(profile) / pair / variant / positions


def figures_dir(profile: str) -> Path:
    """Folder of one profile's figures (PNG, SVG and the CSV each was drawn from)."""
    return FIGURES / profile


def short(path) -> str:
    """A path as a message shows it: relative to the repository where it lies inside."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
