"""One Ctrl-C ends a command and everything it started; what a killed run left, the next clears.

A run has a folder of its own in the temporary folder. Its path stands in the environment as MARK,
so every process that the run starts, however deep and in whichever session, carries it: kernels,
`accelerate` workers, pytest's workers. A lock in the folder is held for as long as the run lives:
a folder whose lock is free is a dead run's.
"""

import asyncio
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

MARK = "SPARCOM_RUN"
GRACE = 0.5  # seconds an interrupted cell has to remove its drafts
LONGEST = 55  # bytes of a temporary folder's name: a socket's whole name may have 103
SIGNALS = [signal.SIGINT, signal.SIGTERM]
HANGUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []


class Stopped(KeyboardInterrupt):
    """A signal asked for the end; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and a closed terminal (unless under nohup) call `handler`."""
    former = {}
    if threading.current_thread() is threading.main_thread():
        ignored = [number for number in HANGUP if signal.getsignal(number) == signal.SIG_IGN]
        numbers = [number for number in SIGNALS + HANGUP if number not in ignored]
        former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, was in former.items():
            signal.signal(number, was)


def stop(number: int, _) -> None:
    """The handler that raises Stopped."""
    raise Stopped(number)


@contextmanager
def household() -> Iterator[Path]:
    """A run's own folder. At the end, whatever was started inside is killed, the folder removed.

    Clears dead runs first: their processes, sockets and connection files. A household within
    another (a pytest worker's) lies in the outer one's folder and ends with it.
    """
    outer = os.environ.get(MARK)
    if outer and not os.path.isdir(outer):
        outer = None
    if not outer:
        clear_dead_runs()
    folder = Path(tempfile.mkdtemp(prefix="run-" if outer else "sparcom-", dir=outer or _short()))
    lock = FileLock(folder / "starting")
    try:
        lock.acquire()
        os.rename(folder / "starting", folder / "lock")  # seen only once it is held
        os.environ[MARK] = str(folder)
        yield folder
    finally:
        kill_family(folder)
        os.environ.pop(MARK)
        if outer:
            os.environ[MARK] = outer
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _short() -> str:
    """A writable temporary folder whose name leaves room for a socket's."""
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(folder)) <= LONGEST and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return tempfile.gettempdir()


def clear_dead_runs() -> None:
    """Remove what runs that were killed left: only folders of ours whose lock nobody holds."""
    for path in Path(_short()).glob("sparcom-*/lock"):
        with suppress(OSError, Timeout), FileLock(path, timeout=0):
            kill_family(path.parent)
            shutil.rmtree(path.parent, ignore_errors=True)


def family(folder) -> list[psutil.Process]:
    """The processes started by the run of this folder, and their descendants; not this one."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if Path(process.environ().get(MARK, "")).is_relative_to(folder):
                found |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    found.pop(os.getpid(), None)
    return list(found.values())


def kill_family(folder) -> None:
    """SIGKILL to the whole family, until none is left (one may be born meanwhile)."""
    for _ in range(5):
        if not (members := family(folder)):
            return
        for process in members:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(members, timeout=0.5)


def kernel_files(folder) -> dict[str, str]:
    """Settings for a kernel that talks through files of its own in a run's folder: a TCP port
    found free may be taken a moment later, by another kernel that starts beside it.

    Only the connection file where sockets cannot be files (Windows, a name that is too long).
    """
    own = Path(tempfile.mkdtemp(prefix="k-", dir=folder))
    settings = {"connection_file": str(own / "kernel.json")}
    if os.name == "posix" and len(os.fsencode(own)) <= LONGEST + 41:
        settings |= {"transport": "ipc", "ip": str(own / "s")}
    return settings


def run_stoppable(
    work: Callable[[], Awaitable], folder: Path, interrupt: Callable[[], None] = lambda: None
):
    """The result of `work()`, run by an event loop. On a signal: `interrupt()`, a moment to tidy
    up, then the run's whole family is killed and Stopped raised.
    """
    heard = []

    async def watched():
        task = asyncio.ensure_future(work())
        while not (heard or task.done()):
            await asyncio.wait({task}, timeout=0.1)
        if not heard:
            return task.result()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # what nbclient leaves
        interrupt()
        await asyncio.wait({task}, timeout=GRACE)
        task.cancel()
        kill_family(folder)
        await asyncio.wait({task}, timeout=GRACE)
        raise Stopped(heard[0])

    with handled(lambda number, _: heard.append(number)):
        return asyncio.run(watched())
