"""The folder `helpers` as the installed package `sparcom`, far from any clone of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec

import pytest

from helpers.paths import CLONE, COMMAND, PACKAGE, PROFILES, ROOT

MODEL = ROOT / "data" / "models" / "tiny-dense" / "tuned"
pytestmark = pytest.mark.skipif(
    find_spec("setuptools") is None, reason="no setuptools here, and nothing is fetched to build"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of what it is made of."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    left = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, copy / "helpers", ignore=left)
    shutil.copytree(PROFILES, copy / "notebooks" / "profiles")
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    how = ["--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "wheel", *how, "--wheel-dir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("sparcom-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds the package and nothing else."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(installed, *command, cwd):
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = [sys.executable, *map(str, command)]
    return subprocess.run(done, cwd=cwd, env=env, capture_output=True, text=True)


def sparcom(installed, *arguments, cwd):
    """The console command, called as its entry point calls it."""
    call = "import sys; from sparcom.run.__main__ import main; sys.exit(main())"
    return run(installed, "-c", call, *arguments, cwd=cwd)


def test_the_wheel_holds_every_file_of_the_code_and_no_other(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("sparcom/")}
    files = {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.is_file()}
    expected = {f"sparcom/{p}" for p in files if "__pycache__" not in p.parts}
    profiles = {f"sparcom/profiles/{path.name}" for path in PROFILES.glob("*.yaml")}
    assert names == (expected - {"sparcom/README.md"}) | profiles
    assert {"sparcom/py.typed", "sparcom/plots/explorer.html"} <= names


def test_it_needs_the_pins_as_lower_bounds_and_brings_one_command(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = next(n for n in archive.namelist() if n.endswith("METADATA")).rpartition("/")[0]
    lines = archive.read(f"{folder}/METADATA").decode().splitlines()
    needed = {line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist")}
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = {pin.split("#")[0].strip().replace("==", ">=") for pin in pins}
    assert needed <= bounds
    for name in ("torch", "transformers", "pandas", "matplotlib", "pydantic"):
        assert any(bound.startswith(f"{name}>=") for bound in needed), name
    assert not any(bound.startswith(("pytest", "jupyterlab", "nbval")) for bound in needed)
    assert (
        "sparcom = sparcom.run.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
    )


def test_the_face_works_far_from_any_clone(installed, tmp_path):
    """The package is found, no `helpers` is, and what it writes stays where it was started."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys, sparcom\n"
        "from sparcom import count, find_sets, load_model, paths\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert not any(n == 'helpers' or n.startswith('helpers.') for n in sys.modules)\n"
        "assert paths.CLONE is None and paths.COMMAND == 'sparcom'\n"
        f"model, tokenizer = load_model({str(MODEL)!r})\n"
        "texts = ['ada has a cat .', 'boris has a dog .', '2 plus 3 is 5 .', '4 plus 3 is 7 .']\n"
        "print(find_sets(count(model, tokenizer, texts), list('aabb')).head(1))\n"
        "print(paths.results_dir('x'))\n"
    )
    done = run(installed, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "data" / "results" / "x")
    assert {p.name for p in tmp_path.iterdir()} == {"mine.py"}


def test_the_command_says_where_results_go_and_what_needs_a_clone(installed, tmp_path):
    said = " ".join(sparcom(installed, "--help", cwd=tmp_path).stdout.split())
    assert said.startswith("usage: sparcom ")
    assert "under the current directory" in said
    done = sparcom(installed, "reproduce", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs the notebooks: not in the package. Clone" in done.stderr
    done = sparcom(installed, "plan", cwd=tmp_path)  # the tiny world is not in the package
    assert done.returncode == 1
    assert "lie in a clone of the repository" in done.stderr


def test_a_profile_of_ones_own_is_found_where_the_command_is_started(installed, tmp_path):
    rows = ROOT / "data" / "hexainst" / "tiny.jsonl"
    (tmp_path / "mine.yaml").write_text(
        f"dataset: {rows}\npairs:\n  - {{name: mine, tuned: {MODEL}}}\n"
    )
    done = sparcom(installed, "plan", "--profile", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2,048" in done.stdout
    done = sparcom(installed, "plan", "--profile", "other", cwd=tmp_path)
    assert "other.yaml here or in profiles/ does not exist" in done.stderr
    assert "mine" in done.stderr
    assert "sparcom/profiles/own-model.yaml" in done.stderr


def test_inside_a_clone_the_installed_command_is_the_clones(installed):
    said = " ".join(sparcom(installed, "--help", cwd=ROOT).stdout.split())
    assert f"under the repository, {ROOT}" in said
    done = sparcom(installed, "plan", "--profile", "nothing", cwd=ROOT)
    assert "notebooks/profiles/nothing.yaml does not exist" in done.stderr


def test_here_is_a_clone():
    assert CLONE == ROOT
    assert COMMAND == "python -m helpers.run"
