"""Capture: counts of any causal language model on any texts; a profile's counts on disk, by any number of processes."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from helpers.checkpoints import fingerprint, locate
from helpers.config import Pair, Profile, load_profile
from helpers.corpus import text
from helpers.counting import Counter, watching
from helpers.hexainst import load_hexainst
from helpers.models import Encoded, batches, check_tokenizer, encode, generate, load_model, random_twin
from helpers.paths import ROOT, counts_dir
from helpers.record import UserError, digest, versions
from helpers.selfcheck import self_check
from helpers.shards import Counts, Shards

VARIANTS = ("base", "tuned", "twin")                                          # and "twin-1", "twin-2", ...
FORMAT = 2                            # to be raised when a count changes its meaning: older counts are refused
COUNTING = ("torch", "transformers", "tokenizers")      # their versions decide a count, the others' are only noted
POSITIONS = ("prompt", "response", "generated", "prompt-even", "prompt-odd")
SHARD = 128                                                                   # instructions in one file on disk
_checked: WeakSet = WeakSet()


def twin_names(number: int) -> list[str]:
    """The variants "twin", "twin-1", ...: `number` models of random weights, from seeds in a row."""
    return ["twin", *(f"twin-{n}" for n in range(1, number))][:number]


@contextmanager
def count_activations(model, kind=Counter):
    """Count while the context is open: `counter(input_ids, attention_mask, count_mask)` is one forward pass and
    returns the Counts of that batch. The first time a model is seen, `self_check` proves that it is read exactly.

    The hooks are taken off whatever happens. Raises UserError for a model, ids or masks that cannot be counted,
    RuntimeError if a site did not see each token once. (Paper, sec. counting.)

    >>> with count_activations(model) as counter:                                     # doctest: +SKIP
    ...     counts = counter(tokens["input_ids"], tokens["attention_mask"])
    """
    if model not in _checked:
        self_check(model)
        _checked.add(model)
    with watching(model, kind) as counter:
        yield counter


def count(model, tokenizer, texts, batch_size: int = 32, *, template: str = "{instruction}", responses=None) -> Counts:
    """Counts of each text's own tokens, or of its response's tokens where responses are given (see `encode`).

    >>> counts = count(model, tokenizer, ["Add 12 and 7.", "Name a fish."])           # doctest: +SKIP
    >>> p = counts.neurons["dense"] / counts.tokens[:, None, None]    # [I, L, N]     # doctest: +SKIP
    """
    check_tokenizer(tokenizer, model)
    return count_encoded(model, encode(tokenizer, list(texts), template=template, responses=responses), batch_size)


def count_encoded(model, encoded, batch_size: int = 32, progress=None) -> Counts:
    """Counts of encoded sequences, in their order; `progress` is a tqdm bar to move instead of one of its own."""
    parts, order = [], []
    bar = progress or tqdm(total=len(encoded), desc="counting", unit=" instructions", delay=2, leave=False)
    with count_activations(model) as counter:
        for batch in batches(encoded, batch_size):
            parts.append(counter(batch.input_ids, batch.attention_mask, batch.count_mask))
            order.append(batch.rows)
            bar.update(len(batch.rows))
    if progress is None:
        bar.close()
    return Counts.join(parts, order)


def capture(profile: Profile, pair: Pair, variant: str, positions: str, rows: pd.DataFrame, loaded=None) -> Counts:
    """Counts of one model of a pair on the rows of HexaInst, from disk if they are there, else computed and kept.

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
    shards = Shards(counts_dir(profile.name, pair.name, variant, positions),
                    settings(profile, pair, variant, positions, rows), len(rows), SHARD)
    rank, world, wait = _processes()
    if not shards.finished():
        if world == 1 and profile.processes > 1 and (loaded is None or callable(loaded)):
            _launch(profile, pair, variant, positions, rows)
        else:
            if mine := shards.missing(range(rank, len(shards), world)):
                loaded = loaded() if callable(loaded) else loaded or open_model(pair, variant, profile.seed)
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
    ref, revision = (pair.tuned, pair.tuned_revision) if variant == "tuned" else (pair.base, pair.base_revision)
    folder, commit = locate(ref, revision)
    data = [[text(row), row["reference"] if positions == "response" else ""] for row in rows.to_dict("records")]
    return {"profile": profile.name, "pair": pair.name, "variant": variant, "positions": positions, "ref": ref,
            "commit": commit, "weights": fingerprint(folder), "seed": _twin_seed(variant, profile.seed),
            "dtype": pair.dtype, "device_map": pair.device_map, "template": profile.template, "data": digest(data),
            "versions": {name: versions()[name] for name in COUNTING}, "batch_size": profile.batch_size,
            "format": FORMAT, "max_new_tokens": profile.max_new_tokens if positions == "generated" else None}


def _twin_seed(variant: str, seed: int) -> int | None:
    return seed + int(variant.partition("-")[2] or 0) if variant.startswith("twin") else None


def open_model(pair: Pair, variant: str, seed: int = 0):
    """(model, tokenizer) of one variant of a pair (see `capture`); `seed` is that of the first twin's weights."""
    ref, revision = (pair.tuned, pair.tuned_revision) if variant == "tuned" else (pair.base, pair.base_revision)
    alone = not torch.cuda.is_available() or _processes()[1] == 1
    model, tokenizer = load_model(ref, dtype=pair.dtype, revision=revision,
                                  device_map=pair.device_map if alone else {"": PartialState().device})
    own = _twin_seed(variant, seed)
    return (model if own is None else random_twin(model, own, free=True)), tokenizer


def _fill(shards, mine, profile, pair, variant, positions, rows, loaded) -> None:
    torch.set_num_threads(profile.threads)
    model, tokenizer = loaded
    table = rows.to_dict("records")
    with tqdm(total=sum(len(shards.rows(k)) for k in mine), delay=2, leave=False, unit=" instructions",
              desc=f"{pair.name} {variant} {positions}") as bar:
        for k in mine:
            part = [table[i] for i in shards.rows(k)]
            texts, responses = [text(row) for row in part], None
            if positions == "response":
                responses = [row["reference"] for row in part]
            elif positions == "generated":
                responses = generate(model, encode(tokenizer, texts, template=profile.template),
                                     max_new_tokens=profile.max_new_tokens, batch_size=profile.batch_size)
            encoded = encode(tokenizer, texts, template=profile.template, responses=responses)
            if positions.startswith("prompt-"):
                encoded = [_every_other(e, first=positions == "prompt-odd") for e in encoded]
            counts = count_encoded(model, encoded, profile.batch_size, bar)
            found = {"device": model.device.type, "attention": model.config._attn_implementation,
                     "made_with": versions()}
            if k == 0:
                found["batching"] = flips(model, encoded[:4], counts)
            shards.write(k, counts, found)


def _every_other(encoded: Encoded, first: int) -> Encoded:
    """The same sequence with only the 1st, 3rd, ... (first = 0) or 2nd, 4th, ... (1) of its counted tokens counted."""
    kept = set(np.flatnonzero(encoded.counted)[first::2].tolist())
    if not kept:
        raise UserError("an instruction has a single counted token and cannot be split in two. Remove the row.")
    return Encoded(encoded.ids, tuple(i in kept for i in range(len(encoded.ids))))


def flips(model, encoded, counts: Counts) -> dict[str, int]:
    """How many cells of the first instructions differ when each is read alone: rounding can move a gate across zero."""
    alone = count_encoded(model, encoded, batch_size=1).arrays()
    pairs = [(alone[name].astype(int), c[:len(encoded)].astype(int)) for name, c in counts.arrays().items()]
    return {"cells": sum(a.size for a, _ in pairs), "differ": sum(int((a != b).sum()) for a, b in pairs),
            "most": max(int(np.abs(a - b).max()) for a, b in pairs)}


def _processes():
    """(rank, processes, wait for all): what `accelerate launch` or torchrun set up, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda: None
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))    # the others may take long
    return state.process_index, state.num_processes, state.wait_for_everyone


def _launch(profile, pair, variant, positions, rows) -> None:
    """The same capture in `profile.processes` processes under accelerate; this one waits."""
    job = {"profile": dataclasses.asdict(profile), "pair": pair.name, "variant": variant, "positions": positions,
           "rows": rows.to_dict("records")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--num_processes",
                               str(profile.processes), "--num_machines", "1", "--mixed_precision", "no",
                               "--dynamo_backend", "no", "--main_process_port", "0",
                               *([] if torch.cuda.is_available() else ["--cpu"]),
                               "-m", "helpers.capture", "--job", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{profile.processes} capture processes ended with exit code {done.returncode}; their messages "
                        "stand above. Finished shards are kept: mend the cause and run again, or set processes: 1.")


def main(argv=None) -> int:
    """`accelerate launch -m helpers.capture --profile P`: a profile's counts, its shards dealt out to the processes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--profile", help="a name in notebooks/profiles")
    choice.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--variants", nargs="+", default=["base", "tuned"])
    parser.add_argument("--positions", nargs="+", default=["prompt", "response"], choices=POSITIONS)
    options = parser.parse_args(argv)
    try:
        if options.job:
            job = json.loads(Path(options.job).read_text())
            values = job["profile"] | {"pairs": tuple(Pair(**p) for p in job["profile"]["pairs"]), "processes": 1}
            profile, rows = Profile(**values), pd.DataFrame(job["rows"])
            todo = [(p, job["variant"], job["positions"]) for p in profile.pairs if p.name == job["pair"]]
        else:
            profile = dataclasses.replace(load_profile(options.profile), processes=1)
            rows = load_hexainst(dataset=profile.dataset)
            todo = [(p, v, where) for p in profile.pairs for v in options.variants for where in options.positions]
        torch.set_num_threads(profile.threads)
        for pair, variant, positions in todo:
            shards = capture_shards(profile, pair, variant, positions, rows)
            print(f"{pair.name} {variant} {positions}: {shards.total} instructions in {shards.folder}")
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
