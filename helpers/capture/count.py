"""Counts of any causal language model on any texts, once it is proven that the model is read
exactly.
"""

from contextlib import contextmanager

import numpy as np

from ..bars import bar
from ..record import UserError
from .counter import Counter, longest, watching
from .counts import Counts, Gathered
from .proofs import Proofs
from .selfcheck import self_check
from .tokens import check_tokenizer, encode, list_of, refuse_unknown, token_batches

_checked = Proofs()  # model -> True


@contextmanager
def count_activations(model, kind=Counter):
    """Count while the context is open: `counter(input_ids, attention_mask, count_mask)` is one
    forward pass and returns the Counts of that batch. The first time a model is seen, and when it
    is built otherwise since, `self_check` proves that it is read exactly.

    The hooks are taken off whatever happens. Raises UserError for a model, ids or masks that
    cannot be counted, RuntimeError if a site did not see each token once. (Paper, sec. counting.)

    >>> with count_activations(model) as counter:                           # doctest: +SKIP
    ...     counts = counter(tokens["input_ids"], tokens["attention_mask"])
    """
    if model not in _checked:
        self_check(model)
        _checked[model] = True
    with watching(model, kind) as counter:
        yield counter


def count(
    model,
    tokenizer,
    texts,
    batch_tokens: int = 8192,
    *,
    template: str = "{instruction}",
    responses=None,
) -> Counts:
    """Counts of each text's own tokens, or of its response's tokens where responses are given (see
    `encode`). Raises UserError for what is no list of texts.

    >>> counts = count(model, tokenizer, ["Add 12 and 7.", "Name a fish."])  # doctest: +SKIP
    >>> p = counts.neurons["dense"] / counts.tokens[:, None, None]           # doctest: +SKIP
    """
    check_tokenizer(tokenizer, model)
    texts = list_of(texts, "texts")
    encoded = encode(tokenizer, texts, template=template, responses=responses)
    refuse_long(model, encoded)
    refuse_unknown(model, encoded)
    return count_encoded(model, encoded, batch_tokens)


def refuse_long(model, encoded, names=None) -> None:
    """Raise UserError for sequences that are longer than the model can read: which (their places,
    or `names`), and how long they are.
    """
    most, names = longest(model), range(len(encoded)) if names is None else names
    long = [(n, len(e.ids)) for n, e in zip(names, encoded, strict=True) if len(e.ids) > most]
    if long:
        named = ", ".join(f"text {name} has {size}" for name, size in long[:5])
        raise UserError(
            f"{len(long)} of {len(encoded)} texts are longer than the {most} tokens that "
            f"{type(model).__name__} can read, template included: {named}"
            f"{' tokens, ...' if len(long) > 5 else ' tokens'}. Shorten them or leave them out."
        )


def count_encoded(model, encoded, batch_tokens: int = 8192, progress=None) -> Counts:
    """Counts of encoded sequences, in their order; `progress` is a tqdm bar to move instead of one
    of its own. Each batch's counts go to their place at once: memory holds one table of uint16.
    """
    refuse_nothing(encoded)
    gathered = Gathered(len(encoded))
    with count_activations(model) as counter, _bar(len(encoded), progress) as moved:
        for batch in token_batches(encoded, batch_tokens):
            counts = counter(batch.input_ids, batch.attention_mask, batch.count_mask)
            gathered(batch.rows, {"counted": counts})
            moved.update(len(batch.rows))
    return gathered.counts["counted"]


def count_groups(
    model, encoded, batch_tokens: int = 8192, *, observers=(), progress=None
) -> dict[str, Counts]:
    """Counts of every position group of encoded sequences (see `encode_groups`), {name: Counts},
    in their order, from one forward pass per batch of at most `batch_tokens` tokens.

    Each group's counts are those of a pass of its own. observers: functions of (batch, last hidden
    state [B, T, D]) that are told of every pass, such as `losses.GroupLoss`. (Ours.)
    """
    gathered = Gathered(len(encoded))
    for rows, counts in passes(model, encoded, batch_tokens, observers, progress):
        gathered(rows, counts)
    return gathered.counts


def passes(model, encoded, batch_tokens: int = 8192, observers=(), progress=None):
    """Yield (rows, {group's name: Counts}) of each batch of encoded sequences, as `count_groups`
    gathers them: for what is summed up before all is read.
    """
    refuse_nothing(encoded)
    if not encoded[0].groups:
        raise UserError("there are sequences without position groups; use encode_groups.")
    with count_activations(model) as counter, _bar(len(encoded), progress) as moved:
        for batch in token_batches(encoded, batch_tokens):
            counts = counter(batch.input_ids, batch.attention_mask, batch.group_mask)
            hidden, counter.hidden = counter.hidden, None
            for observe in observers:
                observe(batch, hidden)
            moved.update(len(batch.rows))
            yield batch.rows, dict(zip(batch.names, counts, strict=True))


def refuse_nothing(encoded) -> None:
    """Raise UserError where there is no sequence."""
    if not len(encoded):
        raise UserError("there is nothing to read: the list of texts is empty. Give one or more.")


@contextmanager
def _bar(total, given):
    if given is not None:
        yield given
        return
    with bar(None, "counting", total=total, unit=" instructions", delay=2) as own:
        yield own


def flips(model, encoded, counts: Counts) -> dict[str, int]:
    """How many cells of the first instructions differ when each is read alone: rounding can move a
    gate across zero.
    """
    alone = count_encoded(model, encoded, batch_tokens=1).arrays()
    pairs = [
        (alone[name].astype(int), c[: len(encoded)].astype(int))
        for name, c in counts.arrays().items()
    ]
    return {
        "cells": sum(a.size for a, _ in pairs),
        "differ": sum(int((a != b).sum()) for a, b in pairs),
        "most": max(int(np.abs(a - b).max()) for a, b in pairs),
    }
