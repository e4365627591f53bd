"""The chain of notebooks, run headless; the Makefile holds the list.

Plain Python, not make's own graph: make goes by file times, which a checkout sets anew, counts no
cells, writes no common summary, and does not reach kernels, which live in sessions of their own.
Here one event loop holds all kernels, so one signal ends them, and an interrupted chain resumes at
the notebook: those that ended are not run again while nothing they read has changed. A chain that
came to its end has nothing to resume; the next one runs everything.
"""

import asyncio
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from timeit import repeat

import numpy as np
from filelock import FileLock, Timeout

from ..analysis.stats import SMALLEST
from ..config import CORES, Profile, load_profile
from ..paths import DATA, PROFILES, ROOT, figures_dir, resolve, results_dir, short
from ..record import DamagedFile, UserError, digest, read_json, versions, write_json
from ..study.summary import NOTEBOOKS
from .notebook import Execution, canonical, environment, read, save
from .progress import Progress
from .stopping import Stopped, household, run_stoppable

HELPERS = Path(__file__).resolve().parents[1]


def groups(paths: list[Path], together=()) -> list[list[Path]]:
    """The notebooks in order, those that may run side by side in one list: neighbours whose names
    are in `together` need nothing of one another, and start in its order.
    """
    if not paths:
        raise UserError("no notebook to run: name at least one, e.g. notebooks/00_start_here.ipynb")
    twice = [name for name, n in Counter(path.stem for path in paths).items() if n > 1]
    if twice:
        raise UserError(f"notebooks are named twice: {', '.join(twice)}. Their results would mix.")
    if unknown := set(together) - {path.stem for path in paths}:
        raise UserError(f"--together names no given notebook: {', '.join(sorted(unknown))}.")
    keyed = groupby(paths, key=lambda path: path.stem in together or path)
    place = {name: n for n, name in enumerate(together)}
    return [sorted(group, key=lambda path: place.get(path.stem, 0)) for _, group in keyed]


MADE = ("results", "cache")  # folders of data/ that runs fill, a chain's first notebook too


def state_of(paths) -> list:
    """Name, size and time of every file at or below `paths`: another state, other results."""
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and file.suffix not in (".pyc", ".md")
    ]
    return [(short(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def inputs(profile: Profile, path: Path, parameters: dict, before: list[str]) -> str:
    """Digest of all a notebook's results hang on: its cells, parameters, the profile, helpers,
    data, checkpoints, versions, and the notebooks `before` it (their own digests).
    """
    named = [name for pair in profile.pairs for name in (pair.base, pair.tuned) if name]
    named += [base for name in named for base in _trained_on(resolve(name))]
    local = [resolve(name) for name in (*named, profile.dataset)]
    given = [p for p in DATA.iterdir() if p.name not in MADE]
    given.append(ROOT / "requirements.txt")
    files = [HELPERS, *given, *local, PROFILES / f"{profile.name}.yaml"]
    cells = [cell.source for cell in read(path).cells]
    return digest([cells, parameters, repr(profile), state_of(files), versions(), before])


def _trained_on(folder: Path) -> list[str]:
    """The model that an adapter's folder was trained on, if it is one."""
    file = folder / "adapter_config.json"
    found = read_json(file) if file.is_file() else None
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return [base] if isinstance(base, str) and base else []


class Chain:
    """One run: which notebooks ended (with what they read and wrote), which run, which failed."""

    def __init__(self, profile: Profile, order: list[list[Path]], parameters: dict):
        self.order, self.jobs, self.progress = order, profile.jobs, Progress()
        self.results, self.figures = results_dir(profile.name), figures_dir(profile.name)
        self.folder = self.results / "notebooks"
        self.record = self.folder / "chain.json"
        self.running, self.failures, self.resumed, self.keys = {}, [], [], {}
        self.books = {
            path: Execution(path, self.folder / path.name, parameters)
            for group in order
            for path in group
        }
        self.all = list(self.books.values())
        before = []
        for group in order:
            self.keys |= {path: inputs(profile, path, parameters, before) for path in group}
            before = [*before, *(self.keys[path] for path in group)]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other chain writes this profile's results; drafts of killed ones are gone."""
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            for draft in [*self.folder.glob(".*.ipynb"), *self.folder.glob(".chain.json.*")]:
                draft.unlink()
        except Timeout as error:
            raise UserError(
                f"another chain is writing {short(self.folder)}. Wait for it, or stop it."
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write in {short(self.folder)}: {error.strerror or error}. Free the disk "
                "or make the folder writable, then run again; what was finished is kept."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _former(self) -> dict:
        """What an interrupted chain had finished: {name: {key, wrote, seconds}}."""
        try:
            found = read_json(self.record)
        except UserError:  # none, or not ours any more: nothing to resume
            return {}
        if not isinstance(found, dict):
            return {}
        keys = {"key", "wrote", "seconds"}
        return {name: e for name, e in found.items() if isinstance(e, dict) and set(e) == keys}

    def finished(self, path: Path) -> bool:
        """Did an interrupted chain run it from the same inputs, and is all it wrote still there?"""
        entry = self.done.get(path.stem)
        return bool(entry and entry["key"] == self.keys[path]) and all(
            (ROOT / name).exists() for name in [self.folder / path.name, *entry["wrote"]]
        )

    async def run(self, folder: Path) -> None:
        """All that is not finished, group by group; after a failure no other is started."""
        watch, self.done = asyncio.ensure_future(self.progress.watch()), self._former()
        for number, group in enumerate(self.order):
            todo = [path for path in group if not self.finished(path)]
            for path in [path for path in group if path not in todo]:
                self.resumed.append(path)
                self.progress.say(f"{path.stem}: finished before; nothing it reads has changed")
            gate = asyncio.Semaphore(self.jobs)
            await asyncio.gather(*(self._one(self.books[path], gate, folder) for path in todo))
            if self.failures:
                break
            if todo:  # what comes after reads what is new now
                later = {path.stem for rest in self.order[number + 1 :] for path in rest}
                self.done = {name: e for name, e in self.done.items() if name not in later}
        watch.cancel()

    async def _one(self, book: Execution, gate, folder: Path) -> None:
        async with gate:
            if self.failures:
                return
            self.running[book.name], since = book, time.time_ns()
            try:
                seconds = await book.run(folder, self.progress)
                self._note(book, seconds, since)
            except UserError as error:
                self.failures.append(error)
            finally:
                del self.running[book.name]
            if self.failures and self.running:
                self.progress.say(f"no other starts; still running: {', '.join(self.running)}")

    def _note(self, book: Execution, seconds: float, since: int) -> None:
        """Keep that it ended, with what it read and wrote (its neighbours' files, too)."""
        wrote = [
            short(file)
            for folder in (self.results, self.figures)
            for file in folder.rglob("*")
            if _changed(file) >= since
        ]
        passing = (".log", ".failed.ipynb", ".tokens.jsonl")
        kept = [n for n in wrote if not Path(n).name.startswith(".") and not n.endswith(passing)]
        self.done[book.name] = {"key": self.keys[book.path], "wrote": kept, "seconds": seconds}
        write_json(self.record, self.done)

    def interrupt(self) -> None:
        """A signal came: nothing else starts, every kernel hears Ctrl-C."""
        self.failures.append(UserError("interrupted"))
        for book in self.running.values():
            book.interrupt()

    def close(self, wall: float) -> None:
        """It came to its end: costs go into summary.json; the next chain has nothing to resume."""
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak /= 1024**2 if sys.platform == "darwin" else 1024
        if (summary := self.results / "summary.json").exists():
            seconds = {book.name: round(self.done[book.name]["seconds"], 1) for book in self.all}
            before = read_json(summary)
            if not isinstance(before, dict):
                raise DamagedFile(f"{short(summary)} is no summary. Delete it and run again.")
            costs = {
                "seconds": before.get("seconds", {}) | seconds,
                "peak_rss_mb": max(round(peak), before.get("peak_rss_mb", 0)),
            }
            if set(NOTEBOOKS) <= set(seconds) and not self.resumed:  # the whole chain, in one go
                machine = {"gflops": round(gflops()), "cores": cores()}
                costs |= {"wall_seconds": round(wall)} | machine
            write_json(summary, before | costs)
        self.record.unlink(missing_ok=True)
        before = f", {len(self.resumed)} of them before" if self.resumed else ""
        print(
            f"{len(self.all)} notebooks{before} in {wall:.0f} s, the largest process {peak:.0f} MB."
            f" Look at {short(self.folder)}/, {short(self.results)}/summary.json and "
            f"{short(self.figures)}/."
        )


def gflops(size: int = 1024) -> float:
    """What this machine multiplies with the threads that a notebook has, in 1e9 operations of
    float32 a second: the best of five matrix products. It tells slow machines from fast. (Ours.)
    """
    one = np.ones((size, size), np.float32)
    return 2 * size**3 / min(repeat(lambda: one @ one, number=1, repeat=5)) / 1e9


def cores() -> int:
    """How many cores this process may use; where the system does not say, all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else CORES


def _changed(file: Path) -> int:
    """When a file was written, in ns; 0 for a folder, and for what is gone by now."""
    try:
        return 0 if file.is_dir() else file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def run(profile: Profile, paths: list[Path], parameters: dict, together=()) -> list[Path]:
    """Execute the notebooks in order, profile.jobs of a group at a time, add what they cost to
    summary.json, say where to look; the executed files, in the order of `paths`.
    """
    if any(path.stem == "06_ablation" for path in paths):
        refuse_few_rows(profile)
    chain, start = Chain(profile, groups(paths, together), parameters), time.perf_counter()
    with chain.alone(), household() as folder:
        run_stoppable(lambda: chain.run(folder), folder, chain.interrupt)
        if chain.failures:
            raise chain.failures[0]
        chain.close(time.perf_counter() - start)
    return [chain.books[path].target for path in paths]


def refuse_few_rows(profile: Profile) -> None:
    """Notebook 06 can give no interval of so few, and would say so only when its turn comes."""
    from ..study.study import rows_of  # torch, which the chain itself does not need

    sizes = rows_of(profile).groupby(["fold", "category"], sort=False).size()
    half, category = sizes.idxmin()
    measured = min(profile.ablation_rows, sizes.min())
    if measured < SMALLEST:
        raise UserError(
            f"profile {profile.name}: ablations are measured on {measured} rows of a category and "
            f"half ({category}, {half}), expected {SMALLEST} or more. Raise `ablation_rows`, and "
            "`rows` if it is given; give the data set more rows; or run the other notebooks alone."
        )


def check(paths: list[Path], together=()) -> int:
    """Strict nbval over notebooks, two at a time where they may; pytest's exit code."""

    async def one(group) -> int:
        two = ["-n", "2", "--dist", "loadfile"] if len(group) > 1 else []
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", *two]
        # a session of its own: Ctrl-C comes here first, and ends pytest, its workers and kernels
        done = await asyncio.create_subprocess_exec(
            *command,
            *map(str, group),
            cwd=ROOT,
            env=environment(folder),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        return await done.wait()

    with household() as folder:
        for group in groups(paths, together):
            try:
                code = run_stoppable(partial(one, group), folder)
            except Stopped:
                print()  # pytest was in the middle of a line
                raise
            if code:
                return code
    return 0


def refresh(paths: list[Path], together=()) -> None:
    """Execute every notebook with its own defaults and put the canonical results in place, all or
    none; then the generated blocks of README and data sheet.
    """
    from . import report  # reads tables with pandas; the chain itself does not need it

    targets = run(load_profile("tiny"), paths, {}, together)
    fresh = [canonical(read(target)) for target in targets]
    report.publish("tiny")
    for path, book in zip(paths, fresh, strict=True):
        save(book, path)
    report.write_pages()


def notebooks(paths) -> list[Path]:
    """Notebooks named on a command line, as absolute paths; one that is none is an error."""
    paths = [Path(path).absolute() for path in paths]
    for path in paths:
        read(path)
    return paths
