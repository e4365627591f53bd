"""Where neurons and experts stand in a causal language model, found by structure."""

import re
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..record import UserError

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
DOWN_PROJECTIONS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "output_linear", "fc_out")


class UnreadableModel(UserError):
    """An architecture whose neurons cannot be read exactly: refused, never guessed."""


@dataclass(frozen=True)
class Site:
    """One place where neurons stand: a layer's only MLP ("dense"), the always-on MLP beside its
    experts ("shared"), or its bank of routed experts ("expert").
    """

    name: str  # in model.named_modules()
    layer: int
    family: str
    width: int  # N, of the MLP or of one expert
    experts: int  # E; 1 where nothing is routed
    module: nn.Module = field(repr=False, compare=False)
    act: nn.Module | None = field(
        repr=False, compare=False
    )  # its output is A [B, T, N]; None in a bank
    down: nn.Module | nn.Parameter = field(
        repr=False, compare=False
    )  # a linear layer, or the bank's 3-D weight
    router: nn.Module | None = field(repr=False, compare=False)  # what chooses the bank's experts


def find_sites(model) -> list[Site]:
    """Every MLP and every expert bank of a causal language model, in layer order, routed ones last
    in their layer.

    Found by structure: an MLP has an activation and a down projection for children, a bank has a
    3-D `down_proj` and is driven by transformers' experts interface. Nothing is run, so a model on
    the meta device will do. Raises UnreadableModel, saying what was found and what is missing,
    wherever that leaves a doubt. (Ours.)
    """
    text, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
    modules, found, unknown = dict(model.named_modules()), [], []
    inside, prefix = set(decoder.modules()), next(n for n, m in modules.items() if m is decoder)
    for name, module in modules.items():
        if module not in inside or not (
            number := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name[len(prefix) :])
        ):
            continue
        layer, own = int(number[1]), dict(module.named_parameters(recurse=False))
        kids = dict(module.named_children())
        act = next((kids[a] for a in ACTIVATIONS if a in kids), None)
        down = next((kids[d] for d in DOWN_PROJECTIONS if d in kids), None)
        weight = own.get("down_proj")
        if weight is not None and weight.dim() == 3 and hasattr(module, "is_transposed"):
            width = weight.shape[
                1 if module.is_transposed else 2
            ]  # [E, N, D] if transposed, else [E, D, N]
            router = _router(modules[name.rpartition(".")[0]], module)
            found.append(
                Site(name, layer, "expert", width, len(weight), module, None, weight, router)
            )
        elif any(p.dim() > 2 and min(p.shape) > 1 for p in own.values()) and "conv" not in name:
            unknown.append(f"{name} ({type(module).__name__} with {', '.join(own)})")
        elif act is not None and down is not None:
            width, out = _in_out(down)
            if out == getattr(text, "hidden_size", None):
                found.append(Site(name, layer, "dense", width, 1, module, act, down, None))
    banks = {s.layer for s in found if s.family == "expert"}
    sites = [
        Site(s.name, s.layer, "shared", s.width, 1, s.module, s.act, s.down, None)
        if s.family == "dense" and s.layer in banks
        else s
        for s in found
    ]
    _refuse_doubts(sites, unknown, getattr(text, "num_hidden_layers", 0), type(model).__name__)
    return sorted(sites, key=lambda s: (s.layer, s.family == "expert"))


def _in_out(linear) -> tuple[int, int]:
    """Width in and width out of a linear layer, GPT-2's Conv1D included; (0, 0) for anything else."""
    if hasattr(linear, "nf"):
        return tuple(linear.weight.shape)
    return getattr(linear, "in_features", 0), getattr(linear, "out_features", 0)


def _router(block, bank):
    """The child of a sparse block, other than the bank, that holds one row of weights per expert."""
    return next(
        (
            child
            for child in block.children()
            if child is not bank
            and any(p.dim() == 2 and len(p) == len(bank.down_proj) for p in child.parameters())
        ),
        None,
    )


def _refuse_doubts(sites, unknown, layers, model) -> None:
    count = Counter((s.layer, s.family) for s in sites)
    missing = sorted(set(range(layers)) - {s.layer for s in sites})
    acts = [id(s.act) for s in sites if s.act is not None]
    doubts = [f"unknown layout of {u}" for u in unknown[:3]]
    doubts += [
        f"layer {layer} has {n} {family} MLPs" for (layer, family), n in count.items() if n > 1
    ][:3]
    doubts += [
        f"no router beside {s.name}" for s in sites if s.family == "expert" and s.router is None
    ][:3]
    doubts += [f"no MLP in layers {missing}"] if missing else []
    doubts += [] if layers else ["its configuration has no num_hidden_layers"]
    doubts += ["layers share one activation module"] if len(set(acts)) < len(acts) else []
    if doubts:
        raise UnreadableModel(
            f"{model} cannot be read exactly: {'; '.join(doubts)}. Expected in each of its {layers} layers one MLP "
            f"with an activation module ({', '.join(ACTIVATIONS)}) and a down projection "
            f"({', '.join(DOWN_PROJECTIONS)}), or fused experts driven by transformers' experts interface."
        )


def input_device(model):
    """Where token ids must be put: the device that the embedding runs on, also when its weights
    are offloaded.
    """
    embedding = model.get_input_embeddings()
    return (
        getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        or embedding.weight.device
    )
