"""Where neurons and experts stand in a causal language model, found by structure."""

import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from ..record import UserError
from .bank import bank_width, is_bank, router_of

ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
DOWN_PROJECTIONS = ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "output_linear", "fc_out")
MLP_NAME = re.compile("mlp|ffn|feed_?forward|expert|shared|dense", re.IGNORECASE)
MIXER_NAME = re.compile("attn|attention|mamba|mixer|conv|latent|norm", re.IGNORECASE)


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
    # its output is A [B, T, N]; None in a bank
    act: nn.Module | None = field(repr=False, compare=False)
    # a linear layer, or the bank's 3-D weight
    down: nn.Module | nn.Parameter = field(repr=False, compare=False)
    # what chooses the bank's experts, and the sparse block that holds both
    router: nn.Module | None = field(default=None, repr=False, compare=False)
    block: nn.Module | None = field(default=None, repr=False, compare=False)


def find_sites(model) -> list[Site]:
    """Every MLP and every expert bank of a causal language model, in layer order, routed ones last
    in their layer.

    Found by structure: an MLP has an activation and a down projection for children, a bank has a
    3-D `down_proj` and is driven by transformers' experts interface. Nothing is run, so a model on
    the meta device will do. Raises UnreadableModel, saying what was found and what is missing,
    wherever that leaves a doubt, UserError for a model inside a wrapper. (Ours.)
    """
    refuse_wrapped(model)
    text = model.config.get_text_config(decoder=True)
    hidden, modules = getattr(text, "hidden_size", None), _in_layers(model)
    found, unknown = [], []
    for name, (layer, module) in modules.items():
        own = {k: p for k, p in module._parameters.items() if p is not None}
        if is_bank(module):
            block = model.get_submodule(name.rpartition(".")[0])
            size = bank_width(module), len(module.down_proj)
            router = router_of(block, module)
            found.append(
                Site(name, layer, "expert", *size, module, None, module.down_proj, router, block)
            )
        elif any(p.dim() > 2 and min(p.shape) > 1 for p in own.values()) and "conv" not in name:
            unknown.append(f"{name} ({type(module).__name__} with {', '.join(own)})")
        elif mlp := _mlp_of(module, hidden):
            found.append(Site(name, layer, "dense", mlp[2], 1, module, *mlp[:2]))
    banks = {s.layer for s in found if s.family == "expert"}
    sites = [
        replace(s, family="shared") if s.family == "dense" and s.layer in banks else s
        for s in found
    ]
    unread = _unread(modules, sites, hidden)
    layers = getattr(text, "num_hidden_layers", 0)
    _refuse_doubts(sites, unknown, unread, layers, type(model).__name__)
    return sorted(sites, key=lambda s: (s.layer, s.family == "expert"))


def refuse_wrapped(model) -> None:
    """Raise UserError for what is no transformers model, naming the one inside if it wraps one."""
    if isinstance(model, PreTrainedModel):
        return
    told = {
        "PeftModel": "call model.merge_and_unload(), or pass model.get_base_model(), in which its "
        "adapters stay at work",
        "DataParallel": "pass model.module",
        "OptimizedModule": "pass the model as it was before compiling",
    }
    kinds = [c.__name__ for c in type(model).__mro__]
    cure = next((what for kind, what in told.items() if any(kind in k for k in kinds)), None)
    raise UserError(
        f"{type(model).__name__} is not a transformers causal language model"
        + (f" but wraps one: {cure}." if cure else ". Load one by AutoModelForCausalLM.")
    )


def _in_layers(model) -> dict[str, tuple[int, nn.Module]]:
    """(number of the layer, module) of each module of the decoder's numbered layers, by name."""
    decoder, modules = model.get_decoder(), dict(model.named_modules())
    inside, prefix = set(decoder.modules()), next(n for n, m in modules.items() if m is decoder)
    found = {}
    for name, module in modules.items():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name[len(prefix) :])
        if module in inside and number:
            found[name] = int(number[1]), module
    return found


def _mlp_of(module, hidden):
    """(activation, down projection, width) of an MLP that writes to the residual stream."""
    kids = dict(module.named_children())
    act = next((kids[a] for a in ACTIVATIONS if a in kids), None)
    down = next((kids[d] for d in DOWN_PROJECTIONS if d in kids), None)
    if act is None or down is None:
        return None
    width, out = _in_out(down)
    return (act, down, width) if out == hidden else None


def _in_out(linear) -> tuple[int, int]:
    """Width in and width out of a linear layer, GPT-2's Conv1D included; else (0, 0)."""
    if hasattr(linear, "nf"):
        return tuple(linear.weight.shape)
    return getattr(linear, "in_features", 0), getattr(linear, "out_features", 0)


def _unread(modules, sites, hidden) -> list[str]:
    """Names of what looks like an MLP, in a layer or beside a bank, and is no site: its neurons
    would be left out in silence.

    By name: it has a down projection that writes to the residual stream. By structure, for the
    children of a sparse block and whatever is called after an MLP: one linear map from the
    residual stream and another one back. Attention and other mixers are not meant.
    """
    known = {m for s in sites for m in (*s.module.modules(), s.router) if m is not None}
    blocks = {s.block for s in sites if s.block is not None}
    kin = {m for block in blocks for m in block.children()}
    found = []
    for name, (_, module) in modules.items():
        last = name.rpartition(".")[2]
        if module in known or MIXER_NAME.search(last) or MIXER_NAME.search(type(module).__name__):
            continue
        named = any(_in_out(kid)[1] == hidden for kid in _named_down(module))
        if any(m in known for m in module.modules()):  # a block: only what stands in it directly
            kids = [m for k, m in module.named_children() if not MIXER_NAME.search(k)]
            maps = [m for m in kids if m not in known] if module in blocks else []
        else:
            maps = list(module.modules()) if module in kin or MLP_NAME.search(last) else []
        if named or _there_and_back(maps, hidden):
            found.append(f"{name} ({type(module).__name__})")
    return [n for n in found if not any(n.startswith(m.split(" ")[0] + ".") for m in found)]


def _named_down(module):
    return (kid for name, kid in module.named_children() if name in DOWN_PROJECTIONS)


def _there_and_back(linears, hidden) -> bool:
    """Whether one of some modules is a linear map from the residual stream, another one back."""
    sizes = [size for m in linears if min(size := _in_out(m)) > 1]
    reads, writes = ([n for n, s in enumerate(sizes) if s[end] == hidden] for end in (0, 1))
    return bool(reads and writes) and len({*reads, *writes}) > 1


def _refuse_doubts(sites, unknown, unread, layers, model) -> None:
    count = Counter((s.layer, s.family) for s in sites)
    missing = sorted(set(range(layers)) - {s.layer for s in sites})
    acts = [id(s.act) for s in sites if s.act is not None]
    doubts = [f"unknown layout of {u}" for u in unknown[:3]]
    doubts += [f"no activation module in {u}, so its neurons cannot be read" for u in unread[:3]]
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
            f"{model} cannot be read exactly: {'; '.join(doubts)}. Expected in each of its "
            f"{layers} layers one MLP with an activation module ({', '.join(ACTIVATIONS)}) and a "
            f"down projection ({', '.join(DOWN_PROJECTIONS)}), or fused experts driven by "
            "transformers' experts interface."
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


@contextmanager
def returning_dicts(model):
    """While open, the model's parts give one another what they expect, whatever its configuration's
    `return_dict` says.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    plain = [c for c in configs.values() if getattr(c, "return_dict", True) is False]
    for config in plain:
        config.return_dict = True
    try:
        yield
    finally:
        for config in plain:
            config.return_dict = False
