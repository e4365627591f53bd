"""A neuron's own weights: its rows and column, how far tuning moved them, and moving them into another model. (Ours.)

A neuron of an MLP is a row of the gate projection, a row of the up projection (gated MLPs) and a column of the down
projection, biases of the rows included. Masks are component masks as in ablation.py: {family: bool [L, N]} or
{"expert": bool [L, E, N]}.
"""

from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.ablation import columns, editable, parts_of
from helpers.counting import gate_part
from helpers.record import UserError
from helpers.sites import find_sites


def neuron_weights(site) -> dict[str, torch.Tensor]:
    """Views of what belongs to single neurons: "gate" (fc_in of a plain MLP), "up" where there is one, "down", and
    biases as <name>.bias; each [N, D] or [E, N, D], D = 1 for a bias. Edits reach the weights.

    Raises UserError for a layout that is not known, or weights that do not lie in memory as plain floats.
    """
    if not editable(site):
        raise UserError(f"{site.name}: its weights are offloaded, quantised or sharded and cannot be read neuron by "
                        "neuron. Load the model whole and in plain floats.")
    found = {"down": columns(site)}
    if site.family == "expert":
        bank, name = site.module, "gate_up_proj" if site.module.has_gate else "up_proj"
        rows = getattr(bank, name).data
        stacks = {"": rows if bank.is_transposed else rows.transpose(1, 2)}                     # [E, D, 2N]
        if bank.has_bias:
            stacks[".bias"] = getattr(bank, name + "_bias").data[:, None]                       # [E, 1, 2N]
        for end, stack in stacks.items():
            found |= {name + end: part.transpose(1, 2) for name, part in _halves(bank, stack).items()}
        return found
    for name, child in site.module.named_children():
        if child is site.down or not isinstance(child, (nn.Linear, Conv1D)):
            continue
        rows = child.weight.data if isinstance(child, nn.Linear) else child.weight.data.T       # [N or 2N, D]
        bias = {} if child.bias is None else {".bias": child.bias.data[:, None]}
        for end, part in {"": rows, **bias}.items():
            if len(part) == 2 * site.width:
                found |= {"gate" + end: part[:site.width], "up" + end: part[site.width:]}
            elif len(part) == site.width:
                found[("up" if "up" in name.split("_") or name == "w3" else "gate") + end] = part
    if "gate" not in found:
        raise UserError(f"{site.name}: no projection of {site.width} or {2 * site.width} rows that feeds its "
                        "activation. Its neurons' weights are not known; teach neuron_weights this layout.")
    return found


def _halves(bank, stack) -> dict:
    if not bank.has_gate:
        return {"gate": stack}
    up = stack.chunk(2, -1)[1] if bank.is_concatenated else stack[..., 1::2]
    return {"gate": gate_part(bank, stack), "up": up}


def weight_change(base, tuned) -> dict[str, np.ndarray]:
    """Relative change |tuned - base| / |base| of each neuron's gate row: {family: [L, N] or [L, E, N]}, and of each
    routed expert's router row, {"experts": [L, E]}. A row of zeros in the base is an error."""
    found = {}
    for one, two in zip(find_sites(base), find_sites(tuned), strict=True):
        pairs = {one.family: (neuron_weights(one)["gate"], neuron_weights(two)["gate"])}
        if one.family == "expert":
            pairs["experts"] = tuple(next(p.data for p in site.router.parameters()
                                          if p.dim() == 2 and len(p) == site.experts) for site in (one, two))
        for family, (a, b) in pairs.items():
            norm = a.float().norm(dim=-1)
            if not norm.all():
                raise UserError(f"{one.name}: a base row of zeros; its relative change is not defined.")
            found.setdefault(family, []).append(((b.float() - a.float()).norm(dim=-1) / norm).cpu().numpy())
    return {family: np.stack(layers) for family, layers in found.items()}


@contextmanager
def transplant(model, donor, mask):
    """While open, the masked neurons of `model` have the weights of the same neurons of `donor`; then their own again,
    bit for bit. An empty mask is a no-op. Raises UserError if the two models' shapes differ.

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
                raise UserError(f"transplant: the donor has no {site.name}; expected a model of one architecture.")
            own, given = neuron_weights(site), neuron_weights(sources[site.name])
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
                raise UserError(f"transplant: {site.name} has other shapes in the donor. Take base and tuned model of "
                                "one pair.")
            for name, view in own.items():
                at = part.to(view.device)
                stack.callback(view.__setitem__, at, view[at])          # view[at] is a copy
                view[at] = given[name][part.to(given[name].device)].to(view)
        yield
