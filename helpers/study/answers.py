"""Greedy answers of a model."""

import torch
from transformers import GenerationConfig

from ..capture.sites import input_device
from ..capture.tokens import Encoded, batches, encode
from ..hexainst.corpus import texts


def greedy_answers(model, tokenizer, profile, rows, max_new_tokens: int | None = None) -> list[str]:
    """Greedy answers to the rows' prompts, in row order, without special tokens and outer white
    space.
    """
    encoded = encode(tokenizer, texts(rows), template=profile.template)
    ids = continuations(
        model,
        encoded,
        max_new_tokens=max_new_tokens or profile.max_new_tokens,
        batch_size=profile.batch_size,
    )
    return [answer.strip() for answer in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def continuations(
    model, encoded: list[Encoded], *, max_new_tokens: int, batch_size: int = 32
) -> list[list[int]]:
    """Greedy continuations as token ids, without the end-of-sequence token; order as given.
    Sampling and penalties that a chat model's own generation settings name are put aside
    meanwhile: base and tuned are decoded alike. (Ours.)
    """
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
    try:
        for batch in batches(encoded, batch_size, side="left"):
            ids = model.generate(
                batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
            )
            for row, new in zip(
                batch.rows, ids[:, batch.input_ids.shape[1] :].tolist(), strict=True
            ):
                out[row] = new[: next((i for i, t in enumerate(new) if t in stops), len(new))]
    finally:
        model.generation_config = own
    return out
