"""One notebook: read, checked against its parameters, executed by a kernel of this Python."""

import base64
import logging
import os
import signal
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbval.plugin import coalesce_streams
from papermill import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from ..capture.budget import LEDGER
from ..paths import NOTEBOOKS, ROOT, short
from ..plots.style import few_colours
from ..record import UserError, atomic
from .progress import Progress
from .stopping import kernel_files

PYTHON = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
NOT_A_NOTEBOOK = (  # what nbformat raises on anything else
    ValueError,
    nbformat.ValidationError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
)
INJECTED = "injected-parameters"
QUIET = logging.getLogger("sparcom.kernels")  # what nbclient logs, our errors say
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False


def environment(folder: Path) -> dict[str, str]:
    """What a kernel finds: this repository's helpers first, whichever is installed, and the run's
    own folder for temporary files, which goes when the run does.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if folder.is_relative_to(tempfile.gettempdir()):  # else the user's own was too long a name
        found["TMPDIR"] = str(folder)
    return found


def read(path: Path):
    """A notebook file, checked whole; one that is none, or not in Python, is one clear error."""
    try:
        book = nbformat.reads(path.read_text("utf-8"), as_version=4)
        nbformat.validate(book)
    except FileNotFoundError as error:
        raise UserError(f"{short(path)} does not exist.") from error
    except OSError as error:
        raise UserError(f"{short(path)} cannot be read: {error.strerror}.") from error
    except NOT_A_NOTEBOOK as error:
        raise UserError(
            f"{short(path)} is no notebook ({str(error).strip()[:60]!r}...). Expected a file "
            "that Jupyter wrote (.ipynb, format 4)."
        ) from error
    language = book.metadata.get("kernelspec", {}).get("language") or "python"
    if language != "python":
        raise UserError(f"{short(path)} is written in {language}; the chain runs Python only.")
    book.metadata |= nbformat.from_dict(PYTHON)
    return book


def with_parameters(path: Path, parameters: dict):
    """The notebook with a cell that sets `parameters`; one that it does not declare is refused
    (papermill itself only logs a warning).
    """
    book = read(path)
    known = inspect_notebook(book)
    for name in parameters:
        if name not in known:
            raise UserError(
                f"{short(path)} has no parameter {name!r}. "
                f"Its parameters: {', '.join(known) or 'none'}."
            )
    if not parameters:
        return book
    book = load_notebook_node(book)  # with the metadata that papermill expects
    return parameterize_notebook(book, parameters, kernel_name="python3", language="python")


class Client(NotebookClient):
    """nbclient's, but Ctrl-C is the chain's to hear, and stderr is also written to a log."""

    @asynccontextmanager
    async def async_setup_kernel(self, **streams):
        """The kernel for one notebook, gone at the end."""
        await self.async_start_new_kernel(**streams)
        try:
            await self.async_start_new_kernel_client()
            yield
        finally:
            if self.km is not None:
                await self._async_cleanup_kernel()

    def process_message(self, message, cell, cell_index):
        """Pass stderr on as it comes."""
        if message["msg_type"] == "stream" and message["content"]["name"] == "stderr":
            self.on_stderr(message["content"]["text"])
        return super().process_message(message, cell, cell_index)


def numbers(book) -> dict[int, int]:
    """Index of each code cell -> its number as the page shows it; the cell that sets parameters
    has none.
    """
    code = [
        index
        for index, cell in enumerate(book.cells)
        if cell.cell_type == "code"
        and cell.source.strip()
        and INJECTED not in cell.metadata.get("tags", ())
    ]
    return {index: n for n, index in enumerate(code, 1)}


def save(book, path: Path) -> None:
    """Write a notebook, whole or not at all; half a character becomes its JSON escape."""
    with atomic(path) as draft:
        draft.write_text(nbformat.writes(book) + "\n", "utf-8", errors="backslashreplace")


def unexecuted(book):
    """The notebook without outputs: those of cells that never ran would be taken for the run's."""
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return book


class Execution:
    """One notebook on its way into `target`.

    `target` is replaced only when every cell ran; a failed run is kept beside it as
    <name>.failed.ipynb. Stderr of cells and kernel goes to <name>.log, what its models read to
    <name>.tokens.jsonl (see capture.budget).
    """

    def __init__(self, path: Path, target: Path, parameters: dict):
        self.path, self.target, self.name = path, target, path.stem
        self.failed, self.log = target.with_suffix(".failed.ipynb"), target.with_suffix(".log")
        self.ledger = target.with_suffix(".tokens.jsonl").absolute()
        self.book, self.at = unexecuted(with_parameters(path, parameters)), 0
        self.client, self.interrupted = None, False

    async def run(self, folder: Path, progress: Progress) -> float:
        """Execute every cell in a kernel whose files lie in `folder` (see `household`); seconds."""
        start = time.perf_counter()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.failed.unlink(missing_ok=True)
            self.ledger.unlink(missing_ok=True)
            with open(self.log, "wb", buffering=0) as log:
                progress.start(self.name, len(numbers(self.book)), self.log)
                await self._cells(folder, progress, log)
            save(self.book, self.target)
            progress.end(self.name, "done")
        except OSError as error:
            raise UserError(
                f"{short(self.path)}: cannot write in {short(self.target.parent)}: "
                f"{error.strerror or error}. Free the disk or make the folder writable, then run "
                "again; what was finished is kept."
            ) from error
        finally:
            progress.end(self.name, "stopped")
        return time.perf_counter() - start

    async def _cells(self, folder, progress, log) -> None:
        numbered = numbers(self.book)

        def starts(cell, cell_index):
            self.at = numbered.get(cell_index, self.at)
            progress.cell(self.name, self.at)

        def stderr(text):
            log.write(text.encode("utf-8", "replace"))
            progress.bar(self.name, text)

        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this Python's own, no other
            log=QUIET,
            **kernel_files(folder),
        )
        self.client = Client(
            self.book,
            km=kernel,
            startup_timeout=120,
            resources={"metadata": {"path": str(NOTEBOOKS)}},
            on_cell_start=starts,
            log=QUIET,
        )
        self.client.on_stderr = stderr
        env = environment(folder) | {LEDGER: str(self.ledger)}
        try:
            await self.client.async_execute(env=env, stdout=log, stderr=log)
        except CellExecutionError as error:
            if not self.interrupted:
                save(self.book, self.failed)
            raise UserError(
                f"{short(self.path)}, cell {self.at}: {error.ename}: {error.evalue} "
                f"[the run so far, for reading only: {short(self.failed)}]"
            ) from error
        except DeadKernelError as error:
            raise UserError(
                f"{short(self.path)}, cell {self.at}: its kernel died, most likely for lack of "
                "memory. Lower batch_tokens in the profile, then run again; finished counts are "
                f"kept. Log: {short(self.log)}"
            ) from error
        except RuntimeError as error:
            raise UserError(
                f"{short(self.path)}: its kernel did not start: {error}. Log: {short(self.log)}"
            ) from error

    def interrupt(self) -> None:
        """Ctrl-C for its kernel, so that the cell's `finally` blocks tidy up; then no farewell."""
        self.interrupted = True
        if self.client is not None:
            self.client.shutdown_kernel = "immediate"
            kernel = self.client.km
            process = kernel and kernel.provisioner and kernel.provisioner.process
            if process and process.poll() is None:
                process.send_signal(signal.SIGINT)


def canonical(book):
    """An executed notebook without what changes from run to run: timings, stderr, papermill
    traces, cuts in stdout; its pictures in few colours.
    """
    book.metadata = nbformat.from_dict(PYTHON)
    for cell in book.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        if cell.cell_type == "code":
            cell.outputs = coalesce_streams([o for o in cell.outputs if o.get("name") != "stderr"])
            for output in cell.outputs:
                _shrink(output.get("data", {}))
    return book


def _shrink(data) -> None:
    if "image/png" in data:
        small = few_colours(base64.b64decode(data["image/png"]))
        data["image/png"] = base64.b64encode(small).decode()
