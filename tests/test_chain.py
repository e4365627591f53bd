"""The runner: a failed notebook is never taken for a finished one, one signal ends everything, an
interrupted chain resumes, and a mistake is one line on stderr.
"""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from PIL import Image

from helpers.config import Pair, load_profile
from helpers.paths import ROOT
from helpers.record import (
    DamagedFile,
    RecordMismatch,
    UserError,
    read_json,
    sealed,
    sha256,
    write_json,
)
from helpers.run import __main__ as command
from helpers.run import chain, findings, notebook, plan, progress, report, stopping
from helpers.study.summary import stamp


def book(path, *cells, **metadata):
    made = nbformat.v4.new_notebook(metadata=metadata)
    made.cells = [
        nbformat.v4.new_code_cell(
            'profile = "tiny"\nepsilon = None', metadata={"tags": ["parameters"]}
        ),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    nbformat.write(made, path)
    return path


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A results folder of the test's own."""
    monkeypatch.setattr(chain, "results_dir", lambda name: tmp_path / "out")
    monkeypatch.setattr(chain, "figures_dir", lambda name: tmp_path / "figures")
    return tmp_path / "out"


def run(*paths, jobs=1, together=(), **parameters):
    profile = replace(load_profile("tiny"), jobs=jobs)
    return chain.run(profile, list(paths), parameters, together)


def outputs(path):
    return nbformat.read(path, as_version=4).cells[-1].outputs[0].text


# one notebook


def test_a_finished_notebook_takes_its_place(tmp_path, out):
    (target,) = run(book(tmp_path / "a.ipynb", "print(profile)"), profile="mine")
    assert target == out / "notebooks" / "a.ipynb"
    assert "mine" in outputs(target)
    assert {p.name for p in target.parent.iterdir()} <= {"a.ipynb", "a.log", ".lock"}


@pytest.mark.parametrize(
    "few",
    [
        {"ablation_rows": 4},
        {"rows": 3},
        {"rows": 8, "dataset": "data/hexainst/ai.jsonl"},  # one half, cut in two
    ],
)
def test_too_few_rows_to_ablate_are_said_before_anything_runs(tmp_path, out, few):
    profile, notes = replace(load_profile("tiny"), **few), tmp_path / "notes"
    other = book(tmp_path / "00_first.ipynb", f"open({str(notes)!r}, 'w')")
    ablation = book(tmp_path / "06_ablation.ipynb", "print(1)")
    least = few["rows"] // 2 if "dataset" in few else [*few.values()][0]
    with pytest.raises(UserError, match=f"on {least} rows of a category and half"):
        chain.run(profile, [other, ablation], {})
    assert not notes.exists()
    chain.run(profile, [other], {})
    assert notes.exists()


@pytest.mark.skipif(os.name != "posix", reason="no such sockets on this system")
def test_kernels_share_no_ports(tmp_path, out):
    """Two that start together may be given the same free port; each talks through its own files."""
    show = (
        "import json\nfrom ipykernel.connect import get_connection_info\n"
        "info = json.loads(get_connection_info())\nprint(info['transport'], info['ip'])"
    )
    targets = run(book(tmp_path / "a.ipynb", show), book(tmp_path / "b.ipynb", show))
    seen = [outputs(target).split() for target in targets]
    assert [transport for transport, _ in seen] == ["ipc", "ipc"]
    assert seen[0][1] != seen[1][1]
    assert not any(Path(ip).parent.exists() for _, ip in seen)


def test_a_plan_refuses_what_the_chain_would(monkeypatch, capsys):
    """After the costs: they are known, whatever the rows."""
    few = replace(load_profile("tiny"), ablation_rows=4)
    monkeypatch.setattr(command, "load_profile", lambda name: few)
    assert command.main(["plan"]) == 1
    said = capsys.readouterr()
    assert "ablated sequences" in said.out
    assert "on 4 rows of a category and half" in said.err


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        ("data/models/tiny-dense/tunde", "data/models/tiny-dense/tunde does not exist"),
        ("data/models/tiny-moe/tuned", "differ in .*model_type.*parameters: they are no pair"),
    ],
)
def test_a_plan_looks_at_both_models(tuned, says):
    pair = Pair("a", base="data/models/tiny-dense/base", tuned=tuned)
    with pytest.raises(UserError, match=says):
        plan.plan(replace(load_profile("tiny"), pairs=(pair,)))


def test_a_plan_compares_sizes(tmp_path):
    """Of one architecture, too, as check_pair does; what may differ may."""
    base = ROOT / "data" / "models" / "tiny-dense" / "base"
    config = read_json(base / "config.json")
    for change, refused in ({"intermediate_size": 256}, True), ({"use_cache": False}, False):
        write_json(tmp_path / "config.json", config | change)
        pair = Pair("a", base=str(base), tuned=str(tmp_path))
        if refused:
            with pytest.raises(UserError, match="differ in intermediate_size, parameters"):
                plan.plan(replace(load_profile("tiny"), pairs=(pair,)))
        else:
            assert len(plan.plan(replace(load_profile("tiny"), pairs=(pair,)))) == 1


def test_a_failed_notebook_leaves_the_former_result(tmp_path, out):
    """The cell is named as the page numbers it: the one that sets parameters is not counted."""
    target = out / "notebooks" / "bad.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text("former")
    source = book(
        tmp_path / "bad.ipynb",
        "from helpers.record import UserError\nraise UserError('found x, expected y')",
    )
    with pytest.raises(UserError, match=r"bad\.ipynb, cell 2: UserError: found x, expected y"):
        run(source, profile="tiny")
    assert target.read_text() == "former"
    assert target.with_suffix(".failed.ipynb").exists()
    book(source, "print(1)")
    run(source)
    assert not target.with_suffix(".failed.ipynb").exists()


def test_a_failed_run_keeps_no_output_of_a_cell_that_never_ran(tmp_path, out):
    """A committed page's outputs would be taken for this run's."""
    source = book(tmp_path / "bad.ipynb", "1 / 0", "print(2)")
    committed = nbformat.read(source, 4)
    for cell in committed.cells:
        if cell.cell_type == "code":
            cell.outputs = [nbformat.v4.new_output("stream", text="of another run")]
            cell.execution_count = 7
    nbformat.write(committed, source)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        run(source)
    failed = nbformat.read(out / "notebooks" / "bad.failed.ipynb", 4)
    assert "of another run" not in nbformat.writes(failed)
    last = failed.cells[-1]
    assert (last.source, last.outputs, last.execution_count) == ("print(2)", [], None)


def test_a_kernel_that_dies_is_one_clear_error(tmp_path, out):
    source = book(tmp_path / "a.ipynb", "1", "import os; os._exit(9)")
    with pytest.raises(UserError, match=r"a\.ipynb, cell 3: its kernel died"):
        run(source)


def test_stderr_of_a_notebook_goes_to_its_log(tmp_path, out):
    source = book(tmp_path / "a.ipynb", "import sys; print('a bar 5/9', file=sys.stderr)")
    run(source)
    assert "a bar 5/9" in (out / "notebooks" / "a.log").read_text()


def test_a_kernel_finds_the_helpers_of_the_runner(tmp_path, out):
    """Not those of another clone that the environment was made for."""
    assert str(ROOT) in outputs(
        run(book(tmp_path / "a.ipynb", "import helpers; print(helpers)"))[0]
    )


def test_parameters_are_refused_before_anything_runs(tmp_path, out):
    source = book(tmp_path / "a.ipynb", "print(1)")
    with pytest.raises(UserError, match="no parameter 'profil'. Its parameters: profile, epsilon"):
        run(source, profil="tiny")
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no notebook"),
        ("not JSON", "is no notebook"),
        ("[]", "is no notebook"),
        ("{}", "is no notebook"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "is no notebook"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [3]}', "is no notebook"),
        ("[" * 100_000, "is no notebook"),
        ('{"nbformat": 99, "metadata": {}, "cells": []}', "is no notebook"),
    ],
)
def test_a_file_that_is_no_notebook_is_refused(tmp_path, text, says):
    path = tmp_path / "a.ipynb"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        chain.notebooks([path])


def test_which_notebooks_can_be_read(tmp_path):
    """One without a kernelspec, or with one not here, runs on this Python; R does not."""
    spec = {"name": "no-such-kernel", "display_name": "x"}
    for given in ({}, {"kernelspec": spec}, {"kernelspec": spec | {"language": "python"}}):
        read = notebook.read(book(tmp_path / "a.ipynb", **given))
        assert read.metadata.kernelspec.name == "python3"
    with pytest.raises(UserError, match="written in R; the chain runs Python only"):
        notebook.read(book(tmp_path / "a.ipynb", kernelspec=spec | {"language": "R"}))
    (tmp_path / "b.ipynb").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no notebook"):
        notebook.read(tmp_path / "b.ipynb")
    with pytest.raises(UserError, match="cannot be read"):
        notebook.read(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        notebook.read(tmp_path / "c.ipynb")


def test_canonical_notebooks_hold_nothing_that_changes_from_run_to_run(tmp_path, out):
    source = book(
        tmp_path / "a.ipynb",
        "import sys, time\nprint('out', flush=True); time.sleep(0.5)\nprint('put')"
        "; print('err', file=sys.stderr)",
    )
    one, two = (notebook.canonical(notebook.read(run(source)[0])) for _ in range(2))
    assert one == two
    assert "papermill" not in str(one)
    assert "err\n" not in str([c.get("outputs") for c in one.cells])
    assert [c.execution_count for c in one.cells] == [1, 2]
    assert [o.text for o in one.cells[1].outputs] == ["out\nput\n"]


# several notebooks


def test_independent_notebooks_run_side_by_side_and_the_last_one_after_them(tmp_path, out):
    """Each of two waits for a file that only the other writes; the third needs both."""
    meet = (
        "import time\nfrom pathlib import Path\nhere = Path({here!r})\n(here / {own!r}).touch()\n"
        "deadline = time.time() + 60\n"
        "while not (here / {other!r}).exists(): assert time.time() < deadline; time.sleep(0.1)"
    )
    one, two = (
        book(tmp_path / f"{own}.ipynb", meet.format(here=str(tmp_path), own=own, other=other))
        for own, other in ("ab", "ba")
    )
    both = f"all((Path({str(tmp_path)!r}) / n).exists() for n in 'ab')"
    last = book(tmp_path / "c.ipynb", f"from pathlib import Path\nassert {both}")
    targets = run(one, two, last, jobs=2, together=["a", "b"])
    assert [t.name for t in targets] == ["a.ipynb", "b.ipynb", "c.ipynb"]
    assert all(t.is_file() for t in targets)


def test_after_a_failure_nothing_else_is_started_and_what_runs_may_end(tmp_path, out):
    bad = book(tmp_path / "bad.ipynb", "import time; time.sleep(1)\nraise ValueError('found x')")
    others = [book(tmp_path / f"{name}.ipynb", "import time; time.sleep(4)") for name in "abc"]
    with pytest.raises(UserError, match=r"bad\.ipynb, cell 2: ValueError: found x"):
        run(bad, *others, jobs=2, together=["bad", "a", "b", "c"])
    found = {path.name for path in (out / "notebooks").glob("[!.]*.ipynb")}
    assert found == {"bad.failed.ipynb", "a.ipynb"}


def test_notebooks_are_grouped_or_refused():
    a, b, c = (Path(f"{name}.ipynb") for name in "abc")
    assert chain.groups([a, b, c], ["b", "c"]) == [[a], [b, c]]
    assert chain.groups([a, b, c], ["c", "b"]) == [[a], [c, b]]
    assert chain.groups([a, b, c], ["a", "c"]) == [[a], [b], [c]]
    with pytest.raises(UserError, match="no notebook to run"):
        chain.groups([])
    with pytest.raises(UserError, match="named twice: a"):
        chain.groups([a, Path("other/a.ipynb")])
    with pytest.raises(UserError, match="names no given notebook: d"):
        chain.groups([a], ["d"])


def test_an_interrupted_chain_resumes_at_the_notebook(tmp_path, out, monkeypatch):
    """What ended is not run again; unless its cells, its parameters, a file of helpers or data, or
    what it wrote have changed. What it fetched into data/cache is no such change. After its end a
    chain starts from the beginning.
    """

    async def cells(self, folder, progress, log):  # in this process: the order is what is tested
        for at, cell in enumerate(self.book.cells):
            try:
                exec(cell.source, {})
            except AssertionError as error:
                raise UserError(f"{self.path.name}, cell {at + 1}: AssertionError") from error

    monkeypatch.setattr(notebook.Execution, "_cells", cells)
    log, gate = tmp_path / "log", tmp_path / "gate"
    monkeypatch.setattr(chain, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "claims.csv").write_text("1")
    note = f"from pathlib import Path\nopen({str(log)!r}, 'a').write({{!r}})\n"
    wrote = f"Path({str(out)!r}, 'table.csv').write_text('1')"
    fetched = f"Path({str(tmp_path)!r}, 'data', 'cache').mkdir(exist_ok=True)\n"
    fetched += f"Path({str(tmp_path)!r}, 'data', 'cache', 'model').write_text('1')\n"
    a = book(tmp_path / "a.ipynb", note.format("a") + fetched + wrote)
    b = book(tmp_path / "b.ipynb", note.format("b"))
    c = book(tmp_path / "c.ipynb", note.format("c") + f"assert Path({str(gate)!r}).exists()")

    def ran(**parameters):
        log.write_text("")
        if gate.exists():
            run(a, b, c, **parameters)
        else:
            with pytest.raises(UserError, match=r"c\.ipynb, cell \d: AssertionError"):
                run(a, b, c, **parameters)
        return log.read_text()

    assert ran() == "abc"
    assert ran() == "c"
    assert ran(epsilon=0.1) == "abc"
    assert ran(epsilon=0.1) == "c"
    book(b, note.format("b"), "1")
    assert ran(epsilon=0.1) == "bc"
    (tmp_path / "data" / "claims.csv").write_text("12")
    assert ran(epsilon=0.1) == "abc"
    (out / "table.csv").unlink()
    assert ran(epsilon=0.1) == "abc"
    (out / "notebooks" / "b.ipynb").unlink()
    assert ran(epsilon=0.1) == "bc"
    (out / "notebooks" / "chain.json").write_text("[1]")
    assert ran(epsilon=0.1) == "abc"
    gate.touch()
    assert ran(epsilon=0.1) == "c"
    assert ran(epsilon=0.1) == "abc"
    assert not (out / "notebooks" / "chain.json").exists()


def test_two_chains_do_not_write_one_folder(tmp_path, out):
    source = book(tmp_path / "a.ipynb")
    held = chain.Chain(load_profile("tiny"), [[source]], {})
    with held.alone(), pytest.raises(UserError, match="another chain is writing"):
        run(source)


def test_drafts_of_a_killed_chain_are_removed_and_no_others(tmp_path, out):
    folder = out / "notebooks"
    folder.mkdir(parents=True)
    for name in (".a.ipynb.x1.ipynb", ".chain.json.x1.json", "mine.ipynb", ".mine.txt"):
        (folder / name).write_text("")
    run(book(tmp_path / "a.ipynb"))
    assert {p.name for p in folder.glob("*")} - {".lock"} == {
        "a.ipynb",
        "a.log",
        "mine.ipynb",
        ".mine.txt",
    }


# stopping: real processes, real signals

DRIVER = (
    "import sys; from pathlib import Path; from helpers.run import __main__, chain\n"
    "chain.results_dir = chain.figures_dir = lambda name: Path(sys.argv[1])\n"
    "sys.exit(__main__.main(sys.argv[2:]))"
)
SLEEP = "print(1)\nimport time; Path({!r}).touch(); time.sleep(300)"
DEAF = (
    "import ctypes, signal, subprocess, tempfile; tempfile.mkdtemp()\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "subprocess.Popen(['sleep', '300'], start_new_session=True)\n"
    "Path({!r}).touch(); ctypes.PyDLL(None).sleep(300)"
)


class Started:
    """A command in a session and a temporary folder of its own."""

    def __init__(self, tmp_path, *arguments):
        self.temporary = tempfile.mkdtemp(dir="/tmp", prefix="t")
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path / "out"), *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": self.temporary},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, *paths):
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in paths):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def family(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.process.communicate(timeout=20)[0]


@pytest.fixture
def start(tmp_path):
    made = []

    def go(*arguments):
        made.append(Started(tmp_path, *arguments))
        return made[-1]

    yield go
    for started in made:
        if started.process.poll() is None:
            started.process.kill()
            started.process.wait()
        for folder in Path(started.temporary).glob("sparcom-*"):
            stopping.kill_family(folder)
        shutil.rmtree(started.temporary, ignore_errors=True)


def alive(processes):
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def sleeper(path, cell):
    """A notebook that touches <name>.on and then sleeps, and that file."""
    on = path.with_suffix(".on")
    return book(path, "from pathlib import Path\n" + cell.format(str(on))), on


@pytest.mark.parametrize(
    ("number", "group", "code"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
@pytest.mark.parametrize("cell", [SLEEP, DEAF], ids=["python", "deaf in C"])
def test_one_signal_ends_the_chain(tmp_path, start, number, group, code, cell):
    """Two kernels side by side and, under one, a child in a session of its own."""
    (a, a_on), (b, b_on) = (sleeper(tmp_path / f"{name}.ipynb", cell) for name in "ab")
    third = book(tmp_path / "c.ipynb")
    run = start("chain", a, b, third, "--together", "a", "b")
    run.wait_for(a_on, b_on)
    family = run.family()
    assert len(family) >= 2
    said = run.end(number, group)
    assert run.process.returncode == code
    assert alive(family) == []
    assert said.splitlines()[-1] == "interrupted; finished counts are kept; run again"
    assert "Traceback" not in said
    assert "c: starts" not in said
    assert os.listdir(run.temporary) == []
    assert {p.name for p in (tmp_path / "out" / "notebooks").glob("*.ipynb")} == set()


@pytest.mark.parametrize("after", [0.3, 1.0, "kernel"])
def test_a_signal_while_it_starts(tmp_path, start, after):
    run = start("chain", sleeper(tmp_path / "a.ipynb", SLEEP)[0])
    if after == "kernel":
        run.wait_for(tmp_path / "out" / "notebooks" / "a.log")
    else:
        time.sleep(after)
    said = run.end(signal.SIGTERM)
    assert run.process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in said
    assert os.listdir(run.temporary) == []


def test_what_a_killed_run_left_is_cleared_by_the_next(tmp_path, start, monkeypatch):
    """kill -9: no handler runs. The next start ends the orphans and removes sockets; a live run's
    folder stays, and so does what is not ours.
    """
    first = start("chain", sleeper(tmp_path / "a.ipynb", DEAF)[0])
    first.wait_for(tmp_path / "a.on")
    orphans = first.family()
    first.end(signal.SIGKILL)
    assert alive(orphans)
    (left,) = Path(first.temporary).glob("sparcom-*")
    not_ours = Path(first.temporary) / "sparcom-notes"
    not_ours.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", first.temporary)
    with stopping.household() as folder:
        assert not left.exists()
        assert alive(orphans) == []
        stopping.clear_dead_runs()
        assert folder.exists()
        assert not_ours.exists()
    assert not folder.exists()


def test_one_signal_ends_the_comparison_of_notebooks(tmp_path, start):
    """pytest, its workers and their kernels."""
    (a, a_on), (b, b_on) = (sleeper(tmp_path / f"{name}.ipynb", DEAF) for name in "ab")
    run = start("check", a, b, "--together", "a", "b")
    run.wait_for(a_on, b_on)
    family = run.family()
    said = run.end(signal.SIGINT, group=True)
    assert run.process.returncode == 130
    assert alive(family) == []
    assert said.splitlines()[-1] == "interrupted; finished counts are kept; run again"


def test_the_comparison_says_whether_outputs_are_the_same(tmp_path, out):
    source = book(tmp_path / "a.ipynb", "print(6 * 7)")
    target = run(source)[0]
    assert chain.check([target]) == 0
    target.write_text(target.read_text().replace("42", "43"))
    assert chain.check([target]) == 1


# what it cost


def test_only_a_run_of_the_whole_chain_says_how_long_the_chain_takes(tmp_path, out):
    out.mkdir(exist_ok=True)
    write_json(out / "summary.json", {"wall_seconds": 600, "seconds": {"00_start_here": 9}})
    run(book(tmp_path / "a.ipynb", "print(1)"))
    found = read_json(out / "summary.json")
    assert found["wall_seconds"] == 600
    assert "gflops" not in found
    assert set(found["seconds"]) == {"00_start_here", "a"}
    run(*(book(tmp_path / f"{name}.ipynb", "print(1)") for name in chain.NOTEBOOKS))
    found = read_json(out / "summary.json")
    assert found["wall_seconds"] < 600
    assert found["gflops"] > 0
    assert found["cores"] == len(psutil.Process().cpu_affinity())


def test_the_yardstick_counts_a_multiplication_and_an_addition_for_each_product(monkeypatch):
    monkeypatch.setattr(chain, "repeat", lambda run, number, repeat: [0.5, 0.25 + (run() is None)])
    assert chain.gflops(1000) == 2 * 1000**3 / 0.25 / 1e9


# the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "tny"], "unknown profile 'tny'"),
        (["notebooks/99_none.ipynb"], "notebooks/99_none.ipynb does not exist"),
        (["notebooks/conftest.py"], "is no notebook"),
        (["-p", "profil", "tiny", "notebooks/00_start_here.ipynb"], "no parameter 'profil'"),
        (["-p", "name", "a", "notebooks/00_start_here.ipynb"], "no parameter 'name'"),
        (["-p", "profile", "[a"], "-p profile: '[a' is not valid YAML"),
        (["-p", "profile", "[a]"], "cannot name a file"),
        (["--profile", "tiny", "-p", "profile", "tiny-full"], "differ. Name one"),
        (["-p", "epsilon", "many"], "epsilon"),
        (["-p", "epsilon", "7"], "epsilon"),
        (["-p", "epsilon", "2020-01-01"], "reads as date"),
        (["-p", "epsilon", "{a: 1}"], "reads as dict"),
        (["-p", "seed", "x"], "seed"),
        (["--together", "nine"], "names no given notebook: nine"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_1(arguments, says, capsys):
    assert command.main(["chain", *arguments]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_results_that_cannot_be_written_are_one_line(tmp_path, start):
    source = book(tmp_path / "a.ipynb")
    (tmp_path / "out").write_text("a file")
    run = start("chain", source)
    assert "cannot write in" in run.process.communicate(timeout=60)[0].splitlines()[-1]
    assert run.process.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="no such limit on this system")
def test_a_full_disk_is_one_line(tmp_path):
    """Every write fails beyond some bytes, as on a full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
    source = book(tmp_path / "a.ipynb", "print('x' * 5000)")
    done = subprocess.run(
        [sys.executable, "-c", limit + DRIVER, str(tmp_path / "out"), "chain", str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Free the disk" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "notebooks" / "a.ipynb").exists()


def test_a_long_temporary_folder_is_no_obstacle(tmp_path, start, monkeypatch):
    """A socket's name may have 107 characters; what does not fit goes to a shorter folder."""
    deep = tmp_path / ("d" * 104)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with stopping.household() as folder:
        settings = stopping.kernel_files(folder)
        assert settings["transport"] == "ipc"
        assert len(settings["ip"]) < 100
    monkeypatch.setattr(stopping, "LONGEST", 0)  # nowhere short enough: ports
    with stopping.household() as folder:
        assert folder.parent == deep
        monkeypatch.setattr(stopping, "LONGEST", 55)
        assert set(stopping.kernel_files(folder)) == {"connection_file"}


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("found x"), 1, "error: found x\n"),
        (MemoryError(), 1, "error: out of memory"),
        (OSError(28, "No space left on device", "a/b"), 1, "error: a/b: No space left on device"),
        (ModuleNotFoundError("no", name="nbval.plugin"), 1, "error: this command needs nbval"),
        (KeyboardInterrupt(), 130, "interrupted; finished"),
        (stopping.Stopped(15), 143, "interrupted; finished"),
    ],
)
def test_whatever_ends_a_command_early_is_one_line(error, code, says, monkeypatch, capsys):
    def fail(options):
        raise error

    monkeypatch.setitem(command.COMMANDS, "plan", (fail, [command.PROFILE]))
    assert command.main(["plan"]) == code
    said = capsys.readouterr().err
    assert said.startswith(says)
    assert len(said.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error():
    code = (
        "import sys, time; from helpers.run import __main__ as m; time.sleep(1)\n"
        "m.COMMANDS['plan'] = (lambda options: print('x' * 99999) or 0, [])\n"
        "sys.exit(m.main(['plan']))"
    )
    done = subprocess.run(
        ["/bin/bash", "-c", '"$0" -c "$1" | true; exit ${PIPESTATUS[0]}', sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 141
    assert done.stderr == ""


def test_the_commands_start_without_the_heavy_libraries():
    heavy = "torch", "transformers", "pandas", "papermill", "matplotlib"
    show = f"import sys, helpers.run.__main__; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_progress_names_notebook_cell_time_and_the_last_bar():
    shown = progress.Progress(io.StringIO())
    shown.start("06_ablation", 44, ROOT / "a.log")
    shown.cell("06_ablation", 7)
    shown.bar("06_ablation", "\rrows:  10%|#\rrows:  20%|##\na warning\n")
    assert shown.status() == "06_ablation: cell 7 of 44, 0:00, rows:  20%|##"
    shown.cell("06_ablation", 8)
    shown.end("06_ablation", "done")
    assert shown.stream.getvalue().splitlines() == [
        "06_ablation: starts, 44 cells; bars and warnings in a.log",
        "06_ablation: done at cell 8 of 44, 0:00",
    ]
    assert shown.status() == ""


def test_generated_blocks_say_what_the_files_say():
    """No number is typed into README or datasheet: their blocks are what is published."""
    for page, text in report.pages().items():
        assert page.read_text() == text


REAL = {"profile": "big", "wall_seconds": 1800, "peak_rss_mb": 4096}


def test_the_page_says_what_a_run_took_of_a_tiny_and_a_real_model():
    tiny = {"wall_seconds": 600, "peak_rss_mb": 1536, "gflops": 70, "cores": 16}
    said = report.cost(tiny, REAL)
    assert "took 10 minutes on 16 cores of 70 GFLOP/s each, without a GPU" in said
    assert "held 1.5 GB" in said
    assert "With `PROFILE=big`, a real model, on both halves" in said
    assert "it took 30 minutes and 4.0 GB on cores of unknown speed." in said
    assert "minutes on 1 core of 70 GFLOP/s each" in report.cost(tiny | {"cores": 1}, tiny | REAL)


def test_what_the_whole_chain_took_outlives_a_run_of_some_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DATA", tmp_path)
    monkeypatch.setattr(report, "results_dir", lambda name: tmp_path / "run")
    (tmp_path / "run").mkdir()
    for name in ("claims.csv", "verdicts.csv"):
        (tmp_path / "run" / name).write_text("id\na\n")
    whole = {"wall_seconds": 600, "peak_rss_mb": 1000, "cores": 4, "pairs": {}}
    whole |= {"seconds": {"00": 9.0, "05": 8.0}}
    part = {"peak_rss_mb": 10, "seconds": {"05": 7.0}, "pairs": {}}
    after = whole | {"seconds": {"00": 9.0, "05": 7.0}}
    other = {"wall_seconds": 5, "peak_rss_mb": 1, "pairs": {}}
    for summary, known in ((whole, whole), (part, after), (other, other)):
        write_json(tmp_path / "run" / "summary.json", summary)
        published = read_json(report.publish("tiny") / "summary.json")
        assert published.pop("tables").keys() == {"tests.csv", "verdicts.csv"}
        assert published.pop("record")
        assert published == known


def test_what_is_published_is_of_the_profile_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DATA", tmp_path)
    monkeypatch.setattr(report, "results_dir", lambda name: tmp_path / "run")
    (tmp_path / "run").mkdir()
    for name in report.RUN:
        (tmp_path / "run" / name).write_text("id\na\n")
    tables = {name: sha256(tmp_path / "run" / name) for name in report.RUN}
    found = stamp(load_profile("tiny", threads=7)) | {"pairs": {}, "tables": tables}
    write_json(tmp_path / "run" / "summary.json", found)  # threads decide nothing
    kept = read_json(report.publish("tiny") / "summary.json")
    made = {name: sha256(tmp_path / "published/tiny" / name) for name in findings.PUBLISHED}
    known = {key: found[key] for key in ("profile", "versions", "pairs")}
    assert kept == sealed(known | {"tables": made})
    (tmp_path / "run" / "verdicts.csv").write_text("id\n")
    with pytest.raises(DamagedFile, match="verdicts.csv was cut or changed"):
        report.publish("tiny")
    write_json(tmp_path / "run" / "summary.json", found | stamp(load_profile("tiny", epsilon=0.2)))
    said = "settings.epsilon = 0.2, .* Run `make reproduce PROFILE=tiny` to compute it anew"
    with pytest.raises(RecordMismatch, match=said):
        report.publish("tiny")
    assert read_json(tmp_path / "published/tiny/summary.json") == kept


@pytest.mark.parametrize("name", ["tests.csv", "verdicts.csv", "tuning_verdicts.csv"])
def test_a_published_table_that_was_edited_is_on_no_page(tmp_path, monkeypatch, name):
    shutil.copytree(report.DATA / "published", tmp_path / "data" / "published")
    shutil.copy(report.DATA / "README.md", tmp_path / "data")
    monkeypatch.setattr(report, "DATA", tmp_path / "data")
    for left in ("x", ".tiny.sparcom-draft"):
        (tmp_path / "data" / "published" / left).mkdir()  # left of a former version, or killed
    assert report.pages()[ROOT / "README.md"] == (ROOT / "README.md").read_text()
    path = tmp_path / "data" / "published" / "tiny" / name
    path.write_text(path.read_text().replace("not supported", "supported").replace("True", "False"))
    with pytest.raises(DamagedFile, match=rf"{name} was cut or changed.* Publish the profile"):
        report.pages()


def test_a_published_number_that_was_edited_is_on_no_page(tmp_path, monkeypatch):
    shutil.copytree(report.DATA / "published", tmp_path / "published")
    monkeypatch.setattr(report, "DATA", tmp_path)
    path = tmp_path / "published" / "smollm2" / "summary.json"
    record = read_json(path)
    write_json(path, record | {"wall_seconds": record["wall_seconds"] / 2})
    with pytest.raises(DamagedFile, match="smollm2.summary.json was edited"):
        report.pages()


def test_every_committed_table_is_named_by_its_summary():
    for path in (report.DATA / "published").glob("*/summary.json"):
        named = read_json(path)["tables"]
        assert named == {table.name: sha256(table) for table in path.parent.glob("*.csv")}


def test_publishing_that_is_killed_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DATA", tmp_path)
    monkeypatch.setattr(report, "results_dir", lambda name: tmp_path / "run")
    (tmp_path / "run").mkdir()
    folder = tmp_path / "published" / "tiny"

    def run(text):
        for name in report.RUN:
            (tmp_path / "run" / name).write_text(f"id\n{text}\n")
        write_json(tmp_path / "run" / "summary.json", {"pairs": {text: {}}})
        return report.publish("tiny")

    (run("a") / "tuning_tests.csv").write_text("id\nt\n")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(report, "write_json", lambda *args: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            run("b")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    run("b")
    assert (folder / "tests.csv").read_text() == "id\nb\n"
    assert (folder / "tuning_tests.csv").read_text() == "id\nt\n"  # no run of notebook 10
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_committed_picture_has_few_colours_and_looks_the_same():
    pixels, drawn = np.random.default_rng(0).integers(0, 8, (40, 50, 3)) * 32, io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(drawn, "png")
    cell = nbformat.v4.new_code_cell("draw()")
    data = {
        "image/png": base64.b64encode(drawn.getvalue()).decode() + "\n",
        "text/plain": "<Figure>",
    }
    cell.outputs = [nbformat.v4.new_output("display_data", data)]
    book = notebook.canonical(nbformat.v4.new_notebook(cells=[cell]))
    small = base64.b64decode(book.cells[0].outputs[0].data["image/png"])
    assert Image.open(io.BytesIO(small)).mode == "P"
    found = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert np.abs(found - pixels).mean() < 16
    again = notebook.canonical(book).cells[0].outputs[0].data
    assert base64.b64decode(again["image/png"]) == small


def test_a_file_named_from_home_is_watched_as_any_other(tmp_path, monkeypatch):
    """The key of a notebook changes with the rows, whatever way the profile names them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(chain, "DATA", tmp_path / "none")
    (tmp_path / "none").mkdir()
    source, keys = book(tmp_path / "a.ipynb"), set()
    for rows in ("one", "another"):
        (tmp_path / "mine.jsonl").write_text(rows)
        for name in ("~/mine.jsonl", str(tmp_path / "mine.jsonl")):
            profile = replace(load_profile("tiny"), dataset=name)
            keys.add((name, chain.inputs(profile, source, {}, [])))
    assert len(keys) == 4


def test_what_an_adapter_was_trained_on_is_watched_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "DATA", tmp_path / "none")
    (tmp_path / "none").mkdir()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir(), adapter.mkdir()
    record = json.dumps({"base_model_name_or_path": str(base)})
    (adapter / "adapter_config.json").write_text(record)
    pair = replace(load_profile("tiny").pairs[0], base=None, tuned=str(adapter))
    profile, keys = replace(load_profile("tiny"), pairs=(pair,)), set()
    for weights in ("one", "another"):
        (base / "model.safetensors").write_text(weights)
        keys.add(chain.inputs(profile, book(tmp_path / "a.ipynb"), {}, []))
    assert len(keys) == 2
    (adapter / "adapter_config.json").write_text("[]")  # no adapter's record: said where it is read
    assert chain.inputs(profile, book(tmp_path / "a.ipynb"), {}, [])


def test_a_file_that_is_gone_before_it_is_looked_at_is_no_error(tmp_path):
    assert chain._changed(tmp_path / "draft") == 0
    assert chain._changed(tmp_path) == 0
    (tmp_path / "table.csv").write_text("1")
    assert chain._changed(tmp_path / "table.csv") > 0


def test_a_summary_that_is_no_record_ends_a_chain_in_one_line(tmp_path, out):
    out.mkdir()
    (out / "summary.json").write_text("[]")
    with pytest.raises(UserError, match="summary.json is no summary. Delete it"):
        run(book(tmp_path / "a.ipynb"))


def test_what_ran_in_another_order_comes_back_in_the_order_given(tmp_path, out, monkeypatch):
    """`refresh` puts each executed notebook in its own place, whichever started first."""
    paths = [book(tmp_path / f"{name}.ipynb", f"print('{name} ran')") for name in "abc"]
    found = run(*paths, together=["c", "b"])
    assert [path.stem for path in found] == ["a", "b", "c"]
    monkeypatch.setattr(report, "publish", lambda _: None)
    monkeypatch.setattr(report, "write_pages", lambda: None)
    chain.refresh(paths, ["c", "b"])
    for path in paths:
        assert f"{path.stem} ran" in outputs(path)
