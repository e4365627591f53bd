"""Exact counts of active neurons and chosen experts while a model reads: streaming, masked,
nothing stored.
"""

import inspect
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from ..record import UserError
from .bank import observed
from .budget import CAST, is_cast, reading
from .counts import Counts
from .sites import Site, UnreadableModel, find_sites, input_device, returning_dicts

BLOCK = {"cpu": 2**19}  # cells compared with 0 at a time: fits the cache, bounds the memory
ROUNDING = {  # what two ways to one number may differ by, of the largest
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
LONGEST = 2**16 - 1  # tokens of one instruction that uint16 can count
HALF = 2**11  # float16 holds whole numbers up to here


def count_positive(x, group, groups: int):
    """How many rows of each group are positive, per column: x [R, N], group [R] in 0..groups ->
    float32 [groups, N].

    Rows of group number `groups` are left out. Exact: float32 holds whole numbers up to 2**24.
    (Ours.)

    >>> count_positive(torch.tensor([[1., -1.], [2., 0.], [3., 3.]]), torch.tensor([0, 0, 1]), 1)
    tensor([[2., 0.]])
    """
    exact = {"dtype": torch.float32, "device": x.device}  # whatever the default dtype is
    out = torch.zeros(groups + 1, x.shape[1], **exact)
    step = max(1, BLOCK.get(x.device.type, 2**26) // x.shape[1])
    cells = torch.empty(min(step, len(x)), x.shape[1], **exact)
    for first in range(0, len(x), step):
        part = x[first : first + step]
        out.index_add_(0, group[first : first + step], torch.gt(part, 0, out=cells[: len(part)]))
    return out[:groups]


def count_masked(x, masks):
    """How many masked tokens are positive, per column: x [B, T, N], masks [B, P, T] of 0 and 1 ->
    [B, P, N], float32 (on a GPU float16 where that is exact).

    One product of masks and 0/1 cells, a block of rows or columns at a time; exact, as above,
    however the P masks overlap, inside torch.autocast as well: every partial sum is a whole number
    that the dtype holds. (Ours.)

    >>> x = torch.tensor([[[1., -1.], [2., 0.], [3., 3.]]])
    >>> count_masked(x, torch.tensor([[[1, 1, 0], [0, 1, 1]]]))
    tensor([[[2., 0.],
             [2., 1.]]])
    """
    size, length, width = x.shape
    masks = masks.to(dtype := _exact(x.device, length))
    out = torch.empty(size, masks.shape[1], width, dtype=dtype, device=x.device)
    cells = max(1, BLOCK.get(x.device.type, 2**26) // length)  # columns of one row at a time
    rows, columns = max(1, cells // width), min(width, cells)
    for b in range(0, size, rows):
        for n in range(0, width, columns):
            part = (x[b : b + rows, :, n : n + columns] > 0).to(dtype)
            out[b : b + rows, :, n : n + columns] = _product(masks[b : b + rows], part)
    return out


def count_routed(a, ids, rows, masks, experts: int):
    """How many masked tokens are positive in the expert that they were routed to: a [R, N] of R =
    B*T*K (token, expert) pairs in any order, ids [R] expert, rows [R] token, masks [B, P, T] ->
    [B, P, E, N], dtype as above.

    The pairs of one instruction stand together, so that all groups and experts are one product
    whose left side says which pair counts where. Most of it is zeros, which tensor cores pass by
    faster than anything can be scattered. (Ours.)

    >>> a, one = torch.tensor([[1., -1.], [2., 3.]]), torch.ones(1, 1, 2)
    >>> count_routed(a, torch.tensor([0, 1]), torch.tensor([0, 1]), one, 2)
    tensor([[[[1., 0.],
              [1., 1.]]]])
    """
    size, groups, length = masks.shape
    pairs = len(a) // size  # T*K, of one instruction
    order = torch.argsort(rows, stable=True)
    cells = (a > 0)[order].view(size, pairs, -1)
    chosen = ids[order].view(size, 1, pairs) == torch.arange(experts, device=a.device)[:, None]
    token = rows[order].view(size, 1, pairs) % length
    where = masks.gather(2, token.expand(-1, groups, -1)).to(torch.bool)  # [B, P, T*K]
    step = max(1, BLOCK.get(a.device.type, 2**26) // chosen.numel())  # groups at a time
    parts = [
        count_masked(cells, (some[:, :, None] & chosen[:, None]).flatten(1, 2))
        for some in where.split(step, 1)
    ]
    return torch.cat(parts, 1).unflatten(1, (groups, experts))


def _product(masks, cells):
    """masks [B, P, T] @ cells [B, T, N] in their own dtype, whatever autocast is open."""
    with torch.autocast(masks.device.type, enabled=False):
        return masks @ cells


def _exact(device, most: int):
    """The narrowest dtype in which matrices of 0 and 1 are multiplied exactly, up to `most`; the
    CPU has no fast one but float32.
    """
    return torch.float16 if most <= HALF and not _on_cpu(device) else torch.float32


def _on_cpu(device) -> bool:
    return device.type == "cpu"


class Counter:
    """What `count_activations` yields: call it with token ids [B, T] and masks, get the Counts of
    these B sequences. `hidden` [B, T, D], the last hidden state, is kept until the next call.
    """

    def __init__(self, model, sites):
        self.model, self.trunk, self.sites, self.forwards = model, model.base_model, sites, 0
        self.placed = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.moved: dict[str, torch.Tensor] = {}  # empty while no batch is being counted
        self.hidden, self.left_tried = None, False

    @torch.no_grad()
    def __call__(self, input_ids, attention_mask=None, count_mask=None) -> Counts | list[Counts]:
        """One forward pass through the trunk (the language-model head is not needed). Masks of 0
        and 1: what the model attends to, [B, T] (default: everything), and which of these tokens
        count (default: all of these).

        A count mask [B, T] gives one Counts; [B, P, T] gives P of them, one per position group,
        from the same pass. The groups may overlap; each is counted as if it were alone.
        """
        ids = input_ids.cpu()
        attended = _ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        counted = attended if count_mask is None else count_mask.cpu().long()
        for fault in self._faults(ids, attended, counted):
            raise UserError(f"{type(self.model).__name__} cannot count this batch: {fault}.")
        masks = counted.reshape(len(ids), -1, ids.shape[1])  # [B, P, T]
        if not self.left_tried and not attended[:, 0].all():
            self._refuse_moved(ids, attended)
        self.hidden = self._forward(ids, attended, masks)
        tokens = masks.sum(2)  # [B, P]
        finite = self.hidden.isfinite().all(-1) | (attended.to(self.hidden.device) == 0)  # [B, T]
        self._verify(finite.all(), ids.numel(), tokens)
        groups = self._collect(tokens)
        return groups if counted.dim() == 3 else groups[0]

    def _start(self, ids, masks):
        self.forwards += 1
        self.size, self.groups, self.length = masks.shape
        self.found, self.routed, self.impossible, self.hidden = {}, {}, [], None
        self.rows = dict.fromkeys((s.name for s in self.sites), 0)
        longest = int(masks.sum(2).max())
        self.kept = torch.int16 if longest < 2**15 else torch.int32  # less to keep and to move
        self.moved = {"cpu": masks.to(torch.float32)}

    def _refuse_moved(self, ids, attended):
        """Raise UserError if a row that is padded on the left is read otherwise than alone."""
        row = int((attended[:, 0] == 0).nonzero()[0])
        one, seen = ids[row, None], attended[row, None]  # [1, T] each
        n = int(seen.sum())
        at = seen[0] == 1
        beside = self._forward(one, seen, seen[:, None])[0].cpu()[at]
        alone = self._forward(one[:, at], seen[:, at], seen[:, None, at])[0].cpu()  # [n, D]
        gap = (beside - alone).abs().max() / alone.abs().max()
        if gap > ROUNDING[alone.dtype]:
            raise UserError(
                f"{type(self.model).__name__} reads {n} tokens otherwise when they are padded on "
                "the left than alone: its positions move. Pad on the right."
            )
        self.left_tried = True

    def _forward(self, ids, attended, masks):
        """The last hidden state [B, T, D] of one pass, in which the sites count."""
        self._start(ids, masks)
        try:
            return self._read(ids, attended)
        finally:
            self.moved = {}

    def _read(self, ids, attended):
        inputs = {"input_ids": ids, "attention_mask": attended}
        if self.placed and not attended[:, 0].all():
            # left padding must not move the tokens' positions
            inputs["position_ids"] = (attended.cumsum(1) - 1).clamp(min=0)
        device = input_device(self.model)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        with returning_dicts(self.model), reading(self.model, ids, attended, "counts"):
            return self.trunk(**inputs, use_cache=False).last_hidden_state

    def _faults(self, ids, attended, counted):
        most = longest(self.model)
        fits = ids.dim() == 2 and ids.shape == attended.shape and counted.dim() in (2, 3)
        fits = fits and counted.shape[:: counted.dim() - 1] == ids.shape
        if not fits or not ids.numel() or not counted.numel():
            yield (
                f"ids {tuple(ids.shape)}, attention mask {tuple(attended.shape)} and count mask "
                f"{tuple(counted.shape)} must have one shape [B, T], the last or [B, P, T]"
            )
        elif any(((mask != 0) & (mask != 1)).any() for mask in (attended, counted)):
            yield "a mask holds other numbers than 0 and 1"
        elif not attended.any(1).all():
            yield "a sequence is all padding: leave it out"
        elif (counted.reshape(len(ids), -1, ids.shape[1]) > attended[:, None]).any():
            yield "padding is marked as counted: the count mask must lie within the attention mask"
        elif attended.sum(1).max() > most:
            yield (
                f"a sequence has {int(attended.sum(1).max())} tokens, more than the {most} that "
                "can be read: shorten it or leave it out"
            )

    def _masks(self, device):
        """The count masks [B, P, T] on `device`, as float32."""
        if not self.moved:
            raise UserError(
                "the model ran inside count_activations without masks: call counter(input_ids, "
                "attention_mask) instead of model(...), and generate outside the context."
            )
        if str(device) not in self.moved:
            self.moved[str(device)] = self.moved["cpu"].to(device)
        return self.moved[str(device)]

    def watch_mlp(self, site):
        """Hook on an MLP's activation module."""

        def hook(module, args, out):
            if out.shape[-1] != site.width:
                raise UnreadableModel(
                    f"{type(self.model).__name__} is not read exactly: the activation of "
                    f"{site.name} gives {out.shape[-1]} numbers, not its {site.width} neurons'."
                )
            x, masks = out.reshape(-1, site.width), self._masks(out.device)
            self.rows[site.name] += len(x)
            if len(x) == self.size * self.length:  # else _verify says so
                found = count_masked(x.view(self.size, self.length, -1), masks)
                self.found[site.name] = found.to(self.kept)  # [B, P, N]

        return hook

    def watch_router(self, site):
        """Hook before a bank of experts: which tokens go where, whatever the implementation."""

        def hook(module, args):
            index, masks = args[1], self._masks(args[1].device)  # [B*T, K], [B, P, T]
            if len(index) == self.size * self.length:  # else _verify says so
                met = torch.zeros(
                    len(index), site.experts, dtype=torch.float32, device=index.device
                )
                met.scatter_add_(1, index, torch.ones_like(index, dtype=met.dtype))
                met = met.view(self.size, self.length, -1)  # [B, T, E]
                self.routed[site.name] = _product(masks, met)  # [B, P, E]
            self.chosen = index.shape[1]

        return hook

    def watch_experts(self, site):
        """Observer inside a bank of experts: ids [R] expert, rows [R] token, a [R, N] of R =
        B*T*K.
        """

        def observer(ids, rows, a):
            self.rows[site.name] += len(a) // self.chosen
            if self.rows[site.name] != self.size * self.length:
                return  # _verify says so
            if _on_cpu(a.device):
                found = self._scattered(site, ids, rows, a)
            else:
                found = count_routed(a, ids, rows, self._masks(a.device), site.experts)
            self.found[site.name] = found.to(self.kept)  # [B, P, E, N]
            self.impossible.append((found.amax(-1) > self.routed[site.name]).any())

        return observer

    def _scattered(self, site, ids, rows, a):
        """What `count_routed` gives, by adding up each group's own rows: least work on a CPU."""
        masks, nowhere = self._masks(a.device), self.size * site.experts
        cell = ids * self.size + rows // self.length  # an expert's tokens of one instruction
        shape, found = (site.experts, self.size, site.width), []
        for p in range(self.groups):
            inside = masks[:, p].reshape(-1)[rows] > 0
            if self.groups == 1:
                part = count_positive(a, cell.where(inside, nowhere), nowhere)
            else:  # groups may be small: only their own rows are looked at
                part = count_positive(a[inside], cell[inside], nowhere)
            found.append(part.to(self.kept).view(shape).transpose(0, 1))
        return torch.stack(found, 1)

    def _verify(self, finite, tokens, counted):
        """Every site saw every token once; sum of f = K; p_e <= f_e; nothing was NaN (which is not
        > 0).
        """
        for name, rows in self.rows.items():
            if rows != tokens or name not in self.found:
                raise RuntimeError(
                    f"{name} saw {rows} tokens where the model read {tokens}: its MLP runs "
                    "some other way (a fused kernel?), and these counts cannot be trusted."
                )
        for name, routed in self.routed.items():
            if not torch.equal(routed.sum(2).cpu(), (self.chosen * counted).to(torch.float32)):
                raise RuntimeError(
                    f"{name}: its routed tokens do not add up to {self.chosen} experts per token."
                )
        if any(bool(torch.stack(found).any()) for found in _by_device(self.impossible)):
            raise RuntimeError("a neuron was active on more tokens than were routed to its expert.")
        if not finite:
            raise UserError(
                "the last hidden state is not finite: a NaN would count as inactive in silence. "
                "Load the model in float32 or bfloat16, and check its weights."
            )

    def _collect(self, tokens) -> list[Counts]:
        """The Counts of each position group, in which the sequences have tokens [B, P]."""
        families = {
            f: [s for s in self.sites if s.family == f] for f in ("dense", "shared", "expert")
        }
        families = {f: sites for f, sites in families.items() if sites}
        layers = {f: tuple(s.layer for s in sites) for f, sites in families.items()}
        return [
            Counts(
                tokens[:, p].numpy().astype(np.int32),
                {f: self._table(self.found, sites, p) for f, sites in families.items()},
                self._table(self.routed, families["expert"], p) if "expert" in families else None,
                layers,
            )
            for p in range(tokens.shape[1])
        ]

    def _table(self, found, sites, p) -> np.ndarray:
        """What the sites of one family found of one group, uint16 [B, L, ...]: moved as a whole, a
        copy of its own that holds no other group's memory.
        """
        parts = [found[s.name][:, p].to(self.kept) for s in sites]
        parts = parts if len(_by_device(parts)) == 1 else [part.cpu() for part in parts]
        table = _on_host(torch.stack(parts, 1)).numpy()
        same = table.dtype == np.int16  # no number in it is negative
        return table.view(np.uint16) if same else table.astype(np.uint16)


def _on_host(table):
    """The table in the host's memory; from a GPU in pinned memory, whose pages the next batch gets
    again: fresh ones take longer to fault in than the counts take to be counted.
    """
    if _on_cpu(table.device):
        return table
    host = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=table.is_cuda)
    return host.copy_(table)


def _by_device(tensors) -> list[list]:
    """The same tensors, those of each device together."""
    found = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return list(found.values())


def longest(model) -> int:
    """The most tokens of one sequence that the model can read and uint16 can count."""
    text = model.config.get_text_config(decoder=True)
    return min(getattr(text, "max_position_embeddings", None) or LONGEST, LONGEST)


def _ones_like(ids):
    return torch.ones_like(ids, dtype=torch.long)


@contextmanager
def watching(model, kind=Counter):
    """Yield a Counter whose hooks are on the model while the context is open. Raises UserError for
    a model that cannot be counted as it is, or if nothing was counted.
    """
    counter = kind(model, ready_sites(model))
    with ExitStack() as stack:
        if any(s.family == "expert" for s in counter.sites):
            stack.enter_context(observed(model))
        for site in counter.sites:
            if site.family == "expert":
                site.module.observer = counter.watch_experts(site)
                stack.callback(delattr, site.module, "observer")
                stack.callback(
                    site.module.register_forward_pre_hook(counter.watch_router(site)).remove
                )
            else:
                stack.callback(site.act.register_forward_hook(counter.watch_mlp(site)).remove)
        yield counter
    if not counter.forwards:
        raise UserError(
            "nothing was counted: call counter(input_ids, attention_mask) inside the context."
        )


def ready_sites(model) -> list[Site]:
    """The sites of a model that can be counted as it is. Raises UserError for one that is inside a
    wrapper, compiled, in training mode, quantised, split by tensor or expert parallelism, without
    weights or a trunk of its own, of uneven width, under an open autocast, or counted already.
    """
    faults = (
        (
            is_compiled,
            "it is compiled, so hooks may not run: use the model as it was before compiling",
        ),
        (is_quantised, "it is quantised, where exactness is not proven: load float weights"),
        (
            lambda m: any(part.training for part in m.modules()),
            "it is in training mode, where dropout changes counts: call model.eval()",
        ),
        (is_split, "it is split by tensor parallelism: spread it by device_map instead"),
        (lacks_weights, "it has no weights (meta device): load its checkpoint"),
        (
            lambda m: getattr(m, "base_model", None) is m,
            "it has no trunk of its own (its base_model is itself), whose last hidden state could "
            "be read: use another causal language model",
        ),
        (is_cast, CAST),
        (
            lambda m: any("observer" in vars(part) for part in m.modules()),
            "it is being counted already: close the other count_activations first",
        ),
    )
    for found, fault in faults:
        if found(model):
            raise UserError(f"{type(model).__name__} cannot be counted: {fault}.")
    sites = find_sites(model)
    sizes = {(s.family, s.width, s.experts) for s in sites}
    if len(sizes) > len({family for family, *_ in sizes}):
        raise UserError(
            f"{type(model).__name__} cannot be counted: its layers' widths differ "
            f"({sorted(sizes)}), which these tables cannot hold."
        )
    return sites


def is_compiled(model) -> bool:
    """Whether torch.compile wraps the model or any module in it."""
    whole = hasattr(model, "_orig_mod")
    return whole or any(m._compiled_call_impl is not None for m in model.modules())


def is_quantised(model) -> bool:
    """Whether weights are kept in another form than floats: by the model's own word, by modules
    that torch has put in, or by tensors of another kind (torchao).
    """
    return (
        getattr(model, "is_quantized", False)
        or any(".quantized" in type(m).__module__ for m in model.modules())
        or any(_packed(p) for p in model.parameters())
    )


def _packed(weight) -> bool:
    kind = type(weight.data)
    plain = kind is torch.Tensor or kind.__module__.startswith("torch.distributed")
    floats = weight.is_floating_point() and weight.itemsize > 1
    return not plain or (weight.dim() > 1 and not floats)


def is_split(model) -> bool:
    """Whether each device holds a part of every weight, or of every bank its own experts."""
    return (
        (getattr(model, "_tp_size", None) or 1) > 1
        or any(getattr(m, "_is_expert_parallel", False) for m in model.modules())
        or any(type(p.data).__module__.startswith("torch.distributed") for p in model.parameters())
    )


def lacks_weights(model) -> bool:
    """Whether a weight is on the meta device and nothing will fetch it when it is needed."""
    bare = (m for m in model.modules() if not hasattr(m, "_hf_hook"))
    return any(p.is_meta for m in bare for p in m.parameters(recurse=False))
