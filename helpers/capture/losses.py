"""Losses of chosen tokens from hidden states that a pass has made anyway: the head runs on these
tokens alone, a block at a time.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..record import UserError
from .beginnings import behind
from .budget import reading
from .counter import ROUNDING
from .proofs import Proofs
from .sites import UnreadableModel, input_device, returning_dicts

CELLS = 2**22  # logits made at a time (16 MiB): as many tokens as that allows,
LEAST = 128  # and these at least: fewer do not fill a processor (128 MiB at 262,144 words)
MULTIPLY, DIVIDE, CAP = (
    ("logit_scale", "lm_head_multiplier"),
    ("logits_scaling",),
    "final_logit_softcapping",
)
AGAIN = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in a head
_heads = Proofs()  # model -> (scale, cap)


def refuse_silent(encoded, names=None) -> None:
    """Raise UserError for the first sequence without a token whose loss could be counted (a first
    token has nothing before it); its place, or which of `names` it is.
    """
    for name, one in zip(range(len(encoded)) if names is None else names, encoded, strict=True):
        if not any(one.counted[1:]):
            raise UserError(
                f"text {name} has no token whose loss could be counted: no reference, or a single "
                "token without BOS. Remove the row, or read it in a template with words before it."
            )


def sequence_losses(model, batch, purpose: str = "losses", begun=None) -> torch.Tensor:
    """Mean negative log-likelihood of each row's counted tokens, nats per token, float64 [B], of
    one pass over a batch; keeps the autograd graph. begun: the beginning that the batch goes on
    from (see beginnings).

    A first token has nothing before it and never counts (behind a beginning, `shared` sees to it).
    Raises UserError for a row without a token whose loss could be counted. (Ours.)
    """
    counted = batch.count_mask.clone()
    counted[:, 0] = 0
    if not (tokens := counted.sum(1)).all():
        raise UserError(
            "a row has no token whose loss could be counted: no reference, or a single token "
            "without BOS. Remove the row."
        )
    proven_head(model)  # runs the model: before the pass that is noted
    ids, mask = batch.input_ids, batch.attention_mask
    with returning_dicts(model), reading(model, ids, mask, purpose, begun):
        hidden = behind(model, ids, mask, begun)
        losses = token_losses(model, hidden, ids, counted)
    return losses.double().sum(1).cpu() / tokens


def token_losses(model, hidden, ids, mask) -> torch.Tensor:
    """Negative log-likelihood of each token in the mask given those before it, nats, float32
    [B, T], 0 elsewhere.

    hidden: the trunk's last hidden state [B, T, D]; ids, mask [B, T]. A first token has nothing
    before it and never counts. Memory does not grow with T: logits are made for masked tokens
    only, CELLS at a time; with autograd they are made again on the way back. The first time a model
    is seen, its head on hidden states is held against its own logits (scaled: Cohere, Granite;
    capped: Gemma 2). Raises UnreadableModel if it gives something else. (Ours.)
    """
    if hidden.shape[:2] != ids.shape or ids.shape != mask.shape:
        raise UserError(
            f"token_losses: hidden states {tuple(hidden.shape)}, ids {tuple(ids.shape)} and mask "
            f"{tuple(mask.shape)}, expected [B, T, D] and twice [B, T]."
        )
    shape = proven_head(model)
    at = mask[:, 1:].bool()  # [B, T-1]
    states = hidden[:, :-1][at.to(hidden.device)]  # [n, D]
    wanted = ids[:, 1:][at.to(ids.device)].to(hidden.device)
    step = max(LEAST, CELLS // model.get_output_embeddings().weight.shape[0])

    def some(states, wanted):
        return F.cross_entropy(_logits(model, states, *shape), wanted, reduction="none")

    parts = [
        checkpoint(some, states[i : i + step], wanted[i : i + step], **AGAIN)
        for i in range(0, len(states), step)
    ]
    losses = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
    if parts:
        losses[:, 1:][at.to(hidden.device)] = torch.cat(parts).to(torch.float32)
    return losses


class GroupLoss:
    """An observer of `count_groups`: losses of one position group's tokens, from the forward pass
    that counts them. After it: `total`, nats, and `tokens`, both [I] in the order of the sequences.
    """

    def __init__(self, model, size: int, group: str = "response"):
        proven_head(model)  # runs the model, which it may not do while it is being counted
        self.model, self.group = model, group
        self.total = torch.zeros(size, dtype=torch.float64, device="cpu")
        self.tokens = torch.zeros(size, dtype=torch.long, device="cpu")

    @torch.no_grad()
    def __call__(self, batch, hidden) -> None:
        """Take in one batch and its last hidden state."""
        if self.group not in batch.names:
            raise UserError(f"no position group {self.group!r} among {list(batch.names)}.")
        mask = batch.group_mask[:, batch.names.index(self.group)].clone()
        mask *= batch.attention_mask.cumsum(1) > 1  # a sequence's first token has none before it
        losses = token_losses(self.model, hidden, batch.input_ids, mask)
        self.total[batch.rows] = losses.double().sum(1).cpu()
        self.tokens[batch.rows] = mask.sum(1)

    @property
    def mean(self) -> torch.Tensor:
        """Nats per token, float64 [I]; NaN for a sequence without a token whose loss is defined."""
        return self.total / self.tokens


def _logits(model, states, scale, cap):
    """The model's own logits [n, V] of hidden states [n, D], in float32 or wider."""
    head = model.get_output_embeddings()
    logits = head(states.to(head.weight.device))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return (cap * torch.tanh(logits / cap) if cap else logits).to(states.device)


@torch.no_grad()
def proven_head(model) -> tuple[float, float]:
    """(scale, cap) of the head's output, 0 for no cap: proven once against the model's own logits.

    That runs the model, so ask before an ablation acts at places of one batch, and before a pass
    that is counted. Raises UnreadableModel where the head gives something else. (Ours.)
    """
    if model in _heads:
        return _heads[model]
    if model.get_output_embeddings() is None:
        raise UnreadableModel(f"{type(model).__name__} has no language-model head: no losses.")
    rows = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(8, device="cpu") * 7 + 5).remainder(rows)[None].to(input_device(model))
    with returning_dicts(model):
        own = model(input_ids=ids, use_cache=False).logits[0]  # [8, V]
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    if not own.isfinite().all():
        raise UserError(
            f"{type(model).__name__} gives logits that are not finite: no losses. Load it in "
            "float32 or bfloat16, and check its weights."
        )
    text, scale = model.config.get_text_config(decoder=True), 1.0
    for name in MULTIPLY:
        scale *= getattr(text, name, None) or 1
    for name in DIVIDE:
        scale /= getattr(text, name, None) or 1
    cap = getattr(text, CAP, None) or 0.0
    exact = 1e-5 if own.dtype in (torch.float32, torch.float64) else ROUNDING[own.dtype]
    for trial in (scale, _factor(_logits(model, states, 1.0, 0.0), own, cap)):
        gap = (_logits(model, states, trial, cap) - own).abs().max() / own.abs().max()
        if gap <= exact:
            _heads[model] = trial, cap
            return trial, cap
    raise UnreadableModel(
        f"{type(model).__name__} makes its logits in a way of its own: its head on the last hidden "
        f"state differs from them by {float(gap):.1e} of the largest. Take losses from model(...)."
    )


def _factor(raw, own, cap) -> float:
    """The number that the head's output is multiplied by, where no configuration names it."""
    raw, own = raw.double(), own.double()
    bare = cap * torch.atanh((own / cap).clamp(-0.999, 0.999)) if cap else own
    return float((bare * raw).sum() / (raw * raw).sum())
