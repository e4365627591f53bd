"""Interventions on neurons and routed experts; afterwards the model is what it was, bit for bit.

A *component mask* names what to ablate: {"dense" or "shared": bool [L_f, N], "expert": bool [L_f,
E, N]} for neurons, {"experts": bool [L_f, E]} for whole routed experts. L_f are the layers that
have such a family, in order, as in the counts. A neuron is ablated where the down projection reads
it: h = act(gate)*up of a gated MLP, act(fc) of a plain one. So `zero` is the same as act(gate) :=
0, but for a family with a norm between the two (BitNet): there the norm still sees the neuron, and
the others stay at the scale it gives them; `mean` and `resample` let nothing pass through `up`.

A neuron's own weights are a row of the gate projection, a row of the up projection (gated MLPs) and
a column of the down projection, biases of the rows included: `transplant` moves them into another
model, `weight_change` says how far tuning moved them.
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..record import UserError
from . import bank
from .beginnings import whole
from .budget import altered, altered_apart, mark, state
from .changes import replaced
from .sites import MIXER_NAME, find_sites

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


WHY_NOT = (
    "The operator is not 'zero', or the weights are offloaded, quantised, sharded, computed, "
    "wrapped or another layer's too, or `where` is given. Use how='auto'."
)


@dataclass
class Places:
    """Where neurons are ablated, to be set before each forward pass: `mask`, bool [B, T], at which
    tokens; `sets`, long [B], under which of several sets each sequence is.
    """

    mask: torch.Tensor | None = None
    sets: torch.Tensor | None = None


def _mask(mask) -> Mapping:
    if mask is not None and not isinstance(mask, Mapping):
        raise UserError(
            f"ablation mask: found {type(mask).__name__}, expected {{family: bool array}}. Make it "
            "of this model's counts: counts.mask('neurons', members)."
        )
    return mask or {}


def parts_of(sites, mask) -> list[tuple]:
    """A component mask by site: [(site, bool tensor [N], [E, N] or [E])], in the mask's order,
    all-False ones left out.

    Raises UserError for a family that the model has not, a wrong shape, or values that are not
    boolean.
    """
    parts = []
    for family, values in _mask(mask).items():
        here = [s for s in sites if s.family == ("expert" if family == "experts" else family)]
        if not here:
            raise UserError(
                f"ablation mask: family {family!r}, but the model has "
                f"{sorted({s.family for s in sites})} (and 'experts' where 'expert' is). Use a "
                "mask made from this model's counts."
            )
        shape = {"experts": (here[0].experts,), "expert": (here[0].experts, here[0].width)}.get(
            family, (here[0].width,)
        )
        values, expected = _array(values, family), (len(here), *shape)
        if values.dtype != bool or values.shape != expected:
            raise UserError(
                f"ablation mask, family {family!r}: found {values.dtype} {values.shape}, expected "
                f"bool {expected}. Use a mask made from this model's counts."
            )
        parts += [
            (site, torch.from_numpy(v.copy()))
            for site, v in zip(here, values, strict=True)
            if v.any()
        ]
    return parts


def _array(values, family) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(
            f"ablation mask, family {family!r}: its rows have different lengths. Use a mask made "
            "from this model's counts."
        ) from error


def _stacked(sites, masks) -> list[tuple]:
    """`parts_of` several masks of neurons, [(site, bool tensor [K, N] or [K, E, N])], in the sites'
    order.
    """
    found = [{site.name: part for site, part in parts_of(sites, mask)} for mask in masks]
    stacks = []
    for site in sites:
        some = [parts[site.name] for parts in found if site.name in parts]
        if some:
            none = torch.zeros_like(some[0])
            stacks.append((site, torch.stack([parts.get(site.name, none) for parts in found])))
    return stacks


def columns(site) -> torch.Tensor:
    """What each neuron writes: the down projection as [N, D], or [E, N, D]. A view: edits reach
    the weights.
    """
    if site.family == "expert":
        return bank.columns(site.module)
    return site.down.weight.data if isinstance(site.down, Conv1D) else site.down.weight.data.T


def editable(site) -> bool:
    """Whether the down projection's weight is what runs, and lies in memory as plain floats.

    Not so: offloaded (meta), quantised or sharded weights, a weight that is computed (parametrised,
    weight_norm), a layer inside another one (LoRA) or with another forward.
    """
    return _runs(site.module, "down_proj") if site.family == "expert" else _plain(site.down)


def _plain(linear) -> bool:
    """A linear layer of torch or of transformers (Falcon has its own) that holds nothing else."""
    known = type(linear) is nn.Linear or type(linear).__module__.startswith("transformers.")
    alone = set(linear._parameters) <= {"weight", "bias"} and not linear._modules
    return known and alone and _runs(linear, "weight")


def _runs(owner, name) -> bool:
    """Whether a module has such a weight, plain floats in memory, and its own forward."""
    weight = owner._parameters.get(name)
    wrapped = "forward" in vars(owner) and not hasattr(
        owner, "_hf_hook"
    )  # accelerate's own is known
    if weight is None or wrapped:
        return False
    kind = type(weight.data) is torch.Tensor and not weight.is_meta
    return kind and weight.dtype in FLOATS


def shared_weights(model) -> set[int]:
    """Addresses of the weights that several modules hold: to edit one would edit the others."""
    held = Counter(p.data_ptr() for _, p in model.named_parameters(remove_duplicate=False))
    return {address for address, times in held.items() if times > 1 and address}


def _address(site) -> int:
    """Where the down projection's weight lies; 0 if it is not one tensor in memory."""
    return columns(site).data_ptr() if editable(site) else 0


@contextmanager
def ablate(
    model,
    mask,
    operator: str,
    *,
    reference: Reference | None = None,
    seed: int = 0,
    how: str = "auto",
    where: "Places | None" = None,
):
    """While the context is open the masked components are ablated; an empty mask is a no-op.

    operator   neurons: "zero", h := 0; "mean", h := its mean on reference text; "resample", h at a
               reference position, drawn for each token and MLP. Experts: "reroute", as if they
               were deleted, so the next best one steps in; "drop", still chosen, at weight 0.
    reference  for "mean" and "resample"; seed, of "resample": its draws follow the batches' order.
    how        for "zero": "weights" zeroes columns of the down projection, "hook" edits its input:
               equal results. "auto": weights where they are what runs and no other layer's.
    where      at which tokens (see Places) neurons are ablated; everywhere if None. Whole experts
               take none. A list of masks needs it: which sequence is under which.

    The implementation of the experts is left as it runs: a run outside the context is the baseline.
    On leaving, every hook must have fired if the model ran; that the outputs moved is for the
    caller to assert (`assert_acted`). Raises UserError for what does not fit. (Ours.)

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=3, vocab_size=9,
    ...                                      num_hidden_layers=2, num_attention_heads=2)).eval()
    >>> mask = {"dense": np.array([[False, True, True], [False, False, False]])}
    >>> with ablate(model, mask, "zero"):
    ...     (model.model.layers[0].mlp.down_proj.weight != 0).any(0).tolist()
    [True, False, False]
    """
    parts = _asked(model, mask, operator, reference, seed, how, where)
    shared = shared_weights(model)
    hooked, fired, ran = set(), set(), []
    with ExitStack() as stack:
        for number, (site, part) in enumerate(parts):
            weights = operator == "zero" and how != "hook" and where is None
            if weights and _address(site) not in shared | {0}:
                _zero_columns(stack, site, part)
                continue
            if how == "weights":
                raise UserError(f"{site.name}: how='weights' cannot act. {WHY_NOT}")
            hooked.add(site.name)
            if operator in EXPERT_OPERATORS:
                _ablate_experts(stack, model, site, part, operator, fired)
            else:
                value = _replacement(site, operator, reference, seed + number)
                _edit_neurons(stack, site, part, value, fired, where)
        for module in {model, model.base_model}:  # losses run the trunk alone
            stack.callback(module.register_forward_hook(lambda *_: ran.append(True)).remove)
        if parts:
            _tell(stack, model, mask, operator, seed, where)
        stack.enter_context(whole(model, operator == "resample"))
        yield
        if ran and hooked - fired:
            raise RuntimeError(
                f"ablate: the model ran, but nothing was edited in {sorted(hooked - fired)}."
            )


def intact(model) -> bool:
    """Whether nothing is done to a model: no intervention is open, and no module has a hook but
    such as transformers and torch hang there (to hand out hidden states, to compute a weight).
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hooks = [h for m in model.modules() for kind in kinds for h in getattr(m, kind).values()]
    return not state(model) and all(_known(hook) for hook in hooks)


def _known(hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(("transformers.", "torch."))


def refuse_seed(seed) -> None:
    """Raise UserError for what is no whole number that a profile's `seed` may be."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed!r}, expected a whole number from 0 to {2**32 - 1}.")


def _asked(model, mask, operator, reference, seed, how, where) -> list[tuple]:
    """`parts_of` a mask, or of a list of them; refused where they are not to be ablated so."""
    refuse_seed(seed)
    several = isinstance(mask, list)
    masks = [_mask(one) for one in (mask if several else [mask])]
    for one in masks:
        _refuse_request(one, operator, reference, how)
    if several:
        _refuse_several(masks, operator, where)
    elif where is not None and "experts" in masks[0]:
        raise UserError(
            "ablate: whole experts at the places of `where`. They are ablated at every token or "
            "none: leave `where` out, or ablate their neurons."
        )
    sites = find_sites(model)
    parts = _stacked(sites, masks) if several else parts_of(sites, masks[0])
    if operator in ("mean", "resample"):
        _refuse_reference(parts, reference, operator)
    return parts


def _refuse_request(mask, operator, reference, how) -> None:
    neurons, experts = set(mask) - {"experts"}, "experts" in mask
    known = (() if experts else NEURON_OPERATORS) + (() if neurons else EXPERT_OPERATORS)
    if operator not in known:
        raise UserError(
            f"ablate: operator {operator!r} on a mask of {sorted(mask)}. Neurons take "
            f"{NEURON_OPERATORS}, whole experts {EXPERT_OPERATORS}; nest two contexts to ablate "
            "both."
        )
    if how not in ("auto", "weights", "hook"):
        raise UserError(f"ablate: how is {how!r}, expected 'auto', 'weights' or 'hook'.")
    if operator in ("mean", "resample") and not isinstance(reference, Reference):
        raise UserError(
            f"ablate: {operator!r} needs reference=reference_activations(model, tokenizer, texts), "
            f"found {type(reference).__name__}."
        )


def _refuse_reference(parts, reference, operator) -> None:
    singles = {name: draws[..., 0, :] for name, draws in reference.draws.items()}
    held = reference.mean if operator == "mean" else singles
    for site, _ in parts:
        found = held.get(site.name)
        shape = (site.experts, site.width) if site.family == "expert" else (site.width,)
        if found is None or tuple(found.shape) != shape:
            raise UserError(
                f"ablate: the reference has {found if found is None else tuple(found.shape)} for "
                f"{site.name}, expected {shape}. Make it of this model: reference_activations("
                "model, tokenizer, texts)."
            )


def _tell(stack, model, mask, operator, seed, where) -> None:
    """What the ledger is told: of several sets, which one each sequence is under."""
    if not isinstance(mask, list):
        stack.enter_context(altered(model, operator, seed, _mask(mask)))
        return
    marks = [mark(_mask(one)) for one in mask]
    told = altered_apart(model, lambda: [marks[k] for k in where.sets.tolist()])
    stack.enter_context(altered(model, operator, seed))
    stack.enter_context(told)


def _refuse_several(masks, operator, where) -> None:
    families = {family for mask in masks for family in mask}
    if "experts" in families or operator == "resample" or where is None or not masks:
        raise UserError(
            f"ablate: a list of {len(masks)} masks, operator {operator!r}, where {where}, families "
            f"{sorted(families)}. Several sets at once take neurons, 'zero' or 'mean', and "
            "`where`, which says what sequence is under which; else one mask a time."
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
    stack.enter_context(replaced(view, part.to(view.device), view.new_zeros(())))


def _replacement(site, operator, reference, seed):
    """(h, Routed or None) -> what ablated neurons become; broadcasts to h, [B, T, N] or [R, N]."""
    if operator == "zero":
        return lambda h, routed: h.new_zeros(())
    if operator == "mean":
        mean = reference.mean[site.name]
        return lambda h, routed: mean.to(h) if routed is None else mean.to(h)[routed.experts]
    draws, filled = reference.draws[site.name], torch.as_tensor(reference.filled[site.name])
    generator = torch.Generator("cpu").manual_seed(int(seed))

    def pick(h, routed):
        draw = torch.rand(h.shape[:-1], generator=generator, dtype=torch.float32, device="cpu")
        where = () if routed is None else (routed.experts.cpu(),)
        return draws[(*where, (draw * filled[where]).long())].to(h)

    return pick


def _edit_neurons(stack, site, part, value, fired, where=None) -> None:
    """Put value(h, experts) in the place of the masked neurons of every h that a down projection
    reads, or of those at the places of `where`.
    """

    def edit(h, routed=None):
        fired.add(site.name)
        at = part.to(h.device)
        if where is not None:
            at = _placed(at, where, h, routed)
        elif routed is not None:
            at = at[routed.experts]
        return torch.where(at, value(h, routed), h)

    if site.family == "expert":
        stack.enter_context(bank.editing(site.module, site.name, edit))
        return
    inside = _within(stack, site.module)  # another layer may call the same down projection

    def before(module, args):
        return (edit(args[0]), *args[1:]) if inside else None

    stack.callback(site.down.register_forward_pre_hook(before).remove)


def _placed(part, where, h, routed) -> torch.Tensor:
    """Which values of h are ablated, bool, of h's shape. part: [N], of routed experts [E, N]; of
    several sets [K, ...].
    """
    several = part.dim() > (1 if routed is None else 2)
    count = h[..., 0].numel() if routed is None else routed.count
    _refuse_places(where, several, count)
    mask = where.mask.to(h.device)  # [B, T]
    sets = where.sets.to(h.device) if several else None  # [B]
    if routed is None:
        part = part[sets][:, None] if several else part  # [B, 1, N]
        return (part & mask[..., None]).reshape(h.shape)
    ids, tokens = routed.experts, routed.tokens
    part = part[sets[tokens // mask.shape[1]], ids] if several else part[ids]  # [R, N]
    return part & mask.reshape(-1)[tokens, None]


def _refuse_places(where, several, count) -> None:
    if where.mask is None or several and where.sets is None:
        raise UserError("ablate: Places without a mask, or without sets. Fill it before each pass.")
    shape = tuple(where.mask.shape)
    sets = tuple(where.sets.shape) if several else shape[:1]
    if where.mask.numel() != count or sets != shape[:1]:
        raise UserError(
            f"ablate: Places with a mask {shape} and sets {sets}, where the model reads {count} "
            "tokens. Fill it with those of this pass: mask [B, T], sets [B]."
        )


def _within(stack, module) -> list:
    """A list that is empty but while the module runs."""
    inside = []
    stack.callback(module.register_forward_pre_hook(lambda *_: inside.append(True)).remove)
    leave = module.register_forward_hook(lambda *_: inside.clear(), always_call=True)
    stack.callback(leave.remove)
    return inside


def _ablate_experts(stack, model, site, part, operator, fired) -> None:
    def told():
        fired.add(site.name)

    if operator == "drop":
        stack.enter_context(bank.dropping(site.module, part, told))
        return
    bank.refuse_reroute(site, part, model.config.get_text_config(decoder=True))
    stack.enter_context(bank.rerouting(site, part, told))


def neuron_weights(site) -> dict[str, torch.Tensor]:
    """Views of what belongs to single neurons: "gate" (fc_in of a plain MLP), "up" where there is
    one, "down", and biases as <name>.bias; each [N, D] or [E, N, D], D = 1 for a bias. Edits reach
    the weights.

    Raises UserError for a layout that is not known, or weights that do not lie in memory as plain
    floats.
    """
    projections = _projections(site)
    if not editable(site) or not all(map(_plain, projections.values())):
        raise UserError(
            f"{site.name}: its weights are offloaded, quantised or sharded, computed or wrapped, "
            "and cannot be read neuron by neuron. Load the model whole, in plain floats, adapters "
            "merged."
        )
    if site.family == "expert":
        return {"down": columns(site)} | bank.neuron_rows(site.module)
    found = {"down": columns(site)} | _mlp_rows(site, projections)
    if "gate" not in found:
        raise UserError(
            f"{site.name}: no projection of {site.width} or {2 * site.width} rows that feeds its "
            "activation. Its neurons' weights are not known; teach neuron_weights this layout."
        )
    return found


def _projections(site) -> dict[str, nn.Module]:
    """What an MLP reads by, of whatever kind: its children that hold a matrix, but for `down` and,
    where the layer itself is the MLP, its attention.
    """
    kids = {} if site.family == "expert" else dict(site.module.named_children())
    return {name: kid for name, kid in kids.items() if kid is not site.down and _reads(name, kid)}


def _reads(name, module) -> bool:
    matrix = any(p.dim() > 1 for p in module.parameters()) and not MIXER_NAME.search(name)
    return matrix or hasattr(module, "out_features")


def _mlp_rows(site, projections) -> dict[str, torch.Tensor]:
    """Rows of "gate", of "up" where there is one [N, D], and their biases [N, 1]. The projection of
    a plain MLP is its gate, even where it is called up_proj.
    """
    found = {}
    for name, child in projections.items():
        weight = child.weight.data
        rows = weight.T if isinstance(child, Conv1D) else weight  # [N or 2N, D]
        bias = {} if child.bias is None else {".bias": child.bias.data[:, None]}
        for end, part in {"": rows, **bias}.items():
            if len(part) == 2 * site.width:
                found |= {"gate" + end: part[: site.width], "up" + end: part[site.width :]}
            elif len(part) == site.width:
                found[("up" if "up" in name.split("_") or name == "w3" else "gate") + end] = part
    if "gate" not in found and len(projections) == 1:
        found = {name.replace("up", "gate"): part for name, part in found.items()}
    return found


def weight_change(base, tuned) -> dict[str, np.ndarray]:
    """Relative change |tuned - base| / |base| of each neuron's gate row: {family: [L, N] or [L, E,
    N]}, and of each routed expert's router row, {"experts": [L, E]}. A row of zeros in the base is
    an error.
    """
    found = {}
    for one, two in zip(find_sites(base), find_sites(tuned), strict=True):
        pairs = {one.family: (neuron_weights(one)["gate"], neuron_weights(two)["gate"])}
        if one.family == "expert":
            pairs["experts"] = tuple(bank.router_rows(s.module, s.router) for s in (one, two))
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
    >>> config = LlamaConfig(hidden_size=8, intermediate_size=3, num_hidden_layers=1,
    ...                      num_attention_heads=2, vocab_size=9)
    >>> one, two = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> own, given = (model.model.layers[0].mlp.gate_proj.weight for model in (one, two))
    >>> with transplant(one, two, {"dense": np.array([[True, False, True]])}):
    ...     (own == given).all(1).tolist()
    [True, False, True]
    """
    sites, sources = find_sites(model), {site.name: site for site in find_sites(donor)}
    shared = shared_weights(model)
    parts = parts_of(sites, mask)
    with ExitStack() as stack:
        for site, part in parts:
            if site.name not in sources:
                raise UserError(
                    f"transplant: the donor has no {site.name}; expected a model of the same "
                    "architecture."
                )
            own, given = neuron_weights(site), neuron_weights(sources[site.name])
            if shared & {view.data_ptr() for view in own.values()}:
                raise UserError(
                    f"transplant: {site.name} shares weights with another layer, whose neurons "
                    "would change too. Its neurons are not its own and cannot be moved."
                )
            if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
                raise UserError(
                    f"transplant: {site.name} has other shapes in the donor. Take base and tuned "
                    "model of one pair."
                )
            for name, view in own.items():
                rows = given[name][part.to(given[name].device)].to(view)
                stack.enter_context(replaced(view, part.to(view.device), rows))
        if parts:
            stack.enter_context(altered(model, "transplant", mask))
        yield
