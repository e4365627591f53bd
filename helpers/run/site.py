"""A static site of what a profile found: findings, figures, notebooks, atlas, ablations, glossary.
It opens from the disk, without a server or a network.

The folder is written beside its place and moved there whole; a folder that holds anything the site
did not write is refused.
"""

import os
import re
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pygments.formatters import HtmlFormatter

from ..config import Profile, load_profile
from ..paths import DATA, NOTEBOOKS, PROFILES, ROOT, figures_dir, resolve, results_dir, short
from ..plots.explorer import explorer
from ..record import (
    DamagedFile,
    UserError,
    atomic_folder,
    read_json,
    write_json,
)
from ..study import grid, ledger
from ..study.study import studies
from ..study.summary import verified
from . import atlas_page
from .findings import PUBLISHED, effect_cell, published
from .render import Book, led, markdown, plain

PAGES = Path(__file__).with_name("pages")
MARK = "site.json"  # what says that a folder is ours, and lists its files
COMMITTED = "tiny"  # whose executed notebooks are the committed ones
COPIED, LARGEST = (".py", ".csv", ".json", ".yaml"), 2_000_000  # linked files that come along
TABLES = (  # of the ledger: what is read of its tests and its verdicts
    ("id", "components", "pair", "half", "effect", "low", "high", "null", "supported"),
    ("id", "components", "verdict", "where"),
)


# ---- what a profile has


@dataclass
class Source:
    """What there is of one profile; each part may be missing."""

    profile: Profile

    @property
    def name(self) -> str:
        return self.profile.name

    @cached_property
    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """(tests, verdicts) of the ledger: this machine's run, else what is published."""
        for folder, names, whole in (
            (results_dir(self.name), ("claims.csv", "verdicts.csv"), verified),
            (DATA / "published" / self.name, PUBLISHED, published),
        ):
            if all((folder / name).is_file() for name in names):
                return tuple(_read(whole(folder, name), *TABLES[n]) for n, name in enumerate(names))
        return None

    @cached_property
    def books(self) -> list[Book]:
        """The executed notebooks, in order; for `tiny` the committed ones stand in."""
        found = {path.stem: path for path in NOTEBOOKS.glob("*.ipynb")}
        found = found if self.name == COMMITTED else {}
        own = (results_dir(self.name) / "notebooks").glob("[!.]*.ipynb")
        found |= {path.stem: path for path in own if ".failed" not in path.name}
        return [Book(found[stem]) for stem in sorted(found)]

    @cached_property
    def figures(self) -> list[Path]:
        return sorted(figures_dir(self.name).glob("*.png"))

    @property
    def atlas(self) -> Path | None:
        path = results_dir(self.name) / "atlas.csv"
        return path if path.is_file() else None

    @property
    def there(self) -> bool:
        return bool(
            self.tables or self.figures or self.atlas or any(b.executed for b in self.books)
        )


def _read(path: Path, *columns) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values={"p": [""], "holm": [""]})
    except (OSError, ValueError) as error:
        raise DamagedFile(
            f"{short(path)} cannot be read as a table: {error}. Run notebook 08 again."
        ) from error
    if missing := [name for name in columns if name not in table]:
        raise DamagedFile(f"{short(path)} has no column {missing[0]}. Run notebook 08 again.")
    return table


def sources(name: str) -> list[Source]:
    """The profile asked for, then every other that has results. Raises UserError if it has none."""
    first = Source(load_profile(name))
    if not first.there:
        raise UserError(
            f"profile {name} has no results yet: nothing in {short(results_dir(name))} or "
            f"{short(figures_dir(name))}. Run `make reproduce PROFILE={name}` first."
        )
    others = sorted({path.stem for path in PROFILES.glob("*.yaml")} - {name})
    having = [n for n in others if results_dir(n).is_dir() or (DATA / "published" / n).is_dir()]
    return [first, *(s for s in (Source(load_profile(n)) for n in having) if s.there)]


# ---- what the pages say


def findings(source: Source) -> dict:
    """The ledger for the start page: [(headline claim, its rows)], all their rows, all others'."""
    if source.tables is None:
        return {}
    claims, (tests, verdicts) = ledger.read_ledger(), source.tables
    known = claims[claims["id"].isin(verdicts["id"])]
    head, others = (
        claim_rows(known[known["headline"].eq("yes") == yes], tests, verdicts)
        for yes in (True, False)
    )
    return {
        "said": [(claim, list(rows)) for claim, rows in groupby(head, itemgetter("claim"))],
        "headline": head,
        "others": others,
        "pairs": list(pd.unique(tests["pair"])),
    }


def claim_rows(claims, tests, verdicts) -> list[dict]:
    """A row per claim and kind of component: its verdict, and each pair's effect on all data."""
    rows = []
    for claim in claims.to_dict("records"):
        for said in verdicts[verdicts["id"] == claim["id"]].to_dict("records"):
            mine = tests[(tests["id"] == claim["id"]) & (tests["half"] == "all")]
            mine = mine[mine["components"] == said["components"]]
            effects = {pair: effect_cell(part) for pair, part in mine.groupby("pair")}
            rows.append(claim | said | {"effects": effects})
    return rows


def drawn(source: Source) -> list[dict]:
    """The figures with number and caption, as the notebook that draws each has them. One that none
    of them draws is of an older run: left out.
    """
    listed = [(book, *figure) for book in source.books for figure in book.figures]
    found = []
    for path in source.figures:
        fits = [n for n, one in enumerate(listed) if PurePosixPath(path.stem).match(one[1])]
        if fits or not source.books:
            at = fits[0] if fits else 0
            book, _, number, caption = listed[at] if fits else (None, "", "", "")
            found.append(
                {"at": at, "path": path, "book": book, "number": number, "caption": caption}
            )
    return sorted(found, key=itemgetter("at", "path"))


def alt(figure: dict) -> str:
    """What a figure shows, for those who do not see it; its table is linked beside it."""
    first = re.split(r"(?<=[.:?]) ", plain(figure["caption"]))[0]
    if not first:
        return f"Figure {figure['path'].stem}; its table holds the numbers."
    return f"Figure {figure['number']}. {first} The table beside it holds the numbers."


def families() -> list[tuple[str, list[str]]]:
    """[(kind, families)] that are read exactly: the README's list, which a test holds equal to the
    families of tests/zoo.py.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"\*\*(Dense|Mixture of experts):\*\* ([^.]+)\.", text)
    return [(kind, names.split(", ")) for kind, names in found]


# ---- the folder


@dataclass
class Site:
    """A site while it is written into `folder`; `files` are those of the repository that its pages
    link to, {file: place}.
    """

    folder: Path
    sources: list[Source]
    files: dict[Path, str] = field(default_factory=dict)

    @cached_property
    def jinja(self) -> Environment:
        made = Environment(
            loader=FileSystemLoader(PAGES),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        made.filters["short"] = lambda value: "–" if pd.isna(value) else f"{value:.3g}"
        return made

    def home(self, source: Source) -> str:
        """Where a profile's pages stand, from the root of the site."""
        return f"profiles/{source.name}/"

    def page(self, place: str, template: str, source: Source, **values) -> None:
        """One page at `place`, with what its frame needs: ways to the root and other profiles."""
        up, name = "../" * place.count("/"), place.removeprefix(self.home(source))
        own = place.startswith(self.home(source))
        switch = [
            (other.name, up + self._same(other, name if own else "index.html", place, own))
            for other in self.sources
        ]
        nav = [
            ("Findings", self.home(source) + "index.html"),
            ("Notebooks", self.home(source) + "notebooks.html"),
            ("Atlas", self.home(source) + "atlas.html"),
            ("Ablations", self.home(source) + "explorer.html"),
            ("Glossary", "glossary.html"),
            ("Model families", "families.html"),
        ]
        text = self.jinja.get_template(template).render(
            up=up, nav=nav, place=place, switch=switch, profile=source.name, **values
        )
        self.write(place, text)

    def _same(self, other: Source, name: str, place: str, own: bool) -> str:
        """The same page of another profile, or its first where it has no such notebook."""
        if not own:
            return self.home(other) + "index.html" if other is not self.sources[0] else place
        stem = PurePosixPath(name).stem
        if "/" in name and stem not in {book.stem for book in other.books}:
            name = "index.html"
        return self.home(other) + name

    def write(self, place: str, text: str) -> None:
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", errors="backslashreplace")

    def lead(self, source: Source, origin: Path, place: str):
        """Where a link of a file of the repository leads, once that file is the page `place`."""
        up = "../" * place.count("/")
        books = {book.path.name: book for book in source.books}

        def to(link: str) -> str | None:
            if re.match(r"https?://|mailto:|#", link):
                return link
            path, _, part = link.partition("#")
            file = Path(os.path.normpath(origin.parent / path))
            if file == ROOT / "docs" / "glossary.md":
                return f"{up}glossary.html" + (f"#{part}" if part else "")
            if file.suffix == ".ipynb":
                known = books.get(file.name)
                return known and f"{up}{self.home(source)}notebooks/{known.stem}.html"
            return self._along(file, up)

        return to

    def _along(self, file: Path, up: str) -> str | None:
        """A small file of the repository comes along; anything else is no link any more."""
        if not file.is_relative_to(ROOT) or not file.is_file():
            return None
        if file.suffix not in (*COPIED, ".md") or file.stat().st_size > LARGEST:
            return None
        place = PurePosixPath("files") / file.relative_to(ROOT).as_posix()
        self.files[file] = str(place.with_suffix(".html") if file.suffix == ".md" else place)
        return up + self.files[file]

    def text(self, source: Source, path: Path, place: str, **values) -> None:
        """A Markdown file of the repository as a page."""
        body = led(markdown(path.read_text("utf-8")), self.lead(source, path, place))
        self.page(place, "page.html", source, title=values.pop("title", path.stem), body=body)

    # -- one profile

    def profile(self, source: Source) -> None:
        """All pages of one profile."""
        home = self.home(source)
        self.start(source, home + "index.html")
        books = [(book, f"notebooks/{book.stem}.html") for book in source.books]
        self.page(home + "notebooks.html", "notebooks.html", source, books=books)
        for n, (book, place) in enumerate(books):
            origin = NOTEBOOKS / book.path.name  # links are written from there
            body = book.html(self.lead(source, origin, home + place))
            near = {"before": books[n - 1] if n else None, "after": (books[n + 1 :] or [None])[0]}
            self.page(home + place, "notebook.html", source, book=book, body=body, **near)
        self.atlas(source, home)
        table = grid.shown(studies(source.profile))
        body = None if table is None else Markup(explorer(table, "", {}, {}, {}).data)
        own = [] if table is None else table[table["ablated"] == table["measured"]]
        rows = [] if table is None else own.to_dict("records")
        self.page(home + "explorer.html", "explorer.html", source, body=body, rows=rows)

    def start(self, source: Source, place: str) -> None:
        """The start page: findings, then figures, each with its caption and its table."""
        up, shown = "../" * place.count("/"), drawn(source)
        for one in shown:
            for file in (one["path"], one["path"].with_suffix(".csv")):
                if file.is_file():
                    self.copy(file, f"{self.home(source)}figures/{file.name}")
            one["table"] = one["path"].with_suffix(".csv").is_file()
            lead = self.lead(source, NOTEBOOKS / "any.ipynb", place)
            one["html"] = led(markdown(one["caption"]), lead)
            one["alt"] = alt(one)
        self.page(
            place,
            "start.html",
            source,
            found=findings(source),
            figures=shown,
            home=up + self.home(source),
            books=source.books,
        )

    def atlas(self, source: Source, home: str) -> None:
        """The atlas' page with its first rows, its data, and the cards' data in files of their
        own, read when a card is opened.
        """
        if source.atlas is None:
            self.page(home + "atlas.html", "atlas.html", source, atlas=None)
            return
        atlas = atlas_page.read(source.atlas)
        data = atlas_page.script(atlas_page.packed(atlas))
        self.write(home + "atlas/rows.js", f"window.ATLAS={data};\n")
        for n, part in enumerate(atlas_page.cards(atlas)):
            self.write(home + f"atlas/{n}.js", f"ATLAS.take({n},{atlas_page.script(part)});\n")
        first = atlas_page.first_rows(atlas)
        self.page(home + "atlas.html", "atlas.html", source, atlas=atlas, first=first)

    def copy(self, file: Path, place: str) -> None:
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)

    def all(self) -> None:
        """Every page, then the list of files that makes the folder ours."""
        first = self.sources[0]
        for source in self.sources:
            self.profile(source)
        self.start(first, "index.html")
        self.text(first, ROOT / "docs" / "glossary.md", "glossary.html", title="Glossary")
        self.page("families.html", "families.html", first, kinds=families())
        done = set()
        while todo := [file for file in self.files if file not in done]:
            for file in todo:
                done.add(file)
                if file.suffix == ".md":
                    self.text(first, file, self.files[file])
                else:
                    self.copy(file, self.files[file])
        for name in ("site.css", "atlas.js"):
            self.copy(PAGES / name, f"assets/{name}")
        colours = HtmlFormatter(style="default").get_style_defs(".highlight")
        self.write("assets/code.css", colours + "\n")
        written = sorted(p.relative_to(self.folder).as_posix() for p in _files(self.folder))
        write_json(self.folder / MARK, {"site": 1, "files": [*written, MARK]})


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]


def ours(target: Path) -> None:
    """Raise UserError unless `target` may be replaced: nothing there, an empty folder, or a site
    that holds no file but those it lists.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{short(target)} is no folder. Name another: --to FOLDER.")
    there = {path.relative_to(target).as_posix() for path in _files(target)}
    listed = set()
    if MARK in there:
        record = read_json(target / MARK)
        listed = set(record.get("files", ())) if isinstance(record, dict) else set()
    if others := sorted(there - listed):
        raise UserError(
            f"{short(target)} holds {others[0]}, which no site of ours wrote"
            f" ({len(others)} such files). Nothing was changed. Name an empty or a new folder: "
            "--to FOLDER."
        )


def build(name: str, to: str | Path | None = None) -> Path:
    """Write the site of a profile, and of every other that has results, to the folder `to`
    (default: data/results/site); the folder. The former site stays until the new one is whole.
    """
    target = Path(os.path.abspath(resolve(to) if to else DATA / "results" / "site"))
    ours(target)
    having = sources(name)
    with atomic_folder(target) as draft:
        Site(draft, having).all()
        ours(target)
    return target
