"""Greedy answers of a model."""

from dataclasses import replace

import torch
from tqdm import tqdm

from ..capture.budget import reading
from ..capture.counter import longest
from ..capture.selfcheck import greedy, left_padding_is_neutral
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
    meanwhile (see `greedy`): base and tuned are decoded alike. (Ours.)
    """
    refuse_no_room(model, encoded, max_new_tokens)
    end, device = model.generation_config.eos_token_id, input_device(model)
    stops, out = set(end if isinstance(end, list) else [end]) - {None}, [[] for _ in encoded]
    batches = _batches(model, encoded, batch_tokens, max_new_tokens)
    bar = tqdm(total=len(encoded), desc="answers", unit=" instructions", delay=5, leave=False)
    with bar, greedy(model, max_new_tokens=max_new_tokens, eos_token_id=end):
        for batch in batches:
            ids, mask = batch.input_ids, batch.attention_mask
            with reading(model, ids, mask, "answers") as behind:
                told = model.generate(ids.to(device), attention_mask=mask.to(device))
                for row, new in zip(batch.rows, told[:, ids.shape[1] :].tolist(), strict=True):
                    out[row] = new[: next((i for i, t in enumerate(new) if t in stops), len(new))]
                    behind.append(len(out[row]))
            bar.update(len(batch.rows))
    return out


def _batches(model, encoded, batch_tokens, ahead):
    """Batches to be generated from, padded on the left; of one length each where that would move
    the positions of a model's tokens.
    """
    lengths = {len(one.ids) for one in encoded}
    moved = len(lengths) > 1 and not left_padding_is_neutral(model)
    for length in sorted(lengths, reverse=True) if moved else [None]:
        here = [i for i, one in enumerate(encoded) if length in (None, len(one.ids))]
        some = [encoded[i] for i in here]
        for batch in token_batches(some, batch_tokens, "left", ahead, LOOSE):
            yield replace(batch, rows=[here[row] for row in batch.rows])


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
