"""Interventions on neurons and routed experts; afterwards the model is what it was, bit for bit.

A *component mask* names what to ablate: {"dense" or "shared": bool [L_f, N], "expert": bool [L_f,
E, N]} for neurons, {"experts": bool [L_f, E]} for whole routed experts. L_f are the layers that
have such a family, in order, as in the counts. A neuron is ablated where the down projection reads
it: h = act(gate)*up of a gated MLP, act(fc) of a plain one. So `zero` is the same as act(gate) :=
0; `mean` and `resample` let nothing pass through `up` either.

A neuron's own weights are a row of the gate projection, a row of the up projection (gated MLPs) and
a column of the down projection, biases of the rows included: `transplant` moves them into another
model, `weight_change` says how far tuning moved them.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..record import UserError
from .bank import gate_part
from .sites import find_sites

NEURON_OPERATORS, EXPERT_OPERATORS = ("zero", "mean", "resample"), ("reroute", "drop")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Reference:
    """What h is on reference text, keyed by site name; from `scores.reference_activations`.

    mean: [N] or [E, N] over the positions (of an expert: those routed to it; 0 where there are
    none). draws: [R, N] or [E, R, N], single positions to resample from. filled: how many of the R
    there are, an int or [E].
    """

    mean: dict[str, torch.Tensor]
    draws: dict[str, torch.Tensor]
    filled: dict[str, torch.Tensor]


def parts_of(sites, mask) -> list[tuple]:
    """A component mask by site: [(site, bool tensor [N], [E, N] or [E])], in the mask's order,
    all-False ones left out.

    Raises UserError for a family that the model has not, a wrong shape, or values that are not
    boolean.
    """
    parts = []
    for family, values in (mask or {}).items():
        here = [s for s in sites if s.family == ("expert" if family == "experts" else family)]
        if not here:
            raise UserError(
                f"ablation mask: family {family!r}, but the model has {sorted({s.family for s in sites})} "
                "(and 'experts' where 'expert' is). Use a mask made from this model's counts."
            )
        shape = {"experts": (here[0].experts,), "expert": (here[0].experts, here[0].width)}.get(
            family, (here[0].width,)
        )
        values, expected = np.asarray(values), (len(here), *shape)
        if values.dtype != bool or values.shape != expected:
            raise UserError(
                f"ablation mask, family {family!r}: found {values.dtype} {values.shape}, expected bool "
                f"{expected}. Use a mask made from this model's counts."
            )
        parts += [(site, torch.tensor(v)) for site, v in zip(here, values, strict=True) if v.any()]
    return parts


def columns(site) -> torch.Tensor:
    """What each neuron writes: the down projection as [N, D], or [E, N, D]. A view: edits reach
    the weights.
    """
    if site.family == "expert":
        return site.down.data if site.module.is_transposed else site.down.data.transpose(1, 2)
    return site.down.weight.data if isinstance(site.down, Conv1D) else site.down.weight.data.T


def editable(site) -> bool:
    """Whether the down projection lies in memory as plain floats: not offloaded (meta), quantised
    or sharded.
    """
    weight = (site.down if site.family == "expert" else site.down.weight).data
    return type(weight) is torch.Tensor and not weight.is_meta and weight.dtype in FLOATS


@contextmanager
def ablate(
    model,
    mask,
    operator: str,
    *,
    reference: Reference | None = None,
    seed: int = 0,
    how: str = "auto",
):
    """While the context is open the masked components are ablated; an empty mask is a no-op.
    (Operators: ours.)

    operator   neurons: "zero", h := 0; "mean", h := its mean on reference text; "resample", h := its value at a
               random reference position, drawn anew for each token, one position for all neurons of an MLP.
               experts: "reroute", router logit := -inf before top-k, as if the expert had been deleted, so the next
               best one steps in; "drop", still chosen, but at weight 0, the other weights not renormalised.
    reference  for "mean" and "resample".  seed: of "resample", whose draws depend on the order of the batches.
    how        for "zero": "weights" zeroes columns of the down projection (no cost per token), "hook" edits its
               input: equal results, and the only way for offloaded or quantised weights. "auto": weights if it can.

    The implementation of the experts is left as it runs, so a run outside the context is the
    baseline. On leaving, every hook must have fired if the model ran; that the outputs moved is
    for the caller to assert: `assert_acted`. Raises UserError for a mask or operator that does not
    fit, or a reroute that leaves fewer than K experts.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=3, num_hidden_layers=2,
    ...                                      num_attention_heads=2, vocab_size=9)).eval()
    >>> with ablate(model, {"dense": np.array([[False, True, True], [False, False, False]])}, "zero"):
    ...     (model.model.layers[0].mlp.down_proj.weight != 0).any(0).tolist()
    [True, False, False]
    """
    mask = mask or {}
    neurons, experts = set(mask) - {"experts"}, "experts" in mask
    if operator not in (
        (() if experts else NEURON_OPERATORS) + (() if neurons else EXPERT_OPERATORS)
    ):
        raise UserError(
            f"ablate: operator {operator!r} on a mask of {sorted(mask)}. Neurons take {NEURON_OPERATORS}, "
            f"whole experts {EXPERT_OPERATORS}; nest two contexts to ablate both."
        )
    if how not in ("auto", "weights", "hook"):
        raise UserError(f"ablate: how is {how!r}, expected 'auto', 'weights' or 'hook'.")
    if operator in ("mean", "resample") and reference is None:
        raise UserError(
            f"ablate: {operator!r} needs reference=reference_activations(model, tokenizer, texts)."
        )
    hooked, fired, ran = set(), set(), []
    with ExitStack() as stack:
        for number, (site, part) in enumerate(parts_of(find_sites(model), mask)):
            if operator == "zero" and how != "hook" and editable(site):
                _zero_columns(stack, site, part)
                continue
            if how == "weights":
                raise UserError(
                    f"{site.name}: how='weights' cannot act: operator {operator!r}, or weights offloaded, "
                    "quantised or sharded. Use how='auto'."
                )
            hooked.add(site.name)
            if operator in EXPERT_OPERATORS:
                {"reroute": _reroute, "drop": _drop}[operator](stack, model, site, part, fired)
            else:
                value = _replacement(site, operator, reference, seed + number)
                (_edit_experts if site.family == "expert" else _edit_mlp)(
                    stack, site, part, value, fired
                )
        stack.callback(model.register_forward_hook(lambda *_: ran.append(True)).remove)
        yield
        if ran and hooked - fired:
            raise RuntimeError(
                f"ablate: the model ran, but nothing was edited in {sorted(hooked - fired)}."
            )


def assert_acted(before, after) -> float:
    """max |after - before| of two arrays or tensors (logits, losses). Raises RuntimeError unless
    finite and above 0.

    >>> assert_acted([1.0, 2.0], [1.0, 2.5])
    0.5
    """
    change = float((torch.as_tensor(after).double() - torch.as_tensor(before).double()).abs().max())
    if not 0 < change < np.inf:
        raise RuntimeError(
            f"the ablation did not act: max |change| is {change}. Either no token of these inputs "
            "reaches its components, or the intervention missed the model."
        )
    return change


def _zero_columns(stack, site, part) -> None:
    view = columns(site)
    part = part.to(view.device)
    stack.callback(view.__setitem__, part, view[part])  # view[part] is a copy, [neurons, D]
    view[part] = 0


def _replacement(site, operator, reference, seed):
    """(h, expert of each row or None) -> what ablated neurons become; broadcasts to h, [B, T, N]
    or [rows, N].
    """
    if operator == "zero":
        return lambda h, ids: h.new_zeros(())
    at = () if operator == "mean" else (torch.Generator().manual_seed(seed),)
    values, filled = (
        (reference.draws if at else reference.mean)[site.name],
        reference.filled[site.name],
    )

    def pick(h, ids):
        where = () if ids is None else (ids.cpu(),)
        if at:
            drawn = torch.rand(h.shape[:-1], generator=at[0]) * torch.as_tensor(filled)[where]
            where += (drawn.long(),)
        return values[where].to(h)

    return pick


def _edit_mlp(stack, site, part, value, fired) -> None:
    def edit(module, args):
        fired.add(site.name)
        return torch.where(part.to(args[0].device), value(args[0], None), args[0]), *args[1:]

    stack.callback(site.down.register_forward_pre_hook(edit).remove)


def _edit_experts(stack, site, part, value, fired) -> None:
    """Edit h inside the library's own fused experts, whose rows stand in routing order, or sorted
    by expert.
    """
    bank, gate, routed = site.module, site.module._apply_gate, []

    def note(module, args):
        running = module.config._experts_implementation
        if running not in ("grouped_mm", "batched_mm") or not module.has_gate:
            raise UserError(
                f"{site.name}: experts running as {running!r} (gated: {module.has_gate}) cannot be edited. "
                "Call model.set_experts_implementation('grouped_mm'), for the baseline too."
            )
        ids = args[1].reshape(-1)  # [B*T*K]
        routed[:] = [ids.sort().values if running == "grouped_mm" else ids]

    @wraps(gate)
    def edited(gate_up):
        h, ids = gate(gate_up), routed.pop()  # [B*T*K, N], [B*T*K]
        if len(h) != len(ids):
            raise RuntimeError(
                f"{site.name}: {len(h)} rows in the experts, but {len(ids)} were routed to them."
            )
        fired.add(site.name)
        return torch.where(part.to(h.device)[ids], value(h, ids), h)

    stack.callback(bank.register_forward_pre_hook(note).remove)
    _swap(stack, bank, "_apply_gate", edited)


def _swap(stack, module, name, function) -> None:
    """Give one instance another method until the stack unwinds; the former instance attribute, if
    any, comes back.
    """
    own = vars(module)
    stack.callback(*((own.__setitem__, name, own[name]) if name in own else (own.pop, name)))
    own[name] = function


def _drop(stack, model, site, part, fired) -> None:
    def edit(module, args):
        fired.add(site.name)
        gone = part.to(args[1].device)[args[1]]  # [B*T, K]
        return *args[:2], args[2].masked_fill(gone, 0), *args[3:]

    stack.callback(site.module.register_forward_pre_hook(edit).remove)


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


def _reroute(stack, model, site, part, fired) -> None:
    router, route, left = site.router, site.router.forward, site.experts - int(part.sum())
    top_k = getattr(router, "top_k", None) or model.config.get_text_config().num_experts_per_tok
    if left < top_k:
        raise UserError(
            f"{site.name}: reroute leaves {left} of {site.experts} experts, but a token takes {top_k}. "
            "Mask fewer experts, or use operator 'drop'."
        )

    @wraps(route)
    def rerouted(*args, **kwargs):
        with _MaskLogits(part) as logits:
            out = route(*args, **kwargs)
        if logits.hits != 1:
            raise RuntimeError(
                f"{site.name}: its router maps to E numbers {logits.hits} times, expected once."
            )
        return out

    def verify(module, args):
        fired.add(site.name)
        if part.to(args[1].device)[args[1]].any():
            raise UserError(
                f"{site.name}: a token had fewer than K experts left to choose from (experts in groups). "
                "Mask fewer experts, or use operator 'drop'."
            )

    _swap(stack, router, "forward", rerouted)
    stack.callback(site.module.register_forward_pre_hook(verify).remove)
    bias = getattr(
        router, "e_score_correction_bias", None
    )  # DeepSeek-V3 adds it after the sigmoid of -inf
    if bias is not None:
        gone = part.to(bias.device)
        stack.callback(bias.data.__setitem__, gone, bias.data[gone])
        bias.data[gone] = -torch.inf


def neuron_weights(site) -> dict[str, torch.Tensor]:
    """Views of what belongs to single neurons: "gate" (fc_in of a plain MLP), "up" where there is
    one, "down", and biases as <name>.bias; each [N, D] or [E, N, D], D = 1 for a bias. Edits reach
    the weights.

    Raises UserError for a layout that is not known, or weights that do not lie in memory as plain
    floats.
    """
    if not editable(site):
        raise UserError(
            f"{site.name}: its weights are offloaded, quantised or sharded and cannot be read neuron by "
            "neuron. Load the model whole and in plain floats."
        )
    found = {"down": columns(site)}
    if site.family == "expert":
        bank, name = site.module, "gate_up_proj" if site.module.has_gate else "up_proj"
        rows = getattr(bank, name).data
        stacks = {"": rows if bank.is_transposed else rows.transpose(1, 2)}  # [E, D, 2N]
        if bank.has_bias:
            stacks[".bias"] = getattr(bank, name + "_bias").data[:, None]  # [E, 1, 2N]
        for end, stack in stacks.items():
            found |= {
                name + end: part.transpose(1, 2) for name, part in _halves(bank, stack).items()
            }
        return found
    for name, child in site.module.named_children():
        if child is site.down or not isinstance(child, (nn.Linear, Conv1D)):
            continue
        rows = (
            child.weight.data if isinstance(child, nn.Linear) else child.weight.data.T
        )  # [N or 2N, D]
        bias = {} if child.bias is None else {".bias": child.bias.data[:, None]}
        for end, part in {"": rows, **bias}.items():
            if len(part) == 2 * site.width:
                found |= {"gate" + end: part[: site.width], "up" + end: part[site.width :]}
            elif len(part) == site.width:
                found[("up" if "up" in name.split("_") or name == "w3" else "gate") + end] = part
    if "gate" not in found:
        raise UserError(
            f"{site.name}: no projection of {site.width} or {2 * site.width} rows that feeds its "
            "activation. Its neurons' weights are not known; teach neuron_weights this layout."
        )
    return found


def _halves(bank, stack) -> dict:
    if not bank.has_gate:
        return {"gate": stack}
    up = stack.chunk(2, -1)[1] if bank.is_concatenated else stack[..., 1::2]
    return {"gate": gate_part(bank, stack), "up": up}


def weight_change(base, tuned) -> dict[str, np.ndarray]:
    """Relative change |tuned - base| / |base| of each neuron's gate row: {family: [L, N] or [L, E,
    N]}, and of each routed expert's router row, {"experts": [L, E]}. A row of zeros in the base is
    an error.
    """
    found = {}
    for one, two in zip(find_sites(base), find_sites(tuned), strict=True):
        pairs = {one.family: (neuron_weights(one)["gate"], neuron_weights(two)["gate"])}
        if one.family == "expert":
            pairs["experts"] = tuple(
                next(
                    p.data
                    for p in site.router.parameters()
                    if p.dim() == 2 and len(p) == site.experts
                )
                for site in (one, two)
            )
        for family, (a, b) in pairs.items():
            norm = a.float().norm(dim=-1)
            if not norm.all():
                raise UserError(
                    f"{one.name}: a base row of zeros; its relative change is not defined."
                )
            found.setdefault(family, []).append(
                ((b.float() - a.float()).norm(dim=-1) / norm).cpu().numpy()
            )
    return {family: np.stack(layers) for family, layers in found.items()}


@contextmanager
def transplant(model, donor, mask):
    """While open, the masked neurons of `model` have the weights of the same neurons of `donor`;
    then their own again, bit for bit. An empty mask is a no-op. Raises UserError if the two
    models' shapes differ.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2,
    ...                      vocab_size=9)
    >>> one, two = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> with transplant(one, two, {"dense": np.array([[True, False, True]])}):
    ...     (one.model.layers[0].mlp.gate_proj.weight == two.model.layers[0].mlp.gate_proj.weight).all(1).tolist()
    [True, False, True]
    """
    sites, sources = find_sites(model), {site.name: site for site in find_sites(donor)}
    with ExitStack() as stack:
        for site, part in parts_of(sites, mask):
            if site.name not in sources:
                raise UserError(
                    f"transplant: the donor has no {site.name}; expected a model of one architecture."
                )
            own, given = neuron_weights(site), neuron_weights(sources[site.name])
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
                raise UserError(
                    f"transplant: {site.name} has other shapes in the donor. Take base and tuned model of "
                    "one pair."
                )
            for name, view in own.items():
                at = part.to(view.device)
                stack.callback(view.__setitem__, at, view[at])  # view[at] is a copy
                view[at] = given[name][part.to(given[name].device)].to(view)
        yield
