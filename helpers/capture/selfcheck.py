"""The start-up proof that a model is read exactly: run once per model, before its first count."""

from contextlib import ExitStack

import numpy as np
import torch
from torch.nn import functional as F

from .bank import gate_part, observed
from .counter import ready_sites, watching
from .sites import UnreadableModel, input_device

ROUNDING = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}  # of the largest
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])  # eight tokens


@torch.no_grad()
def self_check(model) -> None:
    """Raise UnreadableModel unless, on eight tokens, all of this holds. (Ours.)

    MLPs: silencing every other neuron of A silences just these inputs of the down projection.
    Expert banks: a gate far below zero silences its neuron, and our forward pass gives what the
    model's own implementation gives. Both: the counts are those of a loop over tokens and experts,
    from A itself and from the experts' weights (a bank whose weights are offloaded is spared this
    last one).
    """
    sites = ready_sites(model)
    ids = (
        torch.arange(MASK.numel()).reshape(MASK.shape) * 7 + 5
    ) % model.get_input_embeddings().num_embeddings
    mlps, banks = (
        [s for s in sites if s.family != "expert"],
        [s for s in sites if s.family == "expert"],
    )
    faults = [*_layout(model, mlps, ids), *_experts(model, banks, ids), *_loops(model, sites, ids)]
    if faults:
        raise UnreadableModel(
            f"{type(model).__name__} is not read exactly: {'; '.join(faults[:3])}. This "
            "architecture, or this transformers version, computes its MLPs in another way."
        )


def _run(model, ids):
    device = input_device(model)
    model.base_model(input_ids=ids.to(device), attention_mask=MASK.to(device), use_cache=False)


def _layout(model, mlps, ids):
    """MLPs whose A does not stand, neuron by neuron, for the inputs of their down projection."""
    verdict = dict.fromkeys((s.name for s in mlps), "its down projection was not reached")

    def silence(module, args, out):
        return out.index_fill(-1, torch.arange(0, out.shape[-1], 2, device=out.device), 0)

    def look(site):
        def hook(module, args):
            h, ok = (
                args[0],
                "" if not args[0][..., ::2].any() and args[0][..., 1::2].any() else "wrong",
            )
            verdict[site.name] = ok and "silencing a neuron of A does not silence it alone"
            if h.shape[-1] != site.width:
                verdict[site.name] = (
                    f"{h.shape[-1]} neurons reach its down projection, expected {site.width}"
                )

        return hook

    with ExitStack() as stack:
        for s in mlps:
            stack.callback(s.act.register_forward_hook(silence).remove)
            stack.callback(s.down.register_forward_pre_hook(look(s)).remove)
        _run(model, ids)
    return [f"{name}: {fault}" for name, fault in verdict.items() if fault]


def _record(stack, site, seen):
    """While `stack` is open, keep what the site's activation gives, or what its bank is given and
    gives.
    """

    def hook(module, args, out):
        seen[site.name] = (args, out) if site.family == "expert" else out.clone()

    stack.callback((site.act or site.module).register_forward_hook(hook).remove)


def _experts(model, banks, ids):
    """Banks whose gate is not where we read it, or whose own forward pass gives something else
    than ours.
    """
    seen = {}
    with ExitStack() as stack:
        for s in banks:
            _record(stack, s, seen)
        _run(model, ids)
    for s in banks:
        if s.name not in seen or len(seen[s.name][0]) != 3:
            yield f"{s.name}: it is not called with (hidden, index, weights)"
            continue
        args, out = seen[s.name]
        with observed(model):
            ours = s.module(*args)
        if (ours - out).abs().max() > ROUNDING[out.dtype] * out.abs().max():
            yield f"{s.name}: our experts and the model's own differ by {float((ours - out).abs().max()):.1e}"
        if s.module.has_gate:
            h, even = (
                torch.ones(1, 2 * s.width).to(out),
                torch.arange(s.width, device=out.device) % 2 == 0,
            )
            gate_part(s.module, h)[:] = torch.where(even, -30.0, 3.0).to(h)
            a = s.module._apply_gate(h)[0].abs()
            if a.shape != even.shape or a[even].max() > 1e-3 or a[~even].min() < 1e-3:
                yield f"{s.name}: its gate is not the part of the up projection that is counted"


def _loops(model, sites, ids):
    """Sites whose counts are not those of a loop over tokens and experts."""
    seen = {}
    with watching(model) as counter, ExitStack() as stack:
        for s in sites:
            _record(stack, s, seen)
        counts = counter(ids, MASK)
    for s in sites:
        if s.family != "expert":
            active = (seen[s.name].reshape(*MASK.shape, s.width) > 0).cpu()  # [B, T, N]
            low = high = torch.stack(
                [active[b, :n].sum(0) for b, n in enumerate(MASK.sum(1))]
            )  # [B, N]
        elif s.module.down_proj.is_meta:
            continue
        else:
            low, high = _looped(s, *seen[s.name][0][:2])
        found = torch.from_numpy(
            counts.neurons[s.family][:, counts.layers[s.family].index(s.layer)].astype(np.int64)
        )
        if (found < low).any() or (found > high).any():
            yield f"{s.name}: its counts are not those of a loop over tokens"


def _looped(site, hidden, index):
    """Counts [B, E, N] of one bank, token by token and expert by expert from the weights: at
    least, and at most, since a gate within rounding of zero may fall on either side.
    """
    bank, (low, high) = (
        site.module,
        torch.zeros(2, len(MASK), site.experts, site.width, dtype=torch.long),
    )
    name = "gate_up_proj" if bank.has_gate else "up_proj"
    for b, t in MASK.nonzero().tolist():
        x = hidden[b * MASK.shape[1] + t]
        for e in index[b * MASK.shape[1] + t].tolist():
            weight = getattr(bank, name)[e]
            h = x @ weight if bank.is_transposed else F.linear(x, weight)
            gate = gate_part(bank, h + getattr(bank, name + "_bias")[e] if bank.has_bias else h)
            near = ROUNDING[gate.dtype] * gate.abs().max()
            low[b, e] += (gate > near).cpu()
            high[b, e] += (gate > -near).cpu()
    return low, high
