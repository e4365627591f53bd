"""The start-up proof that a model is read exactly: run before a model's first count, and again
when it is built otherwise."""

from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from transformers import GenerationConfig

from .bank import activated, gate_part, observed, pre_activations
from .budget import reading, state
from .counter import ROUNDING, ready_sites, watching
from .proofs import Proofs
from .sites import UnreadableModel, input_device, returning_dicts
from .tokens import Encoded, padded

_neutral = Proofs()  # model -> whether left padding changes nothing
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device="cpu")  # eight tokens


@torch.no_grad()
def self_check(model) -> None:
    """Raise UnreadableModel unless, on eight tokens, all of this holds. (Ours.)

    MLPs: silencing every other neuron of A silences just these inputs of the down projection.
    Expert banks: A is a factor of what the down projection reads and vanishes where the gate is
    far below zero, and our forward pass gives what the model's own implementation gives. Both: the
    counts are those of a loop over tokens and experts, from A itself and from the experts' weights
    (a bank whose weights are offloaded is spared this last one).
    """
    sites = ready_sites(model)
    ids = torch.arange(MASK.numel(), device="cpu").reshape(MASK.shape) * 7 + 5
    ids %= model.get_input_embeddings().num_embeddings
    mlps, banks = (
        [s for s in sites if s.family != "expert"],
        [s for s in sites if s.family == "expert"],
    )
    faults = [*_layout(model, mlps, ids), *_experts(model, banks, ids)]
    faults = faults or [*_loops(model, sites, ids)]
    if faults:
        raise UnreadableModel(
            f"{type(model).__name__} is not read exactly: {'; '.join(faults[:3])}. This "
            "architecture, or this transformers version, computes its MLPs in another way."
        )


def _run(model, ids):
    device = input_device(model)
    inputs = {"input_ids": ids.to(device), "attention_mask": MASK.to(device), "use_cache": False}
    with returning_dicts(model), reading(model, ids, MASK, "checks"):
        model.base_model(**inputs)


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
            gap = float((ours - out).abs().max())
            yield f"{s.name}: our experts and the model's own differ by {gap:.1e}"
        if s.module.has_gate and not _gates(s, out):
            yield f"{s.name}: its gate is not the part of the up projection that is counted"


def _gates(site, like) -> bool:
    """Whether A, made from the gate part alone, is a factor of what the down projection reads, is
    positive for a gate of 3 and nothing for one of -30.
    """
    bank = site.module
    values = torch.tensor([-30.0, 3.0, 1.0, 0.5], device=like.device, dtype=like.dtype)
    read = []
    for up in (1.0, 2.0):  # within what any family clamps its up projection to
        h = torch.full((1, 2 * site.width), up, device=like.device, dtype=like.dtype)
        gate_part(bank, h)[:] = values.repeat(site.width // 4 + 1)[: site.width]
        read.append(bank._apply_gate(h)[0])
        a = activated(bank, h)[0][0]
    if read[0].shape != (site.width,) or a[::4].abs().max() > 1e-3 or a[1::4].min() < 1e-3:
        return False
    crossed = [
        one[1] * two for one, two in (read, read[::-1])
    ]  # equal if both are A times one number
    near = ROUNDING[like.dtype] * crossed[0].abs().max()
    return bool((crossed[0] - crossed[1]).abs().max() <= near)


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
    bank, shape = site.module, (len(MASK), site.experts, site.width)
    low, high = torch.zeros(2, *shape, dtype=torch.long, device="cpu")
    for b, t in MASK.nonzero().tolist():
        row = b * MASK.shape[1] + t
        for e in index[row].tolist():
            h = pre_activations(bank, hidden[row], e)[None]
            gate = gate_part(bank, h)
            near = ROUNDING[gate.dtype] * gate.abs().max()
            sides = torch.cat([_active(bank, h, shift) for shift in (-near, 0, near)])
            low[b, e] += sides.all(0).cpu()
            high[b, e] += sides.any(0).cpu()
    return low, high


def _active(bank, h, shift):
    """Whether A > 0 when the gate is shifted, by the library's own gate alone: h [1, 2N]."""
    if not bank.has_gate:
        return bank.act_fn(h + shift) > 0
    ones = torch.ones_like(h)  # the up projection
    gate_part(bank, ones)[:] = gate_part(bank, h) + shift
    return bank._apply_gate(ones) > 0


@torch.no_grad()
def left_padding_is_neutral(model) -> bool:
    """Whether a sequence that is padded on the left goes on as it does alone: only then may
    sequences of several lengths be generated from in one batch. Tried once per model; under
    an open intervention each time, for it may draw at random. (Ours.)

    Two tokens are generated from a short row beside a long one, and from the short row alone; their
    logits must agree up to rounding. Not so in BART-likes without position ids, and DeepSeek-V4.
    """
    if model not in _neutral:
        rows = model.get_input_embeddings().num_embeddings
        ids = [tuple((n * 7 + 5) % rows for n in range(length)) for length in (9, 4)]
        both = padded([Encoded(i, (True,) * len(i)) for i in ids], [0, 1], side="left")
        alone = padded([Encoded(ids[1], (True,) * 4)], [0], side="left")
        with greedy(model, max_new_tokens=2, eos_token_id=None):
            beside, by_itself = (_generated(model, batch) for batch in (both, alone))
        gap = max(
            float((a[-1] - b[-1]).abs().max()) for a, b in zip(beside, by_itself, strict=True)
        )
        largest = max(float(b.abs().max()) for b in by_itself)
        neutral = gap <= ROUNDING[by_itself[0].dtype] * largest
        if state(model):
            return neutral
        _neutral[model] = neutral
    return _neutral[model]


def _generated(model, batch):
    """The logits [B, V] of each generated token."""
    device = input_device(model)
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    told = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **told).logits


@contextmanager
def greedy(model, **settings):
    """While open, `generate` takes the likeliest token each time: sampling and penalties that the
    model's own generation settings name are put aside. `settings` are a GenerationConfig's.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, **settings)
    try:
        yield
    finally:
        model.generation_config = own
