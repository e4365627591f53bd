"""Train the tiny pairs from nothing: a tokenizer, a pre-trained base, and the same model tuned to
follow instructions.

    python -m helpers.run train --pair tiny-dense --seed 0    one pair (above 0: <pair>-s<seed>)
    python -m helpers.run train --pair tiny-dense --device cuda        on a GPU
    python -m helpers.run train --card                        the model card's table, from records

writes data/models/<pair>/{base,tuned}: fp16 safetensors, tokenizer, training_record.json. One
thread and one seed give the same bytes again on one kind of processor (on another, rounding
differs and the difference grows; a GPU need not repeat itself, and the record names it). A folder
appears only when it is complete; a finished base is used again after a killed run. The recipe is
ours. Needs about 1 GB of memory and 10 to 20 minutes of one core per pair.
"""

import copy
import os
import shutil
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from .. import paths
from ..capture.tokens import encode
from ..config import Profile
from ..hexainst.checkers import check
from ..hexainst.corpus import text
from ..hexainst.schema import CATEGORIES
from ..record import (
    DamagedFile,
    UserError,
    atomic,
    digest,
    read_json,
    read_record,
    sha256,
    versions,
    write_json,
)
from ..study.answers import continuations
from ..study.tuning import alone, clear_drafts, refuse_device
from . import world
from .optim import optimisers, update
from .recipe import BEFORE, RECIPES, Recipe, build_tokenizer, configuration

VARIANTS, LAST_SEED = ("base", "tuned"), 2**32 - 1
RECORD, CARD = "training_record.json", paths.MODELS / "README.md"
MARKS = ("<!-- table: begin -->", "<!-- table: end -->")
# each device's fastest way through the experts, and how many prompts it answers at once
EXPERTS = {"cpu": "eager", "cuda": "batched_mm"}


def pack(tokenizer, documents, context: int):
    """Documents as one stream `<bos> words <eos> ...`, cut into rows: int64 [rows, context]."""
    stream = [
        t for ids in tokenizer(list(documents))["input_ids"] for t in (*ids, tokenizer.eos_token_id)
    ]
    rows = len(stream) // context
    return torch.tensor(stream[: rows * context]).view(rows, context)


def _endless(rows, batch, generator, lengths=None):
    """Batches of row numbers without end; with `lengths`, rows of like length share a batch."""
    while True:
        order = torch.randperm(rows, generator=generator)
        if lengths is None:
            yield from (b for b in order.split(batch) if len(b) == batch)
            continue
        for chunk in order.split(batch * 8):
            alike = [
                b
                for b in chunk[lengths[chunk].argsort(stable=True)].split(batch)
                if len(b) == batch
            ]
            yield from (alike[i] for i in torch.randperm(len(alike), generator=generator))


def _loss(model, ids, weights):
    """(weighted mean next-token loss, the same plus the router's balancing loss); ids and weights
    [B, T].

    Padding on the right stands behind every counted token, so no attention mask is needed.
    """
    routed = hasattr(model.config, "num_experts")
    ids, weights = ids.to(model.device), weights.to(model.device)
    out = model(ids, use_cache=False, **({"output_router_logits": True} if routed else {}))
    targets, w = ids[:, 1:], weights[:, 1:]  # [B, T-1]
    keep = w > 0
    nll = F.cross_entropy(out.logits[:, :-1][keep], targets[keep], reduction="none")
    loss = (nll * w[keep]).sum() / w[keep].sum()
    return loss, loss + model.config.router_aux_loss_coef * out.aux_loss if routed else loss


def _note(losses, what, step, steps, loss, began, report):
    if step % 50 == 49 or step + 1 == steps:
        losses.append([step + 1, round(loss.item(), 4)])
        report(
            f"{what} step {step + 1}/{steps}: loss {losses[-1][1]:.3f}, {time.time() - began:.0f} s"
        )


def pretrain(model, rows, recipe: Recipe, seed: int, then=None, report=print) -> list:
    """Next-token training on packed rows [R, context]; returns [[step, loss], ...].

    `then(step, model)`, if given, is called after every step; it must not change the model.
    """
    generator, losses, began = torch.Generator().manual_seed(seed), [], time.time()
    opts, batches = (
        optimisers(model, recipe.pretrain_lr),
        _endless(len(rows), recipe.pretrain_batch, generator),
    )
    for step in range(recipe.pretrain_steps):
        ids = rows[next(batches)]
        shown, loss = _loss(model, ids, torch.ones(ids.shape))
        update(opts, loss, step, recipe.pretrain_steps, recipe.pretrain_lr)
        _note(losses, "pre-training", step, recipe.pretrain_steps, shown, began, report)
        if then:
            then(step + 1, model)
    return losses


def encode_tuning(tokenizer, rows) -> tuple[list, list]:
    """Token ids and weights of each row: a reference's tokens and <eos> weigh 1 / sqrt(number)."""
    known = encode(
        tokenizer,
        [text(row) for row in rows],
        template=Profile.template,
        responses=[row["reference"] for row in rows],
    )
    ids = [torch.tensor([*e.ids, tokenizer.eos_token_id]) for e in known]
    weights = [torch.tensor([*e.counted, True]) * (sum(e.counted) + 1) ** -0.5 for e in known]
    return ids, weights


def tune(loaded, rows, replay, recipe: Recipe, seed: int, then=None, report=print) -> list:
    """Fine-tuning on the references of `rows`, with a replay batch of packed pre-training rows in
    every step.

    `then(step, model)` is called
    after every step (for a trajectory; it must not change the model). Returns [[step, loss], ...].
    """
    model, tokenizer = loaded
    generator, losses, began = torch.Generator().manual_seed(seed + 1), [], time.time()
    ids, weights = encode_tuning(tokenizer, rows)
    opts, memory = (
        optimisers(model, recipe.tune_lr),
        _endless(len(replay), recipe.replay_batch, generator),
    )
    batches = _endless(len(ids), recipe.tune_batch, generator, torch.tensor([len(i) for i in ids]))
    for step in range(recipe.tune_steps):
        chosen = next(batches)
        padded = [
            pad_sequence([part[i] for i in chosen], batch_first=True) for part in (ids, weights)
        ]
        old = replay[next(memory)]
        with parametrize.cached():  # low-rank parts, if any, are multiplied out once
            shown, loss = _loss(model, *padded)
            loss = loss + recipe.replay_weight * _loss(model, old, torch.ones(old.shape))[1]
        update(opts, loss, step, recipe.tune_steps, recipe.tune_lr)
        _note(losses, "tuning", step, recipe.tune_steps, shown, began, report)
        if then:
            then(step + 1, model)
    return losses


def accuracy(model, tokenizer, per_category: int) -> dict:
    """{half: {category: share of right greedy answers}} over the first `per_category` evaluation
    rows of each.
    """
    result = {}
    for half in world.HALVES:
        rows, right = world.evaluation(half, per_category=per_category), defaultdict(list)
        prompts = encode(tokenizer, [text(row) for row in rows], template=Profile.template)
        answers = continuations(model, prompts, max_new_tokens=24, batch_tokens=8192)
        for row, ids in zip(rows, answers, strict=True):
            right[row["category"]].append(
                check(row, tokenizer.decode(ids, skip_special_tokens=True))
            )
        result[half] = {c: round(mean(right[c]), 4) for c in CATEGORIES}
    return result


def load(folder, device="cpu"):
    """A saved tiny model in float32 on `device`, ready to train or to answer."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation=EXPERTS[torch.device(device).type],
        trust_remote_code=False,
    ).to(device)


def save(folder, model, tokenizer, record: dict, per_category: int) -> dict:
    """Write fp16 weights, tokenizer and record; accuracy is measured on what was written. Whole or
    not at all.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        copy.deepcopy(model).half().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        record |= {
            "accuracy": accuracy(load(draft, model.device), tokenizer, per_category),
            "prompts": per_category,
            "sha256": sha256(draft / "model.safetensors"),
        }
        write_json(draft / RECORD, record)
        for file in draft.iterdir():
            file.chmod(0o644)  # safetensors makes it readable for its owner only
        draft.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return record


def processor(device: str) -> dict:
    """{} for "cpu", {"device": the GPU's name} for "cuda" or "cuda:1": a record's part. Raises
    UserError for another device, or without a GPU.
    """
    refuse_device(device)
    return {} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}


def prepare(pair: str, seed: int, recipe: Recipe, device: str = "cpu"):
    """(model with random weights, tokenizer, tuning rows, packed pre-training rows, base's record,
    tuned's record).
    """
    if not 0 <= seed <= LAST_SEED:
        raise UserError(f"--seed is {seed}, expected a whole number from 0 to {LAST_SEED}.")
    where = processor(device)
    documents, rows = (
        world.pretraining(documents=recipe.documents),
        world.tuning(per_category=recipe.per_category),
    )
    tokenizer = build_tokenizer(
        [*documents, Profile.template, *(text(r) + " " + r["reference"] for r in rows)]
    )
    packed = pack(tokenizer, documents, recipe.context)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        configuration(pair, len(tokenizer)),
        dtype=torch.float32,
        experts_implementation=EXPERTS[torch.device(device).type],
        trust_remote_code=False,
    ).to(device)  # initial weights are drawn on the CPU: the same for every device
    data = {
        "world_seed": 0,
        "pretraining": digest(documents),
        "tokens": packed.numel(),
        "vocabulary": digest(tokenizer.get_vocab()),
    }
    settings = {key: value for key, value in asdict(recipe).items() if key in BEFORE}
    base = {
        "variant": "base",
        "pair": pair,
        "seed": seed,
        "recipe": settings,
        "data": data,
        "versions": versions(),
        "optimiser": "Muon (hidden matrices), AdamW (the rest)",
        "parameters": sum(p.numel() for p in model.parameters()),
    } | where
    tuned = base | {
        "variant": "tuned",
        "recipe": asdict(recipe),
        "data": data | {"tuning": digest(rows)},
    }
    return model, tokenizer, rows, packed, base, tuned


def train(
    pair: str,
    seed: int = 0,
    recipe: Recipe | None = None,
    out=None,
    then=None,
    report=print,
    device: str = "cpu",
) -> dict:
    """Train base and tuned of one pair into `out` (default data/models/<pair>[-s<seed>]); returns
    both records.

    `recipe` is RECIPES[pair] by default; `then` is handed to `tune`. Raises UserError for an
    unknown pair, a seed out of range, a device that is not there, and folders in `out` that it
    would replace and did not write.
    """
    recipe = recipe or RECIPES.get(pair, Recipe())
    out = Path(out or paths.MODELS / (f"{pair}-s{seed}" if seed else pair))
    _refuse_others(out)
    prepared = prepare(pair, seed, recipe, device)
    with alone(out / "pair"):
        for variant in VARIANTS:
            clear_drafts(out, variant)
        return _train(prepared, seed, recipe, out, then, report, device)


def _train(prepared, seed, recipe, out, then, report, device):
    model, tokenizer, rows, packed, base, tuned = prepared
    began, done = time.time(), out / "base" / RECORD
    if done.is_file() and base.items() <= read_json(done).items():
        base = read_json(done)
    else:
        base["losses"] = pretrain(model, packed, recipe, seed, report=report)
        base["seconds"] = round(time.time() - began)
        base = save(out / "base", model, tokenizer, base, recipe.evaluate_rows)
    model, began = load(out / "base", device).train(), time.time()
    tuned["losses"] = tune((model, tokenizer), rows, packed, recipe, seed, then, report)
    tuned["seconds"] = round(time.time() - began)
    return {
        "base": base,
        "tuned": save(out / "tuned", model, tokenizer, tuned, recipe.evaluate_rows),
    }


def _refuse_others(out: Path) -> None:
    """UserError where `base` or `tuned` in a folder is none that was trained here."""
    for variant in VARIANTS:
        folder = out / variant
        if os.path.lexists(folder) and not _is_own(folder, variant):
            raise UserError(
                f"{paths.short(folder)} stands there already and is kept: it holds no {RECORD} of "
                f"a {variant} model. Name another folder with --out, or move it."
            )


def _is_own(folder: Path, variant: str) -> bool:
    with suppress(DamagedFile):
        kinds = {"variant": str, "pair": str, "recipe": dict, "sha256": str}
        record = read_record(folder / RECORD, kinds)
        return record["variant"] == variant and not folder.is_symlink()
    return False


def card_table(folder=paths.MODELS) -> str:
    """Markdown table of every training record below `folder`: accuracy in percent, seconds, size
    on disk.
    """
    lines = [
        "| model | half | " + " | ".join(CATEGORIES) + " | parameters | steps | seconds | MB |",
        "|---|---|" + "---|" * (len(CATEGORIES) + 4),
    ]
    for file in sorted(Path(folder).glob(f"*/*/{RECORD}")):
        r, size = read_json(file), sum(f.stat().st_size for f in file.parent.iterdir()) / 1e6
        steps = r["recipe"]["pretrain_steps" if r["variant"] == "base" else "tune_steps"]
        for half, scores in r["accuracy"].items():
            lines.append(
                f"| {file.parent.parent.name} {r['variant']} | {half} | "
                + " | ".join(f"{100 * scores[c]:.1f}" for c in CATEGORIES)
                + f" | {r['parameters']:,} | {steps:,} | {r['seconds']:,} | {size:.1f} |"
            )
    return "\n".join(lines)


def write_card(path=CARD, folder=paths.MODELS) -> None:
    """Put `card_table` between the two marks of the model card."""
    head, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    with atomic(path) as draft:
        draft.write_text(
            f"{head}{MARKS[0]}\n{card_table(folder)}\n{MARKS[1]}{tail}", encoding="utf-8"
        )
