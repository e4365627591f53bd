"""How well a model does, intact or ablated: loss of references and of plain text, greedy answers
and their scores.
"""

from functools import partial

import numpy as np
import pandas as pd
import torch

from ..bars import bar
from ..capture.budget import altered, mark, state
from ..capture.interventions import Places, ablate
from ..capture.losses import proven_head, sequence_losses
from ..capture.tokens import Batch, encode, token_batches
from ..hexainst.checkers import check
from ..record import UserError

WHERE = ("everywhere", "all but the first", "prompt", "response")  # where an ablation acts


@torch.no_grad()
def _nll(model, prepared: list[Batch], places: Places | None = None, where=()) -> np.ndarray:
    found = []
    for i, batch in enumerate(bar(prepared, "losses", delay=5, unit=" batches")):
        if places is not None:
            places.mask = where[i]
        found.append(sequence_losses(model, batch))
    found = torch.cat(found).numpy()
    out = np.empty_like(found)
    out[[row for batch in prepared for row in batch.rows]] = found
    return out


def nll(model, encoded, batch_tokens: int = 8192) -> np.ndarray:
    """Teacher-forced mean NLL per counted token of each sequence, in nats, float64 [I], in order.

    Sequences of like length share a batch, padded on the right.
    """
    return _nll(model, list(token_batches(encoded, batch_tokens)))


def reference_nll(study, variant: str = "tuned", eos: bool = True) -> np.ndarray:
    """`nll` of the reference of each of a study's rows, float64 [I]; eos: the end-of-sequence token
    is one of its tokens (see encode_rows). False is for models never tuned on it.
    """
    encoded = study.encoded("reference" if eos else "response", variant)
    return nll(study.model(variant)[0], encoded, study.profile.batch_tokens)


def plain_text_nll(model, tokenizer, texts, batch_tokens: int = 8192) -> np.ndarray:
    """Mean NLL per token of each bare text (no template, no eos), nats, float64 [texts]: is it
    language that broke?
    """
    return nll(model, encode(tokenizer, list(texts)), batch_tokens)


def task_scores(rows, answers, run_code: bool = False) -> np.ndarray:
    """Score in [0, 1] of each answer by its row's checker, float [I]; NaN where that would run
    code and may not.
    """
    if len(rows) != len(answers):
        raise UserError(
            f"task_scores: {len(answers)} answers to {len(rows)} rows. Give one answer per row."
        )
    pairs = zip(rows.to_dict("records"), answers, strict=True)
    return np.array([check(row, answer, run_code) for row, answer in pairs], dtype=float)


def scored(study, variant: str = "tuned", answers=None) -> pd.DataFrame:
    """A row per row of the study: id, half, category, pair, model, answer, score in [0, 1] (NaN
    where the checker would run code and may not). answers: where none are given, those kept.
    """
    answers = study.answers(variant) if answers is None else answers
    return study.rows[["id", "half", "category"]].assign(
        pair=study.name,
        model=variant,
        answer=answers,
        score=task_scores(study.rows, answers, study.profile.run_code),
    )


def accuracy(scores: pd.DataFrame, by, categories) -> pd.DataFrame:
    """Mean score, a row per value of the columns `by` and a column per category; NaN where nothing
    could be scored.
    """
    means = scores.groupby([*by, "category"], sort=False)["score"].mean().unstack()
    return means.reindex(columns=pd.Index(categories, name="category")).sort_index()


def ablation_matrix(
    study,
    masks: dict,
    operator: str,
    variant: str = "tuned",
    *,
    eos: bool = True,
    allow_inert: bool = False,
    where: str = "everywhere",
    **options,
) -> pd.DataFrame:
    """NLL increase (ablated minus intact, nats per reference token) of each of a study's rows under
    every ablated set.

    masks: {name: component mask}. Returns float64 [I, sets], index the ids, columns the names;
    the intact NLL is the list attrs["baseline"]. References are encoded once for all, and the study
    remembers what a set costs these rows. `options` go to `ablate`. where: at which tokens the set
    is ablated, one of WHERE. Raises RuntimeError if a non-empty set changes no row at all;
    `allow_inert` permits sets that may be dead.
    """
    model, rows = study.model(variant)[0], study.rows
    proven_head(model)  # runs the model as it is: not under an ablation
    encoded = study.encoded("reference" if eos else "response", variant)
    prepared = list(token_batches(encoded, study.profile.batch_tokens))
    places, masks_at = _places(study, variant, prepared, where)

    def ablated(mask):
        with ablate(model, mask, operator, where=places, **options), altered(model, where):
            return _nll(model, prepared, places, masks_at)

    intact, read = _read(study, prepared), _read(study, prepared, masks_at)
    known = partial(_known, study, variant)
    baseline, increase = known((intact,), lambda: _nll(model, prepared)), {}
    for name in bar(masks, f"{study.name} ablations", delay=5, unit=" sets"):
        key = (read, operator, _mark(masks[name], **options))
        increase[name] = known(key, partial(ablated, masks[name])) - baseline
        inert = allow_inert or not any(np.any(part) for part in masks[name].values())
        _believable(increase[name], name, inert)
    frame = pd.DataFrame(increase, index=pd.Index(rows["id"], name="id"))
    frame.attrs["baseline"] = baseline.tolist()
    return frame


def _known(study, variant, key, compute):
    """`compute()`, or what the study keeps under this key; nothing is kept while the model is
    altered, or a hook of someone's is on it.
    """
    model = study.model(variant)[0]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    if state(model) or hooked:
        return compute()
    return study.lost("/".join(key), compute, variant)


def _read(study, prepared: list[Batch], masks_at=()) -> str:
    """A digest of a study's rows and of what is read of them, batch by batch: which tokens, which
    of them count, and where an ablation acts.
    """
    parts = [(b.rows, b.input_ids, b.attention_mask, b.count_mask) for b in prepared]
    return mark(study.places, *(array for part in parts for array in part), *masks_at)


def _mark(mask, reference=None, **options) -> str:
    """A digest of a mask, the order of its families, the options of `ablate`, and what the
    reference holds.
    """
    held = () if reference is None else (reference.mean, reference.draws, reference.filled)
    return mark("/".join(mask), mask, options, *held)


def _places(study, variant, prepared, where) -> tuple:
    """(Places, a mask [B, T] for each batch) of one of WHERE; (None, ()) for everywhere."""
    if where == "everywhere":
        return None, ()
    if where not in WHERE:
        raise UserError(f"where is {where!r}, expected one of {', '.join(WHERE)}.")
    prompts, found = study.encoded("prompt", variant), []
    for batch in prepared:
        mask = batch.attention_mask.bool()
        if where == "all but the first":
            mask = mask & (batch.attention_mask.cumsum(1) > 1)
        if where == "response":
            mask = batch.count_mask.bool()
        if where == "prompt":
            mask = torch.zeros_like(mask)
            for b, row in enumerate(batch.rows):
                counted = torch.tensor(prompts[row].counted)
                mask[b, : len(counted)] = counted
        found.append(mask)
    return Places(), found


def gain_lost(study, masks: dict, operator: str = "zero", variant: str = "tuned") -> np.ndarray:
    """How much instruction gain each ablated set takes away, nats per reference token, [I, sets].

    A row's gain is the loss of its reference after the instruction of the next row of its category
    minus the loss after its own; lost is gain intact minus gain ablated. Rows of a category that
    has one row gain nothing and lose nothing. (Ours.)
    """
    rows, model = study.rows, study.model(variant)[0]
    proven_head(model)
    after = rows.groupby("category")["instruction"].transform(lambda x: np.roll(x, -1))
    given = rows.groupby("category")["input"].transform(lambda x: np.roll(x, -1))
    other = study.reading_of(rows.assign(instruction=after, input=given), variant)
    size = study.profile.batch_tokens
    prepared = [list(token_batches(e, size)) for e in (study.encoded("reference", variant), other)]
    read = [(_read(study, some), some) for some in prepared]

    def losses(mask, key):
        def ablated(some):
            with ablate(model, mask, operator):
                return _nll(model, some)

        return [_known(study, variant, (of, *key), partial(ablated, some)) for of, some in read]

    intact, lost = losses({}, ()), np.zeros((len(rows), len(masks)))
    for n, name in enumerate(bar(masks, f"{study.name} gains", delay=5)):
        own, others = losses(masks[name], (operator, _mark(masks[name])))
        lost[:, n] = (own - intact[0]) - (others - intact[1])
    return lost


def _believable(increase, name, may_be_inert):
    if not np.isfinite(increase).all():
        raise RuntimeError(
            f"ablating the set {name!r} made the loss of some row NaN or infinite; "
            "expected finite losses. A half-precision model may overflow: load it wider."
        )
    if not (increase.any() or may_be_inert):
        raise RuntimeError(
            f"ablating the set {name!r} changed the loss of none of {len(increase)} rows. Either "
            "no token reaches its components (allow_inert=True lets that stand), or the "
            "intervention missed the model."
        )
