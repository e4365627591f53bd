"""Greedy answers of a model."""

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from ..capture.budget import reading
from ..capture.counter import longest
from ..capture.sites import input_device
from ..capture.tokens import Encoded, token_batches
from ..record import UserError
from .reading import encode_rows

LOOSE = 0.5  # of a batch may be padding: a step reads all weights, however few rows it is for
# An answer that passes one of these checkers is short: a label, a name, a number with little around
# it. What a model goes on to say after as many tokens is not read.
SHORT = {"label": 32, "short_answer": 32, "numeric": 64}


def new_tokens(row, most: int) -> int:
    """How many tokens the answer to a row may have: `most` (the profile's max_new_tokens), or fewer
    where the row's checker accepts short answers only (see SHORT).

    >>> [new_tokens({"checker": {"name": name}}, 256) for name in ("label", "exact")]
    [32, 256]
    """
    return min(most, SHORT.get(row["checker"]["name"], most))


def answer_ids(
    model, tokenizer, rows, template: str, batch_tokens: int, max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers to the rows' prompts as token ids, in row order, each within `new_tokens`."""
    encoded = encode_rows(tokenizer, rows, template)
    most, out = [new_tokens(row, max_new_tokens) for row in rows.to_dict("records")], {}
    for size in sorted(set(most)):
        here = [i for i, budget in enumerate(most) if budget == size]
        some = [encoded[i] for i in here]
        found = continuations(model, some, max_new_tokens=size, batch_tokens=batch_tokens)
        out |= dict(zip(here, found, strict=True))
    return [out[i] for i in range(len(encoded))]


def spoken(tokenizer, ids: list[list[int]]) -> list[str]:
    """Answers as text, without special tokens and outer white space."""
    return [answer.strip() for answer in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def greedy_answers(
    model, tokenizer, rows, template: str, batch_tokens: int, max_new_tokens: int
) -> list[str]:
    """`answer_ids` as text."""
    ids = answer_ids(model, tokenizer, rows, template, batch_tokens, max_new_tokens)
    return spoken(tokenizer, ids)


@torch.no_grad()
def continuations(
    model, encoded: list[Encoded], *, max_new_tokens: int, batch_tokens: int = 8192
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end-of-sequence token; order as given.
    Sampling and penalties that a chat model's own generation settings name are put aside
    meanwhile: base and tuned are decoded alike. (Ours.)
    """
    refuse_no_room(model, encoded, max_new_tokens)
    own, out, device = model.generation_config, [[] for _ in encoded], input_device(model)
    stops = set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]) - {
        None
    }
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=own.eos_token_id,
    )
    bar = tqdm(total=len(encoded), desc="answers", unit=" instructions", delay=5, leave=False)
    try:
        for batch in token_batches(encoded, batch_tokens, "left", max_new_tokens, LOOSE):
            ids, mask = batch.input_ids, batch.attention_mask
            with reading(model, ids, mask, "answers") as behind:
                told = model.generate(ids.to(device), attention_mask=mask.to(device))
                for row, new in zip(batch.rows, told[:, ids.shape[1] :].tolist(), strict=True):
                    out[row] = new[: next((i for i, t in enumerate(new) if t in stops), len(new))]
                    behind.append(len(out[row]))
            bar.update(len(batch.rows))
    finally:
        model.generation_config = own
        bar.close()
    return out


def refuse_no_room(model, encoded, new: int) -> None:
    """Raise UserError for prompts behind which a model cannot read `new` tokens."""
    most = longest(model)
    long = [n for n, one in enumerate(encoded) if len(one.ids) + new > most]
    if long:
        raise UserError(
            f"{len(long)} of {len(encoded)} prompts (the first is number {long[0]}, of "
            f"{len(encoded[long[0]].ids)} tokens) leave no room for {new} new tokens: "
            f"{type(model).__name__} reads {most} in all. Lower `max_new_tokens`, or leave these "
            "rows out."
        )
