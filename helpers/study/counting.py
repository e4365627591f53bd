"""A profile's counts on disk: captured once, by any number of processes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..capture.count import count_encoded, flips
from ..capture.counts import Counts, Shards
from ..capture.loading import fingerprint, load_model, locate, random_twin
from ..capture.tokens import Encoded, encode
from ..config import Pair, Profile
from ..hexainst.corpus import text
from ..paths import ROOT, counts_dir
from ..record import UserError, digest, versions
from .answers import continuations

VARIANTS = ("base", "tuned", "twin")  # and "twin-1", "twin-2", ...
FORMAT = 2  # to be raised when a count changes its meaning: older counts are refused
COUNTING = (
    "torch",
    "transformers",
    "tokenizers",
)  # their versions decide a count, the others' are only noted
POSITIONS = ("prompt", "response", "generated", "prompt-even", "prompt-odd")
COMMAND = f"{__package__.partition('.')[0]}.run"  # python -m: what each of several processes runs
SHARD = 128  # instructions in one file on disk


def twin_names(number: int) -> list[str]:
    """The variants "twin", "twin-1", ...: `number` models of random weights, from seeds in a row."""
    return ["twin", *(f"twin-{n}" for n in range(1, number))][:number]


def capture(
    profile: Profile, pair: Pair, variant: str, positions: str, rows: pd.DataFrame, loaded=None
) -> Counts:
    """Counts of one model of a pair on the rows of HexaInst, from disk if they are there, else
    computed and kept.

    variant    "base", "tuned", or a twin, the base's architecture with random weights: "twin" from the profile's seed,
               "twin-1", "twin-2", ... from the ones after it
    positions  "prompt": the instruction's own tokens; "prompt-even", "prompt-odd": every other one of them (for a noise
               floor between disjoint tokens of one model); "response": the reference's, read after the prompt;
               "generated": the model's own greedy continuation's (a row may have none: tokens 0)
    loaded     (model, tokenizer), or a function that gives them, called only if something is missing
    Files: data/results/<profile>/<pair>/<variant>/<positions>/. Raises RecordMismatch if those in place were made
    under other settings, from other weights or other rows. (Paper, sec. counting; disk and processes: ours.)
    """
    return capture_shards(profile, pair, variant, positions, rows, loaded).load()


def capture_shards(profile, pair, variant, positions, rows, loaded=None) -> Shards:
    """As `capture`, for counts larger than memory: the finished shards, to be read one at a time."""
    shards = Shards(
        counts_dir(profile.name, pair.name, variant, positions),
        settings(profile, pair, variant, positions, rows),
        len(rows),
        SHARD,
    )
    rank, world, wait = _processes()
    if not shards.finished():
        if world == 1 and profile.processes > 1 and (loaded is None or callable(loaded)):
            _launch(profile, pair, variant, positions, rows)
        else:
            if mine := shards.missing(range(rank, len(shards), world)):
                loaded = (
                    loaded()
                    if callable(loaded)
                    else loaded or open_model(pair, variant, profile.seed)
                )
                _fill(shards, mine, profile, pair, variant, positions, rows, loaded)
            wait()
            if rank == 0:
                shards.finish()
            wait()
    return shards


def settings(profile, pair, variant, positions, rows) -> dict:
    """All that decides a count, as the shards' record keeps it; no model is loaded for it."""
    for name, value, known in (("variant", variant, VARIANTS), ("positions", positions, POSITIONS)):
        if value not in known and not (known is VARIANTS and re.fullmatch(r"twin-[1-9]\d*", value)):
            raise UserError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if rows.empty:
        raise UserError(f"profile {profile.name}: there are no rows to count. Check its data set.")
    ref, revision = (
        (pair.tuned, pair.tuned_revision) if variant == "tuned" else (pair.base, pair.base_revision)
    )
    folder, commit = locate(ref, revision)
    data = [
        [text(row), row["reference"] if positions == "response" else ""]
        for row in rows.to_dict("records")
    ]
    return {
        "profile": profile.name,
        "pair": pair.name,
        "variant": variant,
        "positions": positions,
        "ref": ref,
        "commit": commit,
        "weights": fingerprint(folder),
        "seed": _twin_seed(variant, profile.seed),
        "dtype": pair.dtype,
        "device_map": pair.device_map,
        "template": profile.template,
        "data": digest(data),
        "versions": {name: versions()[name] for name in COUNTING},
        "batch_size": profile.batch_size,
        "format": FORMAT,
        "max_new_tokens": profile.max_new_tokens if positions == "generated" else None,
    }


def _twin_seed(variant: str, seed: int) -> int | None:
    return seed + int(variant.partition("-")[2] or 0) if variant.startswith("twin") else None


def open_model(pair: Pair, variant: str, seed: int = 0):
    """(model, tokenizer) of one variant of a pair (see `capture`); `seed` is that of the first
    twin's weights.
    """
    ref, revision = (
        (pair.tuned, pair.tuned_revision) if variant == "tuned" else (pair.base, pair.base_revision)
    )
    alone = not torch.cuda.is_available() or _processes()[1] == 1
    model, tokenizer = load_model(
        ref,
        dtype=pair.dtype,
        revision=revision,
        device_map=pair.device_map if alone else {"": PartialState().device},
    )
    own = _twin_seed(variant, seed)
    return (model if own is None else random_twin(model, own, free=True)), tokenizer


def _fill(shards, mine, profile, pair, variant, positions, rows, loaded) -> None:
    torch.set_num_threads(profile.threads)
    model, tokenizer = loaded
    table = rows.to_dict("records")
    with tqdm(
        total=sum(len(shards.rows(k)) for k in mine),
        delay=2,
        leave=False,
        unit=" instructions",
        desc=f"{pair.name} {variant} {positions}",
    ) as bar:
        for k in mine:
            part = [table[i] for i in shards.rows(k)]
            texts, responses = [text(row) for row in part], None
            if positions == "response":
                responses = [row["reference"] for row in part]
            elif positions == "generated":
                responses = continuations(
                    model,
                    encode(tokenizer, texts, template=profile.template),
                    max_new_tokens=profile.max_new_tokens,
                    batch_size=profile.batch_size,
                )
            encoded = encode(tokenizer, texts, template=profile.template, responses=responses)
            if positions.startswith("prompt-"):
                encoded = [_every_other(e, first=positions == "prompt-odd") for e in encoded]
            counts = count_encoded(model, encoded, profile.batch_size, bar)
            found = {
                "device": model.device.type,
                "attention": model.config._attn_implementation,
                "made_with": versions(),
            }
            if k == 0:
                found["batching"] = flips(model, encoded[:4], counts)
            shards.write(k, counts, found)


def _every_other(encoded: Encoded, first: int) -> Encoded:
    """The same sequence with only the 1st, 3rd, ... (first = 0) or 2nd, 4th, ... (1) of its
    counted tokens counted.
    """
    kept = set(np.flatnonzero(encoded.counted)[first::2].tolist())
    if not kept:
        raise UserError(
            "an instruction has a single counted token and cannot be split in two. Remove the row."
        )
    return Encoded(encoded.ids, tuple(i in kept for i in range(len(encoded.ids))))


def _processes():
    """(rank, processes, wait for all): what `accelerate launch` or torchrun set up, or this
    process alone.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda: None
    state = PartialState(
        cpu=not torch.cuda.is_available(), timeout=timedelta(days=30)
    )  # the others may take long
    return state.process_index, state.num_processes, state.wait_for_everyone


def _launch(profile, pair, variant, positions, rows) -> None:
    """The same capture in `profile.processes` processes under accelerate; this one waits."""
    job = {
        "profile": dataclasses.asdict(profile),
        "pair": pair.name,
        "variant": variant,
        "positions": positions,
        "rows": rows.to_dict("records"),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--num_processes",
                str(profile.processes),
                "--num_machines",
                "1",
                "--mixed_precision",
                "no",
                "--dynamo_backend",
                "no",
                "--main_process_port",
                "0",
                *([] if torch.cuda.is_available() else ["--cpu"]),
                "-m",
                COMMAND,
                "count",
                "--job",
                str(path),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
    if done.returncode:
        raise UserError(
            f"{profile.processes} capture processes ended with exit code {done.returncode}; their messages "
            "stand above. Finished shards are kept: mend the cause and run again, or set processes: 1."
        )


def read_job(path) -> tuple[Profile, pd.DataFrame, list]:
    """What `_launch` asks of each process: (profile, rows, [(pair, variant, positions)])."""
    job = json.loads(Path(path).read_text())
    values = job["profile"] | {
        "pairs": tuple(Pair(**p) for p in job["profile"]["pairs"]),
        "processes": 1,
    }
    profile = Profile(**values)
    todo = [(p, job["variant"], job["positions"]) for p in profile.pairs if p.name == job["pair"]]
    return profile, pd.DataFrame(job["rows"]), todo
