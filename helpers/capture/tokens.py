"""Texts to token ids: encoded with position masks, padded into batches."""

from dataclasses import dataclass

import torch

from ..record import UserError


def check_tokenizer(tokenizer, model) -> None:
    """Raise UserError if the tokenizer gives no character offsets, or has more words than the
    model embeddings.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets: the instruction's own tokens cannot "
            "be told from the template's. Use a fast tokenizer (one with a tokenizer.json)."
        )
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows} embeddings: they do not "
            "belong together. Load both from one checkpoint."
        )


@dataclass(frozen=True)
class Encoded:
    """One sequence: token ids [T], and for each token whether its activations are counted [T]."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Padded sequences. `rows` [B] are their places in the list that was batched; masks [B, T]
    hold 0 and 1.
    """

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    count_mask: torch.Tensor


def encode(tokenizer, texts, *, template: str = "{instruction}", responses=None) -> list[Encoded]:
    """Token ids of template-wrapped texts, and which tokens count.

    Without `responses` those of the text itself count: neither BOS nor the template's words; a
    token that holds at least one character of the text is the text's. With responses, exactly
    theirs count: strings are read after the prompt and one space (none if the template ends in
    white space), lists of token ids are appended as they are. Raises UserError for an empty text
    or a text or response without a token of its own. (Paper, sec. counting.)

    >>> encode(tokenizer, ["Add 1 and 2."], template="Instruction: {instruction}")      # doctest: +SKIP
    [Encoded(ids=(1, 7, 8, 20, ...), counted=(False, False, False, True, ...))]
    """
    if template.count("{instruction}") != 1:
        raise UserError(f"template {template!r} must hold {{instruction}} once.")
    head, tail = template.split("{instruction}")
    gap, plain = "" if tail[-1:].isspace() else " ", [None] * len(texts)
    special = tokenizer.bos_token is None or not head.startswith(tokenizer.bos_token)
    encoded = []
    for row, (text, response) in enumerate(
        zip(texts, plain if responses is None else responses, strict=True)
    ):
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"text {row} is {text!r}: an empty instruction has no tokens to count. Remove the row."
            )
        prompt = head + text + tail
        start, end, full = len(head), len(head) + len(text), prompt
        if isinstance(response, str):
            start, full = len(prompt + gap), prompt + gap + response
            end = len(full)
        ids, counted = _marked(tokenizer, full, special, start, end)
        if response is not None and not isinstance(response, str):
            ids, counted = ids + list(response), [False] * len(ids) + [True] * len(response)
        elif not any(counted):
            raise UserError(
                f"text {row} ({full[:60]!r}) yields no counted token with {type(tokenizer).__name__}. "
                "Remove the row, or use the tokenizer that belongs to the model."
            )
        encoded.append(Encoded(tuple(ids), tuple(counted)))
    return encoded


def _marked(tokenizer, full, special, start, end):
    """Token ids of `full`, without what a tokenizer puts behind it, and which of them hold a
    character of start:end.

    Some tokenizers trim white space from offsets until (of a code's indentation) nothing is left;
    such a token holds the characters since the last one.
    """
    tokens = tokenizer(
        full,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, added, counted, last = list(tokens["input_ids"]), tokens["special_tokens_mask"], [], 0
    for (a, b), extra in zip(tokens["offset_mapping"], added, strict=True):
        counted.append(not extra and max(a if a < b else min(last, a), start) < min(b, end))
        last = last if extra else max(last, b)
    size = max((i + 1 for i, extra in enumerate(added) if not extra), default=0)
    return ids[:size], counted[:size]


def batches(encoded: list[Encoded], batch_size: int = 32, side: str = "right"):
    """Yield Batches of at most `batch_size` sequences of like length, longest first, padded on
    `side`.

    Padding is what the attention mask says it is, never a token id (it is filled with id 0).
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        length = len(encoded[rows[0]].ids)
        ids, mask, count = torch.zeros(3, len(rows), length, dtype=torch.long)  # [B, T] each
        for b, row in enumerate(rows):
            n = len(encoded[row].ids)
            at = slice(0, n) if side == "right" else slice(length - n, length)
            ids[b, at], mask[b, at] = torch.tensor(encoded[row].ids), 1
            count[b, at] = torch.tensor(encoded[row].counted, dtype=torch.long)
        yield Batch(rows, ids, mask, count)
