"""The chain of notebooks, run headless; the Makefile holds the list."""

import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import nbformat
import pandas as pd
import papermill
from nbclient.exceptions import DeadKernelError
from nbval.plugin import coalesce_streams
from traitlets.config import Config

from ..config import Profile, load_profile
from ..hexainst import human
from ..paths import DATA, NOTEBOOKS, ROOT, figures_dir, results_dir, short
from ..record import UserError, read_json, write_json
from .report import claims_table, cost, fill, review_table


def check_parameters(path, parameters: dict) -> None:
    """Refuse a parameter that the notebook does not declare (papermill itself only logs a warning)."""
    known = papermill.inspect_notebook(str(path))
    for name in parameters:
        if name not in known:
            raise UserError(
                f"{short(path)} has no parameter {name!r}. Its parameters: {', '.join(known) or 'none'}."
            )


@contextmanager
def private_sockets():
    """Settings for a kernel that talks through files of its own: a TCP port found free may be
    taken a moment later, by another kernel that starts beside it. Empty where there are no such
    sockets (Windows).
    """
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        yield {"transport": "ipc", "ip": str(Path(folder) / "socket")} if os.name == "posix" else {}


def execute(path: Path, target: Path, parameters: dict) -> float:
    """Run one notebook into `target` and return its seconds.

    `target` is replaced only when every cell ran; a failed run is kept beside it as
    <name>.failed.ipynb.
    """
    check_parameters(path, parameters)
    failed = target.with_suffix(".failed.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        with private_sockets() as settings:
            papermill.execute_notebook(
                str(path),
                str(failed),
                parameters,
                kernel_name="python3",
                cwd=str(NOTEBOOKS),
                progress_bar={"desc": path.stem, "file": sys.stderr},
                log_output=False,
                config=Config({"KernelManager": settings}),
            )
    except papermill.PapermillExecutionError as error:
        raise UserError(
            f"{short(path)}, cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"The run so far, for reading only: {short(failed)}"
        ) from error
    except DeadKernelError as error:
        raise UserError(
            f"{short(path)}: its kernel died, most likely for lack of memory. "
            "Lower batch_size in the profile, then run again; finished counts are kept."
        ) from error
    os.replace(failed, target)
    return time.perf_counter() - start


def run(profile: Profile, paths: list[Path], parameters: dict, together=()) -> list[Path]:
    """Execute the notebooks in order, add what they cost to summary.json, say where to look; the
    executed files.

    Neighbours whose names are in `together` need nothing of one another: profile.jobs of them run
    at a time. After a failure no other is started.
    """
    for path in paths:
        check_parameters(path, parameters)
    folder, seconds, start = results_dir(profile.name), {}, time.perf_counter()
    targets = [folder / "notebooks" / path.name for path in paths]
    free = together if profile.jobs > 1 else ()
    for _, group in groupby(
        zip(paths, targets, strict=True), key=lambda both: both[0].stem in free or both[0]
    ):
        with ThreadPoolExecutor(profile.jobs) as pool:
            jobs = {
                pool.submit(execute, path, target, parameters): path.stem for path, target in group
            }
            try:
                seconds |= {jobs[job]: round(job.result(), 1) for job in as_completed(jobs)}
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise
    wall = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (
        1024**2 if sys.platform == "darwin" else 1024
    )
    if (summary := folder / "summary.json").exists():
        before = read_json(summary)
        write_json(
            summary,
            before
            | {
                "seconds": before.get("seconds", {}) | seconds,
                "wall_seconds": round(wall),
                "peak_rss_mb": max(round(peak), before.get("peak_rss_mb", 0)),
            },
        )
    print(
        f"\n{len(paths)} notebooks in {wall:.0f} s, the largest process {peak:.0f} MB. Look at "
        f"{short(folder)}/notebooks/, {short(folder)}/summary.json and {short(figures_dir(profile.name))}/."
    )
    return targets


def canonical(notebook):
    """An executed notebook without what changes from run to run: timings, stderr, papermill
    traces, cuts in stdout.
    """
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        if cell.cell_type == "code":
            cell.outputs = coalesce_streams([o for o in cell.outputs if o.get("name") != "stderr"])
    return notebook


def refresh(paths: list[Path], together=()) -> None:
    """Execute every notebook with its own defaults and put the canonical results in place, all or
    none.
    """
    for path, target in zip(paths, run(load_profile("tiny"), paths, {}, together), strict=True):
        nbformat.write(canonical(nbformat.read(target, as_version=4)), path)
    summary = read_json(results_dir("tiny") / "summary.json")
    tests, readme, sheet = (
        pd.read_csv(results_dir("tiny") / "claims.csv"),
        ROOT / "README.md",
        DATA / "README.md",
    )
    tables = {
        block: claims_table(summary["claims"], tests, source)
        for block, source in (("claims", "paper"), ("claims-ours", "ours"))
    }
    readme.write_text(fill(readme, {"cost": cost(summary)} | tables))
    sheet.write_text(fill(sheet, {"review": review_table(), "human": human.table()}))


def notebooks(paths) -> list[Path]:
    """Notebooks named on a command line, as absolute paths; one that does not exist is an error."""
    paths = [Path(path).resolve() for path in paths]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{short(path)} does not exist.")
    return paths
