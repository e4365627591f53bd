"""Texts to token ids: encoded with position masks, padded into batches."""

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from string import ascii_letters

import torch
from tokenizers.models import Unigram

from ..record import UserError, visible
from .budget import OWN_WORDS
from .sites import refuse_wrapped

PADDING, SMALL = 0.05, 0.1  # share of a batch that may be padding; of the budget that is small
TODAY = date(2025, 1, 1)  # in chat templates that ask for the date: tomorrow's counts are the same
CODES = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in ascii_letters]
WRITTEN = [("%%", "\0"), *((code, TODAY.strftime(code)) for code in CODES), ("\0", "%")]
DATED = (  # stands before a chat template: its strftime_now is of TODAY
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    f"{{% for code, value in {WRITTEN} %}}{{% set now.text = now.text.replace(code, value) %}}"
    "{% endfor %}{{ now.text }}{% endmacro %}\n"
)
PROBE = 'A "b"  <C> & d\'s\n\n{e}'  # what a chat template might change: case, HTML, white space
REPEATED = 16  # renderings of a chat template that must agree: one that draws at random shows
OWN_TEMPLATE = "Set `chat: false` and give a `template` in the profile"
MARKER = "▁"  # SentencePiece's: stands for the white space before a word


def check_tokenizer(tokenizer, model) -> None:
    """Raise UserError if the tokenizer gives no character offsets, or has more words than the
    model embeddings.
    """
    refuse_wrapped(model)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets: the instruction's own tokens "
            "cannot be told from the template's. Use a fast tokenizer (one with a tokenizer.json)."
        )
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows} embeddings: they "
            "do not belong together. Load both from one checkpoint."
        )


@dataclass(frozen=True)
class Encoded:
    """One sequence: token ids [T], for each token whether its activations are counted [T], and
    named position groups, each like that [T].
    """

    ids: tuple[int, ...]
    counted: tuple[bool, ...]
    groups: dict[str, tuple[bool, ...]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Batch:
    """Padded sequences. `rows` [B] are their places in the list that was batched; masks [B, T] and
    group masks [B, P, T], of the groups `names`, hold 0 and 1.
    """

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    count_mask: torch.Tensor
    group_mask: torch.Tensor | None = None
    names: tuple[str, ...] = ()


def encode(tokenizer, texts, *, template: str = "{instruction}", responses=None) -> list[Encoded]:
    """Token ids of template-wrapped texts, and which tokens count.

    Without `responses` those of the text itself count: neither special tokens nor the template's
    words; a token that holds at least one character of the text is the text's. With responses,
    exactly theirs count: strings are read after the prompt and one space (none if the template ends
    in white space), lists of token ids, of which there may be none, are appended as they are. A
    doubled beginning (BOS in the text and from the tokenizer) is read once, with a warning. Raises
    UserError for what is no list of texts, an empty text, or one without a token of its own.
    (Paper, sec. counting.)

    >>> encode(tokenizer, ["Add 1 and 2."], template="Sum: {instruction}")      # doctest: +SKIP
    [Encoded(ids=(1, 7, 8, 20, ...), counted=(False, False, False, True, ...))]
    """
    which = "prompt" if responses is None else "response"
    grouped = encode_groups(tokenizer, texts, template=template, responses=responses)
    return [Encoded(e.ids, e.groups[which]) for e in grouped]


def encode_groups(
    tokenizer, texts, *, template: str = "{instruction}", responses=None
) -> list[Encoded]:
    """As `encode`, with the position groups "prompt" (the instruction's own tokens, counted),
    "response" where there are responses, and "all" (every token but special ones). (Ours.)
    """
    if not isinstance(template, str) or template.count("{instruction}") != 1:
        raise UserError(f"template {template!r} must hold {{instruction}} once.")
    _refuse_half(template, "the template")
    texts = list_of(texts, "texts")
    given = responses is not None
    responses = list_of(responses, "responses") if given else [None] * len(texts)
    if len(responses) != len(texts):
        raise UserError(
            f"{len(texts)} texts and {len(responses)} responses: give one response per text."
        )
    head, special = template.split("{instruction}")[0], special_ids(tokenizer)
    encoded, doubled = [], 0
    for row, (text, response) in enumerate(zip(texts, responses, strict=True)):
        _refuse_text(text, f"text {row}")
        full, start, end = _joined(template, text, response, row)
        prompt = len(head), len(head) + len(text)
        ids, spans, twice = _spans(tokenizer, full, special, head)
        doubled += twice
        groups = {"prompt": _holds(spans, *prompt), "all": tuple(s is not None for s in spans)}
        if isinstance(response, str):
            groups["response"] = _holds(spans, start, end)
        elif given:
            ids, groups = _appended(ids, groups, response, row)
        for name, mask in groups.items():
            if not any(mask) and (name != "response" or isinstance(response, str)):
                raise UserError(
                    f"text {row} ({full[:60]!r}) yields no counted token ({name}) with "
                    f"{type(tokenizer).__name__}. Remove the row, or use the tokenizer that "
                    "belongs to the model."
                )
        encoded.append(Encoded(tuple(ids), groups["prompt"], groups))
    if doubled:
        warnings.warn(
            f"{doubled} of {len(texts)} texts begin with what the tokenizer adds itself (as "
            f"{tokenizer.bos_token!r}): it is read once.",
            stacklevel=3,
        )
    return encoded


def chat_template(tokenizer) -> str:
    """The model's chat format as a template: what it expects around one instruction, up to where
    its answer begins. A template that asks for the date gets TODAY. Raises UserError for a
    tokenizer without one, for one that cannot be rendered, that draws at random, or that changes
    the text (white space around it apart, which stays here).
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{type(tokenizer).__name__} has no chat template. {OWN_TEMPLATE}, or use the "
            "tokenizer of an instruction-tuned model."
        )
    try:
        found = sorted({_rendered(tokenizer, "{instruction}") for _ in range(REPEATED)})
        probed = _rendered(tokenizer, PROBE)
    except Exception as error:  # a template is foreign code: whatever it raises
        raise UserError(
            f"the chat template of {type(tokenizer).__name__} cannot be rendered for one "
            f"instruction: {type(error).__name__}: {' '.join(str(error).split())[:200]}. "
            f"{OWN_TEMPLATE}, or mend the tokenizer's `chat_template`."
        ) from error
    text, fault = found[0], None
    if len(found) > 1:
        fault = f"then {found[1]!r}: it must be the same each time"
    elif text.count("{instruction}") != 1 or probed != text.replace("{instruction}", PROBE):
        fault = f"and {probed!r} for {PROBE!r}: it must hold the text once, unchanged"
    if fault:
        raise UserError(f"the chat template gives {text!r}, {fault}. {OWN_TEMPLATE}.")
    _refuse_half(text, "the chat template's text")
    return text


def _rendered(tokenizer, content: str) -> str:
    """A chat of one message of the user's, up to where the answer begins, on the day TODAY."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=DATED + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
    )


def list_of(values, what: str) -> list:
    """The values of a list, a column, a generator as a list; UserError for what would be taken
    apart in silence (a string, a dict, a table, a set) and for what is no list at all.
    """
    values = values.tolist() if isinstance(values, torch.Tensor) else values  # numbers, not tensors
    apart = isinstance(values, (str, bytes, bytearray, Mapping, set, frozenset))
    apart = apart or getattr(values, "shape", None) == ()
    if apart or hasattr(values, "columns") or not isinstance(values, Iterable):
        raise UserError(
            f"{what}: found {type(values).__name__}, expected a list, as in ['Add 12 and 7.']."
        )
    return list(values)


def texts_of(values, what: str) -> list[str]:
    """The values of a list as texts. Raises UserError, which names the first that is none."""
    texts = list_of(values, f"{what}s")
    for row, text in enumerate(texts):
        _refuse_text(text, f"{what} {row}")
    return texts


def _refuse_text(text, where) -> None:
    if not isinstance(text, str) or not visible(text):
        raise UserError(
            f"{where} is {text!r}: expected a string with something in it, for an empty one has no "
            "tokens to count. Remove the row."
        )
    _refuse_half(text, where)


def _refuse_half(text, where) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds half of a character ({text[error.start]!r} at place {error.start}), "
            "which no tokenizer can read. Repair it."
        ) from error


def _joined(template, text, response, row):
    """What the tokenizer reads, and where in it the response stands (nowhere: 0, 0)."""
    prompt = template.replace("{instruction}", text)
    if not isinstance(response, str):
        return prompt, 0, 0
    _refuse_half(response, f"response {row}")
    tail = template.split("{instruction}")[1]
    prompt += "" if tail[-1:].isspace() else " "
    return prompt + response, len(prompt), len(prompt) + len(response)


def _appended(ids, groups, response, row):
    """Ids and groups with a response of token ids behind them."""
    listed = isinstance(response, Iterable) and getattr(response, "shape", None) != ()
    new = list_of(response, f"response {row}") if listed else None
    if new is None or not all(map(_is_id, new)):
        raise UserError(
            f"response {row} is {str(response)[:60]!r}: expected a string or a list of token ids. "
            "Give one for each text, or none at all."
        )
    ids, behind = [*ids, *map(int, new)], len(new)
    longer = {name: (*mask, *[name == "all"] * behind) for name, mask in groups.items()}
    longer["response"] = (*[False] * (len(ids) - behind), *[True] * behind)
    return ids, longer


def _is_id(value) -> bool:
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    return whole and 0 <= value < 2**31


def refuse_unknown(model, encoded, names=None) -> None:
    """Raise UserError for the first sequence with a token that the model has no embedding of; its
    place, or which of `names` it is.
    """
    rows = model.get_input_embeddings().num_embeddings
    for name, one in zip(range(len(encoded)) if names is None else names, encoded, strict=True):
        if max(one.ids, default=0) >= rows:
            raise UserError(
                f"text {name} has the token id {max(one.ids)}, and {type(model).__name__} has "
                f"{rows} embeddings. {OWN_WORDS}"
            )


def special_ids(tokenizer) -> set[int]:
    """Ids of a tokenizer's special tokens, the unknown word left out (it stands for text)."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {i for i, token in added.items() if token.special} | {*tokenizer.all_special_ids}
    return named - {_unknown_id(tokenizer)}


def _unknown_id(tokenizer) -> int | None:
    """Id of the unknown word; of a tokenizer that names none, of the one its model reads anyway."""
    if tokenizer.unk_token_id is not None:
        return tokenizer.unk_token_id
    inner = tokenizer.backend_tokenizer.model
    if isinstance(inner, Unigram):
        return json.loads(inner.__getstate__())["unk_id"]
    named = getattr(inner, "unk_token", None)
    return None if named is None else inner.token_to_id(named)


def _spans(tokenizer, full, special, head):
    """Token ids of `full`, without what a tokenizer puts behind it; the characters (from, to) that
    each holds, None for special ones; and whether a doubled beginning was dropped.

    Some tokenizers trim white space from offsets until (of a code's indentation) nothing is left;
    such a token holds the characters since the last one. A word marker on its own stands for the
    character before the word that it points to.
    """
    bos = tokenizer.bos_token
    tokens = tokenizer(
        full,
        add_special_tokens=bos is None or not head.startswith(bos),
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids, added, spans, last = list(tokens["input_ids"]), tokens["special_tokens_mask"], [], 0
    words = tokenizer.convert_ids_to_tokens(ids)
    for i, word, (a, b), extra in zip(ids, words, tokens["offset_mapping"], added, strict=True):
        if a < b and not word.strip(MARKER) and not full[a].isspace():
            span = max(a - 1, 0), a
        else:
            span = (a if a < b else min(last, a)), b
        spans.append(None if extra or i in special else span)
        last = max(last, span[1])
    size = max((n + 1 for n, extra in enumerate(added) if not extra), default=0)
    first = next((n for n, extra in enumerate(added) if not extra), 0)  # tokens put before
    first = first or int(ids[:1] == [tokenizer.bos_token_id])
    twice = 0
    while first and ids[:first] == ids[first : 2 * first] and 2 * first <= size:
        del ids[first : 2 * first], spans[first : 2 * first]
        size, twice = size - first, 1
    return ids[:size], spans[:size], twice


def _holds(spans, start, end) -> tuple[bool, ...]:
    """Which tokens hold a character of start:end."""
    return tuple(s is not None and max(s[0], start) < min(s[1], end) for s in spans)


def token_batches(
    encoded: list[Encoded],
    batch_tokens: int = 8192,
    side: str = "right",
    ahead: int = 0,
    padding: float = PADDING,
):
    """Yield Batches of at most `batch_tokens` tokens, padding included, longest sequences first,
    padded on `side`; one longer than that is alone. ahead: how many tokens will be generated behind
    each, which count as well. (Ours.)

    Padding is what the attention mask says it is, never a token id (it is filled with id 0).

    A batch takes the same memory whatever the lengths, and at most the share `padding` of it is
    padding (but for one that is small anyway).
    """
    refuse_size(batch_tokens, "batch_tokens")
    return (padded(encoded, rows, side) for rows in _within(encoded, batch_tokens, ahead, padding))


def _within(encoded, budget, ahead, padding):
    rows, tokens, longest = [], 0, 0
    for row in _longest_first(encoded):
        length = len(encoded[row].ids) + ahead
        size = (len(rows) + 1) * longest if rows else 0  # with this row
        wasteful = size - tokens - length > padding * size and size > budget * SMALL
        if size > budget or wasteful:
            yield rows
            rows, tokens = [], 0
        longest = longest if rows else length
        rows.append(row)
        tokens += length
    if rows:
        yield rows


def refuse_size(size, name) -> None:
    """Raise UserError for what is no whole number of 1 or more."""
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise UserError(f"{name} is {size!r}, expected a whole number of 1 or more.")


def _longest_first(encoded) -> list[int]:
    return sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))


def padded(encoded, rows, side: str = "right") -> Batch:
    """The given rows as one Batch, padded to the longest of them."""
    names, length = tuple(encoded[rows[0]].groups), max(len(encoded[r].ids) for r in rows)
    long = {"dtype": torch.long, "device": "cpu"}
    ids, mask, count = torch.zeros(3, len(rows), length, **long)  # [B, T] each
    groups = torch.zeros(len(rows), len(names), length, **long)
    for b, row in enumerate(rows):
        one = encoded[row]
        if tuple(one.groups) != names:
            raise UserError(
                f"sequence {row} has the position groups {list(one.groups)}, another one "
                f"{list(names)}: encode them all in one way."
            )
        n = len(one.ids)
        at = slice(0, n) if side == "right" else slice(length - n, length)
        ids[b, at], mask[b, at] = torch.tensor(one.ids, **long), 1
        count[b, at] = torch.tensor(one.counted, **long)
        for p, name in enumerate(names):
            groups[b, p, at] = torch.tensor(one.groups[name], **long)
    return Batch(list(rows), ids, mask, count, groups if names else None, names)
