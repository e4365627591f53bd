"""The one command line: `python -m helpers.run COMMAND`, installed `sparcom COMMAND`; the
Makefile's targets call it.

Exit codes: 0 done; 1 bad input, in one line on stderr, or faults found in a data set; 2 a wrong
command line; 130 after Ctrl-C, 143 after SIGTERM.
"""

import signal

if __name__ == "__main__":  # until `main` listens: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from ..config import Profile, load_profile, read_yaml, refuse_other
from ..paths import CLONE, COMMAND, NOTEBOOKS, ROOT, results_dir, short
from ..record import UserError
from .stopping import Stopped, handled, household, stop

# A command imports what it needs itself: `--help` and a wrong command line take no second.
COMMANDS: dict[str, tuple[Callable, list]] = {}


def option(*names, **settings):
    """An option, as argparse's add_argument takes it."""
    return names, settings


def command(name: str, *options):
    """Enter the function below as a command with these options; its docstring is the help."""

    def enter(function):
        COMMANDS[name] = (function, options)
        return function

    return enter


def one_of(where: str) -> Callable[[str], str]:
    """A type for an option whose values stand in `package.module:NAME`, read when it is used."""

    def choose(value: str) -> str:
        module, name = where.split(":")
        known = getattr(import_module(f"..{module}", __package__), name)
        if value not in known:
            raise argparse.ArgumentTypeError(
                f"invalid choice: {value!r} (choose from {', '.join(known)})"
            )
        return value

    return choose


def here(path: str) -> Path:
    """A type for an option that is a path: from the current folder, where a profile's are from the
    repository; `~` is the home.

    >>> here("mine.jsonl") == Path.cwd() / "mine.jsonl"
    True
    """
    if not path:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    return Path(os.path.abspath(os.path.expanduser(path)))


PROFILE = option("--profile", help="a name in notebooks/profiles (default: tiny)", default="tiny")
BOOKS = option(
    "notebooks",
    nargs="*",
    type=here,
    help="default: all",
    default=sorted(NOTEBOOKS.glob("*.ipynb")),
)
TOGETHER = option(
    "--together", nargs="*", default=[], metavar="NAME", help="those that may run side by side"
)
PAIR = one_of("tinyworld.recipe:PAIRS")
LOCAL = option(
    "--local", type=here, help="folder that holds copies of the source files (for work offline)"
)
SEED = option("--seed", type=int, default=0)


def values_of(given: list[tuple[str, str]]) -> dict:
    """`-p NAME VALUE` read as a profile's values are: {name: value}; a name that stands twice, and
    what a notebook cannot take as a literal, are refused.
    """
    values = {}
    for name, text in given:
        if name in values:
            raise UserError(f"-p {name} stands twice, the last as {text[:80]!r}. Give it once.")
        values[name] = read_yaml(text, f"-p {name}: {text[:80]!r}")
        if not isinstance(values[name], (type(None), bool, int, float, str, list)):
            raise UserError(
                f"-p {name}: {text[:80]!r} reads as {type(values[name]).__name__}; expected a "
                "number, a text, a list, true, false or null."
            )
    return values


@command(
    "chain",
    BOOKS,
    TOGETHER,
    option("--profile", help="a name in notebooks/profiles (default: tiny)"),
    option("-p", dest="given", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")),
)
def run_chain(options) -> int:
    """Run notebooks headless; results in data/results/PROFILE."""
    from . import chain

    values = values_of(options.given)
    name = options.profile or values.get("profile") or "tiny"
    if values.setdefault("profile", name) != name:
        raise UserError(f"--profile {name} and -p profile {values['profile']} differ. Name one.")
    known = Profile.__annotations__.keys() - {"name"}  # which no notebook takes
    settings = {k: v for k, v in values.items() if k in known}
    profile = load_profile(name, **settings)  # a bad value ends here, not in a notebook
    chain.run(profile, chain.notebooks(options.notebooks), values, options.together)
    return 0


@command("refresh", BOOKS, TOGETHER)
def run_refresh(options) -> int:
    """Execute the committed notebooks in place; fill the generated blocks of the pages."""
    from . import chain

    chain.refresh(chain.notebooks(options.notebooks), options.together)
    return 0


@command("publish", PROFILE)
def run_publish(options) -> int:
    """Copy a run's ledger and summary to data/published/PROFILE, and fill the README with them."""
    from . import report

    print(short(report.publish(options.profile)))
    print(short(report.write_plans()))
    report.write_pages()
    return 0


@command(
    "site",
    PROFILE,
    option(
        "--to",
        type=here,
        metavar="FOLDER",
        help="new, empty, or a former site (data/results/site)",
    ),
)
def run_site(options) -> int:
    """Write a static site of a profile's findings, figures, notebooks and atlas."""
    from . import site

    print(site.build(options.profile, options.to) / "index.html")
    return 0


@command("check", BOOKS, TOGETHER)
def run_check(options) -> int:
    """Compare the committed notebooks' outputs with fresh ones (strict nbval)."""
    from . import chain

    return chain.check(chain.notebooks(options.notebooks), options.together)


@command("plan", PROFILE)
def run_plan(options) -> int:
    """Print what a profile will cost, from its configurations alone."""
    from .chain import refuse_few_rows
    from .plan import plan

    profile = load_profile(options.profile)
    print(plan(profile).T.to_string(float_format="{:,.2f}".format))
    refuse_few_rows(profile)
    return 0


@command(
    "count",
    PROFILE,
    option("--job", type=here, help=argparse.SUPPRESS),
    option(
        "--variants", nargs="+", choices=("base", "tuned"), help="default: those that a pair has"
    ),
    option(
        "--positions",
        nargs="+",
        default=["prompt", "response"],
        type=one_of("study.counting:POSITIONS"),
    ),
)
def run_count(options) -> int:
    """A profile's counts; under `accelerate launch` its shards are dealt out to the processes."""
    from ..capture.budget import kept_in
    from ..study.study import Study, studies

    if options.job:
        todo = [_job(Study, options.job)]
    else:
        profile = replace(load_profile(options.profile), processes=1)
        todo = [
            (study, variant, positions)
            for study in studies(profile).values()
            for variant in options.variants or study.variants
            for positions in options.positions
        ]
        kept_in(results_dir(profile.name) / "count.tokens.jsonl")
    with household():
        for study, variant, positions in todo:
            shards = study.shards(variant, positions)
            where = f"{shards.total} instructions in {shards.folder}"
            print(f"{study.name} {variant} {positions}: {where}")
    return 0


def _job(study, path):
    try:
        return study.from_job(path)
    except (ValueError, TypeError, LookupError, StopIteration, RecursionError) as error:
        raise UserError(
            f"--job {path} is no job of ours ({type(error).__name__}): `processes` in a profile "
            "writes them. Take --job out and name a --profile."
        ) from error


@command(
    "grid",
    option("--profile", required=True),
    option("--pairs", nargs="+", help="only these, to share the work among processes; no table"),
    option("--finished", action="store_true", help="compute nothing, write what is there"),
    option("--headline", action="store_true", help="only the table by category, headline cells"),
)
def run_grid(options) -> int:
    """Compute what is missing of a profile's grid of ablations; once all is there, its tables.
    Under torchrun or `accelerate launch` its cells are dealt out to the processes.
    """
    from ..capture.budget import kept_in
    from ..study import counting, grid
    from ..study.study import studies

    profile = load_profile(options.profile)
    every = studies(profile)
    for name in options.pairs or ():
        refuse_other(name, every, "pair")
    kept_in(results_dir(profile.name) / "grid.tokens.jsonl")
    found = {}
    with household():
        for name in options.pairs or every:
            some = (grid.HEADLINE, [profile.epsilon]) if options.headline else (None, None)
            found |= grid.cells(every[name], *some, compute_missing=not options.finished)
            every[name].close()
    if counting.processes()[0]:
        return 0  # the first process writes
    if options.headline:
        print(grid.write_categories(every, found))
        return 0
    if options.pairs is None:
        print(*grid.write(every, found), sep="\n")
    return 0


@command("planted")
def run_planted(options) -> int:
    """The league of scores on models with planted neurons; writes data/grid/planted.csv."""
    import torch

    from ..study import planted

    torch.set_num_threads(1)
    planted.write(planted.league())
    print(short(planted.TABLE))
    return 0


@command(
    "atlas",
    PROFILE,
    option("--pair", help="only this one, beside those that are finished"),
    option("--score", default="contrast", type=one_of("config:SCORES")),
    option("--share", type=float, help="of the neurons in a set (default: the profile's epsilon)"),
)
def run_atlas(options) -> int:
    """Write a table of every neuron and expert that is in a category's set: frequencies, ranks,
    tokens, effects."""
    from ..study import atlas
    from ..study.study import studies

    profile = load_profile(options.profile)
    with household():
        paths = atlas.write(studies(profile), options.pair, options.score, options.share)
    print(*map(short, paths), sep="\n")
    return 0


@command(
    "train",
    option("--pair", type=PAIR),
    SEED,
    option(
        "--out",
        type=here,
        help="folder for base/ and tuned/ (default: data/models/<pair>[-s<seed>])",
    ),
    option("--device", default="cpu", help="cpu (default) or cuda"),
    option("--card", action="store_true", help="only write the table of data/models/README.md"),
)
def run_train(options) -> int:
    """Train a tiny pair from nothing, or only write the model card's table anew."""
    if not options.pair and not options.card:
        raise UserError("train: name a --pair, or --card.")
    import torch
    from transformers.utils import logging

    from ..tinyworld import train

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.pair:
        train.train(options.pair, options.seed, out=options.out, device=options.device)
    if not options.out:
        train.write_card()
    return 0


@command(
    "trajectory",
    option("--pair", type=PAIR, required=True),
    option("--regime", type=one_of("tinyworld.trajectory:REGIMES"), default="full"),
    SEED,
)
def run_trajectory(options) -> int:
    """Tune a tiny base again with checkpoints kept and measured; writes data/trajectory."""
    import torch
    from transformers.utils import logging

    from ..hexainst import schema
    from ..tinyworld import trajectory

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    name, profile = f"{options.pair}-{options.regime}-s{options.seed}", load_profile("tiny")
    rows = schema.load_hexainst(dataset=profile.dataset)
    pair = next(p for p in profile.pairs if p.name == options.pair)
    folder = results_dir("tiny") / "trajectory" / name
    trajectory.train(options.pair, options.regime, options.seed, folder)
    measured = trajectory.measure(profile, pair, rows, folder)
    trajectory.write(name, *measured, rows, trajectory.FOLDER)
    return 0


@command(
    "tune",
    option("--profile", help="a profile of one model (default: smollm2)", default="smollm2"),
    option(
        "--tunings",
        nargs="+",
        type=one_of("study.tuning:TUNINGS"),
        help="only tune these, to share the work; nothing is measured (default: all, and measure)",
    ),
    option("--gather", action="store_true", help="only make the rows to tune on, and count them"),
    LOCAL,
    option("--device", help="cpu, or cuda:0 (default: a GPU where there is one)"),
    option(
        "--out",
        type=here,
        help="folder of the tables (default: beside the tunings; those of smollm2, all six "
        "finished, also go to data/tuning)",
    ),
    option("--rehearse", action="store_true", help="few steps, few rows: does all of it run?"),
)
def run_tune(options) -> int:
    """Tune a pretrained model six ways and measure what that changed; writes data/tuning."""
    from transformers.utils import logging

    from ..study import tuned, tuning

    logging.disable_progress_bar()
    with household():
        if options.gather:
            print(tuned.gathered(options.local)[1])
            return 0
        plan = tuned.planned(options.profile, options.device, options.out, options.rehearse)
        rows = tuned.rows_to_tune_on(plan, options.local)
        job = tuning.Job(plan.start, rows, plan.recipe, device=plan.device)
        for name in options.tunings or tuning.TUNINGS:
            tuning.train(job, tuning.TUNINGS[name], plan.folder / name)
        if options.tunings:
            finished = tuning.read_runs(plan.folder)
            print(
                f"{len(finished)} of {len(tuning.TUNINGS)} tunings are finished. Run without "
                "--tunings to measure them all."
            )
            return 0
        tuned.Tunings(plan, tuning.read_runs(plan.folder)).measure()
        if not (options.out or options.rehearse) and tuned.complete(plan):
            tuned.publish(plan)
    print(short(plan.out))
    return 0


@command(
    "human",
    LOCAL,
    option("--run-code", action="store_true", help="execute the CODE references, sandboxed"),
    option("--record", action="store_true", help="make this build the committed choice"),
)
def run_human(options) -> int:
    """Fetch the human half's sources and build data/hexainst/human.jsonl."""
    from ..hexainst import human
    from ..record import sha256

    path, counts, notes = human.build(
        local=options.local, run_code=options.run_code, record=options.record
    )
    for name, count in counts.items():
        print(f"{name}: {count['taken']} of {count['offered']} rows")
    print(*notes, sep="\n")
    rows = len(path.read_text("utf-8").splitlines())
    print(f"{short(path)}: {rows} rows, sha256 {sha256(path)}")
    return 0


@command(
    "validate",
    option("file", type=here),
    option("--part", action="store_true", help="the file holds some categories only"),
    option("--run-code", action="store_true", help="also execute the CODE references, sandboxed"),
)
def run_validate(options) -> int:
    """Print every fault of a file of rows with its line number."""
    from ..hexainst import schema

    rows, faults = schema.validate(options.file, options.part, options.run_code)
    for number, fault in faults:
        print(f"{options.file}:{number}: {fault}")
    for remark in [] if faults else schema.remarks(rows):
        print(f"{options.file}: {remark}")
    note = "" if options.run_code else "; no CODE reference was executed"
    print(f"{len(rows)} rows read, {schema.number_of(faults)}{note}")
    return 1 if faults else 0


@command(
    "export",
    option("folder", nargs="?", type=here, help="HexaInst's AI half goes there"),
    PROFILE,
    option("--pair", help="a pair of the profile: its sets are written instead"),
    option("--format", type=one_of("study.exports:KINDS"), help="lsn, esft, safetensors or csv"),
    option("--to", type=here, help="folder for the sets"),
)
def run_export(options) -> int:
    """Write HexaInst's AI half as Parquet with its data card; or the sets of a pair's atlas (of
    its score and share, or the defaults where no atlas is made yet) for other programs."""
    sets = (options.pair, options.format, options.to)
    if (options.folder is None) != all(sets) or (options.folder and any(sets)):
        raise UserError("export: give a FOLDER (HexaInst), or --pair, --format and --to (sets).")
    if options.folder:
        from ..hexainst import schema

        print(*schema.export(options.folder), sep="\n")
        return 0
    from ..study import atlas, exports
    from ..study.study import studies

    every = studies(load_profile(options.profile))
    refuse_other(options.pair, every, "pair")
    with household():
        study = every[options.pair]
        found = exports.sets_of_study(study, *atlas.settings_kept(study))
    print(*exports.export(found, options.format, options.to), sep="\n")
    return 0


# What a command needs that only a clone of the repository holds.
IN_CLONE = dict.fromkeys(("chain", "refresh", "check"), "the notebooks")
IN_CLONE |= dict.fromkeys(("train", "trajectory"), "the tiny world's texts")
IN_CLONE |= {"publish": "the README", "human": "the recipe in data/hexainst"}
IN_CLONE["site"] = "the README, the glossary and the notebooks"
ALIASES = {"chain": ["reproduce"]}


def command_line() -> argparse.ArgumentParser:
    """Every command with its options."""
    where = "Results go to data/results, figures to figures, under "
    where += f"the repository, {ROOT}." if CLONE else f"the current directory, {ROOT}."
    where += " A path given here is from the current directory, one in a profile from there."
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__.split(":")[0] + ".", epilog=where
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (function, options) in COMMANDS.items():
        others = {"aliases": ALIASES.get(name, ()), "description": function.__doc__}
        added = commands.add_parser(name, help=function.__doc__, **others)
        added.set_defaults(function=function, command=name)
        for names, settings in options:
            added.add_argument(*names, **settings)
    return parser


def _refuse_outside(name: str) -> None:
    if CLONE is None and name in IN_CLONE:
        raise UserError(
            f"{COMMAND} {name} needs {IN_CLONE[name]}: not in the package. Clone the repository "
            "and run it inside."
        )


def main(argv=None) -> int:
    """Run one command; whatever ends it early is one line on stderr and an exit code."""
    try:
        with handled(stop):
            try:
                options = command_line().parse_args(argv)
                _refuse_outside(options.command)
                return options.function(options)
            finally:
                sys.stdout.flush()
    except UserError as error:
        said, code = f"error: {error}", 1
    except ModuleNotFoundError as error:
        if (name := (error.name or "").partition(".")[0]) in ("", __package__.partition(".")[0]):
            raise  # a fault of ours
        said, code = f"error: this command needs {name}, which is not installed. In a clone, ", 1
        said += f"`make env` builds an environment that has it; else `pip install {name}`."
    except MemoryError:
        said, code = "error: out of memory. Lower batch_tokens in the profile, then run again.", 1
    except BrokenPipeError:  # whoever read the output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        said, code = f"error: {what}{error.strerror or error}. Finished results are kept.", 1
    except KeyboardInterrupt as error:
        said = "interrupted; finished counts are kept; run again"
        code = 128 + (error.number if isinstance(error, Stopped) else 2)
    print(said, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
