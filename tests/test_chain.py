"""The runner: a failed notebook is never taken for a finished one, and a mistake is one line on
stderr.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from helpers.config import load_profile
from helpers.paths import ROOT
from helpers.record import UserError
from helpers.run import chain, report


def notebook(path, *cells):
    book = nbformat.v4.new_notebook(
        metadata={
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        }
    )
    book.cells = [
        nbformat.v4.new_code_cell('profile = "tiny"', metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    nbformat.write(book, path)
    return path


def test_a_finished_notebook_takes_its_place(tmp_path):
    source, target = notebook(tmp_path / "a.ipynb", "print(profile)"), tmp_path / "out" / "a.ipynb"
    seconds = chain.execute(source, target, {"profile": "mine"})
    assert 0 < seconds < 60
    assert [p.name for p in target.parent.iterdir()] == ["a.ipynb"]
    assert "mine" in nbformat.read(target, as_version=4).cells[-1].outputs[0].text


@pytest.mark.skipif(os.name != "posix", reason="no such sockets on this system")
def test_kernels_share_no_ports(tmp_path):
    """Two that start together may be given the same free port; each talks through files of its own."""
    show = "import json\nfrom ipykernel.connect import get_connection_info\ninfo = json.loads(get_connection_info())\nprint(info['transport'], info['ip'])"
    seen = []
    for name in "ab":
        chain.execute(notebook(tmp_path / f"{name}.ipynb", show), tmp_path / "out.ipynb", {})
        seen.append(
            nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs[0].text.split()
        )
    assert [transport for transport, _ in seen] == ["ipc", "ipc"]
    assert seen[0][1] != seen[1][1]
    assert not any(Path(ip).parent.exists() for _, ip in seen)


def test_a_failed_notebook_leaves_the_former_result(tmp_path):
    target = tmp_path / "a.ipynb"
    target.write_text("former")
    source = notebook(
        tmp_path / "bad.ipynb",
        "from helpers.record import UserError\nraise UserError('found x, expected y')",
    )
    with pytest.raises(UserError, match=r"bad\.ipynb, cell 2: UserError: found x, expected y"):
        chain.execute(source, target, {})
    assert target.read_text() == "former"
    assert target.with_suffix(".failed.ipynb").exists()


def test_a_misspelt_parameter_is_refused_before_anything_runs(tmp_path):
    source = notebook(tmp_path / "a.ipynb", "print(1)")
    with pytest.raises(UserError, match="no parameter 'profil'. Its parameters: profile"):
        chain.execute(source, tmp_path / "out.ipynb", {"profil": "tiny"})
    assert not (tmp_path / "out.ipynb").exists()


def test_canonical_notebooks_hold_nothing_that_changes_from_run_to_run(tmp_path):
    source = notebook(
        tmp_path / "a.ipynb",
        "import sys, time\nprint('out', flush=True); time.sleep(0.5)\nprint('put'); print('err', file=sys.stderr)",
    )
    chain.execute(source, tmp_path / "1.ipynb", {})
    chain.execute(source, tmp_path / "2.ipynb", {})
    one, two = (
        chain.canonical(nbformat.read(tmp_path / f"{n}.ipynb", as_version=4)) for n in (1, 2)
    )
    assert one == two
    assert "papermill" not in str(one)
    assert "err\n" not in str([c.get("outputs") for c in one.cells])
    assert [c.execution_count for c in one.cells] == [1, 2]
    assert [o.text for o in one.cells[1].outputs] == ["out\nput\n"]


def run_in(folder, monkeypatch, jobs, together, *paths):
    monkeypatch.setattr(chain, "results_dir", lambda name: folder)
    return chain.run(replace(load_profile("tiny"), jobs=jobs), list(paths), {}, together)


def test_independent_notebooks_run_side_by_side_and_the_last_one_after_them(tmp_path, monkeypatch):
    """Each of two waits for a file that only the other writes; the third needs both."""
    meet = (
        "import time\nfrom pathlib import Path\nhere = Path({here!r})\n(here / {own!r}).touch()\n"
        "deadline = time.time() + 60\nwhile not (here / {other!r}).exists(): assert time.time() < deadline; time.sleep(0.1)"
    )
    one, two = (
        notebook(tmp_path / f"{own}.ipynb", meet.format(here=str(tmp_path), own=own, other=other))
        for own, other in ("ab", "ba")
    )
    last = notebook(
        tmp_path / "c.ipynb",
        f"from pathlib import Path\nassert all((Path({str(tmp_path)!r}) / n).exists() for n in 'ab')",
    )
    targets = run_in(tmp_path / "out", monkeypatch, 2, ["a", "b"], one, two, last)
    assert [t.name for t in targets] == ["a.ipynb", "b.ipynb", "c.ipynb"]
    assert all(t.is_file() for t in targets)


def test_after_a_failure_nothing_else_is_started(tmp_path, monkeypatch):
    bad = notebook(tmp_path / "bad.ipynb", "raise ValueError('found x')")
    others = [notebook(tmp_path / f"{name}.ipynb", "import time; time.sleep(1)") for name in "abc"]
    with pytest.raises(UserError, match=r"bad\.ipynb, cell 2: ValueError: found x"):
        run_in(tmp_path / "out", monkeypatch, 1, ["bad", "a", "b", "c"], bad, *others)
    assert [path.name for path in (tmp_path / "out" / "notebooks").iterdir()] == [
        "bad.failed.ipynb"
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["chain", "--profile", "tny"], "unknown profile 'tny'"),
        (["chain", "notebooks/99_none.ipynb"], "notebooks/99_none.ipynb does not exist"),
        (
            ["chain", "-p", "profil", "tiny", "notebooks/00_start_here.ipynb"],
            "no parameter 'profil'",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_1(arguments, says):
    done = subprocess.run(
        [sys.executable, "-m", "helpers.run", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_generated_blocks_say_what_the_files_say():
    """No number is typed into the README or the datasheet: both blocks are what their sources give."""
    assert report.review_table() in (ROOT / "data" / "README.md").read_text()
    tests = {
        source: pd.read_csv(ROOT / "figures" / "tiny" / f"08_claims{end}.csv")
        for source, end in (("paper", ""), ("ours", "_ours"))
    }
    readme = (ROOT / "README.md").read_text()
    printed = "".join(
        output.text
        for cell in nbformat.read(ROOT / "notebooks" / "08_claims.ipynb", as_version=4).cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    found = re.findall(
        r"^(\S+), (\S+) +(not supported|supported|mixed|not testable) +\d+ of", printed, re.M
    )
    verdicts = {f"{name}.{unit}": verdict for name, unit, verdict in found}
    assert verdicts
    assert all(report.claims_table(verdicts, tests[source], source) in readme for source in tests)
