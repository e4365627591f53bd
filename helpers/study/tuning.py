"""Tunings of a pretrained model under one budget of tokens: instructions, low-rank, another seed,
one category, and two controls, plain text (mere training) and answers dealt to other instructions;
resumable, checkpoints dense at first.

    python -m helpers.run tune                             (make tune)

What a step reads is a function of rows, seed and step alone, so a tuning that was interrupted goes
on from its last state, bit for bit on one kind of processor. All is ours, not the paper's.
"""

import math
import os
import re
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from ..analysis.sets import codes
from ..capture.checkpoints import fingerprint
from ..capture.gguf_files import room_for
from ..capture.loading import load_model, locate
from ..capture.tokens import Encoded, chat_template, padded
from ..config import refuse_other
from ..hexainst.leftover import plain_text, rows_digest
from ..paths import short
from ..record import (
    DamagedFile,
    UserError,
    computing,
    read_record,
    read_tensors,
    sha256,
    sweep,
    verify,
    versions,
    write_json,
    write_tensors,
)
from .reading import encode_rows

RUN, STATE = "run.json", "state.safetensors"
FINISHED = {"start": str, "rows": str, "template": str, "recipe": dict}  # in the record of a run
GOING = {"done": int, "read": int}  # in the record of a state
BETAS, CLIP, FLOOR = (0.9, 0.999), 1.0, 0.02  # AdamW's; gradient norm; lowest share of the rate


@dataclass(frozen=True)
class Tuning:
    """What one tuning reads, and how. reads: "instructions", loss on the references alone; "dealt",
    the same with each reference beside an instruction that it does not answer; or "text", the same
    human words without any instruction, loss on every token.
    """

    name: str
    reads: str = "instructions"
    low_rank: bool = False
    seed: int = 0
    category: str | None = None


TUNINGS = {
    tuning.name: tuning
    for tuning in (
        Tuning("full"),
        Tuning("continued", reads="text"),
        Tuning("dealt", reads="dealt"),
        Tuning("again", seed=1),
        Tuning("lora", low_rank=True),
        Tuning("alone", category="MATH"),
    )
}


@dataclass(frozen=True)
class Recipe:
    """The budget and the rates, the same for all tunings. tokens: read in each step; kept: the
    checkpoints before the last one; context: tokens of a piece of plain text.
    """

    steps: int = 100
    tokens: int = 2048
    kept: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rate: float = 1e-4
    low_rank_rate: float = 1e-3
    rank: int = 16
    warm: int = 10
    context: int = 256

    @property
    def checkpoints(self) -> list[int]:
        """Steps after which the model is kept, the last among them."""
        return [step for step in self.kept if step < self.steps] + [self.steps]


class Job(NamedTuple):
    """A checkpoint to start from (any name that `load_model` knows), the rows to tune on, the
    recipe, the template around an instruction (None: the model's own chat format), the device.
    """

    start: str
    rows: pd.DataFrame
    recipe: Recipe = Recipe()
    template: str | None = None
    device: str = "cpu"


# ---- what is read


def reading(tokenizer, rows, tuning: Tuning, recipe: Recipe, template: str) -> list[Encoded]:
    """What a tuning reads, one sequence each, and which tokens of it teach: of instructions the
    reference and the end of sequence; of plain text, cut into pieces of one length, every token.
    """
    if tuning.category:
        rows = rows[rows["category"] == tuning.category]
    if rows.empty:
        raise UserError(f"tuning {tuning.name}: no row of {tuning.category or 'any category'}.")
    if tuning.reads == "dealt":
        rows = rows.assign(reference=dealt(rows["reference"], tuning.seed))
    if tuning.reads != "text":
        return encode_rows(tokenizer, rows, template, "reference")
    documents = plain_text(rows)
    order = np.random.default_rng(tuning.seed).permutation(len(documents))
    stream = [
        token
        for place in order
        for token in (*tokenizer(documents[place])["input_ids"], tokenizer.eos_token_id)
    ]
    size = recipe.context
    pieces = [tuple(stream[i : i + size]) for i in range(0, len(stream) - size + 1, size)]
    if not pieces:
        raise UserError(f"tuning {tuning.name}: {len(stream)} tokens of text fill no piece.")
    return [Encoded(piece, (False, *[True] * (size - 1))) for piece in pieces]


def dealt(references, seed: int) -> list[str]:
    """The references in another order, so that none stands where one of the same words stood: each
    once, drawn by the seed from all of them.

    The same words stand side by side, in an order that is drawn; each then takes the place of what
    stands as many places further on as the commonest words are many. Raises UserError where more
    than half of the references are the same words: no order is such then.
    """
    references, rng = list(references), np.random.default_rng(seed)
    words = codes(references)
    most = int(np.bincount(words).max())
    if 2 * most > len(references):
        raise UserError(
            f"{most} of {len(references)} references to tune on are the same words, so they cannot "
            "be dealt to other instructions. Add rows with other references."
        )
    drawn = rng.permutation(len(references))
    order = drawn[np.argsort(rng.permutation(words.max() + 1)[words[drawn]], kind="stable")]
    found = dict(zip(order.tolist(), np.roll(order, most).tolist(), strict=True))
    return [references[found[place]] for place in range(len(references))]


def schedule(sizes, tokens: int, steps: int, seed: int) -> list[list[int]]:
    """Which sequences each step reads: shuffled, each once before any comes again; step n ends with
    the sequence that brings all that was read to n times `tokens`. So budgets are equal to within
    one sequence.

    >>> [len(step) for step in schedule([3, 3, 3, 3], 6, 4, seed=0)]
    [2, 2, 2, 2]
    """
    rng, queue, plan, read = np.random.default_rng(seed), [], [], 0
    for step in range(1, steps + 1):
        plan.append([])
        while read < step * tokens or not plan[-1]:
            queue = queue or rng.permutation(len(sizes)).tolist()
            plan[-1].append(queue.pop())
            read += sizes[plan[-1][-1]]
    return plan


def rate_at(step: int, recipe: Recipe, peak: float) -> float:
    """Learning rate of a step (from 0): a straight warm-up, then a cosine to FLOOR of the peak."""
    turn = math.pi * max(0, step - recipe.warm) / max(1, recipe.steps - recipe.warm)
    fall = FLOOR + (1 - FLOOR) * (1 + math.cos(turn)) / 2
    return peak * min((step + 1) / max(1, recipe.warm), fall)


def loss_of(model, batch, device) -> torch.Tensor:
    """Mean next-token loss of a batch's counted tokens, nats."""
    ids, counted = batch.input_ids.to(device), batch.count_mask[:, 1:].bool().to(device)
    mask = batch.attention_mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1][counted].float(), ids[:, 1:][counted])


# ---- a tuning


def train(job: Job, tuning: Tuning, folder, every: float = 60.0, report=print) -> dict:
    """Tune the start and keep its checkpoints in folder/<step>; returns the run's record.

    A folder that holds this run complete is left as it is; one that holds its state, kept at the
    first checkpoint after each `every` seconds, goes on from there. Raises RecordMismatch where it
    holds a run of other rows, another start, recipe or versions, DamagedFile where a kept
    checkpoint is not the one that was written, UserError for a loss that is not finite.
    """
    folder = Path(folder)
    with alone(folder / RUN):
        return _train(job, tuning, folder, every, report)


def _train(job, tuning, folder, every, report):
    device = torch.device(job.device)
    model, tokenizer = load_model(job.start)
    template = job.template or chat_template(tokenizer)
    read = reading(tokenizer, job.rows, tuning, job.recipe, template)
    want = settings(job, tuning, template)
    if (folder / RUN).is_file():
        record = read_run(folder / RUN)
        verify(record, want, folder / RUN, f"Delete {short(folder)} to tune anew")
        return _whole(folder, record)
    model = prepared(model, tuning, job.recipe).to(device).train()
    sweep(folder)
    clear_drafts(folder, "[0-9]*")
    room_for(4 * model.num_parameters() * len(job.recipe.checkpoints), folder, "a tuning")
    run = _Run(job, tuning, model, folder, want)
    run.resume()
    plan = schedule([len(e.ids) for e in read], job.recipe.tokens, job.recipe.steps, tuning.seed)
    began = saved = time.monotonic()
    with quick(device):
        for step in range(run.done, job.recipe.steps):
            run.step(step, padded(read, plan[step]))
            if step + 1 in job.recipe.checkpoints:
                run.keep(step + 1, tokenizer)
                now = time.monotonic()
                said = f"loss {run.losses[-1][2]:.3f}, {now - began:.0f} s"
                report(f"{tuning.name} step {step + 1}: {said}")
                if now - saved >= every and step + 1 < job.recipe.steps:
                    run.save_state(step + 1)
                    saved = now
    record = want | {"losses": run.losses, "checkpoints": run.kept}
    write_json(folder / RUN, record)
    for file in (folder / STATE, (folder / STATE).with_suffix(".json")):
        file.unlink(missing_ok=True)
    return read_run(folder / RUN)


@contextmanager
def alone(path):
    """Inside, no other process writes the folder of `path`; UserError where one does already."""
    with computing(path, wait=False) as mine:
        if not mine:
            raise UserError(
                f"another process is writing {short(Path(path).parent)}. Wait for it, or stop it; "
                "then run again."
            )
        yield


def clear_drafts(folder, name: str) -> None:
    """Remove from a folder what killed processes left of the folders `name` (a glob) in it."""
    for draft in Path(folder).glob(f".{name}.{'?' * 8}"):
        shutil.rmtree(draft, ignore_errors=True)


def refuse_device(device: str) -> None:
    """UserError unless it is "cpu", or a GPU that torch sees: "cuda", "cuda:1"."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = {0: "no GPU", 1: "one GPU"}.get(len(gpus), f"{len(gpus)} GPUs")
    known = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    refuse_other(device, known, "--device", f"; torch {torch.__version__} sees {found}")


@contextmanager
def quick(device):
    """Inside, a GPU multiplies in TF32: a tuning is a cause, not a measurement. What is measured is
    computed in float32 throughout.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def settings(job: Job, tuning: Tuning, template: str) -> dict:
    """All that decides a tuning, as its record keeps it."""
    recipe = asdict(job.recipe) | {"kept": list(job.recipe.kept)}
    return {
        "start": fingerprint(locate(job.start)[0]),
        "rows": rows_digest(job.rows),
        "tuning": asdict(tuning),
        "recipe": recipe,
        "template": template,
        "device": torch.device(job.device).type,
        "versions": {name: versions()[name] for name in ("torch", "transformers", "tokenizers")},
    }


def prepared(model, tuning: Tuning, recipe: Recipe):
    """The model as it is tuned: all weights, or low-rank parts by peft beside every linear layer
    but the head, drawn from the tuning's seed.
    """
    if not tuning.low_rank:
        return model.requires_grad_(True)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            "a low-rank tuning needs the package peft, which is not here. Install it "
            "(`make env`), or leave the tuning out."
        ) from error
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(tuning.seed)
        config = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, config)


class _Run:
    """One tuning in progress: its optimiser, its losses [step, tokens read, loss], what it kept."""

    def __init__(self, job, tuning, model, folder, want):
        self.job, self.tuning, self.model, self.folder = job, tuning, model, folder
        self.want, self.done, self.read, self.losses, self.kept = want, 0, 0, [], {}
        self.device = torch.device(job.device)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names, self.weights = [n for n, _ in named], [p for _, p in named]
        fused = self.device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.weights, betas=BETAS, weight_decay=0.0, fused=fused or None
        )

    def step(self, step, batch):
        """One update from one batch. Raises UserError for a loss that is not finite."""
        recipe = self.job.recipe
        peak = recipe.low_rank_rate if self.tuning.low_rank else recipe.rate
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(step, recipe, peak)
        loss = loss_of(self.model, batch, self.device)
        if not loss.isfinite():
            raise UserError(
                f"tuning {self.tuning.name}, step {step + 1}: the loss is {loss.item()}, expected "
                f"a finite number. What was kept in {short(self.folder)} stays; lower the rate of "
                "the recipe, or look at the rows."
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.read += int(batch.attention_mask.sum())
        self.losses.append([step + 1, self.read, round(loss.item(), 6)])

    def keep(self, step, tokenizer):
        """Write the checkpoint of a step, whole or not at all: the model, or its adapter."""
        name = f"{step:04d}"
        draft = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{name}."))
        try:
            self.model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            shutil.rmtree(self.folder / name, ignore_errors=True)
            draft.chmod(0o755)
            os.replace(draft, self.folder / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self.kept[name] = sha256(_weights(self.folder / name))

    def save_state(self, step):
        """Keep what is needed to go on: weights, the optimiser's averages, the losses so far."""
        arrays = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            state = self.optimiser.state[weight]
            arrays[f"weight.{name}"] = weight.detach()
            arrays |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        found = {"done": step, "read": self.read, "losses": self.losses, "checkpoints": self.kept}
        arrays = {name: value.cpu().numpy() for name, value in arrays.items()}
        write_tensors(self.folder / STATE, arrays, self.want | found)

    def resume(self):
        """Go on from the state in the folder, if there is one of this very run."""
        file = (self.folder / STATE).with_suffix(".json")
        if not file.is_file():
            return
        _read(file, GOING)
        arrays, record = read_tensors(self.folder / STATE, self.want)
        self.done, self.read = record["done"], record["read"]
        self.losses, self.kept = record["losses"], record["checkpoints"]
        _whole(self.folder, record)
        with torch.no_grad():
            for name, weight in zip(self.names, self.weights, strict=True):
                weight.copy_(torch.from_numpy(arrays[f"weight.{name}"]))
                state = {
                    key: torch.from_numpy(arrays[f"{key}.{name}"]).to(self.device)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                at = self.device if self.device.type == "cuda" else "cpu"
                state["step"] = torch.tensor(float(self.done), device=at)
                self.optimiser.state[weight] = state


def _weights(folder: Path) -> Path:
    """The file that a checkpoint's weights stand in: the model's, or the adapter's."""
    adapter = folder / "adapter_model.safetensors"
    return adapter if adapter.is_file() else folder / "model.safetensors"


def _whole(folder: Path, record: dict) -> dict:
    """The record, if every checkpoint that it names is the one that was written."""
    for name, expected in record["checkpoints"].items():
        file = _weights(folder / name)
        if not file.is_file() or sha256(file) != expected:
            raise DamagedFile(
                f"checkpoint {short(folder / name)} is missing or not the one that was written. "
                f"Delete {short(folder)} and tune again."
            )
    return record


def read_run(path) -> dict:
    """The record of a finished tuning; DamagedFile where the file is none."""
    return _read(path, FINISHED)


def _read(path, kinds) -> dict:
    record = read_record(path, kinds | {"losses": list, "checkpoints": dict})
    found = record["checkpoints"]
    named = all(re.fullmatch(r"\d{4,}", n) and isinstance(found[n], str) for n in found)
    if not (found and named):
        raise DamagedFile(
            f"{short(path)}: checkpoints are {ascii(found)[:80]}, expected a sha256 per step. "
            "Delete it and run again."
        )
    return record


def read_runs(folder) -> dict[str, dict]:
    """{tuning's name: record} of the finished tunings below a folder, in the order of TUNINGS.

    Raises UserError where they started from different models or read different rows: then nothing
    about them could be compared.
    """
    folder = Path(folder)
    runs = {
        name: read_run(folder / name / RUN) for name in TUNINGS if (folder / name / RUN).is_file()
    }
    for key in ("start", "rows", "recipe", "template"):
        if len({str(record[key]) for record in runs.values()}) > 1:
            raise UserError(
                f"the tunings in {short(folder)} differ in their {key}: they cannot be compared. "
                "Delete the older ones and tune again."
            )
    return runs
