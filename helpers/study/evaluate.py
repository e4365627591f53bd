"""How well a model does, intact or ablated: loss of references and of plain text, greedy answers
and their scores.
"""

import numpy as np
import pandas as pd
import torch

from ..bars import bar, moved
from ..capture.bank import FUSED
from ..capture.beginnings import Split, begin, split
from ..capture.budget import altered, mark
from ..capture.count import refuse_long, refuse_nothing
from ..capture.interventions import Places, ablate, intact
from ..capture.losses import proven_head, refuse_silent, sequence_losses
from ..capture.tokens import Encoded, encode, list_of, refuse_unknown
from ..hexainst.checkers import check
from ..record import UserError
from .losses import Losses
from .reading import encode_bare, with_end

ROUNDING = 3e-6  # nats per token: about how far losses move where sets share a pass
WHERE = ("everywhere", "all but the first", "prompt", "response")  # where an ablation acts


@torch.no_grad()
def _nll(model, read: Split, places: Places | None = None) -> np.ndarray:
    """Losses of all rows of a split, copies one after another, float64 [copies * I]."""
    begun, found = None, np.empty(read.rows)
    if read.beginning is not None:
        _act(places, read, read.beginning)
        begun = begin(model, read.beginning)
    for batch in bar(read.batches, "losses", delay=5, unit=" batches"):
        _act(places, read, batch)
        if begun is not None:
            begun.sets = read.sets(batch)
        found[batch.rows] = sequence_losses(model, batch, begun=begun).numpy()
    return found


def _act(places, read, batch) -> None:
    if places is None:
        return
    everywhere = torch.ones_like(batch.input_ids)
    mask = everywhere if batch.group_mask is None else batch.group_mask[:, 0]
    places.mask, places.sets = mask.bool(), read.sets(batch)


def nll(model, encoded, batch_tokens: int = 8192) -> np.ndarray:
    """Teacher-forced mean NLL per counted token of each sequence, in nats, float64 [I], in order.

    Sequences of like length share a batch, padded on the right; a beginning that all of them share
    is read once. Raises UserError for a sequence that has no loss, or that the model cannot read.
    """
    refuse_long(model, encoded)
    refuse_unknown(model, encoded)
    refuse_silent(encoded)
    return _nll(model, split(model, encoded, batch_tokens))


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
    encoded = encode(tokenizer, texts)
    refuse_nothing(encoded)
    return nll(model, encoded, batch_tokens)


def task_scores(rows, answers, run_code: bool = False) -> np.ndarray:
    """Score in [0, 1] of each answer by its row's checker, float [I]; NaN where that would run
    code and may not.
    """
    answers = list_of(answers, "answers")
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
    the intact NLL is the list attrs["baseline"]. References are encoded once for all, sets share
    passes where they may, and the study remembers what a set costs these rows. `options` go to
    `ablate`. where: at which tokens the set is ablated, one of WHERE. Raises RuntimeError if a
    non-empty set changes no row (by more than ROUNDING, if sets share passes); `allow_inert`
    permits sets that may be dead.
    """
    model, rows = study.model(variant)[0], study.rows
    proven_head(model)  # runs the model as it is: not under an ablation
    encoded = study.encoded("reference" if eos else "response", variant)
    refuse_long(model, encoded, rows["id"])
    baseline = _intact(study, encoded, variant, apart=operator != "resample")
    at = _marked(study, variant, encoded, where)
    found = _ablated(study, at, masks, operator, variant, where=where, **options)
    rounding = ROUNDING if _together(model, masks.values(), operator, **options) else 0.0
    increase = {}
    for name, losses in found.items():
        increase[name] = losses - baseline
        inert = allow_inert or not any(np.any(part) for part in masks[name].values())
        _believable(increase[name], name, inert, rounding)
    frame = pd.DataFrame(increase, index=pd.Index(rows["id"], name="id"))
    frame.attrs["baseline"] = baseline.tolist()
    return frame


def _intact(study, encoded, variant="tuned", apart=True) -> np.ndarray:
    """Losses of sequences, one for each of a study's rows, float64 [I], kept; apart: as `split`
    takes it, so that what is compared is read alike.
    """
    model = study.model(variant)[0]
    read = split(model, encoded, study.profile.batch_tokens, apart)
    return _kept(study, variant, [_digest(study, read)], lambda _: [_nll(model, read)])[0]


def _ablated(study, encoded, masks: dict, operator, variant="tuned", where=WHERE[0], **options):
    """{name: losses of the sequences under each ablated set, float64 [I]}, kept.

    About as many sets as a batch holds are read together.
    """
    model, budget = study.model(variant)[0], study.profile.batch_tokens
    read = split(model, encoded, budget, apart=operator != "resample")
    single = not _together(model, masks.values(), operator, **options)
    most = 1 if single else max(1, budget // read.tokens)
    here = _digest(study, read)
    keys = [f"{here}/{operator}/{_mark(mask, **options)}" for mask in masks.values()]
    of_key = dict(zip(keys, masks.values(), strict=True))

    def measured(missing):
        with bar(
            None, f"{study.name} ablations", total=len(missing), delay=5, unit=" sets"
        ) as told:
            for start in range(0, len(missing), most):
                some = missing[start : start + most]
                under = [of_key[key] for key in some]
                yield from _under(model, encoded, under, operator, where, budget, **options)
                told.update(len(some))

    found = dict(zip(masks, _kept(study, variant, keys, measured), strict=True))
    moved(len(masks) * len(encoded))
    return found


def _together(model, masks, operator, how="auto", **options) -> bool:
    """Whether sets may share a pass: not of whole experts, nor of neurons in experts that do not
    run fused, nor under "resample", which draws anew for each token of each row, nor in half
    precision, where batches of another shape round apart.
    """
    families = {family for mask in masks for family in mask}
    fused = getattr(model.config, "_experts_implementation", None) in FUSED
    apart = "experts" in families or "expert" in families and not fused
    wide = model.dtype in (torch.float32, torch.float64)
    return wide and not apart and operator != "resample" and how != "weights"


def _under(model, encoded, masks, operator, where, budget, **options) -> np.ndarray:
    """Losses of the sequences under each of K ablated sets, read together, float64 [K, I]."""
    several = len(masks) > 1
    read = split(model, encoded, budget, operator != "resample", len(masks))
    places = Places() if several or where != WHERE[0] else None
    mask = masks if several else masks[0]
    with ablate(model, mask, operator, where=places, **options), altered(model, where):
        return _nll(model, read, places).reshape(len(masks), -1)


def _kept(study, variant, keys, compute) -> list[np.ndarray]:
    """Losses under each key: `study.lost`; all computed, and none kept, while the model is altered
    or a hook of someone's is on it.
    """
    if intact(study.model(variant)[0]):
        return study.lost(keys, compute, variant)
    return Losses()(keys, compute)


def _digest(study, read: Split) -> str:
    """A digest of a study's rows and of what is read of them, batch by batch: which tokens, which
    of them count, and where an ablation acts.
    """
    batches = read.batches if read.beginning is None else [read.beginning, *read.batches]
    fields = ("rows", "input_ids", "attention_mask", "count_mask", "group_mask")
    parts = [getattr(batch, name) for batch in batches for name in fields]
    return mark(study.places, *(part for part in parts if part is not None))


def _mark(mask, reference=None, **options) -> str:
    """A digest of a mask, the order of its families, the options of `ablate`, and what the
    reference holds.
    """
    held = () if reference is None else (reference.mean, reference.draws, reference.filled)
    return mark("/".join(mask), mask, options, *held)


def _marked(study, variant, encoded, where) -> list[Encoded]:
    """The sequences, with the tokens at one of WHERE as their only position group; as they are for
    everywhere.
    """
    if where == "everywhere":
        return encoded
    if where not in WHERE:
        raise UserError(f"where is {where!r}, expected one of {', '.join(WHERE)}.")
    found = []
    for one, prompt in zip(encoded, study.encoded("prompt", variant), strict=True):
        after = len(one.ids) - len(prompt.ids)
        at = {
            "all but the first": (False, *[True] * (len(one.ids) - 1)),
            "prompt": (*prompt.counted, *[False] * after)[: len(one.ids)],
            "response": one.counted,
        }
        found.append(Encoded(one.ids, one.counted, {"where": at[where]}))
    return found


def gain_lost(study, masks: dict, operator: str = "zero", variant: str = "tuned") -> np.ndarray:
    """How much instruction gain each ablated set takes away, nats per reference token, [I, sets].

    A row's gain is the loss of its reference after the instruction of the next row of its category
    minus the loss after its own; lost is gain intact minus gain ablated. Rows of a category that
    has one row gain nothing and lose nothing. (Ours.)
    """
    rows = study.rows
    after = rows.groupby("category")["instruction"].transform(lambda x: np.roll(x, -1))
    given = rows.groupby("category")["input"].transform(lambda x: np.roll(x, -1))
    other = study.reading_of(rows.assign(instruction=after, input=given), variant)
    own = study.encoded("reference", variant)
    return np.subtract(*(_risen(study, read, masks, operator, variant) for read in (own, other)))


def damage_split(
    study, masks: dict, operator: str = "zero", variant: str = "tuned"
) -> dict[str, np.ndarray]:
    """What each ablated set does to the loss of references, nats per reference token, [I, sets]
    each: "whole", after the row's own instruction; "language", after the template around nothing;
    "following", the first minus the second. Raises NotTestable: see `encode_bare`. (Ours.)
    """
    tokenizer = study.model(variant)[1]
    bare = with_end(tokenizer, encode_bare(tokenizer, study.rows, study.template))
    own = study.encoded("reference", variant)
    whole, language = (_risen(study, read, masks, operator, variant) for read in (own, bare))
    return {"whole": whole, "language": language, "following": whole - language}


def _risen(study, encoded, masks, operator, variant) -> np.ndarray:
    """By how much each ablated set raises the losses of what is read, [I, sets]."""
    model = study.model(variant)[0]
    refuse_long(model, encoded, study.rows["id"])
    proven_head(model)
    intact = _intact(study, encoded, variant)
    under = _ablated(study, encoded, masks, operator, variant)
    risen = [losses - intact for losses in under.values()]
    return np.array(risen).reshape(len(masks), len(study.rows)).T


def _believable(increase, name, may_be_inert, rounding=0.0):
    if not np.isfinite(increase).all():
        raise RuntimeError(
            f"ablating the set {name!r} made the loss of some row NaN or infinite; "
            "expected finite losses. A half-precision model may overflow: load it wider."
        )
    if not (np.abs(increase).max() > rounding or may_be_inert):
        raise RuntimeError(
            f"ablating the set {name!r} changed the loss of none of {len(increase)} rows. Either "
            "no token reaches its components (allow_inert=True lets that stand), or the "
            "intervention missed the model."
        )
