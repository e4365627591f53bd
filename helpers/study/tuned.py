"""What the tunings of one model did to it: HexaInst's rows read by every checkpoint, kept as arrays
from which `tuning_tables` makes its tables.

A part is measured once and kept (`record.cached`), so an interrupted run goes on where it was: of
each tuning what changed, then what it can do, then who resembles whom, then whether it matters. All
is ours, not the paper's.
"""

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open

from .. import paths
from ..analysis.alteration import common_gain
from ..analysis.sets import PackedSets, codes
from ..analysis.similarity import churn
from ..capture.count import passes
from ..capture.counts import Gathered
from ..capture.loading import load_model, load_tokenizer
from ..capture.losses import GroupLoss
from ..capture.tokens import chat_template
from ..config import Pair, Profile, load_profile
from ..hexainst.corpus import wordings
from ..hexainst.leftover import counted, gather_rows, read_rows, refuse_overlap, save_rows
from ..hexainst.schema import load_hexainst
from ..paths import results_dir, short
from ..record import (
    DamagedFile,
    UserError,
    atomic,
    cached,
    digest,
    read_record,
    refuse_edited,
    sealed,
    sha256,
    write_json,
    write_table,
)
from . import alteration
from .ability import likely
from .reading import encode_rows
from .study import Study, rows_of
from .tuning import TUNINGS, Recipe, read_runs, refuse_device

TABLES, CACHED = paths.DATA / "tuning", paths.DATA / "cache" / "tuning" / "rows.jsonl"
WEIGHTS_RESAMPLES = 500  # of the interval that ranks all neurons anew each time
ROWS, RUNS, DATA_TABLE = "rows.csv", "runs.json", "data.csv"
START, MAIN = "start", "full"
CONTROL, DEALT = CONTROLS = ("continued", "dealt")
READ = ["id", "half", "category", "instruction", "input", "reference", "checker", "fold"]
ABLE = ("own", "other", "none", "gain", "gain_none", "first", "chance")
MATTERS = {
    "weights": alteration.weights,
    "transplant": alteration.transplanted,
    "matter": alteration.matter,
}
OF_ROWS = {"matter": alteration.matter_of_rows, "transplant": alteration.transplants_of_rows}


class Plan(NamedTuple):
    """What is tuned and measured: a profile (of one model), HexaInst's rows with their fold, the
    recipe, the folder of the tunings, the folder of the tables, the device; and of how many rows of
    each category and half the checkpoints, the abilities and the weights are read.
    """

    profile: Profile
    rows: pd.DataFrame
    recipe: Recipe
    folder: Path
    out: Path
    device: str = "cpu"
    curve_rows: int = 25
    able_rows: int = 40
    weight_rows: int = 25

    @property
    def start(self) -> str:
        """The checkpoint that all tunings start from."""
        return self.profile.pairs[0].tuned

    def first(self, number: int) -> np.ndarray:
        """Places of the first `number` rows of each category and half, int [n]."""
        groups = self.rows.groupby(["half", "category"], sort=False)
        return np.flatnonzero(groups.cumcount() < number)


def planned(profile: str, device=None, out=None, rehearse: bool = False) -> Plan:
    """The plan of a profile by its name. rehearse: few steps and rows, in a folder of its own: its
    numbers mean nothing. On a GPU batches are larger than the profile says.
    """
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    refuse_device(device)
    large = {"batch_tokens": 16384} if device != "cpu" else {}
    small = {"rows": 1, "resamples": 100, "controls": 2, "ablation_rows": 1} if rehearse else {}
    found = load_profile(profile, **large, **small)
    if len(found.pairs) != 1 or found.pairs[0].base:
        raise UserError(
            f"profile {profile} has {len(found.pairs)} pairs, or a base: expected one model alone, "
            "the start of all tunings. Use smollm2, or a profile like it."
        )
    folder = results_dir(profile) / "trajectory" / ("rehearsal" if rehearse else "tuning")
    recipe = Recipe(steps=2, tokens=64, kept=(1,), rank=2, context=32) if rehearse else Recipe()
    few = {"curve_rows": 1, "able_rows": 1, "weight_rows": 1} if rehearse else {}
    return Plan(
        found, rows_of(found), recipe, folder, Path(out or folder / "tables"), device, **few
    )


def complete(plan: Plan) -> bool:
    """Whether all tunings of the model that data/tuning is about are finished."""
    return plan.profile.name == "smollm2" and set(read_runs(plan.folder)) == set(TUNINGS)


def files() -> set[str]:
    """The names of all files that the measured tunings may be kept in."""
    measured = ("changed", "able", *MATTERS)
    parts = {f"{what}-{name}" for what in measured for name in (START, *TUNINGS)} | {"pairs"}
    ends = (".safetensors", ".json")
    return {ROWS, RUNS, DATA_TABLE} | {part + end for part in parts for end in ends}


def publish(plan: Plan, folder=TABLES) -> None:
    """Put a plan's finished tables into `folder`, in the place of those of other tunings; files of
    other names stay as they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(files()):
        made = plan.out / name
        if not made.is_file():
            (folder / name).unlink(missing_ok=True)
            continue
        with atomic(folder / name) as draft:
            shutil.copyfile(made, draft)


def gathered(local=None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows to tune on, counted): gathered from their sources, kept in data/cache."""
    rows = gather_rows(load_hexainst(dataset="hexainst"), local=local)
    save_rows(CACHED, rows)
    return rows, counted(rows)


def rows_to_tune_on(plan: Plan, local=None) -> pd.DataFrame:
    """The rows to tune on, from data/cache, else gathered; none stands in HexaInst. Their counts go
    beside the tables.
    """
    rows = read_rows(CACHED) if CACHED.is_file() else gathered(local)[0]
    refuse_overlap(rows, load_hexainst(dataset="hexainst"))
    refuse_overlap(rows, plan.rows)
    tokenizer = load_tokenizer(plan.start)
    encoded = encode_rows(tokenizer, rows, chat_template(tokenizer), "reference")
    write_table(plan.out / DATA_TABLE, counted(rows, encoded))
    return rows


def write_runs(folder, runs: dict) -> None:
    """Write the records of tunings, with the digests of the tables of rows beside them, `sealed`:
    whose parts these are.
    """
    folder = Path(folder)
    tables = [name for name in (ROWS, DATA_TABLE) if (folder / name).is_file()]
    digests = {"sha256": {name: sha256(folder / name) for name in tables}}
    write_json(folder / RUNS, sealed(runs | digests))


def kept_runs(folder) -> dict[str, dict]:
    """What `write_runs` wrote. Raises DamagedFile where it, or a table it names, is not as it was
    written.
    """
    path = Path(folder) / RUNS
    record = read_record(path, {"sha256": dict})
    refuse_edited(record, path)
    for name, expected in record["sha256"].items():
        table = path.with_name(name)
        if not table.is_file() or sha256(table) != expected:
            raise DamagedFile(
                f"{short(table)} is missing or not the one that {path.name} names: its rows would "
                "stand beside numbers of others. Put the file back, or run `make tune` again."
            )
    return {name: record[name] for name in TUNINGS if name in record}


def digest_of(runs: dict) -> str:
    """What tells one set of tunings from another: the digests of all their checkpoints."""
    return digest({name: run["checkpoints"] for name, run in runs.items()})


class Tunings:
    """The finished tunings of one start, read by models; parts are kept in `plan.out`.

    runs: {name: record}, as `tuning.read_runs` gives them.
    """

    def __init__(self, plan: Plan, runs: dict, report=print):
        self.plan, self.runs, self.report = plan, runs, report
        self._studies, self._loaded, self._sets, self._losses = {}, {}, {}, {}
        self._start = Study(plan.profile, Pair(START, None, plan.start), plan.rows)

    # ---- models and what they read

    def loaded(self, name: str):
        """(model, tokenizer) of the start, or of a tuning's last checkpoint, on the device."""
        if name not in self._loaded:
            ref = self.plan.start if name == START else str(self.last(name))
            model, tokenizer = load_model(ref)
            self._loaded[name] = model.to(self.plan.device), tokenizer
        return self._loaded[name]

    def last(self, name: str) -> Path:
        """The folder of a tuning's last checkpoint."""
        return self.plan.folder / name / max(self.runs[name]["checkpoints"])

    def study(self, name: str) -> Study:
        """The Study of start and tuned model, counted at all, even and odd tokens of the prompts;
        what the start counts is read once for all of them.
        """
        if name not in self._studies:
            pair = Pair(name, self.plan.start, str(self.last(name)))
            models = {"base": self.loaded(START), "tuned": self.loaded(name)}
            study = Study(self.plan.profile, pair, self.plan.rows, models)
            self._losses[name] = read(study, "tuned")
            if self._studies:
                first = next(iter(self._studies.values()))
                for where in ("prompt", *alteration.SPLIT):
                    counts = first.counts("base", where)
                    study.once(("counts", "base", where), lambda c=counts: c)
            else:
                self._losses[START] = read(study, "base")
            self._studies[name] = study
        return self._studies[name]

    def sets(self, name: str) -> np.ndarray:
        """The sets of the start or of a tuning's end, bool [I, M]; kept packed."""
        if name not in self._sets:
            study = self.study(MAIN if name == START else name)
            found = alteration.sets(study, "base" if name == START else "tuned")
            self._sets[name] = np.packbits(found, axis=1), found.shape[1]
        return PackedSets(*self._sets[name])[:]

    # ---- the parts

    def measure(self) -> None:
        """Every part, in the order of their worth; what is kept already is not measured again."""
        for name in self.parts():
            self.part(name)
        write_table(self.plan.out / ROWS, rows_table(self.plan.rows))
        write_runs(self.plan.out, self.runs)

    def parts(self) -> list[str]:
        """The names of all parts, in that order."""
        names = sorted(self.runs, key=lambda name: name not in (MAIN, *CONTROLS))
        found = [f"changed-{name}" for name in names]
        found += [f"able-{name}" for name in (START, *names)] + ["pairs"]
        return found + [f"{what}-{name}" for what in MATTERS for name in names]

    def part(self, part: str) -> None:
        """Measure one part, by its name in `parts`, unless it is kept."""
        what, _, name = part.partition("-")
        kinds = {"changed": self._changed, "able": self._able}
        if what in MATTERS:
            compute = partial(self._found, name, what)
        else:
            compute = self._pairs if what == "pairs" else partial(kinds[what], name)
        began = time.monotonic()
        cached(self.plan.out / f"{part}.safetensors", self.want(), compute)
        self.report(f"{part}: {time.monotonic() - began:.1f} s")

    def want(self) -> dict:
        """What decides every part besides the tuning: profile, rows, what is read around them, in
        which numbers it is computed, the tunings' checkpoints.
        """
        plan, profile, start = self.plan, self.plan.profile, self._start
        return {
            "rows": digest(plan.rows[READ].to_dict("records")),
            "tunings": digest_of(self.runs),
            "epsilon": profile.epsilon,
            "tau": profile.tau,
            "resamples": profile.resamples,
            "controls": profile.controls,
            "seed": profile.seed,
            "template": start.template,
            "dtype": start.pair.dtype,
            "measured": start.measured_rows(),
            "read": [plan.curve_rows, plan.able_rows, plan.weight_rows],
        }

    def _changed(self, name):
        """Per row, start against end and beside the floor, of each layer by how much less of the
        union is kept than within one model [I, L]; along the checkpoints; and the tables that
        `alteration` makes of a Study.
        """
        study = self.study(name)
        found = alteration.similarities(study, "neurons")
        arrays = {"similarity": found.similarity, "floor": found.floor, "across": found.across}
        arrays = {key: value.astype(np.float32) for key, value in arrays.items()}
        arrays["layers"] = (found.layers[0] - found.layers[1]).astype(np.float16)
        tables = {
            "churned": alteration.measured({name: study}, alteration.churned).table,
            "categories": alteration.categories({name: study}),
            "fates": alteration.layer_fates(study),
        }
        record = {key: table.to_dict("records") for key, table in tables.items()}
        return arrays | self._curves(name, study), plain(record)

    def _curves(self, name, study):
        """Along the start and every checkpoint, of the plan's rows: similarity to the start and to
        the end, loss of the references, [S, I'].
        """
        some = self.plan.first(self.plan.curve_rows)
        ends = [alteration.sets(study, variant)[some] for variant in alteration.MODELS]
        losses = [self._losses[which][some] for which in (START, name)]
        steps, near, settled, loss = [0], [np.ones(len(some))], [], [losses[0]]
        settled.append(churn(ends[1], ends[0])["jaccard"])
        walking = None
        for step in sorted(self.runs[name]["checkpoints"])[:-1]:
            walking = self._walk(name, step, walking)
            here = Study(self.plan.profile, study.pair, self.plan.rows.iloc[some], walking)
            loss.append(read(here, "tuned"))
            sets = alteration.sets(here, "tuned")
            steps.append(int(step))
            near.append(churn(ends[0], sets)["jaccard"])
            settled.append(churn(ends[1], sets)["jaccard"])
        steps.append(int(max(self.runs[name]["checkpoints"])))
        near.append(churn(*ends)["jaccard"])
        settled.append(np.ones(len(some)))
        loss.append(losses[1])
        curves = {"near": near, "settled": settled, "loss": loss}
        curves = {key: np.array(value, np.float32) for key, value in curves.items()}
        return curves | {"steps": np.array(steps, np.int32), "curve_rows": some.astype(np.int32)}

    def _walk(self, name, step, walking):
        """{"tuned": (model, tokenizer)} of a checkpoint; one model takes the weights of all, an
        adapter is merged into a model of its own.
        """
        folder = self.plan.folder / name / step
        if walking and not TUNINGS[name].low_rank:
            fill(walking["tuned"][0], folder / "model.safetensors")
            return walking
        model, tokenizer = load_model(str(folder))
        return {"tuned": (model.to(self.plan.device), tokenizer)}

    def _able(self, name):
        """`ability.likely` of the start or of a tuning's end."""
        some = self.plan.first(self.plan.able_rows)
        pair = Pair(name, None, self.plan.start if name == START else str(self.last(name)))
        rows = self.plan.rows.iloc[some]
        study = Study(self.plan.profile, pair, rows, {"tuned": self.loaded(name)})
        found = likely(study, "tuned")
        arrays = {key: found[key].to_numpy(np.float32) for key in ABLE}
        return arrays | {"rows": some.astype(np.int32)}, {}

    def _pairs(self):
        """Similarity of the sets of every two models, {one~other: [I]}; and of every tuning the
        Jaccard of the neurons it gained with those that the main tuning gained, minus chance.
        """
        names, found = [START, *self.runs], {}
        for n, one in enumerate(names):
            mine = self.sets(one)
            for other in names[n + 1 :]:
                jaccard = churn(mine, self.sets(other))["jaccard"]
                found[f"{one}~{other}"] = jaccard.astype(np.float32)
        depth = self.study(MAIN).counts("base").unit("neurons").shape[1]
        start, main = self.sets(START), self.sets(MAIN)
        for name in [name for name in self.runs if name != MAIN]:
            found[f"gain~{name}"] = _gains(start, main, self.sets(name), depth)
        return found, {}

    def _found(self, name, what):
        """One measure of `alteration` on a tuning's Study, its table as the part's record; what its
        means are of, row by row.
        """
        study, record, arrays = self.study(name), {}, {}
        if what == "weights":
            study = study.take(self.plan.first(self.plan.weight_rows))
            most = min(WEIGHTS_RESAMPLES, self.plan.profile.resamples)
            study.profile = replace(self.plan.profile, resamples=most)
        found = alteration.measured({name: study}, MATTERS[what])
        record[what] = found.table.to_dict("records")
        if what == "transplant":
            record["curve"] = alteration.transplant_curve({name: study}).to_dict("records")
        if what in OF_ROWS:
            arrays = OF_ROWS[what](study)
        return arrays, plain(record)


@torch.no_grad()
def read(study, variant) -> np.ndarray:
    """Count what a model of a study reads, at all, even and odd tokens of the prompts, and remember
    it there, from one pass; the same pass's loss of each reference, nats per token, [I].
    """
    model, encoded = study.model(variant)[0], study.reading(variant)
    gathered, losses = Gathered(len(encoded)), GroupLoss(model, len(encoded))
    for rows, counts in passes(model, encoded, study.profile.batch_tokens, (losses,)):
        gathered(rows, counts)
    for where in ("prompt", *alteration.SPLIT):
        study.once(("counts", variant, where), lambda w=where: gathered.counts[w])
    return losses.mean.numpy()


def _gains(start, one, two, depth):
    """Jaccard of two gained sets minus chance, [I]; NaN where neither gained anything."""
    out = np.full(len(start), np.nan, np.float32)
    for row in range(len(start)):
        found = common_gain(start[row, None], one[row, None], two[row, None], depth)
        if len(found):
            out[row] = found[0, 0] - found[0, 1]
    return out


def fill(model, path) -> None:
    """Put the weights of a file into a model of the same architecture, in place. Raises DamagedFile
    unless the file holds each of them, and none besides.
    """
    with safe_open(path, "pt") as file, torch.no_grad():
        own = dict(model.named_parameters())
        if own.keys() != set(file.keys()):
            odd = sorted(own.keys() ^ set(file.keys()))[:3]
            raise DamagedFile(f"{path} holds other weights than the model: {', '.join(odd)}.")
        for name, weight in own.items():
            weight.copy_(file.get_tensor(name))


def plain(value):
    """A record as JSON has it: NaN becomes None, arrays lists, numbers Python's own."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and value != value else value


def rows_table(rows: pd.DataFrame) -> pd.DataFrame:
    """What the tables need of the rows, and what may be committed: id, half, category, fold, and
    the number of its wording.
    """
    return rows[["id", "half", "category", "fold"]].assign(wording=codes(wordings(rows)))
