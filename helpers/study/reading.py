"""What a model reads of a row, and which of its tokens count: positions by name, in one place."""

import numpy as np

from ..capture.tokens import Encoded, encode
from ..hexainst.corpus import texts
from ..record import NotTestable, UserError

COUNTED = ("prompt", "response", "generated", "prompt-even", "prompt-odd")
POSITIONS = (*COUNTED, "reference", "all")


def encode_rows(tokenizer, rows, template: str, positions="prompt", answers=None) -> list[Encoded]:
    """The rows as token ids, and which of these count, in row order.

    prompt       the instruction's own tokens; prompt-even, prompt-odd: every other one of them
    response     the reference's, read after the prompt
    generated    those of `answers`, lists of token ids, read after the prompt (may be none)
    reference    the reference's and the end-of-sequence token after it, as fine-tuning taught it:
                 not to know where to stop costs
    all          every token of prompt and reference, BOS left out

    Raises UserError for unknown positions, a row without such a token, a tokenizer without the
    end-of-sequence token that is needed. (Prompt: paper, sec. counting; the others: ours.)
    """
    if positions not in POSITIONS:
        raise UserError(f"positions is {positions!r}, expected one of {', '.join(POSITIONS)}.")
    responses = {"generated": answers}.get(positions, list(rows["reference"]))
    if positions.startswith("prompt"):
        responses = None
    encoded = encode(tokenizer, texts(rows), template=template, responses=responses)
    if positions.startswith("prompt-"):
        return [_every_other(e, first=positions == "prompt-odd") for e in encoded]
    if positions == "reference":
        return with_end(tokenizer, encoded)
    if positions == "all":
        bos = tokenizer.bos_token_id
        return [
            Encoded(e.ids, tuple(i > 0 or token != bos for i, token in enumerate(e.ids)))
            for e in encoded
        ]
    return encoded


def encode_once(tokenizer, rows, template: str, wanted: str = "prompt") -> list[Encoded]:
    """The rows as they are read for all counts at once: groups prompt, prompt-even and prompt-odd,
    and response, the reference's tokens, which stand behind the prompt and cannot change it.

    Groups that not every row has (a single counted token, no reference) are left out, unless one of
    them is `wanted`. Raises UserError then, and where the prompt's tokens are others when the
    reference follows. (Ours.)
    """
    prompts = encode(tokenizer, texts(rows), template=template)
    if wanted != "response" and not (rows["reference"].str.strip() != "").all():
        return [Encoded(e.ids, e.counted, {"prompt": e.counted}) for e in prompts]
    whole = encode(tokenizer, texts(rows), template=template, responses=list(rows["reference"]))
    same_beginning(prompts, whole)
    halved = all(sum(e.counted) > 1 for e in prompts) or wanted in ("prompt-even", "prompt-odd")
    found = []
    for prompt, full in zip(prompts, whole, strict=True):
        counted = (*prompt.counted, *[False] * len(full.ids))[: len(full.ids)]
        groups = {"prompt": counted, "response": full.counted}
        for name, first in (("prompt-even", 0), ("prompt-odd", 1)):
            if halved:
                groups[name] = _every_other(Encoded(full.ids, counted), first).counted
        found.append(Encoded(full.ids, counted, groups))
    return found


def same_beginning(marked: list[Encoded], whole: list[Encoded]) -> None:
    """Raise UserError unless each marked sequence begins as the whole one does, up to its last
    counted token: else the positions of one are not those of the other.
    """
    for row, (some, full) in enumerate(zip(marked, whole, strict=True)):
        last = len(some.ids) - some.counted[::-1].index(True)
        if some.ids[:last] != full.ids[:last]:
            raise UserError(
                f"row {row}: the instruction's tokens differ with and without the reference: its "
                "positions are not defined. Use a template with text or a new line after "
                "{instruction}."
            )


def encode_bare(tokenizer, rows, template: str) -> list[Encoded]:
    """The references after the template around nothing, their tokens counted: what is left of a
    loss without any instruction. Raises NotTestable where no word of the template stands behind
    the instruction: then nothing would be read. (Ours.)
    """
    head, tail = template.split("{instruction}")
    words = tail.rstrip()
    if not words.strip():
        raise NotTestable("no word of the template stands behind the instruction.")
    around, references = head + "{instruction}" + tail[len(words) :], list(rows["reference"])
    return encode(tokenizer, [words] * len(rows), template=around, responses=references)


def with_end(tokenizer, encoded: list[Encoded]) -> list[Encoded]:
    """The same sequences with the end-of-sequence token behind them, and that one counted."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) has no end-of-sequence token, which ends "
            "every reference here. Name the one that the model was trained with as eos_token, in "
            "the checkpoint's tokenizer_config.json or on the tokenizer: tokenizer.eos_token = ..."
        )
    return [Encoded((*e.ids, tokenizer.eos_token_id), (*e.counted, True)) for e in encoded]


def _every_other(encoded: Encoded, first: int) -> Encoded:
    """The same sequence with only the 1st, 3rd, ... (first = 0) or 2nd, 4th, ... (1) of its
    counted tokens counted.
    """
    kept = set(np.flatnonzero(encoded.counted)[first::2].tolist())
    if not kept:
        raise UserError(
            "an instruction has a single counted token and cannot be split in two. Remove the row."
        )
    return Encoded(encoded.ids, tuple(i in kept for i in range(len(encoded.ids))))
