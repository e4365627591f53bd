"""The site: every link leads somewhere, nothing is fetched, no text of others is ever code; and, in
a real browser, it can be searched, sorted and read with the keyboard alone.
"""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from helpers import config, paths
from helpers.record import RecordMismatch, UserError, sha256, write_json, write_tensors
from helpers.run import atlas_page, render, site
from helpers.run.__main__ import main
from helpers.study.ledger import read_ledger
from tests import zoo

CATEGORIES = ("CLS", "CODE", "QA")
HOSTILE = {
    "tag": "<script>window.hurt=1</script>",
    "image": "<img src=x onerror=window.hurt=1>",
    "end": "</script><script>window.hurt=1</script>",
    "comment": "<!-- <script>",
    "quotes": "\"';window.hurt=1;//`${window.hurt=1}`",
    "lines": "a\u2028b\u2029c\nd",
    "right to left": "\u202eabc\u2067def\u200f",
    "template": "{{ 7*7 }}{% raw %}",
}


def atlas(rows=120, categories=CATEGORIES, said=None, pairs=("one", "two")):
    """A made-up atlas: a row per component, the last ten of them experts."""
    rng, table = np.random.default_rng(0), []
    for i in range(rows):
        expert = i >= rows - 10
        own = [name for k, name in enumerate(categories) if (i + k) % len(categories) < 2]
        row = {"pair": pairs[i % len(pairs)], "unit": "expert" if expert else "neuron"}
        row |= {"layer": i % 4, "expert": i if expert else "", "neuron": "" if expert else i}
        row |= {"score": "contrast", "sets": " ".join(own)}
        for name in categories:
            p = round(rng.random(), 4)
            row |= {f"p_{name}": p, f"low_{name}": max(0, p - 0.1), f"high_{name}": min(1, p + 0.1)}
            row |= {f"score_{name}": p, f"rank_{name}": i, f"in_{name}": name in own}
        row |= {"part": ("general", "unique", "some")[i % 3], "fate": ("kept", "lost", "")[i % 3]}
        row |= {"massive": i == 3}
        text = said or {"token": f" word{i}", "left": "the", "right": "end"}
        row["tokens"] = json.dumps(
            [{"row": f"r{k}", "position": k, "value": 0.5, **text} for k in range(5)]
        )
        row |= {"effect": 0.01 * i if i % 2 else "", "effect_low": "", "effect_high": ""}
        row |= {"effect_control": 0.5 if i % 2 else "", "effect_of": "loss"}
        table.append(row)
    return pd.DataFrame(table)


def book(title="A notebook", text="", outputs=()):
    cells = [
        nbformat.v4.new_markdown_cell(f"# {title}\n\n> Is it so?\n\n{text}"),
        nbformat.v4.new_markdown_cell("*Figure 1.1. What is* really *seen. More words.*"),
        nbformat.v4.new_code_cell('save_figure(fig, table, "01_seen", profile.name)'),
    ]
    cells[-1].execution_count, cells[-1].outputs = 1, list(outputs)
    return nbformat.v4.new_notebook(cells=cells)


PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def ledger(folder: Path):
    """One test of one claim in two pairs, and its verdicts."""
    claims = read_ledger()
    headline = claims.loc[claims["headline"] == "yes", "id"].iloc[0]
    test = {"id": headline, "components": "neurons", "half": "all", "category": ""}
    test |= {"effect": 0.5, "low": 0.4, "high": 0.6, "null": 0.1, "p": 0.01, "holm": 0.02}
    said = {"id": headline, "components": "neurons", "verdict": "supported", "tests": 2}
    folder.mkdir(parents=True, exist_ok=True)
    tests = pd.DataFrame([test | {"pair": p, "supported": True} for p in ("one", "two")])
    tests.to_csv(folder / "claims.csv", index=False)
    pd.DataFrame([said | {"supported": 2, "where": ""}]).to_csv(
        folder / "verdicts.csv", index=False
    )


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two profiles with results in folders of their own: `alpha` with all, `beta` with less."""
    return made_world(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The site of that world, for tests that only read it."""
    with pytest.MonkeyPatch.context() as patched:
        made_world(tmp_path_factory.mktemp("world"), patched)
        return site.build("alpha")


def made_world(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    for name in ("alpha", "beta", "empty"):
        text = (config.PROFILES / "tiny.yaml").read_text()
        seed = "" if name == "alpha" else "\nseed: 7\n"  # which no committed grid has
        text = re.sub(r"^seed:.*$", "", text, flags=re.M) + seed
        (tmp_path / "profiles" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(paths, "PROFILES", tmp_path / "profiles")
    monkeypatch.setattr(site, "PROFILES", tmp_path / "profiles")
    for module in (paths, site):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    results = tmp_path / "data" / "results"
    for name in ("alpha", "beta"):
        ledger(results / name)
    books = results / "alpha" / "notebooks"
    books.mkdir()
    links = "[g](../docs/glossary.md) [b](02_b.ipynb) [s](../helpers/study/study.py) [x](gone.md)"
    links += " [c](../data/hexainst/CARD.md) $C_\\tau$ <https://example.org/>"
    picture = nbformat.v4.new_output("display_data", {"image/png": PNG})
    nbformat.write(book("First", links, [picture]), books / "01_a.ipynb")
    nbformat.write(book("Second"), books / "02_b.ipynb")
    figures = tmp_path / "figures" / "alpha"
    figures.mkdir(parents=True)
    for name in ("01_seen", "09_stale"):
        (figures / f"{name}.png").write_bytes(b"png")
        (figures / f"{name}.csv").write_text("a\n1\n")
    atlas().to_csv(results / "alpha" / "atlas.csv", index=False)
    return tmp_path


def pages(folder):
    return {p: BeautifulSoup(p.read_text("utf-8"), "html.parser") for p in folder.rglob("*.html")}


def test_every_link_of_every_page_leads_to_a_file_of_the_site_and_nothing_is_fetched(target):
    found = pages(target)
    names = {path.relative_to(target).as_posix() for path in found}
    assert names >= {"index.html", "glossary.html", "families.html", "profiles/beta/atlas.html"}
    assert "profiles/alpha/notebooks/02_b.html" in names
    for path, soup in found.items():
        loaded = [tag["src"] for tag in soup.find_all(src=True)]
        loaded += [tag["href"] for tag in soup.find_all("link")]
        for link in loaded:
            assert not urlsplit(link).scheme or link.startswith("data:"), f"{path} loads {link}"
        for link in loaded + [tag["href"] for tag in soup.find_all("a")]:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert place.is_relative_to(target), f"{path} leads out: {link}"
            assert place.is_file(), f"{path}: {link}"
            if parts.fragment:
                ids = {tag["id"] for tag in found.get(place, soup).find_all(id=True)}
                assert parts.fragment in ids, f"{path}: {link}"
        assert "url(" not in str(soup)
    for text in (target / "assets").iterdir():
        assert not re.search(r"url\(|@import|https?://", text.read_text())


def test_a_page_is_one_document_with_landmarks_and_alternative_texts(target):
    for path, soup in pages(target).items():
        assert len(soup.find_all("main")) == 1, path
        assert soup.html["lang"] == "en"
        assert len(soup.find_all("h1")) == 1, path
        assert all(tag.get("aria-label") for tag in soup.find_all("nav"))
        assert all(tag.get("alt") for tag in soup.find_all("img")), path
        ids = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(ids) == len(set(ids)), path
        assert all(tag.get("scope") for tag in soup.select("main thead th")), path


def test_without_javascript_the_findings_figures_and_first_rows_are_there(target):
    start = BeautifulSoup((target / "index.html").read_text(), "html.parser")
    assert "neurons: supported" in start.select_one(".said").get_text()
    assert "0.500 [0.400, 0.600] / 0.100" in start.select_one(".claims").get_text()
    (picture,) = start.find_all("img")
    assert picture["alt"].startswith("Figure 1.1. What is really seen.")
    assert "really seen. More words." in " ".join(start.figcaption.get_text().split())
    table = BeautifulSoup((target / "profiles/alpha/atlas.html").read_text(), "html.parser")
    rows = table.select("#atlas tbody tr")
    assert len(rows) == atlas_page.FIRST
    first = atlas().iloc[0]
    assert rows[0].th.get_text(" ", strip=True) == "L0 neuron 0 one"
    assert f"CLS {first['p_CLS']:.2f}" in rows[0].find(role="img")["aria-label"]
    beta = (target / "profiles/beta/atlas.html").read_text()
    assert "helpers.run atlas --profile beta" in beta


def test_a_notebook_keeps_its_words_formulas_pictures_and_links(target):
    text = (target / "profiles/alpha/notebooks/01_a.html").read_text()
    soup = BeautifulSoup(text, "html.parser")
    assert soup.find("math").get_text().strip() == "Cτ"
    assert soup.find("article").img["alt"] == "Figure 1.1. What is really seen. More words."
    links = {tag.get_text(): tag["href"] for tag in soup.find("article").find_all("a")}
    assert links["g"] == "../../../glossary.html"
    assert links["b"] == "02_b.html" or links["b"].endswith("profiles/alpha/notebooks/02_b.html")
    assert (target / "files/helpers/study/study.py").is_file()
    assert (target / "files/data/hexainst/CARD.html").is_file()
    assert "x" not in links
    assert soup.find(rel="next").get_text().startswith("Second")


def data_of(target, name="rows", profile="alpha"):
    text = (target / f"profiles/{profile}/atlas/{name}.js").read_text("ascii")
    assert not re.search(r"[<>\u2028\u2029]", text.replace("=>", ""))
    return json.loads(re.sub(r"^[^{[]*\w*\(?\d*,?", "", text, count=1).rstrip().rstrip(";)"))


def test_the_packed_atlas_says_what_the_table_says(world, monkeypatch):
    monkeypatch.setattr(atlas_page, "CHUNK", 50)
    target, table = site.build("alpha"), atlas()
    data = data_of(target)
    for i, row in enumerate(table.to_dict("records")):
        for key in ("pair", "unit", "score", "part", "fate"):
            assert data[key]["words"][data[key]["codes"][i]] == row[key]
        assert data["layer"][i] == row["layer"]
        assert data["expert"][i] == (None if row["expert"] == "" else row["expert"])
        assert [data["p"][k][i] for k in range(3)] == [
            round(1000 * row[f"p_{name}"]) for name in CATEGORIES
        ]
        assert " ".join(CATEGORIES[k] for k in data["sets"][i]) == " ".join(
            name for name in CATEGORIES if row[f"in_{name}"]
        )
        rest = data_of(target, str(i // 50))[i % 50]
        assert rest[0] == [float(f"{row[f'low_{name}']:.4g}") for name in CATEGORIES]
        assert rest[3] == [i] * 3
        assert rest[4][2] == ["r2", 2, f" word{i}", "the", "end", 0.5]
        assert data["massive"][i] == (i == 3)
    by_hand = table[(table["pair"] == "one") & (table["unit"] == "neuron") & (table["layer"] == 2)]
    assert data["means"]["one|neuron"][1] == [
        2, *(round(1000 * by_hand[f"p_{name}"].mean()) for name in CATEGORIES)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_text_of_others_becomes_code(world, kind):
    text = HOSTILE[kind]
    labels = (f"A{text}", "B")
    said = {"token": text, "left": text, "right": text, "row": text}
    table = atlas(20, labels, said, pairs=(text, "two"))
    table["part"] = table["effect_of"] = text
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    table.to_csv(path, index=False)
    target = site.build("alpha")
    page = (target / "profiles/alpha/atlas.html").read_text("utf-8")
    soup = BeautifulSoup(page, "html.parser")
    assert [tag.get("src") for tag in soup.find_all("script")] == [
        "atlas/rows.js",
        "../../assets/atlas.js",
    ]
    assert not soup.find_all("img")
    assert soup.select_one("#atlas tbody small").get_text() == text.replace("\r", "")
    data, rest = data_of(target), data_of(target, "0")
    assert data["pair"]["words"][0] == text
    assert data["categories"][0] == labels[0]
    assert rest[0][4][0] == [text, 0, text, text, text, 0.5]


def refused(path, *said):
    before = site.DATA / "results" / "site"
    with pytest.raises(UserError) as error:
        site.build("alpha")
    for words in (path.name, *said):
        assert words in str(error.value)
    assert not before.exists()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("p_QA", "1.5", "row 8: p_QA is '1.5'"),
        ("p_QA", "", "row 8: p_QA is ''"),
        ("score_CLS", "many", "row 8: score_CLS is 'many'"),
        ("layer", "-1", "row 8: layer is '-1'"),
        ("effect", "inf", "row 8: effect is 'inf'"),
        ("tokens", "[{", "row 8: tokens"),
        ("tokens", '[{"row": 1}]', "row 8: tokens"),
        ("tokens", '{"row": 1}', "row 8: tokens"),
        (
            "tokens",
            '[{"row":1,"position":0,"token":"a","left":"","right":"","value":NaN}]',
            "row 8: tokens",
        ),
    ],
)
def test_a_damaged_atlas_is_one_clear_error(world, column, value, said):
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    table = atlas().astype(str)
    table.loc[7, column] = value
    table.to_csv(path, index=False)
    refused(path, said)


def test_half_a_character_is_shown_and_bytes_that_are_no_text_are_refused(world):
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    table = atlas(20)
    table["tokens"] = table["tokens"].str.replace(" word0", "\\ud800")  # as JSON escapes it
    table.to_csv(path, index=False)
    assert data_of(site.build("alpha"), "0")[0][4][0][2] == "\ud800"
    shutil.rmtree(site.DATA / "results" / "site")
    path.write_bytes(path.read_bytes().replace(b"general", b"gen\xff"))
    refused(path, "cannot be read")


def test_tables_that_are_not_the_ones_that_were_written_are_refused(world):
    """Cut at a line's end they are whole tables, of fewer rows."""
    results = world / "data" / "results" / "alpha"
    names = ("claims.csv", "verdicts.csv")
    write_json(results / "atlas.json", {"csv": sha256(results / "atlas.csv")})
    tables = {name: sha256(results / name) for name in names}
    write_json(results / "summary.json", {"pairs": {}, "tables": tables})
    shutil.rmtree(site.build("alpha"))
    for name in (*names, "atlas.csv"):
        path = results / name
        whole = path.read_bytes()
        path.write_bytes(whole[: whole[:-1].rindex(b"\n") + 1])
        refused(path, "was cut or changed")
        path.write_bytes(whole)
    write_json(results / "summary.json", {"pairs": {}})  # a former version's
    path.write_bytes(whole)
    assert site.verified(results, names[0]) == results / names[0]
    (results / "verdicts.csv").write_bytes(b"")
    refused(results / "verdicts.csv", "is missing or empty")
    with pytest.raises(UserError, match="none.csv is missing or empty"):
        site.verified(results, "none.csv")


@pytest.mark.parametrize("summary", [[], {"pairs": 3}, {"pairs": {}, "tables": "claims.csv"}])
def test_a_summary_that_is_none_is_one_line(world, summary):
    path = world / "data" / "results" / "alpha" / "summary.json"
    write_json(path, summary)
    refused(path)
    write_json(path.with_name("atlas.json"), summary)
    path.unlink()
    refused(path.with_name("atlas.json"))


def test_an_atlas_without_a_column_or_a_row_is_refused_or_empty(world):
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    atlas().drop(columns="rank_QA").to_csv(path, index=False)
    refused(path, "no column rank_QA")
    path.write_text("")
    refused(path, "cannot be read")
    atlas(0 + 10).head(0).to_csv(path, index=False)
    assert "0 of 0" in (site.build("alpha") / "profiles/alpha/atlas.html").read_text()


def test_the_best_ranked_come_first_and_those_in_no_set_last(world):
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    table = atlas(20)
    table.loc[[0, 1], [f"in_{name}" for name in CATEGORIES]] = False
    table["rank_QA"] = table["rank_QA"].astype(float)
    table.loc[7, "rank_QA"] = 0.5  # a tie
    table.to_csv(path, index=False)
    target = site.build("alpha")
    data = data_of(target)
    assert data["rank"][:3] == [0.5, 2, 3]
    assert data["neuron"][:3] == [7, 2, 3]
    assert data["neuron"][-2:] == [0, 1]
    assert data_of(target, "0")[0][4][0][2] == " word7"


def test_a_token_named_na_or_null_stays_a_word(world):
    path = world / "data" / "results" / "alpha" / "atlas.csv"
    table = atlas(20, ("NA", "null"))
    table["pair"] = "NA"
    table.to_csv(path, index=False)
    data = data_of(site.build("alpha"))
    assert data["pair"]["words"] == ["NA"]
    assert data["categories"] == ["NA", "null"]


def test_what_a_notebook_shows_of_others_does_not_run(world):
    path = world / "data/results/alpha/notebooks/01_a.ipynb"
    html = "<script src='https://example.org/x.js'></script><b onclick='x()'>b</b><iframe></iframe>"
    outputs = [
        nbformat.v4.new_output("display_data", {"text/html": html}),
        nbformat.v4.new_output("stream", name="stdout", text="</pre><script>1</script>"),
        nbformat.v4.new_output("display_data", {"application/javascript": "window.hurt=1"}),
    ]
    nbformat.write(book("First", "![far](https://example.org/a.png)", outputs), path)
    soup = BeautifulSoup(
        (site.build("alpha") / "profiles/alpha/notebooks/01_a.html").read_text(), "html.parser"
    )
    assert not soup.find_all(["script", "iframe"])
    assert not soup.article.find_all("img")
    assert "onclick" not in str(soup)
    assert "</pre><script>1</script>" in soup.article.get_text()


def test_a_formula_that_cannot_be_read_is_shown_as_typed():
    assert render.formula(r"p_{\text{95 \%}}").count("%") == 1
    assert "<script>" not in render.formula("<script>")
    assert render.formula(r"\begin{array}") == r"<code>\begin{array}</code>"


def test_the_families_are_those_of_the_zoo(target):
    text = (target / "families.html").read_text()
    names = [tag.get_text() for tag in BeautifulSoup(text, "html.parser").select(".names li")]
    assert sorted(names) == sorted(zoo.families())


def matrices(profile):
    return site.grid.shown(site.studies(profile))


def made_as(profile):
    return {"seed": profile.seed, "epsilon": profile.epsilon}


def test_the_explorer_has_the_committed_grid_for_the_settings_it_was_made_with(world, monkeypatch):
    profile = config.load_profile("alpha")
    table = matrices(profile)
    assert set(table.columns) >= {"pair", "score", "size", "ablated", "measured", "own", "random"}
    assert matrices(config.load_profile("alpha", epsilon=0.02)) is None
    folder = world / "grid"
    folder.mkdir()
    monkeypatch.setattr(site.grid, "GRID", folder)
    pairs = site.grid.kept(site.studies(profile))
    unnamed = {"sha256": {}, "pairs": pairs, **made_as(profile)}
    for record in ([], {"seed": 0}, {"sha256": 3}, unnamed):
        write_json(folder / f"{profile.grid or profile.name}.json", record)
        (folder / f"{profile.grid or profile.name}-matrices.csv").write_text("a\n")
        with pytest.raises(UserError, match=profile.grid or profile.name):
            matrices(profile)
    assert "make reproduce" in (site.Source(profile) and (site.PAGES / "explorer.html").read_text())


def test_a_committed_grid_of_other_models_is_not_shown(world):
    """A profile copied with its `grid:`, but of another pair of the same name."""
    path = world / "profiles" / "alpha.yaml"
    path.write_text(path.read_text().replace("data/models/tiny-dense/", "data/models/tiny-moe/"))
    with pytest.raises(RecordMismatch, match="Take the line `grid: tiny-full` out of the profile"):
        site.build("alpha")


def test_a_file_that_is_no_cell_is_not_taken_for_one(world):
    path = world / "data/results/beta/grid/tiny-dense/odd.safetensors"
    write_tensors(path, {"own": np.zeros(1)}, {"seed": 7})
    page = site.build("alpha") / "profiles/beta/explorer.html"
    assert "make reproduce" in page.read_text()


# ---- the folder


def test_a_site_is_replaced_whole_and_the_same_each_time(world):
    target = site.build("alpha", world / "out")
    first = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    assert site.build("alpha", world / "out") == target
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == first
    assert [p.name for p in world.iterdir() if "out" in p.name] == ["out"]
    (world / "figures/alpha/01_seen.csv").unlink()
    site.build("alpha", world / "out")
    assert not (target / "profiles/alpha/figures/01_seen.csv").exists()


def test_what_a_killed_build_left_is_cleared_and_a_failed_one_keeps_the_former(world, monkeypatch):
    target = site.build("alpha", world / "out")
    for end in ("draft", "old"):
        (world / f".out.sparcom-{end}").mkdir()
        (world / f".out.sparcom-{end}" / "half.html").write_text("half")
    site.build("alpha", target)
    assert not list(world.glob(".out*"))
    whole = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site.Site, "copy", full)
    with pytest.raises(UserError, match="No space left"):
        site.build("alpha", target)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == whole
    assert not list(world.glob(".out*"))


def test_a_swap_that_fails_puts_the_former_site_back(world, monkeypatch):
    target, real = site.build("alpha", world / "out"), site.os.rename

    def rename(source, place):
        if Path(source).name.endswith("draft"):
            raise OSError(13, "Permission denied")
        real(source, place)

    monkeypatch.setattr(site.os, "rename", rename)
    with pytest.raises(UserError, match="Permission denied"):
        site.build("alpha", target)
    assert (target / "index.html").is_file()
    assert not list(world.glob(".out*"))


@pytest.mark.parametrize("kind", ["full", "file", "link", "forged", "added", "list"])
def test_a_folder_that_is_not_ours_is_refused_and_left_alone(world, kind):
    target = world / "mine"
    if kind == "file":
        target.write_text("mine")
    elif kind == "link":
        (world / "other").mkdir()
        target.symlink_to(world / "other")
    elif kind == "added":
        site.build("alpha", target)
        (target / "profiles" / "notes.txt").write_text("mine")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        if kind in ("forged", "list"):
            (target / "site.json").write_text('{"files": []}' if kind == "forged" else "[]")
    before = sorted(world.rglob("*"))
    with pytest.raises(UserError, match="Name a"):
        site.build("alpha", target)
    assert sorted(world.rglob("*")) == before


def test_an_empty_folder_and_one_below_a_new_folder_are_taken(world):
    (world / "new").mkdir()
    assert (site.build("alpha", world / "new") / "index.html").is_file()
    assert (site.build("alpha", world / "a" / "b") / "index.html").is_file()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody", "unknown profile 'nobody'"),
        ("empty", "profile empty has no results yet"),
        ("../x", "cannot name a file"),
    ],
)
def test_a_profile_that_is_unknown_or_empty_is_one_line(world, capsys, name, said):
    assert main(["site", "--profile", name, "--to", str(world / "out")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (world / "out").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": 3}', "\x00"])
def test_a_notebook_that_cannot_be_read_is_one_clear_error(world, text):
    path = world / "data/results/alpha/notebooks/01_a.ipynb"
    path.write_text(text)
    refused(path)


@pytest.mark.parametrize("name", ["claims.csv", "verdicts.csv"])
def test_a_ledger_that_cannot_be_read_is_one_clear_error(world, name):
    path = world / "data/results/alpha" / name
    path.write_text("id,nothing\n1,2\n")
    refused(path, "has no column")


# ---- in a browser


def chromium():
    """(playwright's launcher, path of a browser), or a reason why not."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
    return (found,) if found else "no chromium is installed"


BROWSER = chromium()
in_a_browser = pytest.mark.skipif(isinstance(BROWSER, str), reason=str(BROWSER))


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # the sandbox needs rights that a container does not give; the pages are our own
        made = play.chromium.launch(executable_path=BROWSER[0], args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def opened(browser):
    """Open a page of the site; at the end nothing may have been said on the console or fetched
    from anywhere but the disk.
    """
    wrong, tabs = [], []

    def open_page(path, width=1200, **settings):
        tab = browser.new_page(viewport={"width": width, "height": 900}, **settings)
        tab.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield open_page
    assert [tab.evaluate("window.hurt") for tab in tabs] == [None] * len(tabs)
    assert wrong == []


def shown(tab):
    return tab.locator("#atlas > tbody > tr > th > button").all_inner_texts()


@in_a_browser
def test_the_atlas_can_be_searched_sorted_and_paged(target, opened):
    from playwright.sync_api import expect

    tab = opened(target / "profiles/alpha/atlas.html")
    status, table = tab.get_by_role("status"), atlas()
    assert len(shown(tab)) == 50
    tab.get_by_label("Search", exact=True).fill("word7")
    expect(status).to_have_text("11 of 120 components")
    assert shown(tab)[0] == "L3 neuron 7"
    tab.get_by_label("Search", exact=True).fill("no such word")
    expect(status).to_contain_text("0 of 120 components: none fits")
    tab.get_by_label("Search", exact=True).fill("")
    tab.get_by_label("In the set of").select_option("QA")
    wanted = int(table["in_QA"].sum())
    expect(status).to_have_text(f"{wanted} of 120 components")
    tab.get_by_label("In the set of").select_option("any")
    expect(status).to_have_text("120 of 120 components")
    tab.get_by_label("Sort p by").select_option("CODE")
    head = tab.get_by_role("columnheader", name="p", exact=True)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    best = table.sort_values("p_CODE", ascending=False).iloc[:50]
    parts = [best["expert"], best["neuron"]]
    names = [int(e) if e != "" else int(n) for e, n in zip(*parts, strict=True)]
    assert [int(text.split()[-1]) for text in shown(tab)] == names
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    tab.get_by_role("columnheader", name="effect", exact=True).get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none"
    assert "119" in shown(tab)[0]
    tab.get_by_role("button", name="next").click()
    tab.get_by_role("button", name="next").click()
    assert len(shown(tab)) == 20
    assert tab.get_by_role("button", name="next").is_disabled()


@in_a_browser
def test_a_card_opens_and_closes_by_the_keyboard_alone(target, opened):
    tab = opened(target / "profiles/alpha/atlas.html")
    second = tab.locator("#atlas tbody th button").nth(1)
    second.focus()
    for key in ("Enter", "Space"):
        tab.keyboard.press(key)
        card = tab.get_by_role("group", name="Card of L1 neuron 1")
        card.wait_for()
        assert second.get_attribute("aria-expanded") == "true"
        assert card.locator("mark").count() == 5
        assert "word1" in card.locator("mark").first.inner_text()
        assert "effect (loss): 0.01" in card.inner_text()
        assert "control 0.5" in card.inner_text()
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert tab.evaluate(outline) == "solid"
        tab.keyboard.press("Tab")  # into the card
        tab.keyboard.press("Escape")
        assert card.count() == 0
        assert second.get_attribute("aria-expanded") == "false"
        assert second.evaluate("button => button === document.activeElement")
    tab.reload()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "main"


@in_a_browser
def test_profiles_switch_to_the_same_page_or_the_first(target, opened):
    tab = opened(target / "profiles/alpha/atlas.html")
    tab.get_by_role("navigation", name="Profile").get_by_role("link", name="beta").click()
    assert tab.url == (target / "profiles/beta/atlas.html").as_uri()
    tab.get_by_role("navigation", name="Profile").get_by_role("link", name="alpha").click()
    tab.get_by_role("navigation", name="Site").get_by_role("link", name="Notebooks").click()
    tab.get_by_role("link", name="Second").click()
    tab.get_by_role("navigation", name="Profile").get_by_role("link", name="beta").click()
    assert tab.url == (target / "profiles/beta/index.html").as_uri()


@in_a_browser
def test_no_page_is_wider_than_a_small_screen(target, opened):
    for path in sorted(target.rglob("*.html")):
        tab = opened(path, 400)
        if tab.locator("#atlas th button").count():
            tab.locator("#atlas tbody th button").first.click()
            tab.get_by_role("group").wait_for()
        for fold in tab.locator("summary").all():
            fold.click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400, path


@in_a_browser
def test_the_explorer_draws_what_the_grid_holds(world, opened):
    tab = opened(site.build("alpha") / "profiles/alpha/explorer.html")
    tab.get_by_label("score").select_option("contribution")
    table = matrices(config.load_profile("alpha"))
    pair, size, own = table["pair"].iloc[0], 0.05, table["ablated"].iloc[0]
    row = table[
        (table["pair"] == pair)
        & (table["score"] == "contribution")
        & (table["size"] == size)
        & (table["ablated"] == own)
        & (table["measured"] == own)
    ].iloc[0]
    assert f"{row['own']:.3f} (random {row['random']:.3f})" in tab.locator("main").inner_text()


@in_a_browser
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_texts_are_shown_as_texts(world, opened, kind):
    text = HOSTILE[kind]
    said = {"token": text, "left": "left " + text, "right": "right"}
    table = atlas(20, (f"A{text}", "B"), said, pairs=(text, "two"))
    table["part"] = table["effect_of"] = text
    table.to_csv(world / "data/results/alpha/atlas.csv", index=False)
    tab = opened(site.build("alpha") / "profiles/alpha/atlas.html")
    tab.locator("#atlas tbody th button").first.click()
    card = tab.get_by_role("group")
    card.wait_for()
    assert card.locator("mark").first.text_content() == text.strip()
    assert text in card.locator("li").first.text_content()
    assert tab.locator("#atlas tbody img, #atlas tbody script").count() == 0
    outside = card.locator("li").first.locator("small").text_content()
    assert outside == "row r0, position 0, value 0.5"  # its own box: no mark reaches it
    assert card.locator("li > bdi > mark > bdi").count() == 5


@in_a_browser
def test_a_large_atlas_stays_usable(world, opened):
    """A hundred thousand rows: the page holds fifty, cards come from files of their own."""
    small = atlas(1000)
    pd.concat([small] * 100).to_csv(world / "data/results/alpha/atlas.csv", index=False)
    target = site.build("alpha")
    assert (target / "profiles/alpha/atlas/rows.js").stat().st_size < 20e6
    tab = opened(target / "profiles/alpha/atlas.html")
    assert tab.get_by_role("status").inner_text() == "100000 of 100000 components"
    tab.get_by_role("columnheader", name="best rank").get_by_role("button").click()
    assert len(shown(tab)) == 50
    tab.locator("#atlas tbody th button").first.click()
    tab.get_by_role("group").wait_for()
    scripts = tab.locator("head script").evaluate_all("all => all.length")
    assert scripts == 1


@in_a_browser
def test_without_javascript_a_browser_shows_the_first_rows(target, opened, browser):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto((target / "profiles/alpha/atlas.html").as_uri())
    assert tab.locator("#atlas tbody tr").count() == 50
    assert "the first 50 of 120 rows" in tab.locator("noscript").inner_text()
    assert tab.locator("#filters").is_hidden()
