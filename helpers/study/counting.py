"""Counts on disk: shards filled once, by any number of processes."""

import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm import tqdm

from ..capture.counts import Shards
from ..capture.gguf_files import one_line
from ..paths import ROOT
from ..record import UserError, versions
from .reading import COUNTED

VARIANTS = ("base", "tuned", "twin")  # and "twin-1", "twin-2", ...
POSITIONS = COUNTED
FORMAT = 3  # to be raised when a count changes its meaning: older counts are refused
TWIN = 2  # to be raised when random twins are made otherwise: counts of the former are refused
COUNTING = (
    "torch",
    "transformers",
    "tokenizers",
)  # their versions decide a count, the others' are only noted
COMMAND = f"{__package__.partition('.')[0]}.run"  # python -m: what each of several processes runs
SHARD = 128  # instructions in one file on disk


def twin_names(number: int) -> list[str]:
    """The variants "twin", "twin-1", ...: `number` models of random weights, seeds in a row."""
    return ["twin", *(f"twin-{n}" for n in range(1, number))][:number]


def twin_seed(variant: str, seed: int) -> int | None:
    """The seed of a twin's weights, counted from `seed` on; None for the models themselves."""
    return seed + int(variant.partition("-")[2] or 0) if variant.startswith("twin") else None


def check_names(variant: str, positions: str = "prompt") -> None:
    """Raise UserError for a variant or positions that there are no counts of."""
    for name, value, known in (("variant", variant, VARIANTS), ("positions", positions, POSITIONS)):
        if value not in known and not (known is VARIANTS and re.fullmatch(r"twin-[1-9]\d*", value)):
            raise UserError(f"{name} is {value!r}, expected one of {', '.join(known)}.")


def fill(shards: Shards, read, label: str) -> None:
    """Count what is missing of `shards`, this process its share of it; done when all are.

    read(k, bar) -> (counts, what they were made with) of the k-th shard, `bar` moved by each of its
    instructions. A shard's record keeps the latter under `found`.
    """
    rank, world, wait = processes()
    if mine := shards.missing(range(rank, len(shards), world)):
        total = sum(len(shards.rows(k)) for k in mine)
        with tqdm(total=total, desc=label, unit=" instructions", delay=2, leave=False) as bar:
            shards.fill(lambda k: read(k, bar), mine)
    wait()
    if rank == 0:
        shards.finish()
    wait()


def made_with(model) -> dict:
    """What a model's counts were made with, beside their settings."""
    return {
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "made_with": versions(),
    }


def processes():
    """(rank, processes, wait for all): what `accelerate launch` or torchrun set up, or this
    process alone. Raises UserError where WORLD_SIZE says other than what comes about.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() == "1":
        return 0, 1, lambda: None
    try:
        world = int(size)
        state = PartialState(
            cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)
        )  # the others may take long
        if state.num_processes != world:
            raise ValueError(f"{state.num_processes} came together")
    except (ValueError, RuntimeError, AttributeError) as error:  # the last at a second try
        raise UserError(
            f"WORLD_SIZE is {size[:80]!a}, but there are no such processes to share the work "
            f"({one_line(error)}). Unset it, or start with torchrun or `accelerate launch`."
        ) from error
    return state.process_index, state.num_processes, state.wait_for_everyone


def launch(job: dict, number: int) -> None:
    """Run `count --job` in `number` processes under torchrun; this one waits. `job` is JSON.

    Not `accelerate launch`: without GPUs and MPI that starts one process, whatever the number.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}"]
        free = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        done = subprocess.run(
            [*run, *free, "-m", COMMAND, "count", "--job", str(path)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
    if done.returncode:
        raise UserError(
            f"{number} capture processes ended with exit code {done.returncode}; their messages "
            "stand above. Finished shards are kept: mend the cause and run again, or set "
            "processes: 1."
        )
