"""A tuning as it goes: train a tiny base again with checkpoints kept, measure each, write the
tables notebook 07 reads.

    python -m helpers.run trajectory --pair tiny-dense                        shipped recipe, seed
    python -m helpers.run trajectory --pair tiny-dense --seed 1               other batches
    python -m helpers.run trajectory --pair tiny-dense --regime lora          low-rank (rank 8)
    python -m helpers.run trajectory --pair tiny-dense --regime pretraining   no instruction at all

The last is the control of every statement about tuning: further pre-training of the same base by as
many steps of as many tokens, with the same optimiser and learning rates.

Checkpoints go to data/results/tiny/trajectory/<run>/<step>/ (about 40 MB; used again if complete),
the tables to data/trajectory/<run>.{csv,safetensors,json}, run = <pair>-<regime>-s<seed>. 7 to 15
minutes of one core per run. The same command gives the same bytes on one kind of processor; on
another, rounding soon leads elsewhere. (Ours.)
"""

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from .. import paths
from ..analysis.sets import PackedSets, top_sets
from ..analysis.similarity import churn, jensen_shannon
from ..capture.count import count
from ..capture.loading import check_pair, load_model, locate, weight_files
from ..hexainst.corpus import text
from ..record import (
    DamagedFile,
    RecordMismatch,
    UserError,
    digest,
    read_json,
    read_record,
    read_tensors,
    refuse_edited,
    sha256,
    verify,
    versions,
    write_json,
    write_table,
    write_tensors,
)
from ..study.answers import greedy_answers
from ..study.evaluate import task_scores
from . import lora
from . import train as training
from .recipe import RECIPES, Recipe

STEPS = (25, 50, 100, 200, 300, 400, 600, 800, 1000, 1300, 1600, 1900, 2200, 2600)
REGIMES, RANK, LOW_RANK_LR = ("full", "lora", "pretraining"), 8, 1e-2
PER_CATEGORY = 50  # rows of each half and category that every checkpoint reads and answers
FOLDER, RUN = paths.DATA / "trajectory", "run.json"


@dataclass(frozen=True)
class Run:
    """One measured tuning: S checkpoints, the base (step 0) first, on I rows (`rows`: their places
    in the data set).

    correct [S, I] task score of the greedy answer; neurons and experts [S, I] similarity to the
    base (Jaccard of sets; Jensen-Shannon of routing, None in a dense model); to_final [S, I]
    Jaccard with the last checkpoint's sets; final: those sets, bool [I, M].
    """

    name: str
    record: dict
    rows: np.ndarray
    steps: np.ndarray
    correct: np.ndarray
    neurons: np.ndarray
    experts: np.ndarray | None
    to_final: np.ndarray
    final: np.ndarray


def train(
    pair: str, regime: str, seed: int, folder, base=None, recipe: Recipe | None = None, report=print
) -> dict:
    """Tune `base` (default: the shipped one) and keep fp16 checkpoints in folder/<step>; returns
    the run's record.

    A folder that holds the same run complete is left as it is. Raises UserError for a base of
    another tokenizer.
    """
    folder, base = Path(folder), Path(base or paths.MODELS / pair / "base")
    low = replace(RECIPES[pair], tune_lr=LOW_RANK_LR)
    recipe = recipe or (low if regime == "lora" else RECIPES[pair])
    _, tokenizer, rows, packed, _, record = training.prepare(pair, seed, recipe)
    at = [step for step in STEPS if step < recipe.tune_steps] + [recipe.tune_steps]
    record |= {"regime": regime, "base": sha256(base / "model.safetensors")}
    if regime == "lora":
        record |= {
            "rank": RANK,
            "optimiser": "AdamW (low-rank parts of the projections; the rest frozen)",
        }
    if regime == "pretraining":
        equal = equal_pretraining(tokenizer, rows, recipe)
        record |= {"pretraining": asdict(equal)}
    if (folder / RUN).is_file() and record.items() <= read_json(folder / RUN).items():
        return read_json(folder / RUN)
    model = training.load(base).train()
    if model.config.vocab_size != len(tokenizer):
        raise UserError(
            f"{paths.short(base)} embeds {model.config.vocab_size} words, the recipe's texts have "
            f"{len(tokenizer)}: the base was trained on other texts. Use its own recipe."
        )
    if regime == "lora":
        lora.attach(model, RANK, seed=seed)

    def keep(step, model):
        if step not in at:
            return
        plain = lora.merged(model) if regime == "lora" else copy.deepcopy(model)
        plain.half().save_pretrained(folder / f"{step:04d}")
        tokenizer.save_pretrained(folder / f"{step:04d}")

    if regime == "pretraining":
        record["losses"] = training.pretrain(model, packed, equal, seed + 1, keep, report)
    else:
        loaded = model, tokenizer
        record["losses"] = training.tune(loaded, rows, packed, recipe, seed, keep, report)
    record["checkpoints"] = {
        f"{step:04d}": sha256(folder / f"{step:04d}" / "model.safetensors") for step in at
    }
    write_json(folder / RUN, record)
    return record


def equal_pretraining(tokenizer, rows, recipe: Recipe) -> Recipe:
    """The recipe of further pre-training that reads as many tokens in each step as tuning does:
    its batch of instructions (their mean length) and its replay batch together.
    """
    ids, _ = training.encode_tuning(tokenizer, rows)
    tuned = recipe.tune_batch * sum(map(len, ids)) / len(ids)
    batch = round(tuned / recipe.context + recipe.replay_batch)
    return replace(
        recipe,
        pretrain_steps=recipe.tune_steps,
        pretrain_batch=batch,
        pretrain_lr=recipe.tune_lr,
    )


def measured_rows(rows: pd.DataFrame) -> np.ndarray:
    """Places of the first PER_CATEGORY rows of each half and category, int [I]."""
    return np.flatnonzero(rows.groupby(["half", "category"], sort=False).cumcount() < PER_CATEGORY)


def settings(profile, rows: pd.DataFrame) -> dict:
    """What decides the tables besides the weights; `rows` are those measured."""
    table, keys = rows.to_dict("records"), ("id", "half", "category", "reference", "checker")
    return {
        "template": profile.template,
        "epsilon": profile.epsilon,
        "max_new_tokens": profile.max_new_tokens,
        "run_code": profile.run_code,
        "data": digest([[text(row), *(row[key] for key in keys)] for row in table]),
    }


def measure(profile, pair, rows: pd.DataFrame, folder) -> tuple[dict, dict]:
    """(arrays as in Run, record) of a folder that `train` filled: every checkpoint, loaded in
    float32, reads the same token ids and answers. Raises DamagedFile for a missing or altered
    checkpoint, UserError for one of another base.
    """
    folder, places = Path(folder), measured_rows(rows)
    record, rows = read_json(folder / RUN), rows.iloc[places]
    own = {name: _weights(ref) for name, ref in (("base", pair.base), ("tuned", pair.tuned))}
    anew = f"Delete {paths.short(folder)} and train again"
    verify(record, {"base": own["base"]}, folder / RUN, anew)
    texts, counts, correct = [text(row) for row in rows.to_dict("records")], [], []
    base = load_model(pair.base)
    for step, expected in {"0000": None, **record["checkpoints"]}.items():
        if expected and (
            not (folder / step).is_dir() or sha256(folder / step / "model.safetensors") != expected
        ):
            raise DamagedFile(
                f"checkpoint {paths.short(folder / step)} is missing or not the one in {RUN}. "
                f"Delete {paths.short(folder)} and train again."
            )
        loaded = load_model(str(folder / step)) if expected else base
        check_pair(base, loaded)
        counts.append(count(*loaded, texts, profile.batch_tokens, template=profile.template))
        answers = greedy_answers(
            *loaded, rows, profile.template, profile.batch_tokens, profile.max_new_tokens
        )
        correct.append(task_scores(rows, answers, profile.run_code))
    sets = [top_sets(c.unit("neurons"), profile.epsilon)[0] for c in counts]
    arrays = {
        "rows": places.astype(np.int32),
        "steps": np.array([0, *map(int, record["checkpoints"])], np.int32),
        "correct": np.array(correct, np.float32),
        "final": np.packbits(sets[-1], axis=1),
        "neurons": np.array([churn(sets[0], s)["jaccard"] for s in sets], np.float32),
        "to_final": np.array([churn(sets[-1], s)["jaccard"] for s in sets], np.float32),
    }
    if counts[0].routed is not None:
        arrays["experts"] = np.array(
            [jensen_shannon(counts[0].routed, c.routed).mean(1) for c in counts], np.float32
        )
    return arrays, record | {
        "tuned": own["tuned"],
        "settings": settings(profile, rows),
        "width": sets[-1].shape[1],
        "measured_with": versions(),
    }


def table(run: Run, rows: pd.DataFrame) -> pd.DataFrame:
    """The run as one tidy table: means per step, half and category."""
    rows = rows.iloc[run.rows]
    values = {
        "accuracy": run.correct,
        "neurons_similarity": run.neurons,
        "neurons_to_final": run.to_final,
    }
    values |= {} if run.experts is None else {"experts_similarity": run.experts}
    long = pd.concat(
        [
            pd.DataFrame(
                {
                    "step": step,
                    "half": rows["half"],
                    "category": rows["category"],
                    **{name: v[s].astype(float) for name, v in values.items()},
                }
            )
            for s, step in enumerate(run.steps)
        ]
    )
    grouped = long.groupby(["step", "half", "category"], sort=False)
    return grouped.mean().assign(rows=grouped.size()).reset_index()


def write(name: str, arrays: dict, record: dict, rows: pd.DataFrame, folder=FOLDER) -> Run:
    """Write <name>.safetensors, .json and .csv; returns the Run as `read` would."""
    write_tensors(Path(folder) / f"{name}.safetensors", arrays, record)
    run = _load(Path(folder) / f"{name}.safetensors")
    write_table(Path(folder) / f"{name}.csv", table(run, rows))
    return run


def read(profile, pair, rows: pd.DataFrame, folder=FOLDER) -> dict[str, Run]:
    """{"full-s0": Run, ...}: the committed runs of a pair. Empty where the pair has none, or none
    at this epsilon and on these rows. Raises RecordMismatch if a run belongs to other weights than
    the pair's base and tuned model, DamagedFile for a file of the pair's name that is no record of
    a run, or was edited.
    """
    found, here = {}, settings(profile, rows.iloc[measured_rows(rows)])
    for path in sorted(Path(folder).glob(f"{pair.name}-*.json")):
        record = read_record(path, {"pair": str})
        if record["pair"] != pair.name:
            continue
        refuse_edited(record, path)
        if record["settings"] != here:
            continue
        for name, ref in (("base", pair.base), ("tuned", pair.tuned)):
            if record[name] != _weights(ref):
                raise RecordMismatch(
                    f"{paths.short(path)} was measured beside another {name} model than {ref!r} "
                    f"(weights {record[name][:12]}, not {_weights(ref)[:12]}). Run `python -m "
                    f"helpers.run trajectory` for the pair {pair.name} anew, or restore "
                    "the checkpoint."
                )
        found[path.stem.removeprefix(f"{pair.name}-")] = _load(path.with_suffix(".safetensors"))
    return found


def _weights(ref) -> str:
    """sha256 of a checkpoint's weights: of its one file, or of the list of its files'."""
    found = [sha256(path) for path in weight_files(locate(ref)[0])]
    return found[0] if len(found) == 1 else digest(found)


def _load(path) -> Run:
    arrays, record = read_tensors(path)
    final = PackedSets(arrays.pop("final"), record["width"])[:]
    return Run(
        name=path.stem, record=record, final=final, experts=arrays.pop("experts", None), **arrays
    )
