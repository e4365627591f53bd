"""The one command line: `python -m helpers.run COMMAND`; the Makefile's targets call it.

Exit codes: 0 done, 1 faults found in a data set, 2 a wrong command line, and 1 with one line of
text for bad input.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers.utils import logging

from ..config import load_profile
from ..hexainst import human, schema
from ..hexainst.corpus import folds
from ..paths import NOTEBOOKS, results_dir, short
from ..record import UserError, sha256
from ..study import counting, grid
from ..tinyworld import recipe, train, trajectory
from . import chain, plan


def run_chain(options) -> int:
    """Run the chain headless; results in data/results/PROFILE."""
    profile = load_profile(options.profile)
    given = {name: yaml.safe_load(value) for name, value in options.parameters}
    chain.run(
        profile,
        chain.notebooks(options.notebooks),
        {"profile": profile.name} | given,
        options.together,
    )
    return 0


def run_refresh(options) -> int:
    """Execute the committed notebooks in place and fill the generated blocks of README and data
    sheets.
    """
    chain.refresh(chain.notebooks(options.notebooks), options.together)
    return 0


def run_plan(options) -> int:
    """What a profile will cost, from its configurations alone."""
    print(plan.plan(load_profile(options.profile)).T.to_string(float_format="{:,.2f}".format))
    return 0


def run_count(options) -> int:
    """A profile's counts; under `accelerate launch` its shards are dealt out to the processes."""
    if options.job:
        profile, rows, todo = counting.read_job(options.job)
    else:
        profile = replace(load_profile(options.profile), processes=1)
        rows = schema.load_hexainst(dataset=profile.dataset)
        todo = [
            (p, v, at) for p in profile.pairs for v in options.variants for at in options.positions
        ]
    torch.set_num_threads(profile.threads)
    for pair, variant, positions in todo:
        shards = counting.capture_shards(profile, pair, variant, positions, rows)
        print(f"{pair.name} {variant} {positions}: {shards.total} instructions in {shards.folder}")
    return 0


def run_grid(options) -> int:
    """Compute what is missing of a profile's grid of ablations; when all is there, write its
    tables.
    """
    profile = load_profile(options.profile)
    torch.set_num_threads(profile.threads)
    rows = schema.load_hexainst(dataset=profile.dataset)
    rows = rows.assign(fold=folds(rows))
    found = grid.cells(
        profile,
        rows,
        pairs=options.pairs,
        compute_missing=not options.finished,
        say=lambda cell: print(cell, flush=True),
    )
    if options.pairs is None:
        print(*grid.write(profile, rows, found), sep="\n")
    return 0


def run_train(options) -> int:
    """Train a tiny pair from nothing, or only write the model card's table anew."""
    if not options.pair and not options.card:
        raise UserError("train: name a --pair, or --card.")
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.pair:
        train.train(options.pair, options.seed, out=options.out)
    if not options.out:
        train.write_card()
    return 0


def run_trajectory(options) -> int:
    """Tune a tiny base again with checkpoints kept and measured; writes data/trajectory."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    name, profile = f"{options.pair}-{options.regime}-s{options.seed}", load_profile("tiny")
    rows = schema.load_hexainst(dataset=profile.dataset)
    pair = next(p for p in profile.pairs if p.name == options.pair)
    folder = results_dir("tiny") / "trajectory" / name
    trajectory.train(options.pair, options.regime, options.seed, folder)
    trajectory.write(
        name, *trajectory.measure(profile, pair, rows, folder), rows, trajectory.FOLDER
    )
    return 0


def run_human(options) -> int:
    """Fetch the human half's sources and build data/hexainst/human.jsonl."""
    path = human.build(local=options.local, run_code=options.run_code)
    print(f"{short(path)}: {len(path.read_text('utf-8').splitlines())} rows, sha256 {sha256(path)}")
    return 0


def run_validate(options) -> int:
    """Print every fault of a file of rows with its line number."""
    rows, faults = schema.validate(options.file, options.part, options.run_code)
    for number, fault in faults:
        print(f"{options.file}:{number}: {fault}")
    for remark in [] if faults else schema.remarks(rows):
        print(f"{options.file}: {remark}")
    note = "" if options.run_code else "; no CODE reference was executed"
    print(f"{len(rows)} rows read, {len(faults)} faults{note}")
    return 1 if faults else 0


def run_export(options) -> int:
    """Write HexaInst's AI half as Parquet with its data card."""
    print("\n".join(map(short, schema.export(options.folder))))
    return 0


def command_line() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.run", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function):
        added = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        return added.add_argument

    for name, function in (("chain", run_chain), ("refresh", run_refresh)):
        option = command(name, function)
        option("notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
        option(
            "--together",
            nargs="*",
            default=[],
            metavar="NAME",
            help="notebooks that may run side by side",
        )
        if name == "chain":
            option("--profile", default="tiny")
            option(
                "-p",
                dest="parameters",
                nargs=2,
                action="append",
                default=[],
                metavar=("NAME", "VALUE"),
            )
    command("plan", run_plan)("--profile", default="tiny")
    option = command("count", run_count)
    option("--profile", default="tiny", help="a name in notebooks/profiles")
    option("--job", help=argparse.SUPPRESS)
    option("--variants", nargs="+", default=["base", "tuned"])
    option("--positions", nargs="+", default=["prompt", "response"], choices=counting.POSITIONS)
    option = command("grid", run_grid)
    option("--profile", required=True)
    option(
        "--pairs", nargs="+", help="only these, e.g. to share the work among processes; no table"
    )
    option(
        "--finished", action="store_true", help="compute nothing, write the table of what is there"
    )
    option = command("train", run_train)
    option("--pair", choices=recipe.PAIRS)
    option("--seed", type=int, default=0)
    option("--out", help="folder for base/ and tuned/ (default: data/models/<pair>[-s<seed>])")
    option("--card", action="store_true", help="only write the table of data/models/README.md anew")
    option = command("trajectory", run_trajectory)
    option("--pair", choices=recipe.PAIRS, required=True)
    option("--regime", choices=trajectory.REGIMES, default="full")
    option("--seed", type=int, default=0)
    option = command("human", run_human)
    option("--local", help="folder that holds copies of the source files (for work offline)")
    option(
        "--run-code",
        action="store_true",
        help="execute the CODE references in the sandbox as a check",
    )
    option = command("validate", run_validate)
    option("file")
    option("--part", action="store_true", help="the file holds some categories only")
    option("--run-code", action="store_true", help="also execute the CODE references (sandboxed)")
    command("export", run_export)("folder")
    return parser


def main(argv=None) -> int:
    """Run one command; bad input ends in one line on stderr and exit code 1."""
    options = command_line().parse_args(argv)
    try:
        return options.function(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
