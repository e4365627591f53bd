"""The one module that knows fused experts: transformers' experts interface and its private names.

A *bank* is one module that holds all routed experts of a layer as 3-D weights, gate and up
projection fused; there is no module per expert. R rows are (token, expert) pairs, of which each
token has K.
"""

from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    _grouped_linear,
)

from ..record import UserError
from .changes import replaced, swapped

IMPLEMENTATION = "observed"  # our experts function's name in transformers' registry
FUSED = ("grouped_mm", "batched_mm")  # implementations in which experts can be edited
PER_TOKEN = ("top_k", "num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k")  # names of K


def is_bank(module) -> bool:
    """Whether a module is a bank that transformers' experts interface drives."""
    weight = getattr(module, "down_proj", None)  # a parametrised one is no Parameter
    three = isinstance(weight, torch.Tensor) and weight.dim() == 3
    return three and hasattr(module, "is_transposed")


def bank_width(bank) -> int:
    """Neurons of one expert, N."""
    return bank.down_proj.shape[1 if bank.is_transposed else 2]  # [E, N, D], or [E, D, N]


def columns(bank) -> torch.Tensor:
    """What each neuron writes: the down projections as [E, N, D], a view of the weights."""
    down = bank.down_proj.data
    return down if bank.is_transposed else down.transpose(1, 2)


def neuron_rows(bank) -> dict[str, torch.Tensor]:
    """Views of what each neuron reads by: "gate", "up" where there is a gate, biases as
    <name>.bias; [E, N, D], D = 1 for a bias.
    """
    name = _reads_by(bank)
    fused = getattr(bank, name).data
    stacks = {"": fused if bank.is_transposed else fused.transpose(1, 2)}  # [E, D, 2N]
    if bank.has_bias:
        stacks[".bias"] = getattr(bank, name + "_bias").data[:, None]  # [E, 1, 2N]
    found = {}
    for end, stack in stacks.items():
        found["gate" + end] = gate_part(bank, stack).transpose(1, 2)
        if bank.has_gate:
            found["up" + end] = up_part(bank, stack).transpose(1, 2)
    return found


def _reads_by(bank) -> str:
    return "gate_up_proj" if bank.has_gate else "up_proj"


def gate_part(bank, h):
    """The N gate pre-activations among the up projection's outputs [..., 2N]; all of them where
    there is no gate. A view.
    """
    if not bank.has_gate:
        return h
    return h.chunk(2, -1)[0] if bank.is_concatenated else h[..., ::2]


def up_part(bank, h):
    """The other half of [..., 2N]: what the gate multiplies. A view."""
    return h.chunk(2, -1)[1] if bank.is_concatenated else h[..., 1::2]


def pre_activations(bank, x, expert: int) -> torch.Tensor:
    """What one expert's fused projection makes of inputs [n, D]: [n, 2N], or [n, N] ungated."""
    name = _reads_by(bank)
    weight = getattr(bank, name)[expert]
    h = x @ weight if bank.is_transposed else F.linear(x, weight)
    return h + getattr(bank, name + "_bias")[expert] if bank.has_bias else h


def normed(bank) -> bool:
    """Whether experts have a norm of their own behind the down projection."""
    return getattr(bank, "has_post_expert_norm", False)  # transformers before 5.23 lacks the flag


def neuron_outputs(bank, x, expert: int) -> torch.Tensor:
    """What one expert's down projection reads when its inputs are x [n, D]: h [n, N]."""
    return activated(bank, pre_activations(bank, x, expert))[1]


def expert_rows(index, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The (token [n], slot [n]) at which index [tokens, K] names the expert."""
    return (index == expert).nonzero(as_tuple=True)


def activated(bank, h):
    """(A, what the down projection reads), both [..., N], from the fused projection's [..., 2N].

    A = act(gate): an expert's neuron is active where A > 0, as in an MLP. Where a family has a
    gate of its own (GPT-OSS clamps, DeepSeek-V4 too) A is what that gate gives for an up
    projection of 1; `self_check` proves that it is a factor of what is read.
    """
    if not bank.has_gate:
        a = bank.act_fn(h)
        return a, a
    if getattr(bank._apply_gate, "__func__", None) is _default_apply_gate:
        a = bank.act_fn(gate_part(bank, h))
        return a, a * up_part(bank, h)
    one = h.clone()
    up_part(bank, one).fill_(1)
    return bank._apply_gate(one), bank._apply_gate(h)


def observed_experts(bank, hidden, index, weights):
    """The forward pass of a bank of routed experts, with `bank.observer` told every expert's A.

    hidden [B*T, D], index and weights [B*T, K], out [B*T, D]; the R rows are grouped by expert,
    in token order. Equal to transformers' own implementations up to rounding (tested); where the
    gate is transformers' own nothing is computed twice. (Ours.)
    """
    k, experts = index.shape[-1], torch.arange(len(bank.down_proj), device=index.device)
    ids, order = torch.sort(index.reshape(-1), stable=True)  # [R] expert of each row
    rows, ends = order // k, torch.searchsorted(ids, experts, right=True, out_int32=True)

    def linear(x, name):
        bias = getattr(bank, name + "_bias")[ids] if bank.has_bias else None
        return _grouped_linear(x, getattr(bank, name), ends, bias, bank.is_transposed)

    h = linear(hidden[rows], _reads_by(bank))  # [R, 2N], or [R, N]
    if observer := getattr(bank, "observer", None):
        a, h = activated(bank, h)
        observer(ids, rows, a)
    else:
        h = bank._apply_gate(h) if bank.has_gate else bank.act_fn(h)
    h = linear(h, "down_proj")  # [R, D]
    if normed(bank):
        h = bank.post_expert_norm(h)
    h = h * weights.reshape(-1)[order, None]
    placed = torch.empty_like(h).index_copy_(0, order, h)
    return placed.view(len(hidden), k, -1).sum(1).to(hidden.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, observed_experts)


@contextmanager
def observed(model):
    """While open, the model's routed experts run through `observed_experts`; then through what
    they ran before.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def router_of(block, bank):
    """The child of a sparse block, other than the bank, that holds one row of weights per expert;
    None if there is none.
    """
    rows = len(bank.down_proj)

    def routes(child):
        return any(p.dim() == 2 and len(p) == rows for p in child.parameters())

    return next((c for c in block.children() if c is not bank and routes(c)), None)


def router_rows(bank, router) -> torch.Tensor:
    """One row of the router's weights per expert: [E, D], a view."""
    rows = len(bank.down_proj)
    return next(p.data for p in router.parameters() if p.dim() == 2 and len(p) == rows)


def experts_per_token(block, router, config) -> int:
    """K, as router, block or configuration name it; 1, the least there is, if none of them does."""
    values = [getattr(place, name, None) for place in (router, block, config) for name in PER_TOKEN]
    return next((k for k in values if isinstance(k, int) and k > 0), 1)


def selection_biases(block, bank) -> list[torch.Tensor]:
    """What a block adds to the experts' scores only to choose among them, of E numbers each, in the
    router (DeepSeek-V3), beside it (MiniMax-M2, LFM2, AFMoE) or below it (ERNIE 4.5).
    """
    inside, found = set(bank.modules()), []
    for module in block.modules():
        if module not in inside:
            own = {**module._parameters, **module._buffers}
            found += [
                t.data
                for name, t in own.items()
                if t is not None
                and name != "bias"  # a linear layer's own: part of the logits
                and "bias" in name
                and t.numel() == len(bank.down_proj)
            ]
    return found


class Routed(NamedTuple):
    """Of the rows that fused experts work on: the expert and the token of each, long [R], and how
    many tokens there are, B*T.
    """

    experts: torch.Tensor
    tokens: torch.Tensor
    count: int


@contextmanager
def editing(bank, name: str, edit):
    """While open, what the down projections read is edit(h [R, N], Routed).

    It is edited inside the library's own fused implementations, whose rows stand in routing order
    or sorted by expert; `name` is for messages. Raises UserError for another implementation.
    """
    method, routed = "_apply_gate" if bank.has_gate else "act_fn", []

    def note(module, args):
        running = module.config._experts_implementation
        if running not in FUSED:
            raise UserError(
                f"{name}: experts running as {running!r} cannot be edited. Call "
                "model.set_experts_implementation('grouped_mm'), for the baseline too."
            )
        count, k = args[1].shape  # [B*T, K]
        ids = args[1].reshape(-1)  # [R]
        order = torch.arange(len(ids), device=ids.device)
        if running == "grouped_mm":
            ids, order = torch.sort(ids)  # not stable: equal ids must fall as the library's do
        routed[:] = [Routed(ids, order // k, count)]

    def edited(gate, fused):
        h, rows = gate(fused), routed.pop()  # [R, N]
        if len(h) != len(rows.experts):
            raise RuntimeError(
                f"{name}: {len(h)} rows in the experts, but {len(rows.experts)} were routed there."
            )
        return edit(h, rows)

    with ExitStack() as stack:
        stack.callback(bank.register_forward_pre_hook(note).remove)
        stack.enter_context(swapped(bank, method, lambda gate: partial(edited, gate)))
        yield


@contextmanager
def dropping(bank, part, told):
    """While open, the experts in part [E] are still chosen, but at weight 0; told() per forward."""

    def edit(module, args):
        told()
        gone = part.to(args[1].device)[args[1]]  # [B*T, K]
        return *args[:2], args[2].masked_fill(gone, 0), *args[3:]

    handle = bank.register_forward_pre_hook(edit)
    try:
        yield
    finally:
        handle.remove()


class _MaskLogits(TorchFunctionMode):
    """While it is on, a linear map to E numbers gets -inf at the masked experts: a router's
    logits, before top-k.
    """

    def __init__(self, part):
        super().__init__()
        self.part, self.hits = part, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or out.shape[-1] != len(self.part):
            return out
        self.hits += 1
        return out.masked_fill(self.part.to(out.device), -torch.inf)


def refuse_reroute(site, part, config) -> None:
    """Raise UserError where no next best expert could step in."""
    left, top_k = site.experts - int(part.sum()), experts_per_token(site.block, site.router, config)
    if left < top_k:
        raise UserError(
            f"{site.name}: reroute leaves {left} of {site.experts} experts, but a token takes "
            f"{top_k}. Mask fewer experts, or use operator 'drop'."
        )
    tables = [*site.router.parameters(), *site.router.buffers()]
    if any(t.dim() == 2 and not t.is_floating_point() for t in tables):
        raise UserError(
            f"{site.name}: its experts are chosen by a table of token ids, not by scores, so there "
            "is no next best one to reroute to. Use operator 'drop'."
        )


@contextmanager
def rerouting(site, part, told):
    """While open, the experts in part [E] cannot be chosen: their logits are -inf before top-k, as
    are the biases that only help to choose. told() per forward.

    Raises UserError where a masked expert is chosen all the same.
    """
    router = site.router

    def around(route):
        @wraps(route)
        def rerouted(*args, **kwargs):
            with _MaskLogits(part) as logits:
                out = route(*args, **kwargs)
            if logits.hits != 1:
                raise UserError(
                    f"{site.name}: reroute needs a router with one linear map to its {len(part)} "
                    f"experts; {type(router).__name__} has {logits.hits}. Use operator 'drop'."
                )
            return out

        return rerouted

    def verify(module, args):
        told()
        if part.to(args[1].device)[args[1]].any():
            raise UserError(
                f"{site.name}: a token had fewer than K experts left to choose from (experts in "
                "groups). Mask fewer experts, or use operator 'drop'."
                if _grouped(router)
                else f"{site.name}: {type(router).__name__} chose an expert whose logit was -inf: "
                "it does not choose by its logits alone. Use operator 'drop'."
            )

    with ExitStack() as stack:
        stack.enter_context(swapped(router, "forward", around))
        stack.callback(site.module.register_forward_pre_hook(verify).remove)
        for bias in selection_biases(site.block, site.module):
            gone = ..., part.to(bias.device)
            stack.enter_context(replaced(bias, gone, bias.new_full((), -torch.inf)))
        yield


def _grouped(router) -> bool:
    groups = (getattr(router, name, None) for name in ("n_group", "num_group"))
    return any((g or 1) > 1 for g in groups)
