"""The one module that knows fused experts: transformers' experts interface and its private names."""

from contextlib import contextmanager

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

IMPLEMENTATION = "observed"  # our experts function's name in transformers' registry


def observed_experts(bank, hidden, index, weights):
    """The forward pass of a bank of routed experts, with `bank.observer` told what every expert's
    gate saw.

    hidden [R, D], index and weights [R, K], out [R, D]; the R*K (token, expert) rows are grouped
    by expert, in token order. Equal to transformers' own implementations up to rounding (tested);
    nothing is computed twice. (Ours.)
    """
    k, experts = index.shape[-1], torch.arange(len(bank.down_proj), device=index.device)
    ids, order = torch.sort(index.reshape(-1), stable=True)  # [R*K] expert of each row
    rows, ends = order // k, torch.searchsorted(ids, experts, right=True, out_int32=True)

    def linear(x, name):
        bias = getattr(bank, name + "_bias")[ids] if bank.has_bias else None
        return _grouped_linear(x, getattr(bank, name), ends, bias, bank.is_transposed)

    h = linear(
        hidden[rows], "gate_up_proj" if bank.has_gate else "up_proj"
    )  # [R*K, 2N], or [R*K, N]
    if observer := getattr(bank, "observer", None):
        observer(ids, rows, gate_part(bank, h))
    h = linear(bank._apply_gate(h) if bank.has_gate else bank.act_fn(h), "down_proj")  # [R*K, D]
    if getattr(bank, "has_post_expert_norm", False):  # transformers 5.17 does not have the flag yet
        h = bank.post_expert_norm(h)
    h = h * weights.reshape(-1)[order, None]
    return (
        torch.empty_like(h)
        .index_copy_(0, order, h)
        .view(len(hidden), k, -1)
        .sum(1)
        .to(hidden.dtype)
    )


def gate_part(bank, h):
    """The N gate pre-activations among the up projection's outputs [..., 2N]; all of them where
    there is no gate.
    """
    if not bank.has_gate:
        return h
    return h.chunk(2, -1)[0] if bank.is_concatenated else h[..., ::2]


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
