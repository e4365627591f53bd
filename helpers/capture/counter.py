"""Exact counts of active neurons and chosen experts while a model reads: streaming, masked,
nothing stored.
"""

import inspect
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

from ..record import UserError
from .bank import observed
from .counts import Counts
from .sites import Site, find_sites, input_device

BLOCK = {"cpu": 2**19}  # cells compared with 0 at a time: fits the cache, bounds the memory
LONGEST = 2**16 - 1  # tokens of one instruction that uint16 can count


def count_positive(x, group, groups: int):
    """How many rows of each group are positive, per column: x [R, N], group [R] in 0..groups ->
    float32 [groups, N].

    Rows of group number `groups` are left out. Exact: float32 holds whole numbers up to 2**24.
    (Ours.)

    >>> count_positive(torch.tensor([[1., -1.], [2., 0.], [3., 3.]]), torch.tensor([0, 0, 1]), 1)
    tensor([[2., 0.]])
    """
    out = torch.zeros(groups + 1, x.shape[1], device=x.device)
    step = max(1, BLOCK.get(x.device.type, 2**26) // x.shape[1])
    cells = torch.empty(min(step, len(x)), x.shape[1], device=x.device)
    for first in range(0, len(x), step):
        part = x[first : first + step]
        out.index_add_(0, group[first : first + step], torch.gt(part, 0, out=cells[: len(part)]))
    return out[:groups]


class Counter:
    """What `count_activations` yields: call it with token ids [B, T] and masks, get the Counts of
    these B sequences.
    """

    def __init__(self, model, sites):
        self.model, self.trunk, self.sites, self.forwards = model, model.base_model, sites, 0
        self.placed = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.group: dict[str, torch.Tensor] = {}  # empty while no batch is being counted

    @torch.no_grad()
    def __call__(self, input_ids, attention_mask=None, count_mask=None) -> Counts:
        """One forward pass through the trunk (the language-model head is not needed). Masks [B, T]
        of 0 and 1: what the model attends to (default: everything), and which of these tokens
        count (default: all of these).
        """
        ids = input_ids.cpu()
        attended = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu().long()
        counted = attended if count_mask is None else count_mask.cpu().long()
        for fault in self._faults(ids, attended, counted):
            raise UserError(f"{type(self.model).__name__} cannot count this batch: {fault}.")
        inputs = {"input_ids": ids, "attention_mask": attended}
        if (
            self.placed and not attended[:, 0].all()
        ):  # left padding must not move the tokens' positions
            inputs["position_ids"] = (attended.cumsum(1) - 1).clamp(min=0)
        device, self.size, self.forwards = input_device(self.model), len(ids), self.forwards + 1
        self.found, self.routed, self.impossible = {}, {}, []
        self.rows = dict.fromkeys((s.name for s in self.sites), 0)
        instruction = torch.arange(self.size)[:, None].where(
            counted == 1, self.size
        )  # [B, T], B: not counted
        self.group = {"cpu": instruction.reshape(-1)}
        try:
            last = self.trunk(
                **{k: v.to(device) for k, v in inputs.items()}, use_cache=False
            ).last_hidden_state
        finally:
            self.group = {}
        self._verify(last[attended.to(last.device) == 1], ids.numel(), counted.sum(1))
        return self._collect(counted.sum(1))

    def _faults(self, ids, attended, counted):
        rows = self.model.get_input_embeddings().num_embeddings
        context = getattr(
            self.model.config.get_text_config(decoder=True), "max_position_embeddings", None
        )
        if ids.dim() != 2 or not ids.numel() or not ids.shape == attended.shape == counted.shape:
            yield (
                f"ids {tuple(ids.shape)}, attention mask {tuple(attended.shape)} and count mask "
                f"{tuple(counted.shape)} must have one shape [B, T]"
            )
        elif not attended.any(1).all():
            yield "a sequence is all padding: leave it out"
        elif (counted > attended).any():
            yield "padding is marked as counted: the count mask must lie within the attention mask"
        elif ids.min() < 0 or ids.max() >= rows:
            yield f"token id {int(ids.max())} lies outside its {rows} embeddings: use the model's own tokenizer"
        elif attended.sum(1).max() > min(context or LONGEST, LONGEST):
            yield (
                f"a sequence has {int(attended.sum(1).max())} tokens, more than the "
                f"{min(context or LONGEST, LONGEST)} that can be read: shorten it or leave it out"
            )

    def _group(self, device):
        """The instruction number of each of the B*T tokens, B for those not counted, on `device`."""
        if not self.group:
            raise UserError(
                "the model ran inside count_activations without masks: call counter(input_ids, "
                "attention_mask) instead of model(...), and generate outside the context."
            )
        if str(device) not in self.group:
            self.group[str(device)] = self.group["cpu"].to(device)
        return self.group[str(device)]

    def watch_mlp(self, site):
        """Hook on an MLP's activation module."""

        def hook(module, args, out):
            x, group = out.reshape(-1, site.width), self._group(out.device)
            self.rows[site.name] += len(x)
            if len(x) == len(group):  # else _verify says so
                self.found[site.name] = count_positive(x, group, self.size)  # [B, N]

        return hook

    def watch_router(self, site):
        """Hook before a bank of experts: which tokens go where, whatever the implementation."""

        def hook(module, args):
            index, group = args[1], self._group(args[1].device)  # [B*T, K]
            cell = (group[:, None] * site.experts + index).reshape(-1)
            tally = torch.zeros((self.size + 1) * site.experts, device=index.device)
            tally.scatter_add_(0, cell, torch.ones_like(cell, dtype=tally.dtype))
            self.routed[site.name] = tally.view(-1, site.experts)[: self.size]  # [B, E]
            self.chosen = index.shape[1]

        return hook

    def watch_experts(self, site):
        """Observer inside a bank of experts: ids [R] expert, rows [R] token, gate [R, N] of R =
        B*T*K.
        """

        def observer(ids, rows, gate):
            group, nowhere = self._group(gate.device)[rows], self.size * site.experts
            cell = torch.where(group < self.size, ids * self.size + group, nowhere)
            found = (
                count_positive(gate, cell, nowhere)
                .view(site.experts, self.size, site.width)
                .transpose(0, 1)
            )
            self.found[site.name] = found  # [B, E, N]
            self.rows[site.name] += len(gate) // self.chosen
            self.impossible.append((found.amax(-1) > self.routed[site.name]).any())

        return observer

    def _verify(self, last, tokens, counted):
        """Every site saw every token once; sum of f = K; p_e <= f_e; nothing was NaN (which is not
        > 0).
        """
        for name, rows in self.rows.items():
            if rows != tokens or name not in self.found:
                raise RuntimeError(
                    f"{name} saw {rows} tokens where the model read {tokens}: its MLP runs some other "
                    "way (a fused kernel?), and these counts cannot be trusted."
                )
        for name, routed in self.routed.items():
            if not torch.equal(routed.sum(1).cpu(), (self.chosen * counted).float()):
                raise RuntimeError(
                    f"{name}: its routed tokens do not add up to {self.chosen} experts per token."
                )
        if any(bool(wrong) for wrong in self.impossible):
            raise RuntimeError("a neuron was active on more tokens than were routed to its expert.")
        if not last.isfinite().all():
            raise UserError(
                "the last hidden state is not finite: a NaN would count as inactive in silence. Load the "
                "model in float32 or bfloat16, and check its weights."
            )

    def _collect(self, tokens) -> Counts:
        def table(found, sites):
            small = torch.int16 if tokens.max() < 2**15 else torch.int32  # less to move off a GPU
            return np.stack(
                [found[s.name].to(small).cpu().numpy().astype(np.uint16) for s in sites], axis=1
            )

        families = {
            f: [s for s in self.sites if s.family == f] for f in ("dense", "shared", "expert")
        }
        families = {f: sites for f, sites in families.items() if sites}
        return Counts(
            tokens.numpy().astype(np.int32),
            {f: table(self.found, sites) for f, sites in families.items()},
            table(self.routed, families["expert"]) if "expert" in families else None,
            {f: tuple(s.layer for s in sites) for f, sites in families.items()},
        )


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
    """The sites of a model that can be counted as it is. Raises UserError for one that is
    compiled, in training mode, quantised, split by tensor parallelism, without weights, of uneven
    width, or being counted already.
    """
    sites = []

    def faults():
        if hasattr(model, "_orig_mod") or any(
            m._compiled_call_impl is not None for m in model.modules()
        ):
            yield "it is compiled, so hooks may not run: use the model as it was before compiling"
        elif any(m.training for m in model.modules()):
            yield "it is in training mode, where dropout changes counts: call model.eval()"
        elif getattr(model, "is_quantized", False) or any(
            ".quantized" in type(m).__module__ for m in model.modules()
        ):
            yield "it is quantised, where exactness is not proven: load float weights"
        elif (getattr(model, "_tp_size", None) or 1) > 1:
            yield "it is split by tensor parallelism: spread it by device_map instead"
        elif any(
            p.is_meta
            for m in model.modules()
            if not hasattr(m, "_hf_hook")
            for p in m.parameters(recurse=False)
        ):
            yield "it has no weights (meta device): load its checkpoint"
        elif any("observer" in vars(m) for m in model.modules()):
            yield "it is being counted already: close the other count_activations first"
        else:
            sites.extend(find_sites(model))
            sizes = {(s.family, s.width, s.experts) for s in sites}
            if len(sizes) > len({family for family, *_ in sizes}):
                yield f"its layers' widths differ ({sorted(sizes)}), which these tables cannot hold"

    for fault in faults():
        raise UserError(f"{type(model).__name__} cannot be counted: {fault}.")
    return sites
