"""The house keeps its shape: imports run downward, files stay thin, notebooks stay executed and
readable.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import nbformat
import papermill
import pytest

from helpers.paths import NOTEBOOKS, ROOT

HOUSE = ROOT / "helpers"
SAID = (HOUSE / "README.md").read_text()
ROOMS = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", SAID, re.M))
USES = dict(re.findall(r"^    (\w+) +uses (.*)$", SAID, re.M))
FILES = sorted(path for path in HOUSE.rglob("*.py") if path.stem not in ("__init__", "__main__"))
BOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))


def makefile(name, line=r"{}\s*:= (.*)"):
    return re.search(f"^{line.format(name)}$", (ROOT / "Makefile").read_text(), re.M)[1].split()


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def room_of(path):
    return ".".join(path.relative_to(HOUSE).with_suffix("").parts)


def imports(path):
    """The rooms that a file of helpers imports, as `package.module`; its own package's included."""
    package = path.relative_to(HOUSE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            named = [*start, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                whole = ".".join([*named, alias.name])
                yield whole if whole in ROOMS else ".".join(named)
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith("helpers"), f"{path}: imports inside are relative"


def test_the_picture_names_every_package_and_every_room():
    packages = {path.parent.name for path in FILES if path.parent != HOUSE}
    assert packages <= set(USES)
    assert set(ROOMS) == {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=room_of)
def test_a_room_is_what_the_readme_says_and_imports_only_downward(path):
    said = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].replace("\n", " ")
    assert ROOMS[room_of(path)] == said, "helpers/README.md says what the docstring says"
    order, own = list(ROOMS), room_of(path)
    for used in imports(path):
        assert order.index(used) < order.index(own), f"{own} imports {used}"
        package, other = own.split(".")[0], used.split(".")[0]
        assert other == package or other in USES[package].split(), f"{own} imports {used}"


@pytest.mark.parametrize("path", [*FILES, *HOUSE.rglob("__*__.py")], ids=room_of)
def test_functions_are_short_and_take_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_the_makefile_lists_the_committed_notebooks_once():
    assert makefile("NOTEBOOKS") == [path.stem for path in BOOKS]


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_and_nbval_has_something_to_compare(path):
    """A stripped notebook passes nbval whatever its formulas say; so outputs must be there, in
    order, and compared.

    A cell that shows only a figure counts neither way: nbval compares no images, its table is
    printed in another cell.
    """
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)

    def said(o):
        return (
            o.get("name") == "stdout"
            or "text/plain" in o.get("data", {})
            and "image/png" not in o["data"]
        )

    shown = [
        cell for cell in cells if any("image/png" not in o.get("data", {}) for o in cell.outputs)
    ]
    compared = [
        cell
        for cell in shown
        if "NBVAL_IGNORE_OUTPUT" not in cell.source and any(map(said, cell.outputs))
    ]
    assert len(compared) >= 0.8 * len(shown) >= 4


DRAWN = r'save_figure\([^"]+, f?"([^"]+)"'  # the name of a figure that a notebook saves


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_every_figure_is_on_the_page_and_on_disk(path):
    """A backend without a screen executes a notebook without showing its figures; then the page
    has none.
    """
    for cell in code_cells(path):
        if "save_figure" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs)
    source = "".join(cell.source for cell in code_cells(path))
    names = re.findall(DRAWN, source)
    assert len(names) == source.count("save_figure(") <= 6
    for name in names:
        found = [
            p.suffix for p in (ROOT / "figures" / "tiny").glob(re.sub(r"\{.*?\}", "*", name) + ".*")
        ]
        assert {".png", ".csv"} <= set(found)  # and .svg, which each run makes


def test_no_figure_is_left_behind():
    """A figure that no notebook draws any more would stay in the folder, and be believed."""
    source = "".join(cell.source for path in BOOKS for cell in code_cells(path))
    drawn = [re.sub(r"\{.*?\}", "*", name) for name in re.findall(DRAWN, source)]
    stems = {path.stem for path in (ROOT / "figures" / "tiny").iterdir()}
    assert stems == {stem for stem in stems if any(fnmatch(stem, name) for name in drawn)}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_notebook_is_readable(path):
    cells = code_cells(path)
    sizes = sorted(len(cell.source.splitlines()) for cell in cells)
    assert sizes[-1] <= 15
    assert sizes[len(sizes) // 2] <= 5
    every = nbformat.read(path, as_version=4).cells
    assert len(every) <= 45
    assert 2 * len(cells) <= len(every)  # a cell of prose for each of code, or more
    for cell in cells:
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, (ast.ClassDef, ast.FunctionDef))
            assert not isinstance(node, ast.AugAssign) or isinstance(node.op, ast.Add)
            assert not isinstance(node, ast.Lambda) or not node.args.defaults
            assert not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
                "notebooks"
            )
    source = "".join(cell.source for cell in cells)
    assert set(re.findall(r'write_part\(profile, "(\w+)"', source)) <= {path.stem}
    assert {name[:2] for name in re.findall(DRAWN, source)} <= {path.stem[:2]}
    first = nbformat.read(path, as_version=4).cells[0].source
    assert first.startswith("# ")
    assert "\n> " in first
    assert all(f"**{word}**" in first for word in ("Needs", "Writes", "Takes"))


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_notebook_takes_the_same_parameters_as_all(path):
    assert set(papermill.inspect_notebook(str(path))) == {"profile", "seed", "epsilon"}


PATHS = {"TO": "site", "LOCAL": "hexainst-human"}  # what a user may name, and for which target
MAKE = ["make", "-o", ".venv/.ready"]  # the environment is the one that runs this test
TARGETS = {
    *("help", "env", "lab", "reproduce", "test", "lint", "refresh", "models", "trajectory", "grid"),
    *("hexainst-human", "bench", "bench-peers", "bench-analysis", "bench-chain", "plan", "clean"),
    "site",
    "tune",
}


def make(*arguments, cwd=ROOT, **settings):
    return subprocess.run([*MAKE, *arguments], cwd=cwd, capture_output=True, text=True, **settings)


def test_plain_make_prints_every_target():
    shown = make("-s").stdout
    assert set(re.findall(r"^  ([a-z-]+) ", shown, re.M)) >= TARGETS
    assert set(makefile("PHONY", r"\.{}: (.*)")) >= TARGETS


@pytest.mark.parametrize("target", ["plan", "reproduce", "clean", "help"])
@pytest.mark.parametrize(
    "profile",
    [
        "",
        "tiny; touch {0}",
        "$(shell touch {0})",
        "$$(touch {0})",
        "`touch {0}`",
        "tiny' && touch {0} '",
        "../..",
        "..",
        ".",
        "/",
        "-rf",
        "tiny own-model",
        "tiny ",
        "a\nb",
        "%",
        "ä",
    ],
)
def test_make_refuses_a_profile_that_is_no_name(target, profile, tmp_path):
    """One line, nothing run, nothing deleted; given as an argument or in the environment."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = tmp_path / "data" / "results" / "tiny" / "counts"
    kept.mkdir(parents=True)
    value = f"PROFILE={profile.format(tmp_path / 'ran')}"
    name, text = value.split("=", 1)
    for done in (
        make(target, value, cwd=tmp_path, input="y\n"),
        make(target, cwd=tmp_path, input="y\n", env=os.environ | {name: text}),
    ):
        assert done.returncode == 2
        assert done.stdout == ""
        assert re.fullmatch(r'Makefile:\d+: \*\*\* PROFILE is "(.|\n)*Stop\.\n', done.stderr)
    assert kept.exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("setting", ["PY=x", "NOTEBOOKS=x; y", "CHAIN=x", "wrong=", "unsafe="])
def test_make_takes_nothing_else_from_outside(setting):
    done = make("plan", setting)
    assert done.returncode == 2
    assert setting.split("=")[0] in done.stderr


@pytest.mark.parametrize(("name", "target"), [("PYTHON", "plan"), *PATHS.items()])
@pytest.mark.parametrize(
    "path", ["$(shell touch ran)", "$$(touch ran)", "x'; touch ran; '", "a\nb"]
)
def test_make_refuses_a_path_that_would_be_run(name, target, path, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for done in (
        make(target, f"{name}={path}", cwd=tmp_path),
        make(target, cwd=tmp_path, env=os.environ | {name: path}),
    ):
        assert done.returncode == 2
        assert done.stdout == ""
        assert re.fullmatch(rf'Makefile:\d+: \*\*\* {name} is "(.|\n)*Stop\.\n', done.stderr)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "target"), PATHS.items())
@pytest.mark.parametrize("path", ["/tmp; touch ran", "My Folder", '"`touch ran`"', "a\\ b*"])
def test_make_hands_a_path_on_as_it_is(name, target, path, tmp_path):
    """As one word, to a Python that shows what it was given."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    python.chmod(0o755)
    done = make("-s", target, f"{name}={path}", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == path
    assert not (tmp_path / "ran").exists()


def test_make_clean_asks_and_deletes_one_profile(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    results = tmp_path / "data" / "results"
    for name in ("tiny", "tiny-full"):
        (results / name / "pair").mkdir(parents=True)
    for answer in ("", "n\n", "yes\n"):
        assert "kept" in make("clean", "PROFILE=tiny", cwd=tmp_path, input=answer).stdout
    assert {path.name for path in results.iterdir()} == {"tiny", "tiny-full"}
    assert "deleted" in make("clean", "PROFILE=tiny", cwd=tmp_path, input="y\n").stdout
    assert {path.name for path in results.iterdir()} == {"tiny-full"}


def test_make_hands_a_signal_on_to_what_runs_long():
    """A recipe line with a shell in between would leave the command running; and the chain's
    list of notebooks stands once.
    """
    for target in (
        "reproduce",
        "refresh",
        "models",
        "trajectory",
        "grid",
        "tune",
        "hexainst-human",
    ):
        for line in make("-n", target).stdout.splitlines():
            assert re.fullmatch(r"\.venv/bin/python -m helpers\.run [\w./ -]+", line)
    books = [f"notebooks/{path.name}" for path in BOOKS]
    for target in ("reproduce", "refresh", "test"):
        assert re.findall(r"notebooks/\S+", make("-n", target).stdout) == books


def test_make_lab_serves_the_notebooks():
    (line,) = make("-n", "lab").stdout.splitlines()
    flags = ["--no-browser", "--allow-root", "--ServerApp.port=0"]
    lab = subprocess.Popen([*line.split(), *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = []
    for text in lab.stderr:  # ends with the server, at the latest
        said.append(text)
        if "is running at" in text:
            lab.terminate()
    assert f"Serving notebooks from local directory: {NOTEBOOKS}" in "".join(said)
    assert "is running at" in "".join(said)


@pytest.mark.parametrize("tool", ["conda", "micromamba"])
def test_make_env_prefers_conda_where_there_is_one(tool, tmp_path):
    """The environment of the first of mamba, micromamba, conda on the PATH is built from
    environment.yml.
    """
    fake = tmp_path / tool
    fake.write_text("#!/bin/sh\nexit 0\n")
    fake.chmod(0o755)
    plan = subprocess.run(
        ["make", "-n", "-B", "env"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    ).stdout
    assert f"{tmp_path}/{tool}" in plan
    assert "environment.yml" in plan
    assert " -m venv" not in plan


@pytest.mark.parametrize("name", ["plain", "a $HOME b", 'it\'s "so"', "ünï #% $$(x) `y`"])
def test_make_env_works_in_a_folder_of_any_name(name, tmp_path):
    """The environment finds helpers wherever it is started: its path file names this folder."""
    clone = tmp_path / name
    (clone / "helpers").mkdir(parents=True)
    (clone / "helpers" / "__init__.py").write_text("")
    for file in ("Makefile", "requirements.txt", "environment.yml"):
        shutil.copy(ROOT / file, clone)
    python = tmp_path / "python"  # a Python whose environments come with a pip that does nothing
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n'
        f"{sys.executable} -m venv --without-pip .venv\n"
        "cd .venv/lib/python3*/site-packages && touch pip.py\n"
    )
    python.chmod(0o755)
    settings = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["make", "env", f"PYTHON={python}"], cwd=clone, capture_output=True, text=True, env=settings
    )
    assert done.returncode == 0, done.stderr
    show = [clone / ".venv" / "bin" / "python", "-c", "import helpers; print(helpers.__file__)"]
    found = subprocess.run(show, cwd="/", capture_output=True, text=True, env=settings)
    assert found.stdout.strip() == str(clone / "helpers" / "__init__.py"), found.stderr


def test_the_pins_are_exact_and_stand_once():
    pins = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins if pin)
    assert "requirements.txt" in (ROOT / "environment.yml").read_text()
    assert "==" not in (ROOT / "environment.yml").read_text()


def test_the_tests_readme_names_every_test_file():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "tests" / "README.md").read_text()))
    assert named == {path.stem for path in (ROOT / "tests").glob("test_*.py")}


PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "data/README.md",
        "data/models/README.md",
        "data/trajectory/README.md",
        "tests/README.md",
        "helpers/README.md",
    )
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), links


def test_the_readme_lists_the_families_of_the_zoo():
    """The list is the zoo's, in whose tests each of them is held against a loop."""
    from tests import zoo

    for kind in ("dense", "mixture of experts"):
        names = ", ".join(sorted(name for name, found in zoo.families().items() if found == kind))
        assert f"**{kind.capitalize()}:** {names}." in (ROOT / "README.md").read_text()
