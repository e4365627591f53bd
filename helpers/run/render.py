"""Markdown and notebooks as HTML: formulas as MathML, nothing fetched, links led by the caller."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bs4 import BeautifulSoup
from jinja2 import pass_context
from latex2mathml.converter import convert
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from .notebook import canonical, read

FIGURE = re.compile(r"\*Figure (\d[\d.]*\w*)\. (.+?)(?=\n\s*\n|\Z)", re.S)  # to its paragraph's end
STAR = re.compile(r"(?<!\*)\*(?!\*)")  # a caption is slanted as a whole: on its own it need not be
SAVED = re.compile(r'save_figure\([^"]*?f?"([^"]+)"')
LOUD = ("script", "iframe", "object", "embed", "link", "meta", "base", "form")


def formula(latex: str, display: str = "inline") -> str:
    """A formula in LaTeX as MathML, which browsers draw and screen readers say; one that cannot be
    converted is shown as it was typed.
    """
    try:
        return convert(latex.replace(r"\%", "%"), display=display)
    except Exception:  # the library has no common error: IndexError, KeyError, its own
        return f"<code>{escape(latex)}</code>"


class _Renderer(IPythonRenderer):
    def inline_math(self, body):
        return formula(body)

    def block_math(self, body):
        return formula(body, "block")

    def latex_environment(self, name, body):
        return formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def markdown(text: str) -> str:
    """Markdown, its HTML and its formulas, as HTML.

    >>> markdown("a **bold** word")
    '<p>a <strong>bold</strong> word</p>\\n'
    """
    return MarkdownWithMath(_Renderer(escape=False, exclude_anchor_links=True)).render(text)


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source):
        return markdown(source)


@cache
def _exporter() -> _Exporter:
    return _Exporter(template_name="basic")


def plain(text: str) -> str:
    """Markdown as the words alone, on one line.

    >>> plain("The *first* [link](x.md), `code`")
    'The first link, code'
    """
    return " ".join(BeautifulSoup(markdown(text), "html.parser").get_text().split())


def _quiet(soup) -> None:
    """Take out what would run or be fetched; a picture from elsewhere leaves its words."""
    for tag in soup.find_all(LOUD):
        tag.decompose()
    for tag in soup.find_all(True):
        for name in [name for name in tag.attrs if name.startswith("on")]:
            del tag[name]
    for image in soup.find_all("img"):
        if not image.get("src", "").startswith("data:image/"):
            image.replace_with(image.get("alt", ""))


def led(html: str, lead: Callable[[str], str | None]) -> Markup:
    """The HTML made fit for a page: each link goes where `lead` says (None: its words stay, without
    the link), wide tables scroll in a box of their own, what would run or fetch is taken out.
    """
    soup = BeautifulSoup(html, "html.parser")
    _quiet(soup)
    for link in soup.find_all("a"):
        target = lead(link.get("href", ""))
        if target is None:
            link.unwrap()
        else:
            link["href"] = target
    for table in soup.find_all("table"):
        box = {"class": "wide", "tabindex": "0", "role": "region", "aria-label": "table"}
        table.wrap(soup.new_tag("div", attrs=box))
    for head in soup.select("thead th"):
        head["scope"] = head.get("scope", "col")
    for box in soup.select("pre"):
        box["tabindex"] = "0"
    return Markup(soup)


class Book:
    """A notebook for reading: `title`, `question` (the line below it), `executed`, and `figures`,
    [(pattern of the file's name, number, caption)] in order.
    """

    def __init__(self, path: Path):
        self.path, self.stem = path, path.stem
        self.node = canonical(read(path))
        code = [cell for cell in self.node.cells if cell.cell_type == "code" and cell.source]
        self.executed = bool(code) and all(cell.execution_count for cell in code)
        first = self.node.cells[0].source if self.node.cells else ""
        found = re.search(r"^# (.+)$", first, re.M), re.search(r"^> (.+)$", first, re.M)
        self.title = plain(found[0][1]) if found[0] else self.stem
        self.question = plain(found[1][1]) if found[1] else ""
        self.figures = list(self._captioned())

    def _captioned(self):
        """Each saved figure with the caption that stands before it; the picture gets it as the
        text for those who do not see it.
        """
        number, caption = "", ""
        for cell in self.node.cells:
            if cell.cell_type == "markdown":
                if captions := FIGURE.findall(cell.source):
                    number, caption = captions[-1][0], STAR.sub("", captions[-1][1])
                continue
            for name in SAVED.findall(cell.get("source", "")):
                yield re.sub(r"\{.*?\}", "*", name), number, caption
                for output in cell.outputs:
                    if "image/png" in output.get("data", {}):
                        said = f"Figure {number}. {plain(caption)}"
                        output.metadata["image/png"] = {"alt": said}

    def html(self, lead) -> Markup:
        """Every cell and output as HTML; `lead` as in `led`."""
        body, _ = _exporter().from_notebook_node(self.node)
        return led(body, lead)
