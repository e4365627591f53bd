"""How well a model does, intact or ablated: loss of references and of plain text, greedy answers
and their scores.
"""

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from ..capture.interventions import ablate
from ..capture.sites import input_device
from ..capture.tokens import Batch, Encoded, batches, encode
from ..hexainst.checkers import check
from ..hexainst.corpus import texts
from ..record import UserError


def encode_references(tokenizer, profile, rows, eos: bool = True) -> list[Encoded]:
    """Prompts followed by their references; the reference's tokens are the counted ones.

    eos: the end-of-sequence token ends each reference and is counted, as fine-tuning taught the
    tuned model; so not to know where to stop costs. False leaves it out, for models never tuned on
    it. (Ours.)
    """
    encoded = encode(
        tokenizer, texts(rows), template=profile.template, responses=list(rows["reference"])
    )
    if not eos:
        return encoded
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{type(tokenizer).__name__} has no end-of-sequence token. Give one, or use eos=False."
        )
    return [Encoded((*e.ids, tokenizer.eos_token_id), (*e.counted, True)) for e in encoded]


def nll_of(model, batch: Batch) -> torch.Tensor:
    """Mean negative log-likelihood of each row's counted tokens, nats per token, float64 [B];
    keeps the autograd graph.

    A first token has nothing before it and never counts. Only the logits from the first counted
    token on are made.
    """
    device = input_device(model)
    ids, counted = batch.input_ids.to(device), batch.count_mask[:, 1:].bool().to(device)  # [B, T-1]
    tokens = counted.sum(1)
    if not tokens.all():
        raise UserError(
            "a row has no token whose loss could be counted: no reference, or a single token without BOS. "
            "Remove the row."
        )
    first = int(counted.any(0).nonzero()[0])
    logits = model(
        input_ids=ids,
        attention_mask=batch.attention_mask.to(device),
        use_cache=False,
        logits_to_keep=ids.shape[1] - first,
    ).logits[:, first - ids.shape[1] : -1]  # [B, T-1-first, V]
    counted = counted[:, first:]
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(
        logits[counted].to(wide), ids[:, first + 1 :][counted], reduction="none"
    ).cpu()
    total = torch.zeros(len(ids), dtype=torch.float64)
    return total.index_add(0, counted.nonzero()[:, 0].cpu(), loss.double()) / tokens.cpu()


@torch.no_grad()
def _nll(model, prepared: list[Batch]) -> np.ndarray:
    found = torch.cat([nll_of(model, batch) for batch in prepared]).cpu().numpy()
    out = np.empty_like(found)
    out[[row for batch in prepared for row in batch.rows]] = found
    return out


def reference_nll(
    model, tokenizer, profile, rows, batch_size: int | None = None, eos: bool = True
) -> np.ndarray:
    """Teacher-forced mean NLL per reference token, in nats, float64 [I] in the order of `rows`;
    see encode_references.

    Sequences of like length share a batch (profile.batch_size), padded on the right; the order is
    restored.
    """
    encoded = encode_references(tokenizer, profile, rows, eos)
    return _nll(model, list(batches(encoded, batch_size or profile.batch_size)))


def plain_text_nll(model, tokenizer, texts, batch_size: int = 32) -> np.ndarray:
    """Mean NLL per token of each bare text (no template, no eos), nats, float64 [texts]: is it
    language that broke?
    """
    return _nll(model, list(batches(encode(tokenizer, list(texts)), batch_size)))


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


def ablation_matrix(
    model,
    tokenizer,
    profile,
    rows,
    masks: dict,
    operator: str,
    *,
    eos: bool = True,
    allow_inert: bool = False,
    **options,
) -> pd.DataFrame:
    """NLL increase (ablated minus intact, nats per reference token) of every row under every
    ablated set.

    masks: {name: component mask}. Returns float64 [I, sets], index rows["id"], columns the names;
    the intact NLL is the list attrs["baseline"]. References are encoded once for all. `options` go
    to `ablate`. Raises RuntimeError if a non-empty set changes no row at all; `allow_inert`
    permits sets that may be dead.
    """
    prepared = list(batches(encode_references(tokenizer, profile, rows, eos), profile.batch_size))
    baseline, increase = _nll(model, prepared), {}
    for name, mask in masks.items():
        with ablate(model, mask, operator, **options):
            increase[name] = _nll(model, prepared) - baseline
        if not np.isfinite(increase[name]).all():
            raise RuntimeError(
                f"ablation_matrix: {operator!r} of the set {name!r} made the loss of some row NaN or "
                "infinite; expected finite losses. A half-precision model may overflow: load it wider."
            )
        if (
            not increase[name].any()
            and any(np.any(part) for part in mask.values())
            and not allow_inert
        ):
            raise RuntimeError(
                f"ablation_matrix: {operator!r} of the set {name!r} changed the loss of none of "
                f"{len(rows)} rows. Either no token reaches its components (allow_inert=True lets that "
                "stand), or the intervention missed the model."
            )
    frame = pd.DataFrame(increase, index=pd.Index(rows["id"], name="id"))
    frame.attrs["baseline"] = baseline.tolist()
    return frame
